"""The fault campaign: each fault on a real line under load, then all that came in is held against all that came out."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from flowad_fast.benchmarks.record.line import CampaignSetting, FaultRow
from flowad_fast.benchmarks.runs.line_account import Account, account
from flowad_fast.benchmarks.runs.line_faults import FAULTS, SERVED, Fault
from flowad_fast.benchmarks.runs.line_rig import DEADLINE, TERM, Rig, until
from flowad_fast.benchmarks.runs.line_stages import RATE, Stage
from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.errors import ConfigError, EngineUnavailableError, LineStoppedError, nearest

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
    found, recovery, note = Account(), None, ""
    status: Literal["ok", "failed", "not run"] = "ok"
    try:
        with (
            fault.stage(folder, work) as stage,
            Rig(
                work,
                folder / "line",
                rate=RATE,
                seed=seed,
                sinks=stage.sinks,
                module=fault.module,
                feed=stage.camera,
            ) as rig,
        ):
            note = stage.note
            problems, recovery = _happen(rig, fault, stage)
            found = account(rig, frozenset({rig.bundle}))
            problems += [*found.problems, *_unseen(fault, found), *_unserved(rig, stage)]
    except EngineUnavailableError as error:
        status, problems = "not run", [str(error)]
    except (LineStoppedError, OSError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    if problems and status == "ok":
        status = "failed"
    if status == "ok":
        shutil.rmtree(folder)  # of one that failed everything stays to be looked at
    return FaultRow(
        name=fault.name,
        fault=fault.title,
        how=fault.how,
        parts=found.parts,
        outcomes=found.outcomes,
        results=found.results,
        good=found.good,
        recovery_s=None if recovery is None else round(recovery, 2),
        limit_s=fault.limit,
        status=status,
        problems=tuple(problems),
        notes=(*((note,) if note else ()), *found.notes),
        seconds=round(time.monotonic() - start, 1),
    )


def _happen(rig: Rig, fault: Fault, stage: Stage) -> tuple[list[str], float | None]:
    """What is wrong, and how long it took until the line was back; the line has ended, in a good way or not."""
    rig.start()
    rig.feed.start()
    if not until(lambda: len(rig.rows()) >= BEFORE, 30, rig.alive):
        raise LineStoppedError(f"no outcomes before the fault: {rig.words()}")
    moment = time.monotonic()
    problems = fault.act(rig, stage)
    if not fault.sudden:
        moment = rig.ended or time.monotonic()
    recovery = rig.back(moment, fault.limit)
    if recovery is None:
        problems.append(f"the line was not back within {fault.limit:g} s: {rig.words()}")
    time.sleep(AFTER)
    rig.feed.stop()
    rig.told(DEADLINE + 10)
    for parts in stage.served.values():
        until(lambda parts=parts: _parts(rig) <= parts(), SERVED, rig.alive)  # type: ignore[misc]
    if not rig.alive():
        return [*problems, f"the line has ended: {rig.words()}"], recovery
    if code := rig.signal(TERM):
        problems.append(f"it ended with exit code {code}: {rig.words()}")
    return problems, recovery


def _unseen(fault: Fault, found: Account) -> list[str]:
    return [
        f"no part was {name!r}, so the fault did not show" for name in fault.expected if not found.results.get(name)
    ]


def _unserved(rig: Rig, stage: Stage) -> list[str]:
    lacking = {name: _parts(rig) - parts() for name, parts in stage.served.items()}
    return [f"{name} lacks {len(one)} outcomes, the first is {min(one)}" for name, one in lacking.items() if one]


def _parts(rig: Rig) -> set[str]:
    return {str(row["part"]) for row in rig.rows()}
