"""The one registry of export formats: it drives help, validation, the exporter, the tests and the documentation.

A format is a file with a function that writes it, and one row in `FORMATS`; the row imports nothing, so listing formats
needs neither torch nor onnx.
"""

import importlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from flowad_fast.bundle import EngineName
from flowad_fast.config import Precision
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.stages.decision import Aggregate
from flowad_fast.stages.scorers import Scorer

if TYPE_CHECKING:
    from flowad_fast.model import FlowModel

AUTO = "auto"
BATCH = (1, 8, 64)
"""Default range of batch sizes, for formats whose engines are built for one: smallest, optimal, largest."""
WORKSPACE_MIB = (4096, 65536)
"""What an engine builder may allocate where nothing is asked for: from the first, doubled while the engine does not
fit, up to the last."""
OPSET = 20
"""Default opset: accepted by ONNX Runtime since 1.17 and TensorRT since 10.1.

From 23 on attention is one operator, which TensorRT-RTX builds only where it has a kernel for the shape and dtype.
"""


@dataclass(frozen=True)
class Ranges:
    """Good frames uint8 (n, H, W, 3) with class indices (n,) or None that int8 takes its ranges from, and whose."""

    frames: np.ndarray
    y: np.ndarray | None
    source: str


@dataclass(frozen=True)
class Request:
    """What is exported: a model with a scorer, for frames of one size or (None) of any.

    `batch` is (smallest, optimal, largest); formats that take any batch ignore it. `device` is what the artefact is
    built for: `cpu`, `cuda` or `cuda:N`. `workspace` is what an engine builder may allocate, in MiB, None for what the
    engine turns out to need. `frames` are real
    frames uint8 (n, H, W, 3) with class indices (n,) or None: fp8 graphs take ranges from them.
    """

    model: "FlowModel"
    scorer: Scorer
    aggregate: Aggregate = "max"
    frame_size: tuple[int, int] | None = None
    opset: int = OPSET
    precision: Precision = "fp32"
    batch: tuple[int, int, int] = BATCH
    device: str = "cpu"
    workspace: int | None = None
    frames: tuple[np.ndarray, np.ndarray | None] | None = None
    ranges: Ranges | None = None
    location: np.ndarray | None = None
    """Location statistics (classes, 2, h, w): an input of the graph, or, where a format's clients cannot give them,
    constants in it."""


@dataclass(frozen=True)
class Built:
    """Files that an exporter wrote, relative to its folder, the engine's own first; versions of what wrote them."""

    files: tuple[str, ...]
    versions: dict[str, str]
    details: dict[str, int | str] = field(default_factory=dict)


def versions_of(*packages: str) -> dict[str, str]:
    """The installed version of each distribution, for a manifest."""
    return {name: version(name) for name in packages}


@dataclass(frozen=True)
class Format:
    """An export format and the engine that reads it.

    Attributes:
        description: one line of help.
        place: module of `flowad_fast.export` and function. Given a request and an empty folder, it writes there and
            returns what is kept. It raises EngineUnavailableError when something is missing on this machine, naming
            what to install.
        engine: what `flowad_fast.load` calls the engine that opens it.
        precisions: what it can write.
        auto: whether `--format auto` includes it.
        quantises: what its artefacts are certified in where that is no precision that can be asked for.
        tiles: whether it can be used for frames that are cut into tiles, which is done around the engine.
    """

    description: str
    place: str
    engine: EngineName
    precisions: tuple[Precision, ...] = ("fp32",)
    auto: bool = False
    quantises: Literal["int8"] | None = None
    tiles: bool = True

    def write(self, request: Request, folder: Path) -> Built:
        """Write the format into an empty folder; its module is imported now."""
        module, _, function = self.place.partition(":")
        return getattr(importlib.import_module(f"flowad_fast.export.{module}"), function)(request, folder)


_GRAPH: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "fp8")

FORMATS: dict[str, Format] = {
    "onnx": Format(
        "ONNX graph of everything from frame to score, run by ONNX Runtime",
        "onnx_graph:write",
        "onnxruntime",
        _GRAPH,
        auto=True,
    ),
    "eager": Format(
        "weights for this project's torch engine, backbone included",
        "eager:write",
        "eager",
        get_args(Precision),
        auto=True,
    ),
    "tensorrt": Format(
        "TensorRT engine for the GPU that builds it", "tensorrt_engine:write_tensorrt", "tensorrt", _GRAPH
    ),
    "tensorrt-rtx": Format(
        "TensorRT-RTX engine for RTX GPUs (compute capability 8.0 to 12.1, not 9.0); builds without a GPU",
        "tensorrt_engine:write_rtx",
        "tensorrt-rtx",
        _GRAPH,
    ),
    "openvino-int8": Format(
        "graph quantised to int8 for OpenVINO on CPUs with VNNI or AMX, ranges from good parts",
        "openvino_int8:write",
        "openvino-int8",
        quantises="int8",
    ),
    "aoti": Format(
        "AOTInductor package: machine code, for Python and C++",
        "aoti:write",
        "inductor",
        ("fp32", "tf32", "fp16", "bf16"),
    ),
    "triton-server": Format(
        "model repository for NVIDIA Triton Inference Server, around an ONNX graph",
        "triton_server:write",
        "onnxruntime",
        _GRAPH,
        tiles=False,
    ),
}
"""Formats by name, as `--format` spells them."""


def parse_formats(text: str) -> tuple[str, ...]:
    """A comma-separated list of formats, each once, or `auto`; ConfigError with the nearest name for an unknown one."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names == [AUTO]:
        return tuple(name for name, one in FORMATS.items() if one.auto)
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
