"""A detector over the test set of a data set: metrics, per-image scores, and figures of what it got wrong."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, repeat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowad_fast.data.images import read_frame, read_mask
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.errors import ConfigError, FrameError, nearest
from flowad_fast.evaluation.metrics import METRICS, image_metrics, mean_ad, pixel_metrics
from flowad_fast.evaluation.overlay import overlay

MEAN_AD = "mean_ad"
"""Key of the mean of the seven metrics (mAD)."""
TEST_SET_SCORE = "diff+sum (test-set normalised)"
"""`Report.image_score` when the ranges of the image score came from the evaluated test set itself."""
_SCHEMA = 1

Metrics = dict[str, float | None]
Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]


class Scored(Protocol):
    """What a detector returns for B frames: `map` (B, h, w) and `score` (B,), float32.

    Where it exists, `invalid` (B,) is also read: why a frame cannot be judged, or None.
    """

    @property
    def map(self) -> Any:
        """Anomaly maps (B, h, w), higher = more anomalous."""

    @property
    def score(self) -> Any:
        """Image scores (B,), higher = more anomalous."""


class DetectorLike(Protocol):
    """Any callable from uint8 frames (B, H, W, 3) and class names (None without classes) to `Scored`.

    Attributes that are read where they exist: `class_names`, empty for a detector without classes; `engine` and
    `aggregate`, for the report. A FrameError makes error rows of the frames of the call.
    """

    def __call__(self, frames: Frame, classes: list[str] | None = None, /) -> Scored:
        """Maps and scores of the frames, in their order."""


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

    `metrics` has one entry a category and `mean` their mean, each with the seven `METRICS` and `mean_ad`. A metric is
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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """The report that `to_dict` wrote.

        Raises:
            ConfigError: another schema, or keys that are missing or unknown.
        """
        if values.get("schema") != _SCHEMA:
            raise ConfigError(f"got a report of schema {values.get('schema')}, expected {_SCHEMA}; evaluate again")
        try:
            return cls(**{**values, "images": tuple(ImageRow(**row) for row in values["images"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"got a report with missing or unknown keys ({error}); evaluate again") from error


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
    progress: Callable[[int], object] | None = None,
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
        results = list(_results(detector, samples, batch_size, mask_size, progress, not test_set_normalisation))
        scored = {i: result for i, (_, result) in enumerate(results) if isinstance(result, _Scored)}
        scores = np.array([result.score for result in scored.values()], np.float64)
        if test_set_normalisation and scored:  # the detector was not asked for scores
            scores = _diff_sum(np.stack([result.map for result in scored.values()]))
        score_of = dict(zip(scored, scores.tolist(), strict=True))
        for i, (sample, result) in enumerate(results):
            error = result if isinstance(result, str) else None
            row = ImageRow(str(sample.path), category, sample.defect, sample.label, score_of.get(i), error)
            rows.append(row)
        labels = np.array([results[i][0].label for i in scored])
        metrics[category] = _metrics(labels, scores, list(scored.values()) if dataset.has_masks else None)
    return Report(
        dataset=dataset.name,
        detector=str(getattr(detector, "engine", type(detector).__name__)),
        image_score=TEST_SET_SCORE
        if test_set_normalisation
        else str(getattr(detector, "aggregate", "of the detector")),
        metrics=metrics,
        mean={name: _mean([values[name] for values in metrics.values()]) for name in (*METRICS, MEAN_AD)},
        images=tuple(rows),
    )


def plot_report(report: Report, path: str | Path) -> None:
    """Write a figure with the metrics of each category as bars and, below, a histogram of scores a category."""
    from matplotlib.figure import Figure

    categories = list(report.metrics)
    columns = min(4, len(categories))
    grid_rows = math.ceil(len(categories) / columns)
    figure = Figure(figsize=(max(8, 3 * columns), 3.5 + 2.2 * grid_rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.5, 2.2 * grid_rows]).ravel()

    bars = upper.subplots()
    shown = [name for name in METRICS if any(values[name] is not None for values in report.metrics.values())]
    places = np.arange(len(categories))
    width = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        heights = [100 * value if (value := values[name]) is not None else np.nan for values in report.metrics.values()]
        bars.bar(places + (i - (len(shown) - 1) / 2) * width, heights, width, label=name)
    bars.set_xticks(places, categories, rotation=30 if len(categories) > 4 else 0)
    bars.set(ylabel="%", ylim=(0, 100), title=f"{report.dataset}: {report.detector}, image score {report.image_score}")
    if shown:
        bars.legend(fontsize="small", ncols=len(METRICS), loc="upper center", bbox_to_anchor=(0.5, -0.15))

    cells = lower.subplots(grid_rows, columns, squeeze=False).ravel()
    for cell, category in zip(cells[: len(categories)], categories, strict=True):
        rows = [row for row in report.images if row.category == category and row.score is not None]
        for label, name in enumerate(("good", "defective")):
            values = [row.score for row in rows if row.label == label and row.score is not None]
            edges = np.histogram_bin_edges([row.score for row in rows if row.score is not None], bins=30)
            cell.hist(values, bins=list(edges), alpha=0.6, label=name)
        cell.set_title(category, fontsize="medium")
        cell.tick_params(labelsize="small")
    cells[0].legend(fontsize="small")
    for cell in cells[len(categories) :]:
        cell.set_axis_off()
    figure.savefig(path, dpi=120)


def worst_mistakes(report: Report, n: int = 12) -> list[tuple[ImageRow, float]]:
    """Up to n images that are ranked worst, half good and half defective, each with its share of wrong comparisons.

    That share is the part of the category's images of the other label whose score is on the wrong side: scale-free,
    so that categories compare, and 1 - AUROC on average. Ties are ordered by score: high for good, low for defective.
    """
    scores: dict[tuple[str, int], list[float]] = {}
    for row in report.images:
        if row.score is not None:
            scores.setdefault((row.category, row.label), []).append(row.score)
    ranked: dict[int, list[tuple[ImageRow, float]]] = {0: [], 1: []}
    for row in report.images:
        if row.score is None:
            continue
        sign = -1 if row.label else 1
        others = np.array(scores.get((row.category, 1 - row.label), []))
        wrong = float(np.mean(sign * row.score >= sign * others)) if others.size else 0.0
        ranked[row.label].append((row, wrong))
    for label, sign in ((0, 1), (1, -1)):
        ranked[label].sort(key=lambda item: (item[1], sign * (item[0].score or 0)), reverse=True)
    return ranked[0][: n - n // 2] + ranked[1][: n // 2]


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
    mask: Mask
    map: NDArray[np.float32]
    score: float | None


def _results(
    detector: DetectorLike,
    samples: Sequence[Sample],
    batch_size: int,
    mask_size: int,
    progress: Callable[[int], object] | None,
    with_scores: bool,
) -> Iterator[tuple[Sample, _Scored | str]]:
    """Each sample, in order, with its result or the reason why it has none; the frames of one call have one size."""
    names = _class_names(detector)
    with ThreadPoolExecutor(max_workers=min(8, batch_size)) as pool:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            loaded = zip(batch, pool.map(_load, batch, repeat(mask_size)), strict=True)
            for _, group in groupby(loaded, key=lambda item: isinstance(item[1], str) or item[1][0].shape):
                members, images, errors = [], [], []
                for sample, image in group:
                    if isinstance(image, str):
                        errors.append((sample, image))
                    else:
                        members.append(sample)
                        images.append(image)
                yield from errors
                if members:
                    frames = np.stack([frame for frame, _ in images])
                    try:
                        detection = detector(frames, [s.category for s in members] if names else None)
                    except FrameError as error:
                        yield from ((sample, str(error)) for sample in members)
                        continue
                    yield from zip(members, _scored(detection, [mask for _, mask in images], with_scores), strict=True)
            if progress is not None:
                progress(len(batch))


def _load(sample: Sample, mask_size: int) -> tuple[Frame, Mask] | str:
    try:
        frame = read_frame(sample.path)
        empty = np.zeros((mask_size, mask_size), bool)
        return frame, empty if sample.mask is None else read_mask(sample.mask, mask_size)
    except FrameError as error:
        return str(error)


def _scored(detection: Scored, masks: Sequence[Mask], with_scores: bool) -> Iterator[_Scored | str]:
    maps = np.asarray(detection.map, np.float32)
    if maps.shape != (len(masks), *masks[0].shape):
        raise ConfigError(
            f"the detector gave maps {maps.shape} for {len(masks)} frames, expected the size of the masks "
            f"{masks[0].shape}; set mask_size to the size of the maps"
        )
    # Without a calibration the score of diff+sum is an error, so it is read only when it is used.
    scores = np.asarray(detection.score, np.float32).tolist() if with_scores else [None] * len(masks)
    invalid = getattr(detection, "invalid", (None,) * len(masks))
    for mask, map, score, reason in zip(masks, maps, scores, invalid, strict=True):
        if reason is not None:
            yield reason
        elif not np.isfinite(map).all() or not (score is None or math.isfinite(score)):
            yield "the map or the score is not finite"
        else:
            yield _Scored(mask, map, score)


def _class_names(detector: DetectorLike) -> tuple[str, ...]:
    return tuple(getattr(detector, "class_names", ()))


def _diff_sum(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """The reference code's image score (n,) of maps (n, H, W): normalised range plus normalised sum of each."""
    terms = np.stack([np.ptp(maps, axis=(1, 2)), maps.sum(axis=(1, 2), dtype=np.float64)])
    low, high = terms.min(axis=1, keepdims=True), terms.max(axis=1, keepdims=True)
    return ((terms - low) / np.where(high > low, high - low, 1)).sum(axis=0)


def _metrics(labels: NDArray[np.int_], scores: NDArray[np.float64], pixels: Sequence[_Scored] | None) -> Metrics:
    """All metrics of one category; None for pixel metrics without masks, and where errors left one label only."""
    metrics: Metrics = dict.fromkeys(METRICS)
    if set(labels.tolist()) == {0, 1}:
        metrics |= image_metrics(labels, scores)
        if pixels is not None:
            metrics |= pixel_metrics(np.stack([p.mask for p in pixels]), np.stack([p.map for p in pixels]))
    metrics[MEAN_AD] = mean_ad(metrics)
    return metrics


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
