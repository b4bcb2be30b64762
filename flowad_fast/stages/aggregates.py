"""Aggregates: how a map becomes an image score. Everything about one is its entry in `AGGREGATES`; needs no torch.

A new aggregate is a name in `Aggregate` and an entry here: pipelines, exported graphs, buffers, certificates,
calibration and commands follow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from flowad_fast.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Aggregate = Literal["max", "mean", "sum", "diff", "diff+sum", "top", "range+nll"]


@dataclass(frozen=True)
class Heat:
    """A batch of B maps, as the terms of a score are made of it.

    Attributes:
        cells: the maps before they are enlarged, (B, h*w).
        high: maximum of the enlarged map, (B,); `low` its minimum, `total` its sum.
        low: see `high`.
        total: see `high`.
        pixels: of an enlarged map.
        power: of the norm that a cell holds: 2 for a sum of squares, 1 for its root.
    """

    cells: "Tensor"
    high: "Tensor"
    low: "Tensor"
    total: "Tensor"
    pixels: int
    power: int


@dataclass(frozen=True)
class Spread:
    """What a certificate knows of n reference maps: highest, lowest and mean value (n,), sizes, and `Heat.power`."""

    high: NDArray[np.float64]
    low: NDArray[np.float64]
    mean: NDArray[np.float64]
    pixels: int
    cells: int
    power: int


@dataclass(frozen=True)
class Term:
    """One number of an image score.

    Attributes:
        of: the term (B,) of maps.
        moved: how far it can move, per map (n,) or for all, when every value of the map moves by as much as the number.
        blended: the term of the values (m,) of one map that was blended of tiles; None where it has none, since it is
            made of cells, of which two tiles have different ones at the same place.
    """

    of: "Callable[[Heat], Tensor]"
    moved: Callable[[float, Spread], NDArray[np.float64] | float]
    blended: Callable[[NDArray[np.float32]], float] | None = None


@dataclass(frozen=True)
class Rule:
    """An aggregate.

    Attributes:
        terms: its numbers. Several are scaled by ranges that were fitted on good parts (`Calibration.ranges`) and then
            added, which happens outside exported graphs.
        of_cells: whether it is taken from the cells, before the map is enlarged.
        scorers: kinds of scorers whose map it has a meaning for; None for all.
        together: whether the authors' evaluation scales the terms over all categories of a test set together; False
            for each category by itself.
    """

    terms: tuple[Term, ...]
    of_cells: bool = False
    scorers: tuple[str, ...] | None = None
    together: bool = True


def top_cells(cells: int) -> int:
    """How many cells are the highest 1 %, rounded up."""
    return -(-cells // 100)


def _norm_range(heat: Heat) -> "Tensor":
    high, low = heat.cells.amax(1), heat.cells.amin(1)
    return high.sqrt() - low.sqrt() if heat.power == 2 else high - low


def _norm_range_moved(error: float, spread: Spread) -> NDArray[np.float64] | float:
    if spread.power == 1:
        return 2 * error
    high, low = np.maximum(spread.high, 0), np.maximum(spread.low, 0)
    highest: NDArray[np.float64] = np.sqrt(high) - np.sqrt(np.maximum(high - error, 0))
    lowest: NDArray[np.float64] = np.sqrt(low + error) - np.sqrt(np.maximum(low - error, 0))
    return highest + lowest


def _half_square(heat: Heat) -> "Tensor":
    return (heat.cells if heat.power == 2 else heat.cells.square()).sum(1) / 2


def _half_square_moved(error: float, spread: Spread) -> NDArray[np.float64] | float:
    if spread.power == 2:
        return spread.cells * error / 2
    return spread.cells * error * (np.abs(spread.mean) + error / 2)


def _top(values: NDArray[np.float32]) -> float:
    count = top_cells(len(values))
    return float(np.partition(values, -count)[-count:].mean(dtype=np.float64))


_HIGH = Term(lambda heat: heat.high, lambda error, _: error, lambda values: float(values.max()))
_DIFF = Term(lambda heat: heat.high - heat.low, lambda error, _: 2 * error, lambda values: float(np.ptp(values)))
_SUM = Term(
    lambda heat: heat.total,
    lambda error, spread: spread.pixels * error,
    lambda values: float(values.sum(dtype=np.float64)),
)
_MEAN = Term(
    lambda heat: heat.total / heat.pixels, lambda error, _: error, lambda values: float(values.mean(dtype=np.float64))
)

AGGREGATES: dict[Aggregate, Rule] = {
    "max": Rule((_HIGH,)),
    "mean": Rule((_MEAN,)),
    "sum": Rule((_SUM,)),
    "diff": Rule((_DIFF,)),
    # FlowAD's code.
    "diff+sum": Rule((_DIFF, _SUM)),
    # Mean of the highest 1 % of the cells. On the demo's test cells it ranks as the highest 1 % of the pixels do, which
    # is what a map that was blended of tiles takes.
    "top": Rule(
        (
            Term(
                lambda heat: heat.cells.topk(top_cells(heat.cells.shape[1]), 1).values.mean(1),
                lambda error, _: error,
                _top,
            ),
        ),
        of_cells=True,
    ),
    # InvAD's code: range of the latent's L2 norm, and its negative log-likelihood but for a constant.
    "range+nll": Rule(
        (Term(_norm_range, _norm_range_moved), Term(_half_square, _half_square_moved)),
        of_cells=True,
        scorers=("inversion",),
        together=False,
    ),
}
"""By name."""


def terms(aggregate: Aggregate) -> int:
    """How many numbers a raw score has."""
    return len(AGGREGATES[aggregate].terms)


def columns(aggregate: Aggregate) -> tuple[int, ...]:
    """The shape of one frame's raw score: () for one number."""
    return (terms(aggregate),) if terms(aggregate) > 1 else ()


def blended(values: NDArray[np.float32], aggregate: Aggregate) -> NDArray[np.float32]:
    """The raw score, () or (k,) for k terms, of the judged values (m,) of a map that was blended of tiles."""
    found = []
    for term in AGGREGATES[aggregate].terms:
        assert term.blended is not None, "see check_blended"
        found.append(term.blended(values))
    return np.array(found[0] if len(found) == 1 else found, np.float32)


def check_blended(aggregate: Aggregate) -> None:
    """Refuse an aggregate that has no meaning for maps that are blended of tiles.

    Raises:
        ConfigError: names those that have.
    """
    if any(term.blended is None for term in AGGREGATES[aggregate].terms):
        fitting = ", ".join(name for name, rule in AGGREGATES.items() if all(term.blended for term in rule.terms))
        raise ConfigError(
            f"the aggregate {aggregate} is made of the latent at each cell, and tiles that overlap have several at one "
            f"place; choose one of {fitting}, or do without tiles"
        )


def with_ranges() -> str:
    """The names of the aggregates that need ranges of good parts, for messages."""
    return " or ".join(name for name in AGGREGATES if terms(name) > 1)


def norm_power(scorer: object) -> int:
    """`Heat.power` of a scorer's map."""
    return int(getattr(scorer, "power", 2))


def check_located(aggregate: Aggregate) -> None:
    """Refuse an aggregate that has no meaning for maps in units of location statistics.

    Raises:
        ConfigError: names those that have.
    """
    if AGGREGATES[aggregate].scorers is not None:
        fitting = ", ".join(name for name, rule in AGGREGATES.items() if rule.scorers is None)
        raise ConfigError(
            f"the aggregate {aggregate} is made of the latent itself and has no meaning with location statistics; "
            f"choose one of {fitting}, or leave location statistics out"
        )


def check_scorer(aggregate: Aggregate, kind: str) -> None:
    """Refuse an aggregate that has no meaning for the maps of a kind of scorer.

    Raises:
        ConfigError: names those that it is for.
    """
    allowed = AGGREGATES[aggregate].scorers
    if allowed is not None and kind not in allowed:
        raise ConfigError(
            f"the aggregate {aggregate} is made of the latent that {' or '.join(allowed)} gives, got the scorer "
            f"{kind}; choose that scorer, or another aggregate"
        )
