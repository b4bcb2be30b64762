"""One batch through a detector: calls by size of frame, classes and frozen cameras by camera."""

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from flowad_fast.line.outcome import Judgement
from flowad_fast.line.policy import Batch
from flowad_fast.line.records import Item, Judged
from flowad_fast.line.scoring import Scoring
from flowad_fast.stages.decision import Verdict
from flowad_fast.stages.frames import FrozenFrames


class Judge:
    """What each camera sees and has seen last. From one thread."""

    def __init__(self, cameras: Iterable[str], classes: Mapping[str, str]) -> None:
        """Cameras by name, and the product that each sees, for conditional models."""
        self._shown = {camera: FrozenFrames(altered=False) for camera in cameras}  # a shot's frame is the line's
        self._classes = classes

    def names(self, cameras: Iterable[str]) -> list[str | int] | None:
        """Classes of the frames of these cameras."""
        return [self._classes[camera] for camera in cameras if camera in self._classes] or None

    def __call__(self, scoring: Scoring, batch: Batch, items: list[Item], limit: float) -> tuple[Judgement, ...]:
        """One judgement per part, all within `limit` seconds; what `scoring` raises, and CalibrationError."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, item in enumerate(items):
            assert item.frame is not None
            groups.setdefault(item.frame.shape, []).append(i)
        end = time.monotonic() + limit
        judgements: dict[int, Judgement] = {}
        for group in groups.values():
            members = [items[i] for i in group]
            frames = [item.frame for item in members if item.frame is not None]
            together = frames[0][None] if len(frames) == 1 else np.stack(frames)
            names = self.names(item.camera for item in members)
            found = scoring(together, names, max(1e-3, end - time.monotonic()))
            frozen = [
                self._shown[item.camera].doubts(frame[None])[0] for item, frame in zip(members, frames, strict=True)
            ]
            if any(frozen):
                found = replace(found, invalid=tuple(a or b for a, b in zip(found.invalid, frozen, strict=True)))
            if Verdict.ANOMALOUS in found.verdict:
                _ = found.regions  # here, where nobody waits for the line's lock
            now = time.monotonic()
            for place, (i, item) in enumerate(zip(group, members, strict=True)):
                item.judged = Judged(found, place, scoring.bundle, batch.taken, now)
                judgements[i] = Judgement(
                    found.verdict[place], float(found.score[place]), reason=found.invalid[place] or ""
                )
        return tuple(judgements[i] for i in range(len(items)))


class Failures:
    """How often an engine failed within a window of time."""

    def __init__(self, allowed: int, window: float) -> None:
        """`allowed` failures within `window` seconds are survived."""
        self._allowed, self._window = allowed, window
        self._times: deque[float] = deque()

    def __len__(self) -> int:
        return len(self._times)

    def add(self, now: float) -> bool:
        """One more; whether it is one too many."""
        self._times.append(now)
        while self._times[0] < now - self._window:
            self._times.popleft()
        return len(self._times) > self._allowed
