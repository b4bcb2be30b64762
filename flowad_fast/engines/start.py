"""Choosing and starting an engine: of a bundle's artefacts, or on a model in memory."""

import importlib
from collections.abc import Set
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np

from flowad_fast.bundle import CONSTANT_LOCATION, Artefact, Manifest, location_table
from flowad_fast.config import Precision
from flowad_fast.engines import ENGINES, Engine, backend
from flowad_fast.environment import has_gpu_driver
from flowad_fast.errors import BundleError, EngineUnavailableError, nearest

if TYPE_CHECKING:
    from flowad_fast.pipeline import ScoringPipeline
    from flowad_fast.stages.arithmetic import Arithmetic

AUTO = {"cuda": ("cudagraph", "tensorrt", "onnxruntime", "inductor"), "cpu": ("onnxruntime", "eager", "inductor")}
"""What `auto` prefers of the engines that a bundle's artefacts feed, by kind of device.

On a GPU the captured graph with fused operators. On a CPU the order of the committed records: of inversion and density
ONNX Runtime is as fast as eager or faster on the demo model, within the noise of each other at 768x12."""
OPS = ("reference", "fused")
"""Namespaces of operators: plain torch, or Triton kernels on the GPU (on the CPU they are plain torch as well)."""
FUSED = ("cudagraph",)
"""Engines that take the fused operators unless others are asked for."""


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


def device_kind(device: str) -> str:
    """`cuda` or `cpu`: where `device` leads. torch is asked only where it is installed and a GPU's driver is too."""
    if device != "auto":
        return "cuda" if device.partition(":")[0] in ("cuda", "tensorrt") else "cpu"
    if not has_gpu_driver():
        return "cpu"
    if not _has_torch():
        from flowad_fast.engines.onnxruntime import has_cuda

        return "cuda" if has_cuda() else "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _has_torch() -> bool:
    return find_spec("torch") is not None


def choose_engine(has: Set[str], device: str) -> str:
    """The engine that `auto` takes of those that the artefacts in `has` feed; see `AUTO`.

    In the light runtime, which has no torch, those that need none come first.

    Raises:
        EngineUnavailableError: none of them.
    """
    kind = device_kind(device)
    fed = [name for name in AUTO[kind] if backend(name).artefact in has]
    found = next((name for name in fed if _has_torch() or not backend(name).requires), fed[0] if fed else None)
    if found is None:
        raise EngineUnavailableError(
            f"the bundle has nothing that `auto` runs on {kind} (it has: {', '.join(sorted(has)) or 'nothing'}); "
            "name an engine, or export it again with another --format"
        )
    return found


def start_engine(
    folder: Path,
    manifest: Manifest,
    engine: str,
    device: str,
    artefact: Artefact | None = None,
    *,
    precision: Precision | None = None,
    ops: str | None = None,
    threads: int | None = None,
    location: np.ndarray | None = None,
    mode: str | None = None,
) -> Engine:
    """Start an engine on one of a bundle's artefacts; the files' hashes have been checked by `bundle.read`.

    Args:
        folder: the bundle's folder.
        manifest: its manifest.
        engine: a name in `ENGINES`.
        device: see `flowad_fast.load`.
        artefact: which one, when several are for the same engine; None takes the first.
        precision: see `flowad_fast.load`.
        ops: see `flowad_fast.load`.
        threads: see `flowad_fast.load`.
        location: location statistics in place of the bundle's, where it has some.
        mode: see `flowad_fast.load`.

    Raises:
        EngineUnavailableError: the engine cannot run here, a mode that it does not have, or a precision that the
            artefact was not built for.
    """
    chosen = backend(engine)
    if artefact is None:
        artefact = next(a for a in manifest.artefacts.values() if a.engine == chosen.artefact)
    path = folder / next(iter(artefact.files))
    if mode is not None and mode not in (modes := chosen.engine().modes):
        raise EngineUnavailableError(
            f"the engine {engine} has no mode {mode!r}; "
            + (nearest(mode, modes) if modes else "leave it out, or ask for engine='openvino'")
        )
    if chosen.starts_from == "artefact":
        if precision not in (None, artefact.precision):
            raise EngineUnavailableError(
                f"{path}: built for precision {artefact.precision}, {precision} was asked for; export it again with "
                f"--precision {precision}"
            )
        if ops is not None:
            raise EngineUnavailableError(f"{path}: the engine {engine} has its operators fixed; leave ops={ops!r} out")
        started = chosen.engine().from_artefact(path, artefact, device, threads, **({"mode": mode} if mode else {}))
        if manifest.location is not None and CONSTANT_LOCATION not in artefact.details:
            started.locate(location_table(folder, manifest) if location is None else location)
        return started
    chosen.engine().with_threads(engine, threads)  # says what is missing before the weights are read
    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.pipeline import ScoringPipeline

    model = load_checkpoint(path)
    if model.spec != manifest.model:
        raise BundleError(f"{folder}: the weights' description differs from the manifest; export the bundle again")
    pipeline = ScoringPipeline(
        model,
        manifest.scorer,
        manifest.aggregate,
        arithmetic(engine, precision or cast(Precision, artefact.precision), ops),
        located=manifest.location is not None,
    )
    if manifest.location is not None:
        pipeline.locate(location_table(folder, manifest) if location is None else location)
    return start_from_model(engine, pipeline, device, threads)


def start_from_model(
    name: str, pipeline: "ScoringPipeline", device: str = "auto", threads: int | None = None
) -> Engine:
    """Start the engine `name` on a scoring pipeline; `threads` as in `flowad_fast.load`.

    Raises:
        EngineUnavailableError: the engine is unknown, cannot run here, takes no number of threads, or runs exported
            artefacts only.
    """
    chosen = backend(name)
    if chosen.starts_from != "model":
        able = ", ".join(key for key, one in ENGINES.items() if one.starts_from == "model")
        raise EngineUnavailableError(
            f"the engine {name} runs exported bundles only; export the model with flowad-export and load the bundle, "
            f"or ask for one of: {able}"
        )
    engine = chosen.engine()
    return engine(pipeline, device, **engine.with_threads(name, threads))  # type: ignore[call-arg]


def arithmetic(engine: str, precision: Precision, ops: str | None) -> "Arithmetic":
    """How an engine that starts from a model computes; `ops` None takes what suits the engine, see `FUSED`."""
    from flowad_fast.stages.arithmetic import Arithmetic

    return Arithmetic(precision, operators(ops or ("fused" if engine in FUSED else "reference")))
