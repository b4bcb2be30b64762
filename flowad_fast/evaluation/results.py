"""The result of each inspected file, and the file of results: whole after every row, goes on where it was left."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast, get_args

import filelock
import numpy as np
from numpy.typing import NDArray

from flowad_fast.bundle import MANIFEST
from flowad_fast.data.images import Stamp, stamp
from flowad_fast.errors import ConfigError
from flowad_fast.evaluation.scanning import Frame
from flowad_fast.files import make_folder, replacing
from flowad_fast.stages.regions import Region

Status = Literal["good", "anomalous", "uncalibrated", "invalid", "error"]
STATUSES: tuple[Status, ...] = get_args(Status)
FORMATS = ("csv", "jsonl")


@dataclass(frozen=True)
class Result:
    """What became of one image file.

    `status` is the verdict, or `uncalibrated` where the bundle has a score but no threshold for the class; `invalid`
    frames and files that could not be read (`error`) have no score, and `reason` says why. `frame` is uint8 (H, W, 3),
    None for errors; `map` is float32 (h, w), None for errors and invalid frames. `stamp` is the content that was
    judged, None where the file could not even be opened. `regions` is None where they cannot be told: for errors and
    invalid frames, and without a pixel threshold. `judged` are the cells of the map that count, None for all.
    """

    path: Path
    status: Status
    score: float | None = None
    class_name: str = ""
    reason: str = ""
    frame: Frame | None = field(default=None, repr=False)
    map: NDArray[np.float32] | None = field(default=None, repr=False)
    stamp: Stamp | None = None
    regions: tuple[Region, ...] | None = field(repr=False, default=None)
    judged: NDArray[np.bool_] | None = field(repr=False, default=None)


class RegionRow(TypedDict):
    """A `Region` in a result file; in CSV, where `regions` is JSON inside a cell, without its contour."""

    box: Sequence[int]
    area: float
    peak: float
    severity: str
    contour: NotRequired[Sequence[Sequence[int]]]


Row = TypedDict(
    "Row",
    {"path": str, "status": Status, "score": str | float | None, "class": str, "reason": str, "engine": str,
     "bundle": str, "file": str, "size": str | int | None, "mtime_ns": str | int | None, "sha256": str,
     "regions": str | list[RegionRow] | None},
)  # fmt: skip
"""Of a result file. `score` is empty (null) where there is none, `bundle` names the manifest's hash.

`path` is the photo as it was given, `file` is the same from the root on, with links to folders followed; it says which
rows are about one photo. The next three say which content was judged (see `Stamp`), and are empty where none could be
read. `regions` is empty (null) where they cannot be told; none found is an empty list.
"""
COLUMNS = tuple(Row.__annotations__)
_WITHOUT_REGIONS = COLUMNS[:11]
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
            same = pool.map(unchanged, known, known.values())
            found = {path: row for (path, row), one in zip(known.items(), same, strict=True) if one}
        for path, row in found.items():
            if row["class"] != files[path]:
                raise ConfigError(
                    f"{self.path}: has {path} as class {row['class']!r}, now it is {files[path]!r}; choose another "
                    "--output, or --restart to replace the file"
                )
        again = {located(path) for path in known.keys() - found.keys()}
        kept = [row for row in rows.values() if row["file"] not in again and not looked_into(row)]
        self._replace |= len(kept) < len(self.rows)
        self.rows = kept
        return {path: row["status"] for path, row in found.items()}

    def append(self, result: Result) -> None:
        """Write one row; it has left the process when this returns.

        Raises:
            ConfigError: the disk is full, or refuses; the rows that were there are kept.
        """
        row = row_of(result, self.engine, self.bundle)
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


def row_of(result: Result, engine: str, bundle: str) -> Row:
    """The row of a result; `engine` judged it, with the bundle of this identity."""
    score = None if result.score is None else float(f"{result.score:.9g}")  # enough for any float32
    found = result.stamp
    return {
        "path": str(result.path), "status": result.status, "score": score, "class": result.class_name,
        "reason": result.reason, "engine": engine, "bundle": bundle, "file": located(result.path),
        "size": found.size if found else None, "mtime_ns": found.mtime_ns if found else None,
        "sha256": found.sha256 if found else "",
        "regions": None if result.regions is None else [_region(one) for one in result.regions],
    }  # fmt: skip


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


def unchanged(path: Path, row: Mapping[str, Any] | Row) -> bool:
    """Whether a photo has the content that a row, of which `size` and `sha256` count, was about."""
    try:
        if not row["sha256"] or path.stat().st_size != int(row["size"] or 0):
            return False
    except OSError:
        return False
    found = stamp(path)
    return found is not None and found.sha256 == row["sha256"]


def looked_into(row: Mapping[str, Any] | Row) -> bool:
    """Whether a row is about a folder, which every run looks into anew."""
    return row["status"] == "error" and not row["sha256"] and os.path.isdir(row["file"])


def _region(region: Region) -> RegionRow:
    return {
        "box": region.box,
        "area": float(f"{region.area:.9g}"),
        "peak": float(f"{region.peak:.9g}"),
        "severity": region.severity,
        "contour": region.contour,
    }


def _short(regions: list[RegionRow]) -> str:
    """As a cell: a spreadsheet's cell has no room for contours."""
    return json.dumps([{k: v for k, v in one.items() if k != "contour"} for one in regions], ensure_ascii=False)


def _line(row: Row, format: str) -> bytes:
    if format == "csv" and isinstance(row["regions"], list):
        row = row | {"regions": _short(row["regions"])}
    values = {name: written(value) if isinstance(value, str) else value for name, value in row.items()}
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


def written(text: str) -> str:
    """`text` as valid Unicode: bytes of names that are not UTF-8 become escapes, and what looks like one is escaped."""
    text = _ESCAPE.sub(r"\\u005c\1u\2", text)
    return _LONE.sub(lambda found: f"\\u{ord(found[0]):x}", text)


def read_text(text: str) -> str:
    """What `written` was given."""
    return _ESCAPE.sub(lambda e: f"\\{e[1][5:]}u{e[2]}" if e[1] else chr(int(e[2], 16)), text)


def _reopen(path: Path, shown: Path, format: str) -> tuple[list[Row], bool]:
    """The whole rows of a result file, after cutting off a last row that is not whole; whether it is one of before."""
    data = path.read_bytes()
    kept = data[: data.rfind(b"\n") + 1]
    if format == "csv":
        while kept.count(b'"') % 2:  # the line end is inside a quoted field
            kept = kept[: kept.rfind(b"\n", 0, -1) + 1]
    refusal = ConfigError(f"{shown}: is no {format} result file of flowad-inspect; choose another --output or --format")
    begins = (
        [_csv_line(one) for one in (COLUMNS, _WITHOUT_REGIONS, _OLD_COLUMNS)] if format == "csv" else [b'{"path": ']
    )
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
    before = any(tuple(one) != COLUMNS for one in found) or (format == "csv" and kept in begins[1:])
    return rows, before


def _row(found: dict[str, Any], format: str) -> Row:
    """A row as it was written; ValueError, TypeError or AttributeError for what is none."""
    if tuple(found) == _OLD_COLUMNS:
        found = found | {"file": located(Path(found["path"])), "size": None, "mtime_ns": None, "sha256": ""}
    elif tuple(found) in (COLUMNS, _WITHOUT_REGIONS):
        for name in _TEXTS:
            plain = found[name].removeprefix("'") if format == "csv" else found[name]
            found = found | {name: read_text(plain)}
    else:
        raise ValueError("other columns")
    if found["status"] not in STATUSES or not all(isinstance(found[name], str) for name in _TEXTS):
        raise ValueError("no row")
    for name in ("score", "size", "mtime_ns"):
        if found[name] not in ("", None):
            float(found[name])
    found = {"regions": None} | found if len(found) < len(COLUMNS) else found
    regions = found["regions"]
    if format == "csv" and regions:
        regions = json.loads(read_text(regions))
        found = found | {"regions": read_text(found["regions"])}
    if regions not in ("", None) and not (isinstance(regions, list) and all(isinstance(one, dict) for one in regions)):
        raise ValueError("no regions")
    json.dumps(regions, allow_nan=False)  # so that it can be written again
    if found["sha256"]:
        int(found["sha256"], 16), int(found["size"])
    return cast(Row, {name: found[name] for name in COLUMNS})


def bundle_identity(bundle: Path) -> str:
    """The first 12 hex digits of the manifest's SHA-256: model, scorer, aggregate, engines' hashes and calibration."""
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()[:12]
