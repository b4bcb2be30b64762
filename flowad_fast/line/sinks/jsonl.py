"""Records and alarms as JSON lines in a file that is rotated by size and day."""

import json
import os
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import ClassVar, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.files import make_folder
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.sinks.base import SinkBase
from flowad_fast.line.sinks.rows import to_row


class JsonLinesSettings(SinkBase):
    """One JSON object per line (see `rows.to_row`) in `path`.

    A full file is renamed `<stem>-<YYYYMMDD>-<number><suffix>`, with the UTC day of its last line.
    """

    promises_delivery: ClassVar[bool] = True

    kind: Literal["jsonl"]
    path: Path
    largest: int = Field(default=64 << 20, gt=0)
    """Bytes of a file; what is published at once is never split, so that a larger batch makes a larger file."""
    daily: bool = True
    """Begin a new file at midnight UTC."""
    keep: int = Field(default=30, ge=1)
    """Full files that stay; older ones are deleted."""

    def open(self) -> "JsonLines":
        """The sink."""
        return JsonLines(self)

    def check(self) -> str:
        """That the file can be appended to."""
        sink = self.open()
        try:
            sink.connect()
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error}); choose another path") from None
        finally:
            sink.close()
        return f"{self.path} can be written"


class JsonLines:
    """A batch is in the file as a whole and on the disk, or not at all and `publish` raises."""

    def __init__(self, settings: JsonLinesSettings, today: Callable[[], date] | None = None) -> None:
        """Nothing is opened yet; `today` in UTC is for tests."""
        self._settings = settings
        self._today = today or (lambda: datetime.now(UTC).date())
        self._lock = FileLock(settings.path.with_name(settings.path.name + ".lock"))
        self._file = -1
        self._size = 0
        self._day = date.min

    def connect(self) -> None:
        """Open the file and end a line that a killed process left unfinished; OSError or ConfigError on failure."""
        if self._file >= 0:
            return
        path = self._settings.path
        make_folder(path.parent)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(f"{path}: another line writes this file; give each line a file of its own") from None
        binary: int = getattr(os, "O_BINARY", 0)  # Windows would write other line ends
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | binary, 0o644)
        status = os.fstat(self._file)
        self._size = status.st_size
        self._day = datetime.fromtimestamp(status.st_mtime, UTC).date() if self._size else self._today()
        if self._size:
            os.lseek(self._file, -1, os.SEEK_END)
            if os.read(self._file, 1) != b"\n":
                self._append(b"\n")

    def publish(self, events: list[Record | Alarm]) -> None:
        """Append the events; DeliveryError on failure, after which the file is as before."""
        data = b"".join(json.dumps(to_row(event), allow_nan=False).encode() + b"\n" for event in events)
        try:
            self.connect()
            full = self._size + len(data) > self._settings.largest
            if self._size and (full or self._settings.daily and self._today() != self._day):
                self._rotate()
                self.connect()
            self._append(data)
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); free space on its disk, or choose another path"
            raise DeliveryError(f"{self._settings.path}: {reason}") from None
        self._day = self._today()

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._lock.release()

    def _append(self, data: bytes) -> None:
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _rotate(self) -> None:
        path, day = self._settings.path, f"{self._day:%Y%m%d}"
        self.close()
        numbers = [number for one, number, _ in self._full() if one == day]
        path.rename(path.with_name(f"{path.stem}-{day}-{max(numbers, default=0) + 1:06d}{path.suffix}"))
        for _, _, old in self._full()[: -self._settings.keep]:
            old.unlink(missing_ok=True)

    def _full(self) -> list[tuple[str, int, Path]]:
        """Full files with their day and number, oldest first."""
        path, found = self._settings.path, []
        for one in path.parent.iterdir():
            if one.suffix == path.suffix and one.stem.startswith(path.stem + "-"):
                day, _, number = one.stem.removeprefix(path.stem + "-").partition("-")
                if len(day) == 8 and day.isdecimal() and number.isdecimal():
                    found.append((day, int(number), one))
        return sorted(found)
