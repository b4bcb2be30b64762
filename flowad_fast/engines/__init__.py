"""Backends: one file each, one base class. An engine turns a batch of frames into maps and raw scores.

`ENGINES` is the open registry, name to where its class is. An engine starts from a model in memory, or from an artefact
of a bundle; its module is imported when it is started, and one that cannot run here raises EngineUnavailableError,
naming what is missing. `engines.start` chooses and starts; to add an engine, see CONTRIBUTING.md.
"""

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from flowad_fast.errors import EngineUnavailableError, nearest
from flowad_fast.stages.frames import extremes

if TYPE_CHECKING:
    from torch import Tensor

    from flowad_fast.bundle import Artefact


class Judged(NamedTuple):
    """Results of B frames, and what a verdict needs to know beside them.

    Attributes:
        maps: (B, S, S) float32.
        raw: scores (B,) or (B, n) float32.
        low: smallest value of each frame (B,) uint8.
        high: largest value of each frame (B,) uint8.
        finite: whether each map is finite (B,) bool.
    """

    maps: np.ndarray
    raw: np.ndarray
    low: np.ndarray
    high: np.ndarray
    finite: np.ndarray


Mode = Literal["latency", "throughput"]
"""What an engine with `modes` is started for."""


class Engine(ABC):
    """What a detector needs from a backend. `run` may be called from many threads; the hooks do nothing by default.

    Attributes:
        name: its name in `ENGINES`.
        device: what it runs on: `cpu`, `cuda:0`, ...
        on_tensors: whether it has `on_device`.
        takes_threads: whether it is started with a number of CPU threads, as `threads`.
        modes: what `load(mode=…)` may be, the default first; none where there is nothing to choose.
    """

    name: str
    device: str
    on_tensors = False
    takes_threads = False
    modes: tuple[str, ...] = ()

    @abstractmethod
    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 (B, H, W, 3), classes int64 (B,) or None: map (B, S, S) and raw score (B,) float32."""

    def judge(self, frames: np.ndarray, y: np.ndarray | None) -> Judged:
        """As `run`, with what a verdict needs to know of frames and maps: found by passes over them on the host."""
        maps, raw = self.run(frames, y)
        return Judged(maps, raw, *extremes(frames), np.isfinite(maps).all((1, 2)))

    def on_device(self, frames: "Tensor", y: "Tensor | None") -> "tuple[Tensor, Tensor]":
        """As `run`, on tensors of the engine's device, results left there.

        Raises:
            EngineUnavailableError: the engine takes its frames from the host only.
        """
        raise EngineUnavailableError(f"the engine {self.name} takes frames from the host; call run()")

    def prepare(self, height: int, width: int) -> None:
        """Do ahead of time what the first frames of this size would wait for: compile, capture, allocate."""
        return

    def locate(self, table: np.ndarray) -> None:
        """Take a bundle's location statistics, (classes, 2, h, w) float32 of `stages.location`.

        Raises:
            EngineUnavailableError: the artefact was made without them.
        """
        raise EngineUnavailableError(
            f"the engine {self.name} has no place for location statistics; export the bundle again"
        )

    @classmethod
    def from_artefact(
        cls, path: Path, artefact: "Artefact", device: str, threads: int | None = None, **mode: str
    ) -> "Engine":
        """Start on a bundle's artefact, whose first file is `path`; `mode` is one of `modes`, where there are some.

        Raises:
            EngineUnavailableError: it cannot run here, or takes no number of threads.
        """
        return cls(path, artefact, device, **cls.with_threads(artefact.engine, threads), **mode)  # type: ignore

    @classmethod
    def with_threads(cls, name: str, threads: int | None) -> dict[str, int]:
        """The keyword argument that holds the number of threads, where there is one.

        Raises:
            EngineUnavailableError: a number for an engine that takes none, called `name`.
        """
        if threads is None:
            return {}
        if not cls.takes_threads:
            able = "one that runs on the CPU: onnxruntime, openvino, eager, compile, inductor"
            raise EngineUnavailableError(
                f"the engine {name} takes no number of threads (got {threads}); leave it out, or ask for {able}"
            )
        return {"threads": threads}

    @property
    def title(self) -> str:
        """What runs, for people: the engine and where, e.g. "onnxruntime on cpu"."""
        return f"{self.name} on {self.device}"

    @property
    def details(self) -> dict[str, Any]:
        """What it measured and chose on this machine, as JSON values; see `Detector.details`."""
        return {}


@dataclass(frozen=True)
class Backend:
    """How an engine is started.

    Attributes:
        description: one line for help and tables.
        place: its module and class. The class is called with (pipeline, device) when it starts from a model, and with
            `threads` where a number was asked for and it takes one; otherwise its `from_artefact` is.
        artefact: the `Artefact.engine` that it reads; engines that start from a model read the weights, "eager".
        starts_from: what it is given.
        requires: the extra of this project that it needs, for messages; "" where the light runtime is enough.
    """

    description: str
    place: str
    artefact: str
    starts_from: Literal["model", "artefact"] = "artefact"
    requires: str = "model"

    def engine(self) -> type[Engine]:
        """The engine's class, imported now.

        Raises:
            EngineUnavailableError: a package that it needs is not installed.
        """
        module, _, name = self.place.partition(":")
        try:
            found: type[Engine] = getattr(importlib.import_module(f"flowad_fast.engines.{module}"), name)
            return found
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("flowad_fast"):
                raise
            wanted = f'"flowad-fast[{self.requires}]"' if self.requires else error.name
            raise EngineUnavailableError(
                f"{self.description} needs the package {error.name}, which is not installed: pip install {wanted}"
            ) from None


ENGINES: dict[str, Backend] = {
    "eager": Backend("torch, operator by operator", "eager:EagerEngine", "eager", "model"),
    "cudagraph": Backend("one CUDA graph from frames to score", "cudagraph:CudaGraphEngine", "eager", "model"),
    "onnxruntime": Backend(
        "the exported ONNX graph in ONNX Runtime", "onnxruntime:OnnxRuntimeEngine", "onnxruntime", requires=""
    ),
    "openvino": Backend(
        "the exported ONNX graph in OpenVINO", "openvino:OpenVinoEngine", "onnxruntime", requires="openvino"
    ),
    "openvino-int8": Backend(
        "a graph quantised to int8 in OpenVINO",
        "openvino_int8:OpenVinoInt8Engine",
        "openvino-int8",
        requires="openvino",
    ),
    "compile": Backend("torch.compile of the pipeline, in this process", "inductor:InductorEngine", "eager", "model"),
    "inductor": Backend("the package that AOTInductor has compiled", "inductor:AotInductorEngine", "inductor"),
    "tensorrt": Backend(
        "a TensorRT engine, on the kind of GPU that built it",
        "tensorrt:TensorRTEngine",
        "tensorrt",
        requires="tensorrt",
    ),
    "tensorrt-rtx": Backend(
        "a TensorRT-RTX engine, on RTX GPUs", "tensorrt:TensorRTEngine", "tensorrt-rtx", requires="tensorrt-rtx"
    ),
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
