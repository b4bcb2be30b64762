"""A detector over the test set of a data set: metrics and per-image scores."""

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flowad_fast.data.images import read_mask
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.detector import Detection
from flowad_fast.errors import ConfigError, FlowADError, FrameError, nearest
from flowad_fast.evaluation.figures import plot_report as plot_report
from flowad_fast.evaluation.figures import save_mistakes as save_mistakes
from flowad_fast.evaluation.figures import worst_mistakes as worst_mistakes
from flowad_fast.evaluation.metrics import (
    METRICS,
    RegionCounts,
    image_metrics,
    mean,
    mean_ad,
    pixel_metrics,
    region_counts,
)
from flowad_fast.evaluation.overlay import resized
from flowad_fast.evaluation.report import MEAN_AD, ImageRow, Metrics, Report, Scored, class_names
from flowad_fast.evaluation.report import DetectorLike as DetectorLike
from flowad_fast.evaluation.scanning import FrameFiles, Scanned, scan
from flowad_fast.stages.aggregates import AGGREGATES, Aggregate

TEST_SET_SCORE = "diff+sum (test-set normalised)"
"""`Report.image_score` of FlowAD's evaluation: the ranges of its terms came from the evaluated test set itself."""
PUBLISHED = (
    "published numbers are those of the checkpoint that was best on the test set, and FlowAD's code bins scores for "
    "F1max, pixel AUROC and AUPRO; the metrics here are exact"
)
"""What a comparison with published numbers must know."""


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
    mask_size: int | None = 256,
    progress: Callable[[int], object] = lambda n: None,
    test_set_normalisation: bool | Aggregate = False,
    remarks: Sequence[str] = (),
    score: "Callable[[Mapping[str, Sequence[Sample]], Scoring], Generator[Contribution, None, None]] | None" = None,
) -> Report:
    """Run the detector over the test images of `categories` (default: all) and compare with labels and masks.

    Masks are resized to (mask_size, mask_size), the size of the detector's maps; None compares at the size of each
    image, to which its map is enlarged, as detectors need that cut frames into tiles. What a detection says was not
    judged is in no pixel metric, and a defect there is none. `progress(n)` is called after each n images.

    An image that cannot be read (or its mask), whose mask does not fit it, that the detector refuses, or that it calls
    invalid, becomes an error row, and the metrics leave it out. A mask of a defective image that marks nothing leaves
    it out of the pixel metrics alone. `remarks` go into the report.

    `score` does the detector's work elsewhere: it is given the images of each category and how they are scored, and
    yields what `Scoring.contributions` would, category by category.

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
    names = class_names(detector)
    for category in chosen:
        if names and category not in names:
            raise ConfigError(f"the detector has no class {category!r}; {nearest(category, names)}")
    how = Scoring(batch_size, mask_size, scaled)
    elsewhere = None if score is None else score(chosen, how)
    found: dict[str, list[Contribution]] = {}
    pixels: dict[str, tuple[int, Metrics]] = {}
    regions: dict[str, RegionCounts] = {}
    for category, samples in chosen.items():
        results: list[Contribution] = []
        ours = how.contributions(detector, samples) if elsewhere is None else itertools.islice(elsewhere, len(samples))
        for result in ours:
            results.append(result)
            progress(1)
        if dataset.has_masks:
            pixels[category] = _pixel_metrics([result for result in results if not isinstance(result, str)])
        if (counts := _region_counts(results)) is not None:
            regions[category] = counts
        # Maps fill memory, and only scores are compared across categories.
        found[category] = [
            one if isinstance(one, str) else replace(one, map=None, mask=None, regions=None, judged=None)
            for one in results
        ]
    if elsewhere is not None:
        elsewhere.close()
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
        regions=regions,
    )


@dataclass(frozen=True)
class Scoring:
    """How images are scored: images per call, and `evaluate`'s `mask_size` and aggregate that the test set scales."""

    batch: int
    mask_size: int | None
    scaled: Aggregate | None

    def contributions(self, detector: DetectorLike, samples: Sequence[Sample]) -> "Iterator[Contribution]":
        """What each image of one category contributes, in order; for `evaluate`."""
        frames = FrameFiles([one.path for one in samples])
        classes = [one.category for one in samples] if class_names(detector) else None
        for sample, one in zip(samples, scan(detector, frames, classes, self.batch), strict=True):
            yield _result(sample, one, self.mask_size, self.scaled)


@dataclass(frozen=True)
class _Scored:
    """`score` is one number, or the terms that are to be normalised; pictures are None once they were compared.

    `regions` are the cells (H, W) int32 of `Detection.marked`, None where they cannot be told; `judged` (H, W) those
    that count, None for all.
    """

    label: int
    mask: NDArray[np.bool_] | None
    map: NDArray[np.float32] | None
    score: NDArray[np.float64]
    regions: NDArray[np.int32] | None = None
    unmarked: str | None = None
    judged: NDArray[np.bool_] | None = None


Contribution = _Scored | str
"""What an image contributes to the metrics, or the reason why it is in none."""


def _result(
    sample: Sample, one: Scanned[Scored] | FlowADError, mask_size: int | None, scaled: Aggregate | None
) -> Contribution:
    """What a test image contributes to the metrics, or the reason why it does not."""
    if isinstance(one, ConfigError):  # the same for every image
        raise one
    if isinstance(one, FlowADError):
        return str(one)
    maps = np.asarray(one.detection.map, np.float32)
    if mask_size is not None and maps.shape[1:] != (mask_size, mask_size):
        raise ConfigError(
            f"the detector gave maps {maps.shape}, expected the size of the masks, {mask_size}x{mask_size}; "
            "set mask_size to the size of the maps"
        )
    invalid: Sequence[str | None] | None = getattr(one.detection, "invalid", None)
    if invalid is not None and (reason := invalid[one.place]) is not None:
        return reason
    map = maps[one.place]
    judged: NDArray[np.bool_] | None = getattr(one.detection, "judged", None)
    score = _terms(one, map if judged is None else map[judged], scaled)
    if not np.isfinite(map).all() or not np.isfinite(score).all():
        return "the map or the score is not finite"
    regions = _regions(one)
    if mask_size is None and map.shape != (size := one.frame.shape[:2]):
        map = resized(map, size)
        regions = None if regions is None else resized(regions, size, nearest=True)
        judged = None if judged is None else resized(judged, size, nearest=True)
    if sample.mask is None:
        return _Scored(sample.label, np.zeros(map.shape, bool), map, score, regions, judged=judged)
    try:
        mask = read_mask(sample.mask, map.shape, one.frame.shape)
    except FrameError as error:
        return str(error)
    where = f"at {map.shape[0]}x{map.shape[1]} pixels"
    if judged is not None:
        mask, where = mask & judged, f"{where} that are judged"
    empty = f"{sample.mask}: marks no defect {where}, its image is called {sample.defect}"
    return _Scored(sample.label, mask, map, score, regions, None if mask.any() else empty, judged)


def _regions(one: Scanned[Scored]) -> NDArray[np.int32] | None:
    """The cells of an image's regions, None where the detector is none of ours, or they cannot be told."""
    detection, place = one.detection, one.place
    if not isinstance(detection, Detection) or detection.no_regions[place]:
        return None
    return detection.marked(place)


def _terms(one: Scanned[Scored], map: NDArray[np.float32], scaled: Aggregate | None) -> NDArray[np.float64]:
    """The detector's score, or the terms that are scaled over the test set; `map` holds the values that count."""
    if scaled is None:  # Without a calibration the score of several terms is an error, so it is read only when used.
        return np.asarray(one.detection.score[one.place], np.float64)
    if scaled == "diff+sum":
        return np.array([np.ptp(map), map.sum(dtype=np.float64)], np.float64)
    raw = np.asarray(getattr(one.detection, "raw_score", np.zeros(0)))
    if raw.ndim != 2:
        raise ConfigError(f"the detector gives no terms of {scaled}; make it with the aggregate {scaled}")
    return raw[one.place].astype(np.float64)


def _scores(found: Mapping[str, Sequence[Contribution]], scaled: Aggregate | None) -> dict[str, NDArray[np.float64]]:
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


def _pixel_metrics(scored: Sequence[_Scored]) -> tuple[int, Metrics]:
    """How many images have a mask to compare with, and their pixel metrics; none where a label is missing."""
    known = [one for one in scored if one.unmarked is None]
    masks = [one.mask for one in known if one.mask is not None]
    maps = [one.map for one in known if one.map is not None]
    if not any(mask.any() for mask in masks) or {one.label for one in scored} != {0, 1}:
        return len(masks), {}
    return len(masks), {**pixel_metrics(masks, maps, [one.judged for one in known])}


def _region_counts(results: Sequence[Contribution]) -> RegionCounts | None:
    """The counts of one category; None where the regions of an image cannot be told."""
    found = [
        (one.mask if one.label else None, one.regions)
        for one in results
        if not isinstance(one, str) and (one.label == 0 or (one.mask is not None and one.mask.any()))
    ]
    known = [(mask, regions) for mask, regions in found if regions is not None]
    return region_counts(known) if known and len(known) == len(found) else None


def _metrics(labels: Sequence[int], scores: NDArray[np.float64], pixels: Metrics) -> Metrics:
    """All metrics of one category; None for pixel metrics without masks, and where errors left one label only."""
    metrics: Metrics = dict.fromkeys(METRICS)
    if set(labels) == {0, 1}:
        metrics |= image_metrics(labels, scores)
    metrics |= pixels
    return {**metrics, MEAN_AD: mean_ad(metrics)}
