"""The fault campaign: each fault on a real line under load, then all that came in is held against all that came out."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flowad_fast.benchmarks.record.line import CampaignSetting, FaultRow
from flowad_fast.benchmarks.runs.line_faults import FAULTS, SERVED, Fault
from flowad_fast.benchmarks.runs.line_rig import DEADLINE, DRAIN, TERM, Rig, account, until
from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.errors import ConfigError, EngineUnavailableError, LineStoppedError, nearest

RATE = 8.0
"""Parts a second, where a fault has no other: about a third of what one core judges with the demo model."""
BEFORE, AFTER = 6, 1.5
"""Outcomes before the fault, and seconds of parts after the line is back."""


def choose(names: Sequence[str]) -> tuple[Fault, ...]:
    """Faults by name, all where none is named; ConfigError for one that is not known."""
    known = {fault.name: fault for fault in FAULTS}
    for name in names:
        if name not in known:
            raise ConfigError(f"--faults {name}: {nearest(name, known)}")
    return tuple(known[name] for name in names) or FAULTS


def run(
    work: Work,
    folder: Path,
    faults: Sequence[Fault],
    seed: int,
    tell: Callable[[str], None],
    keep: Callable[[tuple[FaultRow, ...]], None],
) -> tuple[FaultRow, ...]:
    """One row per fault; `keep` gets those that are finished after each."""
    rows: list[FaultRow] = []
    for number, fault in enumerate(faults):
        tell(f"{fault.title} ({number + 1} of {len(faults)})")
        rows.append(one(work, folder / fault.name, fault, seed + number))
        keep(tuple(rows))
    return tuple(rows)


def setting(work: Work, seed: int) -> CampaignSetting:
    """What every fault met."""
    return CampaignSetting(
        seed=seed, rate=RATE, deadline_s=DEADLINE, pictures=len(work.frames), anomalous=sum(work.anomalous),
        bundle=work.name,
    )  # fmt: skip


def one(work: Work, folder: Path, fault: Fault, seed: int) -> FaultRow:
    """Start a line, let the fault happen, see it come back, end it, and hold it to account."""
    start = time.monotonic()
    folder.mkdir(parents=True)

    def row(status: str, problems: Sequence[str], **more: object) -> FaultRow:
        fields: dict[str, object] = {"parts": 0, "outcomes": 0, "results": {}, "good": 0, "recovery_s": None} | more
        return FaultRow(
            name=fault.name, fault=fault.title, how=fault.how, limit_s=fault.limit, status=status, problems=problems,
            seconds=round(time.monotonic() - start, 1), **fields,
        )  # type: ignore[arg-type]  # fmt: skip

    try:
        with fault.stage(folder) as stage:  # type: ignore[attr-defined]
            rate = fault.rate or RATE
            with Rig(work, folder / "line", rate=rate, seed=seed, sinks=stage.sinks, module=fault.module) as rig:
                problems, recovery = _happen(rig, fault, stage)
                found = account(rig, frozenset({rig.bundle}))
                problems += found.problems
                problems += [
                    f"no part was {name!r}, so the fault did not show" for name in fault.expected
                    if not found.results.get(name)
                ]  # fmt: skip
                for name, parts in stage.served.items():
                    lacking = {str(one["part"]) for one in rig.rows()} - parts()
                    if lacking:
                        problems.append(f"{name} lacks {len(lacking)} outcomes, the first is {min(lacking)}")
    except EngineUnavailableError as error:
        return row("not run", [str(error)])
    except (LineStoppedError, OSError) as error:
        return row("failed", [f"{type(error).__name__}: {error}"])
    if not problems:
        shutil.rmtree(folder)  # of one that failed everything stays to be looked at
    return row(
        "failed" if problems else "ok",
        problems,
        parts=found.parts,
        outcomes=found.outcomes,
        results=found.results,
        good=found.good,
        recovery_s=None if recovery is None else round(recovery, 2),
        notes=found.notes,
    )


def _happen(rig: Rig, fault: Fault, stage: object) -> tuple[list[str], float | None]:
    rig.start()
    rig.feed.start()
    if not until(lambda: len(rig.rows()) >= BEFORE, 30, rig.alive):
        raise LineStoppedError(f"no outcomes before the fault: {rig.words()}")
    moment = time.monotonic()
    problems = fault.act(rig, stage)  # type: ignore[arg-type]
    if fault.name not in ("kill-9", "sigterm", "hanging", "killed", "raising"):
        moment = time.monotonic()
    recovery = rig.back(moment, fault.limit)
    if recovery is None:
        problems.append(f"the line was not back within {fault.limit:g} s: {rig.words()}")
    time.sleep(AFTER)
    rig.feed.stop()
    rig.told(DEADLINE + 10)
    _serve(rig, stage)
    if not rig.alive():
        return [*problems, f"the line has ended: {rig.words()}"], recovery
    code = rig.signal(TERM)
    if code:
        problems.append(f"it ended with exit code {code}: {rig.words()}")
    return problems, recovery


def _serve(rig: Rig, stage: object) -> None:
    """Wait until every sink that the fault is about has everything."""
    for parts in stage.served.values():  # type: ignore[attr-defined]
        until(lambda parts=parts: {str(row["part"]) for row in rig.rows()} <= parts(), SERVED, rig.alive)  # type: ignore
