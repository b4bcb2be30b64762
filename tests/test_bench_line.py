"""`flowad-bench line`: its account finds what a line may not do, and a short run of it passes on a real line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowad_fast.benchmarks.record.line import (
    EnduranceResult,
    FaultRow,
    LineRecord,
    Quantiles,
    Setting,
    Trial,
    markdown,
)
from flowad_fast.benchmarks.record.record import read
from flowad_fast.benchmarks.runs import line_load
from flowad_fast.benchmarks.runs.line_account import account, disorder, doubt
from flowad_fast.benchmarks.runs.line_camera import FrameCount
from flowad_fast.benchmarks.runs.line_campaign import choose
from flowad_fast.benchmarks.runs.line_endurance import steady
from flowad_fast.benchmarks.runs.line_faults import FAULTS
from flowad_fast.benchmarks.runs.line_rig import DEADLINE, FROZEN, LOST, TORN, WHOLE, Fed, name_of
from flowad_fast.benchmarks.runs.line_work import Work, divide, draw, prepare
from flowad_fast.errors import ConfigError
from tests.models import exported

ASKED = ("camera unplugged", "incomplete frames", "frozen frames", "broker down", "disk full", "slow webhook",
         "page hammered", "engine hanging", "engine raising", "clock jumps", "kill -9", "SIGTERM under load",
         "altered bundle activated")  # fmt: skip

WORK = Work(Path(), "b", (), np.zeros((2, 4, 4, 3), np.uint8), (1.0, 3.0), 2.0)


class Rig:
    """What `account` asks of a rig: three parts that were fed, and what a good line said of them."""

    def __init__(self) -> None:
        self.work = WORK
        fed = {"000000-00p.png": (0, WHOLE), "000001-01p.png": (1, WHOLE), "000002-01x.png": (1, TORN)}
        given = {name: Fed(*one, at=0.0) for name, one in fed.items()}
        self.feed = type("Feed", (), {"given": lambda self, rows: given})()
        self.said = [
            row("000000-00p.png", "good", "pass", 1.0),
            row("000001-01p.png", "anomalous", "reject", 3.0),
            row("000002-01x.png", "source lost", "reject", None),
        ]
        self.stored_too = True

    def rows(self) -> list[dict[str, Any]]:
        return self.said

    def stored(self) -> set[tuple[str, str]]:
        return {(one["part"], one["result"]) for one in self.said[: None if self.stored_too else -1]}


def row(name: str, result: str, action: str, score: float | None) -> dict[str, Any]:
    return {"part": f"cell/run1/{name}", "result": result, "action": action, "score": score, "seconds": 0.1,
            "bundle": "b" if score else "", "reason": ""}  # fmt: skip


def problems(change: Callable[[Rig], object]) -> str:
    rig = Rig()
    change(rig)
    return "; ".join(account(rig, frozenset({"b"})).problems)  # type: ignore[arg-type]


def test_a_line_that_keeps_its_promises_has_no_problems() -> None:
    found = account(Rig(), frozenset({"b"}))  # type: ignore[arg-type]
    assert (found.parts, found.outcomes, found.good, found.problems) == (3, 3, 1, [])
    assert found.results == {"good": 1, "anomalous": 1, "source lost": 1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rig: rig.said.pop(1), "1 parts have no outcome, the first is 000001-01p.png"),
        (lambda rig: rig.said.append(row("000009-00p.png", "late", "reject", None)), "of parts that never came"),
        (lambda rig: rig.said.append(row("000001-01p.png", "late", "reject", None)), "1 parts have several outcomes"),
        (lambda rig: rig.said[0].update(seconds=DEADLINE + 0.01), "its deadline is"),
        (lambda rig: rig.said[1].update(result="good", action="pass"), "the bare detector's score 3 says otherwise"),
        (lambda rig: rig.said[0].update(score=1.5), "has the score 1.5, the bare detector gave 1"),
        (lambda rig: rig.said[0].update(bundle="c"), "judged by c, which was not to judge"),
        (lambda rig: rig.said[2].update(result="good", action="pass", score=1.0), "but was torn, frozen or lost"),
        (lambda rig: rig.said[2].update(action="pass"), "passed without a verdict"),
        (lambda rig: rig.said.reverse(), "was told after"),
        (lambda rig: setattr(rig, "stored_too", False), "not the same in the database and the JSON lines"),
    ],
)
def test_the_account_finds_what_a_line_may_not_do(change: Callable[[Rig], object], expected: str) -> None:
    assert expected in problems(change)


def test_a_part_that_was_given_again_after_a_kill_is_told_and_may_not_pass_twice() -> None:
    rig = Rig()
    named = row("000001-01p.png", "shutting down", "reject", None) | {"part": "cell/run0/000001-01p.png"}
    rig.said.insert(0, named | {"reason": "the line was killed"})
    found = account(rig, frozenset({"b"}))  # type: ignore[arg-type]
    assert (found.parts, found.outcomes, found.problems) == (3, 3, []) and "given again" in found.notes[0]
    twice = rig.said[1] | {"part": "cell/run0/000000-00p.png"}
    assert "passed twice" in problems(lambda rig: rig.said.insert(0, twice))


def camera_rows(folder: Path, told: str) -> tuple[dict[str, Fed], list[dict[str, Any]]]:
    """Of a camera that made the frames 65534, 65535, 1, 2, 3 and was killed, and 7, 8 in its second life."""
    count = FrameCount(folder)
    for life, frames in enumerate(((65534, 65535, 1, 2, 3), (7, 8))):
        lines = [
            {
                "frame": one,
                "stamp": 100_000 * life + one,
                "picture": one % 2,
                "held": one == 8,
                "at": 10.0 * life + i / 8,
            }
            for i, one in enumerate(frames)
        ]
        count.log().write_text("".join(json.dumps(line) + "\n" for line in lines))
        count.ends.append(10.0 * life + 0.65)
    rows = []
    for name in told.split():
        series, *frame = name.split(".")
        stamp = 100_000 * (int(series) - 1) + int(frame[-1]) if frame else None
        rows.append(row(name, "anomalous" if frame else "source lost", "reject", 3.0) | {"stamp": stamp})
    return count.given(rows), rows


def test_frames_of_a_camera_are_counted_by_the_camera(tmp_path: Path) -> None:
    given, _ = camera_rows(tmp_path, "1.65534 1.65535 1.1.1 4 2.7 2.8")
    assert {name: one.way for name, one in given.items()} == {
        "1.65534": WHOLE, "1.65535": WHOLE, "1.1.1": WHOLE, "1.1.2": WHOLE, "4": LOST, "2.7": WHOLE, "2.8": FROZEN,
    }, "1.1.2 must have an outcome, 1.1.3 was cut off by the camera's end"  # fmt: skip
    assert given["1.65535"].picture == 1 and given["2.7"].at == 10
    assert disorder(camera_rows(tmp_path, "1.65534 1.65535 1.1.1 4 2.7 2.8")[1]) == []
    assert "1.65535 was told after" in disorder(camera_rows(tmp_path, "1.65534 1.1.1 1.65535")[1])[0]


def test_a_frame_that_a_line_has_dropped_is_missed(tmp_path: Path) -> None:
    given, rows = camera_rows(tmp_path, "1.65534 1.1.1 1.1.2 4 2.7 2.8 2.9")
    told = {name_of(one) for one in rows}
    assert given.keys() - told == {"1.65535"} and told - given.keys() == {"2.9"}
    assert "was torn, frozen or lost" in str(doubt(WORK, given, rows[3] | {"result": "good"}, frozenset({"b"})))


def test_every_fault_that_was_asked_for_is_there() -> None:
    titles = [fault.title for fault in FAULTS]
    assert all(any(title.startswith(one) for title in titles) for one in ASKED)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) and choose(()) == FAULTS
    with pytest.raises(ConfigError, match="did you mean 'broker'"):
        choose(("brokr",))


def test_memory_that_grows_is_not_flat() -> None:
    seconds = np.arange(0, 3600, 5.0)
    noise = np.random.default_rng(0).normal(0, 0.1, len(seconds))
    for growth, flat in ((0.0, True), (1.0, True), (4.0, False)):
        mb = 100 + growth * seconds / 3600 + noise + 50 * (seconds < 300)  # a start that takes more is no growth
        found = steady([*zip(seconds.tolist(), mb.tolist(), strict=True)], 60)
        assert found is not None and found.flat is flat
        assert found.slope_per_hour == pytest.approx(growth / 100, abs=0.002)
    assert steady([(float(i), 1.0) for i in range(9)], 0.1) is None, "a few samples say nothing"


def test_pictures_differ_and_the_threshold_divides_them() -> None:
    frames = draw(6, 32, 48, seed=3)
    assert frames.shape == (6, 32, 48, 3) and len({frame.tobytes() for frame in frames}) == 6
    assert (frames == draw(6, 32, 48, seed=3)).all() and (frames != draw(6, 32, 48, seed=4)).any()
    assert divide((1.0, 2.0, 2.1, 5.0, 5.1, 9.0)) == pytest.approx(3.55)
    with pytest.raises(ConfigError, match="nearly one score"):
        divide((1.0,) * 8)


def test_records_are_read_again_and_the_tables_say_why(tmp_path: Path) -> None:
    from flowad_fast.benchmarks.measure.environment import environment, moment
    from flowad_fast.benchmarks.record.record import write

    failed = FaultRow(
        name="disk", fault="disk full", how="filled", parts=7, outcomes=6, results={"good": 5, "late": 1}, good=5,
        recovery_s=None, limit_s=10, status="failed", problems=("1 parts have no outcome",), seconds=3.0,
    )  # fmt: skip
    setting = Setting(bundle="b", frame_size=(256, 256), threads=1, deadline_s=0.5, largest_batch=4)
    ended = EnduranceResult(
        setting=setting, minutes=10, asked_minutes=60, load=0.8, rate=8, engine_fps=10, parts=5, outcomes=5,
        results={"good": 5}, line=None, child=None, samples=(), problems=(),
    )  # fmt: skip
    record = LineRecord(preset="b", environment=environment(moment()), cases=(failed,), endurance=ended)
    write(record, tmp_path / "r.json")
    again = read(tmp_path / "r.json")
    assert again == record and isinstance(again, LineRecord) and not failed.passed and not ended.passed
    text = markdown(again)
    assert "0 of 1 faults passed" in text and "| disk full | 7 | 6 | 5 | 1 late | no | 10 | **no** |" in text
    assert "disk full **failed**: 1 parts have no outcome" in text and "10.0 of 60 minutes, failed" in text


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """The tiny model's bundle, with pictures that it was given."""
    folder = tmp_path_factory.mktemp("work")
    return prepare(folder, exported("onnx")[1].path, 0, lambda text: None)


@pytest.mark.parametrize(("limit", "lucky"), [(83.0, ()), (83.0, (87.5,)), (40.0, ())])
def test_the_sustained_rate_is_found_and_confirmed(
    limit: float, lucky: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of 100 frames a second; what held by luck once is not confirmed."""
    counts: list[int] = []

    def trial(work: Work, setting: Setting, rate: float, count: int, journal: Path) -> Trial:
        counts.append(count)
        held = rate <= limit or count < 3000 and any(abs(rate - one) < 7 for one in lucky)
        return Trial(rate=rate, parts=count, missed=0 if held else count, held=held)

    monkeypatch.setattr(line_load, "trial", trial)
    monkeypatch.setattr(line_load, "engine_fps", lambda *arguments: 100.0)
    setting = Setting(bundle="b", frame_size=(1, 1), threads=1, deadline_s=0.1, largest_batch=1)
    found = line_load.sustained(WORK, setting, 1.0, tmp_path, lambda text: None)
    if limit < 50:
        assert found.sustained is found.share is None and len(found.trials) == 1
        return
    assert found.sustained is not None and limit - 6 < found.sustained <= limit
    assert found.share == pytest.approx(found.sustained / 100) and counts[-1] == 3000 and found.trials[-1].held
    late = setting.but(deadline_s=2.0)
    line_load.sustained(WORK, late, 1.0, tmp_path, lambda text: None)
    assert max(counts) > 3 * 2.0 / 0.02 * (limit - 6), "a rate that is 2 % too high must have time to show"


@pytest.mark.long
def test_a_rate_that_is_too_high_does_not_hold(work: Work, tmp_path: Path) -> None:
    setting = Setting(bundle="b", frame_size=work.frame_size, threads=1, deadline_s=1.0, largest_batch=2)
    low = line_load.trial(work, setting, 20, 30, tmp_path / "low")
    assert low.held and low.parts == 30 and low.missed == 0
    high = line_load.trial(work, setting.but(deadline_s=0.002), 5000, 400, tmp_path / "high")
    assert not high.held and high.parts == 400 and high.missed > 1


@pytest.mark.long
def test_what_a_line_adds(work: Work, tmp_path: Path) -> None:
    setting = Setting(bundle="b", frame_size=work.frame_size, threads=1, deadline_s=5.0, largest_batch=1)
    found = line_load.added(work, setting, 30, tmp_path, lambda text: None)
    for one in (found.bare, found.child, found.line, found.paired, *found.stages.values()):
        assert isinstance(one, Quantiles) and one.n == 30 and one.p99 is None
    assert found.added == {"p50": found.line.p50 - found.bare.p50}
    assert found.line.p50 > found.stages["scoring"].p50 > 0


@pytest.mark.long
def test_a_short_campaign_on_a_real_line(tmp_path: Path) -> None:
    """Frames that are cut, the engine's end, and the line's own."""
    folder = Path(__file__).parents[1]
    bundle = exported("onnx")[1].path
    command = ["line", "--part", "campaign", "--faults", "incomplete,killed,kill-9", "--bundle", bundle, "--output",
               tmp_path / "r.json", "--seed", "5"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "flowad_fast.benchmarks.cli", *map(str, command)], capture_output=True, text=True,
        cwd=folder, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = read(tmp_path / "r.json")
    assert isinstance(record, LineRecord) and [one.status for one in record.cases] == ["ok"] * 3
    cut, _, killed = record.cases
    assert all(one.parts == one.outcomes > 15 and one.recovery_s is not None for one in record.cases)
    assert cut.results["source lost"] > 5 and killed.results["good"] == killed.good > 0
