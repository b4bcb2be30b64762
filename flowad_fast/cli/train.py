"""`flowad-train`: train a detector's velocity field from good parts."""

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from flowad_fast.cli import common
from flowad_fast.cli.scorer_options import EVALUATIONS, option_names, scorer_from, with_scorer_options
from flowad_fast.errors import require
from flowad_fast.stages.scorers import SCORERS, scorer_adapter
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.recipes import PRESETS, Layer, from_file, settings

if TYPE_CHECKING:
    from flowad_fast.training.batches import Progress as Report

_SCORER = "scorer_"
"""Put before the name of a scorer's option: training has options `steps` and `seed` of its own."""
_OPTION_NAMES = {"root": "--data", "categories": "--category"}
"""Options that are not the field's name with dashes."""


def train(
    output: Annotated[Path, typer.Option(help="Folder for the trained model, its log, and the state to resume from.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file with any of the options below, or FlowAD's training YAML; options win."),
    ] = None,
    preset: Annotated[
        Literal["flowad-b", "flowad-l", "flowad-g", "flowad-h"] | None,
        typer.Option(help="A published size with its recipe (300 epochs, no average); file and options win."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the state in the output folder, if there is one.")] = True,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    distributed: Annotated[
        bool, typer.Option("--distributed", help="This is one of the processes that `accelerate launch` started.")
    ] = False,
    scorer: Annotated[
        str | None,
        typer.Option(help=f"With a teacher: the scorer to learn for, {', '.join(SCORERS)}. [default: mismatch]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; no progress bars.")] = False,
    **options: Any,
) -> None:
    """Train a detector on the good training images of a data set and write `model.safetensors` with its JSON.

    Ctrl-C saves the state; the same command goes on from there, with the same result as an uninterrupted run.

    With `--teacher` the model is a student: a field of any width and depth that learns the teacher's output at the
    evaluations of one scorer alone (default: mismatch), several times cheaper, with a certificate against the teacher.

    Examples: `flowad-train --layout mvtec --data mvtec --output runs/mvtec`,
    `flowad-train --teacher runs/mvtec/model.safetensors --hidden-size 256 --layout mvtec --data mvtec --output runs/s`,
    `flowad-train --config train.yaml --output runs/a`,
    `accelerate launch -m flowad_fast.cli.train --distributed --config train.yaml --output runs/a`.
    """
    require("train", "torch", "torchvision", "timm", "safetensors", by="flowad-train")
    from flowad_fast.training import loop as training

    scoring = {name: options.pop(_SCORER + name) for name in (*option_names(), EVALUATIONS)}
    if scorer is not None or any(value is not None for value in scoring.values()):
        options["scorer"] = scorer_adapter.dump_python(scorer_from(scorer or "mismatch", scoring), mode="json")
    layers = [Layer(f"preset {preset}", PRESETS[preset])] if preset is not None else []
    layers += [from_file(config)] if config is not None else []
    chosen, origins = settings([*layers, Layer("options", options)])
    for line in () if json else origins:
        common.note(line)
    with _progress(quiet=json) as report:
        result = training.train(chosen, output, resume, device, distributed, report)
    if result.rank:
        raise typer.Exit(0 if result.finished else common.EXIT_INTERRUPTED)
    if json:
        common.print_json({**dataclasses.asdict(result), "checkpoint": result.checkpoint and str(result.checkpoint)})
    elif result.finished:
        common.out.print(f"trained {result.step} steps on {result.device}: {result.checkpoint}", highlight=False)
    if not result.finished:
        common.err.print(
            f"interrupted at step {result.step}; the state is saved. "
            f"To go on, give the same command again (--output {output})",
            markup=False,
            highlight=False,
        )
        raise typer.Exit(common.EXIT_INTERRUPTED)


@contextmanager
def _progress(quiet: bool) -> Iterator["Report"]:
    """A bar per stage, with the loss and the remaining time, on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=common.err, disable=quiet) as bars:

        def report(stage: str, done: int, total: int, loss: float | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, loss="", completed=done - 1)
            bars.update(tasks[stage], completed=done, loss="" if loss is None else f"loss {loss:.4f}")

        yield report


def _with_options(function: Any) -> Any:
    """`function` with one option for each field of TrainConfig in place of its **options; None where not given."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, field in TrainConfig.model_fields.items():
        if name == "scorer":
            continue
        kind: Any = list[str] if name == "categories" else str if name == "roi" else field.annotation
        default = field.get_default()
        shown = "" if field.is_required() or default in (None, ()) else f" [{default}]"
        flag = _OPTION_NAMES.get(name, "--" + name.replace("_", "-"))
        if bool in (kind, *getattr(kind, "__args__", ())):
            flag = f"{flag}/--no-{flag[2:]}"
        option = typer.Option(flag, help=f"{field.description}{shown}")
        annotation = Annotated[kind | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    function.__signature__ = signature.replace(parameters=parameters)
    return function


main = common.command(_with_options(with_scorer_options(train, prefix="with a teacher: ", flag="scorer-")))

if __name__ == "__main__":
    main()
