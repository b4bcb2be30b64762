"""Location statistics of a bundle: which good parts they come from, never those of the threshold, and the fit."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowad_fast.bundle import Location
from flowad_fast.config import ModelConfig
from flowad_fast.detector import Detector
from flowad_fast.errors import CalibrationError, FrameError
from flowad_fast.evaluation.location import measure_location
from flowad_fast.export.frames import GoodParts
from flowad_fast.stages.aggregates import Aggregate, terms
from flowad_fast.stages.decision import parts_needed
from flowad_fast.stages.frames import invalid_frames
from flowad_fast.stages.location import MIN_PARTS, LocationStatistics

SEED = 0


@dataclass(frozen=True)
class StatisticsParts:
    """Good parts that location statistics are fitted on, and in words where they come from."""

    good: GoodParts
    source: str


class _Some(Sequence[np.ndarray]):
    """Some frames of a sequence, read when asked for."""

    def __init__(self, frames: Sequence[np.ndarray], index: Sequence[int]) -> None:
        self._frames, self._index = frames, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, at: int) -> np.ndarray:  # type: ignore[override]
        return self._frames[self._index[at]]


def split(good: GoodParts, alpha: float, aggregate: Aggregate) -> tuple[StatisticsParts, GoodParts]:
    """Half of the good parts of each class for the statistics, drawn once, and the rest for the threshold.

    The threshold gets what it needs first; a class of which little is left has no statistics.
    """
    need = (2 if terms(aggregate) > 1 else 1) * max(parts_needed(alpha), 1)
    random, first, rest = np.random.RandomState(SEED), [], []
    names = np.array(good.classes, dtype=object)
    contents = [_content(frame) for frame in good.frames]
    for name in dict.fromkeys(good.classes):
        own = random.permutation(np.flatnonzero(names == name))
        count = max(0, min(len(own) // 2, len(own) - need))
        # A photo that lies in the folder twice must not be in both parts: all but those of the threshold's go there.
        seen = {contents[i] for i in own[count:]}
        twice = [i for i in own[:count] if contents[i] in seen]
        first += [i for i in own[:count].tolist() if i not in twice]
        rest += [*own[count:].tolist(), *twice]
    source = f"{len(first)} of the {len(good)} good parts given, drawn with seed {SEED}; the threshold has the others"
    return StatisticsParts(_some(good, sorted(first)), source), _some(good, sorted(rest))


def some_of_each(good: GoodParts, count: int) -> GoodParts:
    """At most `count` good parts of each class, evenly taken."""
    chosen: list[int] = []
    for name in dict.fromkeys(good.classes):
        own = [i for i, of in enumerate(good.classes) if of == name]
        chosen += own if len(own) <= count else [own[i * len(own) // count] for i in range(count)]
    return _some(good, sorted(chosen))


def refuse_overlap(statistics: GoodParts, good: GoodParts) -> None:
    """Refuse statistics from a part that the threshold is fitted on too.

    Raises:
        CalibrationError: names it; the false-reject rate would not hold.
    """
    known = {_content(frame): label for frame, label in zip(statistics.frames, statistics.labels, strict=True)}
    for frame, label in zip(good.frames, good.labels, strict=True):
        if (same := known.get(_content(frame))) is not None:
            raise CalibrationError(
                f"the good part {label} is also among those of the location statistics ({same}), so the false-reject "
                "rate would not hold; give other parts, or leave --location-parts out to have the folder split"
            )


def fit_location(detector: Detector, parts: GoodParts, spec: ModelConfig) -> LocationStatistics:
    """Statistics of a detector's maps before they were enlarged; its own statistics must change nothing.

    Raises:
        FrameError: a good part that cannot be read or judged.
        CalibrationError: a map that is not finite.
    """
    classes = parts.classes if spec.classes.conditional else None
    return measure_location(detector, parts.frames, classes, parts.labels, spec)


def check_parts(parts: GoodParts) -> None:
    """Refuse frames that cannot be judged before the work.

    Raises:
        FrameError: names the frame.
    """
    for frame, label in zip(parts.frames, parts.labels, strict=True):
        if reason := invalid_frames(frame[None])[0]:
            raise FrameError(f"frame {label} for the location statistics: {reason}; remove it")


def described(statistics: LocationStatistics, written: tuple[str, str], spec: ModelConfig, source: str) -> Location:
    """What a manifest says of the statistics in a file (name and SHA-256)."""
    names = spec.classes.labels or ("",)

    def of(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(names, values, strict=True))

    return Location(
        file=written[0],
        sha256=written[1],
        parts={name: int(count) for name, count in of(statistics.parts).items()},
        mean_weight=of(statistics.mean_weight),
        std_weight=of(statistics.std_weight),
        source=source,
    )


def in_words(location: Location) -> list[str]:
    """One line per class, after one about the source."""
    lines = [f"location statistics from {location.source}"]
    for name, parts in location.parts.items():
        of = f"{name}: " if name else ""
        mean, std = location.mean_weight[name], location.std_weight[name]
        what = f"a cell's own mean counts {mean:.0%}, its own std {std:.0%}" if mean or std else (
            "none, too few parts" if parts < MIN_PARTS else "places say nothing here: one scale for the whole map"
        )  # fmt: skip
        lines.append(f"  {of}{parts} parts, {what}")
    return lines


def _some(good: GoodParts, index: Sequence[int]) -> GoodParts:
    return GoodParts(
        _Some(good.frames, index), [good.classes[i] for i in index], [good.labels[i] for i in index], good.left_out
    )


def _content(frame: np.ndarray) -> bytes:
    return hashlib.sha256(frame.tobytes()).digest() + str(frame.shape).encode()
