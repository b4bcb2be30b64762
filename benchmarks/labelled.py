"""`flowad-bench drift` and `flowad-bench evaluations`: accuracy on labelled photos; nothing is timed."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowad_fast.benchmarks.options import (
    EVALUATIONS,
    STEPS,
    Chosen,
    Lists,
    console,
    numbers,
    probes_of,
    scorers_along,
    words,
)
from flowad_fast.cli import common
from flowad_fast.stages.scorers import SCORERS

if TYPE_CHECKING:
    from torch import Tensor


def drift(
    model: Annotated[str, typer.Argument(help="A checkpoint, or `demo`.")] = "demo",
    data: Annotated[Path | None, typer.Option(help="Root of the data set; not needed for layout `elpv`.")] = None,
    layout: Annotated[str, typer.Option(help="mvtec (also MPDD), visa, realiad, folder or elpv.")] = "elpv",
    lists: Lists = None,
    category: Annotated[list[str] | None, typer.Option(help="A category; repeat for more. Default: all.")] = None,
    scorer: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SCORERS),
    precision: Annotated[str, typer.Option(help="Comma-separated.")] = "bf16,fp16,fp8",
    ops: Annotated[str, typer.Option(help="reference or fused operators.")] = "reference",
    steps: Annotated[str, typer.Option(help=STEPS)] = "",
    evaluations: Annotated[str, typer.Option(help=EVALUATIONS)] = "",
    probes: Annotated[str, typer.Option(help="Density: probes. [default: 1]")] = "",
    config: Annotated[Path | None, typer.Option(help="Training YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    weights: Chosen = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch: Annotated[int, typer.Option(help="Photos per call.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """What a precision changes on labelled photos: maps, scores, and AUROC against fp32."""
    from flowad_fast.benchmarks.record import record, report
    from flowad_fast.benchmarks.runs import drift as drifting
    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.data.layouts import read_dataset
    from flowad_fast.engines.device import torch_device
    from flowad_fast.engines.precision import check_precision
    from flowad_fast.evaluation.evaluate import select_tests

    dataset, kinds, precisions = read_dataset(layout, data, lists), words(scorer), words(precision)
    probe_counts = probes_of(probes, kinds, (1,))
    for one in precisions:
        check_precision(one, torch_device(device))
    loaded = load_checkpoint(model, config, backbone_weights, weights)
    scorers = scorers_along(kinds, steps, evaluations, probe_counts, loaded.config)
    photos = sum(len(samples) for samples in select_tests(dataset, category).values())
    runs = len(scorers) * len({"fp32", *precisions})
    with common.progress("comparing", photos * runs, quiet=json) as advance:
        found = drifting.run(
            loaded, dataset, scorers, precisions, categories=category,  # type: ignore[arg-type]
            device=device, ops=ops, batch=batch, name=Path(model).name, progress=advance,
        )  # fmt: skip
    if output is not None:
        record.write(found, output)
    if json:
        common.print_json(found.dump())
    else:
        console().print(report.drift_table(found))


def evaluations(
    model: Annotated[str, typer.Argument(help="A checkpoint, or `demo`.")] = "demo",
    data: Annotated[Path | None, typer.Option(help="Root of the data set; not needed for layout `elpv`.")] = None,
    layout: Annotated[str, typer.Option(help="mvtec (also MPDD), visa, realiad, folder or elpv.")] = "elpv",
    lists: Lists = None,
    category: Annotated[str, typer.Option(help="The category; of layout elpv mono or poly.")] = "mono",
    scorer: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SCORERS),
    counts: Annotated[str, typer.Option("--evaluations", help="Function evaluations per frame.")] = "1,2,3",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the noise, or of density's probes.")] = 5,
    good: Annotated[int, typer.Option(min=2, help="Most training parts that location statistics are fitted on.")] = 250,
    config: Annotated[Path | None, typer.Option(help="Training YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    weights: Chosen = None,
    threads: common.Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Photos per call.")] = 8,
    cache: Annotated[Path | None, typer.Option(help="Keep features and maps here, to go on after an end.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table (Markdown) here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Image AUROC of one, two and three evaluations: scorers, location statistics, aggregates, with intervals."""
    from flowad_fast.benchmarks.record import evaluations as tables
    from flowad_fast.benchmarks.record import record
    from flowad_fast.benchmarks.runs import evaluations as evaluating
    from flowad_fast.checkpoints.load import load_checkpoint

    loaded = load_checkpoint(model, config, backbone_weights, weights)
    scorers = evaluating.scorers_of(words(scorer), numbers(counts, "--evaluations"), seeds, loaded)
    photos = evaluating.read(loaded, layout, data, lists, category, good)
    passes = 1 + sum(map(len, scorers))
    with common.progress("judging", passes * len(photos.every), quiet=json) as advance:
        found = evaluating.run(
            loaded,
            photos,
            scorers,
            locate=_located,
            kept=evaluating.Kept(cache),
            batch=batch,
            name=Path(model).name,
            progress=advance,
        )
    if output is not None:
        record.write(found, output)
    if markdown is not None:
        markdown.write_text(tables.markdown(found), encoding="utf-8")
    if json:
        common.print_json(found.dump())
    else:
        console().print(tables.table(found))


def _located(good: "Tensor") -> Callable[["Tensor"], "Tensor"]:
    """Location statistics of maps (n, h, w) of good parts, as a function of maps."""
    import torch

    from flowad_fast.stages.location import LocationStatistics

    fitted = LocationStatistics.fit(good.numpy())
    return lambda maps: torch.from_numpy(fitted.apply(maps.numpy()))
