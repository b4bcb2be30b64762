"""Image and pixel metrics of anomaly detection (the columns of the paper's Table 1), as fractions in [0, 1]."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label
from sklearn.metrics import precision_recall_curve, roc_auc_score

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "pixel_aupro")
METRICS = IMAGE_METRICS + PIXEL_METRICS
"""The seven whose mean is mAD, in the order of the table."""

MAX_FPR = 0.3
"""AUPRO is integrated from a false-positive rate of 0 to this one, and divided by it."""


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """AUROC, AP and F1max of image scores (n,), higher = more anomalous, against labels (n,), 1 = defective.

    Raises:
        ValueError: good or defective images are missing, or a score is not finite.
    """
    values = _ranking(np.asarray(labels).astype(bool), np.asarray(scores), "images")
    return dict(zip(IMAGE_METRICS, values, strict=True))


def pixel_metrics(
    masks: Sequence[NDArray[np.bool_]] | NDArray[np.bool_],
    maps: Sequence[NDArray[np.float32]] | NDArray[np.float32],
    judged: Sequence[NDArray[np.bool_] | None] | None = None,
) -> dict[str, float]:
    """AUROC, AP, F1max and AUPRO of n anomaly maps (H, W) float32 against masks (H, W) bool, True = defect.

    Images may differ in size. Of each, those pixels count that are `judged` (H, W), None for all.

    Raises:
        ValueError: good or defective pixels are missing, shapes differ, or a map is not finite.
    """
    shapes = [one.shape for one in masks], [one.shape for one in maps]
    if shapes[0] != shapes[1] or not all(len(shape) == 2 for shape in shapes[0]):
        mask, map = ((len(found), *(found[0] if found else ())) for found in shapes)
        raise ValueError(f"got masks {mask} and maps {map}, expected as many (n), each map (H, W) of its mask's shape")
    counted = [np.s_[:] if one is None else one for one in judged or [None] * len(shapes[0])]
    defects = np.concatenate([mask[where].ravel() for mask, where in zip(masks, counted, strict=True)])
    values = np.concatenate([map[where].ravel() for map, where in zip(maps, counted, strict=True)])
    found = (*_ranking(defects, values, "pixels"), _aupro(_numbered(masks, counted), values))
    return dict(zip(PIXEL_METRICS, found, strict=True))


@dataclass(frozen=True)
class RegionCounts:
    """What the regions of test images touched, in cells of the map (masks are resized to it).

    A defect is an 8-connected component of a mask. It is touched if a cell of it is in a region. Every region on a good
    part is false; on a defective part, one is false that touches no defect.

    Attributes:
        defects: of images with a mask.
        touched: of these, by at least one region.
        good_parts: images of good parts.
        good_with_regions: of these, with at least one region.
        false_on_good: regions on good parts.
        defective_parts: images of defective parts with a mask.
        false_on_defective: regions on them that touch no defect.
    """

    defects: int
    touched: int
    good_parts: int
    good_with_regions: int
    false_on_good: int
    defective_parts: int
    false_on_defective: int

    @property
    def false_per_good_part(self) -> float | None:
        """False regions per good part; None without good parts."""
        return self.false_on_good / self.good_parts if self.good_parts else None


def region_counts(images: Iterable[tuple[NDArray[np.bool_] | None, NDArray[np.int32]]]) -> RegionCounts:
    """Count over images: the mask (H, W) of a defective one, None for a good part, and its regions' cells (H, W).

    Regions are numbered from 1, 0 is outside, as `Detection.marked` gives them.

    Raises:
        ValueError: a mask of another shape than the regions, or one that marks nothing.
    """
    defects = touched = good = good_with = on_good = defective = on_defective = 0
    for mask, regions in images:
        numbers = np.unique(regions[regions > 0])
        if mask is None:
            good += 1
            good_with += len(numbers) > 0
            on_good += len(numbers)
            continue
        if mask.shape != regions.shape or not mask.any():
            raise ValueError(f"got a mask {mask.shape} of {mask.sum()} and regions {regions.shape}, expected one shape")
        components, count = label(mask, structure=np.ones((3, 3), bool))
        both = mask & (regions > 0)
        defective += 1
        defects += count
        touched += len(np.unique(components[both]))
        on_defective += len(numbers) - len(np.unique(regions[both]))
    return RegionCounts(defects, touched, good, good_with, on_good, defective, on_defective)


def mean_ad(metrics: Mapping[str, float | None]) -> float | None:
    """The mean of the seven `METRICS` (the paper's mAD); None where one of them is missing."""
    return mean([metrics.get(name) for name in METRICS])


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values; None where one of them is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _ranking(labels: NDArray[np.bool_], scores: NDArray[np.floating], unit: str) -> tuple[float, float, float]:
    """(AUROC, AP, F1max) of scores (n,) against labels (n,)."""
    if labels.all() or not labels.any():
        missing = "good" if labels.all() and labels.size else "defective"
        raise ValueError(f"no {missing} {unit} among {labels.size}; a ranking metric needs good and defective ones")
    if not np.isfinite(scores).all():
        raise ValueError(f"got scores of {unit} that are NaN or infinite, expected finite ones; leave those images out")
    precision, recall, _ = precision_recall_curve(labels, scores)
    average_precision = -np.sum(np.diff(recall) * precision[:-1])
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    return float(roc_auc_score(labels, scores)), float(average_precision), float(f1.max())


def _numbered(masks: Sequence[NDArray[np.bool_]] | NDArray[np.bool_], counted: Sequence[Any]) -> NDArray[np.int32]:
    """The pixels that count of all masks, one after the other: the number of their defect from 1 on, 0 outside.

    A defect is 8-connected within an image.
    """
    numbers, total = [], 0
    for mask, where in zip(masks, counted, strict=True):
        regions, count = label(mask, structure=np.ones((3, 3), bool))
        numbers.append(np.where(regions > 0, regions + total, 0)[where].ravel().astype(np.int32))
        total += count
    return np.concatenate(numbers)


def _aupro(regions: NDArray[np.int32], maps: NDArray[np.float32]) -> float:
    """Area under the mean per-region overlap against the false-positive rate, up to `MAX_FPR`, divided by it.

    Exact: each pixel adds its share to one of the two rates, so that one sort gives the whole curve.

    Args:
        regions: the number of each pixel's defect (m,), 0 outside.
        maps: its value (m,).
    """
    sizes = np.bincount(regions)
    seen = sizes > 0  # a defect of which no pixel counts is none
    seen[0] = False
    share = np.zeros(len(sizes))
    share[seen] = 1 / (sizes[seen] * seen.sum())

    order = np.argsort(maps)[::-1]
    ordered = maps[order]
    region = regions[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(ordered)), ordered.size - 1)
    overlap = np.append(0, np.cumsum(share[region])[last_of_tie])
    fpr = np.append(0, np.cumsum(region == 0)[last_of_tie] / sizes[0])

    inside = np.searchsorted(fpr, MAX_FPR, side="right")
    x = np.append(fpr[:inside], MAX_FPR)
    y = np.append(overlap[:inside], np.interp(MAX_FPR, fpr, overlap))
    return float(np.trapezoid(y, x) / MAX_FPR)
