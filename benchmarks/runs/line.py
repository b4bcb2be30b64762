"""`flowad-bench line`: a production line's rate, added time, endurance and faults, each a part of one record."""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.line import EnduranceResult, FaultRow, LineRecord, Setting
from flowad_fast.benchmarks.record.machine import Moment
from flowad_fast.benchmarks.runs import line_campaign, line_endurance, line_load
from flowad_fast.benchmarks.runs.line_faults import Fault
from flowad_fast.benchmarks.runs.line_work import Work, prepare


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        parts: of rate, added, endurance and campaign.
        bundle: exported; None: the demo model.
        seed: of pictures and faults.
        threads: of the detector.
        deadline: seconds a part has, in rate, added and endurance.
        batch: parts in one call, at most.
        seconds: of each trial of the rate.
        turns: parts that take turns in `added`.
        minutes: of endurance.
        faults: of the campaign.
        note: for the record, e.g. what else the computer did.
    """

    parts: Sequence[str]
    bundle: Path | None
    seed: int
    threads: int
    deadline: float
    batch: int
    seconds: float
    turns: int
    minutes: float
    faults: tuple[Fault, ...]
    note: str


def run(
    plan: Plan, samples: Path | None, tell: Callable[[str], None], keep: Callable[[LineRecord], None]
) -> LineRecord:
    """Run the parts in turn; `keep` gets the record after each, after each fault, and once a minute of endurance.

    `samples` is where endurance writes what it sees as it sees it; None: where everything temporary is.
    What the line of a fault that failed has written stays in a temporary folder, which is told.
    """
    before = moment()
    folder = Path(tempfile.mkdtemp(prefix="flowad-line-"))
    done = False
    try:
        record = _measured(plan, folder, before, samples, tell, keep)
        done = passed(record)
    except BaseException:
        done = True  # nothing failed that somebody would look at
        raise
    finally:
        if done:
            shutil.rmtree(folder)
    if not done:
        tell(f"what failed has left its files in {folder}")
    return record


def _measured(
    plan: Plan,
    folder: Path,
    before: Moment,
    samples: Path | None,
    tell: Callable[[str], None],
    keep: Callable[[LineRecord], None],
) -> LineRecord:
    work = prepare(folder, plan.bundle, plan.seed, tell)
    record = LineRecord(preset=work.name, environment=environment(before), note=plan.note)

    def add(**more: object) -> None:
        nonlocal record
        record = record.but(environment=environment(before), **more)
        keep(record)

    def faults(rows: tuple[FaultRow, ...]) -> None:
        add(cases=rows, campaign=line_campaign.setting(work, plan.seed))

    def endurance(found: EnduranceResult) -> None:
        add(endurance=found)

    setting = _setting(work, plan)
    if "rate" in plan.parts:
        add(rate=line_load.sustained(work, setting, plan.seconds, folder / "rate", tell))
    if "added" in plan.parts:
        add(added=line_load.added(work, setting, plan.turns, folder / "added", tell))
    if "campaign" in plan.parts:
        line_campaign.run(work, folder / "faults", plan.faults, plan.seed, tell, faults)
    if "endurance" in plan.parts:
        at = samples or folder / "samples.jsonl"
        every = min(5.0, plan.minutes)  # a short one needs samples too
        endurance(line_endurance.run(work, folder / "endurance", setting, plan.minutes, at, tell, endurance, every))
    return record


def passed(record: LineRecord) -> bool:
    """Whether no fault and no endurance failed; goals of speed are for people to judge."""
    return all(row.passed for row in record.cases) and (record.endurance is None or record.endurance.passed)


def _setting(work: Work, plan: Plan) -> Setting:
    return Setting(
        bundle=work.name, frame_size=work.frame_size, threads=plan.threads, deadline_s=plan.deadline,
        largest_batch=plan.batch,
    )  # fmt: skip
