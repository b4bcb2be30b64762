"""Bundles that say how frames are cut into tiles: exported, calibrated, loaded, judged; regions in the whole frame."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flowad_fast import bundle, detection, detector, load
from flowad_fast.bundle import Manifest
from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.config import Tiling
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.detector import Detection, Detector, Verdict
from flowad_fast.engines import Engine
from flowad_fast.errors import BundleError, CalibrationError, ConfigError, FrameError
from flowad_fast.export.calibration import fit, recalibrate
from flowad_fast.export.exporter import ExportResult, check_bundle, export_bundle
from flowad_fast.export.frames import GoodParts, ParityFrames
from flowad_fast.export.location import StatisticsParts
from flowad_fast.export.tiling import tiles_for_probes
from flowad_fast.masks import draw_mask, read_mask
from flowad_fast.model import FlowModel
from flowad_fast.stages.decision import Calibration
from flowad_fast.stages.regions import RegionSettings
from flowad_fast.stages.scorers import Inversion, Mismatch
from flowad_fast.stages.tiling import Tiler
from tests.models import IMAGE, PARTS, tiny_frames, tiny_model

HEIGHT, WIDTH = 150, 200
TILING = Tiling(overlap=0.25, roi=(20, 10, 170, 130))
ROI = (20, 10, 190, 140)
HOLE = (60, 30, 100, 80)
"""A masked box: left, top, right, bottom."""


def masked() -> NDArray[np.bool_]:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = True
    return mask


def parts(count: int, seed: int = 1, classes: tuple[str, ...] = ("",)) -> GoodParts:
    frames = list(tiny_frames(count, HEIGHT, WIDTH, seed))
    return GoodParts(frames, [classes[i % len(classes)] for i in range(count)], [f"{i}.png" for i in range(count)])


@dataclass(frozen=True)
class Made:
    model: FlowModel
    result: ExportResult
    path: Path


@pytest.fixture(scope="module", params=[0, 3], ids=["one class", "three classes"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bundle of ONNX alone, with everything: tiles, region of interest, mask, calibration."""
    model, path = tiny_model(request.param), tmp_path_factory.mktemp("tiled") / "bundle"
    result = export_bundle(
        model, Inversion(), path, formats=("onnx",), frames=tiny_frames(4, HEIGHT, WIDTH), frame_size=(HEIGHT, WIDTH),
        tiling=TILING, mask=masked(), good=parts(57, classes=PARTS[: request.param] or ("",)), alpha=0.05, quiet=True,
    )  # fmt: skip
    return Made(model, result, path)


class Bright(Engine):
    """The map is the brightness."""

    name, device = "bright", "cpu"

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append(frames.shape)
        return frames.mean(-1, dtype=np.float32), np.zeros(len(frames), np.float32)


def bright(tiling: Tiling = TILING, mask: NDArray[np.bool_] | None = None, **options: object) -> Detector:
    tiler = Tiler(tiling, IMAGE, mask)
    return Detector(Bright(), tiny_model().spec, frame_size=(HEIGHT, WIDTH), tiler=tiler, **options)  # type: ignore[arg-type]


def calibrated(one: Detector, settings: RegionSettings | None = None) -> Detector:
    one.calibration = fit(one, parts(19), 0.05, settings)
    return one


def test_a_tiled_bundle_proves_itself_and_judges_each_part_once(made: Made) -> None:
    assert made.result.ok
    parity = made.result.manifest.artefacts["onnx"].parity
    assert parity is not None and parity.passed and parity.source == "tiles of frames given by the caller"
    one = load(made.path, device="cpu")
    assert one.engine == "onnxruntime on cpu, tiled"
    frames = tiny_frames(3, HEIGHT, WIDTH, seed=9)
    labels = list(PARTS) if one.conditional else None
    found = one(frames, labels)
    assert found.map.shape == (3, HEIGHT, WIDTH) and found.score.shape == (3,) and len(found.verdict) == 3
    assert found.judged is not None and found.judged.sum() == 170 * 130 - 40 * 50
    np.testing.assert_array_equal(found.score, [map[found.judged].max() for map in found.map])
    same = Detector.from_model(
        made.model, Inversion(), device="cpu", tiler=Tiler(TILING, IMAGE, masked(), made.model.spec.image.mean)
    )
    np.testing.assert_allclose(same(frames, labels).map, found.map, rtol=1e-3, atol=1e-4)


def test_a_batch_is_judged_as_its_frames_are(made: Made) -> None:
    one, frames = load(made.path, device="cpu"), tiny_frames(3, HEIGHT, WIDTH, seed=9)
    labels = list(PARTS) if one.conditional else [None] * 3
    found = one(frames, labels if one.conditional else None)
    for i, label in enumerate(labels):
        alone = one(frames[i], None if label is None else [label])
        np.testing.assert_allclose(alone.map[0], found.map[i], rtol=1e-4)
        np.testing.assert_allclose(alone.score[0], found.score[i], rtol=1e-4)


def test_the_manifest_says_everything_and_old_ones_stay_readable(made: Made) -> None:
    _, manifest = bundle.read(made.path)
    assert manifest.tiling == TILING and manifest.frame_size == (HEIGHT, WIDTH) and manifest.mask is not None
    assert manifest.map_size(HEIGHT, WIDTH) == (HEIGHT, WIDTH)
    hidden = read_mask(made.path, manifest)
    assert hidden is not None and np.array_equal(hidden, masked())
    old = json.loads((made.path / bundle.MANIFEST).read_text())
    del old["tiling"], old["mask"], old["model"]["tiling"]
    before = Manifest.model_validate(old)
    assert before.tiling is None and before.mask is None and before.map_size(HEIGHT, WIDTH) == (IMAGE, IMAGE)
    with pytest.raises(ValueError, match="a mask goes with a tiling"):
        Manifest.model_validate(old | {"mask": manifest.mask.model_dump()})


def test_an_altered_or_lost_mask_is_noticed(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    _, manifest = bundle.read(copy)
    assert manifest.mask is not None
    file = copy / manifest.mask.file
    Image.fromarray(np.zeros((HEIGHT, WIDTH), bool)).save(file)
    with pytest.raises(BundleError, match="the file was altered or damaged"):
        load(copy)
    file.unlink()
    with pytest.raises(BundleError, match="missing, or not a plain file"):
        load(copy)
    with pytest.raises(BundleError, match="mask goes with its manifest"):
        Detector.from_manifest(Bright(), manifest)


def test_a_defect_that_is_not_judged_changes_no_bit(made: Made) -> None:
    one, frame = load(made.path, device="cpu"), tiny_frames(1, HEIGHT, WIDTH, seed=5)[0]
    label = PARTS[0] if one.conditional else None
    struck = frame.copy()
    struck[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = (255, 0, 0)
    struck[:, :20] = struck[:10] = struck[140:] = struck[:, 190:] = (0, 255, 0)
    clean, dirty = one(frame, label), one(struck, label)
    np.testing.assert_array_equal(clean.map, dirty.map)
    np.testing.assert_array_equal(clean.score, dirty.score)
    assert clean.regions == dirty.regions and clean.verdict == dirty.verdict
    frame[100:120, 120:140] = (255, 0, 0)
    assert one(frame, label).score[0] > clean.score[0]


def test_it_runs_without_torch(made: Made) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'scipy', 'onnx'), None))\n"
        "import numpy as np, flowad_fast\n"
        f"d = flowad_fast.load({str(made.path)!r}, device='cpu')\n"
        f"f = np.random.default_rng(0).integers(0, 256, (2, {HEIGHT}, {WIDTH}, 3), dtype=np.uint8)\n"
        "found = d(f, ['nut', 'nail'] if d.conditional else None)\n"
        "assert d.prepare(150, 200) > 0 and len(found.verdict) == 2, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_calibrating_again_and_verifying_know_the_tiles(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    labels = made.model.spec.classes.labels or ("",)
    manifest = recalibrate(copy, parts(57, seed=3, classes=labels), 0.05, "cpu")
    assert manifest.tiling == TILING and manifest.calibration is not None
    assert manifest.calibration != made.result.manifest.calibration
    wrong = GoodParts(list(tiny_frames(57, 100, 100)), [labels[i % len(labels)] for i in range(57)], ["x.png"] * 57)
    with pytest.raises(FrameError, match="calibration frame x.png: the frame is 100x100 pixels, the bundle takes 150x"):
        recalibrate(copy, wrong, 0.05, "cpu")
    outcomes = check_bundle(copy, made.model, ParityFrames(tiny_frames(3, HEIGHT, WIDTH, 4), "others"), "cpu")
    assert outcomes["onnx"].ok and outcomes["onnx"].artefact is not None
    assert outcomes["onnx"].artefact.parity is not None
    assert outcomes["onnx"].artefact.parity.source == "tiles of others"


def test_regions_lie_where_the_defect_is_in_the_frame() -> None:
    one = calibrated(bright(mask=masked()))
    frame = tiny_frames(1, HEIGHT, WIDTH, seed=2)[0] // 2
    frame[104:116, 125:145] = 255
    (region,) = one(frame).regions[0]
    assert region.box == (125, 104, 145, 116) and region.area == 240
    half = calibrated(bright(Tiling(scale=0.5, overlap=0, roi=(20, 10, 170, 132))))
    (region,) = half(frame).regions[0]
    assert max(abs(a - b) for a, b in zip(region.box, (125, 104, 145, 116), strict=True)) <= 2


def test_what_is_not_judged_is_no_region_even_where_all_the_rest_is() -> None:
    one = bright(mask=masked())
    limits = {"threshold": 100, "parts": 19, "pixels": {"threshold": 100, "parts": 19}}
    one.calibration = Calibration.model_validate({"alpha": 0.05, "classes": {"": limits}})
    light = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    light[::2] = 150
    found = one(light)
    assert found.verdict == (Verdict.ANOMALOUS,)
    cells = found.marked(0) > 0
    assert found.judged is not None and np.array_equal(cells, found.judged)
    (region,) = found.regions[0]
    assert region.box == ROI and region.area == found.judged.sum()


def test_what_is_not_judged_counts_in_no_calibration() -> None:
    struck = parts(19)
    for frame in struck.frames:
        frame[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = 255
        frame[:10] = 255
    one = bright(mask=masked())
    assert fit(one, struck, 0.05) == fit(one, parts(19), 0.05)
    assert fit(bright(Tiling()), struck, 0.05).classes[""].threshold == pytest.approx(255)


def test_a_part_whose_judged_area_is_black_is_invalid_whatever_is_around_it() -> None:
    one = calibrated(bright())
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[:8] = 200  # above the region of interest
    found = one(frame)
    assert found.verdict == (Verdict.INVALID,) and "black" in str(found.invalid[0])
    frame[60:90, 60:90] = 200
    assert one(frame).invalid == (None,)


def test_a_frame_of_another_size_is_invalid_and_says_why() -> None:
    one = calibrated(bright())
    found = one(tiny_frames(2, 160, 200))
    assert found.verdict == (Verdict.INVALID,) * 2 and found.regions == ((), ())
    assert found.invalid == ("the frame is 160x200 pixels, the bundle takes 150x200",) * 2
    with pytest.raises(FrameError, match="the bundle takes 150x200 frames, got 160x200"):
        one.prepare(160, 200)
    anything = Detector(Bright(), tiny_model().spec, tiler=Tiler(Tiling(), IMAGE))
    assert anything(tiny_frames(1, 160, 210)).map.shape == (1, 160, 210)
    assert "smaller than a tile of 64x64; give a scale" in str(anything(tiny_frames(1, 50, 200)).invalid[0])
    empty = anything(np.zeros((0, 100, 120, 3), np.uint8))
    assert len(empty) == 0 and empty.verdict == ()


def test_a_frozen_camera_is_noticed_through_tiles() -> None:
    camera = calibrated(bright()).camera()
    frame = tiny_frames(1, HEIGHT, WIDTH)
    assert camera(frame).invalid == (None,)
    assert "frozen camera" in str(camera(frame).invalid[0])


def test_several_terms_need_ranges_with_tiles_too() -> None:
    one = bright(aggregate="diff+sum")
    found = one(tiny_frames(2, HEIGHT, WIDTH))
    assert found.raw_score.shape == (2, 2)
    with pytest.raises(CalibrationError, match="diff\\+sum"):
        _ = found.score
    one.calibration = fit(one, parts(40), 0.05)
    assert one(tiny_frames(2, HEIGHT, WIDTH)).score.shape == (2,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"aggregate": "range+nll"}, ConfigError, "tiles that overlap have several at one place"),
        ({"location": StatisticsParts(parts(2), "two")}, ConfigError, "leave --location out, or do without tiles"),
        ({"frame_size": None, "mask": masked()}, ConfigError, "for frames of 150x200 pixels; give that frame size"),
        ({"tiling": None, "mask": masked()}, ConfigError, "a mask goes with tiles"),
        ({"mask": masked().T}, FrameError, "the mask is for frames of 200x150 pixels, got 150x200"),
        ({"tiling": Tiling(scale=0.4)}, FrameError, "60x80 at scale 0.4.*give a scale of at least 0.427"),
        ({"frame_size": (100, 100)}, ConfigError, "frames for the parity check are 150x200, the bundle is for 100x100"),
    ],
)
def test_what_tiles_cannot_have_is_refused_before_the_work(
    options: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    given: dict[str, object] = {"frame_size": (HEIGHT, WIDTH), "tiling": TILING} | options
    with pytest.raises(error, match=message):
        export_bundle(
            tiny_model(), Inversion(), tmp_path / "b", frames=tiny_frames(2, HEIGHT, WIDTH), quiet=True, **given
        )  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_a_server_that_gets_whole_frames_is_not_available(tmp_path: Path) -> None:
    result = export_bundle(
        tiny_model(), Inversion(), tmp_path / "b", formats=("triton-server",), tiling=Tiling(), quiet=True,
        frames=tiny_frames(2, HEIGHT, WIDTH),
    )  # fmt: skip
    assert not result.ok and "nothing there cuts them" in str(result.outcomes["triton-server"])


def test_probes_are_chosen_on_tiles_of_good_parts_of_their_classes() -> None:
    tiler = Tiler(TILING, IMAGE, masked())
    good = parts(30, classes=PARTS)
    frames = ParityFrames(tiny_frames(4, HEIGHT, WIDTH), "some", np.array([0, 1, 0, 1]))
    tiles, same = tiles_for_probes(good, frames, tiler)
    assert tiles is not None and same is frames
    assert {tile.shape for tile in tiles.frames} == {(IMAGE, IMAGE, 3)}
    assert list(zip(tiles.classes, tiles.labels, strict=True)) == [
        (PARTS[i % 3], f"{i}.png") for i in (0, 3, 7, 11, 15, 18, 22, 26)
    ]
    none, normal = tiles_for_probes(None, frames, tiler)
    assert none is None and normal.frames.shape[1:] == (IMAGE, IMAGE, 3)
    first = tiler.grid(HEIGHT, WIDTH).cut(frames.frames[0])[0]
    np.testing.assert_array_equal(normal.frames[0], first)


def test_masks_are_drawn_without_losses_and_mark_something(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(masked()).save(path)
    assert np.array_equal(draw_mask(path), masked())
    Image.fromarray(np.where(masked(), 255, 0).astype(np.uint8)).convert("RGB").save(path)
    assert np.array_equal(draw_mask(path), masked())
    Image.fromarray(np.ones((9, 9), bool)).save(path)
    with pytest.raises(ConfigError, match="marks everything; draw what is never to be judged in white"):
        draw_mask(path)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "mask.jpg")
    for other in (tmp_path / "mask.jpg", tmp_path / "none.png"):
        with pytest.raises(ConfigError, match="expected a PNG, white where nothing is to be judged"):
            draw_mask(other)


def test_detections_are_found_by_their_old_names() -> None:
    assert detector.Detection is detection.Detection and detector.Verdict is detection.Verdict
    old = pickle.dumps(Detection(np.zeros((1, 2, 2), np.float32), np.zeros(1, np.float32), ("",), (None,), "x"), 0)
    assert b"flowad_fast.detection" in old
    found = pickle.loads(old.replace(b"flowad_fast.detection", b"flowad_fast.detector"))
    assert isinstance(found, detection.Detection) and found.judged is None


@pytest.mark.long
def test_a_cracked_cell_is_found_where_it_is_among_real_ones() -> None:
    """Six cells of ELPV as one frame; at this scale without overlap each tile is a cell, which the demo model knows."""
    model = load_checkpoint("demo")
    samples = read_dataset("elpv", None).samples
    good = [read_frame(one.path) for one in samples if one.split == "calibration"]
    bad = [read_frame(one.path) for one in samples if one.split == "test" and one.label == 1][:24]
    single = Detector.from_model(model, Mismatch(), device="cpu")
    worst = np.argsort(single(bad).score)[::-1][:6]
    random = np.random.RandomState(0)

    def six(cells: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        return np.concatenate([np.concatenate(cells[i : i + 3], 1) for i in (0, 3)], 0)

    def drawn() -> list[NDArray[np.uint8]]:
        return [good[i] for i in random.choice(len(good), 6, replace=False)]

    tiler = Tiler(Tiling(overlap=0, scale=256 / 300), model.spec.image.size)
    one = Detector.from_model(model, Mismatch(), device="cpu", tiler=tiler)
    one.calibration = fit(one, GoodParts([six(drawn()) for _ in range(19)], [""] * 19, ["x"] * 19), 0.05)
    for place, index in enumerate(worst):
        cells = drawn()
        cells[place] = bad[index]
        found = one(six(cells))
        assert found.map.shape == (1, 512, 768) and found.verdict == (Verdict.ANOMALOUS,)
        region = found.regions[0][0]
        assert region.peak == found.score[0] == found.map.max()
        left, top, right, bottom = region.box
        assert (top + bottom) // 600 * 3 + (left + right) // 600 == place
        row, column = divmod(place, 3)
        tile = found.map[0, 256 * row : 256 * (row + 1), 256 * column : 256 * (column + 1)]
        alone = single(bad[index]).map[0]
        assert np.corrcoef(tile.ravel(), alone.ravel())[0, 1] > 0.995, "a tile that is a cell has the cell's map"
