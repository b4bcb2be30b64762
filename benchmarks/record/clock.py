"""Samples to statements: percentiles that n supports, stability, and ratios with an interval."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from flowad_fast.benchmarks.record.record import Latency, Ratio, Stability

SPREAD_LIMIT, DRIFT_LIMIT = 0.10, 0.10
"""A run is called noisy when its interquartile range or its drift exceeds this share of the median."""
ENOUGH = {"p50": 1, "p90": 10, "p99": 100, "p999": 1000}
"""Samples below which a percentile is left out (null): it would only restate the maximum."""


def summary(samples_ms: Sequence[float]) -> Latency:
    """Percentiles, n and the raw samples, in ms; at least one sample."""
    raw = np.asarray(samples_ms, float)
    values = {
        name: round(float(np.percentile(raw, float(name[1:3] + "." + (name[3:] or "0")))), 4) if len(raw) >= n else None
        for name, n in ENOUGH.items()
    }
    return Latency.model_validate({**values, "n": len(raw), "raw": [round(float(v), 4) for v in raw]})


def stability(samples_ms: Sequence[float]) -> Stability:
    """Interquartile range and drift (second half against first) as shares of the median, and a verdict."""
    raw = np.asarray(samples_ms, float)
    median = float(np.median(raw))
    low, high = np.percentile(raw, [25, 75])
    spread = float(high - low) / median
    half = len(raw) // 2
    drift = float(np.median(raw[half:]) / np.median(raw[:half]) - 1) if half else 0.0
    noisy = spread > SPREAD_LIMIT or abs(drift) > DRIFT_LIMIT
    verdict: Literal["stable", "noisy", "too few samples"] = "noisy" if noisy else "stable"
    if len(raw) < 3:
        verdict = "too few samples"
    return Stability(spread=round(spread, 4), drift=round(drift, 4), verdict=verdict)


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median of `values` with its 95 % bootstrap interval: (median, low, high)."""
    data = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(0, len(data), (2000, len(data)))
    medians = np.median(data[picks], 1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(data)), float(low), float(high)


def paired_ratio(slow_ms: Sequence[float], fast_ms: Sequence[float]) -> Ratio:
    """slow / fast of samples that were taken in turn: median, 95 % interval, and the number of pairs."""
    ratios = [a / b for a, b in zip(slow_ms, fast_ms, strict=True)]
    median, low, high = interval(ratios)
    return Ratio(speed=round(median, 4), low=round(low, 4), high=round(high, 4), pairs=len(ratios))
