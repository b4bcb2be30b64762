"""Everything that needs a GPU, in under nine minutes, most important first: one JSON in `results/`.

    python -m flowad_fast.benchmarks.gpu_check [--dry-run] [--output FILE] [--only PART]

What is done, in which order, and how long each piece may take is `gpu_plan`. A piece that does not fit into the time
left is listed as skipped; the file is rewritten after every piece, so that whatever ends the run keeps what was
measured. Exit codes: 0 all parts done and good, 1 a part failed or was skipped, 3 no usable GPU.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import torch
import typer

from flowad_fast.benchmarks.measure import roofs
from flowad_fast.benchmarks.measure.cases import REFERENCE
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.measure.harness import beside
from flowad_fast.benchmarks.record import report
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.record.machine import Moment
from flowad_fast.benchmarks.record.record import CheckPart, Record, Row, Status, write
from flowad_fast.benchmarks.runs import gpu_plan, gpu_runner
from flowad_fast.benchmarks.runs.gpu_executor import Workers
from flowad_fast.benchmarks.runs.gpu_runner import Done
from flowad_fast.cli import common
from flowad_fast.errors import ConfigError

BUDGET_S = gpu_plan.BUDGET_S
EXIT_NO_GPU = 3
DRY_PACE = 0.02
UNPAIRED = "not in turn with the reference path, in the same run"


def missing() -> str | None:
    """What this machine lacks for the check, None when it has a usable GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install torch's ordinary Linux wheel"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable NVIDIA GPU or driver; "
            "check that nvidia-smi lists one and that its driver supports this CUDA version"
        )
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        return f"{torch.cuda.get_device_name()} was found but does not compute: {str(error).splitlines()[0]}"
    return None


def record_of(done: Sequence[Done], preset: str, before: Moment, seconds: float) -> Record:
    """The record of what is done so far: a row once, as it was measured best, with the products of the same run."""
    rows: dict[str, Row] = {}
    for one in done:
        rung = one.work.rung
        for row in one.outcome.rows:
            found = row if rung is None else row.but(rung=rung.number, rung_name=rung.name)
            known = rows.get(row.name)
            if known is None or found.measured is not None or known.measured is None:
                rows[row.name] = found
    measured = [one.outcome.roofs for one in done if one.outcome.roofs is not None]
    limits = Roofs(reason="not measured")
    if measured:
        limits = measured[-1].but(
            gemm=tuple(gemm for one in measured for gemm in one.gemm),
            scaled=tuple(scaled for one in measured for scaled in one.scaled),
            tangents=tuple(tile for one in measured for tile in one.tangents),
        )
    return Record(
        kind="gpu-check",
        preset=preset,
        environment=environment(before, seconds=round(seconds, 1)),
        cases=tuple(roofs.attached(row, limits) for row in _compared(list(rows.values()))),
        roofs=limits,
        parts=tuple(_part(name, list(group)) for name, group in groupby(done, key=lambda one: one.work.part)),
    )


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Rows beside the reference path's row of the same scorer and batch, which was measured once."""
    references = {(row.scorer, row.options, row.batch): row for row in rows if row.engine == REFERENCE}
    found = []
    for row in rows:
        reference = references.get((row.scorer, row.options, row.batch))
        if reference is None or row is reference or row.measured is None or row.mode != reference.mode or row.note:
            found.append(row)
        else:
            found.append(beside(row, reference, UNPAIRED))
    return found


def _part(name: str, done: Sequence[Done]) -> CheckPart:
    bad = [one for one in done if one.outcome.status != "ok"]
    broken = [one.outcome.status for one in bad if one.outcome.status != "skipped"]
    status: Status = broken[0] if broken else "skipped" if bad else "ok"
    said = [f"{one.work.name.removeprefix(f'{name}: ')}: {one.outcome.reason}" for one in bad]
    said = said or [one.outcome.reason for one in done if one.outcome.reason]
    return CheckPart(
        name=name,
        seconds=round(sum(one.seconds for one in done), 1),
        status=status,
        reason="; ".join(said) or None,
        output=next((one.outcome.output for one in done if one.outcome.output), None),
        backbone=next((one.outcome.backbone for one in done if one.outcome.backbone), None),
    )


def run(
    works: Sequence[gpu_plan.Work], execute: gpu_runner.Executor, clock: Callable[[], float], budget: float,
    output: Path, tell: Callable[[str], None],
) -> Record:  # fmt: skip
    """Carry a plan out; `output` is rewritten after each piece.

    Raises:
        ConfigError: the file cannot be written; found out before anything is measured.
    """
    before, begun, preset = moment(), clock(), works[0].case.preset

    def keep(done: Sequence[Done]) -> None:
        write(record_of(done, preset, before, clock() - begun), output)

    keep([])
    done = gpu_runner.run(works, execute, clock, budget, keep, tell)
    return record_of(done, preset, before, clock() - begun)


def chosen(works: Sequence[gpu_plan.Work], only: Sequence[str]) -> list[gpu_plan.Work]:
    """The pieces whose part has one of these texts in its name; all where none is given.

    Raises:
        ConfigError: a text that is in no part's name.
    """
    parts = dict.fromkeys(work.part for work in works)
    for text in only:
        if not any(text.lower() in part.lower() for part in parts):
            raise ConfigError(f"--only {text!r} is in no part's name; the parts are: {', '.join(parts)}")
    return [work for work in works if not only or any(text.lower() in work.part.lower() for text in only)]


def check(
    output: Annotated[
        Path | None, typer.Option(help="The record: a file, or a folder for it. [default: results/gpu-check-GPU.json]")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = BUDGET_S,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same plan on the CPU with a tiny model.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only parts with this in their name; repeatable.")] = None,
) -> None:
    """Test and measure on this machine's GPU; partial results are always kept."""
    if not dry_run and (lacking := missing()) is not None:
        common.err.print(f"[bold red]no usable GPU:[/] {lacking}", highlight=False)
        raise typer.Exit(EXIT_NO_GPU)
    name = "dry-run" if dry_run else torch.cuda.get_device_name().replace(" ", "-")
    target = output or report.RESULTS
    if target.suffix != ".json":
        target = target / f"gpu-check-{name}.json"
    works = chosen(gpu_plan.plan(gpu_plan.DRY_RUN if dry_run else gpu_plan.GPU), only or ())
    with common.status("gpu-check") as tell, tempfile.TemporaryDirectory(prefix="flowad-gpu-") as scratch:
        workers = Workers(Path(scratch), DRY_PACE if dry_run else 1.0, collect=dry_run)
        try:
            result = run(works, workers, time.monotonic, budget, target, tell)
        finally:
            workers.close()
    done = result.parts or ()
    for part in done:
        common.say(f"{part.name}: {part.status} ({part.seconds} s) {part.reason or ''}")
    common.say(f"written: {target}")
    if any(part.status != "ok" for part in done):
        raise typer.Exit(common.EXIT_ERROR)


main = common.command(check)

if __name__ == "__main__":
    main()
