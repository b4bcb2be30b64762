"""The monitor's promises, on simulated lines: few false alarms, changes found and told apart, one alarm for each."""

import itertools
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from flowad_fast.line import IteratorSource, Line
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.monitor import POINTS, Monitor
from flowad_fast.line.monitor_evidence import RateTest, conformal_bound
from flowad_fast.line.monitor_look import Look, look
from flowad_fast.line.monitor_source import Baseline, Ring
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.settings import MonitorSettings
from flowad_fast.line.watch import Watch
from flowad_fast.stages.decision import Verdict, calibrate
from tests.test_detector import calibration, fake
from tests.test_line_runner import Collector

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
QUICK = MonitorSettings(false_alarms=0.1, horizon=2000, reference=200)


class Change(NamedTuple):
    """What is different from some part on; shifts are in standard deviations of good parts."""

    shift: float = 0.0
    background: float = 0.0
    brightness: float = 0.0
    sharpness: float = 0.0
    defects: float = 0.0
    lost: float = 0.0


class Simulated:
    """A line whose good parts have normal scores, with a threshold fitted on good parts."""

    def __init__(self, seed: int, settings: MonitorSettings = QUICK, alpha: float = 0.05, parts: int = 400) -> None:
        self.random = np.random.default_rng(seed)
        fitted = calibrate(self.random.normal(size=parts), alpha).classes[""]
        self.threshold, self.settings, self.told = fitted.threshold, settings, 0
        self.baselines = {"a": Baseline(alpha, fitted.threshold, parts)}
        self.monitor = Monitor("b1", self.baselines, settings)

    def run(self, parts: int, change: Change = Change()) -> list[Alarm]:  # noqa: B008
        alarms: list[Alarm] = []
        for _ in range(parts):
            alarms += self.part(change)
        return alarms

    def part(self, change: Change) -> list[Alarm]:
        random = self.random
        self.told += 1
        at = START + timedelta(seconds=0.1 * self.told)
        if random.random() < change.lost:
            return self.monitor.observe(Record(f"{self.told}", "a", NoResult.SOURCE_LOST, "reject", at, 0.01), None)
        noise = random.normal(size=4)
        score = noise[0] + change.shift + (6.0 if random.random() < change.defects else 0.0)
        result = Verdict.ANOMALOUS if score > self.threshold else Verdict.GOOD
        seen = Look(
            100 + 5 * (noise[1] + change.brightness),
            50 * math.exp(0.1 * (noise[2] + change.sharpness)),
            1 + 0.1 * (noise[3] + change.background),
        )
        action = "pass" if result is Verdict.GOOD else "reject"
        record = Record(
            f"{self.told}", "a", result, action, at, 0.02, float(score), self.threshold, "", self.monitor.bundle
        )
        return self.monitor.observe(record, seen)


def kinds(alarms: list[Alarm]) -> list[str]:
    return [one.kind + " over" * one.over for one in alarms]


@pytest.mark.parametrize(("above", "below", "rate"), [(1, 19, 0.146), (5, 96, 0.0894), (250, 251, 0.5359)])
def test_the_conformal_bound_is_the_beta_quantile(above: int, below: int, rate: float) -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert conformal_bound(above, below, 0.05) == pytest.approx(scipy.beta(above, below).isf(0.05), rel=1e-9)
    assert conformal_bound(above, below, 0.05) == pytest.approx(rate, rel=2e-2)


def test_the_conformal_bound_holds_for_calibrations_of_any_scores() -> None:
    random = np.random.default_rng(0)
    bound, n = conformal_bound(5, 96, 0.1), 100
    above = 0
    for _ in range(2000):
        threshold = calibrate(random.normal(size=n), 0.05).classes[""].threshold
        rate = 0.5 * math.erfc(threshold / math.sqrt(2))
        above += rate > bound
    assert above / 2000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.6])
def test_false_alarms_are_at_most_as_many_as_stated(bound: float) -> None:
    """At the bound itself, where they are most likely."""
    random, parts, stated = np.random.default_rng(1), 1500, 0.1
    alarms = 0
    for _ in range(300):
        test = RateTest(bound, bound, parts / stated)
        for event in random.random(parts) < bound:
            test.add(bool(event))
            if test.fired:
                alarms += 1
                break
    assert alarms / 300 <= stated + 3 * math.sqrt(stated * (1 - stated) / 300)


def test_a_threefold_rate_is_found_within_the_stated_number_of_parts() -> None:
    random, delays = np.random.default_rng(2), []
    for _ in range(200):
        test = RateTest(0.05, 0.076, 100_000 / 0.00045)
        for event in random.random(1000) < 0.05:  # a quiet past delays nothing
            test.add(bool(event))
        parts = 0
        while not test.fired:
            test.add(bool(random.random() < 0.15))
            parts += 1
        delays.append(parts)
    assert test.delay(0.15) < 900 and test.delay(0.076) == math.inf
    assert np.mean(delays) <= test.delay(0.15)
    assert np.quantile(delays, 0.95) <= 2 * test.delay(0.15)


def test_the_evidence_is_over_only_when_the_rate_is_back() -> None:
    test = RateTest(0.05, 0.1, 1000)
    while not test.fired:
        test.add(True)
    for i in range(500):
        test.add(i % 10 == 0)  # still at the bound
    assert test.fired
    for _ in range(100):
        test.add(False)
    assert not test.fired and test.evidence < 0.5


@pytest.mark.long
def test_lines_that_are_as_they_were_have_few_alarms() -> None:
    alarmed = sum(bool(Simulated(seed).run(QUICK.horizon)) for seed in range(60))
    assert alarmed <= 60 * (QUICK.false_alarms + 3 * math.sqrt(QUICK.false_alarms / 60))


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        (Change(shift=1.5, background=1.5, brightness=-2, sharpness=-2), ("background rose", "brightness fell")),
        (Change(shift=5.0, background=3), ("background rose",)),
        (Change(brightness=2), ("brightness rose",)),
        (Change(sharpness=-2), ("sharpness fell",)),
        (Change(shift=-1.5), ("scores of good parts fell",)),
    ],
)
def test_a_line_that_drifts_is_called_so_once(change: Change, moved: tuple[str, ...]) -> None:
    for seed in range(3):
        line = Simulated(seed)
        assert line.run(600) == []
        alarms = line.run(600, change)
        assert kinds(alarms) == ["line drifts"], kinds(alarms)
        assert all(one in alarms[0].text for one in moved), alarms[0].text
        assert "flowad-export calibrate" in alarms[0].text and alarms[0].figures["calibration_parts"] == 400
        assert kinds(line.run(2500)) == ["line drifts over"]


@pytest.mark.parametrize("defects", [0.15, 0.5, 1.0])
def test_parts_that_got_worse_are_no_drift(defects: float) -> None:
    for seed in range(3):
        line = Simulated(seed)
        assert line.run(600) == []
        alarms = line.run(1200, Change(defects=defects))
        assert kinds(alarms) == ["parts got worse"], (seed, kinds(alarms))
        assert alarms[0].figures["rejected"] > 2 * alarms[0].figures["rejected_usual"]
        assert kinds(line.run(2500)) == ["parts got worse over"]


def test_worse_parts_on_a_line_that_drifts_are_told_too() -> None:
    line = Simulated(3)
    line.run(600)
    assert kinds(line.run(600, Change(brightness=2))) == ["line drifts"]
    assert kinds(line.run(600, Change(brightness=2, defects=0.5))) == ["parts got worse"]


def test_parts_without_a_verdict_are_told_and_over() -> None:
    line = Simulated(4)
    assert line.run(300) == []
    alarms = line.run(60, Change(lost=0.3))
    assert kinds(alarms) == ["no results"] and "0.1% expected" in alarms[0].text
    assert line.monitor.report()["a"].lost > 0
    assert kinds(line.run(2500)) == ["no results over"]


def test_few_calibration_parts_make_it_careful_until_the_line_has_told_more() -> None:
    line = Simulated(5, parts=19)
    before = line.monitor.report()["a"].rejects_bound
    line.run(250)
    assert before > 0.24 and line.monitor.report()["a"].rejects_bound < 0.2


def test_the_reference_survives_a_restart_and_not_another_bundle() -> None:
    line = Simulated(6)
    assert line.monitor.remember() == ""
    line.run(250)
    memory = line.monitor.remember()
    again = Monitor("b1", line.baselines, QUICK, memory)
    assert again.report()["a"].learned == 1 and again.remember() == memory
    assert again.report()["a"].rejects_bound == line.monitor.report()["a"].rejects_bound
    line.monitor = again
    alarms = line.run(300, Change(brightness=2))
    assert kinds(alarms) == ["line drifts"], "it drifted while the line was off"
    assert kinds(again.rebase("b2", line.baselines, START)) == ["line drifts over"]
    for text in (memory, "{", '{"bundle": "b1"}'):
        assert Monitor("b2", line.baselines, QUICK, text).report()["a"].learned == 0


def test_parts_of_the_bundle_before_are_not_compared() -> None:
    line = Simulated(7)
    line.monitor.rebase("b2", line.baselines, START)
    line.monitor.bundle, own = "b1", "b2"
    line.run(3)
    line.monitor.bundle = own
    record = Record("x", "a", Verdict.GOOD, "pass", START, 0.1, 0.0, 1.0, "", "b1")
    before = line.monitor.report()["a"].parts
    assert line.monitor.observe(record, None) == [] and line.monitor.report()["a"].parts == before
    assert line.monitor.observe(Record("y", "elsewhere", Verdict.GOOD, "pass", START, 0.1), None) == []


Part = tuple[Record, Look | None]
RESULTS = st.sampled_from([*Verdict, *NoResult])
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=32)


@st.composite
def parts(draw: st.DrawFn) -> Part:
    result = draw(RESULTS)
    seen = draw(st.none() | st.builds(Look, NUMBERS, NUMBERS, st.none() | NUMBERS))
    at = START + timedelta(seconds=draw(st.floats(-1e6, 1e6)))
    score = draw(st.none() | NUMBERS)
    return Record("p", "a", result, "reject", at, draw(st.floats(0, 10)), score, 1.0, bundle="b1"), seen


@examples(max_examples=40, deadline=None)
@given(st.lists(st.tuples(parts(), st.integers(1, 80)), max_size=25))
def test_whatever_comes_alarms_alternate_and_memory_is_bounded(
    seen: list[tuple[tuple[Record, Look | None], int]],
) -> None:
    settings = MonitorSettings(false_alarms=0.5, horizon=100, reference=50)
    monitor = Monitor("b1", {"a": Baseline(0.05, 1.0, 40)}, settings)
    on: dict[str, bool] = {}
    for (record, picture), times in seen:
        for _ in range(times):
            for alarm in monitor.observe(record, picture):
                assert on.get(alarm.kind, False) is alarm.over, "an alarm begins, then it is over"
                on[alarm.kind] = not alarm.over
                assert all(isinstance(one, float) for one in alarm.figures.values())
    report = monitor.report()["a"]
    assert set(report.alarms) == {kind for kind, one in on.items() if one}
    assert len(report.points) <= POINTS + 1 and 0 <= report.learned <= 1
    assert sum(one.parts for one in report.points) == sum(times for _, times in seen)
    assert all(0 <= one <= 1 for one in (report.rejected, report.unjudged, *report.evidence.values()))


@examples(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=False), max_size=40), st.integers(1, 12), st.integers(0, 50))
def test_a_ring_gives_the_newest_in_order(values: list[float], size: int, count: int) -> None:
    ring = Ring(size)
    for value in values:
        ring.append(value)
    newest = values[-size:]
    assert ring.last(count).tolist() == (newest[-count:] if count else [])


def scenes() -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for shape in ((64, 64), (300, 500), (1200, 1600)):
        yield random.integers(0, 200, (*shape, 3), dtype=np.uint8)


def test_a_look_tells_light_and_focus_apart() -> None:
    for frame in scenes():
        blurred = frame.copy()
        blurred[1:] = (frame[1:].astype(int) + frame[:-1]) // 2
        plain, soft, light = look(frame), look(blurred), look(frame + np.uint8(50))
        assert soft.sharpness < 0.8 * plain.sharpness and soft.brightness == pytest.approx(plain.brightness, rel=0.02)
        assert light.brightness == pytest.approx(plain.brightness + 50) and light.sharpness == pytest.approx(
            plain.sharpness, rel=1e-3
        )
    heat = np.zeros((256, 256), np.float32)
    heat[:40] = 9  # a defect
    assert look(frame, heat).background == 0 and look(frame, heat + 1).background == 1
    assert look(np.full((2, 2, 3), 7, np.uint8)) == Look(7.0, 0.0)


def test_a_running_line_tells_its_alarms_to_sinks_and_remembers(tmp_path: Path) -> None:
    """Through `Watch`: frames get darker, and the next run knows what they were."""
    settings, random = MonitorSettings(false_alarms=0.1, horizon=1000, reference=60), np.random.default_rng(0)

    def frames(count: int, light: int) -> Iterator[np.ndarray]:
        for _ in range(count):
            one = random.integers(0, 100, (64, 64, 3), dtype=np.uint8) + np.uint8(light)
            one[0, 0, 0] = random.integers(0, 90)
            yield one

    def run(shots: Iterator[np.ndarray]) -> tuple[Collector, Watch]:
        sink = Collector()
        sources = {"a": IteratorSource(shots)}
        line = Line(fake(calibration(100.0)), sources, deadline=20, capacity=1000, sinks={"all": sink})
        watch = Watch(line, settings, tmp_path / "usual.json")
        line.run()
        watch.save()
        return sink, watch

    sink, watch = run(itertools.chain(frames(120, 100), frames(60, 40)))
    assert sink.alarms == ["line drifts"]
    assert "brightness fell" in next(one.text for one in sink.events if isinstance(one, Alarm))
    latest, rejected = watch.pictures()
    assert latest["a"].frame.shape == (64, 64, 3) and not rejected and latest["a"].record.frame is None
    assert latest["a"].heat is not None and latest["a"].heat.base is None, "it keeps no batch's maps"
    assert "brightness" in (tmp_path / "usual.json").read_text()
    sink, _ = run(frames(60, 40))
    assert sink.alarms == ["line drifts"], "what is usual was remembered"
    (tmp_path / "usual.json").write_text("damaged")
    sink, watch = run(frames(60, 40))
    assert sink.alarms == [] and watch.report()["a"].learned == 1
