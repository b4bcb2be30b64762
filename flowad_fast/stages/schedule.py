"""Stage 4: a schedule is a list of rows (t, a, b); one step of any served model is x' = a x + b f(x, t, y).

f is the network's raw output, so what the network was trained to predict (`pred_type`) is folded into a and b.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from flowad_fast.config import VelocityConfig
from flowad_fast.errors import ConfigError

EPS = 0.05
"""Smallest denominator when a data or noise prediction is converted to a velocity."""


@dataclass(frozen=True)
class Row:
    """One function evaluation: time fed to the field, factor of the state, factor of the network's output."""

    t: float
    a: float
    b: float


def velocity_factors(pred_type: str, t: float) -> tuple[float, float]:
    """(alpha, beta) with velocity = alpha x + beta f(x, t) for a network that predicts `pred_type`."""
    if pred_type == "velocity":
        return 0.0, 1.0
    if pred_type == "data":
        d = max(1 - t, EPS)
        return -1 / d, 1 / d
    if pred_type == "noise":
        d = max(t, EPS)
        return 1 / d, -1 / d
    raise ConfigError(f"pred_type {pred_type!r} has no velocity; expected velocity, data or noise")


def flow(config: VelocityConfig, steps: int, start: float, stop: float) -> tuple[Row, ...]:
    """Fixed-grid Euler from t = start to t = stop, `steps` per unit time, field evaluated at the start of each step.

    Where 1/steps divides the interval, the steps have that size. Elsewhere `config.step_grid` decides: `equal` takes
    n = round(|stop - start| * steps) equal ones; `short-last` steps of 1/steps and what is left as the last, as the
    solver of the paper's code does.

    Raises:
        ConfigError: not even one step.
    """
    span = abs(stop - start) * steps
    short_last = config.step_grid == "short-last"
    count = math.ceil(span - 1e-6) if short_last else round(span)
    if count < 1:
        raise ConfigError(f"no step from t = {start} to {stop} with {steps} steps per unit time; raise steps")
    size = math.copysign(1 / steps, stop - start) if short_last else (stop - start) / count
    rows = []
    for k in range(count):
        t = start + k * size
        dt = stop - t if short_last and k == count - 1 else size
        alpha, beta = velocity_factors(config.pred_type, t)
        rows.append(Row(t, 1 + dt * alpha, dt * beta))
    return tuple(rows)


def invad(steps: int) -> tuple[Row, ...]:
    """InvAD's inversion: `steps` DDIM steps from data to noise, linear betas 1e-4..0.02 over 1000 timesteps.

    t is the integer timestep; after the last step the signal fraction is 0.
    """
    if steps < 2:
        raise ConfigError(f"InvAD's grid needs at least 2 steps, got {steps}")
    alpha_bar, product = [], 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        alpha_bar.append(product)
    times = [round(j * 999 / (steps - 1)) for j in range(steps)]
    levels = [alpha_bar[t] for t in times] + [0.0]
    return tuple(
        Row(float(t), math.sqrt(up / here), math.sqrt(1 - up) - math.sqrt(up * (1 - here) / here))
        for t, (here, up) in zip(times, pairwise(levels), strict=True)
    )


def inversion(config: VelocityConfig, steps: int) -> tuple[Row, ...]:
    """Data to noise: flow matching from t = 1 to 0, or InvAD's grid for a model that predicts epsilon."""
    return invad(steps) if config.pred_type == "epsilon" else flow(config, steps, 1.0, 0.0)
