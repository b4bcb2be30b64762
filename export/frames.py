"""Real frames for parity checks and calibration: from a folder, or from the demo's data set."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flowad_fast.data.images import no_images, read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Sample
from flowad_fast.data.walk import find_photos, folders, left_out
from flowad_fast.errors import CalibrationError, FrameError
from flowad_fast.evaluation.scanning import FrameFiles
from flowad_fast.shipped import PHOTOS
from flowad_fast.stages.tiling import Tiler

DEMO = "demo"
"""One of the names that stand for solar cells of ELPV wherever a folder of frames is expected, see `shipped.PHOTOS`."""
PARITY_FRAMES = 16
RANGE_FRAMES = 64
"""Good parts that quantised graphs take their ranges from."""
PARITY_BYTES = 512 * 2**20
"""Of parity frames: large photos are fewer, at least two of each label."""


@dataclass(frozen=True)
class ParityFrames:
    """Frames uint8 (n, H, W, 3), where they come from, and (where known) labels 0/1 and classes of each.

    `left_out` says in one line each what the folder has beside photos.
    """

    frames: np.ndarray
    source: str
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()


def parity_tiles(frames: ParityFrames, tiler: Tiler, count: int = PARITY_FRAMES) -> ParityFrames:
    """`count` tiles spread evenly over the frames, with their classes; a part's label says nothing of its tiles.

    Raises:
        FrameError: frames that cannot be cut so.
    """
    grid = tiler.grid(*frames.frames.shape[1:3])
    places = _spread([(i, tile) for i in range(len(frames.frames)) for tile in range(len(grid))], count)
    tiles = [grid.cut(frames.frames[i])[tile] for i, tile in places]
    classes = None if frames.classes is None else tuple(frames.classes[i] for i, _ in places)
    return ParityFrames(np.stack(tiles), f"tiles of {frames.source}", None, classes, frames.left_out)


@dataclass(frozen=True)
class GoodParts:
    """Frames of good parts, the class name of each ("" for unconditional models), and its label for messages.

    `left_out` says in one line each what of the folder is not among them.
    """

    frames: Sequence[np.ndarray]
    classes: list[str]
    labels: list[str]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.frames)


def spread(good: GoodParts, count: int = RANGE_FRAMES) -> ParityFrames:
    """`count` good parts of one size, spread evenly over the classes; fewer of large photos, see `PARITY_BYTES`.

    Raises:
        FrameError: one of them cannot be read.
    """
    first = good.frames[0]
    count = max(1, min(count, PARITY_BYTES // first.nbytes))
    by_class = [[i for i, name in enumerate(good.classes) if name == one] for one in dict.fromkeys(good.classes)]
    turns = itertools.zip_longest(*(_spread(places, -(-count // len(by_class))) for places in by_class))
    chosen = [i for turn in turns for i in turn if i is not None][:count]
    same = [(i, frame) for i in chosen if (frame := good.frames[i]).shape == first.shape]
    names = tuple(good.classes[i] for i, _ in same)
    source = f"{len(same)} of {len(good)} good parts"
    return ParityFrames(np.stack([frame for _, frame in same]), source, None, names if any(names) else None)


def parity_frames(source: str | Path | None, count: int = PARITY_FRAMES) -> ParityFrames:
    """`count` frames of one size, spread evenly over a folder; labelled test cells of the demo when `source` is None.

    They are fewer where they would take more than `PARITY_BYTES`. A folder with a sub-folder `good` beside others
    (`bottle/test` of MVTec AD) gives labelled frames.

    Raises:
        FrameError: no images, or a folder or image that cannot be read.
    """
    others: Counter[str] = Counter()
    kinds: dict[Path, str] = {}
    if source is None or str(source) in PHOTOS:
        layout = PHOTOS[str(source or DEMO)]
        test = read_dataset(layout, None).select("test")
        by_label = [_in_turn([s for s in test if s.label == label]) for label in (0, 1)]
        kinds = {s.path: s.category for s in test} if layout != PHOTOS[DEMO] else {}
        described = "ELPV monocrystalline test cells" if not kinds else "ELPV test cells, mono- and polycrystalline"
    else:
        root = Path(source)
        paths = _photos(root, others)
        good = [path for path in paths if path.relative_to(root).parts[0] == "good"]
        bad = [path for path in paths if path not in set(good) and path.parent != root]
        by_label = [good, bad] if good and bad else [paths]
        described = f"{'labelled ' if good and bad else ''}frames of the folder {root.name}"
    first = read_frame(by_label[0][0])
    count = min(count, max(2 * len(by_label), PARITY_BYTES // first.nbytes))
    frames: list[np.ndarray] = []
    labels: list[int] = []
    classes: list[str] = []
    for label, paths in enumerate(by_label):
        # Read one at a time and again when chosen: many frames of a large camera do not fit in memory.
        same = [path for path in _spread(paths, 4 * count) if read_frame(path).shape == first.shape]
        taken = _spread(same, count // len(by_label))
        chosen = [read_frame(path) for path in taken]
        classes += [kinds[path] for path in taken if kinds]
        frames += chosen
        labels += [label] * len(chosen)
    return ParityFrames(
        np.stack(frames),
        described,
        np.array(labels) if len(by_label) == 2 else None,
        tuple(classes) or None,
        _lines(others),
    )


def good_parts(source: str | Path, class_names: Sequence[str] = ()) -> GoodParts:
    """Good parts to calibrate on.

    The folder holds images, or for conditional models one folder of them per class. A name of `shipped.PHOTOS` is the
    calibration split of those cells.

    Raises:
        CalibrationError: a conditional model, and no folder of one of its classes.
        FrameError: no images, or a folder that cannot be looked into.
    """
    if str(source) in PHOTOS:
        return _cells(str(source), "calibration", class_names)
    root = Path(source)
    others: Counter[str] = Counter()
    said: list[str] = []
    if not class_names:
        pairs = [("", path) for path in _photos(root, others)]
    else:
        given = [name for name in class_names if (root / name).is_dir()]
        if not given:
            raise CalibrationError(
                f"{root}: the model is conditional; expected one folder of good parts per class: "
                f"{', '.join(class_names)}"
            )
        pairs = [(name, path) for name in given for path in _photos(root / name, others)]
        strangers = [place.name for place in folders(root) if place.name not in class_names]
        if strangers:
            said.append(f"folders of no class left out: {', '.join(strangers)}; the classes: {', '.join(class_names)}")
        stray = find_photos(root, deep=False)
        others += stray.others
        if stray.paths:
            said.append(f"{len(stray.paths)} photos that lie in no class folder left out ({stray.paths[0]}, ...)")
    paths = [path for _, path in pairs]
    return GoodParts(
        FrameFiles(paths),
        [name for name, _ in pairs],
        [path.relative_to(root).as_posix() for path in paths],
        (*said, *_lines(others)),
    )


def training_parts(source: str, class_names: Sequence[str] = ()) -> GoodParts:
    """The training split of the solar cells that `source` names, which no threshold is fitted on.

    Raises:
        CalibrationError: see `good_parts`.
    """
    return _cells(source, "train", class_names)


def _cells(source: str, split: Literal["train", "calibration"], class_names: Sequence[str]) -> GoodParts:
    samples = read_dataset(PHOTOS[source], None).select(split)
    kinds = list(dict.fromkeys(s.category for s in samples))
    if class_names and not set(kinds) <= set(class_names):
        raise CalibrationError(f"{source}: cells of {', '.join(kinds)}; the model's classes: {', '.join(class_names)}")
    if not class_names and len(kinds) > 1:
        raise CalibrationError(f"{source}: cells of {', '.join(kinds)}, and the model has no classes; give {DEMO}")
    paths = [s.path for s in samples]
    return GoodParts(
        FrameFiles(paths), [s.category if class_names else "" for s in samples], [path.name for path in paths]
    )


def _in_turn(samples: Sequence[Sample]) -> list[Path]:
    """The photos of every category, taking turns as long as there are any, so that an even spread has some of each."""
    by_category = [[s for s in samples if s.category == name] for name in dict.fromkeys(s.category for s in samples)]
    turns = itertools.zip_longest(*by_category)
    return [sample.path for turn in turns for sample in turn if sample is not None]


def _photos(folder: Path, others: Counter[str]) -> list[Path]:
    """As `images.find_images`; what is left out is added to `others`."""
    photos = find_photos(folder)
    for place, reason in photos.problems:
        raise FrameError(f"{place}: {reason}")
    if not photos.paths:
        raise no_images(folder, photos)
    others += photos.others
    return list(photos.paths)


def _lines(others: Counter[str]) -> tuple[str, ...]:
    return (left_out(others),) if others else ()


def parse_size(text: str) -> tuple[int, int] | None:
    """`any`, or HEIGHTxWIDTH."""
    if text == "any":
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) >= 16 and int(width) >= 16):
        raise FrameError(f"frame size {text!r}; expected 'any' or HEIGHTxWIDTH in pixels, at least 16x16")
    return int(height), int(width)


def _spread(items: Sequence, count: int) -> list:
    """At most `count` items at even distances."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
