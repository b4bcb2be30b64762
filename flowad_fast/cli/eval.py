"""`flowad-eval`: metrics of a bundle or a checkpoint on a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowad_fast.bundle import MANIFEST
from flowad_fast.cli import common
from flowad_fast.cli.scorer_options import scorer_from, with_scorer_options
from flowad_fast.config import Weights
from flowad_fast.data.layouts import LAYOUTS
from flowad_fast.errors import ConfigError, require
from flowad_fast.stages.scorers import SCORERS

if TYPE_CHECKING:
    from flowad_fast.detector import Detector
    from flowad_fast.evaluation.evaluate import Report


def evaluate(
    model: Annotated[str, typer.Argument(help="Bundle folder, checkpoint file, or `demo`.")],
    data: Annotated[Path | None, typer.Option(help="Root of the data set; not needed for layout `elpv`.")] = None,
    layout: Annotated[str, typer.Option(help=f"{', '.join(LAYOUTS)}; MPDD has that of mvtec.")] = "mvtec",
    category: Annotated[list[str] | None, typer.Option(help="A category; repeat for more. Default: all.")] = None,
    scorer: Annotated[str | None, typer.Option(help=f"Checkpoint only: {', '.join(SCORERS)} [inversion].")] = None,
    config: Annotated[Path | None, typer.Option(help="Checkpoint only: its training configuration.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="Checkpoint only: weight file of the backbone.")] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="Checkpoint only: its trained or its averaged weights [model].")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.png and mistakes/; made if needed.")
    ] = None,
    test_set_normalisation: Annotated[
        bool,
        typer.Option(
            "--test-set-normalisation",
            help="Image score of the paper's code, with ranges from the test set itself; to reproduce its numbers.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    **scoring: Any,
) -> None:
    """Evaluate MODEL on the test images of a data set: AUROC, AP, F1max, and with masks also the pixel metrics.

    Examples: `flowad-eval bundles/mvtec --data mvtec`, `flowad-eval demo --layout elpv`,
    `flowad-eval model.pth --config config.yaml --scorer density --data visa --layout visa --category candle`.
    """
    require("tools", "sklearn", "scipy", "matplotlib", by="flowad-eval")
    from flowad_fast.data.layouts import read_dataset
    from flowad_fast.evaluation import evaluate as evaluation

    dataset = read_dataset(layout, data)
    total = sum(len(samples) for samples in evaluation.select_tests(dataset, category).values())
    detector = _load(model, scorer, scoring, config, backbone_weights, weights)
    with common.progress("evaluating", total, quiet=json) as advance:
        report = evaluation.evaluate(
            detector,
            dataset,
            categories=category,
            batch_size=batch,
            mask_size=detector.image_size,
            progress=advance,
            test_set_normalisation=test_set_normalisation,
        )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.json").write_text(report.to_json(), encoding="utf-8")
        evaluation.plot_report(report, output / "report.png")
        evaluation.save_mistakes(report, detector, output / "mistakes")
        common.err.print(f"written: {output}", highlight=False)
    if json:
        common.print_json(report.to_dict())
    else:
        _print_table(report)
    for row in report.errors:
        common.err.print(f"left out: {row.error}", style="yellow", markup=False, highlight=False)


def _load(
    model: str,
    scorer: str | None,
    scoring: dict[str, Any],
    config: Path | None,
    backbone_weights: Path | None,
    weights: Weights | None,
) -> "Detector":
    from flowad_fast.detector import Detector, load

    if (Path(model) / MANIFEST).is_file():
        files = {"config": config, "backbone-weights": backbone_weights, "weights": weights}
        fixed = {"scorer": scorer, **scoring, **files}
        given = [f"--{name}" for name, value in fixed.items() if value is not None]
        if given:
            raise ConfigError(f"{model} has its scorer fixed, got {', '.join(given)}; leave out, or give a checkpoint")
        return load(model)
    chosen = scorer_from(scorer or "inversion", scoring)
    require("model", "torch", "torchvision", "timm", "safetensors", by="flowad-eval of a checkpoint")
    return Detector.from_checkpoint(model, chosen, config=config, backbone_weights=backbone_weights, weights=weights)


def _print_table(report: "Report") -> None:
    from rich.table import Table

    from flowad_fast.evaluation.metrics import METRICS

    title = f"{report.dataset}: {report.detector}, image score {report.image_score}, values in %"
    columns = ("I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO", "mAD")
    table = Table("category", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in (*report.metrics.items(), ("mean", report.mean)):
        if name == "mean":
            table.add_section()
        cells = (values[key] for key in (*METRICS, "mean_ad"))
        table.add_row(name, *("–" if value is None else f"{100 * value:.1f}" for value in cells))
    common.out.print(table)


main = common.command(with_scorer_options(evaluate, prefix="Checkpoint only: "))
