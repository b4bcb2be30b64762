"""Backends: one file each, one protocol. An engine turns a batch of frames into maps and raw scores.

`ENGINES` is the open registry. An engine starts from a model in memory, from an artefact of a bundle, or both; its
module is imported when it is started, and one that cannot run here raises EngineUnavailableError, naming what is
missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flowad_fast.errors import EngineUnavailableError, nearest

if TYPE_CHECKING:
    from flowad_fast.bundle import Artefact
    from flowad_fast.pipeline import ScoringPipeline


class Engine(Protocol):
    """What a detector needs from a backend. `run` may be called from many threads.

    An engine that measures and chooses on the machine also has `details`, see `Detector.details`.
    """

    name: str
    device: str

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 (B, H, W, 3), classes int64 (B,) or None: map (B, S, S) and raw score (B,) float32."""


@dataclass(frozen=True)
class Backend:
    """How an engine is started.

    Attributes:
        description: one line for help and tables.
        from_model: starts it from a scoring pipeline and a device string (`auto`, `cpu`, `cuda`, `cuda:N`).
        from_artefact: starts it from the first file of a bundle's artefact, the artefact, and a device string.
        artefact: the `Artefact.engine` that it reads; engines that start from a model read the weights, "eager".
    """

    description: str
    artefact: str
    from_model: "Callable[[ScoringPipeline, str], Engine] | None" = None
    from_artefact: "Callable[[Path, Artefact, str], Engine] | None" = None


def _eager(pipeline: "ScoringPipeline", device: str) -> Engine:
    from flowad_fast.engines.eager import EagerEngine

    return EagerEngine(pipeline, device)


def _cudagraph(pipeline: "ScoringPipeline", device: str) -> Engine:
    from flowad_fast.engines.cudagraph import CudaGraphEngine

    return CudaGraphEngine(pipeline, device)


def _onnxruntime(path: Path, artefact: "Artefact", device: str) -> Engine:
    from flowad_fast.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(path, device, files=[Path(name).name for name in artefact.files])


def _tensorrt(path: Path, artefact: "Artefact", device: str) -> Engine:
    from flowad_fast.engines.tensorrt import TensorRTEngine

    return TensorRTEngine(path, artefact, device)


def _compile(pipeline: "ScoringPipeline", device: str) -> Engine:
    from flowad_fast.engines.inductor import InductorEngine

    return InductorEngine(pipeline, device)


def _inductor(path: Path, artefact: "Artefact", device: str) -> Engine:
    from flowad_fast.engines.inductor import AotInductorEngine

    return AotInductorEngine(path, artefact, device)


ENGINES: dict[str, Backend] = {
    "eager": Backend("torch, operator by operator", "eager", from_model=_eager),
    "cudagraph": Backend("one CUDA graph from frames to score", "eager", from_model=_cudagraph),
    "onnxruntime": Backend("the exported ONNX graph in ONNX Runtime", "onnxruntime", from_artefact=_onnxruntime),
    "compile": Backend("torch.compile of the pipeline, in this process", "eager", from_model=_compile),
    "inductor": Backend("the package that AOTInductor has compiled", "inductor", from_artefact=_inductor),
    "tensorrt": Backend("a TensorRT engine, on the kind of GPU that built it", "tensorrt", from_artefact=_tensorrt),
    "tensorrt-rtx": Backend("a TensorRT-RTX engine, on RTX GPUs", "tensorrt-rtx", from_artefact=_tensorrt),
}
"""Engines by name."""


def backend(name: str) -> Backend:
    """The registered engine `name`.

    Raises:
        EngineUnavailableError: no such engine; the message has the nearest name.
    """
    if name not in ENGINES:
        raise EngineUnavailableError(f"unknown engine {name!r}; {nearest(name, (*ENGINES, 'auto'))}")
    return ENGINES[name]


def start_from_model(name: str, pipeline: "ScoringPipeline", device: str = "auto") -> Engine:
    """Start the engine `name` on a scoring pipeline.

    Raises:
        EngineUnavailableError: the engine is unknown, cannot run here, or runs exported artefacts only.
    """
    start = backend(name).from_model
    if start is None:
        able = ", ".join(key for key, one in ENGINES.items() if one.from_model)
        raise EngineUnavailableError(
            f"the engine {name} runs exported bundles only; export the model with flowad-export and load the bundle, "
            f"or ask for one of: {able}"
        )
    return start(pipeline, device)
