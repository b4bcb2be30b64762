"""The OpenVINO engine: the exported ONNX graph on exactly the device, and in the arithmetic, that were asked for.

OpenVINO itself would compute float32 graphs in bfloat16 on CPUs that have it, and in float16 on GPUs; here the
precision is always said, and the compiled graph is asked what it does.
"""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flowad_fast.bundle import LOCATION, Artefact
from flowad_fast.engines import Engine
from flowad_fast.engines.cores import limit
from flowad_fast.engines.onnx_file import check_external_data
from flowad_fast.environment import without
from flowad_fast.errors import BundleError, EngineUnavailableError, nearest

with without("openvino_telemetry"):
    import openvino as openvino

KINDS = ("cpu", "gpu", "npu")
"""Of devices, as `load(device=…)` spells them; `gpu:1` is what OpenVINO calls GPU.1."""
ARITHMETIC = {"CPU": "f32", "GPU": "f32", "NPU": "f16"}
"""What products are computed in, by kind of device. NPUs have no float32."""
STATIC = ("NPU",)
"""Kinds that compile graphs of one shape only: frames go through one at a time, by a graph compiled for their size."""
HEAVY = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")
"""Types of the compiled graph's nodes that are matrix products."""
NARROW = ("bf16", "f16")
"""What such a node must not be computed in where f32 was asked for."""


class OpenVinoEngine(Engine):
    """Runs `model.onnx` of a bundle in OpenVINO; safe from many threads, each of which has its own requests.

    `auto` is the device that OpenVINO's AUTO chooses among CPU and GPUs. In the mode `latency` one call has all
    threads; in `throughput` they are divided into streams, among which a batch and calls of several threads are shared
    out.
    """

    name = "openvino"
    takes_threads = True
    modes = ("latency", "throughput")

    def __init__(
        self, path: Path, artefact: Artefact, device: str = "auto", threads: int | None = None, mode: str = "latency"
    ) -> None:
        """Compile the graph.

        Args:
            path: the graph.
            artefact: its entry in the manifest.
            device: `auto`, `cpu`, `gpu`, `npu`, with `:N` for the N-th.
            threads: CPU threads in all, None for what `cores.limit` says.
            mode: one of `modes`.

        Raises:
            EngineUnavailableError: no such device here, or it cannot run the graph as asked.
            BundleError: the graph is not acceptable.
        """
        self.path, self.mode, self.threads = path, mode, limit(threads)
        if path.suffix == ".onnx":
            check_external_data(path, artefact.files)
        self._core = openvino.Core()
        place = resolve(device, self._core.available_devices)
        try:
            self._model = self._core.read_model(str(path))
        except RuntimeError as error:
            raise BundleError(f"{path}: OpenVINO refuses the graph: {_line(error)}") from None
        self._inputs = {name for port in self._model.inputs for name in port.get_names()}
        if place == "AUTO":
            place = self._chosen()
        self._place, self._kind = place, place.partition(".")[0]
        self.arithmetic = ARITHMETIC[self._kind]
        if self.arithmetic != "f32" and artefact.precision == "fp32":
            raise EngineUnavailableError(
                f"OpenVINO's {self._kind} computes in {self.arithmetic} and the graph was exported in fp32; export it "
                "with --precision fp16, or ask for device='cpu'"
            )
        self.device = _spelled(place)
        self._location: dict[str, np.ndarray] = {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._compiled: dict[tuple[int, int] | None, Any] = {}
        if self._kind not in STATIC:
            self._graph(None)

    def locate(self, table: np.ndarray) -> None:
        """See `Engine`."""
        if LOCATION not in self._inputs:
            super().locate(table)
        self._location = {LOCATION: table}

    def prepare(self, height: int, width: int) -> None:
        """See `Engine`: compile the graph for this size where the device needs that."""
        self._graph((height, width) if self._kind in STATIC else None)

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        size = (frames.shape[1], frames.shape[2]) if self._kind in STATIC else None
        requests = self._requests(size)
        step = 1 if size else -(-len(frames) // len(requests))
        starts = range(0, len(frames), step)
        maps, scores = [], []
        for first in range(0, len(starts), len(requests)):
            under_way = []
            # The last round may have fewer parts than there are requests.
            for start, request in zip(starts[first : first + len(requests)], requests, strict=False):
                part = slice(start, start + step)
                given = {"frames": np.ascontiguousarray(frames[part])} | self._location
                if y is not None:
                    given["classes"] = np.ascontiguousarray(y[part])
                request.start_async(given, share_inputs=True)
                under_way.append((request, given))  # whose arrays are read until it is done
            for request, _ in under_way:
                request.wait()
                maps.append(request.get_tensor("map").data.copy())
                scores.append(request.get_tensor("score").data.copy())
        return np.concatenate(maps), np.concatenate(scores)

    @property
    def title(self) -> str:
        """See `Engine`; with the arithmetic and the mode."""
        return f"{self.name} on {self.device} ({self.arithmetic}, {self.mode})"

    @property
    def details(self) -> dict[str, Any]:
        """See `Engine`: the device's full name, precision, threads, streams, and the graph's nodes by precision."""
        found: dict[str, Any] = {
            "device": self._core.get_property(self._place, "FULL_DEVICE_NAME"),
            "precision": self.arithmetic,
            "mode": self.mode,
        }
        for graph in list(self._compiled.values())[-1:]:
            found |= {
                "execution_devices": [_spelled(name) for name in graph.get_property("EXECUTION_DEVICES")],
                "streams": self._streams(graph),
                "nodes": dict(Counter(precision for _, precision in nodes(graph))),
            }
            if self._kind == "CPU":
                found["threads"] = graph.get_property("INFERENCE_NUM_THREADS")
        return found

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"PERFORMANCE_HINT": self.mode.upper()}
        if self._kind == "CPU":
            # Two detectors, or two processes, would be pinned to the same cores.
            options["ENABLE_CPU_PINNING"] = False
            if self.threads is not None:
                options["INFERENCE_NUM_THREADS"] = self.threads
        return options | {"INFERENCE_PRECISION_HINT": self.arithmetic}

    def _chosen(self) -> str:
        """The device that AUTO takes; the graph is then compiled there, so that nothing moves to another one later."""
        able: list[str] = [
            name for name in self._core.available_devices if ARITHMETIC.get(name.partition(".")[0]) == "f32"
        ]
        if len(able) == 1:
            return able[0]
        steady = {"ENABLE_STARTUP_FALLBACK": False, "ENABLE_RUNTIME_FALLBACK": False, "INFERENCE_PRECISION_HINT": "f32"}
        graph = self._try(lambda: self._core.compile_model(self._model, f"AUTO:{','.join(able)}", steady), "auto")
        first = str(graph.get_property("EXECUTION_DEVICES")[0])
        return first.strip("()")

    def _graph(self, size: tuple[int, int] | None) -> Any:
        """The graph compiled for frames of this size, or (None) of any, after checking where and in what it runs."""
        with self._lock:
            if size not in self._compiled:
                model = self._model
                if size is not None:
                    model = model.clone()
                    shapes = {"frames": [1, *size, 3], "classes": [1]}
                    model.reshape({name: shape for name, shape in shapes.items() if name in self._inputs})
                graph = self._try(lambda: self._core.compile_model(model, self._place, self._options()), self.device)
                self._check(graph)
                self._compiled[size] = graph
            return self._compiled[size]

    def _try(self, compile: Callable[[], Any], device: str) -> Any:
        try:
            return compile()
        except RuntimeError as error:
            raise EngineUnavailableError(
                f"OpenVINO {openvino.__version__} cannot run {self.path.name} on {device}: {_line(error)}; "
                "ask for device='cpu', or use engine='onnxruntime'"
            ) from None

    def _check(self, graph: Any) -> None:
        got = [str(name) for name in graph.get_property("EXECUTION_DEVICES")]
        if [name.partition(".")[0] for name in got] != [self._kind]:
            raise EngineUnavailableError(f"asked OpenVINO for {self._place}, it would run on {', '.join(got)}")
        strays = [(kind, precision) for kind, precision in nodes(graph) if kind in HEAVY and precision in NARROW]
        if strays and self.arithmetic == "f32":
            raise EngineUnavailableError(
                f"asked OpenVINO for {self.arithmetic} on {self._place}, it would compute {strays[0][0]} in "
                f"{strays[0][1]}; use engine='onnxruntime'"
            )

    def _streams(self, graph: Any) -> int:
        return int(graph.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) if self.mode == "throughput" else 1

    def _requests(self, size: tuple[int, int] | None) -> list[Any]:
        """The calling thread's requests: one, or in the mode `throughput` one per stream."""
        if not hasattr(self._local, "requests"):
            self._local.requests = {}
        if size not in self._local.requests:
            graph = self._graph(size)
            self._local.requests[size] = [graph.create_infer_request() for _ in range(self._streams(graph))]
        found: list[Any] = self._local.requests[size]
        return found


def resolve(device: str, available: list[str]) -> str:
    """OpenVINO's name for a device in our spelling: `auto`, or a kind of `KINDS` with or without `:N`.

    Raises:
        EngineUnavailableError: no such device here, naming those that there are.
    """
    kind, _, index = device.partition(":")
    there = ", ".join(_spelled(name) for name in available) or "none"
    if device == "auto":
        return "AUTO"
    if kind not in KINDS:
        raise EngineUnavailableError(
            f"OpenVINO has no device {device!r}; {nearest(kind, (*KINDS, 'auto'))} (on this machine: {there})"
        )
    wanted = f"{kind.upper()}.{index}" if index else kind.upper()
    same = [name for name in available if name.partition(".")[0] == kind.upper()]
    if wanted in available or (same and index in ("", "0") and (not index or len(same) == 1)):
        return wanted if wanted in available else same[0]
    raise EngineUnavailableError(
        f"OpenVINO {openvino.__version__} finds no device {device!r} on this machine (it finds: {there}); "
        "install the device's driver, or ask for one of these"
    )


def nodes(graph: Any) -> list[tuple[str, str]]:
    """Type and precision of each node of a compiled graph, as far as the device tells them."""
    found = []
    for node in graph.get_runtime_model().get_ops():
        told = node.get_rt_info()
        if "layerType" in told and "runtimePrecision" in told:
            found.append((str(told["layerType"].value), str(told["runtimePrecision"].value)))
    return found


def _spelled(name: str) -> str:
    return name.lower().replace(".", ":")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
