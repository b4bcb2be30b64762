"""The ONNX Runtime engine: the exported graph, on exactly the execution provider that was asked for."""

from pathlib import Path

import numpy as np

from flowad_fast.errors import BundleError, EngineUnavailableError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeEngine:
    """Runs `model.onnx` of a bundle; safe from many threads (a session's run is)."""

    name = "onnxruntime"

    def __init__(self, path: Path, device: str = "auto", threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise EngineUnavailableError(
                "the onnxruntime engine needs the package onnxruntime (or onnxruntime-gpu): pip install onnxruntime"
            ) from None
        kind, _, index = device.partition(":")
        available = onnxruntime.get_available_providers()
        if kind == "auto":
            kind = "cuda" if PROVIDERS["cuda"] in available else "cpu"
        provider = PROVIDERS.get(kind)
        if provider is None or provider not in available:
            raise EngineUnavailableError(
                f"ONNX Runtime {onnxruntime.__version__} has no provider for device {device!r} "
                f"(it has {', '.join(available)}); install onnxruntime-gpu, or ask for device='cpu'"
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        chosen = (provider, {"device_id": index}) if index else provider
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=[chosen])
        except (RuntimeError, ValueError) as error:
            raise BundleError(f"{path}: ONNX Runtime refuses the graph: {' '.join(str(error).split())[:300]}") from None
        got = self.session.get_providers()
        if provider not in got:
            raise EngineUnavailableError(f"asked ONNX Runtime for {provider}, it chose {', '.join(got)}")
        self.device = device if index else kind
        self.inputs = [node.name for node in self.session.get_inputs()]

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        feed = {"frames": frames} if y is None else {"frames": frames, "classes": y}
        maps, scores = self.session.run(["map", "score"], feed)
        return maps, scores
