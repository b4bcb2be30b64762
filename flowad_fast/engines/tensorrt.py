"""The TensorRT and TensorRT-RTX engines: a built engine file, with torch tensors as its inputs and outputs.

Both libraries have one API under two module names; everything that differs between them is in `FLAVOURS`. Neither runs
without an NVIDIA GPU, although TensorRT-RTX builds without one.
"""

import importlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowad_fast.bundle import LOCATION, Artefact
from flowad_fast.engines import Engine
from flowad_fast.engines.device import torch_device
from flowad_fast.errors import BundleError, EngineUnavailableError, FrameError, nearest

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
"""Smallest and largest shape of an input in the engine's optimisation profile."""


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries.

    Attributes:
        name: of the engine and of the format.
        module: the Python module.
        install: the command that installs it.
        portable: whether engines are built for a list of GPUs instead of the GPU that builds them.
    """

    name: str
    module: str
    install: str
    portable: bool


FLAVOURS = {
    f.name: f
    for f in (
        Flavour(
            "tensorrt",
            "tensorrt",
            'pip install "flowad-fast[tensorrt]" (its libraries come from NVIDIA)',
            portable=False,
        ),
        Flavour("tensorrt-rtx", "tensorrt_rtx", 'pip install "flowad-fast[tensorrt-rtx]"', portable=True),
    )
}


def import_library(flavour: Flavour) -> ModuleType:
    """The library's module.

    Raises:
        EngineUnavailableError: it is not installed, or one of its own libraries is missing.
    """
    try:
        return importlib.import_module(flavour.module)
    except ImportError as error:
        raise EngineUnavailableError(
            f"{flavour.name} needs the Python module {flavour.module}: {flavour.install} ({error})"
        ) from None


class Log:
    """Collects a library's error messages, so that they can be part of an exception; the rest is dropped."""

    def __init__(self, library: Any) -> None:
        self.messages: list[str] = []
        messages, worst = self.messages, (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR)

        class Logger(library.ILogger):
            def __init__(self) -> None:
                library.ILogger.__init__(self)  # pybind11 wants the base's own initialiser, not super()

            def log(self, severity: Any, message: str) -> None:
                if severity in worst:
                    messages.append(" ".join(message.split()))

        self.logger = Logger()

    def last(self) -> str:
        """The last error message, shortened."""
        return self.messages[-1][:300] if self.messages else "it gives no reason"


def check_fits(
    path: Path, flavour: Flavour, library_version: str, built_with: str | None, capability: str, built_for: str
) -> None:
    """Refuse an engine that another version built, or that was built for other GPUs, before it is parsed.

    Args:
        path: the engine file, for the message.
        flavour: its library.
        library_version: version installed here.
        built_with: version that built it, from the manifest.
        capability: this GPU's compute capability, e.g. "8.9".
        built_for: space-separated compute capabilities, from the manifest.

    Raises:
        EngineUnavailableError: expected and found, and the command that rebuilds it.
    """
    rebuild = f"build it again on this machine: flowad-export make CHECKPOINT --format {flavour.name}"
    if library_version != built_with:
        raise EngineUnavailableError(
            f"{path}: built with {flavour.module} {built_with}, this machine has {library_version}; "
            f"install {flavour.module} {built_with}, or {rebuild}"
        )
    if capability not in built_for.split():
        raise EngineUnavailableError(
            f"{path}: built for compute capability {' or '.join(built_for.split()) or 'unknown'}, "
            f"this GPU has {capability}; {rebuild}"
        )


class Session:
    """An engine file on one GPU: named torch tensors in, named torch tensors out.

    Safe from many threads: each has its own execution context and stream, since a context holds one call's state.
    """

    def __init__(self, path: Path, library: Any, device: torch.device) -> None:
        self.path, self.library, self.device = path, library, device
        self.log = Log(library)
        # The runtime must outlive the engine.
        self._runtime = library.Runtime(self.log.logger)
        content = path.read_bytes()
        with torch.cuda.device(device):
            self.engine = self._runtime.deserialize_cuda_engine(content)
        if self.engine is None:
            raise BundleError(f"{path}: {library.__name__} {library.__version__} refuses the engine: {self.log.last()}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        is_input = {name: self.engine.get_tensor_mode(name) == library.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        self.dtypes = {name: self._torch_dtype(name) for name in names}
        self.bounds: dict[str, Bounds] = {}
        for name in self.inputs:
            low, _, high = self.engine.get_tensor_profile_shape(name, 0)
            self.bounds[name] = tuple(low), tuple(high)
        self._local = threading.local()

    def _torch_dtype(self, name: str) -> torch.dtype:
        kind = self.engine.get_tensor_dtype(name).name
        known = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64,
                 "INT32": torch.int32, "UINT8": torch.uint8}  # fmt: skip
        if kind not in known:
            raise BundleError(f"{self.path}: {name} is of type {kind}, expected one of {', '.join(known)}")
        return known[kind]

    @property
    def context(self) -> Any:
        """The calling thread's execution context: activations, bound addresses and shapes of one call at a time."""
        if not hasattr(self._local, "context"):
            with torch.cuda.device(self.device):
                context = self.engine.create_execution_context()
            if context is None:
                raise EngineUnavailableError(f"{self.path}: no execution context: {self.log.last()}; free GPU memory")
            self._local.context = context
        return self._local.context

    @property
    def stream(self) -> torch.cuda.Stream:
        """The calling thread's stream. The default stream would make the library synchronise the whole device."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        return self._local.stream

    def bind(self, context: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Point a context at the inputs and at new outputs, which are returned; nothing runs yet.

        Raises:
            FrameError: an input is missing, or has a type or shape that the engine was not built for.
        """
        outputs = {}
        if set(inputs) != set(self.inputs):
            raise FrameError(f"{self.path}: inputs are {', '.join(self.inputs)}, got {', '.join(inputs)}")
        for name, tensor in inputs.items():
            low, high = self.bounds[name]
            shape = tuple(tensor.shape)
            if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                raise FrameError(f"{self.path}: {name} has shape {shape}, the engine was built for {low} to {high}")
            if tensor.dtype != self.dtypes[name] or not tensor.is_contiguous() or tensor.device != self.device:
                raise FrameError(
                    f"{self.path}: {name} must be contiguous {self.dtypes[name]} on {self.device}, "
                    f"got {tensor.dtype} on {tensor.device}"
                )
            context.set_input_shape(name, shape)
            context.set_tensor_address(name, tensor.data_ptr())
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = torch.empty(shape, dtype=self.dtypes[name], device=self.device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on this thread's stream, after what the current stream has queued; the current stream waits for it."""
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            outputs = self.bind(self.context, inputs)
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise BundleError(f"{self.path}: the engine failed: {self.log.last()}")
        outer.wait_stream(self.stream)
        for output in outputs.values():
            output.record_stream(outer)
        return outputs


class TensorRTEngine(Engine):
    """Runs a bundle's `tensorrt` or `tensorrt-rtx` engine; safe from many threads.

    Batches above the profile's largest are split, batches below its smallest are padded.
    """

    def __init__(self, path: Path, artefact: Artefact, device: str = "auto") -> None:
        if artefact.engine not in FLAVOURS:
            raise EngineUnavailableError(f"{artefact.engine!r} is no TensorRT engine; {nearest('', FLAVOURS)}")
        flavour = FLAVOURS[artefact.engine]
        library = import_library(flavour)
        if device == "cpu" or not torch.cuda.is_available():
            raise EngineUnavailableError(
                f"{flavour.name} runs on NVIDIA GPUs only; "
                f"{'device cpu was asked for' if device == 'cpu' else f'torch {torch.__version__} finds none here'}; "
                "choose engine='onnxruntime' for the CPU"
            )
        self._device = torch_device(device)
        major, minor = torch.cuda.get_device_capability(self._device)
        check_fits(
            path, flavour, library.__version__, artefact.versions.get(flavour.module),
            f"{major}.{minor}", str(artefact.details.get("capabilities", "")),
        )  # fmt: skip
        self.name, self.device = flavour.name, str(self._device)
        self.session = Session(path, library, self._device)
        self._location: dict[str, Tensor] = {}

    def locate(self, table: np.ndarray) -> None:
        """See `Engine`."""
        if LOCATION not in self.session.inputs:
            super().locate(table)
        self._location = {LOCATION: torch.from_numpy(table).to(self._device)}

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        maps, scores = [], []
        (smallest, *_), (largest, *_) = self.session.bounds["frames"]
        for i in range(0, len(frames), largest):
            arrays = {"frames": frames[i : i + largest]}
            if y is not None:
                arrays["classes"] = y[i : i + largest]
            n = len(arrays["frames"])
            with torch.inference_mode():
                given = {name: self._tensor(a, smallest) for name, a in arrays.items()}
                outputs = self.session(given | self._location)
                maps.append(outputs["map"][:n].cpu().numpy())
                scores.append(outputs["score"][:n].cpu().numpy())
        return np.concatenate(maps), np.concatenate(scores)

    def _tensor(self, array: np.ndarray, smallest: int) -> Tensor:
        if len(array) < smallest:
            array = np.concatenate([array, np.repeat(array[-1:], smallest - len(array), 0)])
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
