"""What fewer evaluations save: one and two of them in turn with our own three, and with the reference path's three.

Every pair of rows takes turns in two fresh processes, so that both meet the same noise; every row is held to the parity
gate against its own scorer's reference. Finished pairs are kept when a run is ended and asked for again.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from flowad_fast.benchmarks.measure import harness
from flowad_fast.benchmarks.measure.cases import Case, empty_row, is_bundle, reference_of
from flowad_fast.benchmarks.measure.engines import needs_artefact
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.measure.gate import Expected, judged
from flowad_fast.benchmarks.measure.processes import Process, started
from flowad_fast.benchmarks.measure.turns import Effort, measured, paired, take_turns
from flowad_fast.benchmarks.measure.worker import Worker, WorkerError
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.record.machine import Environment
from flowad_fast.benchmarks.record.record import FewerRecord, Header, Pair, Row
from flowad_fast.errors import ConfigError, EngineUnavailableError
from flowad_fast.stages.scorers import Inversion, Mismatch

ONE, TWO, THREE = Mismatch(), Inversion(steps=2), Inversion(steps=3)
OURS_GOAL, REFERENCE_GOAL = 2.6, 3.5
"""One evaluation against three on the same engine, and against the reference path's; at the preset `small`, batch 1."""


@dataclass(frozen=True)
class Match:
    """Two cases that take turns, what that shows, and the ratio that is asked for, if any."""

    fast: Case
    slow: Case
    what: str
    goal: float | None = None


def matches(like: Case, teacher: str | None = None) -> list[Match]:
    """What is measured, with the model, engine, precision and batch of `like`; of a student, beside its teacher."""
    if teacher is not None:
        student = replace(like, scorer=ONE, label="student")
        one = replace(student, preset=teacher, label="teacher")
        return [
            Match(student, one, "a student's one evaluation against its teacher's"),
            Match(student, replace(one, scorer=THREE), "a student's one evaluation against its teacher's three"),
        ]
    one, two, three = (replace(like, scorer=scorer) for scorer in (ONE, TWO, THREE))
    theirs = reference_of(three)
    small = (like.preset, like.batch) == ("small", 1)  # elsewhere other costs than the field's weigh otherwise
    return [
        Match(one, three, "one evaluation against our own three", OURS_GOAL if small else None),
        Match(one, theirs, "one evaluation against the reference path's three", REFERENCE_GOAL if small else None),
        Match(two, three, "two evaluations against our own three"),
        Match(two, theirs, "two evaluations against the reference path's three"),
    ]


def run(
    like: Case,
    effort: Effort,
    tell: harness.Tell,
    keep: harness.Keep = lambda record: None,
    earlier: FewerRecord | None = None,
    teacher: str | None = None,
) -> FewerRecord:
    """Measure every match that `earlier` has not; a record whose `pairs` are the matches and whose rows are theirs.

    Args:
        like: model, engine, precision, batch and device; its scorer is not used.
        effort: how long to measure each pair.
        tell: receives one line of progress at a time.
        keep: receives the record so far after every pair.
        earlier: a record of an interrupted run; see `resumable`.
        teacher: preset or checkpoint of the teacher, where `like` is its student.

    Raises:
        ConfigError: a bundle, which has one scorer of its own.
    """
    if is_bundle(like.preset):
        raise ConfigError(f"{like.preset}: a bundle has one scorer; give a preset or a checkpoint")
    before = moment()
    rows = {} if earlier is None else {row.name: row for row in earlier.cases}
    pairs = {} if earlier is None else {p.what: p for p in earlier.pairs if p.ratio is not None}
    wanted = matches(like, teacher)

    def record() -> FewerRecord:
        return FewerRecord(
            preset=like.preset, environment=environment(before), cases=tuple(rows.values()),
            pairs=tuple(pairs[m.what] for m in wanted if m.what in pairs), roofs=Roofs(reason="not measured here"),
        )  # fmt: skip

    for position, match in enumerate(wanted):
        if match.what in pairs:
            tell(f"{match.what}: kept from the run before")
            continue
        tell(match.what)
        try:
            pair, found = _measure(match, effort)
        except KeyboardInterrupt:
            for left in wanted[position:]:
                pairs.setdefault(left.what, _pair(left, "interrupted"))
            break
        for row in found:
            # A row of several pairs shows the first in which it has a speed; every pair has its own ratio.
            if row.name not in rows or rows[row.name].measured is None:
                rows[row.name] = row
        pairs[match.what] = pair
        keep(record())
    return record()


def resumable(earlier: Header, like: Case, teacher: str | None = None) -> str | None:
    """Why a record cannot be gone on with: another work, machine or version; None where it can."""
    if not isinstance(earlier, FewerRecord):
        return f"a record of kind {earlier.kind}"
    now = environment(moment())

    def kind(of: Environment) -> tuple[object, ...]:
        return of.commit, of.cpu, of.gpu, of.threads, of.packages

    if kind(earlier.environment) != kind(now):
        return "another commit, machine or version"
    names = {name for match in matches(like, teacher) for name in (match.fast.name, match.slow.name)}
    same = earlier.preset == like.preset and all(row.name in names for row in earlier.cases)
    return None if same else "other rows"


def _pair(match: Match, reason: str) -> Pair:
    return Pair(fast=match.fast.name, slow=match.slow.name, what=match.what, goal=match.goal, reason=reason)


def _measure(match: Match, effort: Effort) -> tuple[Pair, Sequence[Row]]:
    """The pair, and the rows of its two sides."""
    with tempfile.TemporaryDirectory(prefix="flowad-bench-") as scratch:
        folder = Path(scratch)
        cases = (match.fast, match.slow)
        outputs = [folder / f"{i}.npz" for i in range(2)]
        rows = [empty_row(case) for case in cases]
        side = 0
        try:
            with ExitStack() as stack:
                sides: list[Process] = []
                for side, case in enumerate(cases):
                    process, rows[side] = _started(case, folder, effort, stack)
                    sides.append(process)
                side = 0
                turns = take_turns(sides[0], sides[1], effort, match.fast.mode)
                theirs = [turn.theirs for turn in turns if turn.theirs]
                blocks = ([turn.ours for turn in turns], theirs)
                for side, process in enumerate(sides):
                    found = measured(cases[side].batch, blocks[side], process.ask(Worker.peak))
                    process.ask(Worker.outputs, outputs[side])
                    rows[side] = rows[side].but(measured=found)
        except EngineUnavailableError as error:
            rows[side] = rows[side].without_speed("not available", str(error))
        except WorkerError as error:
            rows[side] = rows[side].without_speed(error.status, error.reason)
        rows = [
            row if row.measured is None else _judged(case, row, output, folder, effort)
            for case, row, output in zip(cases, rows, outputs, strict=True)
        ]
    for row in rows:
        if row.status != "ok":
            return _pair(match, f"{row.name}: {row.status}: {row.reason}"), [r for r in rows if r.measured or r is row]
    ours, its = (row.measured for row in rows)
    assert ours is not None and its is not None, "both rows are ok"
    mine, slow = ours.memory_mb.whole, its.memory_mb.whole  # what is left free at the first call is chance
    memory = None if mine is None or slow is None else round(slow / max(mine, 1.0), 3)
    return _pair(match, "").but(ratio=paired(turns).but(memory=memory), reason=None), rows


def _started(case: Case, folder: Path, effort: Effort, stack: ExitStack) -> tuple[Process, Row]:
    """A process that has loaded the case, which ends with the stack."""
    artefact, export_s = None, None
    if needs_artefact(case.engine):
        with started(folder, effort.timeout) as exporter:
            artefact, export_s = exporter.ask(Worker.export, case, Path(tempfile.mkdtemp(dir=folder)))
    process = stack.enter_context(started(folder, effort.timeout))
    return process, process.ask(Worker.load, case, artefact).but(export_s=export_s)


def _judged(case: Case, row: Row, output: Path, folder: Path, effort: Effort) -> Row:
    """The row held to the parity gate against its scorer's reference."""
    expected = Expected(folder / f"{case.label}-{case.scorer.kind}-{case.scorer.count}.npz", folder / "none.npz")
    try:
        if not expected.maps.exists():
            with started(folder, effort.timeout) as judge:
                judge.ask(Worker.expected, reference_of(case), expected.maps, None)
    except WorkerError as error:
        expected = replace(expected, error=error)
    return judged(row, output, expected)
