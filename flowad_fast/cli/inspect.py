"""`flowad-inspect`: every image file under a folder through a bundle, one result row per file."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flowad_fast.cli import common
from flowad_fast.config import Classes
from flowad_fast.data.images import find_images
from flowad_fast.errors import ConfigError, FlowADError, nearest
from flowad_fast.evaluation.inspection import (
    FORMATS,
    STATUSES,
    ResultFile,
    bundle_identity,
    inspect_files,
    overlay_writer,
)


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder of images; folders in it are searched too.")],
    output: Annotated[Path | None, typer.Option(help="Result file. [default: inspection.FORMAT]")] = None,
    format: Annotated[str, typer.Option(help="csv or jsonl.")] = "csv",
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
    threads: common.Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames per call.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Summary as JSON on standard output.")] = False,
) -> None:
    """Judge every image file under FOLDER: one row per file with its verdict and score.

    Status: good, anomalous, invalid (no verdict possible), error (unreadable file), uncalibrated (score only). The
    result file stays whole when the job is stopped; the same command goes on with it. Exit codes: 0 all files have a
    row, 1 the job could not be done, 2 wrong usage, 130 interrupted.

    Examples: `flowad-inspect bundles/cells photos --overlays heat`,
    `flowad-inspect bundles/mvtec photos --class-from-folder --format jsonl`.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    target = output or Path(f"inspection.{format}")
    paths = find_images(folder)
    if overlays is not None and overlays.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--overlays {overlays} lies in {folder}, so the next run would judge overlays; move it out")

    import flowad_fast

    with common.err.status("loading the bundle"):
        detector = flowad_fast.load(bundle, engine=engine, device=device)
    files = dict(zip(paths, _classes(detector.classes, folder, paths, class_name, class_from_folder), strict=True))
    began = time.perf_counter()
    try:
        with ResultFile(target, format, bundle_identity(bundle), detector.engine, resume) as file:
            done = file.done(files)
            counts = Counter(done.values())
            left = {path: name for path, name in files.items() if path not in done}
            draw = overlay_writer(detector, folder, files, overlays, file.bundle) if overlays and left else None
            with common.progress("inspecting", len(paths), quiet=json) as advance:
                advance(len(done))
                for result in inspect_files(detector, list(left), list(left.values()), batch):
                    if draw is not None:
                        draw(result)
                    file.append(result)
                    counts[result.status] += 1
                    advance(1)
    except OSError as error:
        raise FlowADError(f"{error.filename or target}: {error.strerror}; finished rows are kept, run again") from error
    seconds = time.perf_counter() - began
    if counts["uncalibrated"]:
        common.err.print(
            f"[yellow]uncalibrated:[/] {counts['uncalibrated']} files have a score but no verdict; calibrate on good "
            f"parts: flowad-export calibrate {bundle} GOOD_FOLDER"
        )
    summary = {
        "bundle": str(bundle),
        "engine": detector.engine,
        "folder": str(folder),
        "output": str(target),
        "overlays": None if overlays is None else str(overlays),
        "files": len(paths),
        "from_earlier_runs": len(done),
        "counts": {status: counts[status] for status in STATUSES},
        "seconds": round(seconds, 3),
    }
    common.print_json(summary) if json else _print_summary(summary)


def _classes(
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


def _print_summary(summary: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"{summary['folder']} · {summary['engine']}", title_justify="left")
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
    common.out.print(f"judged now: {judged} in {summary['seconds']:.1f} s{earlier}", highlight=False)
    common.out.print(f"results: {summary['output']}", highlight=False)
    if summary["overlays"]:
        common.out.print(f"overlays: {summary['overlays']}", highlight=False)


main = common.command(inspect)

if __name__ == "__main__":
    main()
