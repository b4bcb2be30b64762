"""The monitor beside a running line: it hears every part, from a thread of its own, and tells alarms to the sinks."""

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowad_fast.errors import ConfigError
from flowad_fast.files import replacing
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.monitor import Monitor, SourceReport
from flowad_fast.line.monitor_look import record_look
from flowad_fast.line.monitor_source import Baseline
from flowad_fast.line.runner import Line
from flowad_fast.line.settings import MonitorSettings
from flowad_fast.stages.decision import Calibration, Verdict

_log = logging.getLogger(__name__)
LARGEST = 640
"""Side of a frame that is kept for the page, pixels."""


@dataclass(frozen=True)
class Shown:
    """A part as the page shows it: the frame is thinned to at most `LARGEST` pixels a side, `size` is its own.

    The heat is a copy: a record's is a place in its batch's maps, all of which it would keep.
    """

    record: Record
    size: tuple[int, int]
    frame: NDArray[np.uint8]
    heat: NDArray[np.float32] | None


class Watch:
    """Listens to a line. Safe from many threads."""

    def __init__(self, line: Line, settings: MonitorSettings | None = None, memory: Path | None = None) -> None:
        """Before the line is started.

        Args:
            line: which.
            settings: of the monitor.
            memory: file for what is usual, so that a restart does not learn it anew; None: it does.
        """
        self._line, self._memory = line, memory
        scoring = line.scoring
        remembered = memory.read_text("utf-8", errors="replace") if memory is not None and memory.exists() else ""
        self._monitor = Monitor(scoring.bundle, self.baselines(scoring.calibration), settings, remembered)
        self._lock = threading.Lock()
        self._heard, self._written = 0, remembered
        self._latest: dict[str, Shown] = {}
        self._rejected: deque[Shown] = deque(maxlen=24)
        line.listen(self)

    def __call__(self, event: Record | Alarm) -> None:
        """Hear of an event."""
        if isinstance(event, Alarm):
            return
        seen = record_look(event)
        shown = _shown(event)
        with self._lock:
            alarms = self._monitor.observe(event, seen)
            self._heard += 1
            if shown is not None:
                self._latest[event.camera] = shown
                if event.result is not Verdict.GOOD:
                    self._rejected.append(shown)
        for alarm in alarms:
            self._line.tell(alarm)
        if self._heard % 100 == 0:
            self.save()

    def baselines(self, calibration: Calibration | None) -> dict[str, Baseline]:
        """What a calibration says about each camera's product; cameras whose product it lacks are left out."""
        found = {}
        for camera in self._line.cameras if calibration is not None else ():
            assert calibration is not None
            one = calibration.classes.get(str((self._line.judge.names([camera]) or [""])[0]))
            if one is not None:
                found[camera] = Baseline(calibration.alpha, one.threshold, one.parts)
        return found

    def rebase(self) -> None:
        """The line judges with another bundle now."""
        scoring = self._line.scoring
        with self._lock:
            alarms = self._monitor.rebase(scoring.bundle, self.baselines(scoring.calibration), datetime.now(UTC))
        for alarm in alarms:
            self._line.tell(alarm)

    def report(self) -> Mapping[str, SourceReport]:
        """See `Monitor.report`."""
        with self._lock:
            return self._monitor.report()

    def pictures(self) -> tuple[dict[str, Shown], tuple[Shown, ...]]:
        """The latest part of each camera that has a picture, and the last parts that did not pass, oldest first."""
        with self._lock:
            return dict(self._latest), tuple(self._rejected)

    def save(self) -> None:
        """Write down what is usual, where that is new; a disk that is full costs no more than learning anew."""
        with self._lock:
            text = self._monitor.remember()
        if self._memory is None or not text or text == self._written:
            return
        try:
            with replacing(self._memory) as file:
                file.write(text.encode())
            self._written = text
        except ConfigError as error:
            _log.warning("%s", error)


def _shown(record: Record) -> Shown | None:
    if record.frame is None:
        return None
    height, width = record.frame.shape[:2]
    step = max(1, -(-max(height, width) // LARGEST))
    thinned = np.ascontiguousarray(record.frame[::step, ::step])
    heat = None if record.heat is None else record.heat.copy()
    return Shown(record.without_pictures(), (height, width), thinned, heat)
