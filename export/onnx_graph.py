"""The scoring pipeline as ONNX, checked by ONNX's own checker and shape inference."""

import logging
import warnings
from pathlib import Path

import onnx
import torch

from flowad_fast.decision import Aggregate
from flowad_fast.errors import ConfigError
from flowad_fast.export.graph import OUTPUTS, boundary
from flowad_fast.model import FlowModel
from flowad_fast.scorers import Scorer

OPSET = 20
"""Default opset: accepted by ONNX Runtime since 1.17 and TensorRT since 10.1."""
INLINE_BYTES = 1_500_000_000
"""Weights above this go to one external file, since protobuf ends at 2 GB."""


def write(
    path: Path,
    model: FlowModel,
    scorer: Scorer,
    aggregate: Aggregate,
    frame_size: tuple[int, int] | None = None,
    opset: int = OPSET,
) -> int:
    """Write `path`; returns the number of nodes.

    Raises:
        ConfigError: an opset that the exporter does not write.
    """
    if not 18 <= opset <= 25:
        raise ConfigError(f"opset {opset} is not supported; expected 18 to 25")
    edge = boundary(model, scorer, aggregate, frame_size)
    # The exporter logs and warns about its own internals; what matters to the user is checked below.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            edge.trace(),
            dynamo=True,
            input_names=list(edge.inputs),
            output_names=list(OUTPUTS),
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    size = sum(tensor.nbytes for tensor in edge.pipeline.state_dict().values())
    program.save(str(path), external_data=size > INLINE_BYTES)
    # By path, so that models above 2 GB are checked too.
    onnx.checker.check_model(str(path), full_check=True)
    return len(program.model.graph)
