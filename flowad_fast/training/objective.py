"""What a training step asks of the network: at which times, for what prediction, measured as what."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowad_fast.config import Target
from flowad_fast.training.config import TrainConfig


def draw_times(config: TrainConfig, batch: int, generator: torch.Generator) -> Tensor:
    """Times t (batch,) on the generator's device: uniform, logistic-normal, or of a grid of `train_steps`."""
    device = generator.device
    if config.t_sampling == "logistic":
        normal = torch.randn(batch, generator=generator, device=device)
        return torch.sigmoid(normal * config.t_sigma + config.t_mu)
    if config.train_steps is not None:
        grid = torch.linspace(0, 1, config.train_steps, device=device)
        return grid[torch.randint(config.train_steps, (batch,), generator=generator, device=device)]
    return torch.rand(batch, generator=generator, device=device)


def drop_classes(y: Tensor, probability: float, classes: int, generator: torch.Generator) -> Tensor:
    """Class indices (B,), each replaced with this probability by the row that stands for none."""
    dropped = torch.rand(len(y), generator=generator, device=generator.device) < probability
    return torch.where(dropped, classes, y)


def flow_loss(out: Tensor, x0: Tensor, x1: Tensor, t: Tensor, predict: Target, loss: Target, eps: float) -> Tensor:
    """Mean squared error of a network's output, as velocity, data or noise.

    Args:
        out: (B, N, C), what the network gives at x_t = t x1 + (1 - t) x0; it is meant as `predict`.
        x0: noise, (B, N, C).
        x1: data, (B, N, C).
        t: times (B,).
        predict: what the network's output stands for.
        loss: what it is converted to and compared with.
        eps: smallest denominator of a conversion.
    """
    target = {"velocity": x1 - x0, "data": x1, "noise": x0}[loss]
    if predict == loss:
        return F.mse_loss(out, target)
    t = t[:, None, None]
    x = t * x1 + (1 - t) * x0
    to_data, to_noise = (1 - t).clamp_min(eps), t.clamp_min(eps)
    converted = {
        ("data", "velocity"): lambda: (out - x) / to_data,
        ("noise", "velocity"): lambda: (x - out) / to_noise,
        ("velocity", "data"): lambda: x + (1 - t) * out,
        ("noise", "data"): lambda: (x - (1 - t) * out) / to_noise,
        ("velocity", "noise"): lambda: x - t * out,
        ("data", "noise"): lambda: (x - t * out) / to_data,
    }[predict, loss]()
    return F.mse_loss(converted, target)
