"""Frames to map and raw score as one module: what the eager engine runs and what every exporter traces."""

from torch import Tensor, nn

from flowad_fast.decision import Aggregate, image_score
from flowad_fast.image import normalise
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.scorers import Scorer


class ScoringPipeline(nn.Module):
    """Frames (B, H, W, 3) uint8 and class indices (B,) to map (B, S, S) and raw score (B,), float32.

    S is the model's image size. The raw score is (B, 2) for the aggregate `diff+sum`, see `decision.image_score`.
    """

    def __init__(self, model: FlowModel, scorer: Scorer, aggregate: Aggregate = "max") -> None:
        super().__init__()
        self.image = model.spec.image
        self.grid = (model.config.height, model.config.width)
        self.backbone = model.backbone
        self.scorer = scorer.prepare(model)
        self.aggregate = aggregate

    def forward(self, frames: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class."""
        images = normalise(frames, self.image)
        x1 = self.backbone(images)
        cells = self.scorer(x1, y).unflatten(1, self.grid)
        maps = ops.upsample(cells, self.image.size)
        return maps, image_score(maps, self.aggregate)
