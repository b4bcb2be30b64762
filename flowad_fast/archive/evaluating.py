"""The images of a data set scored by workers, for an evaluation that is that of one process."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowad_fast.archive import cluster
from flowad_fast.archive.worker import LOST, Task
from flowad_fast.data.samples import Sample
from flowad_fast.evaluation.evaluate import Contribution, Scoring

if TYPE_CHECKING:
    from flowad_fast.detector import Detector

CALLS = 4
"""Calls of the detector in a group, at most: their maps travel together."""


@dataclass
class Evaluation(Task[Sample, Contribution]):
    """What images contribute to the metrics.

    Attributes:
        load: makes the detector; it travels to the workers.
        how: images are scored.
    """

    load: "Callable[[], Detector]"
    how: Scoring

    def __post_init__(self) -> None:
        self.batch = self.how.batch

    def open(self) -> None:
        """Make the detector."""
        self._detector = self.load()

    def judge(self, items: Sequence[Sample]) -> list[Contribution]:
        """See `Task.judge`."""
        return list(self.how.contributions(self._detector, items))

    def lost(self, item: Sample) -> Contribution:
        """See `Task.lost`."""
        return f"{item.path}: {LOST}"


def contributions(
    load: "Callable[[], Detector]", workers: cluster.Workers
) -> Callable[[Mapping[str, Sequence[Sample]], Scoring], Generator[Contribution, None, None]]:
    """What `evaluate` takes for `score`, so that workers do the detector's work.

    The maps of one category are in this process at a time, as without workers; those of the next wait in Ray's object
    store, which holds workers back when it is full.
    """

    def score(chosen: Mapping[str, Sequence[Sample]], how: Scoring) -> Generator[Contribution, None, None]:
        with cluster.connected(workers, by="flowad-eval --ray") as room:
            groups = [
                group for samples in chosen.values() for group in cluster.groups_of(samples, how.batch, room, CALLS)
            ]
            for _, done in cluster.run(Evaluation(load, how), groups, workers, room, ordered=True):
                yield from done

    return score
