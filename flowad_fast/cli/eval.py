"""`flowad-eval`: metrics of a bundle or a checkpoint on a data set."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowad_fast.bundle import MANIFEST, read
from flowad_fast.checkpoints.defaults import EvaluationDefaults, evaluation_defaults
from flowad_fast.cli import common
from flowad_fast.cli.authors import AUTHORS, BUILT_IN, choose
from flowad_fast.cli.scorer_options import with_scorer_options
from flowad_fast.config import ModelConfig, VelocityConfig, Weights
from flowad_fast.data.layouts import LAYOUTS
from flowad_fast.data.samples import Sample
from flowad_fast.errors import ConfigError, FrameError, require
from flowad_fast.evaluation.scanning import FrameFiles
from flowad_fast.files import make_folder, replacing
from flowad_fast.shipped import weight_file
from flowad_fast.stages.aggregates import AGGREGATES, Aggregate, check_located, terms
from flowad_fast.stages.scorers import SCORERS
from flowad_fast.tuning.recipe import RecipeDefaults, check_recipe, read_recipe

if TYPE_CHECKING:
    from rich.table import Table

    from flowad_fast.detector import Detector
    from flowad_fast.evaluation.evaluate import Report
    from flowad_fast.stages.location import LocationStatistics


def evaluate(
    model: Annotated[str, typer.Argument(help="Bundle folder, checkpoint file, `demo` or `cells`.")],
    data: Annotated[Path | None, typer.Option(help="Root of the data set; not needed for layout `elpv`.")] = None,
    layout: Annotated[str, typer.Option(help=f"{', '.join(LAYOUTS)}; MPDD has that of mvtec.")] = "mvtec",
    lists: Annotated[
        Path | None, typer.Option(help="Layout realiad: folder of the lists [DATA/realiad_jsons].")
    ] = None,
    category: Annotated[list[str] | None, typer.Option(help="A category; repeat for more. Default: all.")] = None,
    scorer: Annotated[str | None, typer.Option(help=f"Checkpoint only: {', '.join(SCORERS)} [inversion].")] = None,
    aggregate: Annotated[str | None, typer.Option(help=f"Checkpoint only: {', '.join(AGGREGATES)} [max].")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Checkpoint only: its configuration; logging.eval in it sets the defaults.")
    ] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="Checkpoint only: weight file of the backbone.")] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="Checkpoint only: its trained or its averaged weights [model].")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Checkpoint only: what flowad-tune chose for it, recipe.json; options win.")
    ] = None,
    location: Annotated[
        bool, typer.Option("--location", help="Checkpoint only: location statistics, of the good training parts.")
    ] = False,
    threads: common.Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 8,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.png and mistakes/; made if needed.")
    ] = None,
    test_set_normalisation: Annotated[
        bool,
        typer.Option(
            "--test-set-normalisation",
            help="Image score of the authors' code, with ranges from the test set itself; to reproduce its numbers: "
            "diff+sum over all categories together, for InvAD's models range+nll per category.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Score with Ray Data: ADDRESS of a cluster, or local. See docs/archive.md.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray: workers. [default: what has room]")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(min=0, help="With --ray: GPUs for each worker [0].")] = None,
    **scoring: Any,
) -> None:
    """Evaluate MODEL on the test images of a data set: AUROC, AP, F1max, and with masks also the pixel metrics.

    The exit code is not 0 where an image was left out.

    Examples: `flowad-eval bundles/mvtec --data mvtec`, `flowad-eval demo --layout elpv`,
    `flowad-eval model.pth --config config.yaml --scorer density --data visa --layout visa --category candle`.
    """
    require("tools", "sklearn", "scipy", "matplotlib", by="flowad-eval")
    from flowad_fast.data.layouts import read_dataset
    from flowad_fast.evaluation import evaluate as evaluation

    if ray is None and (workers is not None or gpus_per_worker is not None):
        raise ConfigError("--workers and --gpus-per-worker need --ray; --ray local uses the cores of this computer")
    if ray is not None and location:
        raise ConfigError("--location would be measured by each worker; with --ray evaluate a bundle that has it")
    dataset = read_dataset(layout, data, lists)
    total = sum(len(samples) for samples in evaluation.select_tests(dataset, category).values())
    if output is not None:
        _make_writable(output)
    asked = Asked(
        model, scorer, scoring, config, backbone_weights, weights, aggregate, test_set_normalisation, recipe, location,
        tuple(part for name in category or dataset.categories for part in dataset.select("train", name, label=0)),
    )  # fmt: skip
    score = None
    if ray is not None:
        from flowad_fast.archive.evaluating import contributions
        from flowad_fast.cli.archive import workers_of

        score = contributions(functools.partial(_detector, asked), workers_of(ray, workers, threads, gpus_per_worker))
    detector, scaled, remarks = _load(asked)
    for remark in remarks:
        common.note(remark)
    with common.progress("evaluating", total, quiet=json) as advance:
        report = evaluation.evaluate(
            detector,
            dataset,
            categories=category,
            batch_size=batch,
            mask_size=detector.image_size if detector.tiler is None else None,
            progress=advance,
            test_set_normalisation=scaled or False,
            remarks=remarks,
            score=score,
        )
    if json:
        common.print_json(report.to_dict())
    else:
        _print_table(report)
    if output is not None:
        _write(report, detector, output)
    _name_left_out(report)


@dataclass(frozen=True)
class Asked:
    """What the command line says of the model; `authors` asks for the evaluation of the authors' code.

    `training` are the good parts that location statistics would be of.
    """

    model: str
    scorer: str | None = None
    scoring: Mapping[str, Any] = field(default_factory=dict)
    config: Path | None = None
    backbone_weights: Path | None = None
    weights: Weights | None = None
    aggregate: str | None = None
    authors: bool = False
    recipe: Path | None = None
    location: bool = False
    training: tuple[Sample, ...] = ()


def _load(asked: Asked) -> "tuple[Detector, Aggregate | None, tuple[str, ...]]":
    """The detector, the aggregate whose terms the test set normalises (None: the detector's score), and remarks.

    Raises:
        ConfigError: an option that a bundle has fixed, or an aggregate that needs ranges and gets none.
    """
    from flowad_fast.detector import Detector, load

    if (Path(asked.model) / MANIFEST).is_file():
        fixed = {
            "scorer": asked.scorer, **asked.scoring, "aggregate": asked.aggregate, "config": asked.config,
            "backbone-weights": asked.backbone_weights, "weights": asked.weights, "recipe": asked.recipe,
            "location": asked.location or None,
        }  # fmt: skip
        given = [f"--{name}" for name, value in fixed.items() if value is not None]
        if given:
            raise ConfigError(
                f"{asked.model} has its scorer fixed, got {', '.join(given)}; leave out, or give a checkpoint"
            )
        detector = load(asked.model)
        if not asked.authors:
            return detector, None, ()
        theirs = _authors_aggregate(read(asked.model, verify=False)[1].model.velocity)
        if theirs == "range+nll" and detector.aggregate != theirs:
            raise ConfigError(
                f"{asked.model}: InvAD's evaluation needs the aggregate {theirs}, the bundle has {detector.aggregate}; "
                f"export it with --aggregate {theirs}, or give the checkpoint"
            )
        return detector, theirs, ()
    defaults: EvaluationDefaults | RecipeDefaults | None = evaluation_defaults(asked.model, asked.config)
    located = asked.location
    if asked.recipe is not None:
        recipe = read_recipe(asked.recipe)
        check_recipe(recipe, weight_file(asked.model), asked.recipe)
        defaults, located = RecipeDefaults(recipe, asked.recipe.name), located or recipe.location
    choice = choose(asked.scorer, asked.aggregate, asked.scoring, defaults, asked.authors)
    remarks: tuple[str, ...] = ()
    if terms(choice.aggregate) > 1 and not asked.authors:
        need = f"{choice.aggregate} needs ranges of good parts, which a checkpoint has not"
        if asked.aggregate:
            raise ConfigError(f"--aggregate {need}; evaluate a calibrated bundle, or add --test-set-normalisation")
        remarks = (f"{need}, so max it is; --test-set-normalisation takes them from the test set, as the authors do",)
        choice = choice.with_aggregate("max", BUILT_IN)
    require("model", "torch", "torchvision", "timm", "safetensors", by="flowad-eval of a checkpoint")
    from flowad_fast.checkpoints.load import load_checkpoint

    network = load_checkpoint(asked.model, asked.config, asked.backbone_weights, asked.weights)
    if asked.authors:
        choice = choice.with_aggregate(_authors_aggregate(network.config), AUTHORS)
        if asked.aggregate not in (None, choice.aggregate):
            raise ConfigError(
                f"the authors' evaluation of this model has the image score {choice.aggregate}, got --aggregate "
                f"{asked.aggregate}; leave one of the two out"
            )
    if located:
        check_located(choice.aggregate)
    detector = Detector.from_model(network, choice.scorer, aggregate=choice.aggregate)
    if located:
        statistics = _statistics(detector, network.spec, asked.training)
        table = statistics.table
        detector = Detector.from_model(network, choice.scorer, aggregate=choice.aggregate, location=table)
        remarks = (*remarks, f"location statistics of {sum(statistics.parts)} good training parts")
    shown = (str(choice),) if defaults or asked.authors else ()
    return detector, choice.aggregate if asked.authors else None, (*shown, *remarks)


def _detector(asked: Asked) -> "Detector":
    """As `_load`, in a worker of Ray, which has nothing to remark."""
    return _load(asked)[0]


def _statistics(detector: "Detector", spec: ModelConfig, training: Sequence[Sample]) -> "LocationStatistics":
    """Location statistics of the maps of good training parts.

    Raises:
        ConfigError: there are none.
    """
    from flowad_fast.evaluation.location import measure_location

    if not training:
        raise ConfigError("location statistics are of good training parts, and the data have none; leave them out")
    classes = [part.category for part in training] if detector.conditional else None
    paths = [part.path for part in training]
    with common.err.status(f"location statistics of {len(paths)} good training parts"):
        return measure_location(detector, FrameFiles(paths), classes, [str(path) for path in paths], spec)


def _authors_aggregate(config: VelocityConfig) -> "Aggregate":
    """The image score of the code that a model's kind comes from: InvAD's models predict epsilon."""
    return "range+nll" if config.pred_type == "epsilon" else "diff+sum"


def _make_writable(folder: Path) -> None:
    """Make the folder of the results, and refuse one that cannot be written, before any work."""
    make_folder(folder)
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error}); choose another folder") from None


def _write(report: "Report", detector: "Detector", output: Path) -> None:
    """Write the report's files.

    Raises:
        ConfigError: the folder cannot be written any more; what was computed is printed by then.
    """
    from flowad_fast.evaluation import evaluate as evaluation

    try:
        with replacing(output / "report.json") as file:
            file.write(report.to_json().encode())
        evaluation.plot_report(report, output / "report.png")
        evaluation.save_mistakes(report, detector, output / "mistakes")
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error}); choose another folder") from None
    common.note("written:", output)


def _name_left_out(report: "Report") -> None:
    """Name what the metrics do not cover, and end with an error where that is anything."""
    for row in report.errors:
        common.note("left out:", _with_path(row.path, row.error or ""))
    for row in report.unmarked:
        common.note("left out of the pixel metrics:", _with_path(row.path, row.unmarked or ""))
    parts = []
    if report.errors:
        parts.append(f"{len(report.errors)} of {len(report.images)} images are in no metric")
    if report.unmarked:
        covered = ", ".join(f"{count} of {name}" for name, count in report.pixel_images.items())
        parts.append(f"{len(report.unmarked)} have an empty mask: the pixel metrics cover the others ({covered})")
    if parts:
        raise FrameError(f"{'; '.join(parts)}; they are named above")


def _with_path(path: str, reason: str) -> str:
    return reason if path in reason else f"{path}: {reason}"


def _print_table(report: "Report") -> None:
    from rich.table import Table

    from flowad_fast.evaluation.metrics import METRICS

    title = f"{report.dataset}: {report.detector}, image score {report.image_score}, values in %"
    columns = ("I-AUROC", "I-AP", "I-F1max", "P-AUROC", "P-AP", "P-F1max", "AUPRO", "mAD")
    table = Table("category", title=common.plain(title))
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in (*report.metrics.items(), ("mean", report.mean)):
        if values is report.mean:
            table.add_section()
        cells = (values[key] for key in (*METRICS, "mean_ad"))
        table.add_row(common.plain(name), *("–" if value is None else f"{100 * value:.1f}" for value in cells))
    common.out.print(table)
    if report.regions:
        common.out.print(_region_table(report))
    for remark in report.remarks:
        common.say(f"note: {remark}")


def _region_table(report: "Report") -> "Table":
    from rich.table import Table

    table = Table("category", title="regions", title_justify="left")
    for column in ("defects", "touched", "good parts", "with a region", "false per good part", "false on defective"):
        table.add_column(column, justify="right")
    for name, one in report.regions.items():
        rate = "–" if one.false_per_good_part is None else f"{one.false_per_good_part:.3f}"
        defects = (str(one.defects), str(one.touched)) if one.defective_parts else ("–", "–")
        stray = str(one.false_on_defective) if one.defective_parts else "–"
        table.add_row(common.plain(name), *defects, str(one.good_parts), str(one.good_with_regions), rate, stray)
    return table


main = common.command(with_scorer_options(evaluate, prefix="Checkpoint only: "))
