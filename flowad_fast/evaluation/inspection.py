"""Image files through a detector: read ahead, judged in as few calls as possible, in order; one bad file stops nothing.

`scan` is the loop under inspection, evaluation and calibration. The rest is what `flowad-inspect` is made of: the
result of each file, the file of results, and overlays on a scale that they share.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, cast, get_args

import filelock
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowad_fast.bundle import MANIFEST
from flowad_fast.data.images import Stamp, frame_bytes, read_frame, read_stamped, stamp
from flowad_fast.errors import CalibrationError, ConfigError, FlowADError, FrameError
from flowad_fast.evaluation.overlay import heat_range, overlay
from flowad_fast.files import make_folder, replacing
from flowad_fast.stages.decision import Verdict

if TYPE_CHECKING:
    from flowad_fast.detector import Detection, Detector

Status = Literal["good", "anomalous", "uncalibrated", "invalid", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
FORMATS = ("csv", "jsonl")
SCALE = "scale.json"
"""Beside overlays: the map values that are drawn as no heat and as most heat, by class."""
_SCALE_FRAMES = 16
_LONGEST_NAME = 251
"""Bytes of a photo's name to which `.png` can be added."""
WINDOW_BYTES = 64 << 20
"""Frames that are read, and judged, at a time take at most this much memory, unless a single one takes more."""

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


class StampedFiles(FrameFiles):
    """Image files that remember which content each had when it was read; None for what could not be."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.stamps: list[Stamp | None] = [None] * len(paths)

    def __getitem__(self, index: int) -> Frame:  # type: ignore[override]
        frame, self.stamps[index] = read_stamped(self.paths[index])
        if isinstance(frame, FrameError):
            raise frame
        return frame


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

    Each window of `batch` frames is judged in one call per frame size and class, while the next one is read; large
    frames make it shorter, see `WINDOW_BYTES`.

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
            given = list(group.values())
            try:
                detection = detector(given[0][None] if len(given) == 1 else np.stack(given), labels)
            except (FrameError, ConfigError) as error:
                found |= dict.fromkeys(group, error)
            else:
                found |= {i: Scanned(frame, detection, place) for place, (i, frame) in enumerate(group.items())}
        end = start + len(window)
        window.clear()
        groups.clear()
        yield from (found.pop(i) for i in range(start, end))
        start = end


def read_ahead(frames: Sequence[Frame], window: int, most: int = WINDOW_BYTES) -> Iterator[list[Frame | FrameError]]:
    """The frames, `window` at a time, each window read in threads while the caller is busy with the one before.

    A window ends before its frames take more than `most` bytes, which the headers of files tell in advance; it has one
    frame at least. In place of a frame that cannot be read stands its error.
    """
    with ThreadPoolExecutor(min(8, window), thread_name_prefix="flowad-read") as pool:
        sizes: deque[int] = deque()  # of the frames from `start` on
        start = 0

        def begin() -> list[Future[Frame | FrameError]]:
            nonlocal start
            # Headers are read here, not in the pool: it keeps as many threads, each with its heap, as frames need.
            sizes.extend(_bytes(frames, i) for i in range(start + len(sizes), min(start + window, len(frames))))
            reading: list[Future[Frame | FrameError]] = []
            total = 0
            while sizes and (not reading or total + sizes[0] <= most):
                total += sizes.popleft()
                reading.append(pool.submit(_read, frames, start))
                start += 1
            return reading

        ahead = begin()
        while ahead:
            ready, ahead = [future.result() for future in ahead], begin()
            yield ready


def _bytes(frames: Sequence[Frame], index: int) -> int:
    if isinstance(frames, FrameFiles):
        return frame_bytes(frames.paths[index])
    return frames[index].nbytes if isinstance(frames, np.ndarray) or type(frames) in (list, tuple) else 0


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
    None for errors; `map` is float32 (S, S), None for errors and invalid frames. `stamp` is the content that was
    judged, None where the file could not even be opened.
    """

    path: Path
    status: Status
    score: float | None = None
    class_name: str = ""
    reason: str = ""
    frame: Frame | None = field(default=None, repr=False)
    map: NDArray[np.float32] | None = field(default=None, repr=False)
    stamp: Stamp | None = None


def inspect_files(
    detector: "Detector", paths: Sequence[Path], classes: Sequence[str] | None = None, batch: int = 8
) -> Iterator[Result]:
    """Each file's result, in the order of `paths`; a file that cannot be judged gives a row, never an exception.

    `classes` has the class of each file, for conditional bundles; an unknown one makes an error row.
    """
    names = classes or [""] * len(paths)
    labels = [detector.classes.label(name) for name in names] if any(names) else None
    files = StampedFiles(paths)
    for i, one in enumerate(scan(detector, files, labels, batch)):
        if isinstance(one, FlowADError):
            yield Result(paths[i], "error", class_name=names[i], reason=_one_line(one), stamp=files.stamps[i])
        else:
            yield _result(paths[i], names[i], one, files.stamps[i])


def _result(path: Path, name: str, one: Scanned["Detection"], found: Stamp | None) -> Result:
    detection, i = one.detection, one.place
    if reason := detection.invalid[i]:
        return Result(path, "invalid", None, name, reason, one.frame, stamp=found)
    status: Status = "uncalibrated"
    score, reason = None, ""
    try:
        score = float(detection.score[i])
        status = "anomalous" if detection.verdict[i] is Verdict.ANOMALOUS else "good"
    except CalibrationError as error:
        # Without a calibration an aggregate of several terms has no score either.
        reason = _one_line(error) if score is None else ""
    return Result(path, status, score, name, reason, one.frame, detection.map[i], found)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


Row = TypedDict(
    "Row",
    {"path": str, "status": Status, "score": str | float | None, "class": str, "reason": str, "engine": str,
     "bundle": str, "file": str, "size": str | int | None, "mtime_ns": str | int | None, "sha256": str},
)  # fmt: skip
"""Of a result file. `score` is empty (null) where there is none, `bundle` names the manifest's hash.

`path` is the photo as it was given, `file` is the same from the root on, with links to folders followed; it says which
rows are about one photo. The rest says which content was judged (see `Stamp`), and is empty where none could be read.
"""
COLUMNS = tuple(Row.__annotations__)
_OLD_COLUMNS = COLUMNS[:7]
"""Of files of before; what such a row judged is not known, so its photo is judged again."""
_TEXTS = ("path", "class", "reason", "engine", "bundle", "file", "sha256")
_FORMULA = tuple("=+-@\t\r\n'")
"""Texts that begin so get a `'` before them in CSV, so that a spreadsheet takes none of them for a formula."""
_LONE = re.compile(r"[\ud800-\udfff]")
_ESCAPE = re.compile(r"\\((?:u005c)*)u(d[89a-f][0-9a-f]{2})")


class ResultFile(AbstractContextManager["ResultFile"]):
    """A CSV or JSONL file of results that is whole after every row, and goes on where it was left.

    A row that a kill or a full disk cut short is removed. No other run can write the file meanwhile. `rows` are those
    of earlier runs that stay; the others go when the first new row is written, not before.
    """

    def __init__(self, path: Path, format: str, bundle: str, engine: str = "", resume: bool = True) -> None:
        """Go on with the file, or start it (and its folder); `bundle` is a `bundle_identity`, `engine` is for the rows.

        Raises:
            ConfigError: the file holds something else, or rows of another bundle, is written by another run, or cannot
                be written.
        """
        self.path, self.format, self.bundle, self.engine = path, format, bundle, engine
        self._real = Path(os.path.realpath(path))  # a loop of links is no error here, opening it is one
        self._made = False
        if os.path.exists(self._real) and not self._real.is_file():
            raise ConfigError(f"{path}: is no plain file; choose another --output")
        make_folder(self._real.parent)
        self._lock = lock(self._real.with_name(f".{self._real.name}.lock"), f"{path}: another run is writing this file")
        try:
            self._open(resume)
        except OSError as error:
            if self._made:
                self._real.unlink(missing_ok=True)
            self._lock.release()
            raise ConfigError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None
        except BaseException:
            self._lock.release()
            raise

    def _open(self, resume: bool) -> None:
        self.rows: list[Row] = []
        self._made = not os.path.exists(self._real)
        self._replace = not self._made and not resume
        if not self._made and resume:
            self.rows, self._replace = _reopen(self._real, self.path, self.format)
        others = {row["bundle"] for row in self.rows} - {self.bundle}
        if others:
            raise ConfigError(
                f"{self.path}: holds rows of bundle {', '.join(sorted(others))}, this one is {self.bundle} (another "
                "model, scorer or calibration); choose another --output, or --restart to replace the file"
            )
        self._file = self._real.open("ab", buffering=0)
        self._end = self._file.tell()
        if self._end == 0:
            self._put(self._head())

    def done(self, files: Mapping[Path, str]) -> dict[Path, Status]:
        """The status of those of `files` (with their classes) that earlier runs judged, and that are as they were.

        A file of another content has to be judged again, and so has one that could not be opened; `rows` loses theirs.

        Raises:
            ConfigError: one was judged as another class.
        """
        rows = {row["file"]: row for row in self.rows}
        known = {path: rows[name] for path in files if (name := located(path)) in rows}
        with ThreadPoolExecutor(8, thread_name_prefix="flowad-hash") as pool:
            same = pool.map(_unchanged, known, known.values())
            found = {path: row for (path, row), one in zip(known.items(), same, strict=True) if one}
        for path, row in found.items():
            if row["class"] != files[path]:
                raise ConfigError(
                    f"{self.path}: has {path} as class {row['class']!r}, now it is {files[path]!r}; choose another "
                    "--output, or --restart to replace the file"
                )
        again = {located(path) for path in known.keys() - found.keys()}
        kept = [row for row in rows.values() if row["file"] not in again and not _looked_into(row)]
        self._replace |= len(kept) < len(self.rows)
        self.rows = kept
        return {path: row["status"] for path, row in found.items()}

    def append(self, result: Result) -> None:
        """Write one row; it has left the process when this returns.

        Raises:
            ConfigError: the disk is full, or refuses; the rows that were there are kept.
        """
        score = None if result.score is None else float(f"{result.score:.9g}")  # enough for any float32
        found = result.stamp
        row: Row = {
            "path": str(result.path), "status": result.status, "score": score, "class": result.class_name,
            "reason": result.reason, "engine": self.engine, "bundle": self.bundle, "file": located(result.path),
            "size": found.size if found else None, "mtime_ns": found.mtime_ns if found else None,
            "sha256": found.sha256 if found else "",
        }  # fmt: skip
        if self._replace:
            self._rewrite()
        try:
            self._put(_line(row, self.format))
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise ConfigError(
                f"{self.path}: cannot be written ({error.strerror}); finished rows are kept, free space and run again"
            ) from None

    def _head(self) -> bytes:
        return _csv_line(COLUMNS) if self.format == "csv" else b""

    def _rewrite(self) -> None:
        """Leave the rows that stay, in one step."""
        with replacing(self._real) as file:
            file.write(self._head() + b"".join(_line(row, self.format) for row in self.rows))
        self._file.close()
        self._file = self._real.open("ab", buffering=0)
        self._end, self._replace, self._made = self._file.tell(), False, False

    def _put(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            left = left[self._file.write(left) :]
        self._end += len(line)

    def __exit__(self, *_: object) -> None:
        if self._made and self._end == len(self._head()):  # nothing came of it
            with suppress(OSError):
                self._real.unlink()
        self._file.close()
        self._lock.release()


def lock(path: Path, taken: str) -> filelock.BaseFileLock:
    """An exclusive lock, which goes with the process; `taken` says what it means that another one has it.

    Raises:
        ConfigError: another process has it, or the folder cannot be written.
    """
    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"{taken} now; wait for it, or choose another place") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or "its file system has no locks"
        raise ConfigError(f"{path.parent}: cannot be written ({reason}); choose another folder") from None
    return held


def located(path: Path) -> str:
    """Where a photo is, from the root on. Its own name is kept: two links to one photo are two photos."""
    return str(path.parent.resolve() / path.name)


def _unchanged(path: Path, row: Row) -> bool:
    try:
        if not row["sha256"] or path.stat().st_size != int(row["size"] or 0):
            return False
    except OSError:
        return False
    found = stamp(path)
    return found is not None and found.sha256 == row["sha256"]


def _looked_into(row: Row) -> bool:
    """Whether a row is about a folder, which every run looks into anew."""
    return row["status"] == "error" and not row["sha256"] and os.path.isdir(row["file"])


def _line(row: Row, format: str) -> bytes:
    values = {name: _written(value) if isinstance(value, str) else value for name, value in row.items()}
    if format == "csv":
        cells = ("" if value is None else str(value) for value in values.values())
        return _csv_line([_cell(cell) if name in _TEXTS else cell for name, cell in zip(values, cells, strict=True)])
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _cell(text: str) -> str:
    return "'" + text if text.startswith(_FORMULA) else text


def _csv_line(cells: Iterable[str]) -> bytes:
    """One row; also what only some spreadsheets take for a separator is inside quotes."""
    quoted = ('"' + cell.replace('"', '""') + '"' if re.search(r'[,;"\t\r\n]', cell) else cell for cell in cells)
    return (",".join(quoted) + "\n").encode()


def _written(text: str) -> str:
    """`text` as valid Unicode: bytes of names that are not UTF-8 become escapes, and what looks like one is escaped."""
    text = _ESCAPE.sub(r"\\u005c\1u\2", text)
    return _LONE.sub(lambda found: f"\\u{ord(found[0]):x}", text)


def _read_text(text: str) -> str:
    """What `_written` was given."""
    return _ESCAPE.sub(lambda e: f"\\{e[1][5:]}u{e[2]}" if e[1] else chr(int(e[2], 16)), text)


def _reopen(path: Path, shown: Path, format: str) -> tuple[list[Row], bool]:
    """The whole rows of a result file, after cutting off a last row that is not whole; whether it is one of before."""
    data = path.read_bytes()
    kept = data[: data.rfind(b"\n") + 1]
    if format == "csv":
        while kept.count(b'"') % 2:  # the line end is inside a quoted field
            kept = kept[: kept.rfind(b"\n", 0, -1) + 1]
    refusal = ConfigError(f"{shown}: is no {format} result file of flowad-inspect; choose another --output or --format")
    begins = [_csv_line(COLUMNS), _csv_line(_OLD_COLUMNS)] if format == "csv" else [b'{"path": ']
    if not any(data[: len(begin)] == begin[: len(data)] for begin in begins):
        raise refusal
    try:
        text = kept.decode("utf-8", "surrogateescape")
        if format == "csv":
            found = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        else:
            found = [json.loads(line) for line in text.split("\n")[:-1]]
        rows = [_row(one, format) for one in found]
    except (ValueError, TypeError, AttributeError, OverflowError, OSError, RuntimeError, csv.Error):
        raise refusal from None
    if len(kept) != len(data):
        os.truncate(path, len(kept))
    before = any(tuple(one) == _OLD_COLUMNS for one in found) or (kept == begins[-1] and format == "csv")
    return rows, before


def _row(found: dict[str, Any], format: str) -> Row:
    """A row as it was written; ValueError, TypeError or AttributeError for what is none."""
    if tuple(found) == _OLD_COLUMNS:
        found = found | {"file": located(Path(found["path"])), "size": None, "mtime_ns": None, "sha256": ""}
    elif tuple(found) == COLUMNS:
        for name in _TEXTS:
            plain = found[name].removeprefix("'") if format == "csv" else found[name]
            found = found | {name: _read_text(plain)}
    else:
        raise ValueError("other columns")
    if found["status"] not in STATUSES or not all(isinstance(found[name], str) for name in _TEXTS):
        raise ValueError("no row")
    for name in ("score", "size", "mtime_ns"):
        if found[name] not in ("", None):
            float(found[name])
    if found["sha256"]:
        int(found["sha256"], 16), int(found["size"])
    return cast(Row, found)


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


class OverlayFolder(AbstractContextManager["OverlayFolder"]):
    """A folder for the overlays of one run at a time, which the constructor makes and locks.

    Raises:
        ConfigError: it cannot be written, another run has it, or it holds overlays of another bundle.
    """

    def __init__(self, folder: Path, bundle: str) -> None:
        self.folder, self.bundle = folder, bundle
        make_folder(folder)
        self._lock = lock(folder / ".lock", f"{folder}: another run is writing these overlays")
        try:
            self.ranges = _read_scale(folder / SCALE, bundle)
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def writer(self, detector: "Detector", root: Path, files: Mapping[Path, str]) -> Callable[[Result], None]:
        """A function that writes a result's overlay, as PNG, at the place that its file has below `root`.

        All overlays of a class share the scale that the folder has or, from `files` (with their classes), gets now.

        Raises:
            ConfigError: the scale, or later an overlay, cannot be written.
        """
        missing = [path for path, name in files.items() if name not in self.ranges]
        self._keep(heat_ranges(detector, missing, [files[path] for path in missing]))

        def write(result: Result) -> None:
            if result.frame is None or result.map is None:
                return
            if (name := result.class_name) not in self.ranges:  # none of the files that were tried could be scored
                self._keep({name: heat_range(result.map, threshold(detector, name))})
            place = self._place(result.path.relative_to(root))
            picture = io.BytesIO()
            Image.fromarray(overlay(result.frame, result.map, *self.ranges[name])).save(picture, "PNG")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(picture.getbuffer())
            except OSError as error:
                with suppress(OSError):
                    place.unlink()
                raise ConfigError(
                    f"{place}: cannot be written ({error.strerror}); finished rows are kept, free space and run again"
                ) from None

        return write

    def _keep(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.ranges |= ranges
        scale = {"bundle": self.bundle, "ranges": {_written(name): one for name, one in self.ranges.items()}}
        with replacing(self.folder / SCALE) as file:
            file.write(json.dumps(scale, indent=2).encode() + b"\n")

    def _place(self, path: Path) -> Path:
        name = os.fsencode(path.name)
        short = path.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()
        return self.folder / path.parent / f"{short}.png"


def _read_scale(path: Path, bundle: str) -> dict[str, tuple[float, float]]:
    if not os.path.exists(path):
        return {}
    try:
        scale = json.loads(path.read_text(encoding="utf-8"))
        ranges = {_read_text(name): (float(low), float(high)) for name, (low, high) in scale["ranges"].items()}
        known = scale["bundle"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path}: is not the scale of overlays; remove it, or choose another --overlays") from None
    if known != bundle:
        raise ConfigError(
            f"{path.parent}: holds overlays of bundle {known}, this one is {bundle}; choose another --overlays"
        )
    return ranges
