"""The eager torch engine: the scoring pipeline as it is, on CPU or GPU."""

import numpy as np
import torch
from torch import Tensor

from flowad_fast.attention import choose_attention
from flowad_fast.engines.memory import BatchLimit
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.linear import DTYPES, can_pack, pack
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.precision import arithmetic, check_precision


def torch_device(device: str) -> torch.device:
    """`auto` (CUDA where there is one, otherwise CPU), `cpu`, `cuda` or `cuda:N` as a device.

    Raises:
        EngineUnavailableError: a GPU was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise EngineUnavailableError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise EngineUnavailableError(f"device {device!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailableError(
            f"device {device!r} was asked for, but torch {torch.__version__} finds no usable GPU or driver; "
            "check nvidia-smi, or ask for device='cpu'"
        )
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen


class EagerEngine:
    """Runs a `ScoringPipeline`; safe from many threads, since the pipeline holds no state.

    A batch that does not fit in GPU memory is split, see `BatchLimit`. `attention` is the backend that runs: on a GPU
    the fastest, measured here unless a stored choice is given. On an x86 CPU the float32 weights are packed, a copy.
    """

    name = "eager"

    def __init__(self, pipeline: ScoringPipeline, device: str = "auto", attention: str | None = None) -> None:
        self._device = torch_device(device)
        check_precision(pipeline.precision, self._device)
        self.device = str(self._device)
        self.pipeline = pipeline.on(self._device)
        if self._device.type == "cpu" and pipeline.precision == "fp32" and can_pack():
            self.pipeline = pack(self.pipeline, keep=(pipeline.ops,))
        self._limit = BatchLimit()
        dtype = DTYPES[pipeline.precision]
        self.attention = choose_attention(pipeline.velocity.config, dtype, self._device, stored=attention)

    @property
    def details(self) -> dict[str, object]:
        """See `Detector.details`."""
        return {"attention": self.attention.backend, "attention_ms": self.attention.milliseconds}

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        return self._limit.run(self._run, frames, y)

    def _run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        classes = None if y is None else torch.from_numpy(y).to(self._device)
        maps, scores = self.on_device(torch.from_numpy(frames).to(self._device), classes)
        return maps.cpu().numpy(), scores.cpu().numpy()

    def on_device(self, frames: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `run`, on tensors of the engine's device; a batch that does not fit is an error here."""
        with torch.inference_mode(), arithmetic(self.pipeline.precision, self._device), self.attention.active():
            return self.pipeline(frames, y)
