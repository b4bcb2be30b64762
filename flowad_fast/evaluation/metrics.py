"""Image and pixel metrics of anomaly detection (the columns of the paper's Table 1), as fractions in [0, 1]."""

from collections.abc import Mapping, Sequence

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


def pixel_metrics(masks: NDArray[np.bool_], maps: NDArray[np.float32]) -> dict[str, float]:
    """AUROC, AP, F1max and AUPRO of anomaly maps (n, H, W) float32 against masks (n, H, W) bool, True = defect.

    Raises:
        ValueError: good or defective pixels are missing, shapes differ, or a map is not finite.
    """
    if masks.shape != maps.shape or maps.ndim != 3:
        raise ValueError(f"got masks {masks.shape} and maps {maps.shape}, expected two arrays of one shape (n, H, W)")
    values = (*_ranking(masks.ravel(), maps.ravel(), "pixels"), _aupro(masks, maps))
    return dict(zip(PIXEL_METRICS, values, strict=True))


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


def _aupro(masks: NDArray[np.bool_], maps: NDArray[np.float32]) -> float:
    """Area under the mean per-region overlap against the false-positive rate, up to `MAX_FPR`, divided by it.

    Exact: each pixel adds its share to one of the two rates, so that one sort gives the whole curve.
    """
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True  # 8-connected within an image, never across images
    regions, count = label(masks, structure=neighbours)
    sizes = np.bincount(regions.ravel())
    share = np.zeros(count + 1)
    share[1:] = 1 / (sizes[1:] * count)

    order = np.argsort(maps, axis=None)[::-1]
    ordered = maps.ravel()[order]
    region = regions.ravel()[order]
    last_of_tie = np.append(np.flatnonzero(np.diff(ordered)), ordered.size - 1)
    overlap = np.append(0, np.cumsum(share[region])[last_of_tie])
    fpr = np.append(0, np.cumsum(region == 0)[last_of_tie] / sizes[0])

    inside = np.searchsorted(fpr, MAX_FPR, side="right")
    x = np.append(fpr[:inside], MAX_FPR)
    y = np.append(overlap[:inside], np.interp(MAX_FPR, fpr, overlap))
    return float(np.trapezoid(y, x) / MAX_FPR)
