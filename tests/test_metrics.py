"""Metrics against hand-computed values and against brute force over every threshold."""

import numpy as np
import pytest
from scipy.stats import rankdata

from flowad_fast.evaluation.metrics import METRICS, image_metrics, mean_ad, pixel_metrics


def brute_ranking(labels, scores):
    """(AUROC, AP, F1max) by counting pairs and by trying every score as a threshold."""
    good, bad = scores[~labels], scores[labels]
    pairs = [1.0 if b > g else 0.5 if b == g else 0.0 for b in bad for g in good]
    f1, ap, recall_before = 0.0, 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        hit = scores >= threshold
        true, false = (hit & labels).sum(), (hit & ~labels).sum()
        recall, precision = true / labels.sum(), true / (true + false)
        f1 = max(f1, 2 * true / (2 * true + false + (labels & ~hit).sum()))
        ap += (recall - recall_before) * precision
        recall_before = recall
    return sum(pairs) / len(pairs), ap, f1


def flood_regions(mask):
    """8-connected regions of one mask, as lists of (row, column), by flood fill."""
    todo, regions = {tuple(p) for p in np.argwhere(mask)}, []
    while todo:
        front, region = [todo.pop()], []
        while front:
            r, c = front.pop()
            region.append((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & todo
            todo -= near
            front += near
        regions.append(region)
    return regions


def brute_aupro(masks, maps, limit=0.3):
    """Region overlap against FPR at every threshold, integrated on a fine grid of FPR."""
    regions = [[(i, r, c) for r, c in region] for i, mask in enumerate(masks) for region in flood_regions(mask)]
    fpr, pro = [0.0], [0.0]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        hit = maps >= threshold
        fpr.append((hit & ~masks).sum() / (~masks).sum())
        pro.append(np.mean([np.mean([hit[p] for p in region]) for region in regions]))
    grid = np.linspace(0, limit, 200_001)[1:]
    return np.interp(grid, fpr, pro).mean()


@pytest.mark.parametrize("levels", [3, 20, None])
@pytest.mark.parametrize("seed", range(4))
def test_image_metrics_equal_brute_force(seed, levels):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.random(38) < 0.4, [True, False])
    scores = rng.normal(size=40) + labels
    if levels:
        scores = np.round(scores * levels / 6)  # many ties
    expected = brute_ranking(labels, scores)
    assert list(image_metrics(labels, scores).values()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("levels", [4, 50, None])
@pytest.mark.parametrize("seed", range(3))
def test_pixel_metrics_equal_brute_force(seed, levels):
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 9, 11)) < 0.15
    masks[0] = False
    maps = (rng.normal(size=masks.shape) + 0.8 * masks).astype(np.float32)
    if levels:
        maps = np.round(maps * levels / 6).astype(np.float32)
    got = pixel_metrics(masks, maps)
    expected = brute_ranking(masks.ravel(), maps.ravel())
    assert [got[k] for k in ("pixel_auroc", "pixel_ap", "pixel_f1max")] == pytest.approx(expected, abs=1e-9)
    assert got["pixel_aupro"] == pytest.approx(brute_aupro(masks, maps), abs=1e-3)


def test_image_metrics_by_hand():
    # Descending: bad, good, bad, good. 3 of 4 pairs right; precision 1 and 2/3 at recall 1/2 and 1.
    got = image_metrics([0, 1, 0, 1], [0.1, 0.4, 0.5, 0.9])
    assert got == pytest.approx({"image_auroc": 0.75, "image_ap": 0.5 + 0.5 * 2 / 3, "image_f1max": 0.8})


def test_all_scores_equal_is_chance():
    got = image_metrics([0, 1, 1, 0], [2.0, 2.0, 2.0, 2.0])
    assert got == pytest.approx({"image_auroc": 0.5, "image_ap": 0.5, "image_f1max": 2 / 3})


def test_aupro_by_hand():
    # 10 good pixels; regions of 1 and 4 pixels weigh the same. Order: small region, 1 good pixel, large region, rest.
    masks = np.zeros((1, 3, 5), bool)
    masks[0, 0, 0] = True
    masks[0, 1:3, 3:5] = True
    maps = np.zeros((1, 3, 5), np.float32)
    maps[0, 0, 0], maps[0, 0, 2] = 3, 2
    maps[masks & (maps == 0)] = 1
    # Overlap is 0.5 up to FPR 0.1, then 1.
    assert pixel_metrics(masks, maps)["pixel_aupro"] == pytest.approx((0.1 * 0.5 + 0.2 * 1) / 0.3, abs=1e-12)


def test_aupro_interpolates_at_the_limit():
    # All pixels tied: the curve is the line from (0, 0) to (1, 1). All good pixels tied, after the region: it is 1.
    masks = np.zeros((1, 2, 2), bool)
    masks[0, 0, 0] = True
    constant = np.zeros((1, 2, 2), np.float32)
    assert pixel_metrics(masks, constant)["pixel_aupro"] == pytest.approx(0.15, abs=1e-12)
    assert pixel_metrics(masks, masks.astype(np.float32))["pixel_aupro"] == pytest.approx(1.0, abs=1e-12)


def test_regions_join_diagonally_but_not_across_images():
    masks = np.zeros((2, 2, 4), bool)
    masks[0, [0, 1], [0, 1]] = True  # one region of two pixels
    masks[1, 0, 0] = True  # another, at the same place of the next image
    maps = np.zeros((2, 2, 4), np.float32)
    maps[1, 0, 0], maps[0, 0, 0] = 2, 1
    # Mean of 1/2 and 1 at FPR 0, then a line to 1 at FPR 1.
    assert pixel_metrics(masks, maps)["pixel_aupro"] == pytest.approx(0.75 + 0.15 * 0.25, abs=1e-12)


def test_monotone_transform_changes_nothing():
    rng = np.random.default_rng(5)
    masks = rng.random((2, 8, 8)) < 0.2
    maps = rng.normal(size=masks.shape).astype(np.float32)
    assert pixel_metrics(masks, maps) == pytest.approx(pixel_metrics(masks, np.exp(maps)))


def test_ranks_give_the_same_image_metrics():
    rng = np.random.default_rng(6)
    labels, scores = rng.random(30) < 0.5, np.round(rng.normal(size=30), 1)
    assert image_metrics(labels, scores) == pytest.approx(image_metrics(labels, rankdata(scores)))


@pytest.mark.parametrize(("labels", "missing"), [([0, 0], "no defective images"), ([1, 1], "no good images")])
def test_one_class_says_what_is_missing(labels, missing):
    with pytest.raises(ValueError, match=missing):
        image_metrics(labels, [0.1, 0.2])


def test_no_images():
    with pytest.raises(ValueError, match="among 0"):
        image_metrics([], [])


def test_masks_without_defects():
    with pytest.raises(ValueError, match="no defective pixels"):
        pixel_metrics(np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="no good pixels"):
        pixel_metrics(np.ones((1, 2, 2), bool), np.zeros((1, 2, 2), np.float32))


def test_shapes_must_match():
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*\(1, 2, 3\)"):
        pixel_metrics(np.zeros((1, 2, 2), bool), np.zeros((1, 2, 3), np.float32))


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        image_metrics([0, 1], [0.0, np.nan])


def test_mean_ad_needs_all_seven():
    full = dict.fromkeys(METRICS, 0.5) | {"image_ap": 1.0}
    assert mean_ad(full) == pytest.approx(4 / 7)
    assert mean_ad(full | {"pixel_ap": None}) is None
    assert mean_ad(dict.fromkeys(METRICS[:3], 0.5)) is None
