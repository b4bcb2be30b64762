"""The ONNX Runtime engine: the exported graph, on exactly the execution provider that was asked for."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from flowad_fast.bundle import LOCATION, Artefact
from flowad_fast.engines import Engine
from flowad_fast.engines.cores import limit
from flowad_fast.engines.onnx_file import check_external_data
from flowad_fast.engines.plugins import PLUGINS, plugin_device
from flowad_fast.environment import has_gpu_driver
from flowad_fast.errors import BundleError, EngineUnavailableError, FrameError, nearest

if TYPE_CHECKING:
    from torch import Tensor

if os.environ.get("ORT_DISABLE_TELEMETRY") != "0":  # for callers who imported it before `environment.settle` ran
    onnxruntime.disable_telemetry_events()

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
"""Device kinds (`kind` or `kind:N`) and the execution providers that they name."""
HEAVY = ("Conv", "MatMul", "Gemm", "FusedConv", "FusedMatMul", "FusedGemm")
"""Operators that must run on the provider that was asked for; small shape arithmetic belongs on the CPU."""
TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(uint8)": np.uint8,
    "tensor(int64)": np.int64,
}
"""Of the graph's inputs and outputs."""


class OnnxRuntimeEngine(Engine):
    """Runs `model.onnx` of a bundle; safe from many threads (a session's run is).

    `auto` is CUDA where ONNX Runtime and the machine have it, otherwise the CPU. float32 stays float32: TF32 is off.
    """

    name = "onnxruntime"

    def __init__(
        self, path: Path, device: str = "auto", threads: int | None = None, files: Collection[str] | None = None
    ) -> None:
        """Start a session.

        Args:
            path: the ONNX file.
            device: `auto`, or a key of `PROVIDERS` or `PLUGINS`, with `:N` for the N-th device.
            threads: CPU threads inside an operator, None for what `cores.limit` says.
            files: names that external data may have (those of the manifest, whose hashes were checked); None for any
                in the graph's folder.

        Raises:
            EngineUnavailableError: the provider, or an operator on it, is missing here.
            BundleError: the graph, or where it keeps its external data, is not acceptable.
        """
        if threads is not None or not os.environ.get("ORT_INTRA_OP_NUM_THREADS"):  # which ONNX Runtime reads itself
            threads = limit(threads)
        check_external_data(path, files)
        kind, _, index = device.partition(":")
        available = onnxruntime.get_available_providers()
        if kind == "auto":
            kind = "cuda" if has_cuda() and has_gpu_driver() else "cpu"
        if kind not in PROVIDERS and kind not in PLUGINS:
            raise EngineUnavailableError(f"unknown device {device!r}; {nearest(kind, (*PROVIDERS, *PLUGINS, 'auto'))}")
        provider = PLUGINS[kind].provider if kind in PLUGINS else PROVIDERS[kind]
        if kind in PROVIDERS and provider not in available:
            raise EngineUnavailableError(
                f"ONNX Runtime {onnxruntime.__version__} has no provider for device {device!r} "
                f"(it has {', '.join(available)}); install onnxruntime-gpu, or ask for device='cpu'"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        chain = None
        if kind in PLUGINS:
            options.add_provider_for_devices([plugin_device(kind, index)], {})
        else:
            chain = _chain(kind, index)
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=chain)
        except errors.NotImplemented as error:
            raise EngineUnavailableError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {path.name} on {kind}: {_line(error)}; "
                "export it in fp32, fp16 or fp8, or use another engine"
            ) from None
        except _failures() as error:
            raise BundleError(f"{path}: ONNX Runtime refuses the graph: {_line(error)}") from None
        got = self.session.get_providers()
        if provider not in got:
            raise EngineUnavailableError(f"asked ONNX Runtime for {provider}, it chose {', '.join(got)}")
        self._check_placement(provider, kind)
        self.device = device if index else kind
        self._memory = f"cuda:{index or 0}" if kind in ("cuda", "tensorrt") else "cpu"
        self.inputs = {node.name: node.type for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self._location: dict[str, np.ndarray] = {}

    def _check_placement(self, provider: str, kind: str) -> None:
        """Refuse a session that would run the expensive operators somewhere else than asked."""
        allowed = {provider} if kind in PLUGINS else {name for name, _ in _chain(kind, "")}
        if not hasattr(self.session, "get_provider_graph_assignment_info"):  # older releases cannot say
            return
        for part in self.session.get_provider_graph_assignment_info():
            strays = [node.op_type for node in part.get_nodes() if node.op_type in HEAVY]
            if strays and part.ep_name not in allowed:
                raise EngineUnavailableError(
                    f"asked ONNX Runtime for {provider}, it would run {strays[0]} on {part.ep_name}; "
                    f"ask for device='cpu' to run everything there"
                )

    @classmethod
    def from_artefact(
        cls, path: Path, artefact: Artefact, device: str = "auto", threads: int | None = None, **mode: str
    ) -> "OnnxRuntimeEngine":
        """See `Engine`; external data may lie in the artefact's own files only."""
        return cls(path, device, threads, artefact.files)

    def locate(self, table: np.ndarray) -> None:
        """See `Engine`."""
        if LOCATION not in self.inputs:
            super().locate(table)
        self._location = {LOCATION: table}

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        given = {"frames": frames} if y is None else {"frames": frames, "classes": y}
        maps, scores = self.session.run(["map", "score"], given | self._location)
        return maps, scores

    def run_bound(self, inputs: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Run on torch tensors where they are, without a copy: on the GPU for GPU providers, otherwise on the CPU.

        Raises:
            FrameError: an input is missing, or is not contiguous, of the graph's type, and on one device.
        """
        import torch

        inputs |= {name: torch.from_numpy(table).to(self._memory) for name, table in self._location.items()}
        if set(inputs) != set(self.inputs):
            raise FrameError(f"inputs are {', '.join(self.inputs)}, got {', '.join(inputs)}")
        device = torch.device(self._memory)
        types = {name: torch.from_numpy(np.empty(0, kind)).dtype for name, kind in TYPES.items()}
        for name, tensor in inputs.items():
            wanted = types[self.inputs[name]]
            if tensor.dtype != wanted or tensor.device != device or not tensor.is_contiguous():
                raise FrameError(
                    f"{name} must be contiguous {wanted} on {device}, got {tensor.dtype} on {tensor.device}"
                )
        batch = len(inputs["frames"])
        results = {
            name: torch.empty((batch, *node.shape[1:]), dtype=types[node.type], device=device)
            for name, node in self.outputs.items()
        }
        binding = self.session.io_binding()
        place = (device.type, device.index or 0)
        for name, tensor in inputs.items():
            binding.bind_input(name, *place, TYPES[self.inputs[name]], tensor.shape, tensor.data_ptr())
        for name, out in results.items():
            binding.bind_output(name, *place, TYPES[self.outputs[name].type], out.shape, out.data_ptr())
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # ONNX Runtime works on a stream of its own
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return results


def has_cuda() -> bool:
    """Whether this ONNX Runtime was built for CUDA."""
    return PROVIDERS["cuda"] in onnxruntime.get_available_providers()


def _chain(kind: str, index: str) -> list[tuple[str, dict[str, Any]]]:
    """The providers for a device kind, best first; CUDA takes what TensorRT leaves."""
    place = {"device_id": int(index)} if index else {}
    exact = {"use_tf32": 0}
    if kind == "cuda":
        return [(PROVIDERS["cuda"], place | exact)]
    if kind == "tensorrt":
        return [(PROVIDERS["tensorrt"], place), (PROVIDERS["cuda"], place | exact)]
    return [(PROVIDERS[kind], place)]


def _failures() -> tuple[type[Exception], ...]:
    """What a session raises: ONNX Runtime's own exceptions share no base but Exception."""
    own = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    return (RuntimeError, ValueError, *own)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
