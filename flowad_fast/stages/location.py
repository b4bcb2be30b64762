"""Location statistics: what the map of a good part is like at each of its cells; numpy only.

A map is often brighter at some places of every good part (an edge, a screw hole). Its cells are put in units of what
good parts have there, (map - mean) / std, before the map is enlarged: one multiplication and one addition per cell.
They are not part of the paper.

How far the mean and the std of a cell are believed, rather than those of the whole map, is decided by good parts that
they were not fitted on: the smallest weights under which held-out maps are as likely as they can be. For parts without
a fixed pose the places say nothing about a new part, the weights go to zero, and what is left is one scale for the
whole map, which changes no ranking.

The parts that they are fitted on must not be those that a threshold is fitted on: a part's map is closer to a mean that
it took part in than a new part's, and the false-reject rate would be above what was promised.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowad_fast.errors import CalibrationError

MIN_PARTS = 12
"""Good parts of a class below which its map stays as it is."""
WEIGHTS = tuple(i / 8 for i in range(9))
"""The weights that are tried, for the mean and for the std."""
FOLDS = 4
FREEDOM = 4
"""Degrees of freedom of the distribution that held-out cells are judged by."""


@dataclass(frozen=True)
class LocationStatistics:
    """Mean and std of the cells of a map over good parts, by class index, shrunk towards those of the whole map.

    Example:
        >>> import numpy as np
        >>> maps = np.random.default_rng(0).normal([[1.0, 5.0]], 1.0, (200, 1, 2)).astype(np.float32)
        >>> fitted = LocationStatistics.fit(maps)
        >>> fitted.table.shape, fitted.parts
        ((1, 2, 1, 2), (200,))
        >>> abs(float(fitted.apply(maps).mean())) < 0.1
        True

    Attributes:
        mean, std: (classes, h, w) float32, what is subtracted and divided by.
        parts: good parts of each class; a class with fewer than `MIN_PARTS` has mean 0 and std 1.
        mean_weight, std_weight: of each class, how far a cell is believed, 0 (the whole map) to 1 (the cell alone).
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    parts: tuple[int, ...]
    mean_weight: tuple[float, ...]
    std_weight: tuple[float, ...]

    @classmethod
    def fit(
        cls,
        maps: NDArray[np.floating],
        labels: "Sequence[int] | NDArray[np.int64] | None" = None,
        classes: int = 1,
        seed: int = 0,
    ) -> "LocationStatistics":
        """Fit to maps of good parts.

        Args:
            maps: (n, h, w), before they are enlarged.
            labels: class index of each part, (n,); None for one class.
            classes: how many there are.
            seed: of the draw of the held-out parts.

        Raises:
            CalibrationError: a map that is not finite, or a label that is no class.
        """
        wide: NDArray[np.float64] = np.asarray(maps, np.float64)
        index = np.zeros(len(maps), np.int64) if labels is None else np.asarray(labels)
        if len(index) != len(wide) or (len(index) and not 0 <= index.min() <= index.max() < classes):
            raise CalibrationError(f"got {len(index)} labels for {len(wide)} maps, expected one of 0 to {classes - 1}")
        if not np.isfinite(wide).all():
            raise CalibrationError("maps of good parts are not finite; remove those frames")
        shape = (classes, *wide.shape[1:])
        mean, std = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        counts, weights = [], []
        for c in range(classes):
            own = wide[index == c].reshape(np.count_nonzero(index == c), int(np.prod(shape[1:])))
            chosen = _weights(own, seed)
            if chosen is not None:
                mean[c], std[c] = (part.reshape(shape[1:]) for part in _moments(own, *chosen))
            counts.append(len(own))
            weights.append(chosen or (0.0, 0.0))
        return cls(mean, std, tuple(counts), tuple(m for m, _ in weights), tuple(s for _, s in weights))

    @property
    def table(self) -> NDArray[np.float32]:
        """What a graph takes, (classes, 2, h, w) float32: factor and summand of each cell."""
        return np.stack([1 / self.std, -self.mean / self.std], 1).astype(np.float32)

    @property
    def fitted(self) -> tuple[bool, ...]:
        """Whether a class had parts enough."""
        return tuple(count >= MIN_PARTS for count in self.parts)

    def apply(
        self, maps: NDArray[np.floating], labels: "Sequence[int] | NDArray[np.int64] | None" = None
    ) -> NDArray[np.float32]:
        """Maps (n, h, w) of parts of classes `labels` (n,), in units of what good parts have at each cell."""
        return apply(self.table, maps, labels)


def apply(
    table: NDArray[np.float32], maps: NDArray[np.floating], labels: "Sequence[int] | NDArray[np.int64] | None" = None
) -> NDArray[np.float32]:
    """As `LocationStatistics.apply`, with a table of its form."""
    chosen = table[np.zeros(len(maps), np.int64) if labels is None else np.asarray(labels, np.int64)]
    return np.asarray(maps * chosen[:, 0] + chosen[:, 1], np.float32)


def identity(classes: int, height: int, width: int) -> NDArray[np.float32]:
    """A table that changes nothing."""
    table = np.zeros((classes, 2, height, width), np.float32)
    table[:, 0] = 1
    return table


def cells(maps: NDArray[np.floating], height: int, width: int) -> NDArray[np.float32]:
    """The maps (n, h, w) that maps (n, S, S) were enlarged from, bilinearly with half-pixel centres.

    Enlarging is linear and loses nothing, so least squares give them back to float32's accuracy.
    """
    rows, columns = (_inverse(size, maps.shape[1 + axis]) for axis, size in enumerate((height, width)))
    return np.asarray(rows @ maps.astype(np.float64) @ columns.T, np.float32)


def _inverse(small: int, large: int) -> NDArray[np.float64]:
    """The pseudo-inverse (small, large) of enlarging one axis."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, small - 1)
    forward = np.zeros((large, small))
    np.add.at(forward, (np.arange(large), low), 1 - (at - low))
    np.add.at(forward, (np.arange(large), high), at - low)
    inverse = np.asarray(np.linalg.pinv(forward), np.float64)
    return inverse


def _moments(
    maps: NDArray[np.float64], mean_weight: float, std_weight: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and std (N,) of maps (n, N): those of the whole map, moved by the weights towards those of each cell.

    The std is shrunk in its logarithm, and is the spread around the mean that is used.
    """
    whole = maps.mean()
    mean = whole + mean_weight * (maps.mean(0) - whole)
    variance = ((maps - mean) ** 2).mean(0)
    floor = max(variance.mean(), np.finfo(np.float32).tiny)
    log = 0.5 * np.log(np.maximum(variance, 1e-6 * floor))
    level = 0.5 * np.log(floor)
    return mean, np.exp(level + std_weight * (log - level))


def _weights(maps: NDArray[np.float64], seed: int) -> tuple[float, float] | None:
    """The weights of the mean and the std that maps (n, N) of held-out parts speak for; None for too few parts.

    They are the smallest under which held-out maps are as likely as under the best ones, to two standard errors of the
    difference over parts: what could be chance does not count as a place's own.
    """
    if len(maps) < MIN_PARTS:
        return None
    order = np.random.RandomState(seed).permutation(len(maps))
    pairs = sorted(itertools.product(WEIGHTS, WEIGHTS), key=lambda pair: (sum(pair), pair))
    loss = np.zeros((len(pairs), len(maps)))
    for fold in range(FOLDS):
        held, rest = order[fold::FOLDS], np.delete(order, np.s_[fold::FOLDS])
        for i, (mean_weight, std_weight) in enumerate(pairs):
            mean, std = _moments(maps[rest], mean_weight, std_weight)
            # Cells have heavy tails, so Student's t: of a Gaussian a few bright cells of good parts would decide.
            distance = ((maps[held] - mean) / std) ** 2
            loss[i, held] = ((FREEDOM + 1) / 2 * np.log1p(distance / FREEDOM) + np.log(std)).sum(1)
    worse = loss - loss[loss.mean(1).argmin()]
    as_good = worse.mean(1) <= 2 * worse.std(1) / len(maps) ** 0.5
    return pairs[int(as_good.argmax())]
