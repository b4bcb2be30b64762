"""Tiles through the commands: trained on, evaluated, exported, shown, calibrated, inspected, and given to a line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowad_fast.checkpoints.load import load_checkpoint, save_checkpoint
from flowad_fast.cli import eval as eval_command
from flowad_fast.cli import inspect as inspect_command
from flowad_fast.cli import train as train_command
from flowad_fast.cli import tune as tune_command
from flowad_fast.config import Tiling
from flowad_fast.data.images import frame_size, read_frame
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.detector import Detector
from flowad_fast.errors import ConfigError, FrameError
from flowad_fast.evaluation.evaluate import evaluate
from flowad_fast.evaluation.inspection import heat_ranges, inspect_files
from flowad_fast.evaluation.metrics import pixel_metrics
from flowad_fast.export import cli as export_command
from flowad_fast.files import digest
from flowad_fast.line.scoring import InThread
from flowad_fast.stages.scorers import Inversion
from flowad_fast.stages.tiling import Tiler
from flowad_fast.training.batches import cached_features, training_images
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.loop import CHECKPOINT, train
from tests.models import IMAGE, tiny_frames
from tests.test_tiled_bundle import HOLE, ROI, bright, calibrated, masked
from tests.test_training import TINY, direct_features

HEIGHT, WIDTH = 96, 120
MASKED = (0, 0, 30, 40)
"""Left, top, right, bottom."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large parts in MVTec's layout, of one size: noise, and a bright square on the defective ones."""
    root = tmp_path_factory.mktemp("data")
    for split, kind, count in (("train", "good", 4), ("test", "good", 3), ("test", "spot", 3)):
        folder = root / "screw" / split / kind
        folder.mkdir(parents=True)
        for i, frame in enumerate(tiny_frames(count, HEIGHT, WIDTH, seed=len(kind) * count) // 3):
            if kind == "spot":
                frame[50:62, 80:96] = 255
                truth = np.zeros((HEIGHT, WIDTH), bool)
                truth[50:62, 80:96] = True
                (root / "screw/ground_truth/spot").mkdir(parents=True, exist_ok=True)
                Image.fromarray(truth).save(root / f"screw/ground_truth/spot/{i:03d}_mask.png")
            Image.fromarray(frame).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def mask_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mask") / "mask.png"
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[MASKED[1] : MASKED[3], MASKED[0] : MASKED[2]] = True
    Image.fromarray(mask).save(path)
    return path


@pytest.fixture(scope="module")
def options(root: Path, mask_file: Path) -> dict[str, object]:
    return TINY | {"root": root, "tiles": 0.25, "roi": "0,0,120,90", "mask": mask_file, "flips": "none"}


@pytest.fixture(scope="module")
def trained(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    train(TrainConfig(**options, feature_cache=tmp_path_factory.mktemp("cache")), output, device="cpu")  # type: ignore[arg-type]
    return output / CHECKPOINT


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command's main; its exit code, standard output and error."""

    def call(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flowad-thing", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        else:
            code = 0
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_every_tile_of_every_good_part_is_a_training_image(options: dict[str, object]) -> None:
    config = TrainConfig(**options)  # type: ignore[arg-type]
    assert config.tiling == Tiling(overlap=0.25, roi=(0, 0, 120, 90))
    direct = direct_features(config.model_copy(update={"tiles": None}))
    tiler = Tiler(config.tiling, 64, None)
    direct.tiler, direct.places = tiler, training_images(direct.paths, tiler)
    assert len(direct.places) == 4 * 6
    order = np.random.RandomState(0).permutation(24)
    loaded = direct.load(order, np.zeros_like(order))
    for row, index in enumerate(order.tolist()):
        photo, tile = direct.places[index]
        frame = read_frame(direct.paths[photo])
        expected = torch.from_numpy(tiler.grid(*frame.shape[:2]).cut(frame)[tile]).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(part)[:, None, None] for part in (direct.image.mean, direct.image.std))
        torch.testing.assert_close(loaded[row], (expected - mean) / std)
    direct.pool.shutdown()


def test_a_checkpoint_keeps_its_tiles_and_its_mask(trained: Path, mask_file: Path, tmp_path: Path) -> None:
    model = load_checkpoint(trained)
    assert model.spec.tiling == Tiling(overlap=0.25, roi=(0, 0, 120, 90))
    assert model.mask is not None and model.mask.sum() == 30 * 40
    save_checkpoint(model, tmp_path / "copy.safetensors")
    again = load_checkpoint(tmp_path / "copy.safetensors")
    assert again.spec == model.spec and again.mask is not None and np.array_equal(again.mask, model.mask)
    assert Detector.from_model(model, Inversion(), device="cpu").engine == "eager on cpu, tiled"


def test_epochs_count_tiles(options: dict[str, object], tmp_path: Path) -> None:
    given = {**options, "steps": 1, "epochs": 2, "warmup_steps": 0}
    assert train(TrainConfig(**given), tmp_path, device="cpu").step == 2 * 24 // 4  # type: ignore[arg-type]


def test_a_cache_of_features_is_of_its_tiles(options: dict[str, object], tmp_path: Path) -> None:
    config = TrainConfig(**options)  # type: ignore[arg-type]
    direct = direct_features(config)
    for overlap, scale in ((None, 1), (0.25, 1), (0.5, 1), (0.5, 0.8)):
        direct.tiler = None if overlap is None else Tiler(Tiling(overlap=overlap, scale=scale), 64)
        direct.places = training_images(direct.paths, direct.tiler)
        direct.images, direct._last = len(direct.places), None
        rows = np.arange(direct.images)
        got = cached_features(direct, tmp_path, "backbone").load(rows, np.zeros_like(rows))
        torch.testing.assert_close(got, direct.finish(direct.load(rows, np.zeros_like(rows))), rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.glob("features-*.npy"))) == 4
    direct.pool.shutdown()


def test_a_run_on_other_tiles_or_another_mask_does_not_go_on(
    options: dict[str, object], trained: Path, tmp_path: Path
) -> None:
    for other in ({"tiles": 0.5}, {"roi": None}, {"scale": 1.1}):
        with pytest.raises(ConfigError, match=f"another configuration \\({next(iter(other))}: "):
            train(TrainConfig(**(options | other)), trained.parent, device="cpu")  # type: ignore[arg-type]
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:5, :5] = True
    Image.fromarray(mask).save(tmp_path / "other.png")
    with pytest.raises(ConfigError, match=r"another configuration \(mask_sha256"):
        train(TrainConfig(**(options | {"mask": tmp_path / "other.png"})), trained.parent, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": 0.5}, "scale 0.5 goes with tiles; give tiles too"),
        ({"roi": "1,2,3,4"}, r"roi \(1, 2, 3, 4\) goes with tiles"),
        ({"tiles": 0.2, "teacher": "demo"}, "a student learns from whole photos; got tiles"),
        ({"tiles": 0.9}, "less than or equal to 0.75"),
        ({"tiles": 0, "roi": "5,5,0,9"}, "expected LEFT,TOP,WIDTH,HEIGHT in pixels"),
    ],
)
def test_options_of_training_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**(TINY | wrong))  # type: ignore[arg-type]


def test_photos_that_cannot_be_cut_are_named(root: Path, options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(FrameError, match=r"000.png: the frame is 96x120 pixels \(58x72 at .* smaller than a tile"):
        train(TrainConfig(**(options | {"scale": 0.6, "roi": None})), tmp_path, device="cpu")  # type: ignore[arg-type]


def test_the_size_of_a_photo_is_known_without_reading_it(tmp_path: Path) -> None:
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.fromarray(tiny_frames(1, 40, 70)[0]).save(path, exif=exif)
        assert frame_size(path) == read_frame(path).shape[:2]
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(FrameError, match="text.png: cannot be read"):
        frame_size(tmp_path / "text.png")


@pytest.mark.long
def test_from_training_to_inspection(
    run: Callable[..., tuple[int, str, str]], root: Path, mask_file: Path, tmp_path: Path
) -> None:
    """The commands one after the other, each taking the tiles from the one before."""
    flags = [
        f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name not in ("categories", "flips")
    ]
    tiles = ["--tiles", "0.25", "--roi", "0,0,120,90", "--mask", mask_file]
    code, out, err = run(
        train_command.main, "--output", tmp_path / "run", "--data", root, "--device", "cpu", "--json", *tiles, *flags
    )
    assert code == 0, err
    checkpoint = Path(json.loads(out)["checkpoint"])

    code, out, err = run(eval_command.main, checkpoint, "--data", root, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["detector"] == "eager on cpu, tiled" and report["metrics"]["screw"]["pixel_auroc"] is not None
    code, _, err = run(eval_command.main, checkpoint, "--data", root, "--location")
    assert code == 1 and "leave --location out, or do without tiles" in err.replace("\n", " ")
    code, _, err = run(tune_command.command({}), checkpoint, "--data", root, "--output", tmp_path / "tuning")
    assert code == 1 and "flowad-tune judges whole frames" in err

    good = root / "screw/train/good"
    make = ["make", checkpoint, "--format", "onnx", "--device", "cpu", "--calibrate", good, "--alpha", "0.3"]
    code, out, err = run(export_command.main, *make, "--dry-run", "--json", "--scale", "1.5", "--roi", "none")
    assert code == 0, err
    assert json.loads(out)["tiling"] == {"overlap": 0.25, "scale": 1.5, "roi": None}
    assert json.loads(out)["frame_size"] == [HEIGHT, WIDTH], "the mask's"
    code, _, err = run(export_command.main, *make, "--dry-run", "--mask", "none")
    assert code == 1 and "tiles of which frames?" in err, "without the checkpoint's mask nothing says so"
    code, out, err = run(export_command.main, *make, "--output", tmp_path / "bundle", "--json")
    assert code == 0, err
    manifest = json.loads(out)["manifest"]
    assert manifest["tiling"] == {"overlap": 0.25, "scale": 1.0, "roi": [0, 0, 120, 90]}
    assert manifest["frame_size"] == [HEIGHT, WIDTH] and manifest["calibration"]
    code, out, _ = run(export_command.main, "show", tmp_path / "bundle")
    assert "tiles: overlap 25 %, frames at scale 1, region of interest 120x90 at (0, 0)" in out
    assert "tiles: 6 of 64x64 pixels per frame of 96x120 (height x width)" in out
    assert "mask: 10.4% of the frame is never judged" in out
    card = (tmp_path / "bundle/README.md").read_text()
    assert "| tiles | overlap 25 %, frames at scale 1, region of interest 120x90 at (0, 0), with a fixed mask |" in card
    code, _, err = run(export_command.main, "calibrate", tmp_path / "bundle", good, "--alpha", "0.25")
    assert code == 0, err

    photos = tmp_path / "photos"
    photos.mkdir()
    for i, frame in enumerate(tiny_frames(2, HEIGHT, WIDTH, 8)):
        Image.fromarray(frame).save(photos / f"{i}.png")
    Image.fromarray(tiny_frames(1, 64, 64)[0]).save(photos / "small.png")
    results = tmp_path / "results.jsonl"
    code, out, err = run(
        inspect_command.main, tmp_path / "bundle", photos, "--output", results, "--format", "jsonl",
        "--overlays", tmp_path / "heat", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = {Path(row["file"]).name: row for row in map(json.loads, results.read_text().splitlines())}
    assert rows["small.png"]["status"] == "invalid" and "the bundle takes 96x120" in rows["small.png"]["reason"]
    assert rows["0.png"]["score"] is not None and rows["0.png"]["engine"] == "onnxruntime on cpu, tiled"
    assert Image.open(tmp_path / "heat/0.png.png").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--roi", "0,0,9,9"], "--roi without tiles; give --tiles OVERLAP too"),
        (["--tiles", "none", "--scale", "2"], "--scale without tiles"),
        (["--tiles", "0.25"], "tiles of which frames? give --frame HEIGHTxWIDTH"),
        (["--tiles", "much", "--frame", "any"], "overlap: Input should be a valid number"),
        (
            ["--tiles", "0", "--frame", "any", "--roi", "1,2,3"],
            "roi: Value error, expected LEFT,TOP,WIDTH,HEIGHT in pixels of the frame",
        ),
        (["--tiles", "0", "--frame", "any", "--mask", "no.png"], "no.png: is no mask"),
    ],
)
def test_export_options_that_cannot_be(
    run: Callable[..., tuple[int, str, str]], flags: list[str], message: str, tmp_path: Path
) -> None:
    code, _, err = run(export_command.main, "make", "demo", "--output", tmp_path / "b", "--dry-run", *flags)
    assert code == 1 and message in err, err


# Inspection and evaluation with a detector whose map is the brightness


def dataset(folder: Path, frames: np.ndarray, truths: dict[int, np.ndarray]) -> Dataset:
    """Test images of one category; those with a truth are defective."""
    samples = []
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")
        mask = None
        if i in truths:
            mask = folder / f"{i}.mask.png"
            Image.fromarray(truths[i]).save(mask)
        samples.append(Sample(folder / f"{i}.png", "thing", "test", int(i in truths), "spot" if mask else "good", mask))  # type: ignore[arg-type]
    return Dataset("things", tuple(samples), True)


def test_pixels_are_compared_at_the_frames_own_size_where_they_are_judged(tmp_path: Path) -> None:
    frames = tiny_frames(4, 150, 200, seed=3) // 2
    truths = {}
    for i, (left, top) in ((2, (120, 100)), (3, (105, 60))):
        frames[i, top : top + 10, left : left + 20] = 255
        truths[i] = np.zeros((150, 200), bool)
        truths[i][top : top + 10, left : left + 20] = True
    truths[3][0:5] = True  # outside the region of interest: no detector can find it
    frames[0, HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = 255  # under the mask: nobody may count it
    one = calibrated(bright(mask=masked()))
    report = evaluate(one, dataset(tmp_path, frames, truths), mask_size=None)
    judged = np.zeros((150, 200), bool)
    judged[ROI[1] : ROI[3], ROI[0] : ROI[2]] = True
    judged &= ~masked()
    expected = pixel_metrics(
        np.stack([truths.get(i, np.zeros((150, 200), bool))[judged][None] for i in range(4)]),
        np.stack([frame.mean(-1, dtype=np.float32)[judged][None] for frame in frames]),
    )
    for name in ("pixel_auroc", "pixel_ap", "pixel_f1max"):
        assert report.metrics["thing"][name] == pytest.approx(expected[name], abs=1e-5)
    assert report.metrics["thing"]["pixel_aupro"] == pytest.approx(1)
    counts = report.regions["thing"]
    assert (counts.defects, counts.touched, counts.good_with_regions) == (2, 2, 0)


def test_maps_of_scaled_frames_are_compared_at_the_frames_own_size(tmp_path: Path) -> None:
    frames = tiny_frames(3, 150, 200, seed=3) // 8
    truth = np.zeros((150, 200), bool)
    truth[40:60, 80:120] = True
    frames[2][truth] = 255
    one = calibrated(bright(Tiling(scale=0.5, overlap=0.1)))
    report = evaluate(one, dataset(tmp_path, frames, {2: truth}), mask_size=None)
    auroc = report.metrics["thing"]["pixel_auroc"]
    assert auroc is not None and auroc > 0.999


def test_a_defect_that_nobody_judges_is_left_out_of_the_pixel_metrics(tmp_path: Path) -> None:
    frames = tiny_frames(4, 150, 200, seed=3) // 2
    seen, hidden = np.zeros((2, 150, 200), bool)
    seen[100:110, 120:140], hidden[:9] = True, True
    frames[2][seen] = frames[3][hidden] = 255
    report = evaluate(calibrated(bright()), dataset(tmp_path, frames, {2: seen, 3: hidden}), mask_size=None)
    (row,) = report.unmarked
    assert row.path.endswith("3.png") and "marks no defect at 150x200 pixels that are judged" in str(row.unmarked)
    assert report.pixel_images["thing"] == 3


def test_inspection_draws_and_writes_regions_where_they_are(tmp_path: Path) -> None:
    one = calibrated(bright(Tiling(scale=0.75, overlap=0.2, roi=(20, 12, 160, 128))))
    frame = tiny_frames(1, 150, 200, seed=2)[0] // 3
    frame[60:80, 100:140] = 255
    frame[0:10] = 255  # not judged
    Image.fromarray(frame).save(tmp_path / "a.png")
    Image.fromarray(frame[:100]).save(tmp_path / "b.png")
    found, other = inspect_files(one, [tmp_path / "a.png", tmp_path / "b.png"])
    assert found.status == "anomalous" and found.regions is not None and len(found.regions) == 1
    assert max(abs(a - b) for a, b in zip(found.regions[0].box, (100, 60, 140, 80), strict=True)) <= 2
    assert (other.status, other.score) == ("invalid", None) and "the bundle takes 150x200" in other.reason
    low, high = heat_ranges(one, [tmp_path / "a.png"])[""]
    assert found.map is not None and found.judged is not None
    assert low == float(np.median(found.map[found.judged])), "what is not judged is no part of the scale"
    assert one.calibration is not None and high == 2 * one.calibration.classes[""].threshold - low


def test_a_line_takes_a_tiled_detector() -> None:
    one = calibrated(bright(mask=masked()))
    scoring = InThread(one)
    scoring.start(5)
    try:
        frames = tiny_frames(2, 150, 200, seed=7)
        found = scoring(frames, None, 5)
        np.testing.assert_array_equal(found.score, one(frames).score)
        assert scoring.size == (150, 200)
    finally:
        scoring.close()


def test_what_cuts_other_tiles_has_another_identity() -> None:
    assert digest(Tiler(Tiling(), IMAGE).identity) == digest(Tiler(Tiling(), IMAGE).identity)
    others = [Tiler(Tiling(overlap=0.3), IMAGE), Tiler(Tiling(), 128), Tiler(Tiling(), IMAGE, masked())]
    assert len({digest(one.identity) for one in others} | {digest(Tiler(Tiling(), IMAGE).identity)}) == 4
