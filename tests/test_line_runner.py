"""The line with fake engines: parts in, outcomes out, whatever hangs, raises or is slow."""

import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from flowad_fast.detector import Detector
from flowad_fast.line import Alarm, IteratorSource, Line, LineStoppedError, NoResult, Record, Shot
from flowad_fast.line.journal import Journal
from flowad_fast.line.settings import Limits
from flowad_fast.line.sinks.rows import to_row
from flowad_fast.line.sources import EndOfSource
from flowad_fast.line.spool import Spool
from flowad_fast.stages.decision import Verdict
from tests.test_detector import FakeEngine, calibration, fake

LIMITS = Limits(call=0.15, drain=2, restarts=3, start=5)


def frame(value: int, seed: int = 0) -> np.ndarray:
    """A picture whose score is its first pixel."""
    one = np.random.default_rng([value, seed]).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    one[0, 0, 0] = value
    return one


class Engine(FakeEngine):
    """A fake that hangs at 200, raises at 201 and takes 50 ms at 202; the canary's first pixel is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.released = threading.Event()

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        first = frames[:, 0, 0, 0]
        if 200 in first:
            self.released.wait(20)
        if 201 in first:
            raise RuntimeError("no memory left")
        if 202 in first:
            time.sleep(0.05)
        return super().run(frames, y)


class Collector:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Record | Alarm] = []

    def publish(self, events: list[Record | Alarm]) -> None:
        self.events += events

    def close(self) -> None:
        pass

    @property
    def records(self) -> list[Record]:
        return [one for one in self.events if isinstance(one, Record)]

    @property
    def alarms(self) -> list[str]:
        return [f"{one.kind}{' over' * one.over}" for one in self.events if isinstance(one, Alarm)]


@pytest.fixture
def engine() -> Iterator[Engine]:
    one = Engine()
    yield one
    one.released.set()


def detector(engine: FakeEngine) -> Detector:
    return fake(calibration(100.0), engine)


def spaced(*shots: np.ndarray | Shot, pause: float = 0.02) -> Iterator[np.ndarray | Shot]:
    for one in shots:
        yield one
        time.sleep(pause)


def test_verdicts_actions_and_order(engine: Engine) -> None:
    sink = Collector()
    frames = [frame(1), frame(150), np.zeros((64, 64, 3), np.uint8), Shot(None, lost="incomplete buffer"), frame(2)]
    line = Line(detector(engine), {"left": IteratorSource(frames)}, deadline=5, sinks={"all": sink}, limits=LIMITS)
    health = line.run()
    results = [one.result for one in sink.records]
    assert results == [Verdict.GOOD, Verdict.ANOMALOUS, Verdict.INVALID, NoResult.SOURCE_LOST, Verdict.GOOD]
    assert [one.action for one in sink.records] == ["pass", "reject", "reject", "reject", "pass"]
    assert sink.records[3].reason == "incomplete buffer" and "black" in sink.records[2].reason
    assert sink.records[1].score == 150 and sink.records[1].threshold == 100 and sink.records[1].heat is not None
    assert all(one.camera == "left" and one.seconds >= 0 for one in sink.records)
    assert len({one.part for one in sink.records}) == 5
    assert health.arrived == 5 and health.pending == 0 and sum(health.results.values()) == 5
    assert set(health.latency) == {"p50", "p95", "p99", "max"} and health.sinks["all"].delivered == 5
    assert health.last == tuple(sink.records) and all(one.frame is one.heat is None for one in health.last)


def test_each_camera_notices_that_it_is_frozen(engine: Engine) -> None:
    sink, same = Collector(), frame(1)
    sources = {"a": IteratorSource([same, same]), "b": IteratorSource([same])}
    Line(detector(engine), sources, deadline=5, sinks={"all": sink}, limits=LIMITS).run()
    of = {camera: [one.result for one in sink.records if one.camera == camera] for camera in "ab"}
    assert of == {"a": [Verdict.GOOD, Verdict.INVALID], "b": [Verdict.GOOD]}


def test_a_hanging_call_gives_no_result_in_time_and_the_line_goes_on(engine: Engine) -> None:
    sink = Collector()
    parts = [frame(1), frame(200), frame(2), *(frame(3, i) for i in range(12))]
    source = IteratorSource(spaced(*parts, pause=0.03))
    health = Line(detector(engine), {"a": source}, deadline=0.1, sinks={"all": sink}, limits=LIMITS).run()
    records = sink.records
    assert len(records) == len(parts) == health.arrived
    assert records[0].result is Verdict.GOOD
    assert records[1].result is NoResult.LATE and records[1].seconds < 0.14, "told at its deadline, not at the limit"
    assert records[-1].result is Verdict.GOOD
    assert health.failures == 1 and sink.alarms == ["engine failed", "engine failed over"]


def test_a_part_that_comes_late_is_told_at_its_own_deadline(engine: Engine) -> None:
    sink = Collector()
    source = IteratorSource(spaced(frame(1), Shot(frame(200), age=0.4), pause=0.1))
    Line(detector(engine), {"a": source}, deadline=0.5, sinks={"all": sink}, limits=LIMITS).run()
    late = sink.records[1]
    assert late.result is NoResult.LATE and 0.5 <= late.seconds < 0.54, "not when a part that is new would be late"


def test_a_raising_engine_fails_its_parts_only(engine: Engine) -> None:
    sink = Collector()
    source = IteratorSource(spaced(frame(1), frame(201), frame(2)))
    health = Line(detector(engine), {"a": source}, deadline=1, sinks={"all": sink}, limits=LIMITS).run()
    assert [one.result for one in sink.records] == [Verdict.GOOD, NoResult.ENGINE_FAILED, Verdict.GOOD]
    assert "no memory left" in sink.records[1].reason and health.failures == 1


def test_too_many_failures_stop_the_line_loudly(engine: Engine) -> None:
    sink = Collector()
    parts = [frame(201, i) for i in range(30)]
    line = Line(
        detector(engine),
        {"a": IteratorSource(spaced(*parts))},
        deadline=1,
        sinks={"all": sink},
        limits=LIMITS,
        largest_batch=1,
    )
    with pytest.raises(LineStoppedError, match="failed 4 times"):
        line.run()
    health = line.health()
    assert not health.alive and not health.ready
    assert len(sink.records) == health.arrived and 4 <= health.arrived
    assert all(isinstance(one.result, NoResult) and one.action == "reject" for one in sink.records)


def test_slow_and_raising_sinks_delay_no_verdict(engine: Engine) -> None:
    class Raising(Collector):
        def publish(self, events: list[Record | Alarm]) -> None:
            raise OSError("broker down")

    class Slow(Collector):
        def publish(self, events: list[Record | Alarm]) -> None:
            time.sleep(0.5)

    sink = Collector()
    sinks = {"slow": Slow(), "raising": Raising(), "all": sink}
    source = IteratorSource(spaced(*(frame(i) for i in range(40)), pause=0.002))
    health = Line(detector(engine), {"a": source}, deadline=0.3, sinks=sinks, limits=LIMITS).run()
    assert [one.result for one in sink.records] == [Verdict.GOOD] * 40
    assert health.sinks["raising"].missed == 41, "40 records and its own alarm"
    assert "broker down" in health.sinks["raising"].trouble and "sink failed" in sink.alarms


def test_stopping_under_load_tells_every_part(engine: Engine) -> None:
    sink = Collector()

    def endless() -> Iterator[np.ndarray]:
        number = 0
        while True:
            yield frame(202, number)
            number += 1
            time.sleep(0.005)

    limits = Limits(call=1, drain=1, start=5)
    line = Line(
        detector(engine), {"a": IteratorSource(endless())}, deadline=5, sinks={"all": sink}, limits=limits, capacity=8
    )
    with line:
        time.sleep(0.4)
        line.stop()
        start = time.monotonic()
    assert time.monotonic() - start < 2
    health = line.health()
    assert len(sink.records) == health.arrived == sum(health.results.values()) > 20
    assert {NoResult.QUEUE_FULL, Verdict.ANOMALOUS} <= {one.result for one in sink.records}


def test_a_part_without_a_result_can_stop_the_line(engine: Engine) -> None:
    sink = Collector()
    source = IteratorSource(spaced(frame(1), Shot(None, lost="gap in frame ids"), frame(2)))
    line = Line(detector(engine), {"a": source}, deadline=1, sinks={"all": sink}, limits=LIMITS, on_no_result="stop")
    with pytest.raises(LineStoppedError, match="gap in frame ids"):
        line.run()
    assert sink.records[1].action == "stop"


def test_a_lost_camera_is_told_once_and_read_again(engine: Engine) -> None:
    class Flaky:
        def __init__(self) -> None:
            self.reads = 0

        def read(self, wait: float) -> Shot | None:
            self.reads += 1
            if self.reads in (2, 3):
                raise OSError("cable unplugged")
            if self.reads > 4:
                raise EndOfSource
            return Shot(frame(self.reads))

        def close(self) -> None:
            pass

    sink = Collector()
    Line(detector(engine), {"a": Flaky()}, deadline=1, sinks={"all": sink}, limits=LIMITS).run()
    assert sink.alarms == ["camera lost", "camera lost over"]
    assert [one.result for one in sink.records] == [Verdict.GOOD] * 2


def test_the_next_run_names_what_a_killed_one_left(engine: Engine, tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        journal.begin("a/1/left", "a", datetime.now(UTC))
    for expected in (1, 0):
        sink = Collector()
        line = Line(
            detector(engine), {"a": IteratorSource([])}, deadline=1, sinks={"all": sink}, journal=tmp_path / "journal"
        )
        line.run()
        assert [(one.part, one.result) for one in sink.records] == [("a/1/left", NoResult.SHUTTING_DOWN)] * expected


def test_a_promising_sink_gets_everything_in_order_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    class Down(Collector):
        def publish(self, events: list[Record | Alarm]) -> None:
            raise OSError("down")

    def run(sink: Collector, *values: int) -> None:
        source = IteratorSource([Shot(frame(value), f"part{value}") for value in values])
        limits = Limits(drain=0.6, start=5)
        Line(
            detector(engine),
            {"a": source},
            deadline=5,
            sinks={"db": sink},
            promising={"db"},
            journal=tmp_path,
            limits=limits,
        ).run()

    run(Down(), 1, 2, 3)
    run(up := Collector(), 4)
    assert [one.part.split("/")[-1] for one in up.records] == ["part1", "part2", "part3", "part4"]
    run(again := Collector(), 5)
    assert [one.part.split("/")[-1] for one in again.records] == ["part5"], "nothing twice"


def test_an_outcome_that_was_kept_is_the_only_one(engine: Engine, tmp_path: Path) -> None:
    """Killed between writing the record to one of two spools and noting in the journal that it was told."""
    arrived = datetime.now(UTC)
    with Journal(tmp_path) as journal:
        journal.begin("a/1/x", "a", arrived)
        journal.begin("a/1/y", "a", arrived)
    spool = Spool(tmp_path / "spool" / "one", 1 << 20)
    spool.put(json.dumps(to_row(Record("a/1/x", "a", Verdict.ANOMALOUS, "reject", arrived, 0.1))).encode())
    spool.close()
    sinks = {name: Collector() for name in ("one", "two", "three")}
    camera = {"a": IteratorSource([])}
    Line(detector(engine), camera, deadline=1, sinks=sinks, promising={"one", "two"}, journal=tmp_path).run()
    for sink in sinks.values():
        told = {one.part: one.result for one in sink.records}
        assert told == {"a/1/x": Verdict.ANOMALOUS, "a/1/y": NoResult.SHUTTING_DOWN} and len(sink.records) == 2


def test_swapping_between_two_parts(engine: Engine) -> None:
    sink, gate = Collector(), threading.Event()

    def frames() -> Iterator[np.ndarray]:
        yield frame(50)
        gate.wait(5)
        yield frame(51)

    line = Line(detector(engine), {"a": IteratorSource(frames())}, deadline=5, sinks={"all": sink}, limits=LIMITS)
    with line:
        while not line.health().results:
            time.sleep(0.005)
        before = line.swap(fake(calibration(10.0)))
        gate.set()
        line.wait()
    assert [one.result for one in sink.records] == [Verdict.GOOD, Verdict.ANOMALOUS]
    assert [one.threshold for one in sink.records] == [100, 10] and before.engine == "fake on cpu"


def test_an_uncalibrated_detector_starts_no_line(engine: Engine) -> None:
    from flowad_fast.errors import CalibrationError

    with pytest.raises(CalibrationError, match="no calibration"):
        Line(fake(engine=engine), {"a": IteratorSource([])}, deadline=1).start()


def test_batches_of_every_size_are_judged_before_the_first_part_comes() -> None:
    engine = FakeEngine()
    line = Line(detector(engine), {"a": IteratorSource([frame(n) for n in range(1, 8)])}, deadline=5, largest_batch=6)
    line.start()
    warm = engine.calls[:9]  # the canary, then twice each size
    assert warm == [1, 1, 1, 2, 2, 4, 4, 6, 6]
    line.wait()
    line.close()
    assert sum(engine.calls[9:]) == 7


def test_a_canary_with_another_score_starts_no_line(tmp_path: Path) -> None:
    from flowad_fast.errors import EngineUnavailableError
    from flowad_fast.line.scoring import InThread

    for shift, allowed in ((0.0, True), (0.0, True), (0.1, False)):
        shifted = FakeEngine(lambda frames, shift=shift: frames[:, 0, 0, 0].astype(np.float32) + shift)  # type: ignore
        scoring = InThread(detector(shifted), bundle="b1")
        line = Line(scoring, {"a": IteratorSource([])}, deadline=1, journal=tmp_path)
        if allowed:
            assert line.run().why == "the line does not run"
        else:
            with pytest.raises(EngineUnavailableError, match="does not compute what it did"):
                line.run()
