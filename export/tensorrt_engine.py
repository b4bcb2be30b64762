"""TensorRT and TensorRT-RTX engines from an ONNX file: one exporter, since both libraries have one API.

Networks are strongly typed: the precision is the graph's. TensorRT builds on and for the GPU of this machine; RTX
builds anywhere, for a list of compute capabilities.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock
import torch

from flowad_fast.config import Precision
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.tensorrt import FLAVOURS, Flavour, Log, import_library
from flowad_fast.errors import ConfigError, EngineUnavailableError, ExportError
from flowad_fast.export.formats import WORKSPACE_MIB, Built, Request
from flowad_fast.export.onnx_graph import write_graph
from flowad_fast.files import replacing

FRAME_SIDES = (32, 512, 1024)
"""Smallest, usual and largest side of the frames of an engine for frames of any size, in pixels."""
CACHE = Path.home() / ".cache" / "flowad-fast"
"""Where timings are kept between builds."""
LOWEST_CAPABILITY: dict[Precision, tuple[int, int]] = {"fp32": (8, 0), "fp16": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}
"""By precision: TensorRT-RTX has no float32 matrix product on 7.5, and fp8 units begin with 8.9."""


@dataclass(frozen=True)
class BuiltEngine:
    """What the manifest records of an engine.

    Library and version, the GPUs that it runs on, and the scratch memory in MiB that it needs at most, beside weights.
    """

    versions: dict[str, str]
    capabilities: tuple[str, ...]
    layers: int
    timing_cache: str
    workspace: int


def write_tensorrt(request: Request, folder: Path) -> Built:
    """Write a TensorRT engine for the request's GPU. See `build`."""
    return _write(FLAVOURS["tensorrt"], request, folder)


def write_rtx(request: Request, folder: Path) -> Built:
    """Write a TensorRT-RTX engine for every GPU that can run the precision. See `build`."""
    return _write(FLAVOURS["tensorrt-rtx"], request, folder)


def _write(flavour: Flavour, request: Request, folder: Path) -> Built:
    check_available(flavour)  # before the graph is traced, which takes a while
    graph, engine = folder / "model.onnx", folder / f"model.{flavour.name}.engine"
    write_graph(request, graph)
    built = build(
        flavour, graph, engine, batch=request.batch, precision=request.precision, workspace=request.workspace,
        device=request.device,
    )  # fmt: skip
    details: dict[str, int | str] = {
        "capabilities": " ".join(built.capabilities),
        "batch": ":".join(map(str, request.batch)),
        "opset": request.opset,
        "layers": built.layers,
        "timing_cache": built.timing_cache,
        "workspace_mib": built.workspace,
    }
    return Built((engine.name,), built.versions, details)


def build(
    flavour: Flavour,
    onnx_path: Path,
    engine_path: Path,
    *,
    batch: tuple[int, int, int],
    precision: Precision = "fp32",
    workspace: int | None = None,
    device: str = "auto",
    capabilities: tuple[str, ...] | None = None,
    timing_cache: Path | None = None,
) -> BuiltEngine:
    """Build `engine_path` from `onnx_path`.

    Args:
        flavour: which library.
        onnx_path: an ONNX file whose first axes are the batch.
        engine_path: written.
        batch: smallest, usual and largest batch of the optimisation profile.
        precision: of the graph; decides which GPUs can run it. fp32 has TF32 switched off.
        workspace: scratch memory of the engine in MiB; None for the smallest that it fits into, see `WORKSPACE_MIB`.
        device: TensorRT: the GPU to build on and for.
        capabilities: TensorRT-RTX: compute capabilities such as "8.9"; None for all that can run the precision.
        timing_cache: TensorRT: a folder for measured timings, which make a second build faster; None for the user's
            cache. RTX has none.

    Raises:
        EngineUnavailableError: the library is missing, or (TensorRT) there is no GPU to build on.
        ConfigError: a compute capability that the library does not build for.
        ExportError: the library refuses the graph; names node and operator, and what else one can do.
    """
    if precision not in LOWEST_CAPABILITY:
        raise ConfigError(f"precision {precision} is not for {flavour.name}; expected {', '.join(LOWEST_CAPABILITY)}")
    library = check_available(flavour)
    log = Log(library)
    gpu = None if flavour.portable else torch_device(device)
    if gpu is not None and gpu.type != "cuda":
        raise EngineUnavailableError(f"{flavour.name} builds on a GPU, the device is {gpu}; give --device cuda")
    with nullcontext() if gpu is None else torch.cuda.device(gpu):
        builder = library.Builder(log.logger)
        network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        _parse(flavour, library, network, log, onnx_path)
        config = builder.create_builder_config()
        config.clear_flag(library.BuilderFlag.TF32)
        config.add_optimization_profile(_profile(builder, network, batch))
        cache: Path | None = None
        cache_use = "none"
        if gpu is None:
            targets = _set_targets(library, config, precision, capabilities)
        else:
            targets = ("{}.{}".format(*torch.cuda.get_device_capability(gpu)),)
            name = torch.cuda.get_device_name(gpu).replace(" ", "-")
            cache = (timing_cache or CACHE) / f"{flavour.name}-{library.__version__}-{name}.timing"
            cache_use = _set_timing_cache(config, cache)
        least, most = (workspace, workspace) if workspace is not None else WORKSPACE_MIB
        while True:
            config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, least * 2**20)
            serialized = builder.build_serialized_network(network, config)
            if serialized is not None or _OUT_OF_MEMORY not in log.last() or 2 * least > most:
                break
            least *= 2
    if serialized is None:
        what = log.last()
        remedy = _ALTERNATIVES
        if _OUT_OF_MEMORY in what:  # its own words give the limit as what was asked for
            what = f"it needs more than {least} MiB of scratch memory at batch {batch[-1]}"
            remedy = (
                f"try --workspace {2 * least}, a smaller largest batch (--batch 1:4:8), or, of density, fewer --probes"
            )
        raise ExportError(f"{flavour.name} {library.__version__} cannot build the graph: {what}; {remedy}")
    with engine_path.open("wb") as file:
        file.write(memoryview(serialized))
    if cache is not None:
        _save_timing_cache(config, cache)
    return BuiltEngine({flavour.module: library.__version__}, targets, network.num_layers, cache_use, least)


def check_available(flavour: Flavour) -> ModuleType:
    """The flavour's library, when this machine can build with it.

    Raises:
        EngineUnavailableError: the library is missing, or (TensorRT) there is no GPU to build on.
    """
    library = import_library(flavour)
    if not flavour.portable and not torch.cuda.is_available():
        raise EngineUnavailableError(
            f"{flavour.name} builds only on the GPU that the engine is for, and torch {torch.__version__} finds none; "
            "export there, or choose --format tensorrt-rtx (RTX GPUs) or onnx"
        )
    return library


_OUT_OF_MEMORY = "OutOfMemory"
"""In a library's message."""
_ALTERNATIVES = "try another --opset or --precision, a fixed --frame-size, or --format onnx or aoti"


def _parse(flavour: Flavour, library: ModuleType, network: Any, log: Log, path: Path) -> None:
    parser = library.OnnxParser(network, log.logger)
    # By path, so that external data is found beside the file.
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    shown = [f"node {e.node_name()!r} (operator {e.node_operator()}): {_line(e.desc())}" for e in errors]
    operators = sorted({e.node_operator() for e in errors})
    raise ExportError(
        f"{flavour.name} {library.__version__} does not take the graph: {'; '.join(shown[:3]) or log.last()}"
        + (f" and {len(errors) - 3} more (operators {', '.join(operators)})" if len(errors) > 3 else "")
        + f"; {_ALTERNATIVES}"
    )


def _profile(builder: Any, network: Any, batch: tuple[int, int, int]) -> Any:
    """Batch from the request; free frame sides from `FRAME_SIDES`."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        low, usual, high = (
            tuple((n, side)[axis > 0] if size < 0 else size for axis, size in enumerate(shape))
            for n, side in zip(batch, FRAME_SIDES, strict=True)
        )
        profile.set_shape(tensor.name, low, usual, high)
    return profile


def _set_targets(
    library: ModuleType, config: Any, precision: Precision, wanted: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Set the compute capabilities of a portable engine; members are named SM89 for 8.9."""
    members = library.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}
    lowest = LOWEST_CAPABILITY[precision]
    possible = [c for c in known if tuple(map(int, c.split("."))) >= lowest]
    chosen = possible if wanted is None else list(wanted)
    bad = [c for c in chosen if c not in possible]
    if bad or not chosen:
        raise ConfigError(
            f"{library.__name__} {library.__version__} builds {precision} engines for compute capabilities "
            f"{', '.join(possible)}; got {', '.join(bad) or 'none'}"
        )
    config.num_compute_capabilities = len(chosen)
    for i, capability in enumerate(chosen):
        config.set_compute_capability(known[capability], i)
    return tuple(chosen)


def _set_timing_cache(config: Any, path: Path) -> str:
    content = path.read_bytes() if path.is_file() else b""
    # The library refuses a cache of another version or GPU; the build then starts from an empty one.
    if content and config.set_timing_cache(config.create_timing_cache(content), False):
        return "reused"
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return "new"


def _save_timing_cache(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"), replacing(path) as file:  # another build may be writing the same cache
        file.write(memoryview(config.get_timing_cache().serialize()))


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
