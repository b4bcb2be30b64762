"""Has the line changed: rejects, scores, pictures and parts without a verdict against what is usual.

A plain class without threads or clocks; `watch.Watch` feeds it. What it promises, for each camera:

- **False alarms.** While a line is as it was (parts exchangeable with those of calibration and reference, and
  a share without a verdict of at most the stated one), at most a share `false_alarms` of lines has any alarm within
  `horizon` parts. The budget is split evenly over eleven tests, and in each over the doubt in its bound and the test
  itself (`monitor_evidence`). Parts that depend on each other, as with batches and ageing lamps, are why shares of a
  half may differ by `margin` before anything is tested.
- **Findings.** A rise to a rate r is found after `RateTest.delay(r)` parts on average at most: for alpha = 0.05, 400
  calibration parts and the defaults, 3 alpha within 900 parts.
- **Which.** *line drifts*: scores of parts that are not rejected, the map's background, brightness or sharpness have
  moved. *parts got worse*: more parts are rejected, while the scores of the others and the background are as they were.
  Defects, however many, move neither: both leave out what is above the threshold or in a small place. *no results*.
- One condition gives one alarm and one all-clear, which needs the last parts to be nearer to what is usual.
- Recalibration is proposed, with figures; nothing is changed here.

Memory is bounded. The reference is the first `reference` parts after a bundle's first start, which somebody should have
looked at; it is remembered over restarts (`remember`).
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from pydantic import ValidationError

from flowad_fast.config import Frozen
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.monitor_look import Look
from flowad_fast.line.monitor_source import LAST, Baseline, Point, Reference, SourceMonitor, Usual
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.settings import MonitorSettings
from flowad_fast.stages.decision import Verdict

POINTS, SECONDS = 360, 10.0
"""Of charts: how many are kept, and how long each is."""
KINDS = ("line drifts", "parts got worse", "no results")
_WORDS = {"score": "the scores of good parts", "background": "the maps' background"}


@dataclass(frozen=True)
class SourceReport:
    """How a camera's last parts are.

    Attributes:
        parts: since the start, or the last change of the bundle.
        rejected, unjudged: shares of the last 1000 parts: anomalous, and without a verdict.
        lost: of those, the camera's losses.
        usual_rejects, rejects_bound: share that is expected, and that is tested.
        scores: of all parts, quantiles at 5, 50, 95 and 99 %; empty before any.
        latency: p50, p99 and p99.9 of the last 10 000 parts, seconds; empty before any.
        features: median now and what is usual, None while the reference is not complete.
        evidence: by test, from 0 to 1, where it fires.
        learned: share of the reference that is there.
        alarms: kinds that are on.
        points: for charts, oldest first.
    """

    parts: int
    rejected: float
    unjudged: float
    lost: float
    usual_rejects: float
    rejects_bound: float
    scores: tuple[float, ...]
    latency: tuple[float, ...]
    features: Mapping[str, tuple[float, Usual | None]]
    evidence: Mapping[str, float]
    learned: float
    alarms: tuple[str, ...]
    points: tuple[Point, ...]


class _Memory(Frozen):
    bundle: str
    sources: dict[str, Reference]


class Monitor:
    """See the module. Not safe from many threads: its user holds a lock.

    Attributes:
        bundle: hash of the bundle whose parts are compared; those of others are counted, not tested.
    """

    def __init__(
        self, bundle: str, baselines: Mapping[str, Baseline], settings: MonitorSettings | None = None, memory: str = ""
    ) -> None:
        """Start.

        Args:
            bundle: hash of what judges.
            baselines: what its calibration says, by camera.
            settings: see there.
            memory: what `remember` gave an earlier run; that of another bundle, or a damaged one, counts for nothing.
        """
        self._settings = settings or MonitorSettings()
        known = _memory(memory)
        references = known.sources if known is not None and known.bundle == bundle else {}
        self.bundle = bundle
        self._sources = {
            camera: SourceMonitor(one, self._settings, references.get(camera)) for camera, one in baselines.items()
        }
        self._charts = {camera: _Chart() for camera in baselines}

    def rebase(self, bundle: str, baselines: Mapping[str, Baseline], at: datetime) -> list[Alarm]:
        """Another bundle judges from now on: everything is learned anew; alarms that were on are over."""
        over = [
            Alarm(kind, at, f"camera {camera}: another bundle judges now", over=True)
            for camera, one in self._sources.items()
            for kind, on in one.alarms.items()
            if on
        ]
        self.bundle = bundle
        self._sources = {camera: SourceMonitor(one, self._settings) for camera, one in baselines.items()}
        return over

    def observe(self, record: Record, look: Look | None) -> list[Alarm]:
        """One more part, in order of being told; the alarms that begin or are over with it."""
        if (source := self._sources.get(record.camera)) is None:
            return []
        at = record.arrived + timedelta(seconds=record.seconds)
        self._charts[record.camera].add(record, at)
        if record.bundle and record.bundle != self.bundle:
            return []
        before = dict(source.alarms)
        source.observe(record, look)
        return [
            Alarm(kind, at, _text(record.camera, kind, on, source), over=not on, figures=source.figures())
            for kind, on in source.conditions().items()
            if on != before[kind]
        ]

    def remember(self) -> str:
        """What a later run needs to go on; "" while no camera's reference is complete."""
        found = {camera: one.reference for camera, one in self._sources.items()}
        complete = {camera: one for camera, one in found.items() if one is not None}
        return _Memory(bundle=self.bundle, sources=complete).model_dump_json() if complete else ""

    def report(self) -> dict[str, SourceReport]:
        """By camera."""
        return {camera: _report(one, self._charts[camera]) for camera, one in self._sources.items()}


class _Chart:
    """Points of equal length, the newest of them still growing."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=POINTS)
        self._at = datetime.min.replace(tzinfo=UTC)
        self._scores: list[float] = []
        self._slowest, self._parts, self._bad, self._unjudged = 0.0, 0, 0, 0

    def add(self, record: Record, at: datetime) -> None:
        if not -SECONDS < (at - self._at).total_seconds() < SECONDS:  # also where the clock was set back
            if self._parts:
                self._points.append(self._point())
            self._at, self._scores = at, []
            self._slowest, self._parts, self._bad, self._unjudged = 0.0, 0, 0, 0
        self._parts += 1
        self._bad += record.result is Verdict.ANOMALOUS
        self._unjudged += isinstance(record.result, NoResult) or record.result is Verdict.INVALID
        self._slowest = max(self._slowest, record.seconds)
        if record.score is not None and np.isfinite(record.score) and len(self._scores) < 1000:
            self._scores.append(record.score)

    def points(self) -> tuple[Point, ...]:
        return (*self._points, self._point()) if self._parts else ()

    def _point(self) -> Point:
        score = None
        if self._scores:
            middle, high = np.quantile(self._scores, (0.5, 0.95))
            score = float(middle), float(high)
        return Point(self._at, self._parts, self._bad, self._unjudged, score, self._slowest)


def _report(one: SourceMonitor, chart: _Chart) -> SourceReport:
    evidence = {"rejects": one.rejects.evidence, "no results": one.no_results.evidence}
    features = {}
    for name, feature in one.features.items():
        for way, test in zip(("up", "down"), feature.tests, strict=True) if feature.tests else ():
            evidence[f"{name} {way}"] = test.evidence
        if median := one.recent.quantiles(name, (0.5,)):
            features[name] = median[0], feature.usual
    return SourceReport(
        parts=one.parts,
        rejected=one.share(Verdict.ANOMALOUS),
        unjudged=one.share(Verdict.INVALID, *NoResult),
        lost=one.share(NoResult.SOURCE_LOST),
        usual_rejects=one.rejects.usual,
        rejects_bound=one.rejects.bound,
        scores=one.recent.quantiles("all scores", (0.05, 0.5, 0.95, 0.99)),
        latency=one.recent.quantiles("latency", (0.5, 0.99, 0.999)),
        features=features,
        evidence=evidence,
        learned=one.learned,
        alarms=tuple(kind for kind, on in one.alarms.items() if on),
        points=chart.points(),
    )


def _text(camera: str, kind: str, on: bool, source: SourceMonitor) -> str:
    share = source.share(Verdict.ANOMALOUS, last=LAST)
    rejected = f"{share:.1%} of the last {LAST} parts rejected, {source.rejects.usual:.1%} expected"
    if not on:
        return f"camera {camera}: {kind}: over; {rejected}"
    if kind == "no results":
        share, usual = source.share(Verdict.INVALID, *NoResult, last=LAST), source.no_results.usual
        return f"camera {camera}: {share:.1%} of the last {LAST} parts have no verdict, {usual:.1%} expected"
    if kind == "parts got worse":
        return f"camera {camera}: parts got worse: {rejected}, while good parts and pictures look as they did"
    figures = source.figures()
    moved = [
        f"{_WORDS.get(name, name)} {how} from {figures[f'{name}_usual']:.4g} to {figures[f'{name}_median']:.4g}"
        for name, how in source.moved().items()
    ]
    return (
        f"camera {camera}: the line drifts: {', '.join(moved) or 'rejects'} (medians); {rejected}. Put lamp, lens and "
        "position right; or, if good parts look like this now, calibrate a copy of the bundle on them (flowad-export "
        "calibrate COPY GOOD_FOLDER) and activate it (flowad-line activate line.yaml COPY --shadow 200)"
    )


def _memory(text: str) -> _Memory | None:
    try:
        return _Memory.model_validate_json(text) if text else None
    except ValidationError:
        return None
