"""A detector over the test set of a data set: metrics, per-image scores, and figures of what it got wrong."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from flowad_fast.stages.aggregates import AGGREGATES, Aggregate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEAN_AD = "mean_ad"
"""Key of the mean of the seven metrics (mAD)."""
TEST_SET_SCORE = "diff+sum (test-set normalised)"
"""`Report.image_score` of FlowAD's evaluation: the ranges of its terms came from the evaluated test set itself."""
PUBLISHED = (
    "published numbers are those of the checkpoint that was best on the test set, and FlowAD's code bins scores for "
    "F1max, pixel AUROC and AUPRO; the metrics here are exact"
)
"""What a comparison with published numbers must know."""
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
    """One test image: its score, or the `error` that left it without one; `unmarked` says why it has no mask to use."""

    path: str
    category: str
    defect: str
    label: int
    score: float | None = None
    error: str | None = None
    unmarked: str | None = None


@dataclass(frozen=True)
class Report:
    """What an evaluation found; metrics are fractions in [0, 1], None where they cannot be computed.

    `metrics` has one entry per category and `mean` their mean, each with the seven `METRICS` and `mean_ad`. A metric is
    None in the mean when it is None in any category. `detector` says what ran (the engine), `image_score` how scores
    were made, `pixel_images` how many images of a category the pixel metrics cover, and `remarks` what a reader of the
    numbers must know.
    """

    dataset: str
    detector: str
    image_score: str
    metrics: dict[str, Metrics]
    mean: Metrics
    images: tuple[ImageRow, ...]
    pixel_images: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    schema: int = _SCHEMA

    @property
    def errors(self) -> tuple[ImageRow, ...]:
        """The images without a score; the metrics leave them out."""
        return tuple(row for row in self.images if row.error is not None)

    @property
    def unmarked(self) -> tuple[ImageRow, ...]:
        """The defective images whose mask marks nothing; the pixel metrics leave them out."""
        return tuple(row for row in self.images if row.unmarked is not None)

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
    test_set_normalisation: bool | Aggregate = False,
    remarks: Sequence[str] = (),
) -> Report:
    """Run the detector over the test images of `categories` (default: all) and compare with labels and masks.

    Masks are resized to (mask_size, mask_size), the size of the detector's maps. `progress(n)` is called after each n
    images. An image that cannot be read (or its mask), whose mask does not fit it, that the detector refuses, or that
    it calls invalid, becomes an error row, and the metrics leave it out. A mask of a defective image that marks nothing
    leaves it out of the pixel metrics alone. `remarks` go into the report.

    `test_set_normalisation` replaces the detector's image score by the one of the authors' code: the sum of two terms,
    each first min-max-normalised over the test images. A production line has no such range; use it to reproduce
    published numbers only. True, or `diff+sum`, is FlowAD's: max - min and sum of the map, over the test images of all
    categories together. `range+nll` is InvAD's, over those of each category, and needs a detector of that aggregate.

    Raises:
        ConfigError: a category is unknown to the data set or the detector, or lacks good or defective test images;
            the maps are of another size than the masks; the detector lacks the terms.
    """
    scaled: Aggregate | None = "diff+sum" if test_set_normalisation is True else test_set_normalisation or None
    chosen = select_tests(dataset, categories)
    names = _class_names(detector)
    for category in chosen:
        if names and category not in names:
            raise ConfigError(f"the detector has no class {category!r}; {nearest(category, names)}")
    found: dict[str, list[_Scored | str]] = {}
    pixels: dict[str, tuple[int, Metrics]] = {}
    for category, samples in chosen.items():
        results: list[_Scored | str] = []
        frames, classes = FrameFiles([s.path for s in samples]), [category] * len(samples) if names else None
        for sample, one in zip(samples, scan(detector, frames, classes, batch_size), strict=True):
            results.append(_result(sample, one, mask_size, scaled))
            progress(1)
        if dataset.has_masks:
            pixels[category] = _pixel_metrics([result for result in results if not isinstance(result, str)])
        # Maps fill memory, and only scores are compared across categories.
        found[category] = [one if isinstance(one, str) else replace(one, map=None, mask=None) for one in results]
    scores = _scores(found, scaled)
    metrics: dict[str, Metrics] = {}
    rows: list[ImageRow] = []
    for category, results in found.items():
        following = iter(scores[category].tolist())
        for sample, result in zip(chosen[category], results, strict=True):
            score, error = (None, result) if isinstance(result, str) else (next(following), None)
            unmarked = None if isinstance(result, str) else result.unmarked
            rows.append(ImageRow(str(sample.path), category, sample.defect, sample.label, score, error, unmarked))
        labels = [result.label for result in results if not isinstance(result, str)]
        metrics[category] = _metrics(labels, scores[category], pixels[category][1] if category in pixels else {})
    return Report(
        dataset=dataset.name,
        detector=getattr(detector, "engine", type(detector).__name__),
        image_score=_score_name(scaled) if scaled else getattr(detector, "aggregate", "of the detector"),
        metrics=metrics,
        mean={name: mean([values[name] for values in metrics.values()]) for name in (*METRICS, MEAN_AD)},
        images=tuple(rows),
        pixel_images={category: count for category, (count, _) in pixels.items()},
        remarks=(*remarks, *([_over(scaled, len(chosen))] if scaled else []), PUBLISHED),
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
    axes.set_xticks(places, map(_caption, categories), rotation=30 if len(categories) > 4 else 0, parse_math=False)
    axes.set(ylabel="%", ylim=(0, 100))
    title = f"{report.dataset}: {report.detector}, image score {report.image_score}"
    axes.set_title(_caption(title), parse_math=False)
    if shown:
        axes.legend(fontsize="small", ncols=len(METRICS), loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _histogram(axes: "Axes", report: Report, category: str) -> None:
    scores = [(row.label, row.score) for row in report.images if row.category == category and row.score is not None]
    edges = list(np.histogram_bin_edges([score for _, score in scores], bins=30))
    for label, name in enumerate(("good", "defective")):
        axes.hist([score for of, score in scores if of == label], bins=edges, alpha=0.6, label=name)
    axes.set_title(_caption(category), fontsize="medium", parse_math=False)
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
        text = f"{_caption(caption)}\nscore {row.score:.4g}; {wrong:.1%} of the {opposite}"
        figure.suptitle(text, fontsize="medium", parse_math=False)
        name = f"{i:02d}_{'defective' if row.label else 'good'}_{row.category}_{Path(row.path).stem}"
        file = folder / f"{_file_name(name)}.png"
        figure.savefig(file, dpi=110)
        files.append(file)
    return files


def _caption(text: str) -> str:
    """`text` for a figure, on one line: what no font can draw as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _file_name(text: str) -> str:
    """`text` as a file's name that every system takes; a class name may hold separators."""
    return re.sub(r"[^\w.()+ -]", "_", text)[:120]


@dataclass(frozen=True)
class _Scored:
    """`score` is one number, or the terms that are to be normalised; map and mask are None once they were compared."""

    label: int
    mask: NDArray[np.bool_] | None
    map: NDArray[np.float32] | None
    score: NDArray[np.float64]
    unmarked: str | None = None


def _result(
    sample: Sample, one: Scanned[Scored] | FlowADError, mask_size: int, scaled: Aggregate | None
) -> _Scored | str:
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
    map = maps[one.place]
    score = _terms(one, map, scaled)
    if not np.isfinite(map).all() or not np.isfinite(score).all():
        return "the map or the score is not finite"
    if sample.mask is None:
        return _Scored(sample.label, np.zeros(map.shape, bool), map, score)
    try:
        mask = read_mask(sample.mask, mask_size, one.frame.shape)
    except FrameError as error:
        return str(error)
    empty = f"{sample.mask}: marks no defect at {mask_size}x{mask_size} pixels, its image is called {sample.defect}"
    return _Scored(sample.label, mask, map, score, None if mask.any() else empty)


def _terms(one: Scanned[Scored], map: NDArray[np.float32], scaled: Aggregate | None) -> NDArray[np.float64]:
    """The detector's score, or the terms that are scaled over the test set."""
    if scaled is None:  # Without a calibration the score of several terms is an error, so it is read only when used.
        return np.asarray(one.detection.score[one.place], np.float64)
    if scaled == "diff+sum":
        return np.array([np.ptp(map), map.sum(dtype=np.float64)], np.float64)
    raw = np.asarray(getattr(one.detection, "raw_score", np.zeros(0)))
    if raw.ndim != 2:
        raise ConfigError(f"the detector gives no terms of {scaled}; make it with the aggregate {scaled}")
    return raw[one.place].astype(np.float64)


def _scores(found: Mapping[str, Sequence[_Scored | str]], scaled: Aggregate | None) -> dict[str, NDArray[np.float64]]:
    """The image scores of each category's images that have one, in their order."""
    values = {
        category: np.array([one.score for one in results if not isinstance(one, str)], np.float64)
        for category, results in found.items()
    }
    if scaled is None:
        return values
    if not AGGREGATES[scaled].together:
        return {category: _normalised(terms, terms) for category, terms in values.items()}
    every = [terms for terms in values.values() if len(terms)]
    over = np.concatenate(every) if every else np.zeros((0, 1))
    return {category: _normalised(terms, over) for category, terms in values.items()}


def _normalised(terms: NDArray[np.float64], over: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum (n,) of terms (n, k), each min-max-normalised over others (m, k)."""
    if not len(terms):
        return np.zeros(0)
    low, high = over.min(axis=0), over.max(axis=0)
    return ((terms - low) / np.where(high > low, high - low, 1)).sum(axis=1)


def _score_name(scaled: Aggregate) -> str:
    return TEST_SET_SCORE if scaled == "diff+sum" else f"{scaled} (test-set normalised)"


def _over(scaled: Aggregate, categories: int) -> str:
    over = f"of all {categories} categories together" if AGGREGATES[scaled].together else "of each category by itself"
    return f"the terms of {scaled} were normalised over the test images {over}, defective ones included"


def _class_names(detector: DetectorLike) -> tuple[str, ...]:
    return tuple(getattr(detector, "class_names", ()))


def _pixel_metrics(scored: Sequence[_Scored]) -> tuple[int, Metrics]:
    """How many images have a mask to compare with, and their pixel metrics; none where a label is missing."""
    masks = [one.mask for one in scored if one.unmarked is None and one.mask is not None]
    maps = [one.map for one in scored if one.unmarked is None and one.map is not None]
    if not any(mask.any() for mask in masks) or {one.label for one in scored} != {0, 1}:
        return len(masks), {}
    return len(masks), {**pixel_metrics(np.stack(masks), np.stack(maps))}


def _metrics(labels: Sequence[int], scores: NDArray[np.float64], pixels: Metrics) -> Metrics:
    """All metrics of one category; None for pixel metrics without masks, and where errors left one label only."""
    metrics: Metrics = dict.fromkeys(METRICS)
    if set(labels) == {0, 1}:
        metrics |= image_metrics(labels, scores)
    metrics |= pixels
    return {**metrics, MEAN_AD: mean_ad(metrics)}
