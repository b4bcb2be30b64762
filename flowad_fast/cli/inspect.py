"""`flowad-inspect`: every image file under a folder through a bundle, one result row per file."""

import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from flowad_fast import bundle as bundles
from flowad_fast.cli import common
from flowad_fast.config import Classes
from flowad_fast.data.images import no_images
from flowad_fast.data.walk import Photos, find_photos
from flowad_fast.engines import Mode, backend
from flowad_fast.errors import BundleError, ConfigError, FlowADError, nearest
from flowad_fast.evaluation.inspection import OverlayFolder, inspect_files, without_regions
from flowad_fast.evaluation.results import FORMATS, STATUSES, Result, ResultFile, bundle_identity


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of images; folders in it are searched too. With --ray also a pattern, or Parquet."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Result file; with --ray a folder. [default: inspection.FORMAT]")
    ] = None,
    format: Annotated[str | None, typer.Option(help="csv or jsonl [csv]; with --ray: parquet.")] = None,
    overlays: Annotated[
        Path | None, typer.Option(help="Folder for heat-map overlays (PNG); must not lie in FOLDER.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Skip files that have a row already, or start over.")
    ] = True,
    class_name: Annotated[str | None, typer.Option("--class", help="Class of all parts (conditional bundles).")] = None,
    class_from_folder: Annotated[
        bool, typer.Option("--class-from-folder", help="Class of a part: the first folder below FOLDER.")
    ] = False,
    engine: Annotated[str, typer.Option(help="One of the bundle's engines, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    mode: Annotated[Mode | None, typer.Option(help="Of openvino [latency]; throughput is for batches.")] = None,
    threads: common.Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames per call.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Summary as JSON on standard output.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Judge with Ray Data: ADDRESS of a cluster, or local. See docs/archive.md.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --ray: workers. [default: what has room]")] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(min=0, help="With --ray: GPUs for each worker [0].")] = None,
    path_column: Annotated[str | None, typer.Option(help="Parquet: column of paths.")] = None,
    bytes_column: Annotated[str | None, typer.Option(help="Parquet: column of encoded photos.")] = None,
    name_column: Annotated[str | None, typer.Option(help="Parquet of bytes: column of their names [FILE#ROW].")] = None,
    class_column: Annotated[str | None, typer.Option(help="Parquet: column of classes (conditional bundles).")] = None,
) -> None:
    """Judge every image file under FOLDER: one row per file with its verdict and score.

    Status: good, anomalous, invalid (no verdict possible), error (unreadable file), uncalibrated (score only). The
    result file stays whole when the job is stopped; the same command goes on with it, and judges photos again that
    have changed since. Exit codes: 0 all files have a row, 1 the job could not be done, or something in FOLDER could
    not be opened (it has a row that says why), 2 wrong usage, 130 interrupted.

    Examples: `flowad-inspect bundles/cells photos --overlays heat`,
    `flowad-inspect bundles/mvtec photos --class-from-folder --format jsonl`,
    `flowad-inspect bundles/cells archive.parquet --path-column photo --ray auto --workers 32`.
    """
    if ray is not None:
        from flowad_fast.archive.sources import Columns
        from flowad_fast.cli.archive import inspect_archive, workers_of

        if overlays is not None:
            raise ConfigError("--overlays share a scale that one process keeps; leave them out, or leave out --ray")
        if format not in (None, "parquet"):
            raise ConfigError(f"--ray writes parquet, not {format}; docs/archive.md shows how to turn it into {format}")
        inspect_archive(
            bundle, str(folder), output or Path("inspection.parquet"),
            workers_of(ray, workers, threads, gpus_per_worker, device),
            Columns(path_column, bytes_column, name_column, class_column), resume=resume, class_name=class_name,
            class_from_folder=class_from_folder, engine=engine, device=device, mode=mode, batch=batch, json=json,
        )  # fmt: skip
        return
    alone = {
        "workers": workers, "gpus-per-worker": gpus_per_worker, "path-column": path_column,
        "bytes-column": bytes_column, "name-column": name_column, "class-column": class_column,
    }  # fmt: skip
    if given := [f"--{name}" for name, value in alone.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)} needs --ray; --ray local uses the cores of this computer")
    format = format or "csv"
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    if engine != "auto":
        backend(engine)
    target = output or Path(f"inspection.{format}")
    _, manifest = bundles.read(bundle, verify=False)  # `load` verifies
    photos = find_photos(folder)
    if not photos.paths and not photos.problems:
        raise no_images(folder, photos)
    _check_overlays(overlays, folder, photos)
    names = classes_of(manifest.model.classes, folder, list(photos.paths), class_name, class_from_folder)
    files = dict(zip(photos.paths, names, strict=True))
    others = _others(photos, folder, target)
    if others.others:
        common.note(others.left_out())

    # What can fail fails here, before the work: the outputs are opened, made and locked.
    with ExitStack() as stack:
        file = stack.enter_context(ResultFile(target, format, bundle_identity(bundle), resume=resume))
        heat = stack.enter_context(OverlayFolder(overlays, file.bundle)) if overlays else None
        with common.err.status("comparing with earlier runs"):
            done = file.done(files)

        import flowad_fast

        with common.err.status("loading the bundle"):
            detector = flowad_fast.load(bundle, engine=engine, device=device, mode=mode)
        if bundle_identity(bundle) != file.bundle:
            raise BundleError(f"{bundle}: the bundle was replaced while it was being loaded; run again")
        file.engine = detector.engine
        if lacking := without_regions(detector):
            common.note(f"no regions: {lacking}")
        began = time.perf_counter()
        counts, closed = Counter(done.values()), 0
        left = {path: name for path, name in files.items() if path not in done}
        try:
            draw = heat.writer(detector, folder, files) if heat and left else None
            for place, reason in photos.problems:
                file.append(Result(place, "error", reason=reason))
            with common.progress("inspecting", len(files), quiet=json) as advance:
                advance(len(done))
                for result in inspect_files(detector, list(left), list(left.values()), batch):
                    if draw is not None:
                        draw(result)
                    file.append(result)
                    counts[result.status] += 1
                    closed += result.stamp is None
                    advance(1)
        except OSError as error:
            if isinstance(error, FlowADError):
                raise
            where = error.filename or target
            raise FlowADError(f"{where}: {error.strerror}; finished rows are kept, run again") from error
    seconds = time.perf_counter() - began
    if counts["uncalibrated"]:
        common.err.print("[yellow]uncalibrated:[/] ", end="")
        common.note(
            f"{counts['uncalibrated']} files have a score but no verdict; calibrate on good parts: "
            f"flowad-export calibrate {bundle} GOOD_FOLDER"
        )
    summary = {
        "bundle": str(bundle),
        "engine": detector.engine,
        "folder": str(folder),
        "output": str(target),
        "overlays": None if overlays is None else str(overlays),
        "files": len(files),
        "from_earlier_runs": len(done),
        "counts": {status: counts[status] for status in STATUSES},
        "left_out": dict(others.others),
        "not_opened": closed,
        "folders_not_opened": [str(place) for place, _ in photos.problems],
        "seconds": round(seconds, 3),
    }
    common.print_json(summary) if json else print_summary(summary)
    for place, reason in photos.problems:
        common.note(f"error: {place}: {reason}")
    if closed:
        common.note(
            f"error: {closed} {'file' if closed == 1 else 'files'} could not be opened; see the rows of {target}"
        )
    if closed or photos.problems:
        raise typer.Exit(common.EXIT_ERROR)


def _check_overlays(overlays: Path | None, folder: Path, photos: Photos) -> None:
    """Refuse a folder for overlays that the next run would find in `folder`, by links too."""
    if overlays is None:
        return
    real = overlays.resolve()
    if real.is_relative_to(folder.resolve()) or any(
        place.resolve().is_relative_to(real) for place in {path.parent for path in photos.paths}
    ):
        raise ConfigError(f"--overlays {overlays} lies in {folder}, so the next run would judge overlays; move it out")


def _others(photos: Photos, folder: Path, target: Path) -> Photos:
    """`photos` without the result file of an earlier run among the files that are left out."""
    if os.path.exists(target) and target.resolve().is_relative_to(folder.resolve()):
        return Photos(photos.paths, photos.problems, photos.others - Counter([target.suffix.lower()]))
    return photos


def classes_of(
    known: Classes, folder: Path, paths: list[Path], class_name: str | None, class_from_folder: bool
) -> list[str]:
    """The class of each file, "" for unconditional bundles."""
    if class_name is not None and class_from_folder:
        raise ConfigError("got --class and --class-from-folder, expected one of them")
    if not known.conditional:
        if class_name is not None or class_from_folder:
            raise ConfigError("the bundle is unconditional but a class was given; leave it out")
        return [""] * len(paths)
    if class_from_folder:
        return [path.relative_to(folder).parts[0] for path in paths]
    if class_name is None:
        raise ConfigError(
            f"the bundle is conditional; give --class or --class-from-folder; {nearest('', known.labels)}"
        )
    if class_name not in known.labels:
        raise ConfigError(f"class {class_name!r} is not in the bundle; {nearest(class_name, known.labels)}")
    return [class_name] * len(paths)


def print_summary(summary: Mapping[str, Any]) -> None:
    """The summary as a table, for people."""
    from rich.table import Table

    common.say(f"{summary['folder']} · {summary['engine']}")
    table = Table()
    table.add_column("status")
    table.add_column("files", justify="right")
    for status, count in summary["counts"].items():
        if count:
            table.add_row(status, str(count))
    table.add_section()
    table.add_row("all", str(summary["files"]))
    common.out.print(table)
    judged = summary["files"] - summary["from_earlier_runs"]
    earlier = f", {summary['from_earlier_runs']} have rows from earlier runs" if summary["from_earlier_runs"] else ""
    common.say(f"judged now: {judged} in {summary['seconds']:.1f} s{earlier}")
    common.say(f"results: {summary['output']}")
    if summary["overlays"]:
        common.say(f"overlays: {summary['overlays']}")


main = common.command(inspect)

if __name__ == "__main__":
    main()
