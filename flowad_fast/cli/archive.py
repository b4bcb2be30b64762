"""`flowad-inspect --ray`: an archive judged by workers of Ray Data, its rows in a folder of Parquet files."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from flowad_fast import bundle as bundles
from flowad_fast.archive.cluster import Workers
from flowad_fast.archive.inspecting import Inspection, judge
from flowad_fast.archive.sources import Archive, Columns, is_glob, is_parquet, read_source
from flowad_fast.archive.store import PartFolder
from flowad_fast.cli import common
from flowad_fast.cli.inspect import classes_of, print_summary
from flowad_fast.config import Classes
from flowad_fast.data.walk import left_out
from flowad_fast.engines import Mode, backend
from flowad_fast.errors import ConfigError, require
from flowad_fast.evaluation.inspection import without_regions
from flowad_fast.evaluation.results import STATUSES, Result, bundle_identity, row_of, written


def workers_of(
    address: str, count: int | None, threads: int | None, gpus: float | None, device: str = "auto"
) -> Workers:
    """What the options of a command say about workers.

    Raises:
        ConfigError: a GPU is asked for, and none is reserved.
    """
    if device.startswith("cuda") and not gpus:
        raise ConfigError(f"--device {device} with --ray needs --gpus-per-worker, for example 1")
    return Workers(address, count, threads or 1, gpus or 0)


def inspect_archive(
    bundle: Path,
    source: str,
    output: Path,
    workers: Workers,
    columns: Columns,
    *,
    resume: bool,
    class_name: str | None,
    class_from_folder: bool,
    engine: str,
    device: str,
    mode: Mode | None = None,
    batch: int,
    json: bool,
) -> None:
    """The command with `--ray`; options as `flowad-inspect` has them.

    Raises:
        FlowADError: the job cannot be done; whole parts are kept.
    """
    require("ray", "ray", "pyarrow", by="flowad-inspect --ray")
    if engine != "auto":
        backend(engine)
    _, manifest = bundles.read(bundle, verify=False)  # `load` verifies
    with common.err.status("looking for photos"):
        archive = _read(source, columns, manifest.model.classes, class_name, class_from_folder)
    if archive.others:
        common.note(left_out(archive.others))
    if archive.repeated:
        common.note(f"{archive.repeated} rows list a photo that another row lists; it is judged once")
    if lacking := without_regions(manifest):
        common.note(f"no regions: {lacking}")
    began = time.perf_counter()
    counts: Counter[str] = Counter()
    engines: set[str] = set()
    earlier = closed = 0
    with PartFolder(output, bundle_identity(bundle), resume) as folder:
        task = Inspection(str(bundle.resolve()), folder.bundle, engine, device, batch, mode)
        with common.progress("inspecting", len(archive.photos), quiet=json) as advance:
            for photo, row in judge(archive.photos, folder, task, workers, advance):
                earlier += row is None
                closed += row is not None and not row["sha256"]
                engines |= set() if row is None else {row["engine"]}
                counts[folder.known[written(photo.file)].status] += 1
        problems = [Result(place, "error", reason=reason) for place, reason in archive.problems]
        if problems:
            folder.append([row_of(one, ", ".join(sorted(engines)), folder.bundle) for one in problems])
        summary = {
            "bundle": str(bundle),
            "engine": ", ".join(sorted(engines)) or None,
            "folder": source,
            "output": str(output),
            "overlays": None,
            "files": len(archive.photos),
            "from_earlier_runs": earlier,
            "counts": {status: counts[status] for status in STATUSES},
            "left_out": dict(archive.others),
            "listed_again": archive.repeated,
            "not_opened": closed,
            "folders_not_opened": [str(place) for place, _ in archive.problems],
            "seconds": round(time.perf_counter() - began, 3),
        }
        folder.finish(summary | {"bundle_identity": folder.bundle})
    _report(summary, archive, json)
    if closed or archive.problems:
        raise typer.Exit(common.EXIT_ERROR)


def _read(source: str, columns: Columns, known: Classes, class_name: str | None, class_from_folder: bool) -> Archive:
    if class_from_folder and (is_glob(source) or is_parquet(source)):
        raise ConfigError(f"--class-from-folder needs a folder, {source} is none; give --class, or --class-column")
    if columns.class_name is not None:
        if not known.conditional:
            raise ConfigError("the bundle is unconditional but --class-column was given; leave it out")
        if class_name is not None:
            raise ConfigError("got --class and --class-column, expected one of them")

    def classes(paths: Sequence[Path]) -> list[str]:
        return classes_of(known, Path(source), list(paths), class_name, class_from_folder)

    return read_source(source, columns, classes)


def _report(summary: Mapping[str, Any], archive: Archive, json: bool) -> None:
    uncalibrated, closed = summary["counts"]["uncalibrated"], summary["not_opened"]
    if uncalibrated:
        common.note(f"uncalibrated: {uncalibrated} photos have a score but no verdict; see flowad-export calibrate")
    common.print_json(summary) if json else print_summary(summary)
    for place, reason in archive.problems:
        common.note(f"error: {place}: {reason}")
    if closed:
        common.note(f"error: {closed} photos could not be opened; see the rows of {summary['output']}")
