"""The reference path: the cost model of the paper's code, kept as the baseline of every speed-up and for comparison.

Eager fp32; adaLN is computed at every step; the density's divergence is z.(J^T z) by reverse mode, with the input
repeated once a probe and the autograd graph kept along the whole trajectory. Nothing in the product calls it.
"""

import torch
from torch import Tensor

from flowad_fast.integration import to_tokens
from flowad_fast.model import VelocityModel
from flowad_fast.schedule import Row
from flowad_fast.scorers import Density, Inversion, Reconstruction, Scorer


def reference_map(model: VelocityModel, scorer: Scorer, x1: Tensor, y: Tensor | None = None) -> Tensor:
    """The anomaly map (B, h, w) of x1 (B, C, h, w), at the reference's cost.

    Inversion and reconstruction equal the scorer's own map to rounding. Density has the same expectation over probes,
    and for each probe the same total over locations.
    """
    y = model.check_classes(y, x1.shape[0])
    x = to_tokens(x1)
    if isinstance(scorer, Inversion):
        with torch.no_grad():
            square = _integrate(model, scorer.rows(model.config), x, y).square().sum(-1)
        maps = square if scorer.power == 2 else square.sqrt()
    elif isinstance(scorer, Reconstruction):
        down, up = scorer.rows(model.config)
        with torch.no_grad():
            start = (
                _integrate(model, down, x, y)
                if down
                else scorer.tau * x + (1 - scorer.tau) * scorer.draw(model.config).to(x.device)
            )
            maps = (x - _integrate(model, up, start, y)).square().sum(-1)
    else:
        maps = _density(model, scorer, x, y)
    return maps.unflatten(1, tuple(x1.shape[2:]))


def _integrate(model: VelocityModel, rows: tuple[Row, ...], x: Tensor, y: Tensor | None) -> Tensor:
    for row in rows:
        x = row.a * x + row.b * model.dit(x, torch.full(x.shape[:1], row.t, device=x.device), y)
    return x


def _density(model: VelocityModel, scorer: Density, x: Tensor, y: Tensor | None) -> Tensor:
    probes = scorer.draw(model.config).to(x.device)
    count, batch = len(probes), x.shape[0]
    z = probes.expand(-1, batch, -1, -1).flatten(0, 1)
    y_repeated = None if y is None else y.repeat(count)
    x = x.detach().requires_grad_()
    total = torch.zeros(count, *x.shape[:2], device=x.device)
    for row in scorer.rows(model.config):
        repeated = x.repeat(count, 1, 1)
        out = model.dit(repeated, torch.full((count * batch,), row.t, device=x.device), y_repeated)
        (pulled,) = torch.autograd.grad((out * z).sum(), repeated, retain_graph=True)
        share = row.b * (z * pulled).sum(-1) + (row.a - 1) * z.square().sum(-1)
        total = total + share.unflatten(0, (count, batch)).detach()
        x = row.a * x + row.b * out[:batch]
    x = x.detach()
    gauss = -0.5 * (x.square() + torch.log(torch.tensor(2 * torch.pi))).sum(-1)
    return -(gauss + (total.sum(0) if scorer.exact else total.mean(0)))
