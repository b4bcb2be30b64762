"""Tensors into a velocity field: all of them, or an error."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flowad_fast.checkpoints.reading import some
from flowad_fast.config import VelocityConfig
from flowad_fast.errors import CheckpointError
from flowad_fast.stages.velocity import DiT

_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def filled(config: VelocityConfig, tensors: Mapping[str, Tensor], source: str) -> DiT:
    """A DiT, float32, with these weights under their plain names.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen or not finite; names the first few.
    """
    with torch.device("meta"):
        dit = DiT(config)
    wanted = dit.state_dict()
    missing = [key for key in wanted if key not in tensors]
    extra = [key for key in tensors if key not in wanted]
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    named = (("missing", missing), ("unexpected", extra), ("wrong shapes", shapes))
    problems = [f"{name}: {some(keys)}" for name, keys in named if keys]
    if problems:
        raise CheckpointError(
            f"{source}: does not match its configuration; {'; '.join(problems)}. Is it the right one?"
        )
    numbers = [f"{key} is {value.dtype}" for key, value in tensors.items() if value.dtype not in _NUMBERS]
    if numbers:
        raise CheckpointError(
            f"{source}: expected weights in float32, float16, bfloat16 or float64, got {some(numbers)}; "
            "give the weights from before their quantisation"
        )
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(
            f"{source}: NaN or infinite weights in {some(broken)}; the training diverged, or "
            "they did not fit their number type: take an earlier one, or float32 weights"
        )
    dit.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    return dit
