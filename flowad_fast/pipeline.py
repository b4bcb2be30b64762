"""Frames to map and raw score as one module: what the eager engine runs and what every exporter traces."""

import copy
from types import ModuleType

import torch
from torch import Tensor, nn

from flowad_fast.config import Precision
from flowad_fast.decision import Aggregate, aggregated
from flowad_fast.image import normalise
from flowad_fast.integration import StepField
from flowad_fast.kernels import reference
from flowad_fast.model import FlowModel
from flowad_fast.scorers import PROBE_BYTES, Scorer


class ScoringPipeline(nn.Module):
    """Frames (B, H, W, 3) uint8 and class indices (B,) to map (B, S, S) and raw score (B,), float32.

    S is the model's image size. The raw score is (B, 2) for the aggregate `diff+sum`, see `decision.aggregated`.
    `precision` is that of the velocity field's matrix products, `ops` the namespace of operators, and `probe_bytes` the
    memory that one chunk of density probes may take; the backbone, the map and the score are float32.
    """

    def __init__(
        self,
        model: FlowModel,
        scorer: Scorer,
        aggregate: Aggregate = "max",
        precision: Precision = "fp32",
        ops: ModuleType = reference,
        probe_bytes: int = PROBE_BYTES,
    ) -> None:
        super().__init__()
        self.image = model.spec.image
        self.grid = (model.config.height, model.config.width)
        self.conditional = model.config.use_class_labels
        self.backbone = model.backbone
        self.scorer = scorer.prepare(model, precision, ops, probe_bytes)
        self.aggregate, self.precision, self.ops = aggregate, precision, ops

    @property
    def velocity(self) -> StepField:
        """The velocity field at the scorer's times."""
        return self.scorer.field

    def forward(self, frames: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class."""
        images = normalise(frames, self.image)
        x1 = self.backbone(images, self.ops)
        cells = self.scorer(x1, y).unflatten(1, self.grid)
        maps, high, low, total = self.ops.upsample_score(cells, self.image.size)
        return maps, aggregated(high, low, total, self.image.size**2, self.aggregate)

    def on(self, device: torch.device) -> "ScoringPipeline":
        """The pipeline on a device, for inference; the model that it was made of stays where it is."""
        if all(tensor.device == device for tensor in self.state_dict().values()):
            return self.eval()
        return copy.deepcopy(self, {id(self.ops): self.ops}).to(device).eval()
