"""The exported boundary: frames (B, H, W, 3) uint8 in; `map` (B, S, S) and raw `score` out, float32.

Everything that decides a score is inside: resize, normalisation, backbone, loop, map, upsampling, aggregate. The class
index `classes` (B,) int64 is a second input of conditional models, location statistics (classes, 2, h, w) the last one
of bundles that have some. Thresholds stay outside, in the manifest.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from flowad_fast.bundle import LOCATION
from flowad_fast.export.formats import Request
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.arithmetic import Arithmetic

OUTPUTS = ("map", "score")


@dataclass(frozen=True)
class Boundary:
    """A pipeline with example inputs and the names and dynamic axes of the exported graph."""

    module: ScoringPipeline
    inputs: tuple[str, ...]
    example: tuple[Tensor | None, ...]
    dynamic_shapes: tuple[Any, ...]
    outputs: tuple[str, ...] = OUTPUTS

    def trace(self) -> ExportedProgram:
        """The module as an ATen graph with symbolic batch (and frame size)."""
        with torch.no_grad():
            return torch.export.export(self.module, self.example, dynamic_shapes=self.dynamic_shapes)


def boundary(request: Request, constant_location: bool = False) -> Boundary:
    """The exported boundary of a model with a scorer; without a frame size it accepts frames of any.

    Location statistics are its last input, unless they are to be constants.
    """
    model, table = request.model, request.location
    how = Arithmetic(request.precision)
    pipeline = ScoringPipeline(model, request.scorer, request.aggregate, how, located=table is not None).eval()
    if table is not None:
        pipeline.locate(table)
    height, width = request.frame_size or (300, 280)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
    batch = Dim("batch", min=1, max=4096)
    axes: dict[int, Any] = {0: batch}
    if request.frame_size is None:
        axes |= {1: Dim("height", min=16, max=16384), 2: Dim("width", min=16, max=16384)}
    inputs: tuple[str, ...] = ("frames",)
    example: tuple[Tensor | None, ...] = (frames,)
    shapes: tuple[Any, ...] = (axes,)
    if model.config.use_class_labels:
        inputs, example, shapes = (
            (*inputs, "classes"),
            (*example, torch.arange(2) % model.config.num_classes),
            (axes, {0: batch}),
        )
    if table is not None and not constant_location:
        missing = () if model.config.use_class_labels else (None,)
        inputs, example = (*inputs, LOCATION), (*example, *missing, torch.from_numpy(table))
        shapes = (*shapes, *missing, {})
    return Boundary(pipeline, inputs, example, shapes)
