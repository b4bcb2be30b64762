"""Image files through a detector: read ahead, judged in as few calls as possible, in order; one bad file stops nothing.

`scan` is the loop under inspection, evaluation and calibration. The rest is what `flowad-inspect` is made of: the
result of each file, the file of results, and overlays on a scale that they share.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypedDict, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowad_fast.bundle import MANIFEST
from flowad_fast.data.images import read_frame
from flowad_fast.errors import CalibrationError, ConfigError, FlowADError, FrameError
from flowad_fast.evaluation.overlay import heat_range, overlay
from flowad_fast.files import replacing
from flowad_fast.stages.decision import Verdict

if TYPE_CHECKING:
    from flowad_fast.detector import Detection, Detector

Status = Literal["good", "anomalous", "uncalibrated", "invalid", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
FORMATS = ("csv", "jsonl")
SCALE = "scale.json"
"""Beside overlays: the map values that are drawn as no heat and as most heat, by class."""
_SCALE_FRAMES = 16

Frame = NDArray[np.uint8]
_Class = TypeVar("_Class")
_Detection = TypeVar("_Detection")


class FrameFiles(Sequence[Frame]):
    """Image files as a sequence of frames that are read when asked for, since a camera's parts fill memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Frame:  # type: ignore[override]
        return read_frame(self.paths[index])


@dataclass(frozen=True)
class Scanned(Generic[_Detection]):
    """A frame (H, W, 3) uint8 and the detection of the call that it was part of, as its frame number `place`."""

    frame: Frame
    detection: _Detection
    place: int


def scan(
    detector: Callable[[Frame, list[_Class] | None], _Detection],
    frames: Sequence[Frame],
    classes: Sequence[_Class] | None = None,
    batch: int = 8,
) -> Iterator[Scanned[_Detection] | FlowADError]:
    """What becomes of each frame, in order: its detection, or the error of a file or frame that has none.

    Each window of `batch` frames is judged in one call per frame size and class, while the next one is read.

    Args:
        detector: a `Detector`, or anything that is called like one.
        frames: arrays, or `FrameFiles`.
        classes: the class of each frame, as the detector takes it; None for an unconditional one.
        batch: frames per call, at most.
    """
    start = 0
    for window in read_ahead(frames, batch):
        found: dict[int, Scanned[_Detection] | FlowADError] = {}
        groups: dict[tuple[tuple[int, ...], _Class | None], dict[int, Frame]] = {}
        for i, frame in enumerate(window, start):
            if isinstance(frame, FrameError):
                found[i] = frame
            else:
                groups.setdefault((frame.shape, classes[i] if classes is not None else None), {})[i] = frame
        for group in groups.values():
            labels = None if classes is None else [classes[i] for i in group]
            try:
                detection = detector(np.stack(list(group.values())), labels)
            except (FrameError, ConfigError) as error:
                found |= dict.fromkeys(group, error)
            else:
                found |= {i: Scanned(frame, detection, place) for place, (i, frame) in enumerate(group.items())}
        yield from (found[i] for i in range(start, start + len(window)))
        start += len(window)


def read_ahead(frames: Sequence[Frame], window: int) -> Iterator[list[Frame | FrameError]]:
    """The frames, `window` at a time, each window read in threads while the caller is busy with the one before.

    In place of a frame that cannot be read stands its error.
    """
    with ThreadPoolExecutor(min(8, window), thread_name_prefix="flowad-read") as pool:
        reading = (pool.submit(_read, frames, i) for i in range(len(frames)))
        ahead = list(islice(reading, window))
        while ahead:
            ready, ahead = [future.result() for future in ahead], list(islice(reading, window))
            yield ready


def _read(frames: Sequence[Frame], index: int) -> Frame | FrameError:
    try:
        return frames[index]
    except FrameError as error:
        return error
    except OSError as error:
        return FrameError(str(error))


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
    frame: Frame | None = field(default=None, repr=False)
    map: NDArray[np.float32] | None = field(default=None, repr=False)


def inspect_files(
    detector: "Detector", paths: Sequence[Path], classes: Sequence[str] | None = None, batch: int = 8
) -> Iterator[Result]:
    """Each file's result, in the order of `paths`; a file that cannot be judged gives a row, never an exception.

    `classes` has the class of each file, for conditional bundles; an unknown one makes an error row.
    """
    names = classes or [""] * len(paths)
    labels = [detector.classes.label(name) for name in names] if any(names) else None
    for path, name, one in zip(paths, names, scan(detector, FrameFiles(paths), labels, batch), strict=True):
        if isinstance(one, FlowADError):
            yield Result(path, "error", class_name=name, reason=_one_line(one))
        else:
            yield _result(path, name, one)


def _result(path: Path, name: str, one: Scanned["Detection"]) -> Result:
    detection, i = one.detection, one.place
    if reason := detection.invalid[i]:
        return Result(path, "invalid", None, name, reason, one.frame)
    status: Status = "uncalibrated"
    score, reason = None, ""
    try:
        score = float(detection.score[i])
        status = "anomalous" if detection.verdict[i] is Verdict.ANOMALOUS else "good"
    except CalibrationError as error:
        # Without a calibration an aggregate of several terms has no score either.
        reason = _one_line(error) if score is None else ""
    return Result(path, status, score, name, reason, one.frame, detection.map[i])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


Row = TypedDict(
    "Row",
    {"path": str, "status": Status, "score": str | float | None, "class": str, "reason": str, "engine": str,
     "bundle": str},
)  # fmt: skip
"""Of a result file; `score` is empty (null) where there is none, `bundle` names the manifest's hash."""
COLUMNS = tuple(Row.__annotations__)


class ResultFile(AbstractContextManager["ResultFile"]):
    """A CSV or JSONL file of results that is whole after every row, and goes on where it was left.

    A row that a kill cut short is removed when the file is opened again. `rows` are those of earlier runs.
    """

    def __init__(self, path: Path, format: str, bundle: str, engine: str, resume: bool = True) -> None:
        """Go on with the file, or start it (and its folder); `bundle` is a `bundle_identity`, `engine` is for the rows.

        Raises:
            ConfigError: the file holds something else, or rows of another bundle.
        """
        self.path, self.format, self.bundle, self.engine = path, format, bundle, engine
        self.rows = _reopen(path, format) if resume and path.exists() else []
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

    def done(self, files: Mapping[Path, str]) -> dict[Path, Status]:
        """The status of those of `files` (with their classes) that earlier runs judged.

        Raises:
            ConfigError: one was judged as another class.
        """
        rows = {row["path"]: row for row in self.rows}
        found = {path: rows[str(path)] for path in files if str(path) in rows}
        for path, row in found.items():
            if row["class"] != files[path]:
                raise ConfigError(
                    f"{self.path}: has {path} as class {row['class']!r}, now it is {files[path]!r}; choose another "
                    "--output, or --restart to replace the file"
                )
        return {path: row["status"] for path, row in found.items()}

    def append(self, result: Result) -> None:
        """Write one row; it has left the process when this returns."""
        score = None if result.score is None else float(f"{result.score:.9g}")  # enough for any float32
        values = (str(result.path), result.status, score, result.class_name, result.reason, self.engine, self.bundle)
        if self.format == "csv":
            self._put(_csv_line(["" if value is None else str(value) for value in values]))
        else:
            self._put(json.dumps(dict(zip(COLUMNS, values, strict=True)), allow_nan=False) + "\n")

    def _put(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _csv_line(values: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _reopen(path: Path, format: str) -> list[Row]:
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
        lines = csv.DictReader(io.StringIO(text, newline=""), strict=True) if format == "csv" else text.splitlines()
        rows = [json.loads(line) if isinstance(line, str) else line for line in lines]
    except (ValueError, csv.Error):
        raise refusal from None
    if any(tuple(row) != COLUMNS or row["status"] not in STATUSES for row in rows):
        raise refusal
    if len(kept) != len(data):
        os.truncate(path, len(kept))
    return cast(list[Row], rows)


def bundle_identity(bundle: Path) -> str:
    """The first 12 hex digits of the manifest's SHA-256: model, scorer, aggregate, engines' hashes and calibration."""
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
    of_class: dict[str, list[Path]] = {}
    for path, name in zip(paths, classes or [""] * len(paths), strict=True):
        of_class.setdefault(name, []).append(path)
    ranges = {}
    for name, files in of_class.items():
        count = min(len(files), _SCALE_FRAMES)
        chosen = [files[i * len(files) // count] for i in range(count)]
        maps = [one.map for one in inspect_files(detector, chosen, [name] * count) if one.map is not None]
        if maps:
            ranges[name] = heat_range(np.stack(maps), threshold(detector, name))
    return ranges


def overlay_writer(
    detector: "Detector", root: Path, files: Mapping[Path, str], folder: Path, bundle: str
) -> Callable[[Result], None]:
    """A function that writes a result's overlay to `folder`, as PNG, at the place that its file has below `root`.

    All overlays of a class share the scale that the folder has or, from `files` (with their classes), is given now.

    Raises:
        ConfigError: the folder holds overlays of another bundle.
    """
    ranges = _read_scale(folder / SCALE, bundle)
    missing = [path for path, name in files.items() if name not in ranges]
    ranges |= heat_ranges(detector, missing, [files[path] for path in missing])
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SCALE) as file:
        file.write(json.dumps({"bundle": bundle, "ranges": ranges}, indent=2).encode() + b"\n")

    def write(result: Result) -> None:
        if result.frame is None or result.map is None:
            return
        place = folder / result.path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        picture = overlay(result.frame, result.map, *ranges[result.class_name])
        Image.fromarray(picture).save(place.with_name(place.name + ".png"))

    return write


def _read_scale(path: Path, bundle: str) -> dict[str, tuple[float, float]]:
    if not path.exists():
        return {}
    try:
        scale = json.loads(path.read_text(encoding="utf-8"))
        ranges = {str(name): (float(low), float(high)) for name, (low, high) in scale["ranges"].items()}
        known = scale["bundle"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: is not the scale of overlays; remove it, or choose another --overlays") from None
    if known != bundle:
        raise ConfigError(
            f"{path.parent}: holds overlays of bundle {known}, this one is {bundle}; choose another --overlays"
        )
    return ranges
