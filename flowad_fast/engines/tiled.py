"""An engine that takes frames of any size around one that takes tiles: cut, score, blend. Needs no torch."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowad_fast.engines import Engine, Judged
from flowad_fast.stages.aggregates import Aggregate, blended, check_blended, columns
from flowad_fast.stages.frames import extremes
from flowad_fast.stages.tiling import Grid, Tiler

GPU_TILES, CPU_TILES = 64, 16
"""Tiles per call at most: on a GPU the largest batch of captured graphs and built engines (those that hold less split
it themselves); on a CPU larger batches take memory and are no faster."""


class TiledEngine(Engine):
    """Maps (B, h, w) of frames, blended of what `engine` finds in their tiles; one raw score per frame.

    The score is the aggregate of the blended map where it is judged: each place counts once, however many tiles have
    it, so that the score hardly depends on where tiles lie. Those that the engine gives for single tiles are not used.
    """

    def __init__(self, engine: Engine, tiler: Tiler, aggregate: Aggregate) -> None:
        check_blended(aggregate)
        self.engine, self.tiler, self.aggregate = engine, tiler, aggregate
        self.name, self.device = engine.name, engine.device

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 (B, H, W, 3), classes int64 (B,) or None: map (B, h, w) and raw score, float32.

        Raises:
            FrameError: frames of a size that cannot be cut.
        """
        grid = self.tiler.grid(frames.shape[1], frames.shape[2])
        maps = np.empty((len(frames), *grid.shape), np.float32)
        raw = np.empty((len(frames), *columns(self.aggregate)), np.float32)
        found = self._scored(grid, frames, y)
        for i in range(len(frames)):
            maps[i] = grid.blend(itertools.islice(found, len(grid)))
            raw[i] = blended(grid.judged_values(maps[i]), self.aggregate)
        return maps, raw

    def judge(self, frames: np.ndarray, y: np.ndarray | None) -> Judged:
        """See `Engine`; of a frame only what is judged is looked at."""
        grid = self.tiler.grid(frames.shape[1], frames.shape[2])
        maps, raw = self.run(frames, y)
        low, high = extremes(map(grid.judged_pixels, frames))
        return Judged(maps, raw, low, high, np.isfinite(maps).all((1, 2)))

    def prepare(self, height: int, width: int) -> None:
        """See `Engine.prepare`."""
        self.tiler.grid(height, width)
        self.engine.prepare(self.tiler.size, self.tiler.size)

    @property
    def title(self) -> str:
        """The engine's, and that it works on tiles."""
        return f"{self.engine.title}, tiled"

    @property
    def details(self) -> dict[str, Any]:
        """The engine's."""
        return self.engine.details

    def _scored(self, grid: Grid, frames: np.ndarray, y: np.ndarray | None) -> Iterator[NDArray[np.float32]]:
        """The map of each tile of each frame, in order; the tiles of all frames share as few calls as can be."""
        tiles = ((i, tile) for i, frame in enumerate(frames) for tile in grid.cut(frame))
        most = CPU_TILES if self.device == "cpu" else GPU_TILES
        while together := list(itertools.islice(tiles, most)):
            of = [i for i, _ in together]
            yield from self.engine.run(np.stack([tile for _, tile in together]), None if y is None else y[of])[0]
