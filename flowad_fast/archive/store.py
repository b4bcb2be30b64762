"""A folder of result rows in Parquet: each part whole or absent, one row per photo when the job is done."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowad_fast.errors import ConfigError, require
from flowad_fast.evaluation.results import COLUMNS, STATUSES, Row, Status, lock, looked_into, written
from flowad_fast.files import make_folder, replacing

if TYPE_CHECKING:
    import pyarrow

DONE = "_done.json"
"""Beside the parts: the summary of the last run that came to its end; absent while one is at work."""


class Known(NamedTuple):
    """What an earlier run wrote of a photo, and the part that has it."""

    status: Status
    class_name: str
    size: int | None
    sha256: str
    part: str


def schema() -> "pyarrow.Schema":
    """The columns of a part: those of `flowad-inspect`'s JSON lines."""
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    region = pa.struct(
        {
            "box": pa.list_(whole),
            "area": pa.float64(),
            "peak": pa.float64(),
            "severity": text,
            "contour": pa.list_(pa.list_(whole)),
        }
    )
    types = {"score": pa.float64(), "size": whole, "mtime_ns": whole, "regions": pa.list_(region)}
    return pa.schema([(name, types.get(name, text)) for name in COLUMNS])


class PartFolder(AbstractContextManager["PartFolder"]):
    """A folder of parts that one run at a time writes. A part is never half written.

    A row that replaces one of an earlier run is written first, and the earlier one removed by `finish`; should the run
    be killed in between, the row of the later part counts.

    Attributes:
        known: what earlier runs wrote, by `Row.file`.
    """

    def __init__(self, folder: Path, bundle: str, resume: bool = True) -> None:
        """Go on with the folder, or make it; `bundle` is a `bundle_identity`.

        Raises:
            ConfigError: it holds something else, or rows of another bundle, is written by another run, or cannot be
                written.
        """
        require("ray", "pyarrow", by="Parquet")
        self.folder, self.bundle = folder, bundle
        if os.path.lexists(folder) and not folder.is_dir():
            raise ConfigError(f"{folder}: is no folder; choose another --output")
        make_folder(folder)
        self._lock = lock(folder / ".lock", f"{folder}: another run is writing this folder")
        try:
            self._open(resume)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, resume: bool) -> None:
        for left in self.folder.glob("*.part"):
            left.unlink()
        parts = sorted(self.folder.glob("part-*.parquet"))
        others = {one.name for one in self.folder.glob("*.parquet")} - {one.name for one in parts}
        if others:
            raise ConfigError(f"{self.folder}: holds {min(others)}, which no inspection wrote; choose another --output")
        self._next = 1 + max((self._number(one) for one in parts), default=0)
        self._remove = [] if resume else parts
        self.known: dict[str, Known] = {}
        self._stale: dict[str, set[str]] = {}
        for part in parts if resume else ():
            for row in self._read(part):
                if looked_into(row):
                    self._stale.setdefault(part.name, set()).add(row["file"])
                    continue
                self._forget(row["file"])
                size = None if row["size"] is None else int(row["size"])
                self.known[row["file"]] = Known(row["status"], row["class"], size, row["sha256"], part.name)

    def _number(self, part: Path) -> int:
        number = part.name.removeprefix("part-").removesuffix(".parquet")
        if not number.isdecimal():
            raise ConfigError(f"{part}: is no part that an inspection wrote; choose another --output")
        return int(number)

    def _read(self, part: Path) -> Iterable[dict[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = ["file", "status", "class", "size", "sha256", "bundle"]
        try:
            with pq.ParquetFile(part) as file:
                if tuple(file.schema_arrow.names) != COLUMNS:
                    raise ConfigError(f"{part}: has other columns than an inspection writes; choose another --output")
                rows: list[dict[str, Any]] = file.read(columns).to_pylist()
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{part}: cannot be read ({reason}); remove it, and its photos are judged again"
            ) from None
        for row in rows:
            if row["status"] not in STATUSES:
                raise ConfigError(f"{part}: is no part that an inspection wrote; choose another --output")
            if row["bundle"] != self.bundle:
                raise ConfigError(
                    f"{self.folder}: holds rows of bundle {row['bundle']}, this one is {self.bundle} (another model, "
                    "scorer or calibration); choose another --output, or --restart to replace the rows"
                )
        return rows

    def _forget(self, file: str) -> None:
        before = self.known.pop(file, None)
        if before is not None:
            self._stale.setdefault(before.part, set()).add(file)

    def begin(self) -> None:
        """Say that the folder is not complete any more."""
        with suppress(FileNotFoundError):
            (self.folder / DONE).unlink()

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows as one part, whole or not at all; earlier rows of their photos count no longer.

        Raises:
            ConfigError: it cannot be written; the parts that were there are kept.
        """
        name = f"part-{self._next:06d}.parquet"
        self._write(name, [_plain(row) for row in rows])
        self._next += 1
        for old in self._remove:
            old.unlink()
        self._remove = []
        for row in rows:
            file = written(row["file"])
            self._forget(file)
            size = None if row["size"] is None else int(row["size"])
            self.known[file] = Known(row["status"], row["class"], size, row["sha256"], name)

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(list(rows), schema=schema())
        with replacing(self.folder / name) as file:
            pq.write_table(table, file, compression="zstd")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Remove rows that later ones replaced, and write `DONE`: the summary and the count of all rows.

        Raises:
            ConfigError: the folder cannot be written.
        """
        import pyarrow.parquet as pq

        for name, stale in self._stale.items():
            part = self.folder / name
            kept = [row for row in pq.read_table(part, schema=schema()).to_pylist() if row["file"] not in stale]
            if kept:
                self._write(name, kept)
            else:
                part.unlink()
        self._stale = {}
        text = {"rows": len(self.known), "parts": len(list(self.folder.glob("part-*.parquet")))}
        with replacing(self.folder / DONE) as file:
            file.write(json.dumps({**summary, **text}, indent=2).encode() + b"\n")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _plain(row: Row) -> dict[str, Any]:
    """A row for Parquet, whose texts are Unicode; see `results.written`."""
    return {name: written(value) if isinstance(value, str) else value for name, value in row.items()}
