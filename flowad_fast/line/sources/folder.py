"""A watched folder: each file is one part, taken once, when it is complete."""

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Literal

from pydantic import Field

from flowad_fast.data.images import read_frame
from flowad_fast.errors import ConfigError, FrameError
from flowad_fast.line.sources.base import Shot, SourceBase

_Version = tuple[int, int]


class FolderSettings(SourceBase):
    """New files of a folder (not of folders in it).

    A file is complete when its size and time have not changed for `quiet` seconds; a writer that renames it into place
    when it is whole, from a name that starts with a point or ends in .tmp or .part, needs no such wait.
    """

    kind: Literal["folder"]
    folder: Path
    quiet: float = Field(default=0.2, ge=0, le=60)
    """Seconds without a change after which a file is complete; 0 for writers that rename."""
    poll: float = Field(default=0.05, gt=0, le=60)
    """Seconds between two looks."""
    patterns: tuple[str, ...] = ("*.png", "*.jpg", "*.jpeg", "*.bmp", "*.tif", "*.tiff")
    old: Literal["take", "skip"] = "take"
    """Whether files that lie there at the very first start are parts."""

    def open(self, state: Path) -> "WatchedFolder":
        """The source; `state` lists the files that were taken."""
        return WatchedFolder(self, state)

    def check(self) -> str:
        """That the folder can be listed."""
        try:
            count = len(_listed(self))
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be listed ({error.strerror}); make it, or name another") from None
        return f"{self.folder} can be listed, {count} image files lie there"


class WatchedFolder:
    """Files in the order of their time, then their name. What is replaced by another version is another part."""

    def __init__(self, settings: FolderSettings, state: Path) -> None:
        """Read which files were taken by earlier runs."""
        self._settings, self._state = settings, state
        self._first = settings.old == "skip" and not state.exists()
        self._taken = _read(state)
        self._seen: dict[str, tuple[_Version, float]] = {}
        self._ready: deque[tuple[str, _Version]] = deque()
        self._log = -1

    def read(self, wait: float) -> Shot | None:
        """The next complete file; one that cannot be read is a lost part. OSError while the folder is not there."""
        end = time.monotonic() + wait
        self._look()
        while not self._ready:
            if (left := end - time.monotonic()) <= 0:
                return None
            time.sleep(min(left, self._settings.poll))
            self._look()
        name, version = self._ready.popleft()
        path = self._settings.folder / name
        try:
            frame, lost = read_frame(path), ""
        except FrameError as error:
            frame, lost = None, str(error)
        return Shot(frame, name, lost, begun=lambda: self._take(name, version))

    def close(self) -> None:
        """Close the list of taken files."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _look(self) -> None:
        found = _listed(self._settings)
        for name in self._taken.keys() - found.keys():
            del self._taken[name]
        if self._first:
            self._first = False
            for name, version in found.items():
                self._take(name, version)
        queued = dict(self._ready)
        now = time.monotonic()
        complete = []
        for name, version in found.items():
            if self._taken.get(name) == version or queued.get(name) == version:
                continue
            before, since = self._seen.get(name, (None, now))
            if before != version:
                self._seen[name] = (version, now)
                since = now
            if now - since >= self._settings.quiet:
                complete.append((version[1], name, version))
                self._seen.pop(name, None)
        self._ready.extend((name, version) for _, name, version in sorted(complete))

    def _take(self, name: str, version: _Version) -> None:
        self._taken[name] = version
        if self._log < 0:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            _rewrite(self._state, self._taken)
            self._log = os.open(self._state, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            return
        os.write(self._log, _line(name, version))


def _listed(settings: FolderSettings) -> dict[str, _Version]:
    found = {}
    with os.scandir(settings.folder) as entries:
        for entry in entries:
            path = Path(entry.name.lower())
            if entry.name.startswith(".") or not any(path.match(one) for one in settings.patterns):
                continue
            try:
                if entry.is_file():
                    status = entry.stat()
                    found[entry.name] = (status.st_size, status.st_mtime_ns)
            except OSError:
                continue  # gone since it was listed
    return found


def _line(name: str, version: _Version) -> bytes:
    return json.dumps([name, *version]).encode() + b"\n"


def _rewrite(state: Path, taken: dict[str, _Version]) -> None:
    """Only files that still lie there: a new list in place of the old one."""
    fresh = state.with_name(state.name + ".new")
    fresh.write_bytes(b"".join(_line(name, version) for name, version in taken.items()))
    os.replace(fresh, state)


def _read(state: Path) -> dict[str, _Version]:
    taken: dict[str, _Version] = {}
    for line in state.read_bytes().splitlines() if state.exists() else ():
        try:
            name, size, changed = json.loads(line)
        except ValueError:
            continue  # torn by a full disk
        taken[name] = (size, changed)
    return taken
