"""Regions of maps: components, boxes, contours and areas against scikit-image; their guarantee; where they show."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_fill_holes
from skimage.draw import polygon2mask
from skimage.measure import label, regionprops

from flowad_fast.cli import eval as eval_command
from flowad_fast.data.layouts import read_dataset
from flowad_fast.detector import Detection, Detector, load
from flowad_fast.errors import CalibrationError, ConfigError
from flowad_fast.evaluation.evaluate import evaluate
from flowad_fast.evaluation.inspection import inspect_files, without_regions
from flowad_fast.evaluation.metrics import RegionCounts, region_counts
from flowad_fast.evaluation.overlay import overlay
from flowad_fast.evaluation.results import COLUMNS, FORMATS, Result, ResultFile
from flowad_fast.export.calibration import parse_severity, recalibrate
from flowad_fast.export.frames import GoodParts
from flowad_fast.stages.decision import Calibration, PixelThreshold, calibrate, with_regions
from flowad_fast.stages.regions import Region, RegionSettings, Severity, find_regions, marked
from tests.models import exported, tiny_frames

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


@pytest.mark.filterwarnings("ignore:.*score far above")
def test_good_parts_with_any_region_are_at_most_alpha() -> None:
    """200 random splits into parts to calibrate on and new ones; heavy tails, and cells that depend on each other."""
    random, alpha, n, new = np.random.RandomState(0), 0.1, 29, 30
    shares = []
    for _ in range(200):
        noise = random.lognormal(sigma=1.5, size=(n + new, 12, 12))
        maps = (noise + np.roll(noise, 1, 2) + random.lognormal(size=(n + new, 1, 1))).astype(np.float32)
        maxima = maps.max((1, 2))
        fitted = with_regions(calibrate(maps[:n].mean((1, 2)), alpha), maxima[:n])
        pixels = fitted.classes[""].pixels
        assert pixels is not None and pixels.parts == n
        shares.append(np.mean([bool(find_regions(map, pixels.threshold, (24, 36))) for map in maps[n:]]))
    error = 4 * np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) <= alpha + error
    assert np.mean(shares) >= alpha - 1 / (n + 1) - error  # and not needlessly far below


def test_pixel_thresholds_need_as_many_good_parts_as_alpha_asks_for() -> None:
    fitted = calibrate(np.arange(19.0), 0.05)
    exact = with_regions(fitted, np.arange(19.0) + 100).classes[""]
    assert exact.pixels == PixelThreshold(threshold=118, parts=19) and exact.threshold == 18
    with pytest.raises(CalibrationError, match="18 good parts are too few.*at least 19 are needed, or a larger alpha"):
        with_regions(fitted, np.arange(18.0))
    with pytest.raises(CalibrationError, match="the maps of 1 good parts are not finite"):
        with_regions(fitted, np.append(np.arange(18.0), np.nan))
    both = calibrate(np.arange(38.0), 0.05, ["nut"] * 19 + ["screw"] * 19)
    of_class = with_regions(both, np.arange(38.0), ["nut"] * 19 + ["screw"] * 19).classes
    assert [one.pixels.threshold for one in of_class.values() if one.pixels] == [18, 37]
    with pytest.raises(CalibrationError, match="class 'screw' has no good parts"):
        with_regions(both, np.arange(19.0), ["nut"] * 19)


def detection(**pixels: float) -> Detection:
    """Two frames of class "", of 40x80 pixels: nothing, and a cell of 9; a third that is invalid."""
    one = {"threshold": 1.5, "parts": 19, "pixels": {**pixels, "parts": 19} if pixels else None}
    severities = [{"name": "minor"}, {"name": "major", "peak": 9}]
    limits = Calibration.model_validate({"alpha": 0.05, "classes": {"": one}, "regions": {"severities": severities}})
    maps = np.zeros((3, 8, 8), np.float32)
    maps[1, 2, 4], maps[2] = 9, 9
    reasons = (None, None, "the frame is black")
    return Detection(maps, maps.max((1, 2)), ("",) * 3, reasons, "none", limits, (40, 80))


def test_a_detection_has_the_regions_of_frames_that_can_be_judged() -> None:
    found = detection(threshold=5.0)
    assert found.no_regions == (None, None, "the frame is black")
    nothing, one, invalid = found.regions
    assert nothing == invalid == ()
    assert one == (Region((40, 10, 50, 15), 50.0, 9.0, ((40, 10), (50, 10), (50, 15), (40, 15)), "major"),)
    assert np.argwhere(found.marked(1)).tolist() == [[2, 4]] and not found.marked(2).any()


def test_without_a_pixel_threshold_there_are_no_regions_and_it_says_why() -> None:
    old = detection()
    assert old.regions == ((), (), ())
    assert old.no_regions[0] is not None and "calibrate it again: flowad-export calibrate" in old.no_regions[0]
    never = replace(old, calibration=None)
    assert never.regions == ((), (), ())
    assert never.no_regions[0] is not None and "no calibration" in never.no_regions[0]
    other = replace(old, classes=("nut",) * 3)
    assert other.no_regions[0] is not None and "class 'nut' was not calibrated" in other.no_regions[0]


def test_severities_are_read_from_the_command_line() -> None:
    assert parse_severity("minor") == Severity(name="minor")
    assert parse_severity("major:area=400,peak=-12.5") == Severity(name="major", area=400, peak=-12.5)
    for wrong in ("", "major:", "major:area", "major:area=x", "major:size=3", "major:area=1,area=2", "a:area=-1",
                  "a:peak=nan"):  # fmt: skip
        with pytest.raises(ConfigError):
            parse_severity(wrong)


def test_calibrate_fits_the_pixel_threshold_and_keeps_the_settings(tmp_path: Path) -> None:
    _, result = exported("eager")
    bundle = tmp_path / "b"
    shutil.copytree(result.path, bundle)
    frames = tiny_frames(9, 48, 80)
    parts = GoodParts(list(frames), [""] * 9, [str(i) for i in range(9)])
    severities = [Severity(name="minor"), Severity(name="major", area=100)]
    recalibrate(bundle, parts, 0.1, "cpu", min_area=2, severities=severities)
    again = recalibrate(bundle, parts, 0.1, "cpu").calibration
    assert again is not None
    assert again.regions == RegionSettings(min_area=2, severities=tuple(severities))
    detector = load(bundle, device="cpu")
    found = detector(frames)
    highest = found.map.max((1, 2))
    one = again.classes[""]
    # The image score is the maximum, so the two thresholds are one, and a part is anomalous where it has a region.
    assert one.pixels is not None and one.pixels.threshold == pytest.approx(highest.max(), rel=1e-4)
    assert one.pixels.threshold == pytest.approx(one.threshold, rel=1e-5)
    assert "pixel threshold" in (bundle / "README.md").read_text(encoding="utf-8")
    lower = one.model_copy(
        update={"pixels": PixelThreshold(threshold=float(np.median(found.map, (1, 2)).min()), parts=9)}
    )
    detector.calibration = again.model_copy(update={"classes": {"": lower}})
    for regions in detector(frames).regions:
        assert regions and all(0 <= r.box[0] < r.box[2] <= 80 and 0 <= r.box[1] < r.box[3] <= 48 for r in regions)
        assert all(r.severity == ("major" if r.area >= 100 else "minor") and r.area >= 2 for r in regions)


SQUARE = Region((10, 5, 30, 15), 200.0, 7.25, ((10, 5), (30, 5), (30, 15), (10, 15)), 'ma"jor, =\\ud83d 🙂')


@pytest.mark.parametrize("format", FORMATS)
def test_regions_stay_in_result_files_over_rewriting(tmp_path: Path, format: str) -> None:
    target = tmp_path / f"r.{format}"
    results = [Result(tmp_path / "a.png", "anomalous", 2.0, regions=(SQUARE,)),
               Result(tmp_path / "b.png", "good", 1.0, regions=()), Result(tmp_path / "c.png", "error")]  # fmt: skip

    def rows() -> list[object]:
        with ResultFile(target, format, "b", "e") as file:
            assert [tuple(row) for row in file.rows] == [COLUMNS] * len(file.rows)
            values = [row["regions"] for row in file.rows]
        return [json.loads(str(value)) if value else None for value in values] if format == "csv" else values

    with ResultFile(target, format, "b", "e") as file:
        for result in results:
            file.append(result)
    before = target.read_bytes()
    first = rows()
    expected = {"box": [10, 5, 30, 15], "area": 200.0, "peak": 7.25, "severity": SQUARE.severity}
    contour = {"contour": [[10, 5], [30, 5], [30, 15], [10, 15]]} if format == "jsonl" else {}
    assert first == [[expected | contour], [], None]
    with ResultFile(target, format, "b", "e") as file:
        file._replace = True  # as after a photo that changed
        file.append(Result(tmp_path / "d.png", "good", 1.0, regions=()))
    assert target.read_bytes().startswith(before) and rows() == [*first, []]


@pytest.mark.parametrize("format", FORMATS)
def test_a_result_file_from_before_regions_goes_on(tmp_path: Path, format: str) -> None:
    target = tmp_path / f"r.{format}"
    values = ["a.png", "good", 1.5, "", "", "e", "b", str(tmp_path / "a.png"), 3, 4, "0123456789abcdef"]
    old = dict(zip(COLUMNS[:11], values, strict=True))
    cells = ",".join(map(str, values))
    target.write_text(f"{','.join(COLUMNS[:11])}\n{cells}\n" if format == "csv" else json.dumps(old) + "\n")
    with ResultFile(target, format, "b", "e") as file:
        assert [row["regions"] for row in file.rows] == [None]
        file.append(Result(tmp_path / "b.png", "good", 1.0, regions=()))
    with ResultFile(target, format, "b", "e") as file:
        assert [row["path"] for row in file.rows] == ["a.png", str(tmp_path / "b.png")]
        assert [row["regions"] in ("", None) for row in file.rows] == [True, False]


@pytest.mark.parametrize("wrong", ["7", "[7]", '[{"peak": NaN}]', '{"peak": 1}', "{}", "["])
def test_what_are_no_regions_is_no_result_file(tmp_path: Path, wrong: str) -> None:
    with ResultFile(tmp_path / "r.jsonl", "jsonl", "b", "e") as file:
        file.append(Result(tmp_path / "a.png", "good", 1.0, regions=()))
    text = (tmp_path / "r.jsonl").read_text()
    (tmp_path / "r.jsonl").write_text(text.replace('"regions": []', f'"regions": {wrong}'))
    with pytest.raises(ConfigError, match="is no jsonl result file"):
        ResultFile(tmp_path / "r.jsonl", "jsonl", "b", "e")


@pytest.mark.parametrize("at", [(10, 5, 30, 15), (0, 0, 80, 40)])
def test_contours_are_drawn_on_the_border_and_nowhere_else(at: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = at
    region = Region(at, 1, 1, ((left, top), (right, top), (right, bottom), (left, bottom)))
    frame = np.full((40, 80, 3), 128, np.uint8)
    map = np.zeros((8, 8), np.float32)
    plain, drawn = overlay(frame, map, 0, 1), overlay(frame, map, 0, 1, [region])
    right, bottom = min(right, 79), min(bottom, 39)
    for y, x in ((top, left), (top, right), (bottom, left), (bottom, right), (top, 20), (bottom, 20), (8, left)):
        assert drawn[y, x].tolist() == [255, 255, 255]
    changed = np.zeros((40, 80), bool)
    changed[max(top - 1, 0) : bottom + 2, max(left - 1, 0) : right + 2] = True
    changed[top + 2 : bottom - 1, left + 2 : right - 1] = False
    assert not (drawn != plain).any(-1)[~changed].any() and (drawn != plain).any(-1).any()


def test_region_counts_of_hand_made_masks() -> None:
    mask = np.zeros((8, 8), bool)
    mask[0:2, 0:2] = mask[2, 2] = True  # one defect: it goes on over a corner
    mask[5:7, 5:7] = mask[7, 0] = True  # two more
    regions = np.zeros((8, 8), np.int32)
    regions[1, 1] = 1  # these two touch the first defect
    regions[2, 2:4] = 2
    regions[6, 6:8] = 3  # the second
    regions[4, 0] = 4  # beside the third, and so false
    good, nothing = np.zeros((8, 8), np.int32), np.zeros((8, 8), np.int32)
    good[0, 0], good[4, 4] = 1, 2
    counts = region_counts([(mask, regions), (None, good), (None, nothing), (None, nothing), (mask, nothing)])
    assert counts == RegionCounts(
        defects=6,
        touched=2,
        good_parts=3,
        good_with_regions=1,
        false_on_good=2,
        defective_parts=2,
        false_on_defective=1,
    )
    assert counts.false_per_good_part == pytest.approx(2 / 3)
    assert region_counts([]).false_per_good_part is None
    with pytest.raises(ValueError, match="expected"):
        region_counts([(np.zeros((8, 8), bool), nothing)])


class Red:
    """Takes the red channel of 8-pixel frames as the map, with a pixel threshold of 100 where `pixels`."""

    engine, aggregate = "fake", "max"

    def __init__(self, pixels: bool = True) -> None:
        one = {"threshold": 100, "parts": 19, "pixels": {"threshold": 100, "parts": 19} if pixels else None}
        self.limits = Calibration.model_validate({"alpha": 0.05, "classes": {"": one}})

    def __call__(self, frames: np.ndarray, classes: object = None) -> Detection:
        maps = frames[..., 0].astype(np.float32)
        n = len(maps)
        return Detection(maps, maps.max((1, 2)), ("",) * n, (None,) * n, "fake", self.limits, frames.shape[1:3])


def test_an_evaluation_counts_touched_defects_and_false_regions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def save(name: str, *spots: tuple[int, int]) -> None:
        frame = np.random.RandomState(0).randint(0, 90, (8, 8, 3), np.uint8)
        for spot in spots:
            frame[spot] = 200
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(tmp_path / name)

    for i in range(4):
        save(f"a/test/good/{i}.png", *([(0, 0), (5, 5)] if i == 0 else []))
    save("a/train/good/0.png")
    save("a/test/spot/0.png", (2, 2), (7, 7))
    mask = np.zeros((8, 8), np.uint8)
    mask[1:4, 1:4] = mask[6, 1] = 255
    (tmp_path / "a/ground_truth/spot").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "a/ground_truth/spot/0_mask.png")
    report = evaluate(Red(), read_dataset("mvtec", tmp_path), mask_size=8)
    assert report.regions == {"a": RegionCounts(2, 1, 4, 1, 2, 1, 1)}
    assert json.loads(report.to_json())["regions"]["a"]["touched"] == 1
    eval_command._print_table(report)
    assert "0.500" in capsys.readouterr().out
    assert evaluate(Red(pixels=False), read_dataset("mvtec", tmp_path), mask_size=8).regions == {}


def test_inspected_photos_have_regions_in_upright_pixels(tmp_path: Path) -> None:
    """EXIF orientation 6 turns the stored picture by a quarter; regions are those of the upright frame."""
    stored = np.zeros((6, 12, 3), np.uint8)
    stored[..., 1] = 120
    stored[1, 10] = 200  # upright: row 10, column 6 - 1 - 1 = 4
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    (result,) = inspect_files(cast(Detector, Red()), [tmp_path / "a.png"])
    assert result.frame is not None and result.frame.shape == (12, 6, 3)
    assert result.regions is not None and [one.box for one in result.regions] == [(4, 10, 5, 11)]
    (old,) = inspect_files(cast(Detector, Red(pixels=False)), [tmp_path / "a.png"])
    assert old.regions is None and old.status == "anomalous"
    assert without_regions(cast(Detector, SimpleNamespace(calibration=Red().limits))) is None
    lacking = without_regions(cast(Detector, SimpleNamespace(calibration=Red(pixels=False).limits)))
    assert lacking is not None and "no pixel threshold; calibrate again" in lacking
