"""The reference path: the cost model of the paper's code, kept as the baseline of every speed-up and for comparison.

Eager fp32; adaLN is computed at every evaluation; the density's divergence is z.(J^T z) by reverse mode. Nothing in the
product calls it.
"""

from torch import Tensor

from flowad_fast.model import VelocityModel
from flowad_fast.stages.integration import to_tokens
from flowad_fast.stages.maps import MAPS
from flowad_fast.stages.scorers import Scorer


def reference_map(model: VelocityModel, scorer: Scorer, x1: Tensor, y: Tensor | None = None) -> Tensor:
    """The anomaly map (B, h, w) of x1 (B, C, h, w), at the reference's cost.

    It equals the scorer's own map to rounding, but for density, see `maps.DensityMap.reference`.
    """
    y = model.check_classes(y, x1.shape[0])
    return MAPS[scorer.kind].reference(scorer, model, to_tokens(x1), y).unflatten(1, tuple(x1.shape[2:]))
