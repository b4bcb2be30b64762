"""Which parts are in flight, on disk, so that a line that was killed can name them at its next start.

One line of JSON when a part arrives and one when its outcome was told, each a single append. That survives the end of
the process by any signal; it does not survive a power cut, for nothing waits for the disk.
"""

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from flowad_fast.errors import ConfigError
from flowad_fast.files import make_folder


@dataclass(frozen=True)
class Begun:
    """A part that arrived: its id, the camera that saw it, and when (UTC)."""

    part: str
    camera: str
    arrived: datetime


class Journal:
    """Parts in flight of one line. Not safe from many threads: its user holds a lock.

    Attributes:
        lost: parts that an earlier run began and never ended, in order of arrival. They stay in the journal until
            `end` is called for them, so that a crash before they were told loses nothing.
    """

    def __init__(self, folder: str | Path, largest: int = 1 << 20) -> None:
        """Open the journal of a folder, which is made where it is missing.

        Args:
            folder: of this line alone.
            largest: bytes after which what is over is dropped from the file.

        Raises:
            ConfigError: the folder cannot be made, or another line runs with this folder.
        """
        self.folder = Path(folder)
        make_folder(self.folder)
        self.path, self._largest = self.folder / "parts.jsonl", largest
        self._lock = FileLock(self.folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{self.folder}: another line runs with this journal; stop it, or give this line a folder of its own"
            ) from None
        self._file = -1
        self._torn = False  # the last append was cut off, so the next one must not continue its line
        self._open = self._read()
        self.lost = tuple(self._open.values())
        self._rewrite()

    def begin(self, part: str, camera: str, arrived: datetime) -> None:
        """A part has arrived; `arrived` in UTC. Raises ValueError for an id that is in flight already."""
        if part in self._open:
            raise ValueError(f"part {part!r} is in flight already; ids must be unique")
        self._open[part] = Begun(part, camera, arrived)
        self._append(_begun(self._open[part]))

    def end(self, part: str) -> None:
        """A part's outcome was told. Raises KeyError for a part that is not in flight."""
        del self._open[part]
        self._append(json.dumps({"end": part}) + "\n")
        if self._size > self._largest:
            self._rewrite()

    def close(self) -> None:
        """Let go of the folder; what is in flight stays in the file. Calling it again does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _append(self, line: str) -> None:
        data = b"\n" * self._torn + line.encode()
        self._size += (written := os.write(self._file, data))
        self._torn = written != len(data)
        if self._torn:
            raise OSError(f"{self.path}: {written} of {len(data)} bytes were written; free space on its disk")

    def _read(self) -> dict[str, Begun]:
        parts: dict[str, Begun] = {}
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
                if "end" in entry:
                    parts.pop(entry["end"], None)
                else:
                    arrived = datetime.fromisoformat(entry["arrived"])
                    parts[entry["part"]] = Begun(entry["part"], entry["camera"], arrived)
            except (ValueError, KeyError, TypeError):
                continue  # torn by a full disk: an end that is missing names a part once too often, never too seldom
        return parts

    def _rewrite(self) -> None:
        """Keep only what is in flight: a whole new file in place of the old one."""
        fresh = self.path.with_suffix(".new")
        data = "".join(map(_begun, self._open.values())).encode()
        fresh.write_bytes(data)
        os.replace(fresh, self.path)
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = os.open(self.path, os.O_WRONLY | os.O_APPEND), len(data)
        self._torn = False
        self._largest = max(self._largest, 2 * self._size)  # many in flight must not rewrite at every end


def _begun(part: Begun) -> str:
    """By hand, for the part waits for it: `dumps` of a dictionary takes as long as writing to the disk."""
    text = json.encoder.encode_basestring_ascii
    return f'{{"part": {text(part.part)}, "camera": {text(part.camera)}, "arrived": "{part.arrived.isoformat()}"}}\n'
