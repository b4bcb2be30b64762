"""The first minutes on a GPU, tried without one: the plan and runner on a clock of the tests; then real processes."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.errors import OutOfResources

from flowad_fast.benchmarks.measure import roofs
from flowad_fast.benchmarks.measure.cases import PRESETS, REFERENCE, empty_row, shape_of
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.measure.turns import measured
from flowad_fast.benchmarks.measure.worker import Samples
from flowad_fast.benchmarks.record import record, report
from flowad_fast.benchmarks.record.limits import Products, Roofs
from flowad_fast.benchmarks.record.machine import Environment, Moment
from flowad_fast.benchmarks.record.record import Memory
from flowad_fast.benchmarks.runs import gpu_check, gpu_executor, gpu_runner
from flowad_fast.benchmarks.runs.gpu_executor import Workers
from flowad_fast.benchmarks.runs.gpu_plan import (
    BUDGET_S,
    COMPILE_S,
    DRY_RUN,
    GPU,
    HEADLINES_S,
    Work,
    plan,
)
from flowad_fast.benchmarks.runs.gpu_runner import Outcome
from flowad_fast.errors import ConfigError
from flowad_fast.kernels import attention_dual

PLAN = plan(GPU)
HEADLINES = [work for work in PLAN if work.headline]
MEMORY = Memory(idle=1, peak=2, above_idle=1)

# An H100 at the paper's scale, as modelled from the code, from compiled kernels and from this project's CPU runs; in
# seconds. Independent of the plan's own `needed`.
START = 5.0
"""A process: fork, imports, CUDA, 1.2 G random parameters."""
LOAD = 1.5
"""An engine on a kept model: weights cast or quantised, attention measured."""
TRITON = 8.0
"""Kernels of the first capture of a process; as much again for those of density."""
PRODUCTS = 2.5
"""Candidates of the matrix products, at few rows."""
EXPECTED = {"inversion": 0.5, "mismatch": 0.3, "reconstruction": 0.5, "density": 4.0}
"""The float32 maps of two frames; of density also an independent estimate's."""
CALL_MS = {
    "bf16": {1: 5.5, 8: 22.9, 16: 45.0, 32: 87.8},
    "fp8": {1: 4.7, 8: 17.3, 16: 34.0, 32: 66.3},
    "fp32": {1: 40.0, 8: 200.0},
}
"""Three evaluations, from host to host, by batch."""
WORK = {"inversion": 1.0, "mismatch": 0.45, "reconstruction": 1.0, "density": 1.0}
DENSITY_MS = {("bf16", 10): 1100.0, ("bf16", 1): 170.0, ("fp8", 10): 700.0, ("fp8", 1): 110.0}
TESTS = 200.0
"""The upper end of the estimate, without what parallel compilation saves."""
COMPILE = 120.0
TILE = 6.0
"""A tile of attention's tangents: nearly all of it is compiling."""


@pytest.fixture(autouse=True)
def environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking git and the driver after every piece would be these tests' time."""
    monkeypatch.setattr(gpu_check, "environment", _environment)


@functools.cache
def _once() -> Environment:
    return environment(moment())


def _environment(before: Moment, seconds: float) -> Environment:
    return _once().but(before=before, seconds=seconds)


@dataclass
class Clock:
    """A clock that only moves when it is told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Machine:
    """In place of the processes: takes modelled seconds, stops at deadlines, and may hang.

    Before each piece it looks whether all rows until then are on disk.
    """

    clock: Clock
    output: Path
    slow: float = 1.0
    hangs: str | None = None
    tests: float = TESTS
    alive: set[str] = field(default_factory=set)
    known: set[tuple[str, str]] = field(default_factory=set)
    rows: list[str] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)

    def __call__(self, work: Work, deadline: float) -> Outcome:
        saved = record.read(self.output)
        assert isinstance(saved, record.Record)
        assert {row.name for row in saved.cases} == set(self.rows), "all rows are on disk before the next piece begins"
        began = self.clock.now
        end = float("inf") if work.name == self.hangs else began + self.slow * self.seconds(work)
        if end > deadline:
            return self.cut(work, deadline)
        self.clock.now = self.ends[work.name] = end
        if work.kind != "row":
            return Outcome("ok", roofs=Roofs(copy_gb_s=3000) if work.kind == "roofs" else None)
        self.rows.append(work.case.name)
        calls = Samples([1e3 * self.slow * self.call(work)] * 3, [])
        return Outcome("ok", rows=(empty_row(work.case).but(measured=measured(work.case.batch, [calls], MEMORY)),))

    def cut(self, work: Work, deadline: float) -> Outcome:
        """A process that does not answer is killed with all that it has; the tests' is none of them."""
        self.clock.now = deadline
        if work.kind == "tests":
            return Outcome("timeout", "cut off", output=("tests/test_x.py::test_y PASSED",))
        self.alive.discard(work.case.precision)
        self.known = {one for one in self.known if one[0] != work.case.precision}
        rows = (empty_row(work.case, "timeout", "killed"),) if work.kind == "row" else ()
        self.rows += [row.name for row in rows]
        return Outcome("timeout", "killed", rows)

    def call(self, work: Work) -> float:
        case = work.case
        if case.probes:
            return DENSITY_MS[case.precision, case.probes] / 1e3
        return WORK[case.scorer.kind] * CALL_MS[case.precision][case.batch] / 1e3

    def seconds(self, work: Work) -> float:
        """What the piece takes, given what its process has already."""
        if work.kind == "tests":
            return self.tests
        case, total = work.case, 0.0
        if case.precision not in self.alive:
            total += START
            self.alive.add(case.precision)
        if work.kind == "backbone":
            return total + 3.0
        if work.kind == "roofs":
            tiles = len(attention_dual.TILES) if any(probes for _, probes in work.sizes) else 0
            return total + 0.6 * 4 * len(work.sizes) * len(work.precisions) / 4 + TILE * tiles
        if case.engine == "compile":
            return total + COMPILE + 5
        for key, cost in (("expected", EXPECTED[case.scorer.kind]), ("triton", TRITON if case.ops == "fused" else 0.0)):
            name = f"{key} {case.scorer.kind if key == 'expected' else case.scorer.kind == 'density'}"
            if (case.precision, name) not in self.known:
                self.known.add((case.precision, name))
                total += cost
        if (case.precision, case.name) not in self.known:  # else it is loaded already
            self.known.add((case.precision, case.name))
            total += TRITON if case.early else 0.0  # other kernels, though of the same source
            total += LOAD + (PRODUCTS if case.batch == 1 and case.products == "measured" else 0.3)
        call = self.call(work)
        timed = max(3 * call, work.seconds)
        return total + 6 * call + timed + max(3 * call, timed / 3)  # warm-up, capture, parity; wall; device


def rehearsed(tmp_path: Path, works: Sequence[Work] = PLAN, **machine: object) -> tuple[Machine, record.Record]:
    clock, output = Clock(), tmp_path / "results" / "check.json"
    simulated = Machine(clock, output, **machine)  # type: ignore[arg-type]
    begun = clock.now
    result = gpu_check.run(works, simulated, clock, BUDGET_S, output, lambda line: None)
    assert clock.now - begun <= BUDGET_S
    assert record.read(output).dump()["cases"] == json.loads(json.dumps(result.dump()["cases"]))
    return simulated, result


def finished(machine: Machine, works: Sequence[Work]) -> bool:
    return all(machine.ends.get(work.name, float("inf")) - 1000.0 <= HEADLINES_S for work in works)


def test_the_plan_measures_what_was_asked_for_in_this_order() -> None:
    parts = list(dict.fromkeys(work.part for work in PLAN))
    assert parts == [
        "smoke", "batch 1 latency", "batch 32", "GPU tests", "density", "reconstruction", "reference path",
        "density in fp8", "ladder", "sweep", "products of the other rows", "early launches",
        "the library's products",
        "ladder, torch.compile",
    ]  # fmt: skip
    assert len({work.name for work in PLAN}) == len(PLAN)
    cases = {work.case.name for work in HEADLINES}
    for precision in ("bf16", "fp8"):
        for kind in ("inversion-s3", "mismatch-s1"):
            for place in ("b1/single-stream", "b32/offline"):
                assert f"{kind}/cudagraph-fused/{precision}/{place}" in cases
    assert {
        "density-K10-s3/cudagraph-fused/bf16/b32/offline",
        "density-K1-s3/cudagraph-fused/bf16/b32/offline",
    } <= cases
    references = [work for work in PLAN if work.case.engine == REFERENCE]
    assert [work.case.batch for work in references] == [8], "once"
    assert {work.rung.number for work in PLAN if work.rung} == set(range(8))
    assert {work.case.batch for work in PLAN if work.case.precision == "fp8" and work.kind == "row"} == {1, 8, 16, 32}
    assert all(work.part == "GPU tests" or work.kind != "tests" for work in PLAN)


def test_every_headline_is_measured_in_time(tmp_path: Path) -> None:
    machine, result = rehearsed(tmp_path)
    assert finished(machine, HEADLINES)
    assert {part.name: part.status for part in result.parts or ()} == {
        part: "skipped" if part == "ladder, torch.compile" else "ok" for part in dict.fromkeys(w.part for w in PLAN)
    }, "all but torch.compile fits"
    assert "180 s needed" in next(part.reason for part in result.parts or () if part.status == "skipped")  # type: ignore[operator]
    slowest = max(machine.ends[work.name] for work in HEADLINES) - 1000
    print(f"headlines after {slowest:.0f} s, all after {machine.clock.now - 1000:.0f} s")


def test_every_headline_is_measured_in_time_where_everything_takes_twice_as_long(tmp_path: Path) -> None:
    machine, result = rehearsed(tmp_path, slow=2.0)
    assert finished(machine, HEADLINES)
    tests = next(part for part in result.parts or () if part.name == "GPU tests")
    assert tests.status == "timeout" and tests.output, "they are cut off, and what they said is kept"


@pytest.mark.parametrize(
    "name", [work.name for work in PLAN if work.headline or work.kind == "tests" or work.part == "reconstruction"]
)
def test_what_hangs_is_cut_off_and_later_headlines_are_measured(tmp_path: Path, name: str) -> None:
    """On a machine that is a quarter slower than modelled."""
    machine, result = rehearsed(tmp_path, hangs=name, slow=1.25)
    others = [work for work in HEADLINES if work.name != name]
    assert finished(machine, others)
    hung = next(work for work in PLAN if work.name == name)
    part = next(part for part in result.parts or () if part.name == hung.part)
    assert part.status in ("timeout", "skipped") and "timeout" in {row.status for row in result.cases} | {part.status}
    if hung.kind == "row" and part.status == "timeout" and hung.part != "smoke":
        row = next(row for row in result.cases if row.name == hung.case.name)
        assert row.measured is None or hung.part == "batch 1 latency", "those have the smoke's figures"


def test_torch_compile_runs_where_time_is_left(tmp_path: Path) -> None:
    machine, result = rehearsed(tmp_path, tests=20.0)
    left = BUDGET_S - (machine.ends["the library's products: " + PLAN[-2].case.name] - 1000)
    assert left > COMPILE_S and PLAN[-1].name in machine.ends
    assert all(part.status == "ok" for part in result.parts or ())
    assert {row.rung for row in result.cases} == {None, *range(8)}


def test_a_row_is_in_the_record_once_with_its_best_figures(tmp_path: Path) -> None:
    smoke, latency = (next(w for w in PLAN if w.part == part) for part in ("smoke", "batch 1 latency"))
    assert smoke.case == latency.case
    for second in ("ok", "timeout"):
        machine, result = rehearsed(tmp_path, [smoke, latency], hangs=None if second == "ok" else latency.name)
        (row,) = result.cases
        assert row.status == "ok" and row.measured is not None
        assert [part.status for part in result.parts or ()] == ["ok", second]


def test_rows_are_compared_with_the_reference_path_that_was_measured_once(tmp_path: Path) -> None:
    machine, result = rehearsed(tmp_path)
    row = next(row for row in result.cases if row.name == "inversion-s3/cudagraph-fused/bf16/b8/offline")
    assert row.note == f"{gpu_check.UNPAIRED}; the reference path's median is {200 / 22.9:.2f} times as long"
    assert row.ratio_to_reference is None and row.rung == 7
    assert all(row.note is None for row in result.cases if row.batch != 8)


def test_an_exception_or_an_interruption_costs_one_piece(tmp_path: Path) -> None:
    works, clock = PLAN[:4], Clock()
    begun: list[str] = []

    def broken(error: BaseException) -> Callable[[Work, float], Outcome]:
        def execute(work: Work, deadline: float) -> Outcome:
            begun.append(work.name)
            if work is works[1]:
                raise error
            return Outcome("ok")

        return execute

    kept: list[int] = []

    def keep(done: Sequence[gpu_runner.Done]) -> None:
        kept.append(len(done))

    done = gpu_runner.run(works, broken(ValueError("nan")), clock, 500, keep, print)
    assert [one.outcome.status for one in done] == ["ok", "failed", "ok", "ok"] and kept == [1, 2, 3, 4]
    assert done[1].outcome.reason == "ValueError: nan"
    begun.clear()
    done = gpu_runner.run(works, broken(KeyboardInterrupt()), clock, 500, keep, print)
    assert [one.outcome.reason for one in done] == [None, *["interrupted"] * 3] and len(begun) == 2


def test_only_some_parts_can_be_asked_for() -> None:
    assert {work.part for work in gpu_check.chosen(PLAN, ["LADDER", "sweep"])} == {
        "ladder", "sweep", "ladder, torch.compile",
    }  # fmt: skip
    assert gpu_check.chosen(PLAN, []) == PLAN
    with pytest.raises(ConfigError, match="--only 'laddr' is in no part's name; the parts are: smoke, batch 1"):
        gpu_check.chosen(PLAN, ["laddr"])


def test_a_place_that_cannot_be_written_is_found_out_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def execute(work: Work, deadline: float) -> Outcome:
        raise AssertionError("nothing may be measured")

    with pytest.raises(ConfigError, match="choose another folder"):
        gpu_check.run(PLAN, execute, Clock(), 500, tmp_path / "file" / "x.json", lambda line: None)


DRY = {work.part: work for work in reversed(plan(DRY_RUN))}


@pytest.mark.long
def test_a_row_under_way_keeps_what_it_has_measured_and_a_killed_process_costs_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_executor, "MOST_CALLS", 10**9)
    workers, work = Workers(tmp_path, pace=1000.0), DRY["batch 1 latency"]
    try:
        assert workers(work, time.monotonic()).status == "timeout", "no time at all"
        deadline = time.monotonic() + 12
        outcome = workers(work, deadline)
        assert time.monotonic() < deadline + 1
        (row,) = outcome.rows
        assert row.status == "ok", row.reason
        assert row.measured is not None and row.measured.latency_ms.n >= 3 and row.parity and row.parity.passed
        assert row.note and row.note.startswith("cut off at its deadline after ")
        workers.pace = 0.01
        process = workers._seats["bf16"].process
        assert process.alive
        process._process.kill()
        process._process.join()
        (row,) = workers(DRY["sweep"], time.monotonic() + 60).rows
        assert row.status == "ok" and row.measured is not None, "a new process has taken its place"
        (row,) = workers(DRY["reference path"], time.monotonic() + 60).rows
        assert row.engine == REFERENCE and row.measured is not None and row.measured.device_time_ms is None
    finally:
        workers.close()


TESTS_OF_A_GPU = """
import time, pytest
@pytest.mark.gpu
def test_quick(): pass
@pytest.mark.gpu
def test_wrong(): assert 1 == 2
@pytest.mark.gpu
def test_endless(): time.sleep(600)
"""


@pytest.mark.long
def test_what_the_tests_have_said_is_kept_when_they_are_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(TESTS_OF_A_GPU)
    (tmp_path / "tests" / "test_lacking.py").write_text("import nothing_of_that_name  # and mark.gpu")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = "-q --strict-markers"\nmarkers = ["gpu: x"]\n'
    )
    monkeypatch.setattr(gpu_executor, "ROOT", tmp_path)
    begun = time.monotonic()
    outcome = gpu_executor.tests(begun + 10, tmp_path)
    assert time.monotonic() - begun < 15
    assert (outcome.status, outcome.reason) == ("timeout", "cut off: 1 tests had passed, 1 failed"), outcome.output
    assert any("PASSED" in line and "test_quick" in line for line in outcome.output or ())
    collected = gpu_executor.tests(time.monotonic() + 30, tmp_path, collect=True)
    assert collected.status == "failed" and any("nothing_of_that_name" in line for line in collected.output or ())
    (tmp_path / "tests" / "test_lacking.py").unlink()
    collected = gpu_executor.tests(time.monotonic() + 30, tmp_path, collect=True)
    assert (collected.status, collected.reason) == ("ok", "3 tests can be imported")


def test_the_page_shows_the_plan() -> None:
    rows = []
    for part in dict.fromkeys(work.part for work in PLAN):
        works = [work for work in PLAN if work.part == part]
        seconds = sorted({round(work.needed) for work in works})
        shown = str(seconds[0]) if len(seconds) == 1 else f"{seconds[0]} to {seconds[-1]}"
        assert len({work.headline for work in works}) == 1
        rows.append(f"| {part} | {len(works)} | {shown} | {'yes' if works[0].headline else ''} |")
    page = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page
    assert f"within {HEADLINES_S:.0f} s" in page and f"up to {BUDGET_S:.0f} s" in page


def test_products_that_are_timed_on_a_gpu_are_well_formed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors, which check every operator's shapes, types and layouts and compute nothing."""
    calls: list[int] = []

    def clock(run: Callable[[], object], repeats: int = 0) -> float:
        run()
        calls.append(1)
        return 160.0

    gpu, spec = torch.device("cuda", 0), PRESETS["paper"].spec
    assert spec is not None
    monkeypatch.setattr(roofs, "graph_clock", clock)
    monkeypatch.setattr(roofs, "torch_device", lambda name: gpu)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = roofs.measure(shape_of(spec), [256, 8192], ["bf16", "fp8"], "cuda")
    assert len(found.gemm) == 4 and len(calls) == 1 + 4 * 4 + 4 * len(roofs.SCALES)
    assert [one.scales for one in found.scaled] == [*roofs.SCALES]
    assert all(one.rows == 8192 and one.ms and one.reason is None for one in found.scaled)
    assert not found.tangents
    few, many = (one for one in found.gemm if isinstance(one, Products) and one.precision == "fp8")
    assert few.ms["qkv"] == 0.16 / roofs.WEIGHTS and many.ms["qkv"] == 0.16 / roofs.FEW_WEIGHTS, "of one product each"


def test_tiles_of_tangents_are_timed_on_the_views_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors; one is refused as a GPU refuses what it has no room for."""
    asked: list[tuple[list[torch.Size], attention_dual.Tile]] = []

    def tangents(*given: torch.Tensor | attention_dual.Tile) -> None:
        *heads, tile = given
        asked.append(([t.shape for t in heads], tile))
        if tile is attention_dual.TILES[1]:
            raise OutOfResources(232_448, 231_000, "shared memory")

    def clock(run: Callable[[], object], repeats: int = 0) -> float:
        run()
        return 160.0

    spec = PRESETS["paper"].spec
    assert spec is not None
    monkeypatch.setattr(attention_dual, "tangents", tangents)
    monkeypatch.setattr(roofs, "graph_clock", clock)
    monkeypatch.setattr(roofs, "torch_device", lambda name: torch.device("cuda", 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = roofs.measure(shape_of(spec), [], [], "cuda", probes=(32, 10)).tangents
    one, each = torch.Size((32, 8, 256, 256)), torch.Size((10, 32, 8, 256, 256))
    assert asked == [([one] * 3 + [each] * 3, tile) for tile in attention_dual.TILES]
    assert [one.tile for one in found] == [tuple(tile) for tile in attention_dual.TILES]
    assert [one.ms for one in found] == [0.16, None, 0.16]
    assert "shared memory" in (found[1].reason or "") and not found[0].reason
    lines = report._tangents(Roofs(tangents=found))
    assert lines[0].endswith("64 queries by 16 columns, 8 warps (runs): 0.16 ms") and "not measured" in lines[1]
