"""`flowad-inspect`: every image file under a folder through a bundle, one result row a file."""

import csv
import hashlib
import io
import json as jsonlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import numpy as np
import typer
from numpy.typing import NDArray

from flowad_fast.cli import common
from flowad_fast.errors import CalibrationError, ConfigError, FlowADError, FrameError, nearest

if TYPE_CHECKING:
    from flowad_fast.detector import Detector

Status = Literal["good", "anomalous", "uncalibrated", "invalid", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
COLUMNS = ("path", "status", "score", "class", "reason", "engine", "bundle")
"""Of a result file, in this order. `score` is empty (null) where there is none; `bundle` names the manifest's hash."""
FORMATS = ("csv", "jsonl")
SCALE = "scale.json"
"""Beside overlays: the map values that are drawn as no heat and as most heat, by class."""
_SCALE_FRAMES = 16


@dataclass(frozen=True)
class Result:
    """What became of one image file.

    `status` is the verdict, or `uncalibrated` where the bundle has a score but no threshold for the class; `invalid`
    frames and files that could not be read (`error`) have no score, and `reason` says why. `frame` is uint8 (H, W, 3),
    None for errors; `map` is float32 (S, S), None for errors and invalid frames.
    """

    path: Path
    status: Status
    score: float | None = None
    class_name: str = ""
    reason: str = ""
    frame: NDArray[np.uint8] | None = field(default=None, repr=False)
    map: NDArray[np.float32] | None = field(default=None, repr=False)


def inspect_files(
    detector: "Detector", paths: Sequence[Path], classes: Sequence[str] | None = None, batch: int = 8
) -> Iterator[Result]:
    """Each file's result, in the order of `paths`; a file that cannot be judged gives a row, never an exception.

    Files are read ahead in threads. Each `batch` files are scored in as few calls as their sizes and classes allow.

    Args:
        detector: of a bundle.
        paths: image files.
        classes: class of each file, for conditional bundles; an unknown one makes an error row.
        batch: frames a call, at most.
    """
    names = [""] * len(paths) if classes is None else list(classes)
    windows = [range(i, min(i + batch, len(paths))) for i in range(0, len(paths), batch)]
    with ThreadPoolExecutor(max_workers=min(8, batch)) as pool:

        def start(window: range) -> list[Future[NDArray[np.uint8] | str]]:
            return [pool.submit(_read, paths[i]) for i in window]

        ahead = start(windows[0]) if windows else []
        for window, following in pairwise([*windows, range(0)]):
            frames = [future.result() for future in ahead]
            ahead = start(following)
            found: dict[int, Result] = {}
            groups: dict[tuple[tuple[int, ...], str], list[int]] = {}
            for i, frame in zip(window, frames, strict=True):
                if isinstance(frame, str):
                    found[i] = Result(paths[i], "error", class_name=names[i], reason=frame)
                else:
                    groups.setdefault((frame.shape, names[i]), []).append(i)
            for (_, name), members in groups.items():
                chosen = [frames[i - window.start] for i in members]
                found |= zip(members, _judge(detector, [paths[i] for i in members], chosen, name), strict=True)
            yield from (found[i] for i in window)


def _read(path: Path) -> NDArray[np.uint8] | str:
    from flowad_fast.data.images import read_frame

    try:
        return read_frame(path)
    except (FrameError, OSError) as error:
        return _one_line(error)


def _judge(detector: "Detector", paths: Sequence[Path], frames: Sequence[Any], name: str) -> list[Result]:
    """Results of frames of one size and one class."""
    verdicts: list[Status]
    plain = [Result(path, "error", class_name=name, frame=frame) for path, frame in zip(paths, frames, strict=True)]
    try:
        detection = detector(np.stack(frames), detector.classes.label(name) if name else None)
    except (FrameError, ConfigError) as error:
        return [replace(result, frame=None, reason=_one_line(error)) for result in plain]
    try:
        scores = detection.score.tolist()
        verdicts = [cast(Status, str(verdict)) for verdict in detection.verdict]
    except CalibrationError as error:
        # Without a calibration the aggregate diff+sum has no score either.
        scores = detection.score.tolist() if detection.raw_score.ndim == 1 else [None] * len(plain)
        plain = [replace(result, reason=_one_line(error) if scores[0] is None else "") for result in plain]
        verdicts = ["uncalibrated"] * len(plain)
    return [
        replace(result, status="invalid", reason=reason)
        if reason
        else replace(result, status=verdict, score=score, map=map)
        for result, reason, verdict, score, map in zip(
            plain, detection.invalid, verdicts, scores, detection.map, strict=True
        )
    ]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class ResultFile:
    """A CSV or JSONL file of results that is whole after every row, and goes on where it was left.

    A row that a kill cut short is removed when the file is opened again. `rows` are those of earlier runs.
    """

    def __init__(self, path: Path, format: str, bundle: str, engine: str, resume: bool = True) -> None:
        """Open or start the file.

        Args:
            path: of the file; its folder is made if needed.
            format: `csv` or `jsonl`.
            bundle: identity of the bundle, see `bundle_identity`.
            engine: what runs, for the rows.
            resume: go on with an existing file; False replaces it.

        Raises:
            ConfigError: the file holds something else, or rows of another bundle.
        """
        self.path, self.format, self.bundle, self.engine = path, format, bundle, engine
        self.rows: list[dict[str, Any]] = _reopen(path, format) if resume and path.exists() else []
        others = {row["bundle"] for row in self.rows} - {bundle}
        if others:
            raise ConfigError(
                f"{path}: holds rows of bundle {', '.join(sorted(others))}, this one is {bundle} (another model, "
                "scorer or calibration); choose another --output, or --restart to replace the file"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a" if resume else "w", encoding="utf-8", errors="surrogateescape", newline="")
        if format == "csv" and self._file.tell() == 0:
            self._put(_csv_line(COLUMNS))

    def append(self, result: Result) -> None:
        """Write one row; it has left the process when this returns."""
        score = None if result.score is None else float(f"{result.score:.9g}")  # enough for any float32
        values = (str(result.path), result.status, score, result.class_name, result.reason, self.engine, self.bundle)
        if self.format == "csv":
            self._put(_csv_line(["" if value is None else str(value) for value in values]))
        else:
            self._put(jsonlib.dumps(dict(zip(COLUMNS, values, strict=True)), allow_nan=False) + "\n")

    def _put(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _csv_line(values: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _reopen(path: Path, format: str) -> list[dict[str, Any]]:
    """The whole rows of a result file, after cutting off a last row that is not whole."""
    data = path.read_bytes()
    kept = data[: data.rfind(b"\n") + 1]
    if format == "csv":
        while kept.count(b'"') % 2:  # the line end is inside a quoted field
            kept = kept[: kept.rfind(b"\n", 0, -1) + 1]
    refusal = ConfigError(f"{path}: is no {format} result file of flowad-inspect; choose another --output or --format")
    begin = (_csv_line(COLUMNS) if format == "csv" else '{"path": ').encode()
    if data[: len(begin)] != begin[: len(data)]:
        raise refusal
    try:
        text = kept.decode("utf-8", "surrogateescape")
        if format == "csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            rows = [jsonlib.loads(line) for line in text.splitlines()]
    except (ValueError, csv.Error):
        raise refusal from None
    if any(tuple(row) != COLUMNS or row["status"] not in STATUSES for row in rows):
        raise refusal
    if len(kept) != len(data):
        os.truncate(path, len(kept))
    return rows


def bundle_identity(bundle: Path) -> str:
    """The first 12 hex digits of the manifest's SHA-256: model, scorer, aggregate, engines' hashes and calibration."""
    from flowad_fast.bundle import MANIFEST

    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:12]


def threshold(detector: "Detector", class_name: str = "") -> float | None:
    """The calibrated threshold as a value of the map: there is one where the image score is the map's maximum."""
    one = detector.calibration.classes.get(class_name) if detector.calibration else None
    return one.threshold if one and detector.aggregate == "max" else None


def heat_ranges(
    detector: "Detector", paths: Sequence[Path], classes: Sequence[str] | None = None
) -> dict[str, tuple[float, float]]:
    """The heat range of each class (see `overlay.heat_range`), from the maps of up to 16 files spread over `paths`.

    Classes of which no file can be scored are left out.
    """
    from flowad_fast.evaluation.overlay import heat_range

    names = [""] * len(paths) if classes is None else list(classes)
    ranges = {}
    for name in dict.fromkeys(names):
        index = [i for i, one in enumerate(names) if one == name]
        index = (
            [index[k * len(index) // _SCALE_FRAMES] for k in range(_SCALE_FRAMES)] if index[_SCALE_FRAMES:] else index
        )
        results = inspect_files(detector, [paths[i] for i in index], [name] * len(index) if classes else None)
        maps = [result.map for result in results if result.map is not None]
        if maps:
            ranges[name] = heat_range(np.stack(maps), threshold(detector, name))
    return ranges


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
    batch: Annotated[int, typer.Option(min=1, help="Frames a call.")] = 8,
    json: Annotated[bool, typer.Option("--json", help="Summary as JSON on standard output.")] = False,
) -> None:
    """Judge every image file under FOLDER: one row a file with its verdict and score.

    Status: good, anomalous, invalid (no verdict possible), error (unreadable file), uncalibrated (score only). The
    result file stays whole when the job is stopped; the same command goes on with it. Exit codes: 0 all files have a
    row, 1 the job could not be done, 2 wrong usage, 130 interrupted.

    Examples: `flowad-inspect bundles/cells photos --overlays heat`,
    `flowad-inspect bundles/mvtec photos --class-from-folder --format jsonl`.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; {nearest(format, FORMATS)}")
    target = output or Path(f"inspection.{format}")
    from flowad_fast.data.images import find_images

    paths = find_images(folder)
    if overlays is not None and overlays.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--overlays {overlays} lies in {folder}, so the next run would judge overlays; move it out")

    import flowad_fast

    with common.err.status("loading the bundle"):
        detector = flowad_fast.load(bundle, engine=engine, device=device)
    classes = _classes(detector, folder, paths, class_name, class_from_folder)
    began = time.perf_counter()
    try:
        with ResultFile(target, format, bundle_identity(bundle), detector.engine, resume) as file:
            counts, scored = _run(detector, folder, paths, classes, file, overlays, batch, quiet=json)
    except OSError as error:
        raise FlowADError(f"{error.filename or target}: {error.strerror}; finished rows are kept, run again") from error
    seconds = time.perf_counter() - began
    if counts["uncalibrated"]:
        common.err.print(
            f"[yellow]uncalibrated:[/] {counts['uncalibrated']} files have a score but no verdict; calibrate on good "
            f"parts: flowad-export {bundle} --calibrate GOOD_FOLDER"
        )
    summary = {
        "bundle": str(bundle),
        "engine": detector.engine,
        "folder": str(folder),
        "output": str(target),
        "overlays": None if overlays is None else str(overlays),
        "files": len(paths),
        "from_earlier_runs": len(paths) - scored,
        "counts": {status: counts[status] for status in STATUSES},
        "seconds": round(seconds, 3),
    }
    common.print_json(summary) if json else _print_summary(summary)


def _run(
    detector: "Detector",
    folder: Path,
    paths: Sequence[Path],
    classes: Sequence[str] | None,
    file: ResultFile,
    overlays: Path | None,
    batch: int,
    quiet: bool,
) -> tuple[Counter[str], int]:
    """Judge the files that have no row yet; how many have each status now, and how many were judged."""
    names = [""] * len(paths) if classes is None else list(classes)
    done = {row["path"]: row for row in file.rows}
    for path, name in zip(paths, names, strict=True):
        if str(path) in done and done[str(path)]["class"] != name:
            raise ConfigError(
                f"{file.path}: has {path} as class {done[str(path)]['class']!r}, now it is {name!r}; choose another "
                "--output, or --restart to replace the file"
            )
    counts = Counter(done[str(path)]["status"] for path in paths if str(path) in done)
    left = [i for i, path in enumerate(paths) if str(path) not in done]
    draw = _drawing(detector, folder, paths, classes, overlays, file.bundle) if overlays and left else None
    with common.progress("inspecting", len(paths), quiet=quiet) as advance:
        advance(len(paths) - len(left))
        chosen = None if classes is None else [names[i] for i in left]
        for result in inspect_files(detector, [paths[i] for i in left], chosen, batch):
            if draw is not None:
                draw(result)
            file.append(result)
            counts[result.status] += 1
            advance(1)
    return counts, len(left)


def _drawing(
    detector: "Detector",
    folder: Path,
    paths: Sequence[Path],
    classes: Sequence[str] | None,
    overlays: Path,
    bundle: str,
) -> Callable[[Result], None]:
    """A function that writes a result's overlay, on the scale that the folder `overlays` has or is given now."""
    from PIL import Image

    from flowad_fast.evaluation.overlay import overlay

    known = _read_scale(overlays / SCALE, bundle)
    missing = [i for i in range(len(paths)) if (classes[i] if classes else "") not in known]
    new = heat_ranges(detector, [paths[i] for i in missing], [classes[i] for i in missing] if classes else None)
    ranges = {**known, **new}
    overlays.mkdir(parents=True, exist_ok=True)
    (overlays / SCALE).write_text(jsonlib.dumps({"bundle": bundle, "ranges": ranges}, indent=2) + "\n", "utf-8")

    def draw(result: Result) -> None:
        if result.frame is None or result.map is None:
            return
        place = overlays / result.path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        picture = overlay(result.frame, result.map, *ranges[result.class_name])
        Image.fromarray(picture).save(place.with_name(place.name + ".png"))

    return draw


def _read_scale(path: Path, bundle: str) -> Mapping[str, tuple[float, float]]:
    if not path.exists():
        return {}
    try:
        scale = jsonlib.loads(path.read_text(encoding="utf-8"))
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in scale["ranges"].items()}
        known = scale["bundle"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: is not the scale of overlays; remove it, or choose another --overlays") from None
    if known != bundle:
        raise ConfigError(
            f"{path.parent}: holds overlays of bundle {known}, this one is {bundle}; choose another --overlays"
        )
    return ranges


def _classes(
    detector: "Detector", folder: Path, paths: Sequence[Path], class_name: str | None, class_from_folder: bool
) -> list[str] | None:
    """The class of each file, None for unconditional bundles."""
    if class_name is not None and class_from_folder:
        raise ConfigError("got --class and --class-from-folder, expected one of them")
    if not detector.conditional:
        if class_name is not None or class_from_folder:
            raise ConfigError("the bundle is unconditional but a class was given; leave it out")
        return None
    valid = detector.classes.labels
    if class_from_folder:
        return [path.relative_to(folder).parts[0] for path in paths]
    if class_name is None:
        raise ConfigError(f"the bundle is conditional; give --class or --class-from-folder; {nearest('', valid)}")
    if class_name not in valid:
        raise ConfigError(f"class {class_name!r} is not in the bundle; {nearest(class_name, valid)}")
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
