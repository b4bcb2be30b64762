"""`flowad-bench line`, as a command."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from flowad_fast.benchmarks.options import console, words
from flowad_fast.cli import common
from flowad_fast.errors import ConfigError, nearest

PARTS = ("rate", "added", "endurance", "campaign")


def line(
    part: Annotated[str, typer.Option(help=f"Of {', '.join(PARTS)}, separated by commas.")] = ",".join(PARTS),
    bundle: Annotated[
        Path | None, typer.Option(help="Exported bundle of one product. [default: the demo model, exported now]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of pictures, and of the order in which faults meet them.")] = 0,
    faults: Annotated[str, typer.Option(help="Names of faults, separated by commas. [default: all]")] = "",
    minutes: Annotated[float, typer.Option(min=0.1, help="Of endurance.")] = 60.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each rate, at least a thousand parts.")] = 30.0,
    turns: Annotated[int, typer.Option(min=1, help="Added: parts in turn with bare calls.")] = 1000,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the detector.")] = 1,
    deadline: Annotated[float, typer.Option(min=0.001, help="Rate, added, endurance: seconds that a part has.")] = 0.5,
    batch: Annotated[int, typer.Option(min=1, help="Parts in one call, at most.")] = 4,
    note: Annotated[str, typer.Option(help="For the record: what else the computer did.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="Write the record (JSON) here, as it grows; samples of endurance beside it.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables (Markdown) here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """A production line: its rate, what it adds to a call, an hour under load, and a campaign of faults.

    A fault passes when every part has one outcome, none is "good" but those that the bare detector calls so in time,
    and the line is back by itself within its limit. Exit codes: 0 all passed, 1 a fault or the endurance did not.
    """
    from flowad_fast.benchmarks.record import line as tables
    from flowad_fast.benchmarks.record import record as records
    from flowad_fast.benchmarks.runs import line as runs
    from flowad_fast.benchmarks.runs.line_campaign import choose
    from flowad_fast.line.heap import steady_heap

    steady_heap()  # lines that run in this process then have the memory of `flowad-line run`
    parts = words(part)
    for name in parts:
        if name not in PARTS:
            raise ConfigError(f"--part {name}: {nearest(name, PARTS)}")
    plan = runs.Plan(
        parts=parts, bundle=bundle, seed=seed, threads=threads, deadline=deadline, batch=batch, seconds=seconds,
        turns=turns, minutes=minutes, faults=choose(words(faults)), note=note,
    )  # fmt: skip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what is finished is kept
    samples = None if output is None else output.with_suffix(".samples.jsonl")

    def keep(found: tables.LineRecord) -> None:
        if output is not None:
            records.write(found, output)

    with common.status("measuring") as tell:
        record = runs.run(plan, samples, tell, keep)  # type: ignore[arg-type]
    if markdown is not None:
        markdown.write_text(tables.markdown(record), encoding="utf-8")
    if json:
        common.print_json(record.dump())
    else:
        for table in tables.tables(record):
            console().print(table)
    if not runs.passed(record):
        raise typer.Exit(common.EXIT_ERROR)
