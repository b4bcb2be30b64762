"""Real frames for parity checks and calibration: from a folder, or from the demo's data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowad_fast.data.images import find_images, read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Sample
from flowad_fast.errors import CalibrationError, FrameError
from flowad_fast.export.verify import ParityFrames

DEMO = "demo"
"""Names the demo's data set (ELPV, monocrystalline) wherever a folder of frames is expected."""
PARITY_FRAMES = 16


def parity_frames(source: str | Path | None, count: int = PARITY_FRAMES) -> ParityFrames:
    """`count` frames of one size, spread evenly over a folder; the demo's labelled test cells when `source` is None."""
    if source is None or str(source) == DEMO:
        test = read_dataset("elpv", None).select("test")
        half = count // 2
        chosen = [s for label in (0, 1) for s in _spread([s for s in test if s.label == label], half)]
        frames = np.stack([read_frame(s.path) for s in chosen])
        return ParityFrames(frames, "ELPV monocrystalline test cells", np.array([s.label for s in chosen]))
    paths = find_images(source)
    first = read_frame(paths[0])
    same = [f for f in (read_frame(p) for p in _spread(paths, 4 * count)) if f.shape == first.shape]
    return ParityFrames(np.stack(same[:count] or [first]), "frames of a folder given by the user")


def good_parts(source: str | Path, class_names: Sequence[str] = ()) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Frames of good parts, a class name each ("" for unconditional models), and a label each for messages.

    The folder holds images; for conditional models it holds one folder a class. `demo` is the demo's calibration split.
    """
    if str(source) == DEMO:
        samples: Sequence[Sample] = read_dataset("elpv", None).select("calibration")
        return [read_frame(s.path) for s in samples], [""] * len(samples), [s.path.name for s in samples]
    root = Path(source)
    if not class_names:
        paths = find_images(root)
        return [read_frame(p) for p in paths], [""] * len(paths), [p.relative_to(root).as_posix() for p in paths]
    given = [name for name in class_names if (root / name).is_dir()]
    if not given:
        raise CalibrationError(
            f"{root}: the model is conditional; expected one folder of good parts a class: {', '.join(class_names)}"
        )
    pairs = [(name, path) for name in given for path in find_images(root / name)]
    frames = [read_frame(path) for _, path in pairs]
    return frames, [name for name, _ in pairs], [path.relative_to(root).as_posix() for _, path in pairs]


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
