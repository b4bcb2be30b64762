"""`evaluate` with a fake detector on tiny data sets, its figures, and the command."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowad_fast import errors
from flowad_fast.cli import eval as cli
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Dataset
from flowad_fast.errors import CalibrationError, ConfigError, FrameError
from flowad_fast.evaluation import evaluate as evaluation
from flowad_fast.evaluation.evaluate import evaluate, plot_report, save_mistakes, worst_mistakes
from flowad_fast.evaluation.metrics import METRICS, image_metrics, pixel_metrics
from flowad_fast.evaluation.overlay import overlay

SIZE = 16


@dataclass
class Detection:
    map: np.ndarray
    score: np.ndarray


class Brightness:
    """Takes the red channel as the anomaly map, and its maximum as the score; remembers its calls."""

    engine = "fake"
    aggregate = "max"
    tiler = None

    def __init__(self, class_names=(), size=SIZE):
        self.class_names, self.image_size, self.calls = class_names, size, []

    def __call__(self, frames, classes=None):
        self.calls.append((frames.shape, frames.dtype, classes))
        resized = [Image.fromarray(f[..., 0]).resize((self.image_size,) * 2, Image.Resampling.NEAREST) for f in frames]
        maps = np.stack([np.asarray(image, np.float32) for image in resized])
        return Detection(maps, maps.max(axis=(1, 2)))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path):
    """Two categories in MVTec's layout; `b` has photos of two sizes, and its dimmest defect hides among good parts."""
    rng = np.random.default_rng(0)
    for category, sides in (("a", (SIZE,) * 4), ("b", (SIZE, SIZE, 2 * SIZE, SIZE))):
        save(tmp_path / category / "train/good/0.png", np.zeros((4, 4, 3), np.uint8))
        for i, side in enumerate(sides):
            save(tmp_path / category / f"test/good/{i}.png", rng.integers(0, 60, (side, side, 3), dtype=np.uint8))
            photo = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
            mask = np.zeros((side, side), np.uint8)
            spot = slice(side // 4, side // 2)
            mask[spot, spot] = 255
            photo[spot, spot] = 20 if (category, i) == ("b", 0) else 100 + 40 * i
            save(tmp_path / category / f"test/spot/{i}.png", photo)
            save(tmp_path / category / f"ground_truth/spot/{i}_mask.png", mask)
    return tmp_path


@pytest.fixture
def dataset(root):
    return read_dataset("mvtec", root)


def run(detector, dataset, **options):
    return evaluate(detector, dataset, mask_size=SIZE, **options)


def test_metrics_are_those_of_the_maps(dataset):
    report = run(Brightness(), dataset)
    assert list(report.metrics) == ["a", "b"] and not report.errors
    assert report.metrics["a"]["image_auroc"] == 1.0 and report.metrics["b"]["image_auroc"] < 1.0
    samples = dataset.select("test", "a")
    photos = np.stack([np.asarray(Image.open(s.path)) for s in samples])
    masks = np.stack([np.asarray(Image.open(s.mask)) > 0 if s.mask else np.zeros((SIZE, SIZE), bool) for s in samples])
    maps = photos[..., 0].astype(np.float32)
    expected = image_metrics([s.label for s in samples], maps.max(axis=(1, 2))) | pixel_metrics(masks, maps)
    assert {name: report.metrics["a"][name] for name in METRICS} == pytest.approx(expected)
    assert report.metrics["a"]["mean_ad"] == pytest.approx(np.mean(list(expected.values())))
    for name, value in report.mean.items():
        assert value == pytest.approx((report.metrics["a"][name] + report.metrics["b"][name]) / 2)


def test_rows_follow_the_data_set_and_say_what_ran(dataset):
    report = run(Brightness(), dataset)
    assert [row.path for row in report.images] == [str(s.path) for s in dataset.select("test")]
    assert {(row.label, row.defect) for row in report.images} == {(0, "good"), (1, "spot")}
    assert report.detector == "fake" and report.image_score == "max" and report.dataset == "mvtec"


def test_one_call_has_one_size_and_at_most_a_batch(dataset):
    detector, done = Brightness(), []
    run(detector, dataset, categories=["b"], batch_size=3, progress=done.append)
    # good 0 1 | 2 large, 3, spot 0 1 | 2 large, 3, cut into batches of three
    sizes = [(shape[0], shape[1]) for shape, _, _ in detector.calls]
    assert sizes == [(2, 16), (1, 32), (3, 16), (1, 32), (1, 16)]
    assert all(dtype == np.uint8 and classes is None for _, dtype, classes in detector.calls)
    assert done == [1] * 8


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_batch_size_changes_nothing(dataset, batch_size):
    assert run(Brightness(), dataset, batch_size=batch_size) == run(Brightness(), dataset)


def test_classes_are_passed_to_a_conditional_detector(dataset):
    detector = Brightness(class_names=("b", "a"))
    run(detector, dataset, categories=["a"])
    assert detector.calls[0][2] == ["a"] * 8


def test_unknown_names(dataset):
    with pytest.raises(ConfigError, match="the detector has no class 'a'; .*valid: bottle"):
        run(Brightness(class_names=("bottle",)), dataset)
    with pytest.raises(ConfigError, match="no category 'c' in mvtec"):
        run(Brightness(), dataset, categories=["c"])


def test_one_label_only_is_refused_before_any_work(dataset):
    good = Dataset("mvtec", dataset.select("test", label=0), has_masks=True)
    detector = Brightness()
    with pytest.raises(ConfigError, match="'a' of mvtec has no defective test images"):
        run(detector, good)
    with pytest.raises(ConfigError, match="has no images"):
        run(detector, Dataset("empty", (), has_masks=False))
    assert not detector.calls


def test_maps_of_another_size_are_refused(dataset):
    with pytest.raises(ConfigError, match=r"maps \(8, 8, 8\).*set mask_size"):
        run(Brightness(size=8), dataset)


def test_unreadable_files_become_error_rows(root, dataset):
    (root / "a/test/good/1.png").write_bytes(b"")
    (root / "a/ground_truth/spot/2_mask.png").write_bytes(b"x")
    report = run(Brightness(), dataset)
    assert [(Path(r.path).name, r.label, r.score) for r in report.errors] == [("1.png", 0, None), ("2.png", 1, None)]
    assert "0 bytes" in report.errors[0].error and "2_mask.png" in report.errors[1].error
    assert len(report.images) == 16 and report.metrics["a"]["image_auroc"] == 1.0


def test_scores_that_are_not_finite_become_error_rows(dataset):
    class Broken(Brightness):
        def __call__(self, frames, classes=None):
            detection = super().__call__(frames, classes)
            detection.score[0] = np.nan
            detection.map[1, 0, 0] = np.inf
            return detection

    report = run(Broken(), dataset, categories=["a"])
    assert [row.score is None for row in report.images] == [True, True] + [False] * 6
    assert "not finite" in report.errors[0].error
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_frames_that_the_detector_doubts_or_refuses_become_error_rows(dataset):
    class Careful(Brightness):
        def __call__(self, frames, classes=None):
            if frames.shape[1] != SIZE:
                raise FrameError("the bundle takes 16x16 frames")
            detection = super().__call__(frames, classes)
            detection.invalid = ["the frame is black"] + [None] * (len(frames) - 1)
            return detection

    report = run(Careful(), dataset, categories=["b"], batch_size=4)
    assert [row.error and row.error.split()[-1] for row in report.images] == [
        "black", None, "frames", None, "black", None, "frames", None,
    ]  # fmt: skip


def test_no_metrics_when_errors_leave_one_label(root, dataset):
    for i in range(4):
        (root / f"a/test/good/{i}.png").write_bytes(b"")
    report = run(Brightness(), dataset)
    assert set(report.metrics["a"].values()) == {None} and report.metrics["b"]["image_auroc"] is not None
    assert set(report.mean.values()) == {None} and len(report.errors) == 4


def test_no_pixel_metrics_without_masks(dataset):
    plain = replace(dataset, has_masks=False, samples=tuple(replace(s, mask=None) for s in dataset.samples))
    report = run(Brightness(), plain)
    assert report.metrics["a"]["image_ap"] == 1.0 and report.metrics["a"]["pixel_ap"] is None
    assert report.mean["image_ap"] is not None and report.mean["mean_ad"] is None


def test_test_set_normalisation_is_the_sum_of_two_normalised_terms(dataset):
    report = run(Brightness(), dataset, test_set_normalisation=True)
    assert report.image_score == "diff+sum (test-set normalised)"
    assert any("of all 2 categories together" in remark for remark in report.remarks)
    maps = [
        Brightness()(np.asarray(Image.open(s.path))[None]).map[0].astype(float)
        for category in ("a", "b")
        for s in dataset.select("test", category)
    ]
    expected = np.zeros(len(maps))
    for term in ([m.max() - m.min() for m in maps], [m.sum() for m in maps]):
        expected += (np.array(term) - min(term)) / (max(term) - min(term))
    assert [row.score for row in report.images] == pytest.approx(expected.tolist())


def test_test_set_normalisation_needs_no_score_of_the_detector(dataset):
    class Uncalibrated(Detection):
        @property
        def score(self):
            raise CalibrationError("diff+sum needs ranges")

        @score.setter
        def score(self, value):
            pass

    class Detector(Brightness):
        def __call__(self, frames, classes=None):
            return Uncalibrated(**vars(super().__call__(frames, classes)))

    report = run(Detector(), dataset, test_set_normalisation=True)
    assert report == run(Brightness(), dataset, test_set_normalisation=True)
    with pytest.raises(CalibrationError):
        run(Detector(), dataset)


def test_constant_maps_can_be_normalised(dataset):
    class Constant(Brightness):
        def __call__(self, frames, classes=None):
            return Detection(np.ones((len(frames), SIZE, SIZE), np.float32), np.ones(len(frames), np.float32))

    report = run(Constant(), dataset, test_set_normalisation=True)
    assert {row.score for row in report.images} == {0.0} and report.mean["image_auroc"] == 0.5


def test_report_goes_through_json(dataset):
    report = run(Brightness(), dataset)
    values = json.loads(report.to_json())
    assert values == report.to_dict() | {
        "images": [vars(row) for row in report.images], "remarks": list(report.remarks)
    }  # fmt: skip
    assert values["schema"] == 1 and values["metrics"] == report.metrics and values["mean"] == report.mean


def test_worst_mistakes_are_ranked_by_wrong_comparisons(dataset):
    worst = worst_mistakes(run(Brightness(), dataset), n=3)
    assert [row.label for row, _ in worst] == [0, 0, 1]
    hidden, share = worst[-1]
    assert (hidden.category, Path(hidden.path).name) == ("b", "0.png") and share > 0
    assert worst[0][0].category == "b" and worst[0][1] == pytest.approx(0.25)


def test_figures_are_written(dataset, tmp_path):
    report = run(Brightness(), dataset)
    plot_report(report, tmp_path / "report.png")
    assert np.asarray(Image.open(tmp_path / "report.png")).std() > 0
    detector = Brightness(class_names=("a", "b"))
    files = save_mistakes(report, detector, tmp_path / "new/mistakes", n=4)
    assert len(files) == 4 and all(Image.open(file).width > 400 for file in files)
    assert files[-1].name.startswith("04_defective_") and "03_defective_b_0.png" in {f.name for f in files}
    assert detector.calls[0][2] == ["b"]


def test_figures_without_pixel_metrics_or_scores(root, dataset, tmp_path):
    for category in "ab":
        for file in (root / category / "test").rglob("*.png"):
            file.write_bytes(b"")
    report = run(Brightness(), dataset)
    plot_report(report, tmp_path / "report.png")
    assert save_mistakes(report, Brightness(), tmp_path / "mistakes") == []


def test_overlay_grows_with_the_heat():
    frame = np.full((8, 12, 3), 100, np.uint8)
    heat = np.array([[0, 0, 10], [0, 0, 10]], np.float32)
    drawn = overlay(frame, heat, 0, 10)
    assert drawn.shape == frame.shape and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:, 0], frame[:, 0])
    changed = np.abs(drawn.astype(int) - frame).sum(axis=-1)[0]
    assert changed[0] == 0 and changed[-1] > 50
    np.testing.assert_array_equal(overlay(frame, heat - 99, 0, 10), frame)
    with pytest.raises(ValueError, match="vmax > vmin"):
        overlay(frame, heat, 1, 1)


# The command, with the fake in place of a model


@pytest.fixture
def fake_model(monkeypatch):
    asked = []

    def load(wanted):
        asked.append(wanted)
        return Brightness(size=256), "diff+sum" if wanted.authors else None, ("said by the loader",)

    monkeypatch.setattr(cli, "_load", load)
    return asked


def call(monkeypatch, *arguments):
    """Run `flowad-eval` and return its exit code."""
    monkeypatch.setattr("sys.argv", ["flowad-eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def test_command_prints_a_table_and_writes_files(root, fake_model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli.common.out, "_width", 200)
    output = tmp_path / "out"
    assert call(monkeypatch, "x.pth", "--data", root, "--steps", 2, "--category", "a", "--output", output) == 0
    shown = capsys.readouterr().out
    assert "AUPRO" in shown and "mean" in shown and "100.0" in shown
    asked = fake_model[0]
    assert (asked.model, asked.scorer, asked.config, asked.backbone_weights) == ("x.pth", None, None, None)
    assert {option: value for option, value in asked.scoring.items() if value is not None} == {"steps": 2}
    report = json.loads((output / "report.json").read_text())
    assert list(report["metrics"]) == ["a"] and (output / "report.png").is_file()
    assert len(list((output / "mistakes").glob("*.png"))) == 8


def test_command_prints_json_and_lists_errors(root, fake_model, monkeypatch, capsys):
    (root / "a/test/good/1.png").write_bytes(b"")
    assert call(monkeypatch, "x.pth", "--data", root, "--json", "--test-set-normalisation") == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["image_score"] == evaluation.TEST_SET_SCORE and "said by the loader" in report["remarks"]
    shown = captured.err.replace("\n", " ")
    assert "left out: " in shown and "0 bytes" in shown and "1 of 16 images are in no metric" in shown


def test_missing_tools_are_named_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "scipy" else True)
    assert call(monkeypatch, "m", "--layout", "elpv") == 1
    assert 'flowad-eval needs scipy: pip install "flowad-fast[tools]"' in " ".join(capsys.readouterr().err.split())


def test_demo_is_a_checkpoint_like_any_other():
    detector, scaled, remarks = cli._load(cli.Asked("demo", "reconstruction", {"steps": 4, "tau": 0.25}))
    assert scaled is None and not remarks
    detection = detector(np.random.RandomState(0).randint(0, 256, (1, 300, 300, 3)).astype(np.uint8))
    assert detector.engine.startswith("eager") and detection.map.shape == (1, 256, 256)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--layout", "mvtce"], "did you mean 'mvtec'"),
        (["m"], "needs a data folder"),
        (["m", "--data", "ROOT", "--category", "aa"], "no category 'aa'"),
        (["BUNDLE", "--data", "ROOT", "--steps", "2"], "has its scorer fixed, got --steps"),
        (["BUNDLE", "--data", "ROOT", "--scorer", "density", "--config", "c"], "got --scorer, --config"),
        (["m", "--data", "ROOT", "--scorer", "inverse"], "unknown scorer 'inverse'"),
        (["BUNDLE", "--data", "ROOT", "--tau", "0.3"], "has its scorer fixed, got --tau"),
        (["m", "--data", "ROOT", "--scorer", "inversion", "--probes", "3"], "--probes"),
        (["m", "--data", "ROOT", "--scorer", "density", "--tau", "0.3"], "reconstruction"),
        (["m", "--data", "ROOT", "--steps", "3", "--evaluations", "3"], "--evaluations"),
    ],
)
def test_command_errors_are_one_line(root, monkeypatch, capsys, tmp_path, arguments, message):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/manifest.json").write_text("{}")
    paths = {"ROOT": root, "BUNDLE": tmp_path / "bundle"}
    assert call(monkeypatch, *[paths.get(a, a) for a in arguments]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "ConfigError" in error and message in error and "Traceback" not in error
