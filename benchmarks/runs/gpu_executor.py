"""Carries out the plan of a GPU's first minutes: one process per precision, which keeps its model from row to row."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flowad_fast.benchmarks.measure.cases import PRESETS, REFERENCE, Case, empty_row, reference_of, shape_of
from flowad_fast.benchmarks.measure.gate import Expected, judged
from flowad_fast.benchmarks.measure.harness import products_of
from flowad_fast.benchmarks.measure.processes import Process
from flowad_fast.benchmarks.measure.roofs import rows_of
from flowad_fast.benchmarks.measure.turns import measured
from flowad_fast.benchmarks.measure.worker import Samples, Worker, WorkerError
from flowad_fast.benchmarks.record import report
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.record.record import Memory, Row
from flowad_fast.benchmarks.runs.gpu_plan import Work
from flowad_fast.benchmarks.runs.gpu_runner import Outcome
from flowad_fast.errors import EngineUnavailableError

ROOT = report.HERE.parent
LEAST_CALLS, MOST_CALLS = 3, 2000
ON_DEVICE_CALLS = 300
"""Calls at most whose time on the device is taken apart from the wall time: enough for a p99."""
MARGIN_S = 1.0
"""Seconds before a deadline by which calls must have ended: their results still have to come back."""
TAIL = 80
"""Lines of the tests' output that are kept."""


@dataclass
class _Seat:
    """A process with its kept model, and what it has loaded and computed."""

    process: Process
    case: Case | None = None
    row: Row | None = None
    expected: dict[str, Expected] = field(default_factory=dict)


class Workers:
    """See the module. `pace` scales the seconds of timed calls; with `collect` tests are collected and not run.

    As `gpu_runner.Executor`; deadlines are times of `time.monotonic`.
    """

    def __init__(self, scratch: Path, pace: float = 1.0, collect: bool = False) -> None:
        self.scratch, self.pace, self.collect = scratch, pace, collect
        self._seats: dict[str, _Seat] = {}

    def __call__(self, work: Work, deadline: float) -> Outcome:
        """See `gpu_runner.Executor`."""
        if work.kind == "tests":
            return tests(deadline, self.scratch, collect=self.collect)
        try:
            if work.kind == "row":
                return Outcome.of(self._row(work, deadline))
            seat = self._seat(work.case, deadline)
            if work.kind == "backbone":
                batches = tuple(batch for batch, _ in work.sizes)
                return Outcome("ok", backbone=seat.process.ask(Worker.backbone, work.case, batches, 0.2 * self.pace))
            return Outcome("ok", roofs=self._roofs(seat, work))
        except EngineUnavailableError as error:
            return Outcome.of(empty_row(work.case, "not available", str(error)))
        except WorkerError as error:
            if error.status == "failed":  # a GPU that met an illegal access answers nothing else in this process
                self._leave(work.case)
            rows = (empty_row(work.case, error.status, error.reason),) if work.kind == "row" else ()
            status = "ok" if error.status == "not available" else error.status
            return Outcome(status, error.reason, rows)

    def close(self) -> None:
        """End all processes."""
        for seat in self._seats.values():
            seat.process.close()
        self._seats.clear()

    def _leave(self, case: Case) -> None:
        seat = self._seats.pop(case.precision, None)
        if seat is not None:
            seat.process.close()

    def _seat(self, case: Case, deadline: float) -> _Seat:
        """The process of a precision with the model in it, started where there is none (any more)."""
        seat = self._seats.get(case.precision)
        if seat is None or not seat.process.alive:
            self._leave(case)
            process = Process(self.scratch / f"{uuid.uuid4().hex}.log", float("inf"), deadline)
            seat = self._seats[case.precision] = _Seat(process)
            process.ask(Worker.hold, case)
        seat.process.deadline = deadline
        return seat

    def _row(self, work: Work, deadline: float) -> Row:
        case = work.case
        seat = self._seat(case, deadline)
        checked = case.engine != REFERENCE
        expected = self._expected(seat, case) if checked else None
        if seat.case != case or seat.row is None:
            seat.case = None  # what fails half-way is not loaded
            seat.row, seat.case = seat.process.ask(Worker.load, case), case
        row = seat.row
        if expected is not None:
            output = self.scratch / f"{uuid.uuid4().hex}.npz"
            seat.process.ask(Worker.outputs, output)
            row = judged(row, output, expected)
            if row.status != "ok":
                return row  # something else was computed: how fast is of no interest
        memory = seat.process.ask(Worker.peak)
        blocks, memory, note = self._timed(seat.process, memory, work.seconds * self.pace, deadline)
        return row.but(measured=measured(case.batch, blocks, memory), note=note)

    def _expected(self, seat: _Seat, case: Case) -> Expected:
        """The float32 reference's maps, computed once per process and scorer from the model that it keeps."""
        reference = replace(reference_of(case), batch=1, mode="offline")
        if reference.name not in seat.expected:
            other = f"{case.precision}-{case.scorer.count}.npz"  # of density: one estimate serves all numbers of probes
            found = Expected(self.scratch / f"{uuid.uuid4().hex}.npz", self.scratch / other)
            seat.process.ask(Worker.expected, reference, found.maps, found.independent)
            seat.expected[reference.name] = found
        return seat.expected[reference.name]

    def _timed(
        self, process: Process, memory: Memory, seconds: float, deadline: float
    ) -> tuple[list[Samples], Memory, str | None]:
        """Calls for so long, and then the device's own time of some; what was measured before a cut is kept."""
        blocks: list[Samples] = []
        try:
            each = process.ask(Worker.run, 1, 0).ms[0] / 1e3
            size = max(1, int(0.3 / each))
            begun = time.monotonic()
            calls = 0
            while calls < LEAST_CALLS or (time.monotonic() - begun < seconds and calls < MOST_CALLS):
                if blocks and time.monotonic() + size * each + MARGIN_S > deadline:
                    return blocks, process.ask(Worker.peak), f"cut off at its deadline after {calls} calls"
                blocks.append(process.ask(Worker.run, size, 0))
                calls += size
            fitting = int((deadline - MARGIN_S - time.monotonic()) / each)
            count = min(ON_DEVICE_CALLS, max(LEAST_CALLS, int(seconds / 3 / each)), fitting)
            if count > 0:
                blocks.append(process.ask(Worker.run, 0, count))
            memory = process.ask(Worker.peak)
        except WorkerError as error:
            if not blocks:
                raise
            return blocks, memory, f"{error.status} after {sum(len(one.ms) for one in blocks)} calls: {error.reason}"
        return blocks, memory, None

    def _roofs(self, seat: _Seat, work: Work) -> Roofs:
        spec = PRESETS[work.case.preset].spec
        assert spec is not None, "a preset of the plan has a model of its own"
        shape = shape_of(spec)
        rows = sorted({rows_of(shape, batch, probes) for batch, probes in work.sizes})
        precisions = sorted({one for precision in work.precisions for one in products_of(precision)})
        most = max(((batch, probes) for batch, probes in work.sizes if probes), default=None)
        return seat.process.ask(Worker.roofs, shape, rows, precisions, work.case.device, 0.2 * self.pace, most)


def tests(deadline: float, scratch: Path, marker: str = "gpu", collect: bool = False) -> Outcome:
    """The tests that need a GPU, in several processes where pytest-xdist is there; what they said until a cut is kept.

    With `collect` they are imported and listed: whether this machine has what they need.
    """
    if not (ROOT / "tests").is_dir():
        return Outcome("failed", f"{ROOT}: no tests beside the package; run from a checkout")
    if importlib.util.find_spec("pytest") is None:
        return Outcome("not available", "pytest is not installed")
    # Other files may import what a bare GPU machine lacks.
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if f"mark.{marker}" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", marker, "--no-header", "-p", "no:cacheprovider", "--tb=short"]
    command += ["--continue-on-collection-errors"]  # a file that cannot be imported must not cost the others
    if collect:
        command += ["--collect-only", "-q"]
    else:
        parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []
        command += ["-vv", "--durations=15", *parallel]  # pytest's configuration has a -q, which takes one off
    path = scratch / "tests.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*command, *files], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # its own processes too, and whatever they have compiled with
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return _said(path.read_text(errors="replace").strip().splitlines(), code, collect)


def _said(lines: Sequence[str], code: int | None, collect: bool) -> Outcome:
    """The outcome of pytest's output: all failures, and its last lines."""
    failed = [line for line in lines[:-TAIL] if "FAILED" in line or "ERROR" in line]
    output = (*failed, *lines[-TAIL:])
    if code is None:
        passed, bad = (sum(word in line for line in lines) for word in (" PASSED ", " FAILED "))
        return Outcome("timeout", f"cut off: {passed} tests had passed, {bad} failed", output=output)
    found = [line.rpartition(": ")[2] for line in lines]
    if collect and code == 0:
        return Outcome("ok", f"{sum(map(int, filter(str.isdigit, found)))} tests can be imported", output=output)
    # pytest's 5 is "no test was selected": on a checkout without GPU tests that is not a success either.
    return Outcome("ok" if code == 0 else "failed", lines[-1] if lines else "no output", output=output)
