"""What a precision changes in the end: maps, the order of image scores, and AUROC on labelled photos, against fp32.

Speed has no part in this, so it may run on a busy machine and on a CPU, where bf16 and fp16 are torch's own and fp8
multiplies the same quantised values in float32.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.record.record import Drift, DriftRecord, DriftRow, Interval
from flowad_fast.config import Precision
from flowad_fast.data.samples import Dataset
from flowad_fast.detector import Detection, Detector
from flowad_fast.errors import ConfigError
from flowad_fast.evaluation.evaluate import evaluate, select_tests
from flowad_fast.model import FlowModel
from flowad_fast.stages.scorers import Scorer

RESAMPLES = 2000
"""Of the photos, for the interval of a difference of AUROC."""
PARITY_PHOTOS = 64
"""Photos whose maps are compared, evenly taken from all; scores are compared on all."""


class Recorder:
    """A detector that keeps the scores and some of the maps that it gives."""

    def __init__(self, detector: Detector, keep_every: int) -> None:
        self.detector, self.every = detector, keep_every
        self.engine, self.class_names = detector.engine, detector.class_names
        self.maps: list[NDArray[np.float32]] = []
        self.seen = 0

    def __call__(self, frames: NDArray[np.uint8], classes: list[str] | None = None) -> Detection:
        """See `evaluation.DetectorLike`."""
        found = self.detector(frames, classes)
        self.maps += [m for i, m in enumerate(found.map) if (self.seen + i) % self.every == 0]
        self.seen += len(found)
        return found


def run(
    model: FlowModel,
    dataset: Dataset,
    scorers: Sequence[Scorer],
    precisions: Sequence[Precision],
    *,
    categories: Sequence[str] | None = None,
    device: str = "auto",
    ops: str = "reference",
    batch: int = 8,
    name: str = "checkpoint",
    progress: Callable[[int], object] = lambda n: None,
) -> DriftRecord:
    """A record with a row for each scorer and precision, each compared with the scorer's own fp32 row.

    Raises:
        ConfigError: a photo that cannot be judged; drift needs all of them in every precision.
    """
    before = moment()
    total = sum(len(samples) for samples in select_tests(dataset, categories).values())
    rows = []
    for scorer in scorers:
        first: tuple[NDArray[np.float64], NDArray[np.float32]] | None = None
        others = [precision for precision in precisions if precision != "fp32"]
        every: list[Precision] = ["fp32", *others]
        for precision in every:
            detector = Detector.from_model(model, scorer, precision=precision, device=device, ops=ops)
            recorder = Recorder(detector, max(total // PARITY_PHOTOS, 1))
            report = evaluate(recorder, dataset, categories, batch, detector.image_size, progress)
            if report.errors:
                raise ConfigError(f"{report.errors[0].path}: {report.errors[0].error}")
            labels = np.array([image.label for image in report.images])
            scores, maps = np.array([image.score for image in report.images], float), np.stack(recorder.maps)
            first = first or (scores, maps)
            change = compared(labels, scores, maps, *first)
            rows.append(
                DriftRow(
                    name=f"{scorer.kind}/{precision}", scorer=scorer.kind, precision=precision, ops=ops, options=scorer,
                    engine=detector.engine, photos=len(labels), defective=int(labels.sum()), **dict(change),
                )
            )  # fmt: skip
    return DriftRecord(
        preset=name,
        dataset=dataset.name,
        environment=environment(before),
        cases=tuple(rows),
        roofs=Roofs(reason="nothing was timed"),
    )


def compared(
    labels: NDArray[np.int_],
    scores: NDArray[np.float64],
    maps: NDArray[np.float32],
    exact_scores: NDArray[np.float64],
    exact_maps: NDArray[np.float32],
) -> Drift:
    """AUROC and its difference to fp32's with a 95 % bootstrap interval over the photos; errors of scores and maps.

    Errors are relative to the standard deviation of fp32's scores, or of a photo's fp32 map.
    """
    spread = exact_maps.std((1, 2))
    errors = np.abs(maps - exact_maps)
    auroc, exact = float(roc_auc_score(labels, scores)), float(roc_auc_score(labels, exact_scores))
    generator = np.random.default_rng(0)
    changes = []
    for _ in range(RESAMPLES):
        pick = generator.integers(0, len(labels), len(labels))
        if 0 < labels[pick].sum() < len(pick):
            changes.append(_auroc(labels[pick], scores[pick]) - _auroc(labels[pick], exact_scores[pick]))
    low, high = np.percentile(changes, [2.5, 97.5])
    return Drift(
        auroc=round(auroc, 5),
        auroc_change=Interval(points=_points(auroc - exact), low=_points(low), high=_points(high)),
        score_spearman=round(float(spearmanr(scores, exact_scores).statistic), 6),
        score_error=float(f"{np.abs(scores - exact_scores).max() / exact_scores.std():.3g}"),
        map_rms=float(f"{np.median(np.sqrt((errors**2).mean((1, 2))) / spread):.3g}"),
        map_error=float(f"{np.max(errors.max((1, 2)) / spread):.3g}"),
        maps=len(maps),
    )


def _auroc(labels: NDArray[np.int_], scores: NDArray[np.float64]) -> float:
    """By ranks: a bootstrap asks for thousands."""
    order = np.argsort(scores, kind="stable")
    _, first, counts = np.unique(scores[order], return_index=True, return_counts=True)
    ranks = np.empty(len(scores))
    ranks[order] = np.repeat(first + (counts + 1) / 2, counts)
    bad = int(labels.sum())
    return float((ranks[labels == 1].sum() - bad * (bad + 1) / 2) / (bad * (len(labels) - bad)))


def _points(fraction: float) -> float:
    return round(100 * float(fraction), 3)
