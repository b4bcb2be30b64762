"""Two records of the same rows, compared with the noise in mind."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowad_fast.benchmarks.record.clock import interval
from flowad_fast.benchmarks.record.record import Header, Record, Row
from flowad_fast.errors import ConfigError

FLOOR = 0.03
"""Relative change below which two runs count as equal even when their intervals are narrower."""

Verdict = Literal["faster", "slower", "no difference", "not comparable"]


@dataclass(frozen=True)
class Change:
    """New speed over old with its interval, and new memory over old; None where there is nothing to compare."""

    name: str
    verdict: Verdict
    reason: str | None = None
    basis: Literal["latency", "ratio to the reference path"] | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    memory: float | None = None


def compare(old: Header, new: Header) -> list[Change]:
    """Each row that both records have: change of speed with a verdict, and change of memory.

    On one GPU, times are compared. On a CPU, where two runs never have the machine to themselves in the same way,
    ratios to the reference path are, since both sides of a pair met the same noise. A verdict needs the intervals of
    both runs to exclude 1, and a change above both runs' own spread.

    Raises:
        ConfigError: a record without speeds.
    """
    if not isinstance(old, Record) or not isinstance(new, Record):
        raise ConfigError("a record of this kind has no speeds to compare; give records of flowad-bench or its ladder")
    theirs = {(row.preset, row.name): row for row in old.cases}
    gpu = old.environment.gpu
    same_gpu = gpu is not None and gpu == new.environment.gpu
    return [
        _change(before, row, same_gpu)
        for row in new.cases
        if (before := theirs.get((row.preset, row.name))) and (same_gpu or row.engine != "reference")
    ]


def _change(old: Row, new: Row, same_gpu: bool) -> Change:
    a, b = old.measured, new.measured
    if a is None or b is None:
        return Change(new.name, "not comparable", f"{old.status} before, {new.status} now")
    before, now = a.memory_mb.footprint, b.memory_mb.footprint
    memory = round(now / before, 4) if before and now else None
    ratio1, ratio2 = old.ratio_to_reference, new.ratio_to_reference
    if same_gpu:
        basis: Literal["latency", "ratio to the reference path"] = "latency"
        first, low1, high1 = interval(a.latency_ms.raw)
        second, low2, high2 = interval(b.latency_ms.raw)
        change, low, high = first / second, low1 / high2, high1 / low2
        noise = float(np.hypot(a.stability.spread, b.stability.spread)) / 2
    elif ratio1 and ratio2 and ratio1.pairs and ratio2.pairs:
        basis = "ratio to the reference path"
        change, low, high = ratio2.speed / ratio1.speed, ratio2.low / ratio1.high, ratio2.high / ratio1.low
        noise = 0.0
    else:
        reason = "not the same GPU in both records, and no ratio to the reference path in the same run"
        return Change(new.name, "not comparable", reason, memory=memory)
    clear = (low > 1 or high < 1) and abs(change - 1) > max(FLOOR, noise)
    verdict: Verdict = "no difference" if not clear else "faster" if change > 1 else "slower"
    return Change(new.name, verdict, None, basis, round(change, 4), round(low, 4), round(high, 4), memory)
