"""Runs cases in fresh processes, candidate and reference in turn, and holds every row to the parity gate."""

import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from flowad_fast.benchmarks.measure import roofs
from flowad_fast.benchmarks.measure.cases import REFERENCE, Case, empty_row, is_bundle, reference_of
from flowad_fast.benchmarks.measure.engines import needs_artefact
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.measure.gate import Expected, judged
from flowad_fast.benchmarks.measure.processes import Process, started
from flowad_fast.benchmarks.measure.turns import Effort, Turn, measured, paired, take_turns
from flowad_fast.benchmarks.measure.worker import Worker, WorkerError
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.record.record import Ratio, Record, Row
from flowad_fast.config import Precision
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.files import digest

Tell = Callable[[str], None]
Keep = Callable[[Record], object]


def run(
    cases: Sequence[Case],
    effort: Effort,
    tell: Tell,
    deadline: float = float("inf"),
    keep: Keep = lambda record: None,
) -> Record:
    """Measure all cases: the record that is written as JSON; see `benchmarks/README.md` for its fields.

    Args:
        cases: one row each; rows of the reference path are added.
        effort: how long to measure.
        tell: receives one line of progress at a time.
        deadline: seconds after which no further row is begun, and no answer waited for; a row under way keeps the calls
            that it has, rows that were not begun are skipped. Ctrl-C is such a deadline, and skips the rows under way.
        keep: receives the record so far, without roofs, after every row.
    """
    before = moment()
    begun = time.monotonic()
    end = begun + deadline
    rows: list[Row] = []
    position = {case.name: i for i, case in enumerate(cases)}

    def record(found: Roofs) -> Record:
        ordered = sorted(rows, key=lambda r: position.get(r.name, -1 if r.engine == REFERENCE else len(cases)))
        return Record(
            preset=", ".join(dict.fromkeys(case.preset for case in cases)),
            environment=environment(before, seconds=round(time.monotonic() - begun, 1)),
            cases=tuple(roofs.attached(row, found) for row in ordered),
            roofs=found,
        )

    def keep_rows(done: int, found: Sequence[Row]) -> None:
        rows[done:] = found
        keep(record(Roofs(reason="not measured yet")))

    interrupted = False
    with tempfile.TemporaryDirectory(prefix="flowad-bench-") as scratch:
        folder = Path(scratch)
        ordered = sorted(cases, key=lambda c: repr(reference_of(c)))
        for reference, group in groupby(ordered, key=reference_of):
            members = list(group)
            if interrupted or time.monotonic() > end:
                reason = "interrupted" if interrupted else "no time was left"
                rows += [empty_row(case, "skipped", reason) for case in members]
                continue
            done = len(rows)
            try:
                keep_rows(done, _group(reference, members, folder, effort, tell, end, partial(keep_rows, done)))
            except KeyboardInterrupt:  # what was finished is kept, and the record says that it is not whole
                kept = {row.name for row in rows[done:]}
                missing = [empty_row(case, "skipped", "interrupted") for case in members if case.name not in kept]
                keep_rows(len(rows), missing)
                interrupted = True
        tell("roofs")
        return record(
            Roofs(reason="interrupted") if interrupted else _roofs(rows, cases[0].device, folder, effort, end)
        )


def _group(
    reference: Case, cases: Sequence[Case], folder: Path, effort: Effort, tell: Tell, end: float,
    keep: Callable[[Sequence[Row]], None],
) -> list[Row]:  # fmt: skip
    """All engines on the same work: each takes turns with one process that runs the reference path.

    An engine that does not fit into memory beside the reference path runs once more when that has ended. `keep`
    receives the rows so far after each.
    """
    rows: list[Row] = []
    taken: list[Turn] = []
    crowded: list[Case] = []
    tell(f"{reference.name}: parity")
    expected = Expected(folder / "expected.npz", folder / f"{digest([reference.preset, reference.scorer.count])}.npz")
    try:
        with started(folder, effort.timeout, end) as judge:
            judge.ask(Worker.expected, reference, expected.maps, expected.independent)
    except WorkerError as error:
        expected = replace(expected, error=error)

    def candidate(case: Case, ref: Process | None, note: str = "") -> tuple[Row, list[Turn]]:
        if time.monotonic() > end:
            return empty_row(case, "skipped", "no time was left"), []
        output = folder / f"{uuid.uuid4().hex}.npz"
        row, turns = _candidate(case, ref, output, folder, effort, end)
        tell(f"{case.name}{note}: {_said(row)}")
        return (row if row.measured is None else judged(row, output, expected)), turns

    with started(folder, effort.timeout, end) as process:
        tell(f"{reference.name}: loading")
        ref_row = empty_row(reference)
        ref: Process | None = process
        try:
            ref_row = process.ask(Worker.load, reference)
        except WorkerError as error:
            ref_row, ref = ref_row.without_speed(error.status, error.reason), None
            process.close()  # what a process holds that failed would be missing for the others
        for case in cases:
            if case.engine == REFERENCE:
                continue
            tell(case.name)
            row, turns = candidate(case, ref)
            if row.status == "out of memory" and ref is not None:
                crowded.append(case)
                continue
            taken += turns
            rows.append(row)
            keep(rows)
        if ref is not None:
            try:
                theirs = [turn.theirs for turn in taken if turn.theirs]
                theirs = theirs or [turn.ours for turn in take_turns(ref, None, effort, reference.mode, end)]
                ref_row = ref_row.but(
                    measured=measured(reference.batch, theirs, ref.ask(Worker.peak)),
                    ratio_to_reference=Ratio(speed=1, low=1, high=1, pairs=0, memory=1),
                )
            except WorkerError as error:
                ref_row = ref_row.without_speed(error.status, error.reason)
    rows += [candidate(case, None, ", without the reference path in memory")[0] for case in crowded]
    return [ref_row] + [row if row.measured is None else beside(row, ref_row) for row in rows]


NO_ROOM = "not in turn with the reference path, since both do not fit in memory"


def beside(row: Row, reference: Row, untaken: str = NO_ROOM) -> Row:
    """A measured row with what the reference path's row says about it; `untaken` says why they took no turns."""
    ours, theirs = row.measured, reference.measured
    assert ours is not None, f"{row.name} was measured"
    if theirs is None:
        return row.but(note=f"no ratio: the reference path is {reference.status} ({reference.reason})")
    if row.ratio_to_reference is None:
        times = theirs.latency_ms.p50 / ours.latency_ms.p50
        return row.but(note=f"{untaken}; the reference path's median is {times:.2f} times as long")
    mine, its = ours.memory_mb.footprint, theirs.memory_mb.footprint
    memory = None if mine is None or its is None else round(its / max(mine, 1.0), 3)
    return row.but(ratio_to_reference=row.ratio_to_reference.but(memory=memory))


def _said(row: Row) -> str:
    """A row in a few words, before its parity is known."""
    if row.measured is None:
        return f"{row.status}: {row.reason}"
    ratio = row.ratio_to_reference
    beside = f", {ratio.speed:.2f} times the reference path" if ratio else ""
    return f"p50 {row.measured.latency_ms.p50:.1f} ms{beside}"


def _candidate(
    case: Case, ref: Process | None, output: Path, folder: Path, effort: Effort, end: float
) -> tuple[Row, list[Turn]]:
    """A row without its parity, and the turns that it took with the reference."""
    row, artefact, export_s = empty_row(case), None, None
    try:
        if needs_artefact(case.engine):
            if is_bundle(case.preset):
                artefact = case.preset
            else:
                with started(folder, effort.timeout, end) as exporter:
                    artefact, export_s = exporter.ask(Worker.export, case, Path(tempfile.mkdtemp(dir=folder)))
        with started(folder, effort.timeout, end) as process:
            row = process.ask(Worker.load, case, artefact).but(export_s=export_s)
            process.ask(Worker.outputs, output)  # first: a row that is cut short has been checked
            memory = process.ask(Worker.peak)
            turns = take_turns(process, ref, effort, case.mode, end)
            if process.alive:  # at the deadline it may not be
                memory = process.ask(Worker.peak)
    except EngineUnavailableError as error:
        return row.without_speed("not available", str(error)), []
    except WorkerError as error:
        return row.without_speed(error.status, error.reason), []
    row = row.but(measured=measured(case.batch, [turn.ours for turn in turns], memory))
    return (row, []) if ref is None else (row.but(ratio_to_reference=paired(turns)), turns)


def products_of(precision: Precision) -> tuple[Precision, ...]:
    """Precisions of a row's matrix products: beside fp8 some layers stay in bf16."""
    return ("fp8", "bf16") if precision == "fp8" else (precision,)


def _roofs(rows: Sequence[Row], device: str, folder: Path, effort: Effort, end: float) -> Roofs:
    """Roofs for the matrix products of the measured rows."""
    like: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        if row.measured is not None and row.shape is not None:
            like.setdefault(tuple(asdict(row.shape).values()), []).append(row)
    found: Roofs | None = None
    for group in like.values():
        shape = group[0].shape
        assert shape is not None
        sizes = sorted({roofs.rows_of(shape, row.batch, row.probes) for row in group})
        precisions = sorted({"fp32", *(p for row in group for p in products_of(row.precision))})
        try:
            with started(folder, effort.timeout, end) as process:
                one = process.ask(Worker.roofs, shape, sizes, precisions, device, effort.roof_seconds)
        except WorkerError as error:
            return Roofs(reason=error.reason)
        # Of several models in one run, each has its products; the copy bandwidth is the machine's.
        found = one if found is None else found.but(gemm=found.gemm + one.gemm)
    return found or Roofs(reason="no row was measured")
