"""The eager torch engine: the scoring pipeline as it is, on CPU or GPU."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowad_fast.engines import Engine
from flowad_fast.engines.attention import choose_attention
from flowad_fast.engines.cores import bind_torch
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.memory import BatchLimit
from flowad_fast.engines.precision import arithmetic, check_precision
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.arithmetic import NUMBERS
from flowad_fast.stages.features import fold_batch_norms
from flowad_fast.stages.linear import can_pack, pack


class EagerEngine(Engine):
    """Runs a `ScoringPipeline`; safe from many threads, since the pipeline holds no state.

    A batch that does not fit in GPU memory is split, see `BatchLimit`. `attention` is the backend that runs: on a GPU
    the fastest, measured here unless a stored choice is given. On an x86 CPU the float32 weights are packed, a copy,
    and the backbone's batch norms are folded into its convolutions.
    """

    name = "eager"
    on_tensors = True
    takes_threads = True

    def __init__(
        self,
        pipeline: ScoringPipeline,
        device: str = "auto",
        attention: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._threads = threads
        bind_torch(threads)
        self._device = torch_device(device)
        check_precision(pipeline.precision, self._device)
        self.device = str(self._device)
        self.pipeline = pipeline.on(self._device)
        if self._device.type == "cpu" and pipeline.precision == "fp32" and can_pack():
            self.pipeline = pack(self.pipeline, keep=(pipeline.ops,))
            fold_batch_norms(self.pipeline.backbone)
        self._limit = BatchLimit()
        dtype = NUMBERS[pipeline.precision].dtype
        field = pipeline.velocity
        self.attention = choose_attention(
            field.config, dtype, self._device, stored=attention, quantised=field.quantises_attention
        )

    @property
    def title(self) -> str:
        """See `Engine`, with precision and operators."""
        return super().title + self.pipeline.arithmetic

    @property
    def details(self) -> dict[str, Any]:
        """See `Detector.details`."""
        return {
            "attention": self.attention.backend,
            "attention_ms": self.attention.milliseconds,
            "attention_errors": self.attention.shown_errors,
        }

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        return self._limit.run(self._run, frames, y)

    def _run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        classes = None if y is None else torch.from_numpy(y).to(self._device)
        maps, scores = self.on_device(torch.from_numpy(frames).to(self._device), classes)
        return maps.cpu().numpy(), scores.cpu().numpy()

    def on_device(self, frames: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `run`, on tensors of the engine's device; a batch that does not fit is an error here."""
        bind_torch(self._threads)
        with torch.inference_mode(), arithmetic(self.pipeline.precision, self._device), self.attention.active():
            return self.pipeline(frames, y)
