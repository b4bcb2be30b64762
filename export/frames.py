"""Real frames for parity checks and calibration: from a folder, or from the demo's data set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowad_fast.data.images import no_images, read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.walk import find_photos, folders, left_out
from flowad_fast.errors import CalibrationError, FrameError
from flowad_fast.evaluation.scanning import FrameFiles

DEMO = "demo"
"""Names the demo's data set (ELPV, monocrystalline) wherever a folder of frames is expected."""
PARITY_FRAMES = 16
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


def parity_frames(source: str | Path | None, count: int = PARITY_FRAMES) -> ParityFrames:
    """`count` frames of one size, spread evenly over a folder; the demo's labelled test cells when `source` is None.

    They are fewer where they would take more than `PARITY_BYTES`. A folder with a sub-folder `good` beside others
    (`bottle/test` of MVTec AD) gives labelled frames.

    Raises:
        FrameError: no images, or a folder or image that cannot be read.
    """
    others: Counter[str] = Counter()
    if source is None or str(source) == DEMO:
        test = read_dataset("elpv", None).select("test")
        by_label = [[s.path for s in test if s.label == label] for label in (0, 1)]
        described = "ELPV monocrystalline test cells"
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
    for label, paths in enumerate(by_label):
        # Read one at a time and again when chosen: many frames of a large camera do not fit in memory.
        same = [path for path in _spread(paths, 4 * count) if read_frame(path).shape == first.shape]
        chosen = [read_frame(path) for path in _spread(same, count // len(by_label))]
        frames += chosen
        labels += [label] * len(chosen)
    return ParityFrames(
        np.stack(frames), described, np.array(labels) if len(by_label) == 2 else None, left_out=_lines(others)
    )


def good_parts(source: str | Path, class_names: Sequence[str] = ()) -> GoodParts:
    """Good parts to calibrate on.

    The folder holds images, or for conditional models one folder of them per class. `demo` is the demo's calibration
    split.

    Raises:
        CalibrationError: a conditional model, and no folder of one of its classes.
        FrameError: no images, or a folder that cannot be looked into.
    """
    if str(source) == DEMO:
        paths = [s.path for s in read_dataset("elpv", None).select("calibration")]
        return GoodParts(FrameFiles(paths), [""] * len(paths), [path.name for path in paths])
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


def training_parts() -> GoodParts:
    """The demo's training split, which no threshold is fitted on."""
    paths = [s.path for s in read_dataset("elpv", None).select("train")]
    return GoodParts(FrameFiles(paths), [""] * len(paths), [path.name for path in paths])


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
