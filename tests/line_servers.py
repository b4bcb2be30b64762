"""What the tests of sinks share: events, free ports, programs of Debian's packages."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn

import pytest
from filelock import FileLock

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


@contextmanager
def only_camera() -> Iterator[None]:
    """Wait until no other test has Aravis' fake camera: its protocol has one fixed port."""
    with FileLock(Path(tempfile.gettempdir()) / "flowad-fake-camera.lock", timeout=120):
        yield


def until(holds: Callable[[], object], limit: float = 10) -> None:
    """Wait until something holds."""
    end = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def listening(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def certificate(folder: Path, name: str = "urn:line") -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and the application `name`, and its key, both PEM, in `folder`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    names = [x509.IPAddress(ip_address("127.0.0.1")), x509.UniformResourceIdentifier(name)]
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(private)
    return paths
