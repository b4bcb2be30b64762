"""Regions of maps: components, boxes, contours and areas against scikit-image; their guarantee; where they are shown."""

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes
from skimage.draw import polygon2mask
from skimage.measure import label, regionprops

from flowad_fast.stages.regions import RegionSettings, Severity, find_regions, marked

EIGHT = 2
"""scikit-image's connectivity of cells that meet at a corner too."""


def shapes(seed: int, height: int, width: int, share: float) -> np.ndarray:
    return np.random.RandomState(seed).random_sample((height, width)).astype(np.float32) - np.float32(1 - share)


def shoelace(points: tuple[tuple[int, int], ...]) -> float:
    x, y = np.array(points).T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4, 0.6, 0.97])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (31, 17), (64, 64)])
def test_components_are_those_of_scikit_image(share: float, size: tuple[int, int]) -> None:
    for seed in range(5):
        map = shapes(seed, *size, share)
        theirs = label(map > 0, connectivity=EIGHT)
        expected = {
            ((p.bbox[1], p.bbox[0], p.bbox[3], p.bbox[2]), float(p.area), float(map[theirs == p.label].max()),
             float(binary_fill_holes(theirs == p.label).sum()))
            for p in regionprops(theirs)
        }  # fmt: skip
        found = find_regions(map, 0, size)
        assert {(r.box, r.area, r.peak, shoelace(r.contour)) for r in found} == expected
        assert len(found) == theirs.max()
        assert [r.peak for r in found] == sorted((r.peak for r in found), reverse=True)
        cells = marked(map, 0, size)
        pairs = set(zip(cells.ravel().tolist(), theirs.ravel().tolist(), strict=True))
        assert len(pairs) == len(set(cells.ravel().tolist())) == len(set(theirs.ravel().tolist()))


def test_contours_filled_are_the_components_with_their_holes() -> None:
    for seed in range(5):
        map = shapes(seed, 40, 30, 0.55)
        theirs = label(map > 0, connectivity=EIGHT)
        for region in find_regions(map, 0, map.shape):
            cells = theirs == theirs[np.nonzero(map == np.float32(region.peak))][0]
            corners = np.array(region.contour)[:, ::-1] - 0.5  # cells have their centres at whole numbers
            assert np.array_equal(polygon2mask(map.shape, corners), binary_fill_holes(cells))


def test_a_ring_has_one_outer_border_and_what_lies_in_it_its_own() -> None:
    map = np.zeros((9, 9), np.float32)
    map[1:8, 1:8] = 1
    map[2:7, 2:7] = 0
    map[4, 4] = 2
    inner, ring = find_regions(map, 0.5, (9, 9))
    assert inner.contour == ((4, 4), (5, 4), (5, 5), (4, 5)) and inner.area == 1
    assert ring.contour == ((1, 1), (8, 1), (8, 8), (1, 8)) and ring.area == 24


def test_nothing_above_is_no_region_and_the_threshold_itself_is_not_above() -> None:
    assert find_regions(np.full((8, 8), 3.0, np.float32), 3.0, (8, 8)) == ()
    assert len(find_regions(np.full((8, 8), 3.0, np.float32), np.nextafter(3.0, 0), (8, 8))) == 1
    assert not marked(np.zeros((8, 8), np.float32), 1, (8, 8)).any()


@pytest.mark.parametrize("frame", [(48, 120), (300, 100), (31, 77), (5, 3)])
def test_boxes_hold_every_touched_pixel_of_a_frame_of_another_shape(frame: tuple[int, int]) -> None:
    map = shapes(0, 16, 16, 0.15)
    theirs = regionprops(label(map > 0, connectivity=EIGHT))
    height, width = frame
    expected = set()
    for p in theirs:
        top, left, bottom, right = p.bbox
        # Pixel x touches the cells from `left` to `right` if [x, x + 1] overlaps [left, right] * width / 16.
        xs = [x for x in range(width) if (x + 1) * 16 > left * width and x * 16 < right * width]
        ys = [y for y in range(height) if (y + 1) * 16 > top * height and y * 16 < bottom * height]
        expected.add(((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1), p.area * height * width / 256))
    found = find_regions(map, 0, frame)
    assert {(r.box, r.area) for r in found} == expected
    for r in found:
        for x, y in r.contour:
            assert r.box[0] <= x <= r.box[2] and r.box[1] <= y <= r.box[3]


def test_a_window_shifts_regions_into_the_frame_that_it_was_cut_from() -> None:
    map = shapes(3, 16, 16, 0.2)
    cut = find_regions(map, 0, (60, 80))
    whole = find_regions(map, 0, (200, 300), window=(110, 37, 190, 97))
    assert len(cut) == len(whole) > 3
    for a, b in zip(cut, whole, strict=True):
        assert b.box == (a.box[0] + 110, a.box[1] + 37, a.box[2] + 110, a.box[3] + 37)
        assert b.contour == tuple((x + 110, y + 37) for x, y in a.contour)
        assert (b.area, b.peak) == (a.area, a.peak)
    with pytest.raises(ValueError, match=r"got a window \(0, 0, 301, 200\).*expected 0 <= left < right <= 300"):
        find_regions(map, 0, (200, 300), window=(0, 0, 301, 200))


def test_small_regions_are_left_out_by_their_area_in_the_frame() -> None:
    map = np.zeros((8, 8), np.float32)
    map[0, 0], map[4, 2:5] = 9, 5
    assert [r.area for r in find_regions(map, 1, (80, 160))] == [200, 600]
    settings = RegionSettings(min_area=201)
    assert [r.area for r in find_regions(map, 1, (80, 160), settings)] == [600]
    assert np.array_equal(marked(map, 1, (80, 160), settings) > 0, map == 5)
    assert [r.area for r in find_regions(map, 1, (80, 160), RegionSettings(min_area=200))] == [200, 600]


def test_severity_is_the_gravest_class_that_area_or_peak_reach() -> None:
    minor, major = Severity(name="minor", area=4), Severity(name="major", area=100, peak=9)
    settings = RegionSettings(severities=(minor, major))
    assert settings.severity(3, 8) == ""
    assert settings.severity(4, 8) == "minor"
    assert settings.severity(3, 9) == settings.severity(100, 1) == "major"
    with pytest.raises(ValueError, match="expected each name once"):
        RegionSettings(severities=(minor, minor))
