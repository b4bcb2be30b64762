"""A folder of recorded parts, at a fixed rate."""

import time
from pathlib import Path
from typing import Literal

from pydantic import Field

from flowad_fast.data.images import find_images, read_frame
from flowad_fast.errors import FrameError
from flowad_fast.line.sources.base import EndOfSource, Shot, SourceBase


class RecordedSettings(SourceBase):
    """Image files of a folder (folders in it too) in the order of their names, as if a camera showed them."""

    kind: Literal["recorded"]
    folder: Path
    rate: float = Field(default=1.0, gt=0, le=10000)
    """Parts a second."""
    rounds: int | None = Field(default=1, ge=1)
    """How often the folder is shown; null: for ever."""

    def open(self, state: Path) -> "RecordedParts":
        """The source; it remembers nothing over restarts."""
        return RecordedParts(self)

    def check(self) -> str:
        """That there are images and the first can be read."""
        files = find_images(self.folder)
        height, width = read_frame(files[0]).shape[:2]
        return f"{len(files)} parts in {self.folder}, the first of {height}x{width} pixels"


class RecordedParts:
    """Times count from the first read; a part whose time has passed comes at once."""

    def __init__(self, settings: RecordedSettings) -> None:
        """Nothing is read yet."""
        self._settings = settings
        self._files: list[Path] = []
        self._names: list[str] = []
        self._shown = 0
        self._start = 0.0

    def read(self, wait: float) -> Shot | None:
        """The next part when its time has come; an unreadable file is a lost part."""
        settings = self._settings
        if not self._files:
            self._files, self._start = find_images(settings.folder), time.monotonic()
            self._names = [path.relative_to(settings.folder).as_posix() for path in self._files]
        turn, place = divmod(self._shown, len(self._files))
        if settings.rounds is not None and turn >= settings.rounds:
            raise EndOfSource
        due = self._start + self._shown / settings.rate
        if (left := due - time.monotonic()) > 0:
            time.sleep(min(left, wait))
            if left > wait:
                return None
        self._shown += 1
        name = self._names[place] + (f"#{turn + 1}" if turn else "")
        try:
            frame = read_frame(self._files[place])
        except FrameError as error:
            return Shot(None, name, str(error))
        return Shot(frame, name)  # reading the file is no part of what a camera does, so it is not part of the age

    def close(self) -> None:
        """Nothing is open."""
