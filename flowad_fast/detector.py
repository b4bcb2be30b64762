"""The product in one page: frames in, verdicts out.

    detector = load("bundles/bottle")          # verifies the bundle, starts an engine
    detection = detector(frames)               # uint8 (B, H, W, 3)

What happens to a frame, and where to read about it:

    image        resize and normalise                           image.py
    features     frozen backbone, pyramid gathered to X1        features.py
    velocity     DiT, modulations from a table                  velocity.py
    schedule     rows (t, a, b); x' = a x + b f(x, t)           schedule.py
    integration  X1 carried to X0, or X_tau to X^1              integration.py
    scorer       density | inversion | reconstruction → map     scorers.py
    decision     image score, threshold from good parts         decision.py

`pipeline.ScoringPipeline` is the first six as one module. An engine (`engines/`) runs it: torch itself, or a graph
that was exported from it. Whatever ran, the detection says so.
"""

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from flowad_fast import bundle as bundles
from flowad_fast.checkpoint import load_checkpoint
from flowad_fast.config import Precision
from flowad_fast.decision import Aggregate, Calibration, ClassCalibration, Verdict, combine, invalid_frames
from flowad_fast.engines import Engine, backend, start_from_model
from flowad_fast.errors import BundleError, CalibrationError, EngineUnavailableError, FrameError, nearest
from flowad_fast.model import FlowModel, class_indices
from flowad_fast.scorers import Scorer

AUTO = {"cuda": ("eager", "onnxruntime", "inductor"), "cpu": ("onnxruntime", "inductor", "eager")}
"""What `auto` prefers of the engines in a bundle, by device."""
OPS = ("reference", "fused")
"""Namespaces of operators: plain torch, or Triton kernels on the GPU (on the CPU they are plain torch as well)."""


@dataclass(frozen=True)
class Detection:
    """The result for a batch of B frames.

    Attributes:
        map: (B, S, S) float32 anomaly map, higher is more anomalous.
        raw_score: the image scores as the graph gives them, (B,), or (B, 2) for the aggregate diff+sum.
        classes: class name of each frame, "" for unconditional models.
        invalid: why a frame cannot be judged, None for valid frames.
        engine: what ran, e.g. "onnxruntime on cpu".
    """

    map: np.ndarray
    raw_score: np.ndarray
    classes: tuple[str, ...]
    invalid: tuple[str | None, ...]
    engine: str
    calibration: Calibration | None = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.map)

    @cached_property
    def score(self) -> np.ndarray:
        """Image scores (B,) float32, higher is more anomalous.

        Raises:
            CalibrationError: the aggregate is diff+sum, whose ranges come from a calibration, and there is none.
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
        """good, anomalous, or invalid, a frame.

        Raises:
            CalibrationError: the model has not been calibrated on good parts (of a frame's class).
        """
        return tuple(
            Verdict.INVALID if reason else Verdict.ANOMALOUS if score > self._of(name).threshold else Verdict.GOOD
            for score, name, reason in zip(self.score, self.classes, self.invalid, strict=True)
        )

    def _of(self, name: str) -> ClassCalibration:
        if self.calibration is None:
            raise CalibrationError(
                "the model has no calibration, so there is no verdict (the score is available); "
                "calibrate on good parts: flowad-export BUNDLE --calibrate GOOD_FOLDER"
            )
        if name not in self.calibration.classes:
            raise CalibrationError(f"class {name!r} was not calibrated; {nearest(name, self.calibration.classes)}")
        return self.calibration.classes[name]


class Detector:
    """An engine with its decision: call it with frames. Safe from many threads; `close` frees the engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        image_size: int,
        aggregate: Aggregate = "max",
        class_names: tuple[str, ...] = (),
        num_classes: int = 1,
        conditional: bool = False,
        frame_size: tuple[int, int] | None = None,
        calibration: Calibration | None = None,
        reject_repeats: bool = False,
    ) -> None:
        self._engine: Engine | None = engine
        self.engine = f"{engine.name} on {engine.device}"
        self.image_size = image_size
        self.aggregate = aggregate
        self.class_names = class_names
        self.num_classes = num_classes
        self.conditional = conditional
        self.frame_size = frame_size
        self.calibration = calibration
        self.reject_repeats = reject_repeats
        self._previous: bytes | None = None

    @classmethod
    def from_manifest(cls, engine: Engine, manifest: bundles.Manifest, *, reject_repeats: bool = False) -> "Detector":
        """A detector around a running engine of a bundle."""
        velocity = manifest.model.velocity
        return cls(
            engine,
            image_size=manifest.model.image.size,
            aggregate=manifest.aggregate,
            class_names=manifest.model.class_names if velocity.use_class_labels else (),
            num_classes=velocity.num_classes,
            conditional=velocity.use_class_labels,
            frame_size=manifest.frame_size,
            calibration=manifest.calibration,
            reject_repeats=reject_repeats,
        )

    @classmethod
    def from_model(
        cls,
        model: FlowModel,
        scorer: Scorer,
        *,
        engine: str = "eager",
        precision: Precision = "fp32",
        device: str = "auto",
        aggregate: Aggregate = "max",
        ops: str = "reference",
    ) -> "Detector":
        """A detector without a bundle and so without a calibration.

        Args:
            model: a trained model; it stays where it is.
            scorer: what to compute.
            engine: one that starts from a model, see `engines.ENGINES`.
            precision: of the velocity field's matrix products.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            aggregate: map to image score.
            ops: operators of the velocity field and the loop: `reference` (plain torch) or `fused` (Triton kernels).

        Raises:
            EngineUnavailableError: engine, precision or operators cannot run here; says what is missing.
        """
        from flowad_fast.pipeline import ScoringPipeline

        pipeline = ScoringPipeline(model, scorer, aggregate, precision, operators(ops))
        return cls(
            start_from_model(engine, pipeline, device),
            image_size=model.spec.image.size,
            aggregate=aggregate,
            class_names=model.class_names,
            num_classes=model.config.num_classes,
            conditional=model.config.use_class_labels,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        scorer: Scorer,
        *,
        config: str | Path | None = None,
        backbone_weights: str | Path | None = None,
        **options: Any,
    ) -> "Detector":
        """A detector straight from a trained checkpoint; see `load_checkpoint`, and `from_model` for the options."""
        return cls.from_model(load_checkpoint(path, config, backbone_weights), scorer, **options)

    @property
    def details(self) -> dict[str, Any]:
        """What the engine measured and chose on this machine, as JSON values; {} where it has nothing to choose.

        `attention`, its `attention_ms` by backend, and for cudagraph `products`: by batch size and by part of a block
        what was `chosen`, and `us` (microseconds) of every candidate.
        """
        return dict(getattr(self._engine, "details", {}))

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
        engine = self._running_engine()
        batch = check_frames(frames, self.frame_size)
        y = class_indices(classes, len(batch), self.class_names, self.num_classes, self.conditional)
        names = self._names(y, len(batch))
        if len(batch) == 0:
            size = self.image_size
            return Detection(np.zeros((0, size, size), np.float32), np.zeros(0, np.float32), (), (), self.engine,
                             self.calibration)  # fmt: skip
        maps, raw = engine.run(batch, None if y is None else y.numpy())
        invalid = self._doubts(batch, maps, raw)
        return Detection(maps, raw, names, tuple(invalid), self.engine, self.calibration)

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
        engine = self._running_engine()
        black = check_frames(np.zeros((1, height, width, 3), np.uint8), self.frame_size)
        if hasattr(engine, "prepare"):
            engine.prepare(height, width)
        engine.run(black, np.zeros(1, np.int64) if self.conditional else None)
        return time.perf_counter() - start

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise EngineUnavailableError("this detector was closed; load the bundle again")
        return self._engine

    def close(self) -> None:
        """Free the engine; later calls raise EngineUnavailableError, calls in flight finish."""
        self._engine = None

    def _names(self, y: "object | None", batch: int) -> tuple[str, ...]:
        if y is None:
            return ("",) * batch
        return tuple(self.class_names[i] if self.class_names else str(int(i)) for i in y)  # type: ignore[attr-defined]

    def _doubts(self, frames: np.ndarray, maps: np.ndarray, raw: np.ndarray) -> list[str | None]:
        doubts = invalid_frames(frames)
        finite = np.isfinite(maps).all((1, 2)) & np.isfinite(raw).reshape(len(raw), -1).all(1)
        for i, ok in enumerate(finite):
            if not ok:
                doubts[i] = "the map is not finite"
        if self.reject_repeats:
            for i, frame in enumerate(frames):
                content = frame.tobytes()
                if content == self._previous:
                    doubts[i] = "the frame is the same as the one before, pixel by pixel: a frozen camera"
                self._previous = content
        return doubts


def check_frames(frames: np.ndarray | Sequence[np.ndarray], size: tuple[int, int] | None = None) -> np.ndarray:
    """`frames` as a contiguous uint8 (B, H, W, 3) array, or a FrameError that says what was got and how to convert."""
    try:
        array = np.asarray(frames)
    except ValueError:
        raise FrameError("frames have different sizes; call the detector once a size") from None
    if array.ndim == 3 and array.shape[-1] == 3:
        array = array[None]
    if array.size == 0 and array.ndim in (1, 4) and array.shape[0] == 0:
        return np.zeros((0, *(size or (1, 1)), 3), np.uint8)
    shape = f"{array.dtype} {array.shape}"
    if array.ndim != 4 or array.shape[-1] != 3:
        hint = ""
        if array.ndim in (3, 4) and array.shape[-1] == 4:
            hint = "; drop the alpha channel: frames[..., :3]"
        elif array.ndim == 4 and array.shape[1] == 3:
            hint = "; move channels last: frames.transpose(0, 2, 3, 1)"
        elif array.ndim in (2, 3) or array.shape[-1:] == (1,):
            hint = "; repeat grey frames: np.repeat(frames[..., None], 3, -1)"
        raise FrameError(f"expected uint8 frames (B, H, W, 3) in RGB order, got {shape}{hint}")
    if array.dtype != np.uint8:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FrameError(f"frames are {shape} and hold NaN or infinite values; expected uint8")
        raise FrameError(
            f"expected uint8 frames, got {shape}; scale them to 0..255 with the camera's own bit depth and convert, "
            "for 12-bit: (frames >> 4).astype(np.uint8)"
        )
    if size is not None and array.shape[1:3] != size:
        raise FrameError(f"the bundle takes {size[0]}x{size[1]} frames, got {array.shape[1]}x{array.shape[2]}")
    return np.require(array, requirements=["C", "W"])


def operators(name: str) -> ModuleType:
    """The namespace of operators called `name`, see `OPS`.

    Raises:
        EngineUnavailableError: no such namespace, or it cannot be imported here.
    """
    if name not in OPS:
        raise EngineUnavailableError(f"unknown operators {name!r}; {nearest(name, OPS)}")
    try:
        return importlib.import_module(f"flowad_fast.kernels.{name}")
    except ImportError as error:
        raise EngineUnavailableError(
            f"the {name} operators cannot be imported ({error}); ask for ops='reference'"
        ) from None


def load(
    bundle: str | Path,
    engine: str = "auto",
    device: str = "auto",
    *,
    precision: Precision | None = None,
    ops: str = "reference",
    reject_repeats: bool = False,
) -> Detector:
    """A detector from an exported bundle, after verifying its files' hashes.

    Args:
        bundle: the bundle's folder.
        engine: a name in `engines.ENGINES`, or `auto`: of the bundle's engines, ONNX Runtime on CPU, torch on GPU. What
            runs is in `Detector.engine`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: of engines that start from the bundle's weights; None is what the artefact was made for.
        ops: operators of engines that start from the bundle's weights, see `Detector.from_model`.
        reject_repeats: call a frame that equals the one before pixel by pixel invalid (a frozen camera).

    Raises:
        BundleError: no bundle, another version, or an altered file.
        EngineUnavailableError: the engine is not in the bundle or cannot run here; says what to install.
    """
    if engine != "auto":
        backend(engine)
    folder, manifest = bundles.read(bundle)
    has = {artefact.engine for artefact in manifest.artefacts.values()}
    if engine == "auto":
        from flowad_fast.engines.eager import torch_device

        engine = next((name for name in AUTO[torch_device(device).type] if name in has), "none")
    if engine == "none" or backend(engine).artefact not in has:
        raise EngineUnavailableError(
            f"{folder}: the bundle has nothing for the engine {engine} "
            f"(it has: {', '.join(sorted(has)) or 'nothing'}); export it again with that --format"
        )
    running = start_engine(folder, manifest, engine, device, precision=precision, ops=ops)
    if bundles.read(folder, verify=False)[1] != manifest:  # its thresholds are not those of the engine that was started
        raise BundleError(f"{folder}: the bundle was replaced while it was being loaded; load it again")
    return Detector.from_manifest(running, manifest, reject_repeats=reject_repeats)


def start_engine(
    folder: Path,
    manifest: bundles.Manifest,
    engine: str,
    device: str,
    artefact: bundles.Artefact | None = None,
    *,
    precision: Precision | None = None,
    ops: str = "reference",
) -> Engine:
    """Start an engine on one of a bundle's artefacts; the files' hashes have been checked by `bundle.read`.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.
        engine: a name in `engines.ENGINES`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        artefact: which one, when several are for the same engine; None takes the first.
        precision: see `load`.
        ops: see `load`.

    Raises:
        EngineUnavailableError: the engine cannot run here, or a precision that the artefact was not built for.
    """
    chosen = backend(engine)
    if artefact is None:
        artefact = next(a for a in manifest.artefacts.values() if a.engine == chosen.artefact)
    path = folder / next(iter(artefact.files))
    if chosen.from_artefact is not None:
        if precision not in (None, artefact.precision):
            raise EngineUnavailableError(
                f"{path}: built for precision {artefact.precision}, {precision} was asked for; export it again with "
                f"--precision {precision}"
            )
        return chosen.from_artefact(path, artefact, device)
    from flowad_fast.pipeline import ScoringPipeline

    model = load_checkpoint(path)
    if model.spec != manifest.model:
        raise BundleError(f"{folder}: the weights' description differs from the manifest; export the bundle again")
    pipeline = ScoringPipeline(
        model, manifest.scorer, manifest.aggregate, precision or artefact.precision, operators(ops)
    )
    return start_from_model(engine, pipeline, device)
