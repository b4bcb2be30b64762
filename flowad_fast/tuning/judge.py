"""How well scores separate, how sure that is, what follows; numpy only.

Every recipe is judged on the same bootstrap samples, so that differences and orders of recipes have intervals too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowad_fast.tuning.recipe import Separation

SAMPLES = 400
"""Bootstrap samples."""
MARGIN = 0.005
"""AUROC that a recipe may lack to the best one."""
SAME_TIME = 0.05
"""Share of time below which two recipes count as equally fast."""
RULE = (
    f"the fastest recipe whose AUROC lacks at most {100 * MARGIN:g} point to the best one; of those within "
    f"{100 * SAME_TIME:g} % of its time, the one with the highest AUROC"
)
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One class's parts to separate, and the weights of each in every bootstrap sample.

    Attributes:
        name: of the class.
        good: places of good parts among the scores; `bad` of defective ones.
        bad: see `good`.
        good_weights: (SAMPLES + 1, len(good)); the first row is the sample itself, all ones.
        bad_weights: (SAMPLES + 1, len(bad)).
    """

    name: str
    good: NDArray[np.intp]
    bad: NDArray[np.intp]
    good_weights: Values
    bad_weights: Values


def trials(
    classes: Sequence[str], labels: Sequence[int], seed: int, origins: Sequence[int] | None = None
) -> tuple[Trial, ...]:
    """The trials of parts in the order of their scores.

    Args:
        classes: class of each part.
        labels: 0 good, 1 defective.
        seed: of the bootstrap.
        origins: for each defective part the place of the good part that it was made of (for good parts their own
            place); such pairs are drawn together. None: good and defective parts are drawn each among themselves.
    """
    random, found = np.random.RandomState(seed), []
    names, wrong = np.asarray(classes), np.asarray(labels).astype(bool)
    for name in dict.fromkeys(classes):
        good = np.flatnonzero((names == name) & ~wrong)
        bad = np.flatnonzero((names == name) & wrong)
        if not len(good) or not len(bad):
            continue
        good_weights = _weights(len(good), random)
        if origins is None:
            bad_weights = _weights(len(bad), random)
        else:
            place = {int(part): i for i, part in enumerate(good)}
            bad_weights = good_weights[:, [place[int(origins[part])] for part in bad]]
        found.append(Trial(name, good, bad, good_weights, bad_weights))
    return tuple(found)


def judged(scores: NDArray[np.floating], on: Sequence[Trial]) -> tuple[Separation, Values]:
    """The separation that scores (n,) have, and its mean over classes in each bootstrap sample."""
    rows = [aurocs(scores[t.good], scores[t.bad], t.good_weights, t.bad_weights) for t in on]
    mean = np.mean(rows, axis=0)
    low, high = np.quantile(mean[1:], (0.025, 0.975))
    classes = {trial.name: float(row[0]) for trial, row in zip(on, rows, strict=True)}
    return Separation(auroc=float(mean[0]), low=float(low), high=float(high), classes=classes), mean[1:]


def aurocs(good: NDArray[np.floating], bad: NDArray[np.floating], good_weights: Values, bad_weights: Values) -> Values:
    """Area under the ROC curve for each row of weights (R, len(good)) and (R, len(bad)); a tie counts half."""
    values = np.concatenate((good, bad))
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    nothing = np.zeros((len(good_weights), 1))
    wg = np.hstack((good_weights, nothing.repeat(len(bad), 1)))[:, order]
    wb = np.hstack((nothing.repeat(len(good), 1), bad_weights))[:, order]
    g, b = np.add.reduceat(wg, starts, 1), np.add.reduceat(wb, starts, 1)
    below = np.cumsum(g, 1) - g / 2
    area: Values = (below * b).sum(1) / (g.sum(1) * b.sum(1))
    return area


def rank_correlation(one: Values, other: Values) -> float:
    """Spearman's correlation of two orders, ties with their mean rank; 0 where one of them is constant."""
    ranks = [_ranks(values) for values in (one, other)]
    a, b = (r - r.mean() for r in ranks)
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else 0.0


def rank_correlations(one: Values, other: Values) -> tuple[float, float]:
    """95 % interval of the correlation of two orders of n recipes, over bootstrap samples (n, SAMPLES) of both."""
    each = [rank_correlation(a, b) for a, b in zip(one.T, other.T, strict=True)]
    low, high = np.quantile(each, (0.025, 0.975))
    return float(low), float(high)


def front(times: Sequence[float], separations: Sequence[float]) -> list[int]:
    """Recipes that no other beats in both, fastest first."""
    found: list[int] = []
    for i in sorted(range(len(times)), key=lambda i: (times[i], -separations[i])):
        if not found or separations[i] > separations[found[-1]]:
            found.append(i)
    return found


def choose(times: Sequence[float], separations: Sequence[float]) -> int:
    """The recipe that `RULE` names."""
    best = max(separations)
    good = [i for i, value in enumerate(separations) if value >= best - MARGIN]
    fastest = min(times[i] for i in good)
    return max((i for i in good if times[i] <= fastest * (1 + SAME_TIME)), key=lambda i: (separations[i], -times[i]))


def _weights(count: int, random: np.random.RandomState) -> Values:
    drawn = random.multinomial(count, np.full(count, 1 / count), SAMPLES)
    return np.vstack((np.ones(count), drawn)).astype(np.float64)


def _ranks(values: Values) -> Values:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Values = (ends - (counts - 1) / 2)[inverse]
    return ranks
