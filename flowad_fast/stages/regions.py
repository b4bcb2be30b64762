"""Where a defect is: connected regions of a map, in the pixels of the original frame; numpy only.

A cell of an S×S map that was made of a W×H frame covers the frame's area from x·W/S to (x + 1)·W/S, and so downwards:
the resize of the preparation maps areas, see `stages/image.py`. A preparation that cuts a window out of the frame first
shifts them by its corner. Nothing is resampled to come back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flowad_fast.config import Frozen

Window = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are exclusive."""


@dataclass(frozen=True)
class Region:
    """One connected region of a map above the pixel threshold.

    Attributes:
        box: left, top, right, bottom in pixels of the original frame; right and bottom are exclusive.
        area: its pixels of the original frame.
        peak: the highest value of the map inside.
        contour: its outer border, (x, y) in pixels of the original frame.
        severity: the class that area and peak give it, "" where the bundle defines none.
    """

    box: Window
    area: float
    peak: float
    contour: tuple[tuple[int, int], ...] = ()
    severity: str = ""


class Severity(Frozen):
    """A class of regions: those that reach its area or its peak. With neither, all."""

    name: str = Field(min_length=1)
    area: float | None = Field(default=None, ge=0)
    """Pixels of the original frame."""
    peak: float | None = None
    """Value of the map."""

    def holds(self, area: float, peak: float) -> bool:
        """Whether a region of this area and peak is of this class."""
        if self.area is None and self.peak is None:
            return True
        return (self.area is not None and area >= self.area) or (self.peak is not None and peak >= self.peak)


class RegionSettings(Frozen):
    """What counts as a region, beside the threshold.

    Example:
        >>> settings = RegionSettings(severities=(Severity(name="minor"), Severity(name="major", area=400)))
        >>> settings.severity(area=80, peak=3.5), settings.severity(area=400, peak=3.5)
        ('minor', 'major')
    """

    min_area: float = Field(default=0, ge=0)
    """Smaller regions are left out; pixels of the original frame."""
    severities: tuple[Severity, ...] = ()
    """From the least grave to the gravest; a region is of the last one that holds it."""

    @model_validator(mode="after")
    def _distinct(self) -> "RegionSettings":
        names = [one.name for one in self.severities]
        if len(names) != len(set(names)):
            raise ValueError(f"got severities {', '.join(names)}, expected each name once")
        return self

    def severity(self, area: float, peak: float) -> str:
        """The class of a region, "" where none holds it."""
        return next((one.name for one in reversed(self.severities) if one.holds(area, peak)), "")


def find_regions(
    map: NDArray[np.float32],
    threshold: float,
    frame_size: tuple[int, int],
    settings: RegionSettings | None = None,
    window: Window | None = None,
) -> tuple[Region, ...]:
    """The regions of a map (h, w) above the threshold, 8-connected, highest peak first.

    Boxes hold every pixel that a region touches; areas are exact, and so count parts of pixels; corners of contours
    are rounded to whole pixels. A contour is the outer border, clockwise as seen; holes are no part of it.

    Args:
        map: finite values.
        threshold: regions are where the map is greater.
        frame_size: height and width of the original frame, pixels.
        settings: smallest area and severities; None for those of `RegionSettings()`.
        window: the part of the frame that the map covers; None for all of it.

    Example:
        >>> map = np.zeros((4, 4), np.float32)
        >>> map[1, 1:3] = 7, 9
        >>> find_regions(map, 5, frame_size=(40, 80))
        (Region(box=(20, 10, 60, 20), area=400.0, peak=9.0, contour=((20, 10), (60, 10), (60, 20), (20, 20)), severity=''),)
    """  # noqa: E501
    settings = settings or RegionSettings()
    if not map.max(initial=-np.inf) > threshold:  # nearly every good part, so it must cost next to nothing
        return ()
    place = _Place(map.shape, frame_size, window)
    parts = _components(map, threshold)
    areas = parts.cells * place.cell_area
    kept = np.flatnonzero(areas >= settings.min_area)
    cells = parts.padded.tobytes()
    found = []
    for i in kept[np.argsort(-parts.peaks[kept], kind="stable")]:
        corners = [place.of(*corner) for corner in _contour(cells, int(parts.first[i]), parts.padded.shape[1])]
        area, peak = float(areas[i]), float(parts.peaks[i])
        box = place.box(*(int(side) for side in parts.boxes[i]))
        found.append(Region(box, area, peak, _plain(corners), settings.severity(area, peak)))
    return tuple(found)


def marked(
    map: NDArray[np.float32],
    threshold: float,
    frame_size: tuple[int, int],
    settings: RegionSettings | None = None,
    window: Window | None = None,
) -> NDArray[np.int32]:
    """The cells (h, w) of the regions that `find_regions` gives: 0 outside, the same number above 0 in one region."""
    labels = np.zeros(map.shape, np.int32)
    if not map.max(initial=-np.inf) > threshold:
        return labels
    parts = _components(map, threshold)
    kept = parts.cells * _Place(map.shape, frame_size, window).cell_area >= (settings or RegionSettings()).min_area
    numbers = np.where(kept, np.cumsum(kept), 0)
    labels[map > threshold] = np.repeat(numbers[parts.run_label], parts.run_cells)
    return labels


class _Place:
    """Where cells of a map lie in the frame."""

    def __init__(self, shape: tuple[int, ...], frame_size: tuple[int, int], window: Window | None) -> None:
        height, width = frame_size
        left, top, right, bottom = window or (0, 0, width, height)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"got a window {window} of a frame of {height}x{width} pixels, expected 0 <= left < right <= {width} "
                f"and 0 <= top < bottom <= {height}"
            )
        self.left, self.top = left, top
        # Integers as far as possible: 3 * (100 / 300) is not 1, and a box would grow by a pixel.
        self.width, self.height = right - left, bottom - top
        self.rows, self.columns = shape
        self.cell_area = self.width * self.height / (self.rows * self.columns)

    def of(self, x: int, y: int) -> tuple[int, int]:
        """The corner (x, y) of cells in the frame, halves rounded up."""
        return (
            self.left + (2 * x * self.width + self.columns) // (2 * self.columns),
            self.top + (2 * y * self.height + self.rows) // (2 * self.rows),
        )

    def box(self, left: int, top: int, right: int, bottom: int) -> Window:
        """The smallest box of whole pixels around these cells."""
        return (
            self.left + left * self.width // self.columns,
            self.top + top * self.height // self.rows,
            self.left - (-right * self.width // self.columns),
            self.top - (-bottom * self.height // self.rows),
        )


@dataclass(frozen=True)
class _Components:
    """The n components of a mask, in the order of their first cells; r runs of cells in rows, in reading order.

    `padded` (h + 2, w + 2) uint8 is the mask in a frame of zeros, `first` (n,) the flat index of a component's first
    cell in it, `boxes` (n, 4) left, top, right, bottom in cells, `run_label` and `run_cells` (r,).
    """

    padded: NDArray[np.uint8]
    first: NDArray[np.intp]
    cells: NDArray[np.intp]
    peaks: NDArray[np.floating]
    boxes: NDArray[np.intp]
    run_label: NDArray[np.intp]
    run_cells: NDArray[np.intp]


def _components(map: NDArray[np.float32], threshold: float) -> _Components:
    """8-connected components of `map > threshold`, which has a cell: runs of rows, joined where they meet."""
    above = map > threshold
    padded = np.zeros((map.shape[0] + 2, map.shape[1] + 2), np.uint8)
    padded[1:-1, 1:-1] = above
    pitch = padded.shape[1]
    edges = np.flatnonzero(np.diff(padded.ravel())) + 1  # a row ends in two zeros, so no run goes on in the next
    starts, ends = edges[::2], edges[1::2]
    # Runs of the next row, moved up by one row, meet this one (also at a corner) if neither ends before the other.
    low, high = np.searchsorted(ends - pitch, starts, "left"), np.searchsorted(starts - pitch, ends, "right")
    count = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(len(starts)), count)
    lower = np.arange(count.sum()) + np.repeat(low - (np.cumsum(count) - count), count)
    root = _joined(len(starts), upper, lower)
    first_run = np.flatnonzero(root == np.arange(len(starts)))
    n, label = len(first_run), np.searchsorted(first_run, root)
    values, run_cells = map[above], ends - starts
    run_peaks = np.maximum.reduceat(values, np.cumsum(run_cells) - run_cells)
    peaks = np.full(n, -np.inf, map.dtype)
    np.maximum.at(peaks, label, run_peaks)
    rows, left, right = starts // pitch - 1, starts % pitch - 1, ends % pitch - 1
    boxes = np.empty((n, 4), np.intp)
    boxes[:, :2], boxes[:, 2:] = max(map.shape), 0
    for side, of_runs, choose in ((0, left, np.minimum), (1, rows, np.minimum), (2, right, np.maximum),
                                  (3, rows + 1, np.maximum)):  # fmt: skip
        choose.at(boxes[:, side], label, of_runs)
    cells = np.bincount(label, weights=run_cells).astype(np.intp)
    return _Components(padded, starts[first_run], cells, peaks, boxes, label, run_cells)


def _joined(n: int, a: NDArray[np.intp], b: NDArray[np.intp]) -> NDArray[np.intp]:
    """The smallest node that each of n nodes is connected with by the edges a-b: hooking and pointer jumping."""
    root = np.arange(n)
    while True:
        low = np.minimum(root[a], root[b])
        new = root.copy()
        np.minimum.at(new, root[a], low)
        np.minimum.at(new, root[b], low)
        while not np.array_equal(jumped := new[new], new):
            new = jumped
        if np.array_equal(new, root):
            return root
        root = new


def _contour(cells: bytes, first: int, pitch: int) -> list[tuple[int, int]]:
    """The corners (x, y), in cells, of the outer border of the component whose first cell (in reading order) is given.

    Walks along the cells' edges with the component on its right, and over corners at which two of its cells meet.
    """
    steps = (1, pitch, -1, -pitch)  # east, south, west, north
    left_ahead, right_ahead = (-pitch, 0, -1, -pitch - 1), (0, -1, -pitch - 1, -pitch)
    corners = []
    at, heading = first, 0
    while True:
        corners.append((at % pitch - 1, at // pitch - 1))
        while True:
            at += steps[heading]
            if cells[at + left_ahead[heading]]:
                heading = (heading - 1) % 4
                break
            if not cells[at + right_ahead[heading]]:
                heading = (heading + 1) % 4
                break
        if at == first and heading == 0:
            return corners


def _plain(corners: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The corners without those that rounding made one with the corner before."""
    kept = [corner for i, corner in enumerate(corners) if corner != corners[i - 1]]
    return tuple(kept or corners[:1])
