"""What a production line relies on: frames in, verdicts out, and no verdict wherever there is doubt."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import photos, small_model

from flowad_fast.bundle import Artefact
from flowad_fast.config import ModelConfig
from flowad_fast.detector import Detector
from flowad_fast.engines import ENGINES, Engine, start
from flowad_fast.errors import CalibrationError, ConfigError, EngineUnavailableError, FrameError
from flowad_fast.stages.decision import Calibration, ClassCalibration, Range
from flowad_fast.stages.frames import check_frames
from flowad_fast.stages.scorers import Density, Inversion, Reconstruction

CLASSES = ("bottle", "screw")


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.from_model(small_model(), Inversion(steps=2), device="cpu")


@pytest.fixture(scope="module")
def conditional() -> Detector:
    return Detector.from_model(small_model(classes=CLASSES), Inversion(steps=2), device="cpu")


class FakeEngine(Engine):
    """Maps whose maximum is the frame's first pixel; remembers what it was given."""

    name, device = "fake", "cpu"

    def __init__(self, value: Callable[[np.ndarray], np.ndarray] | None = None) -> None:
        self.calls: list[int] = []
        self.value = value or (lambda frames: frames[:, 0, 0, 0].astype(np.float32))

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append(len(frames))
        score = self.value(frames)
        return np.broadcast_to(score[:, None, None], (len(frames), 64, 64)).astype(np.float32), score


def fake(
    calibration: Calibration | None = None,
    engine: FakeEngine | None = None,
    classes: tuple[str, ...] = (),
    **options: Any,
) -> Detector:
    field = {"channels": 192, "height": 4, "width": 4, "hidden_size": 32, "depth": 2, "num_heads": 2}
    if classes:
        field |= {"num_classes": len(classes), "use_class_labels": True}
    spec = ModelConfig(
        velocity=field,  # type: ignore[arg-type]
        backbone="efficientnet-lite0",
        image={"size": 64},  # type: ignore[arg-type]
        class_names=classes,
    )
    return Detector(engine or FakeEngine(), spec, calibration=calibration, **options)


def calibration(threshold: float, *names: str) -> Calibration:
    one = ClassCalibration(threshold=threshold, parts=100)
    return Calibration(alpha=0.01, classes=dict.fromkeys(names or ("",), one))


def frames_of(*values: int) -> np.ndarray:
    frames = photos(len(values))
    frames[:, 0, 0, 0] = values
    return frames


# Frames


def test_shapes_and_what_ran(detector: Detector) -> None:
    detection = detector(photos(3, 80))
    assert detection.map.shape == (3, 64, 64) and detection.map.dtype == np.float32
    assert detection.score.shape == (3,) and np.allclose(detection.score, detection.map.max((1, 2)))
    assert detection.engine == "eager on cpu" and len(detection) == 3
    assert detection.invalid == (None,) * 3 and detection.classes == ("",) * 3


def test_one_frame_needs_no_batch_axis(detector: Detector) -> None:
    frames = photos(1)
    np.testing.assert_array_equal(detector(frames[0]).map, detector(frames).map)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("fortran", np.asfortranarray),
        ("strided", lambda f: np.repeat(f, 2, axis=2)[:, :, ::2]),
        ("reversed twice", lambda f: f[:, ::-1].copy()[:, ::-1]),
        ("channels last view", lambda f: f.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)),
        ("big endian", lambda f: f.astype(">u1")),
        ("list", list),
    ],
)
def test_memory_layout_changes_nothing(detector: Detector, name: str, change: Callable[[np.ndarray], Any]) -> None:
    frames = photos(2)
    np.testing.assert_array_equal(detector(change(frames)).map, detector(frames).map)


def test_read_only_frames(detector: Detector) -> None:
    frames = photos(2)
    frames.flags.writeable = False
    assert detector(frames).map.shape == (2, 64, 64)


def test_frames_are_never_written_and_may_be_reused(detector: Detector) -> None:
    frames = photos(2)
    before = frames.copy()
    detection = detector(frames)
    np.testing.assert_array_equal(frames, before)
    expected = detection.map.copy()
    frames[:] = 0
    np.testing.assert_array_equal(detection.map, expected)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 64, 64, 4), np.uint8), "drop the alpha channel"),
        (np.zeros((64, 64, 4), np.uint8), "drop the alpha channel"),
        (np.zeros((2, 3, 64, 64), np.uint8), "move channels last"),
        (np.zeros((64, 64), np.uint8), "repeat grey frames"),
        (np.zeros((2, 64, 64, 1), np.uint8), "repeat grey frames"),
        (np.zeros((2, 64, 64, 3), np.uint16), "camera's own bit depth"),
        (np.zeros((2, 64, 64, 3), np.float32), "expected uint8 frames"),
        (np.full((2, 64, 64, 3), np.nan, np.float32), "NaN"),
        (np.zeros((2, 64, 64, 3), bool), "expected uint8 frames"),
        (np.zeros((1, 2, 64, 64, 3), np.uint8), r"expected uint8 frames \(B, H, W, 3\)"),
        ("frames", "expected uint8 frames"),
        ([np.zeros((64, 64, 3), np.uint8), np.zeros((65, 64, 3), np.uint8)], "different sizes"),
    ],
)
def test_refused_frames_say_how_to_convert(detector: Detector, frames: Any, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        detector(frames)


def test_fixed_frame_size() -> None:
    assert check_frames(np.zeros((2, 30, 40, 3), np.uint8), (30, 40)).shape == (2, 30, 40, 3)
    with pytest.raises(FrameError, match="takes 30x40 frames, got 40x30"):
        check_frames(np.zeros((2, 40, 30, 3), np.uint8), (30, 40))


@pytest.mark.parametrize("empty", [np.zeros((0, 64, 64, 3), np.uint8), []])
def test_empty_batch(empty: Any) -> None:
    engine = FakeEngine()
    detection = fake(calibration(1.0), engine)(empty)
    assert len(detection) == 0 and detection.verdict == () and detection.score.shape == (0,) and engine.calls == []


# Verdicts


def test_verdicts() -> None:
    detection = fake(calibration(100.0))(frames_of(99, 100, 101))
    assert detection.verdict == ("good", "good", "anomalous")  # the threshold itself is still good


def test_no_calibration_no_verdict() -> None:
    detection = fake()(frames_of(1))
    assert detection.score.tolist() == [1.0]
    with pytest.raises(CalibrationError, match="flowad-export calibrate BUNDLE GOOD_FOLDER"):
        _ = detection.verdict


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (np.zeros((64, 64, 3), np.uint8), "black"),
        (np.full((64, 64, 3), 255, np.uint8), "saturated"),
        (np.full((64, 64, 3), 128, np.uint8), "uniform"),
        (photos(1)[0] // 20, "black"),
        (255 - photos(1)[0] // 20, "saturated"),
    ],
)
def test_frames_that_show_nothing_get_no_verdict(frame: np.ndarray, reason: str) -> None:
    detection = fake(calibration(1e9))(np.stack([frame, photos(1)[0]]))
    assert reason in (detection.invalid[0] or "") and detection.verdict == ("invalid", "good")


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_gets_no_verdict(broken: float) -> None:
    engine = FakeEngine(lambda frames: np.array([1.0, broken], np.float32))
    assert fake(calibration(1e9), engine)(photos(2)).verdict == ("good", "invalid")


def test_frozen_camera() -> None:
    detector = fake(calibration(1e9), reject_repeats=True)
    frames = photos(2)
    assert detector(frames).verdict == ("good", "good")
    assert detector(frames[1:]).verdict == ("invalid",)
    assert detector(frames[:1]).verdict == ("good",)
    assert "frozen camera" in (detector(np.stack([frames[0], frames[0]])).invalid[1] or "")


def test_a_camera_may_use_its_memory_again() -> None:
    camera, frame = fake(calibration(1e9)).camera(), photos(1)
    for _ in range(3):
        assert camera(frame).verdict == ("good",)
        frame[:] = 255 - frame
        frame[0, 0, 0] //= 2


def test_a_frozen_camera_is_one_camera() -> None:
    detector = fake(calibration(1e9))
    left, right = detector.camera(), detector.camera()
    frames = photos(1)
    assert left(frames).verdict == right(frames).verdict == ("good",), "two cameras may show the same"
    assert left(frames).verdict == ("invalid",) and detector(frames).verdict == ("good",)


def test_diff_sum_needs_its_ranges() -> None:
    engine = FakeEngine(lambda frames: np.zeros(len(frames), np.float32))
    engine.run = lambda frames, y: (np.ones((len(frames), 64, 64), np.float32), np.tile([2.0, 30.0], (len(frames), 1)))  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match="ranges fitted on good parts"):
        _ = fake(engine=engine, aggregate="diff+sum")(photos(1)).score
    fitted = ClassCalibration(threshold=1.0, parts=10, ranges=(Range(low=1, high=3), Range(low=10, high=20)))
    detection = fake(Calibration(alpha=0.1, classes={"": fitted}), engine, aggregate="diff+sum")(photos(2))
    assert detection.score.tolist() == [2.5, 2.5] and detection.verdict == ("anomalous",) * 2


# Classes


def test_classes_by_name_or_index(conditional: Detector) -> None:
    frames = photos(2)
    by_name = conditional(frames, ["screw", "bottle"])
    assert by_name.classes == ("screw", "bottle")
    np.testing.assert_array_equal(by_name.map, conditional(frames, [1, 0]).map)
    np.testing.assert_allclose(by_name.map[:1], conditional(frames[:1], "screw").map, rtol=1e-4)
    assert not np.allclose(by_name.map[:1], conditional(frames[:1], "bottle").map)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, "give the class of each frame: bottle, screw"),
        (["bottel", "screw"], "did you mean 'bottle'"),
        ([0, 2], "class index 2"),
        ([0, -1], "class index -1"),
        (["bottle"] * 3, "3 classes for 2 frames"),
    ],
)
def test_wrong_classes(conditional: Detector, classes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conditional(photos(2), classes)


def test_unconditional_model_refuses_classes(detector: Detector) -> None:
    with pytest.raises(ConfigError, match="unconditional"):
        detector(photos(1), ["bottle"])


def test_thresholds_are_per_class() -> None:
    fitted = {"bottle": ClassCalibration(threshold=10, parts=9), "screw": ClassCalibration(threshold=200, parts=9)}
    detection = fake(Calibration(alpha=0.1, classes=fitted), classes=CLASSES)(frames_of(100, 100), ["bottle", "screw"])
    assert detection.verdict == ("anomalous", "good")
    with pytest.raises(CalibrationError, match="class 'screw' was not calibrated"):
        _ = fake(calibration(1.0, "bottle"), classes=CLASSES)(frames_of(1), ["screw"]).verdict


# Life of a detector


@pytest.mark.parametrize("conditional", [False, True])
def test_prepare_asks_the_engine_and_runs_one_frame(conditional: bool) -> None:
    class Preparing(FakeEngine):
        def __init__(self) -> None:
            super().__init__()
            self.prepared: list[tuple[int, int]] = []
            self.classes: list[np.ndarray | None] = []

        def prepare(self, height: int, width: int) -> None:
            assert not self.calls
            self.prepared.append((height, width))

        def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            self.classes.append(y)
            return super().run(frames, y)

    engine = Preparing()
    detector = fake(engine=engine, classes=CLASSES if conditional else (), frame_size=(64, 80))
    assert 0 <= detector.prepare(64, 80) < 60
    assert engine.prepared == [(64, 80)] and engine.calls == [1]
    assert engine.classes[0] is None if not conditional else engine.classes[0].tolist() == [0]
    with pytest.raises(FrameError, match="64"):
        detector.prepare(80, 64)
    plain = FakeEngine()
    fake(engine=plain).prepare(64, 64)
    assert plain.calls == [1]


def test_closed_detector() -> None:
    closing = fake()
    closing.close()
    with pytest.raises(EngineUnavailableError, match="was closed"):
        closing.prepare(64, 64)
    with pytest.raises(EngineUnavailableError, match="was closed"):
        closing(photos(1))


def test_close_lets_calls_in_flight_finish() -> None:
    started, go = threading.Event(), threading.Event()

    def slow(frames: np.ndarray) -> np.ndarray:
        started.set()
        assert go.wait(30)
        return np.ones(len(frames), np.float32)

    detector = fake(engine=FakeEngine(slow))
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(detector, photos(1))
        assert started.wait(30)
        detector.close()
        go.set()
        assert pending.result(30).score.tolist() == [1.0]


def test_many_threads_on_one_detector(detector: Detector) -> None:
    batches = [photos(n % 3 + 1, seed=n) for n in range(12)]
    expected = [detector(batch).map for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(detector, batches), expected, strict=True):
            np.testing.assert_allclose(got.map, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scorer", [Inversion(steps=2), Reconstruction(steps=4), Density(steps=2, probes=2)])
def test_memory_stays_flat(scorer: Any) -> None:
    detector = Detector.from_model(small_model(), scorer, device="cpu")
    frames = photos(4)
    process = psutil.Process()
    for _ in range(10):
        detector(frames)
    before = process.memory_info().rss
    for _ in range(60):
        detector(frames)
    assert process.memory_info().rss - before < 30e6


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "no usable GPU|None"), ("gpu", "unknown device"), ("meta", "not supported")]
)
def test_devices(device: str, message: str) -> None:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        assert Detector.from_model(small_model(), Inversion(), device="cuda").engine == "eager on cuda"
        return
    with pytest.raises(EngineUnavailableError, match=message):
        Detector.from_model(small_model(), Inversion(), device=device)


def test_a_fast_unknown_public_name_is_an_attribute_error() -> None:
    import flowad_fast

    assert all(getattr(flowad_fast, name) is not None for name in flowad_fast.__all__)
    with pytest.raises(AttributeError, match="Detectr"):
        _ = flowad_fast.Detectr


# Choosing an engine


def test_without_torch_auto_takes_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"eager", "tensorrt", "onnxruntime"}
    assert start.choose_engine(has, "cuda:0") == "cudagraph"
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    assert start.choose_engine(has, "cuda:0") == start.choose_engine(has, "cpu") == "onnxruntime"
    assert start.choose_engine({"eager"}, "cpu") == "eager"  # which then says what to install


def test_a_missing_package_is_named_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("importlib.import_module", absent)
    for name, extra in (("eager", "model"), ("tensorrt-rtx", "tensorrt-rtx")):
        with pytest.raises(EngineUnavailableError, match=rf'torch, which is not.*pip install "flowad-fast\[{extra}\]"'):
            ENGINES[name].engine()


def test_a_number_of_threads_is_refused_by_engines_that_take_none() -> None:
    with pytest.raises(EngineUnavailableError, match="inductor takes no number of threads .got 2.; leave it out"):
        FakeEngine.from_artefact(Path("x"), Artefact(engine="inductor", files={"x": ""}), "cpu", threads=2)
