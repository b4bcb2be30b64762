"""Frames to map and raw score as one module: what the eager engine runs and what every exporter traces."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from flowad_fast.model import FlowModel
from flowad_fast.stages import location
from flowad_fast.stages.aggregates import Aggregate, Heat, check_located, check_scorer, norm_power
from flowad_fast.stages.arithmetic import FP32, NUMBERS, Arithmetic
from flowad_fast.stages.fused_backbone import with_fused_backbone
from flowad_fast.stages.image import normalise
from flowad_fast.stages.integration import StepField
from flowad_fast.stages.score import aggregated
from flowad_fast.stages.scorers import Scorer


class ScoringPipeline(nn.Module):
    """Frames (B, H, W, 3) uint8 and class indices (B,) to map (B, S, S) and raw score (B,), float32.

    S is the model's image size. The raw score is (B, n) for an aggregate of n > 1 terms, see `aggregates.Rule`.
    `how` is the arithmetic of the velocity field and the loop; the map and the score are float32, and so is the
    backbone but for `with_fused_backbone`.
    `located` puts the map in units of location statistics before it is enlarged, see `locate`.
    """

    location: Tensor | None

    def __init__(
        self,
        model: FlowModel,
        scorer: Scorer,
        aggregate: Aggregate = "max",
        how: Arithmetic = FP32,
        located: bool = False,
    ) -> None:
        super().__init__()
        check_scorer(aggregate, scorer.kind)
        if located:
            check_located(aggregate)
        self.image = model.spec.image
        self.grid = (model.config.height, model.config.width)
        self.conditional = model.config.use_class_labels
        self.backbone = model.backbone
        self.scorer = scorer.prepare(model, how)
        self.aggregate, self.power = aggregate, norm_power(scorer)
        self.precision, self.ops = how.precision, how.ops
        table = torch.from_numpy(location.identity(model.spec.classes.rows, *self.grid)) if located else None
        self.register_buffer("location", table, persistent=False)

    @property
    def arithmetic(self) -> str:
        """Precision and operators for people, e.g. " (bf16, fused)"; "" for float32 with plain torch operators."""
        ops = self.ops.__name__.rpartition(".")[2]
        return "" if (self.precision, ops) == ("fp32", "reference") else f" ({self.precision}, {ops})"

    @property
    def velocity(self) -> StepField:
        """The velocity field at the scorer's times."""
        return self.scorer.field

    def locate(self, table: np.ndarray) -> "ScoringPipeline":
        """Take location statistics, a table (classes, 2, h, w) of `stages.location`, in place of those it has."""
        assert self.location is not None and self.location.shape == table.shape, "made with located=True"
        self.location = torch.from_numpy(np.array(table)).to(self.location)
        return self

    def forward(self, frames: Tensor, y: Tensor | None = None, location: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See the class; `location` (classes, 2, h, w) is in place of the pipeline's own statistics."""
        cells = self.cells(frames, y)
        table = self.location if location is None else location
        if table is not None:
            cells = located(cells, table, y)
        grid: Tensor = cells.unflatten(1, self.grid)  # type: ignore[no-untyped-call]
        maps, high, low, total = self.ops.upsample_score(grid, self.image.size)
        heat = Heat(cells, high, low, total, self.image.size**2, self.power)
        return maps, aggregated(heat, self.aggregate)

    def cells(self, frames: Tensor, y: Tensor | None = None) -> Tensor:
        """The map before it is enlarged, (B, N)."""
        cells: Tensor = self.scorer(self.backbone(normalise(frames, self.image), self.ops), y)
        return cells

    def with_fused_backbone(self) -> "ScoringPipeline":
        """The pipeline with its backbone on its operators, where its precision lets features be of a half type.

        Everything else is shared, and this one stays as it is; so do backbones that have no such form.
        """
        dtype = NUMBERS[self.precision].features
        if dtype == torch.float32:
            return self
        fused = copy.copy(self)
        fused._modules = self._modules | {"backbone": with_fused_backbone(self.backbone, self.ops, dtype)}
        return fused

    def on(self, device: torch.device) -> "ScoringPipeline":
        """The pipeline on a device, for inference; the model that it was made of stays where it is."""
        if all(tensor.device == device for tensor in self.state_dict().values()):
            return self.eval()
        return copy.deepcopy(self, {id(self.ops): self.ops}).to(device).eval()


def located(cells: Tensor, table: Tensor, y: Tensor | None) -> Tensor:
    """Maps (B, N) in units of what good parts of their classes y (B,) have at each cell, see `stages.location`."""
    factor, summand = (table[:1] if y is None else table[y]).flatten(2).unbind(1)
    return torch.addcmul(summand, cells, factor)
