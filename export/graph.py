"""The exported boundary: frames (B, H, W, 3) uint8 in; `map` (B, S, S) and raw `score` out, float32.

Everything that decides a score is inside: resize, normalisation, backbone, loop, map, upsampling, aggregate. The class
index `classes` (B,) int64 is a second input of conditional models. Thresholds stay outside, in the manifest.

The step boundary is one evaluation of the velocity field, for engines whose loop runs outside: the state `tokens` and
the step's `rows` of the modulation table in, `velocity` out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from flowad_fast.config import Precision
from flowad_fast.decision import Aggregate
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.scorers import Scorer
from flowad_fast.velocity import TabledDiT

OUTPUTS = ("map", "score")
STEP_INPUTS, STEP_OUTPUTS = ("tokens", "rows"), ("velocity",)


@dataclass(frozen=True)
class Boundary:
    """A module with example inputs and the names and dynamic axes of the exported graph."""

    module: nn.Module
    inputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    dynamic_shapes: tuple[Any, ...]
    outputs: tuple[str, ...] = OUTPUTS

    def trace(self) -> ExportedProgram:
        """The module as an ATen graph with symbolic batch (and frame size)."""
        with torch.no_grad():
            return torch.export.export(self.module, self.example, dynamic_shapes=self.dynamic_shapes)


def boundary(
    model: FlowModel,
    scorer: Scorer,
    aggregate: Aggregate,
    frame_size: tuple[int, int] | None = None,
    precision: Precision = "fp32",
) -> Boundary:
    """The exported boundary of a model with a scorer; `frame_size` None accepts frames of any size."""
    pipeline = ScoringPipeline(model, scorer, aggregate, precision).eval()
    height, width = frame_size or (300, 280)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
    batch = Dim("batch", min=1, max=4096)
    axes: dict[int, Any] = {0: batch}
    if frame_size is None:
        axes |= {1: Dim("height", min=16, max=16384), 2: Dim("width", min=16, max=16384)}
    if not model.config.use_class_labels:
        return Boundary(pipeline, ("frames",), (frames,), (axes,))
    classes = torch.arange(2) % model.config.num_classes
    return Boundary(pipeline, ("frames", "classes"), (frames, classes), (axes, {0: batch}))


class StepModule(nn.Module):
    """One evaluation of a field: tokens (B, h*w, C) and a step's rows (R, 6 depth + 2, D) to (B, h*w, C), float32.

    R is 1 for unconditional models (one row serves the batch), otherwise B. `rows` makes them.
    """

    def __init__(self, field: TabledDiT) -> None:
        super().__init__()
        self.field = field

    def forward(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """See the class."""
        table = rows[:, :-2].unflatten(1, (-1, 6)).unsqueeze(-2)
        return self.field.modulated(tokens, table, rows[:, -2:].unsqueeze(-2))

    def rows(self, step: int, y: Tensor | None = None) -> Tensor:
        """The rows of step `step` for class indices y (B,) or None."""
        table, final = (part.squeeze(-2) for part in self.field.modulations(step, y))
        return torch.cat([table.flatten(1, 2), final], 1)


def step_boundary(model: FlowModel, times: tuple[float, ...], precision: Precision = "fp32") -> Boundary:
    """One evaluation of the model's field at any of `times`; `Boundary.module` is the `StepModule` with the rows."""
    step = StepModule(model.at(times, precision)).eval()
    config = model.config
    y = torch.arange(2) % config.num_classes if config.use_class_labels else None
    batch = Dim("batch", min=1, max=4096)
    tokens = torch.randn(2, config.height * config.width, config.channels, generator=torch.Generator().manual_seed(0))
    row_axes: dict[int, Any] = {0: batch} if config.use_class_labels else {}
    return Boundary(step, STEP_INPUTS, (tokens, step.rows(0, y)), ({0: batch}, row_axes), STEP_OUTPUTS)
