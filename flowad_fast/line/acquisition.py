"""The thread of one source: reads parts, and reads again after a pause where the camera is lost."""

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from flowad_fast.line.event import Alarm
from flowad_fast.line.sources import EndOfSource, Shot, Source

_log = logging.getLogger(__name__)


class Acquisition(threading.Thread):
    """Runs until its source ends or `stopping` is set; then closes the source.

    Attributes:
        trouble: what the source raised last, "" while it works.
        counters: those that came with its last part.
    """

    def __init__(
        self,
        camera: str,
        source: Source,
        *,
        stopping: threading.Event,
        arrive: Callable[[str, Shot], None],
        tell: Callable[[Alarm], None],
        ended: Callable[[], None],
        pauses: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        """Not started yet; the functions are called from this thread.

        Args:
            camera: its name.
            source: its methods are called from this thread only.
            stopping: set when the line wants no more parts.
            arrive: takes a part.
            tell: takes an alarm when the camera is lost, and when it gives parts again.
            ended: called once, at the end.
            pauses: first and longest pause after a failure, seconds; each is twice the one before.
        """
        super().__init__(name=f"source {camera}", daemon=True)
        self._camera, self._source, self._pauses = camera, source, pauses
        self._stopping, self._arrive, self._tell, self._ended = stopping, arrive, tell, ended
        self.trouble = ""
        self.counters: Mapping[str, int] = {}

    def run(self) -> None:
        """See the class."""
        try:
            self._read()
        finally:
            try:
                self._source.close()
            except Exception as error:
                _log.warning("camera %s: closing failed: %s", self._camera, error)
            self._ended()

    def _read(self) -> None:
        pause = self._pauses[0]
        while not self._stopping.is_set():
            try:
                shot = self._source.read(0.2)
            except EndOfSource:
                return
            except Exception as error:
                self._lost(f"{type(error).__name__}: {error}")
                self._stopping.wait(pause)
                pause = min(2 * pause, self._pauses[1])
                continue
            if shot is not None:
                pause = self._pauses[0]
                self._lost("")
                self.counters = shot.counters
                self._arrive(self._camera, shot)

    def _lost(self, trouble: str) -> None:
        before, self.trouble = self.trouble, trouble
        if bool(before) != bool(trouble):
            text = f"camera {self._camera}: {trouble}" if trouble else f"camera {self._camera} gives parts again"
            self._tell(Alarm("camera lost", datetime.now(UTC), text, over=not trouble))
