"""The photos of an archive judged by workers, row by row what `flowad-inspect` writes of the same photos."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import flowad_fast
from flowad_fast.archive import cluster
from flowad_fast.archive.sources import Cells, Photo
from flowad_fast.archive.store import PartFolder
from flowad_fast.archive.worker import LOST, Task
from flowad_fast.data.images import Stamp, stamp
from flowad_fast.errors import BundleError, ConfigError, FrameError
from flowad_fast.evaluation.inspection import inspect_files
from flowad_fast.evaluation.results import Result, Row, bundle_identity, row_of, unchanged, written

if TYPE_CHECKING:
    from flowad_fast.detector import Detector
    from flowad_fast.engines import Mode

CALLS = 32
"""Calls of the detector in a group, at most: what is judged again when a worker dies, and a part of the result."""


class Before(NamedTuple):
    """The content that an earlier run judged."""

    size: int
    sha256: str


class Item(NamedTuple):
    """A photo, and what is known of it."""

    photo: Photo
    before: Before | None


@dataclass
class Inspection(Task[Item, Row | None]):
    """Rows of photos; None for one that has the content of its earlier row.

    A photo is judged with those that `flowad-inspect` would judge in the same call, as far as they have no row.

    Attributes:
        bundle: its folder.
        identity: the bundle must have it.
        engine: see `load`.
        device: see `load`.
        batch: photos per call.
        mode: see `load`.
    """

    bundle: str
    identity: str
    engine: str
    device: str
    batch: int
    mode: "Mode | None" = None

    def open(self) -> None:
        """Load the bundle."""
        self._detector: Detector = flowad_fast.load(self.bundle, engine=self.engine, device=self.device, mode=self.mode)
        if bundle_identity(Path(self.bundle)) != self.identity:
            raise BundleError(f"{self.bundle}: the bundle was replaced while it was being loaded; run again")
        self._cells = Cells(self.batch)

    def judge(self, items: Sequence[Item]) -> list[Row | None]:
        """See `Task.judge`."""
        if all(one.before is None and one.photo.cell is None for one in items):
            return list(self._files([one.photo for one in items]))
        # In calls as those of a run over all photos, whichever of them are left.
        return [row for at in range(0, len(items), self.batch) for row in self._call(items[at : at + self.batch])]

    def lost(self, item: Item) -> Row:
        """See `Task.lost`."""
        photo = item.photo
        result = Result(Path(photo.path), "error", class_name=photo.class_name, reason=LOST)
        if photo.cell is None:
            return self._row(photo, replace(result, stamp=stamp(Path(photo.path))))
        return self._row(photo, replace(result, stamp=_stamp(self._cells.read(photo.cell))))

    def _call(self, items: Sequence[Item]) -> Iterator[Row | None]:
        with tempfile.TemporaryDirectory(prefix="flowad-archive-") as place:
            rows: dict[int, Row] = {}
            left: dict[int, Path] = {}
            found: dict[int, Stamp] = {}
            for i, (photo, before) in enumerate(items):
                if photo.cell is None:
                    left |= {} if before and unchanged(Path(photo.path), before._asdict()) else {i: Path(photo.path)}
                    continue
                try:
                    content = self._cells.read(photo.cell)
                except FrameError as error:
                    rows[i] = self._row(photo, _error(photo, str(error)))
                    continue
                if content is None:
                    rows[i] = self._row(photo, _error(photo, f"{photo.path}: has no bytes; expected an encoded photo"))
                    continue
                found[i] = Stamp(len(content), 0, hashlib.sha256(content).hexdigest()[:16])
                if before is None or before != Before(found[i].size, found[i].sha256):
                    left[i] = Path(place, str(i))
                    left[i].write_bytes(content)
            results = inspect_files(
                self._detector, list(left.values()), [items[i].photo.class_name for i in left], self.batch
            )
            for i, result in zip(left, results, strict=True):
                photo = items[i].photo
                if photo.cell is not None:
                    reason = result.reason.replace(str(left[i]), photo.path)
                    result = replace(result, path=Path(photo.path), reason=reason, stamp=found[i])
                rows[i] = self._row(photo, result)
            yield from (rows.get(i) for i in range(len(items)))

    def _files(self, photos: Sequence[Photo]) -> Iterator[Row]:
        paths, names = [Path(one.path) for one in photos], [one.class_name for one in photos]
        for photo, result in zip(photos, inspect_files(self._detector, paths, names, self.batch), strict=True):
            yield self._row(photo, result)

    def _row(self, photo: Photo, result: Result) -> Row:
        row = row_of(result, self._detector.engine, self.identity)
        if photo.cell is not None:
            row["file"], row["path"], row["mtime_ns"] = photo.file, photo.path, None
        return row


def _error(photo: Photo, reason: str) -> Result:
    return Result(Path(photo.path), "error", class_name=photo.class_name, reason=reason)


def _stamp(content: bytes | None) -> Stamp | None:
    return None if content is None else Stamp(len(content), 0, hashlib.sha256(content).hexdigest()[:16])


def judge(
    photos: Sequence[Photo],
    folder: PartFolder,
    task: Inspection,
    workers: cluster.Workers,
    progress: Callable[[int], object] = lambda n: None,
) -> Iterator[tuple[Photo, Row | None]]:
    """Judge what has no row yet; each photo with its new row, which is in `folder` by then, or None for an earlier one.

    Args:
        photos: of the archive, all of them: their order says which are judged in one call.
        folder: of the rows.
        task: what workers do.
        workers: where they run.
        progress: is called with the number of photos that are done since.

    Raises:
        ConfigError: an earlier row has a photo as another class, or a part cannot be written.
        FlowADError: the job cannot go on; whole parts are kept.
    """
    items = [_item(photo, folder) for photo in photos]
    with cluster.connected(workers, by="flowad-inspect --ray") as room:
        groups = cluster.groups_of(items, task.batch, room, CALLS)
        folder.begin()
        for number, rows in cluster.run(task, groups, workers, room):
            if new := [row for row in rows if row is not None]:
                folder.append(new)
            progress(len(rows))
            yield from zip((one.photo for one in groups[number]), rows, strict=True)


def _item(photo: Photo, folder: PartFolder) -> Item:
    row = folder.known.get(written(photo.file))
    if row is None or row.size is None or not row.sha256:
        return Item(photo, None)
    if row.class_name != written(photo.class_name):
        raise ConfigError(
            f"{folder.folder}: has {photo.path} as class {row.class_name!r}, now it is {photo.class_name!r}; choose "
            "another --output, or --restart to replace the rows"
        )
    return Item(photo, Before(row.size, row.sha256))
