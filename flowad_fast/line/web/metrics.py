"""A line's state as Prometheus metrics, in a registry of their own."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from flowad_fast.line.health import BUCKETS, Health
from flowad_fast.line.monitor import KINDS, SourceReport


class Observed(Protocol):
    """What the metrics are read from."""

    def health(self) -> Health:
        """How the line is."""

    def report(self) -> Mapping[str, SourceReport]:
        """How the parts of each camera are."""

    def thresholds(self) -> Mapping[str, float]:
        """By product, "" for bundles with one."""


def registry(observed: Observed) -> CollectorRegistry:
    """A registry that reads the line whenever it is asked."""
    found = CollectorRegistry(auto_describe=False)
    found.register(_Collector(observed))
    return found


class _Collector(Collector):
    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        health, report = self._observed.health(), self._observed.report()
        parts = CounterMetricFamily("flowad_line_parts", "Parts by camera and outcome.", labels=("camera", "result"))
        for camera, results in health.cameras.items():
            for result, count in results.items():
                parts.add_metric((camera, result), count)
        yield parts
        actions = CounterMetricFamily("flowad_line_actions", "Parts by what was done with them.", labels=("action",))
        for action, count in health.actions.items():
            actions.add_metric((action,), count)
        yield actions
        yield CounterMetricFamily("flowad_line_arrived", "Parts that came.", value=health.arrived)
        yield _histogram(health)
        for name, text, value in (
            ("ready", "1 when the canary frame gave its score and parts are taken.", health.ready),
            ("queue", "Parts that wait to be judged.", health.waiting),
            ("pending", "Parts without an outcome.", health.pending),
        ):
            yield GaugeMetricFamily(f"flowad_line_{name}", text, value=float(value))
        yield CounterMetricFamily("flowad_line_engine_failures", "Failures and restarts.", value=health.failures)
        info = InfoMetricFamily("flowad_line_bundle", "What judges.")
        info.add_metric((), {"bundle": health.bundle, "engine": health.engine})
        yield info
        threshold = GaugeMetricFamily("flowad_line_threshold", "Of the image score.", labels=("product",))
        for product, limit in self._observed.thresholds().items():
            threshold.add_metric((product,), limit)
        yield threshold
        yield from _outlets(health)
        yield from _monitor(report)


def _histogram(health: Health) -> Metric:
    counts, total, buckets = health.histogram or (0,) * (len(BUCKETS) + 1), 0, []
    for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    text = "From a part's trigger until its outcome."
    return HistogramMetricFamily("flowad_line_latency_seconds", text, buckets=buckets, sum_value=health.total)


def _outlets(health: Health) -> Iterable[Metric]:
    up = GaugeMetricFamily("flowad_line_camera_up", "1 while it gives parts.", labels=("camera",))
    for camera, trouble in health.sources.items():
        up.add_metric((camera,), float(not trouble))
    yield up
    works = GaugeMetricFamily("flowad_line_sink_up", "1 while it takes events.", labels=("sink",))
    waiting = GaugeMetricFamily("flowad_line_sink_waiting", "Events that it has not taken.", labels=("sink",))
    counters = {
        name: CounterMetricFamily(f"flowad_line_sink_{name}", text, labels=("sink",))
        for name, text in (
            ("delivered", "Events that it took."),
            ("missed", "Events that it never got."),
            ("failures", "Calls that failed."),
            ("pictures_lost", "Records that lost their picture while they waited."),
        )
    }
    for sink, state in health.sinks.items():
        works.add_metric((sink,), float(not state.trouble))
        waiting.add_metric((sink,), state.waiting)
        for name, counter in counters.items():
            counter.add_metric((sink,), getattr(state, name))
    yield from (works, waiting, *counters.values())


def _monitor(report: Mapping[str, SourceReport]) -> Iterable[Metric]:
    alarm = GaugeMetricFamily("flowad_line_alarm", "1 while it is on.", labels=("camera", "kind"))
    rejected = GaugeMetricFamily("flowad_line_rejected_share", "Of the last 1000 parts.", labels=("camera",))
    unjudged = GaugeMetricFamily("flowad_line_unjudged_share", "Of the last 1000 parts.", labels=("camera",))
    usual = GaugeMetricFamily("flowad_line_usual_rejects", "Share that is expected.", labels=("camera",))
    evidence = GaugeMetricFamily("flowad_line_evidence", "1 where a test fires.", labels=("camera", "test"))
    for camera, one in report.items():
        for kind in KINDS:
            alarm.add_metric((camera, kind), float(kind in one.alarms))
        rejected.add_metric((camera,), one.rejected)
        unjudged.add_metric((camera,), one.unjudged)
        usual.add_metric((camera,), one.usual_rejects)
        for test, value in one.evidence.items():
            evidence.add_metric((camera, test), value)
    yield from (alarm, rejected, unjudged, usual, evidence)
