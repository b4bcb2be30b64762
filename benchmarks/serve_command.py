"""`flowad-bench serve`, as a command."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from flowad_fast.benchmarks.options import console
from flowad_fast.cli import common


def serve(
    bundle: Annotated[
        Path | None, typer.Option(help="Exported bundle of one product. [default: the demo model, exported now]")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests of one frame on their way at any time.")] = 16,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each detector.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Frames in one call, at most.")] = 4,
    deadline: Annotated[float, typer.Option(min=0.01, help="Seconds that a request has.")] = 30.0,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of each turn.")] = 15.0,
    turns: Annotated[int, typer.Option(min=1, help="Of each way of judging.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the pictures.")] = 0,
    note: Annotated[str, typer.Option(help="For the record: what else the computer did.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here, as it grows.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table (Markdown) here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Frames a second of one and of two replicas on a Ray cluster, in turn with the bare detector on this computer.

    Every verdict is compared with the bare detector's. Exit codes: 0 all agree, 1 some do not.
    """
    from flowad_fast.benchmarks.record import record as records
    from flowad_fast.benchmarks.record import serve as tables
    from flowad_fast.benchmarks.runs import serve as runs

    plan = runs.Plan(bundle, seed, threads, batch, concurrency, deadline, seconds, turns, note)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: what is finished is kept

    def keep(found: tables.ServeRecord) -> None:
        if output is not None:
            records.write(found, output)

    with common.status("measuring") as tell:
        record = runs.run(plan, tell, keep)  # type: ignore[arg-type]
    keep(record)
    if markdown is not None:
        markdown.write_text(tables.markdown(record), encoding="utf-8")
    if json:
        common.print_json(record.dump())
    else:
        console().print(tables.table(record))
    if not record.passed:
        raise typer.Exit(common.EXIT_ERROR)
