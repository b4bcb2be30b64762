"""How a student ranks parts beside its teacher: rank correlation, and the difference of AUROC with its interval."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from flowad_fast.config import Ranking

RESAMPLES = 2000
"""Of the bootstrap."""
COVERAGE = 0.95
"""Of its interval."""


def ranking(
    teacher: NDArray[np.float64],
    student: NDArray[np.float64],
    labels: NDArray[np.int64] | None,
    groups: NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ranking:
    """Compare two scores (n,) of the same parts.

    Every figure is the mean over the groups (classes of the product), as scores of several are not comparable. The
    bootstrap draws parts with replacement inside each group and label; both scores keep the parts of a resample, since
    they err together.

    Args:
        teacher: scores (n,), higher is more anomalous.
        student: scores (n,) of the same parts.
        labels: (n,), 1 for defective parts; None where that is not known. Every group has both.
        groups: (n,), the class of each part.
        resamples: of the bootstrap.
        seed: of its draws.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    correlation = float(np.mean([_spearman(teacher[one], student[one]) for one in members]))
    if labels is None:
        return Ranking(spearman=correlation)
    random = np.random.RandomState(seed)
    whole: list[list[float]] = []
    drawn: list[NDArray[np.float64]] = []
    for one in members:
        good, bad = one[labels[one] == 0], one[labels[one] == 1]
        resampled = np.concatenate(
            [random.choice(good, (resamples, len(good))), random.choice(bad, (resamples, len(bad)))], 1
        )
        every = np.concatenate([good, bad])[None]
        whole.append([float(_auroc(scores[every], len(good))[0]) for scores in (teacher, student)])
        drawn.append(_auroc(student[resampled], len(good)) - _auroc(teacher[resampled], len(good)))
    theirs, ours = (float(value) for value in np.mean(whole, axis=0))
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(np.mean(drawn, axis=0), [tail, 100 - tail])
    return Ranking(
        spearman=correlation,
        teacher_auroc=theirs,
        student_auroc=ours,
        difference=ours - theirs,
        low=float(low),
        high=float(high),
    )


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Rank correlation; 1 for scores that never differ in either, which order nothing differently."""
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return 1.0
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def _auroc(scores: NDArray[np.float64], good: int) -> NDArray[np.float64]:
    """AUROC (R,) of scores (R, n) whose first `good` columns are of good parts; ties count half."""
    bad = scores.shape[1] - good
    ranks = rankdata(scores, axis=1)[:, good:].sum(1)
    value: NDArray[np.float64] = (ranks - bad * (bad + 1) / 2) / (good * bad)
    return value
