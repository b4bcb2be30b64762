import warnings

import numpy as np
import pytest

from flowad_fast.errors import CalibrationError
from flowad_fast.stages.decision import Aggregate, Calibration, Range, calibrate, combine, parts_needed, require_parts
from flowad_fast.stages.frames import invalid_frames


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("max", [4.0]), ("mean", [1.5]), ("sum", [6.0]), ("diff", [5.0]), ("diff+sum", [[5.0, 6.0]]), ("top", [4.0])],
)
def test_aggregates(aggregate: Aggregate, expected: list) -> None:
    import torch

    from flowad_fast.stages.score import image_score

    maps = torch.tensor([[[-1.0, 1.0], [2.0, 4.0]]])
    assert image_score(maps, aggregate).tolist() == expected


@pytest.mark.parametrize(("alpha", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.01, 99), (0.03, 33)])
def test_parts_needed_is_the_smallest_number_with_a_finite_threshold(alpha: float, needed: int) -> None:
    assert parts_needed(alpha) == needed
    assert calibrate(np.arange(needed, dtype=np.float32), alpha).classes[""].parts == needed
    with pytest.raises(CalibrationError, match=f"{needed - 1} good parts are too few.*at least {needed} are needed"):
        calibrate(np.arange(needed - 1, dtype=np.float32), alpha)


@pytest.mark.parametrize("raw", [np.zeros(0, np.float32), np.zeros((0, 2), np.float32)])
def test_no_parts_are_too_few(raw: np.ndarray) -> None:
    with pytest.raises(CalibrationError, match="0 good parts are too few"):
        calibrate(raw, 0.9)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(CalibrationError, match="alpha must lie between 0 and 1"):
        calibrate(np.arange(100.0), alpha)


def test_threshold_is_the_conformal_order_statistic() -> None:
    scores = np.random.RandomState(0).permutation(100).astype(np.float32)
    # ceil(101 * 0.95) = 96: the 96th smallest of 0..99.
    assert calibrate(scores, 0.05).classes[""].threshold == 95


@pytest.mark.parametrize(("alpha", "n"), [(0.1, 9), (0.1, 50), (0.05, 30)])
@pytest.mark.parametrize("terms", [1, 2])
def test_false_reject_guarantee_by_simulation(alpha: float, n: int, terms: int) -> None:
    """P(score of a new good part > threshold) <= alpha, for heavy-tailed scores; and not needlessly far below."""
    random = np.random.RandomState(1)
    repeats, rejected = 4000, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heavy tails look like outliers
        for _ in range(repeats):
            raw = random.lognormal(sigma=2.0, size=(n * terms + 1, terms)).astype(np.float32)
            raw = raw[:, 0] if terms == 1 else raw
            one = calibrate(raw[:-1], alpha).classes[""]
            assert one.parts == n
            rejected += combine(raw[-1:], one.ranges)[0] > one.threshold
    noise = 4 * np.sqrt(alpha * (1 - alpha) / repeats)
    assert rejected / repeats <= alpha + noise
    assert rejected / repeats >= alpha - 1 / (n + 1) - noise


def test_each_class_has_its_own_threshold() -> None:
    raw = np.concatenate([np.arange(9), 100 + np.arange(19)]).astype(np.float32)
    fitted = calibrate(raw, 0.1, ["nut"] * 9 + ["screw"] * 19)
    assert fitted.classes["nut"].threshold == 8
    assert fitted.classes["screw"].threshold == 117
    with pytest.raises(CalibrationError, match="9 good parts of class 'nut' are too few.*at least 19"):
        calibrate(raw, 0.05, ["nut"] * 9 + ["screw"] * 19)


def test_diff_plus_sum_needs_twice_the_parts_and_stores_ranges() -> None:
    raw = np.stack([np.arange(18), 10 * np.arange(18)], 1).astype(np.float32)
    fitted = calibrate(raw, 0.1).classes[""]
    # Ranges come from parts 0, 2, ... 16, the threshold from parts 1, 3, ... 17.
    assert fitted.ranges == (Range(low=0, high=16), Range(low=0, high=160))
    assert fitted.parts == 9
    assert fitted.threshold == pytest.approx(2 * 17 / 16)
    with pytest.raises(CalibrationError, match="17 good parts are too few.*diff.sum.*at least 18"):
        calibrate(raw[:17], 0.1)
    require_parts([""] * 18, 0.1, "diff+sum")
    with pytest.raises(CalibrationError, match="at least 18"):
        require_parts([""] * 17, 0.1, "diff+sum")


def test_two_terms_without_ranges_are_refused() -> None:
    with pytest.raises(CalibrationError, match="calibrate the model first"):
        combine(np.zeros((1, 2), np.float32), None)


def test_equal_scores_of_good_parts_do_not_divide_by_zero() -> None:
    fitted = calibrate(np.ones((18, 2), np.float32), 0.1).classes[""]
    assert np.isfinite(combine(np.full((1, 2), 1.5, np.float32), fitted.ranges)).all()
    assert combine(np.full((1, 2), 1.5, np.float32), fitted.ranges)[0] > fitted.threshold


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_by_name(value: float) -> None:
    raw = np.arange(20, dtype=np.float32)
    raw[7] = value
    with pytest.raises(CalibrationError, match="not finite: seven.png"):
        calibrate(raw, 0.1, labels=["x.png"] * 7 + ["seven.png"] + ["x.png"] * 12)


def test_a_contaminated_set_is_warned_about_by_name() -> None:
    raw = np.random.RandomState(0).normal(size=50).astype(np.float32)
    raw[31] = 60
    labels = [f"{i}.png" for i in range(50)]
    with pytest.warns(UserWarning, match=r"1 of 50 calibration parts score far above.*31\.png"):
        calibrate(raw, 0.05, labels=labels)


def test_a_clean_set_is_not_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(np.random.RandomState(0).normal(size=200).astype(np.float32), 0.05)


def test_calibration_survives_json() -> None:
    raw = np.random.RandomState(0).normal(size=(40, 2)).astype(np.float32)
    fitted = calibrate(raw, 0.1)
    assert Calibration.model_validate_json(fitted.model_dump_json()) == fitted


@pytest.mark.parametrize(
    ("low", "high", "reason"),
    [
        (0, 0, "black"),
        (3, 14, "black"),
        (255, 255, "saturated"),
        (250, 252, "saturated"),
        (241, 255, "saturated"),
        (128, 130, "uniform"),
        (0, 40, None),
        (100, 160, None),
        (200, 255, None),
    ],
)
def test_frames_that_cannot_be_judged(low: int, high: int, reason: str | None) -> None:
    frame = np.random.RandomState(0).randint(low, high + 1, (8, 8, 3)).astype(np.uint8)
    frame[0, 0], frame[0, 1] = low, high
    normal = np.random.RandomState(1).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    got = invalid_frames(np.stack([normal, frame]))
    assert got[0] is None
    assert got[1] is None if reason is None else reason in str(got[1])
