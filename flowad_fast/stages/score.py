"""Maps to raw image scores, inside the exported graph."""

import torch
from torch import Tensor

from flowad_fast.stages.aggregates import AGGREGATES, Aggregate, Heat


def image_score(maps: Tensor, aggregate: Aggregate, cells: Tensor | None = None, power: int = 2) -> Tensor:
    """The named aggregate of maps (B, S, S): (B,), raw, or (B, n) for n terms; see `aggregates.Rule`.

    `cells` (B, h, w) are the maps before they were enlarged, None where they were not; `power` is `Heat.power`.
    """
    flat = maps.flatten(1)
    small = flat if cells is None else cells.flatten(1)
    return aggregated(Heat(small, flat.amax(1), flat.amin(1), flat.sum(1), flat.shape[1], power), aggregate)


def aggregated(heat: Heat, aggregate: Aggregate) -> Tensor:
    """The named aggregate of B maps: (B,), raw, or (B, n) for n terms."""
    values = [term.of(heat) for term in AGGREGATES[aggregate].terms]
    return values[0] if len(values) == 1 else torch.stack(values, 1)
