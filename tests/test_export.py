import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model
from PIL import Image

import flowad_fast
from flowad_fast import bundle, detector
from flowad_fast.checkpoints.load import load_checkpoint, save_checkpoint
from flowad_fast.engines import Engine
from flowad_fast.engines.start import start_engine
from flowad_fast.errors import (
    BundleError,
    CalibrationError,
    ConfigError,
    EngineUnavailableError,
    FrameError,
    ParityError,
)
from flowad_fast.export import calibration, verify
from flowad_fast.export.calibration import recalibrate
from flowad_fast.export.exporter import check_bundle, export_bundle
from flowad_fast.export.formats import FORMATS, Built, Format, Request, parse_batch, parse_formats
from flowad_fast.export.frames import GoodParts, ParityFrames, good_parts, parity_frames, parse_size
from flowad_fast.export.verify import TOLERANCES, auroc, compare, ranks
from flowad_fast.files import sha256
from flowad_fast.model import FlowModel
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import Density, Inversion, Reconstruction, Scorer

# Here, since the server may be started by a test of another file, and takes no more imports then.
multiprocessing.get_context("forkserver").set_forkserver_preload(["flowad_fast.export.exporter"])


def tiny(classes: int = 0) -> FlowModel:
    return tiny_model(classes, real_backbone=True, hidden_size=16, mlp_ratio=4)


def photos(count: int, seed: int = 0, size: tuple[int, int] = (72, 64)) -> np.ndarray:
    """Smooth random pictures, so that features differ between them."""
    coarse = np.random.RandomState(seed).randint(0, 256, (count, 6, 6, 3)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize(size[::-1], Image.Resampling.BICUBIC)) for c in coarse])


def good(count: int, classes: tuple[str, ...] = ("",)) -> GoodParts:
    names = [name for name in classes for _ in range(count)]
    return GoodParts(list(photos(len(names), seed=5)), names, [f"{i}.png" for i in range(len(names))])


def perturbed(share: float) -> Callable[[Request, Path], Built]:
    """An exporter with a fault: the weights it writes are off by `share` of themselves."""

    def write(request: Request, folder: Path) -> Built:
        save_checkpoint(request.model, folder / "own.safetensors", include_backbone=True)
        wrong = load_checkpoint(folder / "own.safetensors")
        for parameter in wrong.dit.parameters():
            parameter.mul_(1 + share)
        save_checkpoint(wrong, folder / "own.safetensors", include_backbone=True)
        (folder / "left-over.tmp").touch()
        return Built(("own.safetensors", "own.json"), {})

    return write


def raising(error: Exception) -> Callable[..., Any]:
    def act(*_: object) -> Any:
        raise error

    return act


class Fake(Format):
    """A format that is written by a function of the test."""

    def __init__(self, act: Callable[[Request, Path], Built], engine: Any = "eager") -> None:
        super().__init__("", "", engine)
        object.__setattr__(self, "act", act)

    def write(self, request: Request, folder: Path) -> Built:
        return self.act(request, folder)  # type: ignore[attr-defined]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formats with faults, beside the real ones; `elsewhere` does not run on this machine."""
    for name, act in {
        "wrong": perturbed(0.05),
        "right": perturbed(0.0),
        "elsewhere": perturbed(0.0),
        "missing": raising(EngineUnavailableError("needs the package tensorrt")),
        "crashing": raising(RuntimeError("segment\nfault")),
    }.items():
        monkeypatch.setitem(FORMATS, name, Fake(act))

    def start(folder: Path, manifest: bundle.Manifest, *rest: Any) -> Engine:
        if set(manifest.artefacts) == {"elsewhere"}:
            raise EngineUnavailableError("needs a GPU of compute capability 9.0")
        return start_engine(folder, manifest, *rest)

    monkeypatch.setattr(verify, "start_engine", start)


@pytest.fixture(scope="module")
def model() -> FlowModel:
    return tiny()


def export(model: FlowModel, target: Path, *formats: str, scorer: Scorer | None = None, **options: Any) -> Any:
    options.setdefault("frames", photos(5))
    return export_bundle(model, scorer or Inversion(), target, formats=formats, quiet=True, **options)


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): sha256(p) for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize(
    "scorer", [Inversion(steps=2), Density(steps=2, probes=2), Reconstruction(steps=4)], ids=lambda s: s.kind
)
def test_onnx_and_eager_agree_with_the_reference(tmp_path: Path, model: FlowModel, scorer: Scorer) -> None:
    labels = np.array([0, 1, 0, 1, 1])
    frames = ParityFrames(photos(5), "test pictures", labels)
    result = export(model, tmp_path / "b", "onnx", "eager", scorer=scorer, frames=frames, aggregate="diff+sum")
    assert result.ok and result.published and result.path == tmp_path / "b"
    assert names(tmp_path) == {"b"}
    assert names(tmp_path / "b") == {"manifest.json", "README.md", "model.onnx", "model.safetensors", "model.json"}
    _, manifest = bundle.read(tmp_path / "b")
    assert manifest == result.manifest
    for artefact in manifest.artefacts.values():
        parity = artefact.parity
        assert parity is not None and parity.passed
        assert parity.max_error < 1e-4 and parity.rms_error <= parity.max_error
        assert parity.spearman == pytest.approx(1) and parity.auroc_difference == 0
        assert (parity.frames, parity.source, parity.device) == (5, "test pictures", "cpu")
    frames2 = photos(3, seed=8, size=(90, 51))
    maps = {}
    for engine in ("eager", "onnxruntime"):
        loaded = flowad_fast.load(tmp_path / "b", engine=engine, device="cpu")
        assert loaded.engine == f"{engine} on cpu"
        maps[engine] = loaded(frames2).map
    x1 = model.features(frames2)
    truth = torch.nn.functional.interpolate(
        scorer.map(model, x1)[:, None], size=64, mode="bilinear", align_corners=False
    )[:, 0].numpy()
    for got in maps.values():
        assert np.abs(got - truth).max() < 1e-4 * truth.std()


def test_a_failing_format_is_rejected_and_the_others_are_published(
    tmp_path: Path, model: FlowModel, faulty: None
) -> None:
    result = export(model, tmp_path / "b", "wrong", "eager", "elsewhere", "missing", "crashing")
    assert result.published and not result.ok
    assert result.status["eager"] == "ok"
    assert result.status["wrong"].startswith("failed parity: map error")
    assert result.status["elsewhere"] == "ok, parity not measured: needs a GPU of compute capability 9.0"
    assert result.status["missing"] == "not available: needs the package tensorrt"
    assert result.status["crashing"] == "failed: RuntimeError: segment fault"
    assert names(tmp_path) == {"b", "b.rejected"}
    _, manifest = bundle.read(tmp_path / "b")
    assert set(manifest.artefacts) == {"eager", "elsewhere"}
    assert manifest.artefacts["elsewhere"].parity is None
    assert manifest.artefacts["elsewhere"].unmeasured == "needs a GPU of compute capability 9.0"
    assert names(tmp_path / "b.rejected") == {
        "own.safetensors", "own.json", "crashing.error.txt", "rejected.json", "README.md",
    }  # fmt: skip
    assert "RuntimeError: segment" in (tmp_path / "b.rejected" / "crashing.error.txt").read_text()
    refused = json.loads((tmp_path / "b.rejected" / "rejected.json").read_text())
    assert refused["artefacts"]["wrong"]["parity"]["passed"] is False
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| eager | eager | fp32 | passed on cpu, 5 frames (frames given by the caller) |" in card
    assert "| elsewhere | eager | fp32 | not measured: needs a GPU of compute capability 9.0 |" in card
    assert "FAILED" in (tmp_path / "b.rejected" / "README.md").read_text()


def test_a_failing_format_that_the_old_bundle_has_leaves_the_old_bundle(
    tmp_path: Path, model: FlowModel, faulty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(model, tmp_path / "b", "right", "eager").ok
    before = tree(tmp_path / "b")
    monkeypatch.setitem(FORMATS, "right", Fake(perturbed(0.05)))
    result = export(model, tmp_path / "b", "right", "eager", scorer=Inversion(steps=2))
    assert not result.ok and not result.published and result.path == tmp_path / "b.rejected"
    assert tree(tmp_path / "b") == before
    assert {"own.safetensors", "model.safetensors", "rejected.json"} <= names(tmp_path / "b.rejected")
    with pytest.raises(BundleError, match="a rejected export"):
        flowad_fast.load(tmp_path / "b.rejected")


def test_nothing_passed_nothing_published(tmp_path: Path, model: FlowModel, faulty: None) -> None:
    result = export(model, tmp_path / "b", "missing")
    assert (result.ok, result.published, result.path) == (False, False, None)
    assert names(tmp_path) == set()


def test_a_full_disk_in_the_middle_leaves_the_old_bundle(tmp_path: Path, model: FlowModel) -> None:
    export(model, tmp_path / "b", "eager")
    before = tree(tmp_path / "b")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))  # a write beyond it fails, as on a full disk
    try:
        result = export(model, tmp_path / "b", "eager")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "cannot be written ([Errno 27] File too large)" in result.status["eager"]
    assert tree(tmp_path / "b") == before
    assert names(tmp_path) == {"b", "b.rejected"}


def _export_for_ever(target: Path, ready: Any) -> None:
    torch.set_num_threads(1)
    model, seed = tiny(), 0
    ready.set()
    while True:
        seed += 1
        scorer = Reconstruction(steps=2, seed=seed)
        export_bundle(model, scorer, target, formats=("eager",), frames=photos(1), quiet=True)


def test_kill_9_at_ten_random_moments_never_damages_the_bundle(tmp_path: Path, model: FlowModel) -> None:
    target = tmp_path / "b"
    export(model, target, "eager", scorer=Reconstruction(steps=2, seed=0))
    context = multiprocessing.get_context("forkserver")  # processes of their own, without importing torch each time
    moments, caught = random.Random(0), 0
    for _ in range(10):
        ready = context.Event()
        process = context.Process(target=_export_for_ever, args=(target, ready))
        process.start()
        assert ready.wait(120)
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        process.join()
        assert process.exitcode == -9
        caught += any(".new-" in name for name in names(tmp_path))
        _, manifest = bundle.read(target)  # every hash agrees, whichever export it is from
        assert manifest.artefacts["eager"].parity is not None
    assert caught, "no kill fell into an export: the test shows nothing"
    detection = flowad_fast.load(target, device="cpu")(photos(2))
    assert np.isfinite(detection.map).all()
    assert export(model, target, "eager").ok
    assert names(tmp_path) == {"b"}


def test_thresholds_are_fitted_at_export_and_again_later(tmp_path: Path, model: FlowModel) -> None:
    export(model, tmp_path / "b", "eager", good=good(9), alpha=0.1)
    loaded = flowad_fast.load(tmp_path / "b", device="cpu")
    assert loaded.calibration is not None
    # One threshold for all: the largest of nine scores, to the rounding of another batch size.
    scores = loaded(np.stack(good(9).frames)).score
    assert scores.max() == pytest.approx(loaded.calibration.classes[""].threshold, rel=1e-4)
    before = tree(tmp_path / "b")
    manifest = recalibrate(tmp_path / "b", good(19), 0.05)
    assert manifest.calibration is not None and manifest.calibration.alpha == 0.05
    after = tree(tmp_path / "b")
    assert {name for name in after if after[name] != before.get(name)} == {"manifest.json", "README.md"}
    assert flowad_fast.load(tmp_path / "b", device="cpu").calibration == manifest.calibration
    assert "threshold" in (tmp_path / "b" / "README.md").read_text()


def test_diff_plus_sum_has_a_score_only_once_calibrated(tmp_path: Path, model: FlowModel) -> None:
    export(model, tmp_path / "b", "eager", aggregate="diff+sum")
    frames = photos(2)
    with pytest.raises(CalibrationError, match="calibrate the model first"):
        _ = flowad_fast.load(tmp_path / "b", device="cpu")(frames).score
    recalibrate(tmp_path / "b", good(18), 0.1)
    detection = flowad_fast.load(tmp_path / "b", device="cpu")(frames)
    (calibration,) = detection.calibration.classes.values()  # type: ignore[union-attr]
    terms = image_score(torch.from_numpy(detection.map), "diff+sum").numpy()
    expected = sum((terms[:, i] - r.low) / (r.high - r.low) for i, r in enumerate(calibration.ranges or ()))
    np.testing.assert_allclose(detection.score, expected, rtol=1e-4)


def test_a_conditional_model_is_calibrated_class_by_class(tmp_path: Path) -> None:
    export(tiny(classes=2), tmp_path / "b", "eager", good=good(9, ("nut", "screw")), alpha=0.1)
    loaded = flowad_fast.load(tmp_path / "b", device="cpu")
    assert set(loaded.calibration.classes) == {"nut", "screw"}  # type: ignore[union-attr]
    recalibrate(tmp_path / "b", good(9, ("nut",)), 0.1)
    detection = flowad_fast.load(tmp_path / "b", device="cpu")(photos(1), "screw")
    assert np.isfinite(detection.score).all()
    with pytest.raises(CalibrationError, match="class 'screw' was not calibrated"):
        _ = detection.verdict


@pytest.mark.parametrize(
    ("parts", "alpha", "error", "message"),
    [
        (good(8), 0.1, CalibrationError, "8 good parts are too few.*at least 9 are needed"),
        (good(9), 1.5, CalibrationError, "alpha must lie between 0 and 1"),
        (GoodParts(list(np.zeros((9, 64, 64, 3), np.uint8)), [""] * 9, ["a.png"] * 9), 0.1, FrameError,
         "calibration frame a.png: the frame is black"),
    ],
)  # fmt: skip
def test_bad_good_parts_are_refused_before_anything_is_built(
    tmp_path: Path, model: FlowModel, parts: GoodParts, alpha: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export(model, tmp_path / "b", "eager", good=parts, alpha=alpha)
    assert names(tmp_path) == set()
    export(model, tmp_path / "b", "eager")
    before = tree(tmp_path / "b")
    with pytest.raises(error, match=message):
        recalibrate(tmp_path / "b", parts, alpha)
    assert tree(tmp_path / "b") == before


def test_calibration_needs_a_format_that_runs_here(tmp_path: Path, model: FlowModel, faulty: None) -> None:
    with pytest.raises(CalibrationError, match="none of the formats elsewhere runs on this machine"):
        export(model, tmp_path / "b", "elsewhere", good=good(9), alpha=0.1)
    assert names(tmp_path) == set()


def test_recalibrating_no_bundle_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        recalibrate(tmp_path / "typo" / "b", good(9), 0.1)
    assert names(tmp_path) == set()


def test_a_fixed_frame_size_is_kept(tmp_path: Path, model: FlowModel) -> None:
    export(model, tmp_path / "b", "eager", frame_size=(72, 64))
    loaded = flowad_fast.load(tmp_path / "b", device="cpu")
    assert len(loaded(photos(1))) == 1
    with pytest.raises(FrameError, match="takes 72x64 frames, got 64x72"):
        loaded(photos(1, size=(64, 72)))
    for act in (
        lambda: export(model, tmp_path / "c", "eager", frame_size=(64, 64)),
        lambda: check_bundle(tmp_path / "b", model, ParityFrames(photos(1, size=(64, 72)), "")),
    ):
        with pytest.raises(ConfigError, match="give frames of that size with --data"):
            act()


def test_a_precision_that_a_format_does_not_do_is_not_available(tmp_path: Path, model: FlowModel, faulty: None) -> None:
    result = export(model, tmp_path / "b", "right", precision="fp8")
    assert result.status == {"right": "not available: right does fp32, not fp8"}


def test_check_bundle_runs_parity_again(
    tmp_path: Path, model: FlowModel, faulty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model, tmp_path / "b", "eager", "elsewhere")
    frames = ParityFrames(photos(4, seed=3), "others")
    outcomes = check_bundle(tmp_path / "b", model, frames)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "eager": "ok",
        "elsewhere": "ok, parity not measured",
    }
    other = tiny()
    for parameter in other.dit.parameters():
        parameter.mul_(1.05)
    assert check_bundle(tmp_path / "b", other, frames)["eager"].status == "failed parity"


def test_an_altered_engine_is_refused_before_it_is_parsed(
    tmp_path: Path, model: FlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model, tmp_path / "b", "eager")
    path = tmp_path / "b" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(calibration, "load", raising(AssertionError("parsed")))
    monkeypatch.setattr("flowad_fast.checkpoints.load.load_checkpoint", raising(AssertionError("parsed")))
    with pytest.raises(BundleError, match="altered or damaged"):
        flowad_fast.load(tmp_path / "b")
    with pytest.raises(BundleError, match="altered or damaged"):
        check_bundle(tmp_path / "b", model, ParityFrames(photos(1), ""))


def test_a_bundle_that_is_replaced_while_it_is_loaded_is_not_mixed(
    tmp_path: Path, model: FlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(model, tmp_path / "b", "eager", scorer=Inversion(steps=1))
    start = detector.start_engine

    def replaced_before_it_starts(*arguments: Any, **options: Any) -> Engine:
        export(model, tmp_path / "b", "eager", scorer=Inversion(steps=2))
        return start(*arguments, **options)

    monkeypatch.setattr(detector, "start_engine", replaced_before_it_starts)
    with pytest.raises(BundleError, match="was replaced while it was being loaded; load it again"):
        flowad_fast.load(tmp_path / "b", device="cpu")


def test_an_opset_that_is_not_supported_is_that_formats_failure(tmp_path: Path, model: FlowModel) -> None:
    result = export(model, tmp_path / "b", "onnx", "eager", opset=7)
    assert result.status == {"onnx": "failed: opset 7 is not supported; expected 18 to 25", "eager": "ok"}
    assert set(bundle.read(tmp_path / "b")[1].artefacts) == {"eager"}


# --- the certificate


def outputs(seed: int = 0, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    maps = np.random.RandomState(seed).gamma(2.0, size=(n, 8, 8)).astype(np.float32)
    return maps, maps.max((1, 2))


def test_errors_are_relative_to_the_reference_maps_spread() -> None:
    maps, scores = outputs()
    off = maps.copy()
    off[2, 3, 4] += 0.5
    parity = compare((off, scores), (maps, scores), "test", "fp32", "cpu")
    assert not parity.passed
    assert parity.scale == pytest.approx(maps.std())
    assert parity.max_error == pytest.approx(0.5 / maps.std(), rel=1e-5)
    assert parity.rms_error == pytest.approx(0.5 / maps.std() / np.sqrt(maps.size), rel=1e-5)
    assert (parity.spearman, parity.score_error) == (1.0, 0.0)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_both_bounds_decide(precision: Any) -> None:
    maps, scores = outputs()
    bound, scale = TOLERANCES[precision], maps.std()
    spike, shift = np.zeros_like(maps), np.ones_like(maps)
    spike[0, 0, 0] = 1
    cases = (
        (spike * bound.max * 0.9, True),
        (spike * bound.max * 1.1, False),
        (shift * bound.rms * 0.9, True),
        (shift * bound.rms * 1.1, False),
    )
    for error, passes in cases:
        assert compare((maps + error * scale, scores), (maps, scores), "", precision, "cpu").passed is passes


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    ("aggregate", "units"),
    [("max", [1]), ("mean", [1]), ("sum", [64]), ("diff", [2]), ("diff+sum", [2, 64])],
)
def test_a_score_may_be_off_by_what_the_allowed_map_error_does_to_it(
    precision: Any, aggregate: Any, units: list[int]
) -> None:
    maps, _ = outputs()
    scores = image_score(torch.from_numpy(maps), aggregate).numpy()
    for term, unit in enumerate(units):
        for share, passes in ((0.9, True), (1.1, False)):
            off = scores.astype(np.float64).reshape(len(maps), -1)
            off[2, term] += share * unit * TOLERANCES[precision].max * maps.std()
            got = off.reshape(scores.shape)
            assert compare((maps, got), (maps, scores), "", precision, "cpu", None, aggregate).passed is passes


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_fails_and_still_fits_into_json(value: float, where: int) -> None:
    got = tuple(part.copy() for part in outputs())
    got[where].flat[3] = value
    parity = compare(got, outputs(), "", "bf16", "cpu", np.array([0, 1] * 3))  # type: ignore[arg-type]
    assert not parity.passed
    assert bundle.Parity.model_validate_json(parity.model_dump_json()) == parity


def test_a_reference_that_is_not_finite_is_no_reference() -> None:
    maps, scores = outputs()
    with pytest.raises(ParityError, match="the fp32 reference is not finite"):
        compare((maps, scores), (maps * np.nan, scores), "", "fp32", "cpu")


def test_a_wrong_shape_is_no_parity() -> None:
    maps, scores = outputs()
    with pytest.raises(ParityError, match=r"map \(6, 8, 8\) and score \(6, 1\), expected \(6, 8, 8\) and \(6,\)"):
        compare((maps, scores[:, None]), (maps, scores), "", "fp32", "cpu")


def test_rank_correlation_and_auroc_of_the_worse_term() -> None:
    maps, _ = outputs()
    reference = np.stack([np.arange(6), np.arange(6)], 1).astype(np.float32)
    got = reference.copy()
    got[:, 1] = got[::-1, 1]
    labels = np.array([0, 0, 0, 1, 1, 1])
    parity = compare((maps, got), (maps, reference), "", "fp32", "cpu", labels, "diff+sum")
    assert parity.spearman == pytest.approx(-1)
    assert parity.auroc_difference == -1.0
    assert not parity.passed  # by the score's error, although the maps are equal


@pytest.mark.parametrize("seed", range(5))
def test_ranks_and_auroc_are_those_of_scipy_and_scikit_learn(seed: int) -> None:
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score

    random = np.random.RandomState(seed)
    scores, labels = random.randint(0, 6, 20).astype(np.float32), random.permutation([0] * 13 + [1] * 7)
    np.testing.assert_array_equal(ranks(scores), rankdata(scores))
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_few_or_equal_frames_have_no_rank_correlation(n: int) -> None:
    maps, scores = outputs(n=n)
    assert compare((maps, scores), (maps, scores), "", "fp32", "cpu").spearman is None
    maps, scores = outputs()
    constant = np.ones_like(scores)
    assert compare((maps, constant), (maps, constant), "", "fp32", "cpu").spearman is None


# --- options and frames


def test_formats_are_parsed_with_the_nearest_name() -> None:
    assert parse_formats("eager, onnx,eager") == ("eager", "onnx")
    assert set(parse_formats("auto")) == {name for name, one in FORMATS.items() if one.auto} >= {"onnx", "eager"}
    for text, hint in (("onx", "did you mean 'onnx'"), ("", "no format given"), ("onnx,auto", "unknown format 'auto'")):
        with pytest.raises(ConfigError, match=hint):
            parse_formats(text)


@pytest.mark.parametrize(("text", "expected"), [("1:8:64", (1, 8, 64)), ("4", (4, 4, 4)), ("2:2:2", (2, 2, 2))])
def test_batches_are_parsed(text: str, expected: tuple[int, int, int]) -> None:
    assert parse_batch(text) == expected


@pytest.mark.parametrize("text", ["", "1:2", "0:1:2", "8:4:16", "1:8:4", "a:b:c", "1:8:64:9", "-1:2:3", "1.5"])
def test_bad_batches_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--batch"):
        parse_batch(text)


def test_frame_sizes_are_parsed() -> None:
    assert parse_size("any") is None
    assert parse_size("480x640") == parse_size("480X640") == (480, 640)
    for text in ("", "480", "480x", "8x8", "480x640x3", "-480x640", "480 x 640"):
        with pytest.raises(FrameError, match="HEIGHTxWIDTH"):
            parse_size(text)


def save(folder: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:02}.png")


def test_parity_frames_of_a_folder_have_one_size(tmp_path: Path) -> None:
    save(tmp_path / "x", photos(5))
    save(tmp_path / "y", photos(5, size=(64, 64)))
    frames = parity_frames(tmp_path, count=8)
    assert frames.frames.shape == (5, 72, 64, 3)
    assert frames.labels is None


def test_parity_frames_are_labelled_where_the_folder_says(tmp_path: Path) -> None:
    save(tmp_path / "good", photos(9))
    save(tmp_path / "scratch", photos(2))
    frames = parity_frames(tmp_path, count=8)
    assert frames.labels is not None and frames.labels.tolist() == [0] * 4 + [1] * 2


def test_good_parts_of_a_conditional_model_lie_in_class_folders(tmp_path: Path) -> None:
    save(tmp_path / "screw", photos(2))
    parts = good_parts(tmp_path, ("nut", "screw"))
    assert (parts.classes, parts.labels) == (["screw"] * 2, ["screw/00.png", "screw/01.png"])
    assert parts.frames[1].shape == (72, 64, 3)
    with pytest.raises(CalibrationError, match="one folder of good parts per class: bolt, nut"):
        good_parts(tmp_path, ("bolt", "nut"))


def test_every_format_of_the_registry_is_described() -> None:
    for one in FORMATS.values():
        assert one.description and "fp32" in one.precisions
        assert one.engine in bundle.EngineName.__args__  # type: ignore[attr-defined]


def test_engines_are_what_the_protocol_says(tmp_path: Path, model: FlowModel) -> None:
    """A started engine gives float32 maps and scores for every batch size."""
    result = export(model, tmp_path / "b", "eager")
    engine = start_engine(tmp_path / "b", result.manifest, "eager", "cpu")
    for batch in (1, 4):
        maps, scores = engine.run(photos(batch), None)
        assert (maps.shape, scores.shape) == ((batch, 64, 64), (batch,))
        assert maps.dtype == scores.dtype == np.float32


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_low_precision_is_recorded_run_and_held_to_its_tolerance(
    tmp_path: Path, model: FlowModel, precision: Any
) -> None:
    result = export(model, tmp_path / "b", "eager", precision=precision)
    artefact = bundle.read(tmp_path / "b")[1].artefacts["eager"]
    assert result.ok and artefact.precision == precision and artefact.parity is not None
    assert artefact.parity.tolerance == TOLERANCES[precision].max
    assert artefact.parity.max_error > 1e-5  # it really ran in that precision


def test_large_parity_frames_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("good", "scratch"):
        (tmp_path / label).mkdir()
        for i in range(9):
            Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / label / f"{i}.png")
    for budget, count in ((512 * 2**20, 16), (30 * 40 * 3 * 6, 6), (1, 4)):
        monkeypatch.setattr("flowad_fast.export.frames.PARITY_BYTES", budget)
        given = parity_frames(tmp_path)
        assert given.labels is not None and sorted(given.labels) == [0] * (count // 2) + [1] * (count // 2)
