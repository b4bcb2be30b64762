"""`flowad-export`: checkpoint to bundle (`make`), and what one does with a bundle: `show`, `verify`, `calibrate`.

Only `make` and the parity part of `verify` need torch; each imports what it needs when it runs.
"""

import inspect as inspection
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from flowad_fast import bundle
from flowad_fast.bundle import Artefact
from flowad_fast.checkpoints.defaults import EvaluationDefaults, evaluation_defaults
from flowad_fast.cli import common
from flowad_fast.cli.authors import choose
from flowad_fast.cli.scorer_options import with_scorer_options
from flowad_fast.config import Precision, Weights
from flowad_fast.engines import backend
from flowad_fast.errors import ConfigError, MissingExtraError, ParityError, nearest, require
from flowad_fast.export.calibration import parse_severity, recalibrate
from flowad_fast.export.choosing import chosen_probes, given_parts, parts_for_location
from flowad_fast.export.exporter import check_bundle, export_bundle
from flowad_fast.export.formats import AUTO, FORMATS, parse_batch, parse_formats
from flowad_fast.export.frames import good_parts, parity_frames, parse_size
from flowad_fast.export.printing import HASHES_OK, hashed, print_bundle, print_calibration, report
from flowad_fast.export.tiling import chosen_tiling, frame_of, tiles_for_probes
from flowad_fast.export.verify import Outcome
from flowad_fast.files import sha256
from flowad_fast.shipped import PHOTOS, weight_file
from flowad_fast.stages.decision import AGGREGATES, require_parts
from flowad_fast.stages.scorers import SCORERS, Density
from flowad_fast.stages.tiling import Tiler
from flowad_fast.tuning.recipe import RecipeDefaults, check_recipe, followed, read_recipe

if TYPE_CHECKING:
    pass

FORMAT_HELP = f"Comma-separated, or auto: {', '.join(name for name, f in FORMATS.items() if f.auto)}. " + " ".join(
    f"{name}: {f.description}." for name, f in FORMATS.items()
)
MODEL = ("torch", "torchvision", "timm", "safetensors")
"""What a model in memory needs."""
BEFORE = "without-command"
"""What the form without a command is called inside."""


class _Group(TyperGroup):
    """Takes the form of before too, which had flags instead of commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click; what names no command is the old form."""
        if args and args[0] not in self.commands and args[0] not in self.get_help_option_names(ctx):
            args = [BEFORE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    help="Bundles: make one from a checkpoint, show, verify and calibrate it.",
)
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")]
Data = Annotated[str | None, typer.Option(help="Folder of real frames for the parity check.")]
Alpha = Annotated[float, typer.Option(help="Accepted false-reject rate of the calibration.")]
LocationParts = Annotated[
    str | None,
    typer.Option(
        help="Good parts for location statistics, none of them among those of the threshold. [default: half of those]"
    ),
]
Device = Annotated[str, typer.Option(help="Where it runs: auto, cpu, cuda, cuda:N, or what --engine has.")]
Json = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")]


def make(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint (.pth, .safetensors, `demo` or `cells`).")
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML of a .pth checkpoint; logging.eval in it sets the defaults.")
    ] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="The trained or the averaged weights of a .pth [model].")
    ] = None,
    format: Annotated[str, typer.Option(help=FORMAT_HELP)] = "auto",
    precision: Annotated[str, typer.Option(help=f"{', '.join(get_args(Precision))}.")] = "fp32",
    scorer: Annotated[str | None, typer.Option(help=f"{', '.join(SCORERS)} [inversion].")] = None,
    aggregate: Annotated[str | None, typer.Option(help=f"Image score: {', '.join(AGGREGATES)} [max].")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Scorer and score that flowad-tune chose, recipe.json; options win.")
    ] = None,
    frame_size: Annotated[
        str | None, typer.Option("--frame", "--frame-size", help="HEIGHTxWIDTH of the frames, or any. [default: any]")
    ] = None,
    tiles: Annotated[
        str | None,
        typer.Option(
            metavar="OVERLAP",
            help="Cut frames into tiles of the model's size with this overlap (0.25: a quarter), or none. "
            "[default: as the checkpoint was trained]",
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="With tiles: resize frames by it first. [default: 1]")] = None,
    roi: Annotated[
        str | None,
        typer.Option(metavar="X,Y,W,H", help="With tiles: judge this box of the frame alone, in its pixels, or none."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="With tiles: a PNG of the frame's size, white where nothing is ever judged, or none."),
    ] = None,
    batch: Annotated[str, typer.Option(help="MIN:OPT:MAX, for engines built for a range of batch sizes.")] = "1:8:64",
    device: Annotated[str, typer.Option(help="Built for and checked on: auto, cpu, cuda, cuda:N.")] = "auto",
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = 20,
    workspace: Annotated[
        int | None,
        typer.Option(help="Scratch memory of TensorRT engines, MiB; by default what the engine needs.", min=1),
    ] = None,
    data: Data = None,
    calibrate: Annotated[str | None, typer.Option(help="Folder of good parts, to calibrate at once.")] = None,
    alpha: Alpha = 0.01,
    location: Annotated[
        bool, typer.Option("--location", help="Put maps in units of what good parts have at each place of the map.")
    ] = False,
    location_parts: LocationParts = None,
    output: Annotated[Path | None, typer.Option(help="The bundle's folder. [default: bundles/NAME-SCORER]")] = None,
    threads: common.Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate everything, write nothing.")] = False,
    json: Json = False,
    **scoring: Any,
) -> None:
    """Turn a trained checkpoint into a bundle that proves what it computes.

    Every artefact is run against the fp32 reference on real frames. Formats that agree are published together; failing
    ones are kept under a `.rejected` name, and the exit code is 1 unless every format that was asked for is ok.

    Example: `flowad-export make demo --calibrate demo`.
    """
    if bundle.is_bundle(checkpoint):
        raise ConfigError(f"{checkpoint} is a bundle already; give a checkpoint, or use show, verify or calibrate")
    chosen_recipe = None if recipe is None else read_recipe(recipe)
    defaults: EvaluationDefaults | RecipeDefaults | None = evaluation_defaults(checkpoint, config)
    if chosen_recipe is not None and recipe is not None:
        check_recipe(chosen_recipe, weight_file(checkpoint), recipe)
        defaults = RecipeDefaults(chosen_recipe, recipe.name)
    kind = scorer or (defaults.scorer if defaults else None)
    measured = kind == "density" and scoring.get("probes") == AUTO
    asked = choose(scorer, aggregate, scoring | ({"probes": None} if measured else {}), defaults)
    chosen, score = asked.scorer, asked.aggregate
    if defaults:
        common.note(asked)
    formats, range_ = parse_formats(format), parse_batch(batch)
    _ = frame_size and parse_size(frame_size)
    arithmetic = _one_of("precision", precision, get_args(Precision))
    require("model", *MODEL, "onnx", "onnxscript", by="flowad-export make")
    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.engines.device import torch_device

    torch_device(device)  # refuses what this machine does not have
    target = output or Path("bundles") / f"{Path(checkpoint).stem}-{chosen.kind}"
    bundle.check_target(target)

    with common.err.status("reading the checkpoint and the frames"):
        model = load_checkpoint(checkpoint, config, backbone_weights, weights)
        chosen.schedules(model.config)  # refuses scorers that the model cannot have
        _ = model.backbone
        tiling, hidden = chosen_tiling(model, tiles, scale, roi, mask)
        size = frame_of(frame_size, tiling, hidden)
        # Photos that come with a checkpoint are of single parts; frames to be tiled are those that it is calibrated on.
        photos = calibrate if tiling is not None else None
        frames = parity_frames(data or photos or (checkpoint if checkpoint in PHOTOS else None))
        good = None if calibrate is None else good_parts(calibrate, model.spec.classes.labels)
        for line in (*frames.left_out, *(good.left_out if good else ())):
            common.note(line)
        places = None
        if location or location_parts is not None or (chosen_recipe is not None and chosen_recipe.location):
            places, good = parts_for_location(location_parts, good, model.spec.classes.labels, alpha, score)
        if good is not None:
            require_parts(good.classes, alpha, score)
        choice = None
        if measured and isinstance(chosen, Density):
            seen = (good, frames)
            if tiling is not None:
                image = model.spec.image
                seen = tiles_for_probes(good, frames, Tiler(tiling, image.size, hidden, image.mean))
            chosen, choice = chosen_probes(model, chosen, *seen)
    if dry_run:
        plan = {
            "target": str(target),
            "formats": {
                name: "ok" if precision in FORMATS[name].precisions else f"not available in {precision}"
                for name in formats
            },
            "scorer": repr(chosen),
            "aggregate": score,
            "sources": dict(asked.sources),
            "recipe": None if chosen_recipe is None else chosen_recipe.text,
            "probe_choice": None if choice is None else choice.record(),
            "device": device,
            "parity_frames": frames.source,
            "good_parts": None if good is None else len(good),
            "location": None if places is None else places.source,
            "tiling": None if tiling is None else tiling.model_dump(mode="json"),
            "frame_size": size,
            "left_out": [*frames.left_out, *(good.left_out if good else ())],
        }
        common.print_json(plan) if json else common.out.print(plan)
        return
    file = weight_file(checkpoint)
    with common.status("exporting") as tell:
        result = export_bundle(
            model, chosen, target, formats=formats, aggregate=score, precision=arithmetic, frame_size=size,
            frames=frames, opset=opset, batch=range_, device=device, workspace=workspace, good=good, alpha=alpha,
            location=places, tiling=tiling, mask=hidden, probe_choice=None if choice is None else choice.record(),
            recipe=None if chosen_recipe is None else followed(chosen_recipe, chosen, score),
            source={"file": file.name, "sha256": sha256(file), "provenance": model.spec.provenance},
            tell=tell,
        )  # fmt: skip
    report(result, json, (*frames.left_out, *(good.left_out if good else ())))


def show(path: Bundle, json: Json = False) -> None:
    """Show what a bundle holds and what was checked, after checking its files' hashes.

    Example: `flowad-export show bundles/demo-inversion`.
    """
    folder, manifest = bundle.read(path)
    print_bundle(folder, manifest, hashed(folder, manifest), "", json)


def verify(
    path: Bundle,
    data: Data = None,
    device: Device = "auto",
    engine: Annotated[
        str | None,
        typer.Option(help="By this engine, of what it reads, for example openvino. [default: each format's own]"),
    ] = None,
    threads: common.Threads = None,
    json: Json = False,
) -> None:
    """Check a bundle again on this machine: its files' hashes, and the parity of its artefacts.

    Parity needs the model: the format eager in the bundle, and the extra `model` of this project. Without them it is
    not re-checked, and that is said.

    Example: `flowad-export verify bundles/demo-inversion`.
    """
    if engine is not None:
        backend(engine)
    asked = "--data" if data is not None else "--engine" if engine is not None else None
    folder, manifest = bundle.read(path)
    outcomes, doubt = hashed(folder, manifest), ""
    eager = manifest.artefacts.get("eager")
    if eager is None:
        if asked is not None:
            raise ConfigError(
                f"{folder}: re-checking parity needs the model, which the format eager holds; omit {asked}"
            )
        doubt = "parity: not re-checked, since the bundle has no format eager, which holds the model"
    else:
        try:
            require("model", *MODEL, by="re-checking parity")
        except MissingExtraError as error:
            if asked is not None:
                raise
            doubt = f"parity: not re-checked: {error}"
        else:
            outcomes = _rechecked(folder, eager, data, device, engine)
            by = {one.artefact.parity.device for one in outcomes.values() if one.artefact and one.artefact.parity}
            if engine is not None and not json:
                common.say(f"parity measured by {', '.join(sorted(by))}")
    print_bundle(folder, manifest, outcomes, doubt, json)
    failed = [name for name, outcome in outcomes.items() if not outcome.ok and outcome.status != HASHES_OK]
    if failed:
        raise ParityError(f"{folder}: {', '.join(failed)}: no longer agrees with the fp32 reference; export it again")


def calibrate(
    path: Bundle,
    good: Annotated[
        str, typer.Argument(metavar="GOOD_FOLDER", help="Good parts; for conditional bundles one folder per class.")
    ],
    alpha: Alpha = 0.01,
    device: Device = "auto",
    threads: common.Threads = None,
    min_area: Annotated[
        float | None, typer.Option(min=0, help="Smallest region, pixels of the frame. [default: as before, or 0]")
    ] = None,
    severity: Annotated[
        list[str] | None,
        typer.Option(
            help="Class of regions, NAME[:area=PIXELS][,peak=VALUE]: those that reach either; repeat, the gravest last."
        ),
    ] = None,
    location_parts: LocationParts = None,
    json: Json = False,
) -> None:
    """Fit a bundle's thresholds on good parts, and store them in its manifest; engine files stay as they are.

    A bundle with location statistics has them fitted anew too, on parts that the threshold is not fitted on.

    Examples: `flowad-export calibrate bundles/demo-inversion parts/good --alpha 0.01`,
    `flowad-export calibrate bundles/cells parts/good --min-area 20 --severity minor --severity major:area=400,peak=12`.
    """
    severities = None if severity is None else [parse_severity(one) for one in severity]
    _, manifest = bundle.read(path, verify=False)
    with common.err.status("calibrating"):
        parts = good_parts(good, manifest.model.classes.labels)
        for line in parts.left_out:
            common.note(line)
        labels = manifest.model.classes.labels
        places = None if location_parts is None else given_parts(location_parts, labels)
        manifest = recalibrate(path, parts, alpha, device, min_area, severities, places)
    if json:
        left_out = list(parts.left_out)
        common.print_json({"bundle": str(path), "manifest": manifest.model_dump(mode="json"), "left_out": left_out})
    else:
        print_calibration(manifest)


def _before(
    checkpoint: str,
    verify_it: Annotated[bool, typer.Option("--verify", help="See `verify`.")] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="See `show`.")] = False,
    **options: Any,
) -> None:
    """The form of before: flags in place of commands. It goes on working in this release."""
    good, path, json = options["calibrate"], Path(checkpoint), options["json"]
    if verify_it:
        _note("verify BUNDLE")
        verify(path, options["data"], options["device"], json=json)
    elif inspect:
        _note("show BUNDLE")
        show(path, json)
    elif good is not None and bundle.is_bundle(path):
        _note("calibrate BUNDLE GOOD_FOLDER")
        calibrate(path, good, options["alpha"], options["device"], json=json)
    else:
        _note("make CHECKPOINT")
        make(checkpoint, **options)


def _note(form: str) -> None:
    common.note(f"note: write flowad-export {form} ...; the form without a command goes with the next release")


def _of_before() -> Any:
    """`_before` with the options of `make` in place of its **options."""
    flags = [p for p in inspection.signature(_before).parameters.values() if p.kind is not p.VAR_KEYWORD]
    _, *options = inspection.signature(make).parameters.values()
    source, *rest = flags
    source = source.replace(annotation=Annotated[str, typer.Argument(metavar="SOURCE", help="Checkpoint or bundle.")])
    parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in (*rest, *options)]
    _before.__signature__ = inspection.Signature([source, *parameters])  # type: ignore[attr-defined]
    return _before


def _one_of(name: str, value: str, valid: Sequence[str]) -> Any:
    if value not in valid:
        raise ConfigError(f"unknown {name} {value!r}; {nearest(value, valid)}")
    return value


def _rechecked(folder: Path, eager: Artefact, data: str | None, device: str, engine: str | None) -> dict[str, Outcome]:
    from flowad_fast.checkpoints.load import load_checkpoint

    with common.err.status("verifying"):
        model = load_checkpoint(folder / next(iter(eager.files)))
        frames = parity_frames(data)
        for line in frames.left_out:
            common.note(line)
        return check_bundle(folder, model, frames, device, engine)


for command in (with_scorer_options(make, {"probes": "auto: by their noise"}), show, verify, calibrate):
    app.command()(common.interruptible(command))
app.command(BEFORE, hidden=True)(common.interruptible(_of_before()))


def main() -> None:
    """The console script."""
    common.run(app)


if __name__ == "__main__":
    main()
