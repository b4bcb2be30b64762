"""What a frame and its map look like in three numbers, cheap enough for every part."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowad_fast.line.event import Record

POINTS = 128
"""Along a side of the frame, at most; the map has half as many."""


@dataclass(frozen=True)
class Look:
    """How a part's picture and map are as a whole, whatever a defect does in a small place.

    Attributes:
        brightness: mean grey, 0 to 255.
        sharpness: variance of the Laplacian of the grey picture at full resolution, grey levels squared.
        background: median of the map; None without one.
    """

    brightness: float
    sharpness: float
    background: float | None = None


def look(frame: NDArray[np.uint8], heat: NDArray[np.float32] | None = None) -> Look:
    """The look of a frame (H, W, 3) and its map (h, w).

    Grey is the mean of the channels. The Laplacian is that of neighbouring pixels, at places spread evenly over the
    frame: thinning the frame first would hide that it is out of focus. Frames below 3 pixels have no sharpness.

    Example:
        >>> look(np.full((64, 64, 3), 80, np.uint8))
        Look(brightness=80.0, sharpness=0.0, background=None)
    """
    step = max(1, -(-max(frame.shape[:2]) // POINTS))

    def grey(down: int, right: int) -> NDArray[np.float32]:
        rows, columns = frame.shape[0] - 2, frame.shape[1] - 2
        thin = frame[down : down + rows : step, right : right + columns : step]
        value: NDArray[np.float32] = thin.sum(-1, dtype=np.float32) / np.float32(3)
        return value

    thinner = 1 if heat is None else max(1, 2 * max(heat.shape) // POINTS)
    background = None if heat is None else float(np.median(heat[::thinner, ::thinner]))
    if min(frame.shape[:2]) < 3:
        return Look(float(frame.mean()), 0.0, background)
    middle = grey(1, 1)
    edges = grey(0, 1) + grey(2, 1) + grey(1, 0) + grey(1, 2) - 4 * middle
    return Look(float(middle.mean()), float(edges.var()), background)


def record_look(record: Record) -> Look | None:
    """The look of a record's picture; None where it has none."""
    return None if record.frame is None else look(record.frame, record.heat)
