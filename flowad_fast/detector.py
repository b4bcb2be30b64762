"""The product in one page: frames in, verdicts out.

    detector = load("bundles/bottle")          # verifies the bundle, starts an engine
    detection = detector(frames)               # uint8 (B, H, W, 3)

What a call does, and where to read about it:

    frames       are these frames, and can they be judged       stages/frames.py
    classes      which product each frame shows                 config.py, Classes
    engine       frames to map and raw score                    engines/
    tiles        large frames in pieces, where a bundle says so stages/tiling.py, engines/tiled.py
    decision     threshold from good parts, or no verdict       detection.py, stages/decision.py

An engine computes what `pipeline.py` says in sixty lines (read it next), itself or as a graph that was exported from
it. Whatever ran, the detection says so.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from flowad_fast import bundle as bundles
from flowad_fast.config import Classes, ModelConfig, Precision, Weights
from flowad_fast.detection import Detection as Detection
from flowad_fast.engines import Engine, Mode, backend
from flowad_fast.engines.start import arithmetic, choose_engine, start_engine, start_from_model
from flowad_fast.engines.tiled import TiledEngine
from flowad_fast.errors import BundleError, ConfigError, EngineUnavailableError, FrameError, require
from flowad_fast.masks import read_mask
from flowad_fast.stages.aggregates import columns
from flowad_fast.stages.decision import Aggregate, Calibration
from flowad_fast.stages.decision import Verdict as Verdict
from flowad_fast.stages.frames import FrozenFrames, check_frames, doubts_of
from flowad_fast.stages.tiling import NO_LOCATION, Tiler

if TYPE_CHECKING:
    from flowad_fast.model import FlowModel
    from flowad_fast.stages.scorers import Scorer


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
        image_size: side S of what the model looks at, pixels: of the maps, unless frames are cut into tiles.
        aggregate: map to image score.
        frame_size: height and width that frames must have, None for any.
        calibration: thresholds, None for a model that was not calibrated.
        tiler: how frames are cut into tiles; None: the model looks at whole frames.
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
        tiler: Tiler | None = None,
    ) -> None:
        if tiler is not None:
            engine = TiledEngine(engine, tiler, aggregate)
        self._engine: Engine | None = engine
        self._process = os.getpid()
        self.engine = engine.title
        self.classes: Classes = spec.classes
        self.image_size = spec.image.size
        self.aggregate = aggregate
        self.frame_size = frame_size
        self.calibration = calibration
        self.tiler = tiler
        self._only_camera = FrozenFrames() if reject_repeats else None

    @classmethod
    def from_manifest(
        cls,
        engine: Engine,
        manifest: bundles.Manifest,
        *,
        reject_repeats: bool = False,
        mask: np.ndarray | None = None,
    ) -> "Detector":
        """A detector around a running engine of a bundle; `mask` is that of one that has a fixed mask."""
        if (mask is None) != (manifest.mask is None):
            raise BundleError(
                "a bundle's fixed mask goes with its manifest; give mask=masks.read_mask(folder, manifest)"
            )
        image, tiling = manifest.model.image, manifest.tiling
        return cls(
            engine,
            manifest.model,
            aggregate=manifest.aggregate,
            frame_size=manifest.frame_size,
            calibration=manifest.calibration,
            reject_repeats=reject_repeats,
            tiler=None if tiling is None else Tiler(tiling, image.size, mask, image.mean),
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
        tiler: Tiler | None = None,
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
            tiler: how frames are cut into tiles; None: as those that the model was trained on, which may be whole.

        Raises:
            EngineUnavailableError: engine, precision or operators cannot run here; says what is missing.
            ConfigError: an aggregate, or location statistics, that tiles cannot have.
        """
        from flowad_fast.pipeline import ScoringPipeline

        tiler = tiler or model.tiler
        if tiler is not None and location is not None:
            raise ConfigError(NO_LOCATION)
        how = arithmetic(engine, precision, ops)
        pipeline = ScoringPipeline(model, scorer, aggregate, how, located=location is not None)
        if location is not None:
            pipeline.locate(location)
        running = start_from_model(engine, pipeline, device, threads)
        return cls(running, model.spec, aggregate=aggregate, tiler=tiler)

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
        With openvino `device` (its full name), `execution_devices`, `precision`, `mode`, `threads`, `streams`, and
        `nodes` of the compiled graph by precision. With cudagraph `attentions`, by batch size what was `chosen`, and
        `ms` and `error` of every backend; and `products`, by batch size and by part of a block what was `chosen`, and
        `us` (microseconds) of every candidate.
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
        batch = check_frames(frames, None if self.tiler else self.frame_size)
        y = self.classes.indices(classes, len(batch))
        size = (batch.shape[1], batch.shape[2])
        names = self.classes.of(y, len(batch))
        misfit = self._misfit(size)
        if misfit or not len(batch):
            shape = self.tiler.shape(*size) if self.tiler else (self.image_size,) * 2
            maps, raw = (np.zeros((len(batch), *rest), np.float32) for rest in (shape, columns(self.aggregate)))
            return Detection(maps, raw, names, (misfit,) * len(batch), self.engine, self.calibration, size)
        grid = self.tiler.grid(*size) if self.tiler else None
        frozen = [camera.doubts(batch)] if camera else []
        maps, raw, low, high, finite = engine.judge(batch, y)
        doubts = [doubts_of(low, high), *frozen, _not_finite(raw, finite)]
        invalid = tuple(next((reason for reason in all if reason), None) for all in zip(*doubts, strict=True))
        judged = None if grid is None else grid.judged
        if judged is not None:
            self._lower(maps, ~judged, names)
        return Detection(maps, raw, names, invalid, self.engine, self.calibration, size, judged)

    def _lower(self, maps: np.ndarray, unjudged: np.ndarray, names: Sequence[str]) -> None:
        """Keep what is not judged at or below the pixel threshold: it is no region, even if all that is judged is."""
        classes = self.calibration.classes if self.calibration else {}
        for map, name in zip(maps, names, strict=True):
            if name in classes and (pixels := classes[name].pixels) is not None:
                map[unjudged] = np.minimum(map[unjudged], np.float32(pixels.threshold))

    def _misfit(self, size: tuple[int, int]) -> str | None:
        """Why frames of this size cannot be cut into tiles as the bundle says, or None."""
        if self.tiler is None:
            return None
        if self.frame_size not in (None, size):
            height, width = self.frame_size
            return f"the frame is {size[0]}x{size[1]} pixels, the bundle takes {height}x{width}"
        try:
            self.tiler.grid(*size)
        except FrameError as error:
            return str(error)
        return None


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


def _not_finite(raw: np.ndarray, finite: np.ndarray) -> list[str | None]:
    finite = finite & np.isfinite(raw).all(tuple(range(1, raw.ndim)))
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
    mode: Mode | None = None,
) -> Detector:
    """A detector from an exported bundle, after verifying its files' hashes.

    Args:
        bundle: the bundle's folder.
        engine: a name in `engines.ENGINES`, or `auto`: on a GPU the captured CUDA graph with fused operators, on a CPU
            ONNX Runtime, as far as the bundle has what they run (`engines.start.AUTO`). What runs, and with which
            precision and operators, is in `Detector.engine`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; of `openvino`: `auto`, `cpu`, `gpu`, `npu`, also with `:N`; of
            `onnxruntime` also its other providers, such as `dml` and `nv-tensorrt-rtx`.
        precision: of engines that start from the bundle's weights; None is what the artefact was certified for.
        ops: operators of engines that start from the bundle's weights, see `Detector.from_model`.
        reject_repeats: call a frame that equals the one before pixel by pixel invalid, whoever calls: for a detector
            that serves one camera. With several, call each camera's own `Detector.camera()` instead.
        threads: CPU threads that one call may use, for engines that run on the CPU. None is what OMP_NUM_THREADS says,
            otherwise the cores that the process or its container may use. The torch engines set torch's number, which
            belongs to the process.
        mode: of the engine `openvino`: `latency` (its default), or `throughput` for batches and many threads.

    Raises:
        BundleError: no bundle, another version, or an altered file.
        EngineUnavailableError: the engine is not in the bundle or cannot run here; says what to install.
        ParityError: a quantised graph gives other results on this CPU than where it was certified.

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
    running = start_engine(folder, manifest, engine, device, precision=precision, ops=ops, threads=threads, mode=mode)
    if bundles.read(folder, verify=False)[1] != manifest:  # its thresholds are not those of the engine that was started
        raise BundleError(f"{folder}: the bundle was replaced while it was being loaded; load it again")
    mask = read_mask(folder, manifest)
    return Detector.from_manifest(running, manifest, reject_repeats=reject_repeats, mask=mask)
