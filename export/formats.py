"""The one registry of export formats: it drives help, validation, the exporter, the tests and the documentation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from flowad_fast.bundle import Artefact, EngineName, Manifest
from flowad_fast.checkpoints.load import save_checkpoint
from flowad_fast.config import Precision
from flowad_fast.engines import Engine
from flowad_fast.engines.precision import PRECISIONS
from flowad_fast.engines.start import start_engine
from flowad_fast.engines.tensorrt import FLAVOURS
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.export import aoti, onnx_graph, tensorrt_engine, triton_server
from flowad_fast.model import FlowModel
from flowad_fast.stages.decision import Aggregate
from flowad_fast.stages.scorers import Scorer

AUTO = "auto"
BATCH = (1, 8, 64)
"""Default range of batch sizes, for formats whose engines are built for one: smallest, optimal, largest."""
WORKSPACE_MIB = 4096


@dataclass(frozen=True)
class Request:
    """What is exported: a model with a scorer, for frames of one size or (None) of any.

    `batch` is (smallest, optimal, largest); formats that take any batch ignore it. `device` is what the artefact is
    built for and checked on: `cpu`, `cuda` or `cuda:N`. `workspace` is what an engine builder may allocate, in MiB.
    `frames` are real frames uint8 (n, H, W, 3) with class indices (n,) or None: fp8 graphs take ranges from them.
    """

    model: FlowModel
    scorer: Scorer
    aggregate: Aggregate
    frame_size: tuple[int, int] | None
    opset: int
    precision: Precision = "fp32"
    batch: tuple[int, int, int] = BATCH
    device: str = "cpu"
    workspace: int = WORKSPACE_MIB
    frames: tuple[np.ndarray, np.ndarray | None] | None = None


@dataclass(frozen=True)
class Built:
    """Files that an exporter wrote, relative to its folder, the engine's own first, and how long it took."""

    files: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    details: dict[str, int | str]


def _start(folder: Path, manifest: Manifest, artefact: Artefact, device: str) -> Engine:
    return start_engine(folder, manifest, artefact.engine, device, artefact)


@dataclass(frozen=True)
class Format:
    """An export format and the engine that reads it.

    Attributes:
        name: as `--format` spells it.
        engine: what `flowad_fast.load` calls the engine that opens it.
        description: one line of help.
        write: writes into an empty folder; only the files that it returns are kept. It raises
            EngineUnavailableError when something is missing on this machine, naming what to install.
        precisions: what it can write.
        auto: whether `--format auto` includes it.
        start: opens an artefact for the parity check. It raises EngineUnavailableError when this machine can write
            the format but not run it: the artefact is then published with its parity openly unmeasured.
    """

    name: str
    engine: EngineName
    description: str
    write: Callable[[Request, Path], Built]
    precisions: tuple[Precision, ...] = ("fp32",)
    auto: bool = False
    start: Callable[[Path, Manifest, Artefact, str], Engine] = _start


def _onnx_graph(request: Request, path: Path) -> int:
    return onnx_graph.write(
        path, request.model, request.scorer, request.aggregate, request.frame_size, request.opset, request.precision,
        request.frames,
    )  # fmt: skip


def _write_onnx(request: Request, folder: Path) -> Built:
    start = time.perf_counter()
    nodes = _onnx_graph(request, folder / "model.onnx")
    packages = ("torch", "onnx", "onnxscript")
    return Built(
        tuple(sorted((p.name for p in folder.iterdir()), key=lambda name: (name != "model.onnx", name))),
        {name: version(name) for name in packages},
        time.perf_counter() - start,
        {"opset": request.opset, "nodes": nodes},
    )


def _write_tensorrt(flavour: str) -> Callable[[Request, Path], Built]:
    def write(request: Request, folder: Path) -> Built:
        start = time.perf_counter()
        library = FLAVOURS[flavour]
        tensorrt_engine.check_available(library)  # before the graph is traced, which takes a while
        _onnx_graph(request, folder / "model.onnx")
        engine = folder / f"model.{flavour}.engine"
        built = tensorrt_engine.build(
            library, folder / "model.onnx", engine, batch=request.batch, precision=request.precision,
            workspace=request.workspace, device=request.device,
        )  # fmt: skip
        details: dict[str, int | str] = {
            "capabilities": " ".join(built.capabilities),
            "batch": ":".join(map(str, request.batch)),
            "opset": request.opset,
            "layers": built.layers,
            "timing_cache": built.timing_cache,
        }
        return Built((engine.name,), built.versions, time.perf_counter() - start, details)

    return write


def _write_eager(request: Request, folder: Path) -> Built:
    start = time.perf_counter()
    save_checkpoint(request.model, folder / "model.safetensors", include_backbone=True)
    seconds = time.perf_counter() - start
    return Built(("model.safetensors", "model.json"), {"torch": version("torch")}, seconds, {})


def _write_aoti(request: Request, folder: Path) -> Built:
    start = time.perf_counter()
    details = aoti.write(
        folder / "model.pt2", request.model, request.scorer, request.aggregate, request.frame_size, request.precision,
        request.device,
    )  # fmt: skip
    return Built(("model.pt2",), {"torch": torch.__version__}, time.perf_counter() - start, details)


def _write_triton_server(request: Request, folder: Path) -> Built:
    start = time.perf_counter()
    size = request.frame_size or (request.model.spec.image.size,) * 2
    files = triton_server.write(folder, partial(_onnx_graph, request), size, request.batch, request.device)
    packages = ("torch", "onnx", "onnxscript")
    seconds = time.perf_counter() - start
    return Built(files, {name: version(name) for name in packages}, seconds, {"opset": request.opset})


FORMATS = {
    f.name: f
    for f in (
        Format(
            "onnx",
            "onnxruntime",
            "ONNX graph of everything from frame to score, run by ONNX Runtime",
            _write_onnx,
            ("fp32", "fp16", "bf16", "fp8"),
            auto=True,
        ),
        Format(
            "eager",
            "eager",
            "weights for this project's torch engine, backbone included",
            _write_eager,
            PRECISIONS,
            auto=True,
        ),
        Format(
            "tensorrt",
            "tensorrt",
            "TensorRT engine for the GPU that builds it",
            _write_tensorrt("tensorrt"),
            ("fp32", "fp16", "bf16", "fp8"),
        ),
        Format(
            "tensorrt-rtx",
            "tensorrt-rtx",
            "TensorRT-RTX engine for RTX GPUs (compute capability 8.0 to 12.1, not 9.0); builds without a GPU",
            _write_tensorrt("tensorrt-rtx"),
            ("fp32", "fp16", "bf16", "fp8"),
        ),
        Format(
            "aoti",
            "inductor",
            "AOTInductor package: machine code, for Python and C++",
            _write_aoti,
            ("fp32", "tf32", "fp16", "bf16"),
        ),
        Format(
            "triton-server",
            "onnxruntime",
            "model repository for NVIDIA Triton Inference Server, around an ONNX graph",
            _write_triton_server,
            ("fp32", "fp16", "bf16", "fp8"),
        ),
    )
}


def parse_formats(text: str) -> tuple[str, ...]:
    """A comma-separated list of formats, each once, or `auto`; ConfigError with the nearest name for an unknown one."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names == [AUTO]:
        return tuple(f.name for f in FORMATS.values() if f.auto)
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"unknown format {name!r}; {nearest(name, (*FORMATS, AUTO))}")
    if not names:
        raise ConfigError(f"no format given; {nearest('', (*FORMATS, AUTO))}")
    return tuple(dict.fromkeys(names))


def parse_batch(text: str) -> tuple[int, int, int]:
    """`min:opt:max`, or one number for all three."""
    parts = text.split(":")
    if len(parts) == 1:
        parts *= 3
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--batch {text!r}; expected MIN:OPT:MAX or one number, for example 1:8:64")
    low, best, high = (int(part) for part in parts)
    if not 1 <= low <= best <= high:
        raise ConfigError(f"--batch {text!r}; expected 1 <= MIN <= OPT <= MAX")
    return low, best, high
