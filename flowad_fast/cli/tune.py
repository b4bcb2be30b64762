"""`flowad-tune`: which scorer and aggregate a product needs, by evidence."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flowad_fast.cli import common
from flowad_fast.errors import ConfigError, require
from flowad_fast.files import digest, make_folder, sha256
from flowad_fast.shipped import weight_file

if TYPE_CHECKING:
    from flowad_fast.tuning.measure import Result, Starter, Watch

MODEL = ("torch", "torchvision", "timm", "safetensors")


def tune(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint file, `demo` or `cells`.")],
    data: Annotated[
        str,
        typer.Option(
            help="Folder of good parts (conditional models: one per class), or `demo`, `cells`; no test parts."
        ),
    ],
    labelled: Annotated[
        str | None,
        typer.Option(help="Folder with good/ beside folders of defects (or one such per class), or `demo`, `cells`."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to keep it in. [default: tuning/NAME]")] = None,
    engine: Annotated[Literal["eager", "onnxruntime"], typer.Option(help="What is timed.")] = "eager",
    grid: Annotated[Literal["quick", "full"], typer.Option(help="How many recipes are compared.")] = "quick",
    most_evaluations: Annotated[
        int | None, typer.Option(min=1, help="Choose among recipes with at most so many; all are measured.")
    ] = None,
    parts: Annotated[int, typer.Option(min=4, help="Held-out good parts of each class, at most.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the synthetic defects and the bootstrap.")] = 0,
    config: Annotated[Path | None, typer.Option(help="YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    threads: common.Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; no progress bars.")] = False,
    starters: Any = None,
) -> None:
    """Compare recipes (scorer, steps, tau, draws, probes, aggregate) by time per frame and separation, and choose one.

    Without labelled parts it separates held-out good parts from the same parts with synthetic defects. The result is
    `recipe.json`, which `flowad-export make --recipe` takes, and `tune.html`. The same command goes on after Ctrl-C.

    Example: `flowad-tune demo --data demo --labelled demo`.
    """
    require("model", *MODEL, by="flowad-tune")
    require("tools", "matplotlib", "jinja2", by="flowad-tune")
    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.tuning.measure import Settings
    from flowad_fast.tuning.measure import tune as measured
    from flowad_fast.tuning.page import sentence, write_page
    from flowad_fast.tuning.parts import good_parts, labelled_parts
    from flowad_fast.tuning.recipe import write_recipe

    folder = output or Path("tuning") / Path(checkpoint).stem
    make_folder(folder)
    file = weight_file(checkpoint)
    model = load_checkpoint(checkpoint, config, backbone_weights)
    if model.spec.tiling is not None:
        raise ConfigError(
            f"{checkpoint} was trained on tiles, and flowad-tune judges whole frames; compare recipes by flowad-eval, "
            "and export it with --scorer and --aggregate"
        )
    names = model.spec.classes.labels if model.config.use_class_labels else ()
    good = good_parts(data, names)
    test = None if labelled is None else labelled_parts(labelled, names)
    beside = [one for one in (config, backbone_weights, file.with_suffix(".json")) if one is not None and one.is_file()]
    weights = sha256(file)
    identity = weights if not beside else digest([weights, *map(sha256, beside)])
    with _watch(quiet=json) as watch:
        starter = (starters or {"eager": start_eager})[engine]
        settings = Settings(grid=grid, limit=parts, seed=seed, engine=engine, most_evaluations=most_evaluations)
        result = measured(model, identity, good, test, folder, starter, settings, watch)
    result = _for_checkpoint(result, weights)
    write_recipe(result.recipe, folder / "recipe.json")
    write_recipe(result.recipe_without_labels, folder / "recipe-without-labels.json")
    write_page(result, Path(checkpoint).name, folder / "tune.html")
    if json:
        common.print_json({"folder": str(folder), **result.model_dump(mode="json")})
        return
    _print(result)
    common.say(sentence(result))
    common.say(f"recipe: {result.recipe.text}; {folder / 'recipe.json'}, page: {folder / 'tune.html'}")


def start_eager(model: Any, scorer: Any) -> Any:
    """The eager engine on the CPU."""
    from flowad_fast.engines.start import start_from_model
    from flowad_fast.pipeline import ScoringPipeline

    return start_from_model("eager", ScoringPipeline(model, scorer), "cpu")


def command(starters: "Mapping[str, Starter]") -> Callable[[], None]:
    """The console script, with what can start each engine."""
    import functools
    import inspect

    @functools.wraps(tune)
    def run(**options: Any) -> None:
        tune(**options, starters=starters)

    signature = inspect.signature(tune)
    kept = [one for name, one in signature.parameters.items() if name != "starters"]
    run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return common.command(run)


@contextmanager
def _watch(quiet: bool) -> "Iterator[Watch]":
    """Progress bars on standard error."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from flowad_fast.tuning.measure import Watch

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=common.err, disable=quiet) as bars:

        def stage(name: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(name, total=total)
            return lambda count: bars.update(task, advance=count)

        yield Watch(common.note, stage)


def _for_checkpoint(result: "Result", weights: str) -> "Result":
    """Recipes name the weight file itself, which an export compares."""
    changed = {
        name: getattr(result, name).model_copy(update={"checkpoint": weights})
        for name in ("recipe", "recipe_without_labels")
    }
    return result.model_copy(update=changed)


def _print(result: "Result") -> None:
    from rich.table import Table

    labels = result.agreement is not None
    table = Table(
        title=f"Pareto front ({result.recipe.evidence.engine}) of {len(result.rows)} recipes", title_justify="left"
    )
    for column in (
        "recipe",
        "evaluations",
        "ms per frame",
        "synthetic AUROC",
        *(("labelled AUROC",) if labels else ()),
    ):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for place in dict.fromkeys((*result.front, result.without_labels, result.chosen)):
        row = result.rows[place]
        found = [one for one in (row.synthetic, row.labelled) if one is not None]
        style = "bold" if place == result.chosen else None
        cells = (f"{one.auroc:.3f} ({one.low:.3f}-{one.high:.3f})" for one in found)
        table.add_row(common.plain(row.text), str(row.evaluations), f"{row.time.median:.1f}", *cells, style=style)
    common.out.print(table)
    if result.agreement is not None:
        one = result.agreement
        common.say(
            f"rank correlation of the two orders: {one.spearman:.2f} (95 % {one.low:.2f} to {one.high:.2f}); "
            f"the choice without labels ({result.recipe_without_labels.text}) lacks "
            + ", ".join(f"{100 * value:.1f} points ({name})" for name, value in one.lacks.items())
        )
