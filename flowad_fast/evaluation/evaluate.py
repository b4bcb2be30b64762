"""A detector over the test set of a data set: metrics, per-image scores, and figures of what it got wrong."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowad_fast.data.images import read_frame, read_mask
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.errors import ConfigError, FlowADError, FrameError, nearest
from flowad_fast.evaluation.inspection import Frame, FrameFiles, Scanned, scan
from flowad_fast.evaluation.metrics import METRICS, image_metrics, mean, mean_ad, pixel_metrics
from flowad_fast.evaluation.overlay import overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN_AD = "mean_ad"
"""Key of the mean of the seven metrics (mAD)."""
TEST_SET_SCORE = "diff+sum (test-set normalised)"
"""`Report.image_score` when the ranges of the image score came from the evaluated test set itself."""
_SCHEMA = 1

Metrics = dict[str, float | None]


class Scored(Protocol):
    """What a detector returns for B frames: `map` (B, h, w) and `score` (B,), float32.

    Where it exists, `invalid` (B,) is also read: why a frame cannot be judged, or None.
    """

    @property
    def map(self) -> NDArray[np.float32]:
        """Anomaly maps (B, h, w), higher = more anomalous."""

    @property
    def score(self) -> NDArray[np.float32]:
        """Image scores (B,), higher = more anomalous."""


DetectorLike = Callable[[Frame, list[str] | None], Scored]
"""From uint8 frames (B, H, W, 3) and class names (None without classes) to their maps and scores, in their order.

Attributes that are read where they exist: `class_names`, empty for a detector without classes; `engine` and
`aggregate`, for the report. A FrameError makes error rows of the frames of the call.
"""


@dataclass(frozen=True)
class ImageRow:
    """One test image: its score, or the `error` that left it without one."""

    path: str
    category: str
    defect: str
    label: int
    score: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """What an evaluation found; metrics are fractions in [0, 1], None where they cannot be computed.

    `metrics` has one entry per category and `mean` their mean, each with the seven `METRICS` and `mean_ad`. A metric is
    None in the mean when it is None in any category. `detector` says what ran (the engine), `image_score` how scores
    were made.
    """

    dataset: str
    detector: str
    image_score: str
    metrics: dict[str, Metrics]
    mean: Metrics
    images: tuple[ImageRow, ...]
    schema: int = _SCHEMA

    @property
    def errors(self) -> tuple[ImageRow, ...]:
        """The images without a score; the metrics leave them out."""
        return tuple(row for row in self.images if row.error is not None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; no NaN."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def select_tests(dataset: Dataset, categories: Iterable[str] | None = None) -> dict[str, tuple[Sample, ...]]:
    """The test images of each category (default: all), in the order of the data set.

    Raises:
        ConfigError: an unknown category, or one without good or without defective test images.
    """
    chosen = dataset.categories if categories is None else tuple(dict.fromkeys(categories))
    samples = {}
    for category in chosen:
        if category not in dataset.categories:
            raise ConfigError(f"no category {category!r} in {dataset.name}; {nearest(category, dataset.categories)}")
        samples[category] = dataset.select("test", category)
        missing = {"good", "defective"} - {"defective" if s.label else "good" for s in samples[category]}
        if missing:
            raise ConfigError(
                f"category {category!r} of {dataset.name} has no {' and no '.join(sorted(missing))} test images, "
                "expected both; metrics compare them"
            )
    if not samples:
        raise ConfigError(f"{dataset.name} has no images; check the data folder")
    return samples


def evaluate(
    detector: DetectorLike,
    dataset: Dataset,
    categories: Iterable[str] | None = None,
    batch_size: int = 8,
    mask_size: int = 256,
    progress: Callable[[int], object] = lambda n: None,
    test_set_normalisation: bool = False,
) -> Report:
    """Run the detector over the test images of `categories` (default: all) and compare with labels and masks.

    Masks are resized to (mask_size, mask_size), the size of the detector's maps. `progress(n)` is called after each n
    images. An image that cannot be read (or its mask), that the detector refuses, or that it calls invalid, becomes an
    error row, and the metrics leave it out.

    `test_set_normalisation` replaces the detector's image score by the one of the paper's code: max - min of the map
    plus the sum of the map, each first min-max-normalised over the test images of its category. A production line has
    no such range; use it to reproduce published numbers only.

    Raises:
        ConfigError: a category is unknown to the data set or the detector, or lacks good or defective test images;
            the maps are of another size than the masks.
    """
    chosen = select_tests(dataset, categories)
    names = _class_names(detector)
    for category in chosen:
        if names and category not in names:
            raise ConfigError(f"the detector has no class {category!r}; {nearest(category, names)}")
    metrics: dict[str, Metrics] = {}
    rows: list[ImageRow] = []
    for category, samples in chosen.items():
        results: list[_Scored | str] = []
        frames, classes = FrameFiles([s.path for s in samples]), [category] * len(samples) if names else None
        for sample, one in zip(samples, scan(detector, frames, classes, batch_size), strict=True):
            results.append(_result(sample, one, mask_size, not test_set_normalisation))
            progress(1)
        scored = [result for result in results if not isinstance(result, str)]
        scores = np.array([one.score for one in scored], np.float64)
        if test_set_normalisation and scored:  # the detector was not asked for scores
            scores = _diff_sum(np.stack([one.map for one in scored]))
        following = iter(scores.tolist())
        for sample, result in zip(samples, results, strict=True):
            score, error = (None, result) if isinstance(result, str) else (next(following), None)
            rows.append(ImageRow(str(sample.path), category, sample.defect, sample.label, score, error))
        metrics[category] = _metrics(scored, scores, dataset.has_masks)
    return Report(
        dataset=dataset.name,
        detector=getattr(detector, "engine", type(detector).__name__),
        image_score=TEST_SET_SCORE if test_set_normalisation else getattr(detector, "aggregate", "of the detector"),
        metrics=metrics,
        mean={name: mean([values[name] for values in metrics.values()]) for name in (*METRICS, MEAN_AD)},
        images=tuple(rows),
    )


def plot_report(report: Report, path: str | Path) -> None:
    """Write a figure with the metrics of each category as bars and, below, a histogram of scores per category."""
    from matplotlib.figure import Figure

    categories = list(report.metrics)
    columns = min(4, len(categories))
    grid_rows = math.ceil(len(categories) / columns)
    figure = Figure(figsize=(max(8, 3 * columns), 3.5 + 2.2 * grid_rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.5, 2.2 * grid_rows]).ravel()

    _bars(upper.subplots(), report)
    cells = lower.subplots(grid_rows, columns, squeeze=False).ravel()
    for cell, category in zip(cells[: len(categories)], categories, strict=True):
        _histogram(cell, report, category)
    cells[0].legend(fontsize="small")
    for cell in cells[len(categories) :]:
        cell.set_axis_off()
    figure.savefig(path, dpi=120)


def _bars(axes: "Axes", report: Report) -> None:
    categories, values = list(report.metrics), list(report.metrics.values())
    shown = [name for name in METRICS if any(one[name] is not None for one in values)]
    places = np.arange(len(categories))
    width = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        heights = [np.nan if (value := one[name]) is None else 100 * value for one in values]
        axes.bar(places + (i - (len(shown) - 1) / 2) * width, heights, width, label=name)
    axes.set_xticks(places, categories, rotation=30 if len(categories) > 4 else 0)
    axes.set(ylabel="%", ylim=(0, 100), title=f"{report.dataset}: {report.detector}, image score {report.image_score}")
    if shown:
        axes.legend(fontsize="small", ncols=len(METRICS), loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _histogram(axes: "Axes", report: Report, category: str) -> None:
    scores = [(row.label, row.score) for row in report.images if row.category == category and row.score is not None]
    edges = list(np.histogram_bin_edges([score for _, score in scores], bins=30))
    for label, name in enumerate(("good", "defective")):
        axes.hist([score for of, score in scores if of == label], bins=edges, alpha=0.6, label=name)
    axes.set_title(category, fontsize="medium")
    axes.tick_params(labelsize="small")


def worst_mistakes(report: Report, n: int = 12) -> list[tuple[ImageRow, float]]:
    """Up to n images that are ranked worst, half good and half defective, each with its share of wrong comparisons.

    That share is the part of the category's images of the other label whose score is on the wrong side: scale-free,
    so that categories compare, and 1 - AUROC on average. Ties are ordered by score: high for good, low for defective.
    """
    scored = [(row, row.score) for row in report.images if row.score is not None]
    scores: dict[tuple[str, int], list[float]] = {}
    for row, score in scored:
        scores.setdefault((row.category, row.label), []).append(score)
    ranked: dict[int, list[tuple[float, float, ImageRow]]] = {0: [], 1: []}
    for row, score in scored:
        sign = -1 if row.label else 1
        others = np.array(scores.get((row.category, 1 - row.label), []))
        wrong = float(np.mean(sign * score >= sign * others)) if others.size else 0.0
        ranked[row.label].append((wrong, sign * score, row))
    good, defective = (sorted(ranked[label], key=lambda one: one[:2], reverse=True) for label in (0, 1))
    return [(row, wrong) for wrong, _, row in good[: n - n // 2] + defective[: n // 2]]


def save_mistakes(report: Report, detector: DetectorLike, folder: str | Path, n: int = 12) -> list[Path]:
    """Run the detector again on `worst_mistakes` and write each frame beside its heat map, with a caption, as PNG.

    All share one colour scale. Returns the files in the order of `worst_mistakes`; the folder is made if needed.

    Raises:
        FrameError: an image cannot be read any more.
    """
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mistakes = worst_mistakes(report, n)
    names = _class_names(detector)
    frames = [read_frame(row.path) for row, _ in mistakes]
    maps = [
        np.asarray(detector(frame[None], [row.category] if names else None).map)[0]
        for frame, (row, _) in zip(frames, mistakes, strict=True)
    ]
    low, high = min((map.min() for map in maps), default=0.0), max((map.max() for map in maps), default=0.0)
    if high == low:  # constant maps: nothing to show, but the frames still are
        high = low + 1
    files = []
    for i, (frame, map, (row, wrong)) in enumerate(zip(frames, maps, mistakes, strict=True), start=1):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        for axes, picture in zip(figure.subplots(1, 2), (frame, overlay(frame, map, low, high)), strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
        opposite = "defective images score no higher" if row.label == 0 else "good images score no lower"
        caption = f"{row.category}, {'defective: ' + row.defect if row.label else 'good'}, {Path(row.path).name}"
        figure.suptitle(f"{caption}\nscore {row.score:.4g}; {wrong:.1%} of the {opposite}", fontsize="medium")
        file = folder / f"{i:02d}_{'defective' if row.label else 'good'}_{row.category}_{Path(row.path).stem}.png"
        figure.savefig(file, dpi=110)
        files.append(file)
    return files


@dataclass(frozen=True)
class _Scored:
    label: int
    mask: NDArray[np.bool_]
    map: NDArray[np.float32]
    score: float | None


def _result(sample: Sample, one: Scanned[Scored] | FlowADError, mask_size: int, with_score: bool) -> _Scored | str:
    """What a test image contributes to the metrics, or the reason why it does not."""
    if isinstance(one, ConfigError):  # the same for every image
        raise one
    if isinstance(one, FlowADError):
        return str(one)
    maps = np.asarray(one.detection.map, np.float32)
    if maps.shape[1:] != (mask_size, mask_size):
        raise ConfigError(
            f"the detector gave maps {maps.shape}, expected the size of the masks, {mask_size}x{mask_size}; "
            "set mask_size to the size of the maps"
        )
    invalid: Sequence[str | None] | None = getattr(one.detection, "invalid", None)
    if invalid is not None and (reason := invalid[one.place]) is not None:
        return reason
    # Without a calibration the score of diff+sum is an error, so it is read only when it is used.
    score = float(one.detection.score[one.place]) if with_score else None
    map = maps[one.place]
    if not np.isfinite(map).all() or not (score is None or math.isfinite(score)):
        return "the map or the score is not finite"
    try:
        mask = np.zeros(map.shape, bool) if sample.mask is None else read_mask(sample.mask, mask_size)
    except FrameError as error:
        return str(error)
    return _Scored(sample.label, mask, map, score)


def _class_names(detector: DetectorLike) -> tuple[str, ...]:
    return tuple(getattr(detector, "class_names", ()))


def _diff_sum(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """The reference code's image score (n,) of maps (n, H, W): normalised range plus normalised sum of each."""
    terms = np.stack([np.ptp(maps, axis=(1, 2)), maps.sum(axis=(1, 2), dtype=np.float64)])
    low, high = terms.min(axis=1, keepdims=True), terms.max(axis=1, keepdims=True)
    return ((terms - low) / np.where(high > low, high - low, 1)).sum(axis=0)


def _metrics(scored: Sequence[_Scored], scores: NDArray[np.float64], has_masks: bool) -> Metrics:
    """All metrics of one category; None for pixel metrics without masks, and where errors left one label only."""
    metrics: Metrics = dict.fromkeys(METRICS)
    labels = [one.label for one in scored]
    if set(labels) == {0, 1}:
        metrics |= image_metrics(labels, scores)
        if has_masks:
            metrics |= pixel_metrics(np.stack([one.mask for one in scored]), np.stack([one.map for one in scored]))
    return {**metrics, MEAN_AD: mean_ad(metrics)}
