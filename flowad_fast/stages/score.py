"""Maps to raw image scores, inside the exported graph."""

import torch
from torch import Tensor

from flowad_fast.stages.decision import Aggregate


def image_score(maps: Tensor, aggregate: Aggregate) -> Tensor:
    """The named aggregate of upsampled maps (B, S, S): (B,), raw, or (B, 2); see `aggregated`."""
    flat = maps.flatten(1)
    return aggregated(flat.amax(1), flat.amin(1), flat.sum(1), flat.shape[1], aggregate)


def aggregated(high: Tensor, low: Tensor, total: Tensor, pixels: int, aggregate: Aggregate) -> Tensor:
    """The named aggregate from each map's maximum, minimum and sum (B,) over its `pixels`: (B,), raw.

    `diff` is max - min. `diff+sum` gives its two terms, (B, 2): they are scaled by ranges that were fitted on good
    parts (`Calibration.ranges`) before they are added, which happens outside exported graphs.
    """
    if aggregate == "max":
        return high
    if aggregate == "mean":
        return total / pixels
    if aggregate == "sum":
        return total
    return high - low if aggregate == "diff" else torch.stack([high - low, total], 1)
