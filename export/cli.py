"""`flowad-export`: checkpoint to bundle, and what one does with a bundle afterwards: inspect, verify, calibrate."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flowad_fast.cli import common
from flowad_fast.errors import ConfigError, ParityError, nearest


def export(
    source: Annotated[str, typer.Argument(help="Checkpoint (.pth, .safetensors, or `demo`), or an existing bundle.")],
    config: Annotated[Path | None, typer.Option(help="Training YAML of a .pth checkpoint.")] = None,
    backbone_weights: Annotated[Path | None, typer.Option(help="The backbone's weight file.")] = None,
    format: Annotated[str, typer.Option(help="Comma-separated: onnx, eager.")] = "onnx,eager",
    scorer: Annotated[str, typer.Option(help="density, inversion or reconstruction.")] = "inversion",
    steps: Annotated[int, typer.Option(help="Euler steps per unit time.")] = 3,
    probes: Annotated[int, typer.Option(help="Density: Rademacher probes.")] = 10,
    tau: Annotated[float, typer.Option(help="Reconstruction: where it starts.")] = 0.5,
    start: Annotated[str, typer.Option(help="Reconstruction: noise or inversion.")] = "noise",
    power: Annotated[int, typer.Option(help="Inversion: 2 for the squared norm (paper), 1 for the norm.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of probes and noise.")] = 0,
    aggregate: Annotated[str, typer.Option(help="Image score: max, mean, sum, diff or diff+sum of the map.")] = "max",
    frame_size: Annotated[str, typer.Option(help="HEIGHTxWIDTH of the frames, or any.")] = "any",
    data: Annotated[Path | None, typer.Option(help="Folder of real frames for the parity check.")] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = 20,
    calibrate: Annotated[str | None, typer.Option(help="Folder of good parts; also for an existing bundle.")] = None,
    alpha: Annotated[float, typer.Option(help="Accepted false-reject rate of the calibration.")] = 0.01,
    output: Annotated[Path | None, typer.Option(help="The bundle's folder. [default: bundles/NAME-SCORER]")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Re-check a bundle: hashes, and parity.")] = False,
    inspect: Annotated[bool, typer.Option("--inspect", help="Show a bundle's manifest.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Validate everything, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")] = False,
) -> None:
    """Turn a trained checkpoint into a bundle that proves what it computes.

    Every artefact is run against the fp32 reference on real frames. A bundle is published only if all of them agree; a
    failing export is kept under a `.rejected` name and the exit code is 1.
    """
    if verify or inspect:
        _look(source, verify, data, json)
    elif calibrate is not None and _is_bundle(source):
        _recalibrate(source, calibrate, alpha, json)
    elif _is_bundle(source):
        raise ConfigError(f"{source} is a bundle already; give --inspect, --verify or --calibrate, or a checkpoint")
    else:
        chosen = _scorer(scorer, steps, probes, tau, start, power, seed)
        _export(source, config, backbone_weights, format, chosen, aggregate, frame_size, data, opset, calibrate, alpha,
                output, dry_run, json)  # fmt: skip


def _is_bundle(source: str) -> bool:
    return (Path(source) / "manifest.json").is_file()


def _scorer(name: str, steps: int, probes: int, tau: float, start: str, power: int, seed: int) -> Any:
    from flowad_fast.config import validated
    from flowad_fast.scorers import SCORERS

    if name not in SCORERS:
        raise ConfigError(f"unknown scorer {name!r}; {nearest(name, SCORERS)}")
    options: dict[str, dict[str, Any]] = {
        "density": {"probes": probes, "seed": seed},
        "inversion": {"power": power},
        "reconstruction": {"tau": tau, "start": start, "seed": seed},
    }
    return validated(SCORERS[name], {"steps": steps, **options[name]}, f"--scorer {name}")


def _export(
    source: str, config: Path | None, backbone_weights: Path | None, format: str, scorer: Any, aggregate: str,
    frame_size: str, data: Path | None, opset: int, calibrate: str | None, alpha: float, output: Path | None,
    dry_run: bool, json: bool,
) -> None:  # fmt: skip
    from flowad_fast.decision import AGGREGATES, parts_needed
    from flowad_fast.export.formats import parse_formats
    from flowad_fast.export.frames import good_parts, parity_frames, parse_size

    formats, size = parse_formats(format), parse_size(frame_size)
    if aggregate not in AGGREGATES:
        raise ConfigError(f"unknown aggregate {aggregate!r}; {nearest(aggregate, AGGREGATES)}")
    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha must lie between 0 and 1, got {alpha}")
    target = output or Path("bundles") / f"{Path(source).stem}-{scorer.kind}"

    from flowad_fast.checkpoint import load_checkpoint
    from flowad_fast.export.exporter import export_bundle

    with common.err.status("reading the checkpoint and the frames"):
        model = load_checkpoint(source, config, backbone_weights)
        scorer.rows(model.config)  # refuses scorers that the model cannot have
        _ = model.backbone
        frames = parity_frames(data)
        good = good_parts(calibrate, model.class_names) if calibrate is not None else None
    if dry_run:
        plan = {
            "target": str(target),
            "formats": list(formats),
            "scorer": repr(scorer),
            "parity_frames": frames.source,
            "good_parts": None if good is None else len(good[0]),
            "good_parts_needed": parts_needed(alpha),
        }
        common.print_json(plan) if json else common.out.print(plan)
        return
    with common.err.status("exporting") as status:
        result = export_bundle(
            model, scorer, target, formats=formats, aggregate=aggregate, frame_size=size, frames=frames, opset=opset,
            good=good, alpha=alpha, tell=lambda line: status.update(f"exporting · {line}"),
        )  # fmt: skip
    if json:
        common.print_json({"bundle": str(result.path), "status": result.status, **_facts(result.manifest)})
    else:
        common.out.print(_table(result.manifest, result.status, result.path))
        common.out.print(f"{'bundle' if result.ok else 'rejected'}: {result.path}", highlight=False)
    if not result.ok:
        failed = ", ".join(name for name, verdict in result.status.items() if verdict != "ok")
        raise ParityError(f"{failed}: does not agree with the fp32 reference; kept as {result.path}, nothing published")


def _look(source: str, verify: bool, data: Path | None, json: bool) -> None:
    from flowad_fast import bundle

    folder, manifest = bundle.read(source)
    status = {name: "hashes ok" for name in manifest.artefacts}
    if verify:
        from flowad_fast.checkpoint import load_checkpoint
        from flowad_fast.export.exporter import check_bundle
        from flowad_fast.export.frames import parity_frames

        with common.err.status("verifying"):
            eager = manifest.artefacts.get("eager")
            model = load_checkpoint(folder / next(iter(eager.files))) if eager else None
            frames = parity_frames(data) if model or data else None
            status = check_bundle(source, model, frames)
    if json:
        common.print_json({"bundle": str(folder), "status": status, **_facts(manifest)})
    else:
        common.out.print(_table(manifest, status, folder))
        _print_calibration(manifest)
    if any("failed" in verdict for verdict in status.values()):
        raise ParityError(f"{folder}: no longer agrees with the fp32 reference; export it again")


def _recalibrate(source: str, calibrate: str, alpha: float, json: bool) -> None:
    from flowad_fast import bundle
    from flowad_fast.export.exporter import recalibrate
    from flowad_fast.export.frames import good_parts

    _, manifest = bundle.read(source)
    names = manifest.model.class_names if manifest.model.velocity.use_class_labels else ()
    with common.err.status("calibrating"):
        manifest = recalibrate(source, good_parts(calibrate, names), alpha)
    if json:
        common.print_json({"bundle": source, **_facts(manifest)})
    else:
        _print_calibration(manifest)


def _facts(manifest: Any) -> dict[str, Any]:
    return {"manifest": manifest.model_dump(mode="json")}


def _table(manifest: Any, status: dict[str, str], folder: Path) -> Table:
    table = Table(title=f"{folder.name} · {manifest.scorer!r} · {manifest.aggregate}", title_justify="left")
    for column in ("format", "status", "file", "MB", "build s", "max map error", "RMS", "rank corr."):
        table.add_column(column)
    for name, artefact in manifest.artefacts.items():
        parity = artefact.parity
        size = sum((folder / file).stat().st_size for file in artefact.files) / 1e6
        good = "failed" not in status[name]
        table.add_row(
            name,
            f"[{'green' if good else 'bold red'}]{status[name]}[/]",
            next(iter(artefact.files)),
            f"{size:.1f}",
            f"{artefact.build_seconds}",
            f"{parity.max_error:.1e}" if parity else "not checked",
            f"{parity.rms_error:.1e}" if parity else "",
            f"{parity.spearman:.4f}" if parity and parity.spearman is not None else "",
        )
    return table


def _print_calibration(manifest: Any) -> None:
    if manifest.calibration is None:
        common.out.print("calibration: none, so no verdicts; give --calibrate GOOD_FOLDER")
        return
    for name, one in manifest.calibration.classes.items():
        common.out.print(
            f"calibration: {name or 'all'}: threshold {one.threshold:.6g} from {one.parts} good parts, "
            f"false-reject rate at most {manifest.calibration.alpha:g}"
        )


main = common.command(export)
