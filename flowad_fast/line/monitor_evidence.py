"""A sequential test of a rate: has it risen above what it may be, with a stated number of false alarms.

What is tested is that each event happens with a probability of at most `bound`, whatever happened before. For each of
five higher rates p a bet is kept. It gains `p / bound` at an event and `(1 - p) / (1 - bound)` otherwise, which is at
most 1 on average as long as nothing has risen. Each bet starts anew at every part, S <- (S + 1) * gain (Shiryaev and
Roberts), so that a long quiet past delays nothing. S - t does not rise on average, so S is at most t after t parts,
and by Doob's inequality it reaches `limit` within N parts with a probability of at most N / limit: the guarantee.

Shin, Ramdas, Rinaldo, "E-detectors" (2022), gives the theory.
"""

import math
from collections import deque

import numpy as np

ODDS = (1.25, 1.7, 3.0, 8.0, 30.0)
"""By how much the odds of an event may have risen; a bet on each."""


def conformal_bound(above: int, below: int, doubt: float) -> float:
    """The rate that a quantile of good values is exceeded with, at most, but for a share `doubt` of all samples.

    The probability that a new value is above the k-th smallest of n exchangeable values is distributed as
    Beta(n + 1 - k, k), whatever the values are (Vovk 2012); later values that were counted add to both.

    Args:
        above: n + 1 - k, and later values that were above.
        below: k, and later values that were not.
        doubt: share of samples for which the rate is higher.

    Example:
        >>> round(conformal_bound(1, 19, 0.05), 3)  # the largest of 19: 1 - 0.05 ** (1 / 19)
        0.146
    """
    if above < 1 or below < 1 or not 0 < doubt < 1:
        raise ValueError(f"got {above} above, {below} below, doubt {doubt}; expected at least 1, 1, within 0 and 1")
    count = above + below - 1
    i = np.arange(1, above)
    # The tail of the Beta distribution is one of the binomial: P(Binomial(count, rate) < above).
    chosen = np.concatenate([[0.0], np.cumsum(np.log(count - i + 1) - np.log(i))])
    events = np.arange(above)
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        if not 0 < rate < 1:
            break
        logs = chosen + events * math.log(rate) + (count - events) * math.log1p(-rate)
        top = logs.max()
        tail = math.exp(top) * float(np.exp(logs - top).sum())
        low, high = (rate, high) if tail > doubt else (low, rate)
    return high


class RateTest:
    """Whether events come more often than they may; see the module. Memory is bounded.

    Attributes:
        usual: rate that is expected.
        bound: rate that is tested, at least `usual`.
        limit: of the evidence; within N parts it is reached without a reason with a probability of at most N / limit.
        fired: whether the rate has risen, and has not come back since.
    """

    def __init__(self, usual: float, bound: float, limit: float) -> None:
        """Nothing was seen yet."""
        self.usual, self.limit = usual, limit
        self.bound = min(max(bound, usual, 1e-6), 1 - 1e-6)
        odds = self.bound / (1 - self.bound)
        rates = [odds * factor / (1 + odds * factor) for factor in ODDS]
        self._gains = [(rate / self.bound, (1 - rate) / (1 - self.bound)) for rate in rates]
        self._sums = [0.0] * len(ODDS)
        self.fired = False
        self._last: deque[bool] = deque(maxlen=min(2000, max(100, math.ceil(5 / self.bound))))

    @property
    def evidence(self) -> float:
        """Logarithm of the evidence as a share of that of the limit: near 0 for none, from 1 on it has fired."""
        mean = math.fsum(self._sums) / len(self._sums)
        return 1.0 if self.fired else max(0.0, math.log(max(mean, 1.0)) / math.log(self.limit))

    def add(self, event: bool) -> None:
        """One more part. Fires at the limit, and is over when the last parts are nearer to `usual` than to `bound`.

        It looks back on 100 to 2000 parts, five events at the bound, and not beyond the part at which it fired.
        """
        if self.fired:
            self._last.append(event)
            back = (self.usual + self.bound) / 2 if self.usual > 0 else self.bound / 2
            if len(self._last) == self._last.maxlen and sum(self._last) <= back * len(self._last):
                self.fired = False
                self._last.clear()
            return
        place = 0 if event else 1
        self._sums = [(old + 1) * gain[place] for old, gain in zip(self._sums, self._gains, strict=True)]
        if math.fsum(self._sums) >= self.limit * len(self._sums):
            self.fired, self._sums = True, [0.0] * len(ODDS)

    def delay(self, rate: float) -> float:
        """Parts after which a rise to `rate` is found, on average at most; infinite where no bet gains by it.

        By Wald's identity: the limit, for one of five bets alone, over what the best of them gains per part.
        """
        best = max(rate * math.log(up) + (1 - rate) * math.log(down) for up, down in self._gains)
        return (math.log(self.limit * len(ODDS)) + 1) / best if best > 0 else math.inf
