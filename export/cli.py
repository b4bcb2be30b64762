"""`flowad-export`: checkpoint to bundle, and what one does with a bundle afterwards: inspect, verify, calibrate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer
from rich.table import Table

from flowad_fast import bundle
from flowad_fast.bundle import Manifest
from flowad_fast.checkpoints.load import DEMO, load_checkpoint
from flowad_fast.cli import common
from flowad_fast.config import Precision, validated
from flowad_fast.engines.device import torch_device
from flowad_fast.errors import ConfigError, ParityError, nearest
from flowad_fast.evaluation.probes import ProbeChoice, choose_probes
from flowad_fast.export.exporter import ExportResult, Outcome, check_bundle, export_bundle, recalibrate
from flowad_fast.export.formats import AUTO, FORMATS, parse_batch, parse_formats
from flowad_fast.export.frames import GoodParts, good_parts, parity_frames, parse_size
from flowad_fast.export.verify import ParityFrames
from flowad_fast.files import sha256
from flowad_fast.model import FlowModel
from flowad_fast.stages.decision import AGGREGATES, require_parts
from flowad_fast.stages.scorers import SCORERS, Density, Scorer

FORMAT_HELP = f"Comma-separated, or auto: {', '.join(f.name for f in FORMATS.values() if f.auto)}. " + " ".join(
    f"{f.name}: {f.description}." for f in FORMATS.values()
)

PROBE_FRAMES = 8
"""Good parts on which --probes auto measures."""


def export(
    source: Annotated[str, typer.Argument(help="Checkpoint (.pth, .safetensors, or `demo`), or an existing bundle.")],
    config: Annotated[Path | None, typer.Option(help="Training YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    format: Annotated[str, typer.Option(help=FORMAT_HELP)] = "auto",
    precision: Annotated[str, typer.Option(help=f"{', '.join(get_args(Precision))}.")] = "fp32",
    scorer: Annotated[str, typer.Option(help="density, inversion or reconstruction.")] = "inversion",
    steps: Annotated[int, typer.Option(help="Euler steps per unit time.")] = 3,
    probes: Annotated[str, typer.Option(help="Density: Rademacher probes, or auto (by their noise).")] = "10",
    tau: Annotated[float, typer.Option(help="Reconstruction: where it starts.")] = 0.5,
    start: Annotated[str, typer.Option(help="Reconstruction: noise or inversion.")] = "noise",
    power: Annotated[int, typer.Option(help="Inversion: 2 for the squared norm (paper), 1 for the norm.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of probes and noise.")] = 0,
    aggregate: Annotated[str, typer.Option(help="Image score: max, mean, sum, diff or diff+sum of the map.")] = "max",
    frame_size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the frames, or any.")] = "any",
    batch: Annotated[str, typer.Option(help="MIN:OPT:MAX, for engines built for a range of batch sizes.")] = "1:8:64",
    device: Annotated[str, typer.Option(help="Built for and checked on: auto, cpu, cuda, cuda:N.")] = "auto",
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = 20,
    workspace: Annotated[int, typer.Option(help="Memory for engine builders, MiB.", min=1)] = 4096,
    data: Annotated[str | None, typer.Option(help="Folder of real frames for the parity check.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Folder of good parts; also for an existing bundle.")] = None,
    alpha: Annotated[float, typer.Option(help="Accepted false-reject rate of the calibration.")] = 0.01,
    output: Annotated[Path | None, typer.Option(help="The bundle's folder. [default: bundles/NAME-SCORER]")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Re-check a bundle: hashes, and parity.")] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="Show a bundle's manifest.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate everything, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")] = False,
) -> None:  # fmt: skip
    """Turn a trained checkpoint into a bundle that proves what it computes.

    Every artefact is run against the fp32 reference on real frames. Formats that agree are published together; failing
    ones are kept under a `.rejected` name, and the exit code is 1 unless every format that was asked for is ok.
    """
    if verify or inspect:
        _look(source, verify, data, device, json)
        return
    if _is_bundle(source):
        if calibrate is None:
            raise ConfigError(f"{source} is a bundle already; give --inspect, --verify or --calibrate, or a checkpoint")
        _recalibrate(source, calibrate, alpha, device, json)
        return

    chosen = _scorer(scorer, steps, probes, tau, start, power, seed)
    formats, size, range_ = parse_formats(format), parse_size(frame_size), parse_batch(batch)
    score = _one_of("aggregate", aggregate, AGGREGATES)
    arithmetic = _one_of("precision", precision, get_args(Precision))
    torch_device(device)  # refuses what this machine does not have
    target = output or Path("bundles") / f"{Path(source).stem}-{chosen.kind}"
    bundle.check_target(target)

    with common.err.status("reading the checkpoint and the frames"):
        model = load_checkpoint(source, config, backbone_weights)
        chosen.rows(model.config)  # refuses scorers that the model cannot have
        _ = model.backbone
        frames = parity_frames(data)
        good = None if calibrate is None else good_parts(calibrate, model.spec.classes.labels)
        if good is not None:
            require_parts(good.classes, alpha, score)
        choice = None
        if isinstance(chosen, Density) and probes == AUTO:
            chosen, choice = _chosen_probes(model, chosen, good, frames)
    if dry_run:
        plan = {
            "target": str(target),
            "formats": {
                name: "ok" if precision in FORMATS[name].precisions else f"not available in {precision}"
                for name in formats
            },
            "scorer": repr(chosen),
            "probe_choice": None if choice is None else choice.record(),
            "device": device,
            "parity_frames": frames.source,
            "good_parts": None if good is None else len(good),
        }
        common.print_json(plan) if json else common.out.print(plan)
        return
    file = DEMO if source == "demo" else Path(source)
    with common.err.status("exporting") as status:

        def tell(line: str) -> None:
            status.update(f"exporting · {line}")
            if not common.err.is_terminal:  # where the status line is not shown
                common.err.print(line, markup=False, highlight=False)

        result = export_bundle(
            model, chosen, target, formats=formats, aggregate=score, precision=arithmetic, frame_size=size,
            frames=frames, opset=opset, batch=range_, device=device, workspace=workspace, good=good, alpha=alpha,
            probe_choice=None if choice is None else choice.record(),
            source={"file": file.name, "sha256": sha256(file), "provenance": model.spec.provenance},
            tell=tell,
        )  # fmt: skip
    _report(result, json)


def _is_bundle(source: str) -> bool:
    return (Path(source) / "manifest.json").is_file()


def _one_of(name: str, value: str, valid: Sequence[str]) -> Any:
    if value not in valid:
        raise ConfigError(f"unknown {name} {value!r}; {nearest(value, valid)}")
    return value


def _scorer(name: str, steps: int, probes: str, tau: float, start: str, power: int, seed: int) -> Scorer:
    _one_of("scorer", name, tuple(SCORERS))
    options: dict[str, dict[str, Any]] = {
        "density": {"seed": seed} if probes == AUTO else {"probes": probes, "seed": seed},
        "inversion": {"power": power},
        "reconstruction": {"tau": tau, "start": start, "seed": seed},
    }
    return validated(SCORERS[name], {"steps": steps, **options[name]}, f"--scorer {name}")


def _chosen_probes(
    model: FlowModel, scorer: Density, good: GoodParts | None, frames: ParityFrames
) -> tuple[Density, ProbeChoice]:
    """The scorer with the number of probes that some of the good parts ask for.

    They come from --calibrate, otherwise from the frames of the parity check that are not known to be defective.
    """
    if good is not None:
        index = (
            [i * len(good) // PROBE_FRAMES for i in range(PROBE_FRAMES)]
            if len(good) > PROBE_FRAMES
            else range(len(good))
        )
        pairs = [(good.frames[i], good.classes[i]) for i in index]
        same = [(frame, name) for frame, name in pairs if frame.shape == pairs[0][0].shape]
        names = [model.spec.classes.label(name) for _, name in same if name]
        return choose_probes(model, scorer, np.stack([frame for frame, _ in same]), names or None)
    normal = frames.frames if frames.labels is None else frames.frames[frames.labels == 0]
    count = model.config.num_classes
    names = [i % count for i in range(len(normal[:PROBE_FRAMES]))]
    return choose_probes(model, scorer, normal[:PROBE_FRAMES], names if model.config.use_class_labels else None)


def _report(result: ExportResult, json: bool) -> None:
    """Print what an export did; exit code 1 unless every format is ok."""
    if json:
        common.print_json(
            {
                "ok": result.ok,
                "published": str(result.path) if result.published else None,
                "rejected": None if result.rejected is None else str(result.rejected),
                **_facts(result.manifest, result.outcomes),
            }
        )
    else:
        common.out.print(_table(result.manifest, result.outcomes))
        _print_reasons(result.outcomes)
        if result.published:
            common.out.print(f"bundle: {result.path}", highlight=False, soft_wrap=True)
            _print_calibration(result.manifest)
    failed = [name for name, outcome in result.outcomes.items() if not outcome.ok]
    if failed:
        kept = f"; kept as {result.rejected}" if result.rejected else ""
        done = "the others are published" if result.published else "nothing is published"
        common.err.print(f"[bold red]error:[/] not ok: {', '.join(failed)}{kept}; {done}", soft_wrap=True)
        raise typer.Exit(common.EXIT_ERROR)


def _look(source: str, verify: bool, data: str | None, device: str, json: bool) -> None:

    folder, manifest = bundle.read(source)
    outcomes = {
        name: Outcome("hashes ok", "", artefact, sum((folder / file).stat().st_size for file in artefact.files))
        for name, artefact in manifest.artefacts.items()
    }
    eager = manifest.artefacts.get("eager")
    if verify and eager is not None:
        with common.err.status("verifying"):
            model = load_checkpoint(folder / next(iter(eager.files)))
            outcomes = check_bundle(source, model, parity_frames(data), device)
    elif verify and data is not None:
        raise ConfigError(f"{folder}: re-checking parity needs the model, which the format eager holds; omit --data")
    failed = [name for name, outcome in outcomes.items() if not outcome.ok and outcome.status != "hashes ok"]
    if json:
        common.print_json({"ok": not failed, "bundle": str(folder), **_facts(manifest, outcomes)})
    else:
        common.out.print(_table(manifest, outcomes))
        _print_reasons(outcomes)
        common.out.print(f"written by flowad-fast {manifest.project_version} on {manifest.created}", highlight=False)
        if verify and eager is None:
            common.out.print("parity: not re-checked, since the bundle has no format eager, which holds the model")
        _print_calibration(manifest)
    if failed:
        raise ParityError(f"{folder}: {', '.join(failed)}: no longer agrees with the fp32 reference; export it again")


def _recalibrate(source: str, calibrate: str, alpha: float, device: str, json: bool) -> None:

    _, manifest = bundle.read(source, verify=False)
    with common.err.status("calibrating"):
        manifest = recalibrate(source, good_parts(calibrate, manifest.model.classes.labels), alpha, device)
    if json:
        common.print_json({"bundle": source, "manifest": manifest.model_dump(mode="json")})
    else:
        _print_calibration(manifest)


def _facts(manifest: Manifest, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    formats = {
        name: {
            "status": outcome.status,
            "reason": outcome.reason,
            "bytes": outcome.bytes,
            "artefact": None if outcome.artefact is None else outcome.artefact.model_dump(mode="json"),
        }
        for name, outcome in outcomes.items()
    }
    return {"formats": formats, "manifest": manifest.model_dump(mode="json")}


def _table(manifest: Manifest, outcomes: dict[str, Outcome]) -> Table:
    table = Table(title=f"{manifest.scorer!r}, score: {manifest.aggregate}", title_justify="left")
    for column in ("format", "status", "file", "MB", "build s", "map error", "RMS", "rank corr."):
        table.add_column(column, overflow="fold")
    for name, outcome in outcomes.items():
        style = "green" if outcome.ok or outcome.status == "hashes ok" else "bold red"
        status = f"[{style}]{outcome.status}[/]"
        artefact = outcome.artefact
        if artefact is None:
            table.add_row(name, status)
            continue
        parity = artefact.parity
        table.add_row(
            name,
            status,
            next(iter(artefact.files)),
            f"{outcome.bytes / 1e6:.1f}",
            "" if artefact.build_seconds is None else f"{artefact.build_seconds:.1f}",
            f"{parity.max_error:.1e}" if parity else "not measured",
            f"{parity.rms_error:.1e}" if parity else "",
            f"{parity.spearman:.4f}" if parity and parity.spearman is not None else "",
        )
    return table


def _print_reasons(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if outcome.reason:
            common.out.print(f"{name}: {outcome}", markup=False, highlight=False, soft_wrap=True)


def _print_calibration(manifest: Manifest) -> None:
    if manifest.calibration is None:
        common.out.print("calibration: none, so no verdicts; give --calibrate GOOD_FOLDER")
        return
    for name, one in manifest.calibration.classes.items():
        common.out.print(
            f"calibration: {name or 'all'}: threshold {one.threshold:.6g} from {one.parts} good parts, "
            f"false-reject rate at most {manifest.calibration.alpha:g}",
            soft_wrap=True,
        )


main = common.command(export)

if __name__ == "__main__":
    main()
