"""A real `flowad-line run` in a process of its own, what it is fed, and whether it accounts for all of it."""

import http.client
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import psutil
import yaml

from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.bundle import MANIFEST
from flowad_fast.errors import LineStoppedError
from flowad_fast.files import sha256

DEADLINE = 2.0
"""Seconds; a part that is judged twice as slowly as ever seen here is still in time."""
CALL, START, DRAIN = 1.0, 60.0, 5.0
"""The line's limits, short so that the campaign is."""
TOKEN = "a-token-of-the-campaign"
WHOLE, TORN, FROZEN, LOST = "p", "x", "f", "l"
"""A picture; half of its file; the picture before once more; what nobody saw. Only the first may ever be good."""
USUAL = "flowad_fast.cli.line"


@dataclass(frozen=True)
class Fed:
    """A part that the source was given: which picture, in which way, and when (monotonic)."""

    picture: int
    way: str
    at: float


class Feeding(Protocol):
    """What a rig is fed by, and what counts that."""

    rate: float

    def settings(self) -> dict[str, object]:
        """Of the line's source."""

    def start(self) -> None:
        """Begin, when the line is ready."""

    def stop(self) -> None:
        """The last part has come."""

    def given(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Fed]:
        """What has come by the name that the line must tell it under; `rows` is what the line has told."""


class Feed:
    """Writes pictures into the watched folder at a rate, each under a name of its own: the count of what came in."""

    def __init__(self, work: Work, folder: Path, rate: float, seed: int) -> None:
        """Nothing is written until `start`."""
        self.folder, self.rate, self.way = folder, rate, WHOLE
        self._data = [path.read_bytes() for path in work.pictures]
        self._random = random.Random(seed)
        self._order: list[int] = []
        self.fed: dict[str, Fed] = {}
        self._stop, self._allowed = threading.Event(), threading.Event()
        self._allowed.set()
        self._writing = threading.Lock()
        self._last = 0
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)

    def settings(self) -> dict[str, object]:
        """Of the line's source."""
        return {"kind": "folder", "folder": self.folder.name, "quiet": 0, "poll": 0.01}

    def given(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Fed]:
        """What has come, by name of the file."""
        return self.fed

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def pause(self) -> None:
        """No more parts until `resume`; returns when none is being written."""
        self._allowed.clear()
        with self._writing:
            pass

    def resume(self) -> None:
        """Parts again."""
        self._allowed.set()

    def stop(self) -> None:
        """The last part was written."""
        self._stop.set()
        self._allowed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + 1 / self.rate, time.monotonic() - 1)
            self._allowed.wait()
            with self._writing:
                if self._allowed.is_set() and not self._stop.is_set():
                    self._write()

    def _write(self) -> None:
        way = self.way
        if way != FROZEN:
            if not self._order:
                self._order = self._random.sample(range(len(self._data)), len(self._data))
            self._last = self._order.pop()
        data = self._data[self._last]
        name = f"{len(self.fed):06d}-{self._last:02d}{way}.png"
        part = self.folder / f"{name}.tmp"
        part.write_bytes(data[: len(data) // 2] if way == TORN else data)
        self.fed[name] = Fed(self._last, way, time.monotonic())
        part.rename(self.folder / name)


class Rig:
    """A folder with settings, the line that runs with them, and its feed.

    Attributes:
        feed: what comes in.
        files: what comes in as files, where `feed` is that.
        bundle: hash of the bundle that is to judge.
        ended: when the line was last ended by a signal (monotonic); None: never.
    """

    def __init__(
        self,
        work: Work,
        folder: Path,
        *,
        rate: float,
        seed: int,
        sinks: tuple[dict[str, object], ...] = (),
        module: str = USUAL,
        feed: Feeding | None = None,
        **settings: object,
    ) -> None:
        """Write the settings; nothing runs yet.

        Args:
            work: bundle and pictures.
            folder: of this line alone.
            rate: parts a second.
            seed: of their order.
            sinks: beside the JSON lines and the database.
            module: which command runs.
            feed: what it is fed by; None: files.
            settings: fields of the settings that differ.
        """
        self.work, self.folder, self.module, self.port = work, folder, module, free_port()
        self.incoming, self.out = folder / "incoming", folder / "out"
        for one in (self.incoming, self.out):
            one.mkdir(parents=True, exist_ok=True)
        self.files = Feed(work, self.incoming, rate, seed)
        self.feed: Feeding = feed or self.files
        (folder / "token").write_text(TOKEN)
        plain: dict[str, object] = {
            "bundle": str(work.bundle),
            "deadline": DEADLINE,
            "threads": 1,
            "device": "cpu",
            "largest_batch": 4,
            "capacity": 64,
            "sources": {"cell": self.feed.settings()},
            "sinks": [
                {"kind": "jsonl", "path": "out/outcomes.jsonl", "daily": False},
                {"kind": "database", "url": "sqlite:///out/outcomes.sqlite"},
                *sinks,
            ],
            "limits": {"call": CALL, "start": START, "drain": DRAIN},
            "journal": "out/journal",
            "web": {"port": self.port, "token": {"file": "token"}, "bundles": str(work.bundle.parent)},
        }
        (folder / "line.yaml").write_text(yaml.safe_dump(plain | settings))
        self.bundle = sha256(work.bundle / MANIFEST)[:12]
        self.ended: float | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # The process

    def start(self) -> None:
        """Start the line and wait until it is ready; LineStoppedError where it does not become so."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, "run", "line.yaml", "--every", "0", "--json"],
            cwd=self.folder,
            stdout=(self.folder / "stdout").open("ab"),
            stderr=(self.folder / "stderr").open("ab"),
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if not until(self.ready, START, self.alive):
            raise LineStoppedError(f"the line did not start: {self.words()}")

    @property
    def process(self) -> psutil.Process:
        """The line's."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    @property
    def child(self) -> psutil.Process:
        """The detector's."""
        found = [one for one in self.process.children() if "spawn_main" in " ".join(one.cmdline())]
        if not found:
            raise LineStoppedError(f"the detector's process is not there: {self.words()}")
        return found[0]

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> int:
        """Send a signal that ends it, and wait; the exit code."""
        assert self._process is not None
        self.ended = time.monotonic()
        self._process.send_signal(number)
        return self.wait(DRAIN + 10)

    def wait(self, seconds: float) -> int:
        """Wait for its end; the exit code. It is killed after `seconds`, which LineStoppedError says."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise LineStoppedError(f"the line did not end within {seconds:g} s") from None

    def words(self) -> str:
        """The last that it said on standard error."""
        lines = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def ask(self, method: str, path: str, body: object = None, timeout: float = 5) -> tuple[int, bytes]:
        """A request to its page: status and body; OSError where nobody answers."""
        one = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        try:
            one.request(method, path, None if body is None else json.dumps(body), headers)
            answer = one.getresponse()
            return answer.status, answer.read()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from None
        finally:
            one.close()

    def ready(self) -> bool:
        """Whether its probe says so."""
        try:
            return self.ask("GET", "/readyz", timeout=2)[0] == 200
        except OSError:
            return False

    def sinks(self) -> dict[str, Any]:
        """State of its sinks, as the page shows it."""
        found = json.loads(self.ask("GET", "/api/state")[1])["sinks"]
        return found if isinstance(found, dict) else {one["name"]: one for one in found}

    # What came out

    def rows(self) -> list[dict[str, Any]]:
        """Records in the JSON lines, in order; the same one twice only once."""
        path = self.out / "outcomes.jsonl"
        seen: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if line.endswith(b"\n") and (row := json.loads(line))["event"] == "record":
                seen.setdefault(f"{row['part']} {row['result']}", row)
        return list(seen.values())

    def alarms(self) -> list[str]:
        """Kinds of the alarms in the JSON lines, in order."""
        path = self.out / "outcomes.jsonl"
        rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        return [row["kind"] for row in rows if row["event"] == "alarm" and not row["over"]]

    def stored(self) -> set[tuple[str, str]]:
        """Part and result of every row in the database."""
        path = self.out / "outcomes.sqlite"
        if not path.exists():
            return set()
        base = sqlite3.connect(path)
        try:
            return set(base.execute("SELECT part, result FROM flowad_outcomes"))
        finally:
            base.close()

    def judged_since(self, moment: float) -> bool:
        """Whether a whole part that was fed after `moment` has a verdict."""
        rows = self.rows()
        given = self.feed.given(rows)
        for row in rows[::-1]:
            fed = given.get(name_of(row))
            if fed is not None and fed.at > moment and row["result"] in ("good", "anomalous"):
                return True
        return False

    def back(self, moment: float, limit: float) -> float | None:
        """Seconds from `moment` until it is ready and has judged a later part; None where it is not within `limit`."""
        end = moment + limit
        good = until(lambda: self.ready() and self.judged_since(moment), end - time.monotonic(), self.alive)
        return time.monotonic() - moment if good else None

    def told(self, limit: float) -> bool:
        """Wait until every part that was fed has an outcome."""

        def all_told() -> bool:
            rows = self.rows()
            return self.feed.given(rows).keys() <= {name_of(row) for row in rows}

        return until(all_told, limit, self.alive)

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.feed.stop()
        if self._process is not None and self.alive():
            os.killpg(self._process.pid, signal.SIGKILL)  # the detector too, which may stand still
            self._process.wait()


def name_of(row: Mapping[str, Any]) -> str:
    """The file of a part, or the frame of a connection."""
    return str(row["part"]).split("/", 2)[-1]


def until(holds: Callable[[], object], seconds: float, while_true: Callable[[], bool] = lambda: True) -> bool:
    """Wait until something holds; False after `seconds`, or when `while_true` no longer does."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() >= end or not while_true():
            return bool(holds())
        time.sleep(0.03)
    return True


def free_port() -> int:
    """A port of the loopback interface that nothing listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def listening(port: int) -> bool:
    """Whether anything listens on a port of the loopback interface."""
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


KILL, TERM, HALT = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
