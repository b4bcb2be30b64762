"""Tiles of large frames: every pixel covered, no seams, nothing from where it is not judged, as few calls as can be."""

import doctest
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from flowad_fast.config import Tiling
from flowad_fast.engines import Engine
from flowad_fast.engines.tiled import CPU_TILES, GPU_TILES, TiledEngine
from flowad_fast.errors import ConfigError, FrameError
from flowad_fast.stages import tiling
from flowad_fast.stages.aggregates import AGGREGATES, Aggregate, blended
from flowad_fast.stages.tiling import Tiler
from tests.models import tiny_frames

SIZE = 64
SOME = [name for name in AGGREGATES if name != "range+nll"]

Box = tuple[int, int, int, int]
sides = st.integers(SIZE, 400)
overlaps = st.floats(0, 0.75)


def field(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.float32]:
    """A smooth map of places, in [1, 5]."""
    return (3 + np.sin(x / 23) + np.cos((x + 2 * y) / 37)).astype(np.float32)


def places(height: int, width: int) -> NDArray[np.uint8]:
    """A frame whose pixels say where they are: 12 bits of x, 12 of y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x >> 4, (x & 15) << 4 | y >> 8, y & 255], -1).astype(np.uint8)


class Fake(Engine):
    """Gives the map that a function of tiles (n, S, S, 3) makes, and counts its calls."""

    name, device = "fake", "cpu"

    def __init__(self, of: Callable[[NDArray[np.uint8]], NDArray[np.float32]], device: str = "cpu") -> None:
        self.of, self.device = of, device
        self.calls: list[int] = []
        self.classes: list[int] = []

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append(len(frames))
        self.classes += [] if y is None else y.tolist()
        maps = self.of(frames)
        return maps, np.full(len(frames), np.nan, np.float32)  # a tile's own score must not be used


def sampled(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The smooth field where the pixels of `places` say that they are."""
    r, g, b = (tiles[..., i].astype(np.int64) for i in range(3))
    return field(r << 4 | g >> 4, (g & 15) << 8 | b)


def spoilt(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As `sampled`, but wrong at the tile's border, as a network is that sees nothing beyond."""
    maps = sampled(tiles)
    for edge in (np.s_[:, 0], np.s_[:, -1], np.s_[:, :, 0], np.s_[:, :, -1]):
        maps[edge] += 1
    return maps


def brightness(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    return tiles.mean(-1, dtype=np.float32)


def smeared(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Every place of the map has something of every pixel of the tile, as features with a large field of view have."""
    return brightness(tiles) + tiles.mean((1, 2, 3), dtype=np.float32)[:, None, None]


def mask_of(height: int, width: int, *boxes: Box) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


@settings(deadline=None, max_examples=60)
@given(height=sides, width=sides, overlap=overlaps)
def test_tiles_cover_every_pixel_and_their_weights_add_up_to_one(height: int, width: int, overlap: float) -> None:
    grid = Tiler(Tiling(overlap=overlap), SIZE).grid(height, width)
    total, covered = np.zeros((height, width)), np.zeros((height, width), int)
    rows, columns = grid.weights
    for index, (row, column) in enumerate(grid.chosen):
        left, top, right, bottom = grid.tile_box(index)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        total[top:bottom, left:right] += np.outer(rows[row], columns[column])
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert min(rows.min(), columns.min()) > 0
    for starts in (grid.tops, grid.lefts):
        common = SIZE - np.diff(starts)
        assert (common >= int(overlap * SIZE)).all()
        assert starts[0] == 0


@settings(deadline=None, max_examples=60)
@given(height=sides, width=sides, overlap=overlaps, larger=st.floats(1.02, 3), box=st.tuples(*[st.floats(0, 1)] * 8))
def test_every_judged_cell_is_covered_by_weights_of_one_whatever_is_hidden(
    height: int, width: int, overlap: float, larger: float, box: tuple[float, ...]
) -> None:
    left, top = int(box[0] * width / 2), int(box[1] * height / 2)
    roi = (left, top, width // 4 + int(box[2] * width / 4), height // 4 + int(box[3] * height / 4))
    mask = mask_of(
        height, width, (int(box[4] * width), int(box[5] * height), int(box[6] * width), int(box[7] * height))
    )
    tiler = Tiler(Tiling(overlap=overlap, scale=larger * SIZE / min(roi[2:]), roi=roi), SIZE, mask)
    try:
        grid = tiler.grid(height, width)
    except FrameError as error:
        assert "the mask leaves nothing" in str(error)
        assume(False)
    total = np.zeros(grid.shape)
    rows, columns = grid.weights
    for index, (row, column) in enumerate(grid.chosen):
        left, top, right, bottom = grid.tile_box(index)
        assert 0 <= left and 0 <= top and right <= grid.shape[1] and bottom <= grid.shape[0]
        total[top:bottom, left:right] += np.outer(rows[row], columns[column])
    judged = np.ones(grid.shape, bool) if grid.judged is None else grid.judged
    np.testing.assert_allclose(total[judged], 1, atol=1e-6)
    y, x = (np.arange(n) * size / n for n, size in zip(grid.shape, (height, width), strict=True))
    inside = np.outer((y >= roi[1]) & (y < roi[1] + roi[3]), (x >= roi[0]) & (x < roi[0] + roi[2]))
    assert not judged[~inside].any(), "a cell that begins outside the region of interest is not judged"


@settings(deadline=None, max_examples=40)
@given(length=sides, overlap=overlaps)
def test_there_are_no_more_tiles_than_the_overlap_needs(length: int, overlap: float) -> None:
    starts = Tiler(Tiling(overlap=overlap), SIZE).grid(length, SIZE).tops
    stride = int(SIZE * (1 - overlap))
    assert len(starts) == 1 or (len(starts) - 2) * stride + SIZE < length


@settings(deadline=None, max_examples=30)
@given(height=sides, width=sides, overlap=overlaps)
def test_a_smooth_map_is_the_same_with_tiles_and_without(height: int, width: int, overlap: float) -> None:
    frames = places(height, width)[None]
    maps, _ = TiledEngine(Fake(sampled), Tiler(Tiling(overlap=overlap), SIZE), "max").run(frames, None)
    np.testing.assert_allclose(maps, sampled(frames), atol=1e-5)


def test_what_is_wrong_at_the_borders_of_tiles_leaves_no_seams() -> None:
    frames = places(300, 410)[None]
    maps, _ = TiledEngine(Fake(spoilt), Tiler(Tiling(overlap=0.5), 2 * SIZE), "max").run(frames, None)
    error = np.abs(maps - sampled(frames))[0]
    assert error[1:-1, 1:-1].max() < 1e-3  # the border of a tile, wrong by 1, hardly counts
    assert error[0].max() >= 1, "the frame's own border has no other tile"


def test_the_scaled_frame_is_that_of_pillow_and_so_is_its_part() -> None:
    frame = tiny_frames(1, 301, 403)[0]
    for scale in (0.5, 0.7, 1.3):
        grid = Tiler(Tiling(overlap=0, scale=scale), SIZE).grid(301, 403)
        h, w = grid.shape
        assert (h, w) == (round(301 * scale), round(403 * scale))
        whole = np.asarray(Image.fromarray(frame).resize((w, h), Image.Resampling.BILINEAR))
        for tile, index in zip(grid.cut(frame), range(len(grid)), strict=True):
            left, top, right, bottom = grid.tile_box(index)
            np.testing.assert_array_equal(tile, whole[top:bottom, left:right])


@pytest.mark.parametrize("scale", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("roi", [None, (50, 31, 203, 190)])
@pytest.mark.parametrize("boxes", [(), ((0, 0, 120, 90), (200, 150, 202, 260))])
@pytest.mark.parametrize("aggregate", SOME)
def test_what_is_not_judged_reaches_no_bit_of_the_result(
    scale: float,
    roi: Box | None,
    boxes: tuple[Box, ...],
    aggregate: Aggregate,
) -> None:
    height, width = 280, 320
    mask = mask_of(height, width, *boxes) if boxes else None
    tiler = Tiler(Tiling(overlap=0.3, scale=scale, roi=roi), SIZE, mask)
    engine = TiledEngine(Fake(smeared), tiler, aggregate)
    frame = tiny_frames(1, height, width)[0]
    hidden = mask_of(height, width) if mask is None else mask.copy()
    if roi is not None:
        hidden |= ~mask_of(height, width, (roi[0], roi[1], roi[0] + roi[2], roi[1] + roi[3]))
    struck = np.where(hidden[..., None], np.uint8(255), frame)
    maps, raw = engine.run(np.stack([frame, struck]), None)
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(raw[0], raw[1])
    seen = struck.copy()
    seen[130:160, 140:170] = 255
    assert (engine.run(seen[None], None)[1] != raw[0]).any(), "a defect that is judged must show"


def test_what_is_not_judged_holds_the_lowest_judged_value_and_does_not_count() -> None:
    mask = mask_of(200, 200, (0, 0, 100, 200))
    tiler = Tiler(Tiling(overlap=0.25), SIZE, mask)
    grid = tiler.grid(200, 200)
    assert grid.judged is not None and np.array_equal(grid.judged, ~mask)
    frame = tiny_frames(1, 200, 200)[0]
    map = TiledEngine(Fake(brightness), tiler, "mean").run(frame[None], None)[0][0]
    np.testing.assert_allclose(map[:, 100:], brightness(frame[None])[0][:, 100:], rtol=1e-5)
    assert (map[:, :100] == map[:, 100:].min()).all()
    assert len(grid.judged_values(map)) == 100 * 200
    assert grid.judged_pixels(frame).size == 3 * 100 * 200
    assert all(grid.tile_box(i)[2] > 100 for i in range(len(grid))), "tiles with nothing to judge are not scored"


def test_a_cell_that_touches_a_masked_pixel_is_not_judged() -> None:
    mask = mask_of(256, 256, (100, 50, 101, 51))
    judged = Tiler(Tiling(overlap=0, scale=0.5), SIZE, mask).grid(256, 256).judged
    assert judged is not None and np.argwhere(~judged).tolist() == [[25, 50]]
    judged = Tiler(Tiling(overlap=0, scale=2.5), SIZE, mask).grid(256, 256).judged
    assert judged is not None
    rows, columns = np.nonzero(~judged)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (125, 127, 250, 252)


def test_tiles_of_all_frames_share_calls_and_keep_their_order_and_classes() -> None:
    frames, y = tiny_frames(5, 150, 200), np.arange(5)
    tiler = Tiler(Tiling(overlap=0.25), SIZE)
    n = len(tiler.grid(150, 200))
    for device, most in (("cpu", CPU_TILES), ("cuda:0", GPU_TILES)):
        fake = Fake(brightness, device)
        maps, raw = TiledEngine(fake, tiler, "max").run(frames, y)
        assert fake.calls == [most] * (5 * n // most) + ([5 * n % most] if 5 * n % most else [])
        assert fake.classes == np.repeat(y, n).tolist()
        np.testing.assert_allclose(maps, brightness(frames), rtol=1e-5)
        np.testing.assert_array_equal(raw, maps.max((1, 2)))


def test_the_result_does_not_depend_on_the_order_of_tiles() -> None:
    grid = Tiler(Tiling(overlap=0.4), SIZE).grid(200, 170)
    maps = np.random.RandomState(0).random_sample((len(grid), SIZE, SIZE)).astype(np.float32)
    expected = grid.blend(maps)
    order = np.random.RandomState(1).permutation(len(grid))
    shuffled = replace(grid, chosen=tuple(grid.chosen[i] for i in order))
    np.testing.assert_allclose(shuffled.blend(maps[order]), expected, rtol=1e-5)


@pytest.mark.parametrize("aggregate", SOME)
def test_a_score_hardly_depends_on_where_the_tiles_lie(aggregate: Aggregate) -> None:
    frames = places(300, 333)[None]
    whole = blended(sampled(frames)[0].ravel(), aggregate)
    for overlap in (0, 0.2, 0.5, 0.7):
        _, raw = TiledEngine(Fake(sampled), Tiler(Tiling(overlap=overlap), SIZE), aggregate).run(frames, None)
        np.testing.assert_allclose(raw[0], whole, rtol=1e-5)


def test_the_latent_of_a_cell_is_no_score_of_tiles() -> None:
    with pytest.raises(ConfigError, match="tiles that overlap have several at one place; choose one of max, mean"):
        TiledEngine(Fake(sampled), Tiler(Tiling(), SIZE), "range+nll")


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (Tiling(), "the frame is 50x300 pixels, smaller than a tile of 64x64; give a scale of at least 1.28, or do"),
        (Tiling(scale=0.9), r"the frame is 50x300 pixels \(45x270 at scale 0.9\), smaller than"),
        (Tiling(roi=(0, 10, 300, 40)), "the region of interest is 40x300 pixels, smaller than a tile .* at least 1.6"),
        (Tiling(roi=(10, 0, 300, 50)), r"300x50 pixels at \(10, 0\), does not lie in a frame of 300x50 \(width"),
    ],
)
def test_frames_that_cannot_be_cut_are_refused_with_the_remedy(settings_: Tiling, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        Tiler(settings_, SIZE).grid(50, 300)


@settings(deadline=None, max_examples=40)
@given(height=st.integers(20, 300), width=st.integers(20, 300))
def test_the_scale_that_is_named_is_enough(height: int, width: int) -> None:
    try:
        Tiler(Tiling(), SIZE).grid(height, width)
    except FrameError as error:
        scale = float(str(error).split("at least ")[1].split(",")[0])
        Tiler(Tiling(scale=scale), SIZE).grid(height, width)


def test_the_examples_run() -> None:
    assert doctest.testmod(tiling).attempted and not doctest.testmod(tiling).failed


def test_masks_of_another_size_or_over_everything_are_refused() -> None:
    with pytest.raises(FrameError, match="the mask is for frames of 100x200 pixels, got 200x100; draw it on"):
        Tiler(Tiling(), SIZE, mask_of(100, 200)).grid(200, 100)
    with pytest.raises(FrameError, match="leaves nothing of the frame"):
        Tiler(Tiling(roi=(0, 0, 80, 80)), SIZE, mask_of(200, 200, (0, 0, 90, 90))).grid(200, 200)
    grid = Tiler(Tiling(), SIZE, mask_of(200, 200)).grid(200, 200)
    assert grid.judged is None and grid.painted is None, "an empty mask hides nothing"


@pytest.mark.parametrize(
    "wrong", [{"overlap": 0.8}, {"overlap": -0.1}, {"scale": 0}, {"roi": (-1, 0, 5, 5)}, {"roi": (0, 0, 0, 5)}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Tiling.model_validate(wrong)
