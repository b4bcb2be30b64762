"""What the tests of sinks share: events, free ports, programs of Debian's packages."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import pytest

from flowad_fast.line.event import Action, Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.stages.decision import Verdict

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)


def record(part: str, result: Verdict | NoResult = Verdict.GOOD, arrived: datetime = NOW) -> Record:
    action: Action = "pass" if result is Verdict.GOOD else "reject"
    return Record(part, "c", result, action, arrived, 0.1, 1.5, 2.0, bundle="b" * 8, timings={"scoring": 0.05})


def free_port() -> int:
    """A port of the loopback interface that nothing listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def program(name: str, package: str, *folders: Path) -> str:
    """Path of a program; where it is missing the test is skipped, under CI failed, with the package that has it."""
    path = [*map(str, folders), os.environ["PATH"], "/usr/sbin"]
    return shutil.which(name, path=os.pathsep.join(path)) or missing(package)


def missing(package: str) -> NoReturn:
    reason = f"needs Debian's package {package}: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def until(holds: Callable[[], object], limit: float = 10) -> None:
    """Wait until something holds."""
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def listening(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0
