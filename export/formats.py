"""The one registry of export formats: it drives help, validation, the exporter, the tests and the documentation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from flowad_fast.checkpoint import save_checkpoint
from flowad_fast.config import Precision
from flowad_fast.decision import Aggregate
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.export import onnx_graph
from flowad_fast.model import FlowModel
from flowad_fast.scorers import Scorer


@dataclass(frozen=True)
class Request:
    """What is exported: a model with a scorer, for frames of one size or (None) of any.

    `batch` is the smallest, the usual and the largest batch; only TensorRT needs to know them. `workspace` is the memory
    in MiB that a TensorRT builder may use as scratch, None for the library's own limit.
    """

    model: FlowModel
    scorer: Scorer
    aggregate: Aggregate
    frame_size: tuple[int, int] | None
    opset: int
    precision: Precision = "fp32"
    batch: tuple[int, int, int] = (1, 8, 32)
    workspace: int | None = None


@dataclass(frozen=True)
class Built:
    """Files that an exporter wrote, the engine's own first, and how long it took."""

    files: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    details: dict[str, int | str]


@dataclass(frozen=True)
class Format:
    """An export format and the engine that reads it."""

    name: str
    engine: Literal["eager", "onnxruntime"]
    description: str
    write: Callable[[Request, Path], Built]


def _write_onnx(request: Request, folder: Path) -> Built:
    start = time.perf_counter()
    nodes = onnx_graph.write(
        folder / "model.onnx", request.model, request.scorer, request.aggregate, request.frame_size, request.opset
    )
    packages = ("torch", "onnx", "onnxscript")
    return Built(
        ("model.onnx",),
        {name: version(name) for name in packages},
        time.perf_counter() - start,
        {"opset": request.opset, "nodes": nodes},
    )


def _write_eager(request: Request, folder: Path) -> Built:
    start = time.perf_counter()
    save_checkpoint(request.model, folder / "model.safetensors", include_backbone=True)
    seconds = time.perf_counter() - start
    return Built(("model.safetensors", "model.json"), {"torch": version("torch")}, seconds, {})


FORMATS = {
    f.name: f
    for f in (
        Format("onnx", "onnxruntime", "ONNX graph of everything from frame to score, run by ONNX Runtime", _write_onnx),
        Format("eager", "eager", "weights for this project's torch engine, backbone included", _write_eager),
    )
}


def parse_formats(text: str) -> tuple[str, ...]:
    """A comma-separated list of formats, each once; ConfigError with the nearest name for an unknown one."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"unknown format {name!r}; {nearest(name, FORMATS)}")
    if not names:
        raise ConfigError(f"no format given; {nearest('', FORMATS)}")
    return tuple(dict.fromkeys(names))
