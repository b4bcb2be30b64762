"""Large frames for a model of small images: cut into overlapping tiles, their maps blended into one; numpy only.

    grid = Tiler(Tiling(overlap=0.25), size=256).grid(900, 1200)
    grid.cut(frame)          # (n, 256, 256, 3), what the engine scores
    grid.blend(maps)         # (n, 256, 256) to one map (900, 1200)

What is not judged (outside the region of interest, under the fixed mask) is painted over before a tile is cut, so that
nothing there can reach a feature of what is judged, and holds the lowest judged value of a map.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flowad_fast.config import IMAGENET_MEAN, Tiling
from flowad_fast.errors import FrameError

NO_LOCATION = (
    "location statistics are of the places of one map, and a place of a tile is another place of the part in every "
    "tile; leave --location out, or do without tiles"
)
Box = tuple[int, int, int, int]
"""left, top, right, bottom; right and bottom are exclusive."""


@dataclass(frozen=True)
class Grid:
    """Where the tiles of frames of one size lie. Cells are the pixels of the scaled frame, and of its map.

    Attributes:
        frame: height and width of the original frame, pixels.
        shape: height and width of the map, cells.
        size: side of a tile, cells.
        window: the region of interest, in pixels of the frame.
        area: what the tiles cover, in cells of the map.
        tops: of each row of tiles, in cells of `area`.
        lefts: of each column of tiles.
        chosen: (row, column) of each tile that has anything to judge, in reading order.
        painted: the pixels (H, W) of the frame that are painted over, None for none.
        judged: the cells (h, w) of the map that are judged, None for all.
        colour: what is painted over gets it.
    """

    frame: tuple[int, int]
    shape: tuple[int, int]
    size: int
    window: Box
    area: Box
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    chosen: tuple[tuple[int, int], ...]
    painted: NDArray[np.bool_] | None
    judged: NDArray[np.bool_] | None
    colour: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.chosen)

    def cut(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The tiles (n, S, S, 3) of a frame (H, W, 3), uint8.

        Raises:
            FrameError: a frame of another size.
        """
        if frame.shape != (*self.frame, 3):
            raise FrameError(f"got a frame {frame.shape}, the tiles are for {self.frame[0]}x{self.frame[1]} pixels")
        part = self._scaled(frame)
        tiles = np.empty((len(self), self.size, self.size, 3), np.uint8)
        for tile, (row, column) in zip(tiles, self.chosen, strict=True):
            tile[...] = part[self._place(row, column)]
        return tiles

    def blend(self, maps: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The map (h, w) of a frame of its tiles' maps (n, S, S), weighted towards the middle of each tile.

        The weights of all tiles at a cell add up to 1, and go to 0 at a tile's border wherever another one covers it.
        What is not judged holds the lowest judged value.
        """
        left, top, right, bottom = self.area
        whole = np.zeros(self.shape, np.float32)
        part = whole[top:bottom, left:right]
        rows, columns = self.weights
        for map, (row, column) in zip(maps, self.chosen, strict=True):
            part[self._place(row, column)] += rows[row][:, None] * columns[column] * map
        if self.judged is not None:
            whole[~self.judged] = whole[self.judged].min()
        return whole

    def judged_values(self, map: NDArray[np.float32]) -> NDArray[np.float32]:
        """The values (m,) of a map (h, w) that count."""
        return map.ravel() if self.judged is None else map[self.judged]

    def judged_pixels(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pixels of a frame (H, W, 3) that count, (..., 3)."""
        left, top, right, bottom = self.window
        part = frame[top:bottom, left:right]
        return part if self.painted is None else part[~self.painted[top:bottom, left:right]]

    @cached_property
    def weights(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The weights of each row of tiles (R, S) and of each column (C, S); a tile's are their product."""
        left, top, right, bottom = self.area
        return _weights(self.tops, self.size, bottom - top), _weights(self.lefts, self.size, right - left)

    def tile_box(self, index: int) -> Box:
        """The cells of the map that a tile covers."""
        row, column = self.chosen[index]
        left, top = self.area[0] + self.lefts[column], self.area[1] + self.tops[row]
        return left, top, left + self.size, top + self.size

    def _place(self, row: int, column: int) -> tuple[slice, slice]:
        top, left = self.tops[row], self.lefts[column]
        return slice(top, top + self.size), slice(left, left + self.size)

    def _scaled(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What the tiles cover, at their scale: bilinear and antialiased, as the preparation of the model resizes."""
        left, top, right, bottom = self.area
        painted, native = self.painted, self.shape == self.frame
        if native:
            frame = frame[top:bottom, left:right]
            painted = None if painted is None else painted[top:bottom, left:right]
        if painted is not None:
            frame = frame.copy()
            frame[painted] = self.colour
        if native:
            return frame
        from PIL import Image

        down, along = self.frame[0] / self.shape[0], self.frame[1] / self.shape[1]
        box = (left * along, top * down, min(right * along, self.frame[1]), min(bottom * down, self.frame[0]))
        size = (right - left, bottom - top)
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, box=box))


class Tiler:
    """How frames are cut: the settings with the model's size and the fixed mask. It remembers the grid of each size.

    Attributes:
        tiling: the settings.
        size: side of a tile, pixels: the model's.
        mask: the pixels (H, W) that are never judged, None without a mask; frames must have its size.
    """

    def __init__(
        self,
        tiling: Tiling,
        size: int,
        mask: NDArray[np.bool_] | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
    ) -> None:
        self.tiling, self.size, self.mask = tiling, size, mask
        self._colour = (round(255 * mean[0]), round(255 * mean[1]), round(255 * mean[2]))
        self._grids: dict[tuple[int, int], Grid] = {}

    def grid(self, height: int, width: int) -> Grid:
        """The tiles of frames of this size.

        Raises:
            FrameError: they cannot be cut so; says what to change.
        """
        known = self._grids.get((height, width))
        if known is None:
            if len(self._grids) >= _REMEMBERED:  # frames of any size, as photos have them
                self._grids.clear()
            known = self._grids[height, width] = self._grid(height, width)
        return known

    @property
    def identity(self) -> list[object]:
        """JSON values that are the same for two that cut the same tiles."""
        return [self.tiling.model_dump(mode="json"), self.size, self._colour, self.mask_sha256]

    @property
    def mask_sha256(self) -> str | None:
        """A hash of the mask, None without one."""
        return None if self.mask is None else hashlib.sha256(np.packbits(self.mask).tobytes()).hexdigest()

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the map of frames of this size."""
        return self.tiling.map_size(height, width)

    def _grid(self, height: int, width: int) -> Grid:
        if self.mask is not None and self.mask.shape != (height, width):
            raise FrameError(
                f"the mask is for frames of {self.mask.shape[0]}x{self.mask.shape[1]} pixels, got {height}x{width}; "
                "draw it on a frame of this size"
            )
        shape = h, w = self.shape(height, width)
        area = self._area(height, width)
        sides = area[3] - area[1], area[2] - area[0]
        if min(sides) < self.size:
            raise FrameError(_too_small(self.tiling, (height, width), sides, self.size))
        painted, judged = self._judged(height, width)
        if judged is not None and not judged.any():
            raise FrameError("the mask leaves nothing of the frame to be judged; draw a smaller one")
        tops, lefts = (_starts(side, self.size, self.tiling.overlap) for side in sides)
        chosen = tuple(
            (row, column)
            for row, top in enumerate(tops)
            for column, left in enumerate(lefts)
            if judged is None or judged[area[1] + top :, area[0] + left :][: self.size, : self.size].any()
        )
        if judged is not None and judged.all():
            judged = None
        if shape == (height, width) and self.mask is None:
            painted = None  # tiles lie within the region of interest, and nothing is resized across its border
        left, top, columns, rows = self.tiling.roi or (0, 0, width, height)
        window = left, top, left + columns, top + rows
        return Grid(
            (height, width), (h, w), self.size, window, area, tops, lefts, chosen, painted, judged, self._colour
        )

    def _area(self, height: int, width: int) -> Box:
        """The cells around the region of interest."""
        h, w = self.shape(height, width)
        if self.tiling.roi is None:
            return 0, 0, w, h
        left, top, columns, rows = self.tiling.roi
        if left + columns > width or top + rows > height:
            raise FrameError(
                f"the region of interest, {columns}x{rows} pixels at ({left}, {top}), does not lie in a frame of "
                f"{width}x{height} (width x height); give one that does"
            )
        return left * w // width, top * h // height, -(-(left + columns) * w // width), -(-(top + rows) * h // height)

    def _judged(self, height: int, width: int) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
        """The pixels that are not judged and the cells that are: those that touch none of these pixels."""
        if self.tiling.roi is None and (self.mask is None or not self.mask.any()):
            return None, None
        pixels = np.zeros((height, width), np.bool_)
        if self.tiling.roi is not None:
            left, top, columns, rows = self.tiling.roi
            pixels[...] = True
            pixels[top : top + rows, left : left + columns] = False
        if self.mask is not None:
            pixels |= self.mask
        h, w = self.shape(height, width)
        return pixels, ~_touched(_touched(pixels, h).T, w).T


def in_words(tiling: Tiling) -> str:
    """The settings, for people.

    Example:
        >>> in_words(Tiling(overlap=0.25, scale=0.5, roi=(100, 0, 1200, 900)))
        'overlap 25 %, frames at scale 0.5, region of interest 1200x900 at (100, 0)'
    """
    parts = [f"overlap {100 * tiling.overlap:g} %", f"frames at scale {tiling.scale:g}"]
    if tiling.roi is not None:
        left, top, width, height = tiling.roi
        parts.append(f"region of interest {width}x{height} at ({left}, {top})")
    return ", ".join(parts)


_REMEMBERED = 16


def _starts(length: int, size: int, overlap: float) -> tuple[int, ...]:
    """Where tiles begin along an axis, evenly: as few as cover it with this overlap at least."""
    stride = max(1, int(size * (1 - overlap)))
    steps = -(-(length - size) // stride)
    return tuple(round(i * (length - size) / steps) for i in range(steps + 1)) if steps else (0,)


def _weights(starts: tuple[int, ...], size: int, length: int) -> NDArray[np.float32]:
    """Weights of tiles along an axis, (tiles, size): squared sines that are made to add up to 1 at each place."""
    window = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + size] += window
    return np.stack([window / total[start : start + size] for start in starts]).astype(np.float32)


def _touched(pixels: NDArray[np.bool_], rows: int) -> NDArray[np.bool_]:
    """Whether each of so many rows, laid evenly over pixels (H, W), touches one that is set: (rows, W)."""
    height = len(pixels)
    if rows == height:
        return pixels
    counted = np.concatenate([np.zeros((1, pixels.shape[1]), np.int32), pixels.cumsum(0, dtype=np.int32)])
    row = np.arange(rows)
    found: NDArray[np.bool_] = counted[-(-(row + 1) * height // rows)] > counted[row * height // rows]
    return found


def _too_small(tiling: Tiling, frame: tuple[int, int], sides: tuple[int, int], size: int) -> str:
    """Why no tile fits, and at which scale one does."""
    rows, columns = frame if tiling.roi is None else (tiling.roi[3], tiling.roi[2])
    what = "the frame" if tiling.roi is None else "the region of interest"
    at = "" if tiling.scale == 1 else f" ({sides[0]}x{sides[1]} at scale {tiling.scale:g})"
    least = np.ceil(1000 * size / min(rows, columns)) / 1000
    return (
        f"{what} is {rows}x{columns} pixels{at}, smaller than a tile of {size}x{size}; "
        f"give a scale of at least {least:g}, or do without tiles"
    )
