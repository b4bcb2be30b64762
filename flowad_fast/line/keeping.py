"""The journal as the line uses it: it may be missing, and a full disk is an alarm that stops nothing."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from flowad_fast.line.event import Alarm
from flowad_fast.line.journal import Begun, Journal

_log = logging.getLogger(__name__)


class Keeping:
    """Notes which parts are in flight. Not safe from many threads: its user holds a lock."""

    def __init__(self, folder: Path | None, tell: Callable[[Alarm], None]) -> None:
        """Nothing is opened yet; without a folder nothing is ever noted."""
        self._folder, self._tell = folder, tell
        self._journal: Journal | None = None
        self._failing = False

    def open(self) -> None:
        """Open the journal; ConfigError where another line runs with it."""
        if self._folder is not None:
            self._journal = Journal(self._folder)

    @property
    def lost(self) -> tuple[Begun, ...]:
        """Parts that an earlier run had in flight when it ended without a word; `end` them when they were told."""
        return () if self._journal is None else self._journal.lost

    def begin(self, part: str, camera: str, arrived: datetime) -> None:
        """A part has arrived."""
        self._write(lambda journal: journal.begin(part, camera, arrived))

    def taken(self, begun: Callable[[], None] | None, camera: str) -> None:
        """The part is in the journal, so its source need not give it again."""
        try:
            if begun is not None:
                begun()
        except OSError as error:
            _log.warning("camera %s: what was taken cannot be noted: %s", camera, error)

    def end(self, part: str) -> None:
        """A part's outcome was told."""
        self._write(lambda journal: journal.end(part))

    def close(self) -> None:
        """Let go of the folder."""
        if self._journal is not None:
            self._journal.close()

    def _write(self, write: Callable[[Journal], None]) -> None:
        if self._journal is None:
            return
        try:
            write(self._journal)
            failing, text = False, "the journal is written again"
        except OSError as error:
            failing, text = True, f"{error}; a kill would lose parts that are in flight"
        if failing != self._failing:
            self._failing = failing
            self._tell(Alarm("journal failed", datetime.now(UTC), text, over=not failing))
