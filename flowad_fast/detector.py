"""The product in one page: frames in, verdicts out.

    detector = load("bundles/bottle")          # verifies the bundle, starts an engine
    detection = detector(frames)               # uint8 (B, H, W, 3)

What a call does, and where to read about it:

    frames       are these frames, and can they be judged       stages/frames.py
    classes      which product each frame shows                 config.py, Classes
    engine       frames to map and raw score                    engines/
    decision     threshold from good parts, or no verdict       stages/decision.py

An engine computes what `pipeline.py` says in sixty lines (read it next), itself or as a graph that was exported from
it. Whatever ran, the detection says so.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from flowad_fast import bundle as bundles
from flowad_fast.config import Classes, ModelConfig, Precision, Weights
from flowad_fast.engines import Engine, backend
from flowad_fast.engines.start import arithmetic, choose_engine, start_engine, start_from_model
from flowad_fast.errors import BundleError, CalibrationError, EngineUnavailableError, nearest, require
from flowad_fast.stages.decision import Aggregate, Calibration, ClassCalibration, Verdict, combine
from flowad_fast.stages.frames import FrozenFrames, check_frames, invalid_frames
from flowad_fast.stages.regions import Region, RegionSettings, find_regions, marked

if TYPE_CHECKING:
    from flowad_fast.model import FlowModel
    from flowad_fast.stages.scorers import Scorer


@dataclass(frozen=True)
class Detection:
    """The result for a batch of B frames.

    Example:
        >>> import numpy as np
        >>> from flowad_fast import Detection
        >>> from flowad_fast.stages.decision import Calibration
        >>> limits = Calibration.model_validate({"alpha": 0.05, "classes": {"": {"threshold": 1.5, "parts": 19}}})
        >>> maps, scores = np.zeros((3, 256, 256), np.float32), np.array([1.0, 2.0, 1.0], np.float32)
        >>> reasons = (None, None, "the frame is black")
        >>> detection = Detection(maps, scores, ("",) * 3, reasons, "eager on cpu", limits)
        >>> [str(verdict) for verdict in detection.verdict]
        ['good', 'anomalous', 'invalid']

    Attributes:
        map: (B, S, S) float32 anomaly map, higher is more anomalous.
        raw_score: the image scores as the graph gives them, (B,), or (B, n) for n > 1 terms.
        classes: class name of each frame, "" for unconditional models.
        invalid: why a frame cannot be judged, None for valid frames.
        engine: what ran, e.g. "onnxruntime on cpu", or "cudagraph on cuda:0 (bf16, fused)".
        frame_size: height and width of the frames, pixels; None: that of the map.
    """

    map: np.ndarray
    raw_score: np.ndarray
    classes: tuple[str, ...]
    invalid: tuple[str | None, ...]
    engine: str
    calibration: Calibration | None = field(repr=False, default=None)
    frame_size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.map)

    @cached_property
    def score(self) -> np.ndarray:
        """Image scores (B,) float32, higher is more anomalous.

        Raises:
            CalibrationError: the aggregate has several terms, whose ranges come from a calibration, and there is none.
        """
        if self.raw_score.ndim == 1:
            return self.raw_score
        scores = np.empty(len(self), np.float32)
        for i, name in enumerate(self.classes):
            ranges = self._of(name).ranges if self.calibration else None
            scores[i] = combine(self.raw_score[i : i + 1], ranges)[0]
        return scores

    @cached_property
    def verdict(self) -> tuple[Verdict, ...]:
        """For each frame: good, anomalous, or invalid.

        Raises:
            CalibrationError: the model has not been calibrated on good parts (of a frame's class).
        """
        return tuple(
            Verdict.INVALID if reason else Verdict.ANOMALOUS if score > self._of(name).threshold else Verdict.GOOD
            for score, name, reason in zip(self.score, self.classes, self.invalid, strict=True)
        )

    @cached_property
    def regions(self) -> tuple[tuple[Region, ...], ...]:
        """For each frame, where its map is above the pixel threshold, in pixels of the frame; highest peak first.

        They are searched for when first asked for. A frame of which `no_regions` says why has none.
        """
        return tuple(() if reason else find_regions(*self._limits(i)) for i, reason in enumerate(self.no_regions))

    @cached_property
    def no_regions(self) -> tuple[str | None, ...]:
        """For each frame, why regions cannot be told (invalid, no pixel threshold), or None: they were looked for."""
        return tuple(
            reason or self._no_threshold(name) for reason, name in zip(self.invalid, self.classes, strict=True)
        )

    def marked(self, index: int) -> np.ndarray:
        """The cells (S, S) of one frame's map that are in its regions, int32: 0 outside, one number per region."""
        if self.no_regions[index]:
            return np.zeros(self.map.shape[1:], np.int32)
        return marked(*self._limits(index))

    def _limits(self, index: int) -> tuple[np.ndarray, float, tuple[int, int], RegionSettings]:
        """The arguments of `find_regions` for a frame whose class has a pixel threshold."""
        assert self.calibration is not None
        pixels = self.calibration.classes[self.classes[index]].pixels
        assert pixels is not None
        rows, columns = self.map.shape[1:]
        return self.map[index], pixels.threshold, self.frame_size or (rows, columns), self.calibration.regions

    def _no_threshold(self, name: str) -> str | None:
        try:
            if self._of(name).pixels is not None:
                return None
        except CalibrationError as error:
            return str(error)
        return (
            "the bundle was calibrated without a pixel threshold, so there are no regions; calibrate it again: "
            "flowad-export calibrate BUNDLE GOOD_FOLDER"
        )

    def _of(self, name: str) -> ClassCalibration:
        if self.calibration is None:
            raise CalibrationError(
                "the model has no calibration, so there is no verdict (the score is available); "
                "calibrate on good parts: flowad-export calibrate BUNDLE GOOD_FOLDER"
            )
        if name not in self.calibration.classes:
            raise CalibrationError(f"class {name!r} was not calibrated; {nearest(name, self.calibration.classes)}")
        return self.calibration.classes[name]


class Detector:
    """An engine with its decision: call it with frames. Safe from many threads; `close` frees the engine.

    It belongs to the process that made it: engines have threads, locks and driver handles, which neither a fork nor a
    pickle takes along. A worker process loads its own.

    Example:
        >>> import numpy as np
        >>> from flowad_fast import Detector, Inversion
        >>> detector = Detector.from_checkpoint("demo", Inversion(), device="cpu")
        >>> detector.engine
        'eager on cpu'
        >>> frames = np.random.default_rng(0).integers(0, 256, (2, 300, 300, 3), dtype=np.uint8)
        >>> detection = detector(frames)
        >>> detection.map.shape, detection.score.shape
        ((2, 256, 256), (2,))

    Attributes:
        engine: what runs, see `Detection.engine`.
        classes: the model's classes.
        image_size: side S of the maps, pixels.
        aggregate: map to image score.
        frame_size: height and width that frames must have, None for any.
        calibration: thresholds, None for a model that was not calibrated.
    """

    def __init__(
        self,
        engine: Engine,
        spec: ModelConfig,
        *,
        aggregate: Aggregate = "max",
        frame_size: tuple[int, int] | None = None,
        calibration: Calibration | None = None,
        reject_repeats: bool = False,
    ) -> None:
        self._engine: Engine | None = engine
        self._process = os.getpid()
        self.engine = engine.title
        self.classes: Classes = spec.classes
        self.image_size = spec.image.size
        self.aggregate = aggregate
        self.frame_size = frame_size
        self.calibration = calibration
        self._only_camera = FrozenFrames() if reject_repeats else None

    @classmethod
    def from_manifest(cls, engine: Engine, manifest: bundles.Manifest, *, reject_repeats: bool = False) -> "Detector":
        """A detector around a running engine of a bundle."""
        return cls(
            engine,
            manifest.model,
            aggregate=manifest.aggregate,
            frame_size=manifest.frame_size,
            calibration=manifest.calibration,
            reject_repeats=reject_repeats,
        )

    @classmethod
    def from_model(
        cls,
        model: "FlowModel",
        scorer: "Scorer",
        *,
        engine: str = "eager",
        precision: Precision = "fp32",
        device: str = "auto",
        aggregate: Aggregate = "max",
        ops: str | None = None,
        threads: int | None = None,
        location: np.ndarray | None = None,
    ) -> "Detector":
        """A detector without a bundle and so without a calibration.

        Args:
            model: a trained model; it stays where it is.
            scorer: what to compute.
            engine: one that starts from a model, see `engines.ENGINES`.
            precision: of the velocity field's matrix products.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            aggregate: map to image score.
            ops: operators of the velocity field and the loop: `reference` (plain torch) or `fused` (Triton kernels);
                None takes fused for the cudagraph engine, otherwise reference.
            threads: see `load`.
            location: location statistics, a table (classes, 2, h, w) of `stages.location`; None for none.

        Raises:
            EngineUnavailableError: engine, precision or operators cannot run here; says what is missing.
        """
        from flowad_fast.pipeline import ScoringPipeline

        how = arithmetic(engine, precision, ops)
        pipeline = ScoringPipeline(model, scorer, aggregate, how, located=location is not None)
        if location is not None:
            pipeline.locate(location)
        return cls(start_from_model(engine, pipeline, device, threads), model.spec, aggregate=aggregate)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        scorer: "Scorer",
        *,
        config: str | Path | None = None,
        backbone_weights: str | Path | None = None,
        weights: Weights | None = None,
        **options: Any,
    ) -> "Detector":
        """A detector straight from a trained checkpoint; see `load_checkpoint`, and `from_model` for the options."""
        require("model", "torch", "timm", "safetensors", by="Detector.from_checkpoint")
        from flowad_fast.checkpoints.load import load_checkpoint

        return cls.from_model(load_checkpoint(path, config, backbone_weights, weights), scorer, **options)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in index order; empty for unconditional models, and for models that have no names for them."""
        return self.classes.names

    @property
    def num_classes(self) -> int:
        """How many classes the model has; 1 for unconditional models."""
        return self.classes.count

    @property
    def conditional(self) -> bool:
        """Whether each frame needs a class."""
        return self.classes.conditional

    @property
    def details(self) -> dict[str, Any]:
        """What the engine measured and chose on this machine, as JSON values; {} where it has nothing to choose.

        `attention` and its `attention_ms` by backend, with eager also `attention_errors`, relative to the plain one.
        With cudagraph `attentions`, by batch size what was `chosen`, and `ms` and `error` of every backend; and
        `products`, by batch size and by part of a block what was `chosen`, and `us` (microseconds) of every candidate.
        """
        return {} if self._engine is None else dict(self._engine.details)

    def __call__(
        self, frames: np.ndarray | Sequence[np.ndarray], classes: Sequence[str | int] | str | int | None = None
    ) -> Detection:
        """Score a batch.

        Args:
            frames: uint8 (B, H, W, 3) RGB, or one (H, W, 3); any strides. It is read before the call returns and never
                written, so the caller may reuse the buffer afterwards.
            classes: class of each frame (or one for all), for conditional models only.

        Raises:
            FrameError: not uint8 RGB of the accepted size; nothing is converted by guess.
            ConfigError: a class that the model does not have.
        """
        return self._judge(frames, classes, self._only_camera)

    def camera(self) -> "Camera":
        """One camera's way into this detector, which also notices that the camera is frozen; make one per camera."""
        return Camera(self)

    def prepare(self, height: int, width: int) -> float:
        """Do ahead of time what the first call for frames of this size would wait for: compile, capture, allocate.

        Args:
            height: of the frames.
            width: of the frames.

        Returns:
            Seconds that it took.

        Raises:
            FrameError: the model takes another size.
        """
        start = time.perf_counter()
        engine = self.running()
        black = check_frames(np.zeros((1, height, width, 3), np.uint8), self.frame_size)
        engine.prepare(height, width)
        engine.run(black, np.zeros(1, np.int64) if self.conditional else None)
        return time.perf_counter() - start

    def running(self) -> Engine:
        """The engine.

        Raises:
            EngineUnavailableError: the detector was closed, or was made by another process than this, its fork.
        """
        if os.getpid() != self._process:
            raise EngineUnavailableError(
                f"this detector was loaded in process {self._process} and is called in {os.getpid()}, a fork of it, "
                "where its engine cannot run; load the bundle in the child"
            )
        if self._engine is None:
            raise EngineUnavailableError("this detector was closed; load the bundle again")
        return self._engine

    def __reduce__(self) -> NoReturn:
        """Refuse copies and pickles, saying what to send instead."""
        raise TypeError(
            "a detector belongs to its process and cannot be pickled or copied; send the bundle's path, and call "
            "flowad_fast.load(path) in the process that uses it"
        )

    def close(self) -> None:
        """Free the engine; later calls raise EngineUnavailableError, calls in flight finish."""
        self._engine = None

    def _judge(
        self,
        frames: np.ndarray | Sequence[np.ndarray],
        classes: Sequence[str | int] | str | int | None,
        camera: FrozenFrames | None,
    ) -> Detection:
        engine = self.running()
        batch = check_frames(frames, self.frame_size)
        y = self.classes.indices(classes, len(batch))
        doubts = [invalid_frames(batch)] + ([camera.doubts(batch)] if camera else [])
        if len(batch):
            maps, raw = engine.run(batch, y)
        else:
            maps, raw = np.zeros((0, self.image_size, self.image_size), np.float32), np.zeros(0, np.float32)
        doubts.append(_not_finite(maps, raw))
        invalid = tuple(next((reason for reason in all if reason), None) for all in zip(*doubts, strict=True))
        size = (batch.shape[1], batch.shape[2])
        return Detection(maps, raw, self.classes.of(y, len(batch)), invalid, self.engine, self.calibration, size)


class Camera:
    """A detector as one camera sees it: frames come in order, and a frame that repeats the one before is invalid."""

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self._shown = FrozenFrames()

    def __call__(
        self, frames: np.ndarray | Sequence[np.ndarray], classes: Sequence[str | int] | str | int | None = None
    ) -> Detection:
        """As `Detector.__call__`, for the camera's next frames."""
        return self.detector._judge(frames, classes, self._shown)


def _not_finite(maps: np.ndarray, raw: np.ndarray) -> list[str | None]:
    finite = np.isfinite(maps).all((1, 2)) & np.isfinite(raw).all(tuple(range(1, raw.ndim)))
    return [None if ok else "the map is not finite" for ok in finite]


def load(
    bundle: str | Path,
    engine: str = "auto",
    device: str = "auto",
    *,
    precision: Precision | None = None,
    ops: str | None = None,
    reject_repeats: bool = False,
    threads: int | None = None,
) -> Detector:
    """A detector from an exported bundle, after verifying its files' hashes.

    Args:
        bundle: the bundle's folder.
        engine: a name in `engines.ENGINES`, or `auto`: on a GPU the captured CUDA graph with fused operators, on a CPU
            ONNX Runtime, as far as the bundle has what they run (`engines.start.AUTO`). What runs, and with which
            precision and operators, is in `Detector.engine`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: of engines that start from the bundle's weights; None is what the artefact was certified for.
        ops: operators of engines that start from the bundle's weights, see `Detector.from_model`.
        reject_repeats: call a frame that equals the one before pixel by pixel invalid, whoever calls: for a detector
            that serves one camera. With several, call each camera's own `Detector.camera()` instead.
        threads: CPU threads that one call may use, for engines that run on the CPU. None is what OMP_NUM_THREADS says,
            otherwise the cores that the process or its container may use. The torch engines set torch's number, which
            belongs to the process.

    Raises:
        BundleError: no bundle, another version, or an altered file.
        EngineUnavailableError: the engine is not in the bundle or cannot run here; says what to install.

    Example:
        `bundle` is the folder of an exported and calibrated bundle, as `make demo` leaves one.

        >>> detector = load(bundle, device="cpu")
        >>> detector.calibration.alpha
        0.05
    """
    if engine != "auto":
        backend(engine)
    folder, manifest = bundles.read(bundle)
    has = {artefact.engine for artefact in manifest.artefacts.values()}
    if engine == "auto":
        engine = choose_engine(has, device)
    if backend(engine).artefact not in has:
        raise EngineUnavailableError(
            f"{folder}: the bundle has nothing for the engine {engine} "
            f"(it has: {', '.join(sorted(has)) or 'nothing'}); export it again with that --format"
        )
    running = start_engine(folder, manifest, engine, device, precision=precision, ops=ops, threads=threads)
    if bundles.read(folder, verify=False)[1] != manifest:  # its thresholds are not those of the engine that was started
        raise BundleError(f"{folder}: the bundle was replaced while it was being loaded; load it again")
    return Detector.from_manifest(running, manifest, reject_repeats=reject_repeats)
