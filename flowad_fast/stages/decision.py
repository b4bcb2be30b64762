"""Scores to verdicts, and the calibration on good parts that makes verdicts possible; numpy only."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from pydantic import Field

from flowad_fast.config import Frozen
from flowad_fast.errors import CalibrationError
from flowad_fast.stages.aggregates import AGGREGATES as AGGREGATES
from flowad_fast.stages.aggregates import Aggregate as Aggregate
from flowad_fast.stages.aggregates import terms, with_ranges
from flowad_fast.stages.regions import RegionSettings

OUTLIER_MADS = 8.0
"""A good part whose score is this many scaled median absolute deviations above the median is reported."""


class Verdict(StrEnum):
    """What the line is told about a frame; `invalid` means no verdict, and is the answer to every doubt."""

    GOOD = "good"
    ANOMALOUS = "anomalous"
    INVALID = "invalid"


class Range(Frozen):
    """Smallest and largest value of one term of an image score over good parts."""

    low: float
    high: float


class PixelThreshold(Frozen):
    """Where the map of a good part is greater at all, it is a region, in at most a share alpha of good parts."""

    threshold: float
    parts: int = Field(gt=0)


class ClassCalibration(Frozen):
    """What good parts of one class said: the threshold, how many parts it rests on, and the ranges of several terms."""

    threshold: float
    parts: int = Field(gt=0)
    ranges: tuple[Range, ...] | None = None
    pixels: PixelThreshold | None = None
    """None in bundles of before, which have no regions."""


class Calibration(Frozen):
    """Per-class thresholds with a false-reject guarantee.

    For a new good part, exchangeable with the calibration parts, P(score > threshold) <= alpha: the threshold is the
    ceil((n + 1)(1 - alpha))-th smallest of n good scores (split conformal prediction).

    Example:
        >>> import numpy as np
        >>> fitted = calibrate(np.arange(19.0), alpha=0.05)
        >>> fitted.classes[""].threshold, fitted.classes[""].parts
        (18.0, 19)
        >>> Calibration.model_validate_json(fitted.model_dump_json()) == fitted
        True
    """

    alpha: float = Field(gt=0, lt=1)
    classes: dict[str, ClassCalibration]
    """By class name; the single key "" for unconditional models."""
    regions: RegionSettings = RegionSettings()


def parts_needed(alpha: float) -> int:
    """The fewest good parts for a false-reject rate alpha: n >= 1/alpha - 1."""
    return math.ceil(1 / alpha - 1 - 1e-9)


def require_parts(names: Sequence[str], alpha: float, aggregate: Aggregate) -> None:
    """Refuse good parts that are too few in one of their classes; `names` holds the class of each part.

    Raises:
        CalibrationError: an alpha outside (0, 1), no parts, or too few for it. A score of several terms needs
            twice as many.
    """
    _require(names, alpha, terms(aggregate) > 1)


def _require(names: Sequence[str], alpha: float, ranged: bool) -> None:
    """As `require_parts`, for raw scores whose terms need ranges, or not."""
    if not 0 < alpha < 1:
        raise CalibrationError(f"alpha must lie between 0 and 1, got {alpha}")
    need = (2 if ranged else 1) * max(parts_needed(alpha), 1)
    counts = Counter(names) or Counter({"": 0})
    for name, count in counts.items():
        if count < need:
            of = f" of class {name!r}" if name else ""
            raise CalibrationError(
                f"{count} good parts{of} are too few for a false-reject rate of {alpha:g}"
                f"{f' with the aggregate {with_ranges()}' if ranged else ''}: "
                f"at least {need} are needed, or a larger alpha"
            )


def combine(raw: np.ndarray, ranges: tuple[Range, ...] | None) -> np.ndarray:
    """Raw scores (n,), or k terms (n, k) with their ranges, to scores (n,).

    Raises:
        CalibrationError: several terms without ranges, or as many ranges as there are not terms.
    """
    if raw.ndim == 1:
        return raw
    if ranges is None:
        raise CalibrationError(
            f"the aggregate {with_ranges()} needs ranges fitted on good parts; calibrate the model first"
        )
    if len(ranges) != raw.shape[1]:
        raise CalibrationError(
            f"got a score of {raw.shape[1]} terms and {len(ranges)} ranges; calibrate the model again"
        )
    low = np.array([r.low for r in ranges])
    width = np.array([max(r.high - r.low, np.finfo(np.float32).tiny) for r in ranges])
    terms: np.ndarray = (raw - low) / width
    return np.asarray(terms.sum(1), np.float32)


def calibrate(
    raw: np.ndarray, alpha: float, classes: Sequence[str] | None = None, labels: Sequence[str] | None = None
) -> Calibration:
    """Fit thresholds (and the ranges of scores of several terms) on good parts.

    Several terms need twice the parts: their ranges are fitted on every second part and the threshold on the others,
    so that the guarantee holds.

    Args:
        raw: raw scores of good parts, (n,) or (n, k).
        alpha: accepted false-reject rate.
        classes: the class of each part for conditional models.
        labels: a name for each part (its file), used in warnings.

    Raises:
        CalibrationError: too few parts in a class for alpha, or a score that is not finite.

    Warns:
        UserWarning: parts whose score stands far above the others', which may not be good.
    """
    raw = np.asarray(raw)
    names = np.asarray(classes if classes is not None else [""] * len(raw), dtype=object)
    _require(names.tolist(), alpha, raw.ndim == 2)
    bad = np.flatnonzero(~np.isfinite(raw).reshape(len(raw), -1).all(1))
    if len(bad):
        shown = ", ".join(str(labels[i]) if labels is not None else f"part {i}" for i in bad[:5])
        raise CalibrationError(f"the scores of {len(bad)} good parts are not finite: {shown}; remove those frames")
    fitted = {}
    for name in dict.fromkeys(names.tolist()):
        index = np.flatnonzero(names == name)
        ranges: tuple[Range, ...] | None = None
        rest = index
        if raw.ndim == 2:
            half, rest = raw[index[::2]], index[1::2]
            low, high = half.min(0), half.max(0)
            ranges = tuple(Range(low=a, high=b) for a, b in zip(low, high, strict=True))
        scores = np.sort(combine(raw[rest], ranges))
        _warn_outliers(combine(raw[index], ranges), index, labels, name)
        fitted[name] = ClassCalibration(threshold=_quantile(scores, alpha), parts=len(scores), ranges=ranges)
    return Calibration(alpha=alpha, classes=fitted)


def with_regions(
    calibration: Calibration,
    maxima: np.ndarray,
    classes: Sequence[str] | None = None,
    settings: RegionSettings | None = None,
) -> Calibration:
    """The calibration with pixel thresholds: at most a share alpha of good parts has any region.

    A part has a region exactly when the maximum of its map is above the pixel threshold, so the threshold is the
    conformal quantile of these maxima. A smallest area only takes regions away.

    Args:
        calibration: fitted on the same parts; its alpha holds.
        maxima: the maximum over the map of each good part, (n,).
        classes: the class of each part for conditional models.
        settings: smallest area and severities.

    Raises:
        CalibrationError: too few parts in a class, a class without any, or a maximum that is not finite.
    """
    maxima = np.asarray(maxima)
    names = np.asarray(classes if classes is not None else [""] * len(maxima), dtype=object)
    _require(names.tolist(), calibration.alpha, False)
    if not np.isfinite(maxima).all():
        raise CalibrationError(
            f"the maps of {np.count_nonzero(~np.isfinite(maxima))} good parts are not finite; remove those frames"
        )
    fitted = {}
    for name, one in calibration.classes.items():
        own = np.sort(maxima[names == name])
        if not len(own):
            raise CalibrationError(f"class {name!r} has no good parts to fit regions on; calibrate all classes at once")
        pixels = PixelThreshold(threshold=_quantile(own, calibration.alpha), parts=len(own))
        fitted[name] = one.model_copy(update={"pixels": pixels})
    return calibration.model_copy(update={"classes": fitted, "regions": settings or RegionSettings()})


def _quantile(ordered: np.ndarray, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n values in ascending order."""
    return float(ordered[math.ceil((len(ordered) + 1) * (1 - alpha) - 1e-9) - 1])


def _warn_outliers(scores: np.ndarray, index: np.ndarray, labels: Sequence[str] | None, name: str) -> None:
    median = np.median(scores)
    spread = 1.4826 * np.median(np.abs(scores - median))
    far = index[scores > median + OUTLIER_MADS * spread] if spread > 0 else index[:0]
    if len(far):
        shown = ", ".join(str(labels[i]) if labels is not None else f"part {i}" for i in far[:5])
        warnings.warn(
            f"{len(far)} of {len(scores)} calibration parts{f' of {name!r}' if name else ''} score far above the "
            f"others and may be defective: {shown}",
            stacklevel=3,
        )
