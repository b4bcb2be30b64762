"""`flowad-bench`: speed and memory beside the reference path, each row behind a parity gate."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowad_fast.benchmarks import labelled, line_command, serve_command
from flowad_fast.benchmarks.options import (
    EVALUATIONS,
    KINDS,
    STEPS,
    Chosen,
    check_weights,
    console,
    numbers,
    probes_of,
    scorers_along,
    words,
)
from flowad_fast.cli import common
from flowad_fast.errors import ConfigError

if TYPE_CHECKING:
    from flowad_fast.benchmarks.record.record import Record

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    preset: Annotated[str, typer.Option(help="demo, small, paper, invad; a checkpoint; or bundles.")] = "demo",
    scorer: Annotated[str, typer.Option(help=f"{KINDS}. [default: the preset's]")] = "",
    engine: Annotated[str, typer.Option(help="reference, eager, onnxruntime, … [default: the preset's]")] = "",
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16, fp16, fp8.")] = "fp32",
    ops: Annotated[str, typer.Option(help="reference or fused operators.")] = "reference",
    batch: Annotated[str, typer.Option(help="Frames per call.")] = "1",
    steps: Annotated[str, typer.Option(help=STEPS)] = "",
    evaluations: Annotated[str, typer.Option(help=EVALUATIONS)] = "",
    probes: Annotated[str, typer.Option(help="Density: probes. [default: the preset's]")] = "",
    mode: Annotated[str, typer.Option(help="offline, single-stream.")] = "offline",
    frame_size: Annotated[int | None, typer.Option(help="Height and width of frames. [default: the model's]")] = None,
    config: Annotated[Path | None, typer.Option(help="Training YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    weights: Chosen = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time per row, in seconds.")] = 15.0,
    quick: Annotated[bool, typer.Option("--quick", help="Few repeats, one engine: a first impression.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table (Markdown) here.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write figures (PNG) into this folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Measure scorers on engines, in turn with the reference path, one fresh process per row.

    Every option that names an axis takes a comma-separated list. A row whose map disagrees with the fp32 reference on
    the same frames has no speed.
    """
    if context.invoked_subcommand is not None:
        return
    from dataclasses import replace

    from flowad_fast.benchmarks.measure import harness
    from flowad_fast.benchmarks.measure.cases import axes_of, expand, is_bundle
    from flowad_fast.benchmarks.measure.turns import QUICK, Effort

    cases = []
    for one in words(preset):
        axes = axes_of(one, quick)
        kinds = words(scorer) or axes.scorers
        check_weights(weights, one)
        if not is_bundle(one):
            scorers = scorers_along(kinds, steps, evaluations, probes_of(probes, kinds, axes.probes), axes.velocity)
            scorers += [] if scorer or steps or evaluations else axes.also
        elif scorer or steps or evaluations or probes:
            raise ConfigError(f"{one}: a bundle has a scorer of its own; leave out what would change it")
        else:
            scorers = []
        cases += expand(
            one,
            scorers,
            engines=words(engine) or axes.engines,
            precisions=words(precision),
            batches=numbers(batch, "--batch"),
            modes=words(mode),
            ops=ops,
            device=device,
            frame_size=frame_size,
            parity_frames=axes.parity_frames,
            config=None if config is None else str(config),
            backbone_weights=None if backbone_weights is None else str(backbone_weights),
            weights=weights,
        )
    effort = QUICK if quick else replace(Effort(), seconds=seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: finished rows are kept
    with common.status("measuring") as tell:
        record = harness.run(cases, effort, tell, keep=_keep(output))
    _show(record, output, markdown, figures, json)
    if any(row.reason == "interrupted" for row in record.cases):
        raise typer.Exit(common.EXIT_INTERRUPTED)


@app.command()
def ladder(
    preset: Annotated[str, typer.Option(help="demo, small, paper, invad; or a checkpoint.")] = "small",
    scorer: Annotated[str, typer.Option(help=f"One of {KINDS}.")] = "inversion",
    batch: Annotated[int, typer.Option(help="Frames per call.")] = 1,
    steps: Annotated[str, typer.Option(help=STEPS)] = "",
    evaluations: Annotated[str, typer.Option(help=EVALUATIONS)] = "",
    probes: Annotated[str, typer.Option(help="Density: probes. [default: 10]")] = "",
    config: Annotated[Path | None, typer.Option(help="Training YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    weights: Chosen = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time per row, in seconds.")] = 15.0,
    quick: Annotated[bool, typer.Option("--quick", help="Few repeats.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Write figures (PNG) into this folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """One optimisation per row, each on top of those before: speed, memory and drift."""
    from dataclasses import replace

    from flowad_fast.benchmarks.measure.cases import Case, axes_of
    from flowad_fast.benchmarks.measure.turns import QUICK, Effort
    from flowad_fast.benchmarks.runs import ladder as rungs

    axes = axes_of(preset)
    scorers = scorers_along([scorer], steps, evaluations, probes_of(probes, [scorer], (10,)), axes.velocity)
    if len(scorers) != 1:
        raise ConfigError("a ladder is of one scorer; give one number for --steps, --evaluations or --probes")
    check_weights(weights, preset)
    like = Case(
        preset, scorers[0], "eager", batch=batch, device=device, parity_frames=axes.parity_frames, weights=weights,
        config=None if config is None else str(config),
        backbone_weights=None if backbone_weights is None else str(backbone_weights),
    )  # fmt: skip
    effort = QUICK if quick else replace(Effort(), seconds=seconds)
    with common.status("measuring") as tell:
        record = rungs.run(like, effort, tell, keep=_keep(output))
    _show(record, output, None, figures, json)


app.command()(labelled.drift)
app.command()(labelled.evaluations)
app.command()(line_command.line)
app.command()(serve_command.serve)


@app.command()
def fewer(
    preset: Annotated[str, typer.Option(help="demo, small, paper; or a checkpoint.")] = "small",
    teacher: Annotated[
        str | None, typer.Option(help="The teacher, where --preset is its student: both in turn.")
    ] = None,
    engine: Annotated[str, typer.Option(help="eager, onnxruntime, cudagraph, …")] = "eager",
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16, fp16, fp8.")] = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Frames per call.")] = 1,
    config: Annotated[Path | None, typer.Option(help="Training YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    weights: Chosen = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time per pair of rows, in seconds; twice that where noisy.")] = 60.0,
    output: Annotated[
        Path | None, typer.Option(help="Write the record (JSON) here; pairs that it already has are kept.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables (Markdown) here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """One and two evaluations in turn with three, ours and the reference path's: speed and memory."""
    from dataclasses import replace

    from flowad_fast.benchmarks.measure.cases import axes_of, expand
    from flowad_fast.benchmarks.measure.turns import Effort
    from flowad_fast.benchmarks.record import record as records
    from flowad_fast.benchmarks.runs import fewer as fewer_run

    axes = axes_of(preset)
    check_weights(weights, preset)
    (like,) = expand(
        preset, [fewer_run.ONE], engines=[engine], precisions=[precision], batches=[batch], device=device,
        parity_frames=axes.parity_frames, weights=weights, config=None if config is None else str(config),
        backbone_weights=None if backbone_weights is None else str(backbone_weights),
    )  # fmt: skip
    earlier = None
    if output is not None and output.is_file():
        found = records.read(output)
        other = fewer_run.resumable(found, like, teacher)
        if other is not None:
            raise ConfigError(f"{output}: {other}, which this run cannot go on with; move it, or name another --output")
        assert isinstance(found, records.FewerRecord), "only such a record can be gone on with"
        earlier = found
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: finished pairs are kept
    with common.status("measuring") as tell:
        effort = replace(Effort(), seconds=seconds)
        record = fewer_run.run(like, effort, tell, _keep(output), earlier, teacher)  # type: ignore[arg-type]
    _show(record, output, markdown, None, json)
    if any(pair.reason == "interrupted" for pair in record.pairs):
        raise typer.Exit(common.EXIT_INTERRUPTED)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def kernels(context: typer.Context) -> None:
    """Time the operators, reference beside fused, with pytest-benchmark; whatever follows goes to pytest."""
    from importlib.util import find_spec

    lacking = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if lacking:
        raise ConfigError(f'needs {" and ".join(lacking)}, not installed: pip install "flowad-fast[dev]"')
    import pytest

    suite = Path(__file__).resolve().parent / "bench_kernels.py"
    raise typer.Exit(int(pytest.main([str(suite), *context.args])))


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A record.")],
    new: Annotated[Path, typer.Argument(help="A later record.")],
    json: Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")] = False,
) -> None:
    """Say for each row of two records whether it became faster or slower, or whether noise hides any difference."""
    from dataclasses import asdict

    from flowad_fast.benchmarks.record import compare as comparing
    from flowad_fast.benchmarks.record import record, report

    changes = comparing.compare(record.read(old), record.read(new))
    if not changes:
        raise ConfigError(f"{old} and {new} have no row in common")
    if json:
        common.print_json([asdict(change) for change in changes])
    else:
        console().print(report.comparison(changes))


@app.command("report")
def make_report(
    folder: Annotated[Path | None, typer.Argument(help="Folder of records. [default: benchmarks/results]")] = None,
    figures: Annotated[bool, typer.Option(help="Draw the records' figures as well.")] = True,
) -> None:
    """Write benchmarks/README.md and docs/scaling.md from the committed records."""
    from flowad_fast.benchmarks.record import record, report, scaling

    folder = folder or report.RESULTS
    if figures:
        from flowad_fast.benchmarks.record import figures as drawing
        from flowad_fast.benchmarks.record import pareto
        from flowad_fast.benchmarks.record.peers import PeersRecord

        for path in sorted(folder.glob("*.json")):
            one = record.read(path)
            if isinstance(one, PeersRecord):
                pareto.draw(one, folder / "figures" / path.stem)
            elif isinstance(one, record.Record) and one.kind != "peers":
                drawing.draw(one, folder / "figures" / path.stem)
    report.README.write_text(report.readme(folder), encoding="utf-8")
    scaling.PAGE.parent.mkdir(exist_ok=True)
    scaling.PAGE.write_text(scaling.page(folder), encoding="utf-8")
    common.out.print(f"wrote {report.README} and {scaling.PAGE}", highlight=False)


def _keep(output: Path | None) -> "Callable[[Record], None]":
    """Writes what has been measured so far, so that whatever ends the run loses only the rows under way."""
    from flowad_fast.benchmarks.record import record as records

    return lambda found: None if output is None else records.write(found, output)


def _show(record: "Record", output: Path | None, markdown: Path | None, figures: Path | None, json: bool) -> None:
    from flowad_fast.benchmarks.record import record as records
    from flowad_fast.benchmarks.record import report

    if output is not None:
        records.write(record, output)
    if markdown is not None:
        markdown.write_text(report.markdown(record), encoding="utf-8")
    if figures is not None:
        from flowad_fast.benchmarks.record import figures as drawing

        drawing.draw(record, figures)
    if json:
        common.print_json(record.dump())
        return
    for table in report.tables(record):
        console().print(table)
    for line in report.remarks(record):
        common.out.print(line, markup=False, highlight=False)


def main() -> None:
    """Console-script entry point."""
    common.run(app)


if __name__ == "__main__":
    main()
