"""What is compared: the scorers and aggregates of a grid; needs no torch."""

from collections.abc import Iterable
from typing import Literal

from flowad_fast.config import VelocityConfig
from flowad_fast.errors import ConfigError
from flowad_fast.stages.aggregates import Aggregate
from flowad_fast.stages.scorers import Density, Inversion, Mismatch, Reconstruction, Scorer

Grid = Literal["quick", "full"]
QUICK: tuple[Scorer, ...] = (
    Mismatch(tau=0.3),
    Mismatch(tau=0.5),
    Mismatch(tau=0.7),
    Inversion(steps=1),
    Inversion(steps=2),
    Inversion(steps=3),
    Reconstruction(steps=4, tau=0.5),
    Density(steps=1, probes=1),
)
"""One to three evaluations. A reconstruction with a single step is the mismatch."""
MORE: tuple[Scorer, ...] = (
    Mismatch(tau=0.9),
    Mismatch(tau=0.5, draws=2),
    Mismatch(tau=0.5, draws=4),
    Inversion(steps=5),
    Reconstruction(steps=6, tau=0.5),
    Reconstruction(steps=10, tau=0.7),
    Reconstruction(steps=4, tau=0.5, start="inversion"),
    Density(steps=2, probes=1),
    Density(steps=3, probes=1),
    Density(steps=3, probes=4),
)
AGGREGATES_OF: dict[Grid, tuple[Aggregate, ...]] = {
    "quick": ("max", "top", "mean"),
    "full": ("max", "top", "mean", "diff"),
}
"""Those of one number: several need ranges, which only a calibration has. `sum` ranks as `mean` does."""


def scorers_of(grid: Grid, config: VelocityConfig) -> tuple[Scorer, ...]:
    """The scorers of a grid that a model can have, cheapest first."""
    known = _possible(QUICK if grid == "quick" else QUICK + MORE, config)
    return tuple(sorted(known, key=lambda one: one.evaluations(config)))


def _possible(scorers: Iterable[Scorer], config: VelocityConfig) -> list[Scorer]:
    found = []
    for scorer in scorers:
        try:
            scorer.schedules(config)
        except ConfigError:  # a diffusion model has the inversion alone
            continue
        found.append(scorer)
    return found
