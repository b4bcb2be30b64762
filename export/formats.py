"""The one registry of export formats: it drives help, validation, the exporter, the tests and the documentation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from flowad_fast.bundle import Artefact, EngineName, Manifest
from flowad_fast.checkpoint import save_checkpoint
from flowad_fast.config import Precision
from flowad_fast.decision import Aggregate
from flowad_fast.detector import start_engine
from flowad_fast.engines import Engine
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.export import onnx_graph
from flowad_fast.model import FlowModel
from flowad_fast.scorers import Scorer

AUTO = "auto"
BATCH = (1, 8, 64)
"""Default range of batch sizes, for formats whose engines are built for one: smallest, optimal, largest."""
WORKSPACE_MIB = 4096


@dataclass(frozen=True)
class Request:
    """What is exported: a model with a scorer, for frames of one size or (None) of any.

    `batch` is (smallest, optimal, largest); formats that take any batch ignore it. `device` is what the artefact is
    built for and checked on: `cpu`, `cuda` or `cuda:N`. `workspace` is what an engine builder may allocate, in MiB.
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


@dataclass(frozen=True)
class Built:
    """Files that an exporter wrote, relative to its folder, the engine's own first, and how long it took."""

    files: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    details: dict[str, int | str]


def _start(folder: Path, manifest: Manifest, artefact: Artefact, device: str) -> Engine:
    return start_engine(folder, manifest, artefact.engine, device)


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


def _write_onnx(request: Request, folder: Path) -> Built:
    start = time.perf_counter()
    nodes = onnx_graph.write(
        folder / "model.onnx", request.model, request.scorer, request.aggregate, request.frame_size, request.opset
    )
    packages = ("torch", "onnx", "onnxscript")
    return Built(
        tuple(sorted((p.name for p in folder.iterdir()), key=lambda name: (name != "model.onnx", name))),
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
        Format(
            "onnx",
            "onnxruntime",
            "ONNX graph of everything from frame to score, run by ONNX Runtime",
            _write_onnx,
            auto=True,
        ),
        Format("eager", "eager", "weights for this project's torch engine, backbone included", _write_eager, auto=True),
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
