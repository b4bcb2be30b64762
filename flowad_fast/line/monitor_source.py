"""One camera's parts against what is usual: references, tests, and what their alarms are."""

import math
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np

from flowad_fast.config import Frozen
from flowad_fast.line.event import Record
from flowad_fast.line.monitor_evidence import RateTest, conformal_bound
from flowad_fast.line.monitor_look import Look
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.settings import MonitorSettings
from flowad_fast.stages.decision import Verdict

FEATURES = ("score", "background", "brightness", "sharpness")
"""What is compared part by part with its reference: scores of good parts, and the look of all parts."""
TESTS = 3 + 2 * len(FEATURES)
"""Rejects before and after the reference, no results, and each feature both ways."""
SETTLE = 30
"""Parts for which an alarm about rejects waits until it is clear whether good parts have moved too."""
LAST = 50
"""Parts that the figures of an alarm are about."""
HALF = 0.5
"""Evidence (see `RateTest.evidence`) from which a feature counts as moved beside a test that has fired."""


@dataclass(frozen=True)
class Baseline:
    """What a calibration says about a camera's product: accepted share of false rejects, threshold, good parts."""

    alpha: float
    threshold: float
    parts: int


class Usual(Frozen):
    """What a feature's reference says: how many values, their median, and quantiles at 5 and 95 %."""

    parts: int
    median: float
    low: float
    high: float


class Reference(Frozen):
    """What is remembered of a camera over restarts."""

    verdicts: int
    rejects: int
    features: dict[str, Usual]


class Feature:
    """One number per part: a reference of the first parts, then a test whether parts lie above its median too often.

    And one whether they lie below it. The bound of both is conformal, see `monitor_evidence.conformal_bound`.
    """

    def __init__(self, settings: MonitorSettings, doubt: float, limit: float, usual: Usual | None = None) -> None:
        """`doubt` and `limit` are for each of the two tests; with `usual`, the reference is known."""
        self._settings, self._doubt, self._limit = settings, doubt, limit
        self._values: list[float] = []
        self.usual = usual
        self.tests: tuple[RateTest, RateTest] | None = None
        if usual is not None:
            self._begin(usual)

    def add(self, value: float) -> None:
        """One more part; what is not finite is no value."""
        if not math.isfinite(value):
            return
        if self.usual is None:
            self._values.append(value)
            if len(self._values) >= self._settings.reference:
                low, high = np.quantile(self._values, (0.05, 0.95))
                middle = sorted(self._values)[len(self._values) // 2]
                self._begin(Usual(parts=len(self._values), median=middle, low=float(low), high=float(high)))
                self._values = []
            return
        assert self.tests is not None
        self.tests[0].add(value > self.usual.median)
        self.tests[1].add(value < self.usual.median)

    @property
    def learned(self) -> float:
        """Share of the reference that is there."""
        return 1.0 if self.usual is not None else len(self._values) / self._settings.reference

    def moved(self, least: float) -> Literal["", "rose", "fell"]:
        """Whether the evidence is at least this much."""
        if self.tests is None:
            return ""
        up, down = (test.evidence for test in self.tests)
        return "" if max(up, down) < least else "rose" if up >= down else "fell"

    def _begin(self, usual: Usual) -> None:
        self.usual = usual
        rank = usual.parts // 2 + 1
        below, above = rank, usual.parts + 1 - rank
        tests = []
        for events, others in ((above, below), (below, above)):
            bound = max(0.5 + self._settings.margin, conformal_bound(events, others, self._doubt))
            tests.append(RateTest(0.5, bound, self._limit))
        self.tests = tests[0], tests[1]


class Ring:
    """The last numbers of many, in memory that is there from the start: a line at work takes no more of it."""

    def __init__(self, size: int) -> None:
        """Of the last `size` numbers."""
        self._values, self._count = np.zeros(size), 0

    def append(self, value: float) -> None:
        """One more; the oldest goes where all places are taken."""
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def last(self, count: int) -> np.ndarray:
        """The newest, at most `count`, oldest first, float64."""
        found = min(count, self._count, len(self._values))
        return np.take(self._values, np.arange(self._count - found, self._count), mode="wrap")


class Recent:
    """The last parts of a camera; bounded."""

    def __init__(self) -> None:
        self.results: deque[str] = deque(maxlen=1000)
        self.values = {name: Ring(1000) for name in ("all scores", *FEATURES)} | {"latency": Ring(10_000)}

    def quantiles(self, name: str, at: tuple[float, ...], last: int = 10_000) -> tuple[float, ...]:
        """Of a feature, of `all scores` or of `latency`, over the last parts; nothing before there is any."""
        values = self.values[name].last(last)
        return tuple(float(np.quantile(values, one)) for one in at) if len(values) else ()


@dataclass(frozen=True, slots=True)
class Point:
    """Some seconds of a camera, for charts: from when (UTC), parts, rejected, without verdict, scores, latency."""

    at: datetime
    parts: int
    rejected: int
    unjudged: int
    score: tuple[float, float] | None
    """Median and 95 % quantile."""
    latency: float
    """The longest, seconds."""


class SourceMonitor:
    """One camera; see `monitor.Monitor` for what it promises."""

    def __init__(self, baseline: Baseline, settings: MonitorSettings, reference: Reference | None = None) -> None:
        """Start anew, or with what is remembered."""
        self.baseline, self._settings = baseline, settings
        self.recent, self.parts = Recent(), 0
        # Half of the allowed false alarms for rates that are higher than their bound, half for tests of lower ones.
        self._doubt = settings.false_alarms / TESTS / 2
        self._limit = settings.horizon / self._doubt
        known = reference.features if reference else {}
        self.features = {name: Feature(settings, self._doubt, self._limit, known.get(name)) for name in FEATURES}
        self.verdicts, self.rejected = (reference.verdicts, reference.rejects) if reference else (0, 0)
        self.rejects = self._reject_test(refined=reference is not None)
        self._refined = reference is not None
        self.no_results = RateTest(settings.no_results, settings.no_results, self._limit)
        self._blamed: Literal["", "line drifts", "parts got worse"] = ""
        self._waited = 0
        self.alarms: dict[str, bool] = dict.fromkeys(("line drifts", "parts got worse", "no results"), False)

    @property
    def learned(self) -> float:
        """Share of the reference of scores that is there."""
        return self.features["score"].learned

    @property
    def reference(self) -> Reference | None:
        """What is worth remembering; None while references are incomplete."""
        usual = {name: one.usual for name, one in self.features.items() if one.usual is not None}
        if not self._refined or "score" not in usual:
            return None
        return Reference(verdicts=self.verdicts, rejects=self.rejected, features=usual)

    def observe(self, record: Record, look: Look | None) -> None:
        """One more part."""
        self.parts += 1
        recent, result = self.recent, record.result
        recent.values["latency"].append(record.seconds)
        recent.results.append(str(result))
        unjudged = isinstance(result, NoResult) or result is Verdict.INVALID
        self.no_results.add(unjudged)
        if not unjudged:
            anomalous = result is Verdict.ANOMALOUS
            self._count(anomalous)
            if record.score is not None and math.isfinite(record.score):
                recent.values["all scores"].append(record.score)
                if not anomalous:  # defects must not look like a change of good parts, however many there are
                    self._feature("score", record.score)
        if look is not None and result is not Verdict.INVALID:
            self._feature("brightness", look.brightness)
            self._feature("sharpness", look.sharpness)
            if look.background is not None:
                self._feature("background", look.background)

    def conditions(self) -> dict[str, bool]:
        """Which alarms are on after the last part, by kind. Rejects, where they rose, belong to one of two."""
        if not self.rejects.fired:
            self._blamed, self._waited = "", 0
        elif not self._blamed:
            self._waited += 1
            if "rose" in self.moved(("score", "background")).values():
                self._blamed = "line drifts"
            elif self._waited > SETTLE:
                self._blamed = "parts got worse"
        fired = any(test.fired for one in self.features.values() for test in one.tests or ())
        self.alarms = {
            "line drifts": fired or self._blamed == "line drifts",
            "parts got worse": self._blamed == "parts got worse",
            "no results": self.no_results.fired,
        }
        return self.alarms

    def moved(self, names: tuple[str, ...] = FEATURES) -> dict[str, str]:
        """Which features have moved, and whether they rose or fell."""
        return {name: how for name in names if (how := self.features[name].moved(HALF))}

    def share(self, *results: str, last: int = 1000) -> float:
        """Of the last parts, those with one of these results."""
        recent = [*self.recent.results][-last:]
        return sum(one in results for one in recent) / len(recent) if recent else 0.0

    def figures(self) -> dict[str, float]:
        """The numbers behind an alarm: shares and medians of the last 50 parts, beside what is usual."""
        found = {
            "parts": float(self.parts),
            "rejected": self.share(Verdict.ANOMALOUS, last=LAST),
            "rejected_usual": self.rejects.usual,
            "rejected_bound": self.rejects.bound,
            "without_verdict": self.share(Verdict.INVALID, *NoResult, last=LAST),
            "without_verdict_usual": self.no_results.usual,
            "threshold": self.baseline.threshold,
            "calibration_parts": float(self.baseline.parts),
        }
        for name, one in self.features.items():
            if one.usual is not None and (median := self.recent.quantiles(name, (0.5,), LAST)):
                found |= {f"{name}_median": median[0], f"{name}_usual": one.usual.median}
        if top := self.recent.quantiles("all scores", (0.95,), LAST):
            found["score_q95"] = top[0]
        return found

    def _feature(self, name: str, value: float) -> None:
        self.features[name].add(value)
        if math.isfinite(value):
            self.recent.values[name].append(value)

    def _count(self, anomalous: bool) -> None:
        self.rejects.add(anomalous)
        if self._refined:
            return
        if self.rejects.fired:  # what is wrong is no reference
            self.verdicts = self.rejected = 0
            return
        self.verdicts += 1
        self.rejected += anomalous
        if self.verdicts >= self._settings.reference:
            self._refined = True
            self.rejects = self._reject_test(refined=True)

    def _reject_test(self, refined: bool) -> RateTest:
        """The share of false rejects is at most alpha on average over calibrations, but of this one only nearly.

        The bound says how nearly; the reference adds its own parts to those of the calibration.
        """
        if (stated := self._settings.rejects) is not None:
            return RateTest(stated, stated, self._limit)
        base = self.baseline
        below = min(base.parts, math.ceil((base.parts + 1) * (1 - base.alpha) - 1e-9))
        above = base.parts + 1 - below
        if refined:
            above, below = above + self.rejected, below + self.verdicts - self.rejected
        return RateTest(above / (above + below), conformal_bound(above, below, self._doubt), self._limit)
