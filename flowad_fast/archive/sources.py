"""What an archive holds: the photos of a folder, of a pattern, or of Parquet files with their paths or their bytes."""

import functools
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowad_fast.data.images import no_images
from flowad_fast.data.walk import Photos, find_photos, is_data, is_photo
from flowad_fast.errors import ConfigError, FrameError, nearest, require
from flowad_fast.evaluation.results import located

if TYPE_CHECKING:
    import pyarrow

_MAGIC = frozenset("*?[")
_SUFFIXES = (".parquet", ".pq")


class Cell(NamedTuple):
    """Where a photo's bytes are: a row of a row group of a Parquet file."""

    file: str
    row_group: int
    row: int
    column: str


class Photo(NamedTuple):
    """A photo of an archive.

    Attributes:
        path: as it was given; for bytes their name, or `FILE#ROW`.
        file: the same from the root on, see `results.Row`; `FILE#ROW` for bytes. No two photos share it.
        class_name: "" for unconditional bundles.
        cell: where its bytes are; None for a file.
    """

    path: str
    file: str
    class_name: str = ""
    cell: Cell | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of Parquet files: of paths or of bytes, of names for bytes, and of classes."""

    path: str | None = None
    bytes: str | None = None
    name: str | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class Archive:
    """Photos in a fixed order, and how many rows listed one again; the rest as `Photos` has it."""

    photos: tuple[Photo, ...]
    problems: tuple[tuple[Path, str], ...] = ()
    others: Counter[str] = field(default_factory=Counter)
    repeated: int = 0


def is_parquet(source: str) -> bool:
    """Whether a source is a Parquet file, or a folder that holds Parquet files and no photos."""
    if source.lower().endswith(_SUFFIXES) and os.path.isfile(source):
        return True
    return os.path.isdir(source) and bool(_parquet_files(source)) and not find_photos(Path(source)).paths


def is_glob(source: str) -> bool:
    """Whether a source is a pattern of file names; a folder whose name looks like one is a folder."""
    return bool(_MAGIC & set(source)) and not os.path.exists(source)


def read_source(source: str, columns: Columns, classes: Callable[[Sequence[Path]], list[str]]) -> Archive:
    """The photos of a source; `classes` gives those of files, and of Parquet files without a column of classes.

    Raises:
        FrameError: there is no photo, or no such place.
        ConfigError: columns that a Parquet file lacks, or that were given for something else.
    """
    if is_parquet(source):
        return _parquet(source, columns, classes)
    given = [name for name in ("path", "bytes", "name", "class_name") if getattr(columns, name)]
    if given:
        option = f"--{given[0].replace('class_name', 'class')}-column"
        raise ConfigError(f"{source}: is no Parquet, so {option} has no meaning; leave it out, or give a .parquet file")
    if is_glob(source):
        paths = sorted(Path(one) for one in glob.iglob(source, recursive=True) if _plain(one))
        if not paths:
            raise FrameError(f"{source}: no photo matches; quote the pattern, and use ** for folders at any depth")
        found = Photos(tuple(paths))
    else:
        found = find_photos(Path(source))
        if not found.paths and not found.problems:
            raise no_images(source, found)
    photos = tuple(_files([str(one) for one in found.paths], classes(found.paths)))
    return Archive(photos, found.problems, found.others)


def _plain(name: str) -> bool:
    path = Path(name)
    return is_photo(path) and is_data(path.name) and not path.is_dir()


def _files(paths: Sequence[str], names: Sequence[str]) -> Iterator[Photo]:
    for path, name in zip(paths, names, strict=True):
        yield Photo(path, _located(path), name)


def _located(path: str) -> str:
    """As `results.located`, with each folder looked up once."""
    return os.path.join(_folder(os.path.dirname(path)), os.path.basename(path))


@functools.lru_cache(1 << 16)
def _folder(folder: str) -> str:
    return os.path.dirname(located(Path(folder, "photo")))


def _parquet_files(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    names = (os.path.join(place, name) for place, _, files in os.walk(source) for name in files)
    return sorted(name for name in names if name.lower().endswith(_SUFFIXES) and is_data(os.path.basename(name)))


def _parquet(source: str, columns: Columns, classes: Callable[[Sequence[Path]], list[str]]) -> Archive:
    require("ray", "pyarrow", by="a Parquet source")
    if (columns.path is None) == (columns.bytes is None):
        raise ConfigError(
            f"{source}: give --path-column (of paths) or --bytes-column (of encoded photos), one of them; its columns: "
            f"{', '.join(_schema(_parquet_files(source)[0]).names)}"
        )
    if columns.name and columns.path:
        raise ConfigError("--name-column names photos of --bytes-column; paths are names already, so leave it out")
    known: dict[str, None] = {}
    photos: list[Photo] = []
    repeated = 0
    for file in _parquet_files(source):
        for photo in _rows(file, columns):
            if photo.file in known:
                repeated += 1
            else:
                known[photo.file] = None
                photos.append(photo)
    if not photos:
        raise FrameError(f"{source}: has no rows; expected a photo a row")
    if columns.class_name is None:
        names = classes([Path(one.path) for one in photos])
        photos = [one._replace(class_name=name) for one, name in zip(photos, names, strict=True)]
    return Archive(tuple(photos), repeated=repeated)


def _schema(file: str) -> "pyarrow.Schema":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as Parquet ({' '.join(str(error).split())})") from None


def _rows(file: str, columns: Columns) -> Iterator[Photo]:
    """The photos of one Parquet file; bytes are not read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(file)
    wanted = {"bytes": columns.bytes, "path": columns.path, "name": columns.name, "class": columns.class_name}
    for kind, column in wanted.items():
        if column is None:
            continue
        if column not in schema.names:
            raise ConfigError(f"{file}: has no column {column!r}; {nearest(column, schema.names)}")
        of = schema.field(column).type
        of = of.value_type if pa.types.is_dictionary(of) and kind != "bytes" else of
        tests = (pa.types.is_binary, pa.types.is_large_binary)
        if kind != "bytes":
            tests = (pa.types.is_string, pa.types.is_large_string)
        if not any(test(of) for test in tests):
            expected = "binary, the photo as it was encoded" if kind == "bytes" else "string"
            raise ConfigError(f"{file}: column {column!r} is {of}, expected {expected}")
    texts = [one for one in (columns.path, columns.name, columns.class_name) if one]
    here, number = os.path.realpath(file), 0
    with pq.ParquetFile(file, memory_map=False) as parquet:
        for group in range(parquet.num_row_groups):
            row = 0
            for line in _texts(parquet, group, texts):
                place = f"{here}#{number}"
                class_name = (line[columns.class_name] or "") if columns.class_name else ""
                if columns.bytes:
                    name = line.get(columns.name) if columns.name else None
                    cell = Cell(os.path.abspath(file), group, row, columns.bytes)
                    yield Photo(name or f"{file}#{number}", place, class_name, cell)
                elif columns.path and (path := line[columns.path]):
                    yield Photo(path, _located(path), class_name)
                else:
                    raise ConfigError(f"{file}: row {number} has no path in column {columns.path!r}; remove the row")
                row, number = row + 1, number + 1


def _texts(parquet: Any, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a row group with these columns alone, which may be none."""
    if not columns:
        yield from ({} for _ in range(parquet.metadata.row_group(group).num_rows))
        return
    for batch in parquet.iter_batches(8192, row_groups=[group], columns=columns):
        yield from batch.to_pylist()


class Cells:
    """Encoded photos out of Parquet files, one after the other; what was passed over is read, not kept."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._at: tuple[str, int, str] | None = None
        self._next = 0
        self._rows: Iterator[bytes | None] = iter(())

    def read(self, cell: Cell) -> bytes | None:
        """The bytes at a cell, None where it is empty.

        Raises:
            FrameError: the file cannot be read, or has no such row any more.
        """
        import pyarrow as pa

        at = (cell.file, cell.row_group, cell.column)
        try:
            if at != self._at or cell.row < self._next:
                self._at, self._next = at, 0
                self._rows = self._open(*at)
            while self._next < cell.row:
                next(self._rows)
                self._next += 1
            self._next += 1
            return next(self._rows)
        except (pa.ArrowException, OSError, StopIteration, KeyError, IndexError) as error:
            self._at = None
            reason = " ".join(str(error).split()) or "it has fewer rows now"
            raise FrameError(f"{cell.file}: cannot be read ({reason}); run again with the files complete") from None

    def _open(self, file: str, row_group: int, column: str) -> Iterator[bytes | None]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file, memory_map=False, buffer_size=1 << 20, pre_buffer=False) as parquet:
            for batch in parquet.iter_batches(self._batch, row_groups=[row_group], columns=[column]):
                for value in batch.column(0):
                    yield value.as_py()
