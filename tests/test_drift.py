"""Drift on labelled photos: what is compared, and the command from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from flowad_fast.benchmarks.cli import app
from flowad_fast.benchmarks.record import compare, record, report
from flowad_fast.benchmarks.runs import drift
from flowad_fast.errors import ConfigError

RNG = np.random.default_rng(0)
LABELS = np.arange(60) % 3 == 0
SCORES = RNG.normal(size=60) + LABELS
MAPS = RNG.normal(size=(60, 4, 5)).astype(np.float32)


def test_ranks_give_the_auroc_also_with_ties() -> None:
    for scores in (SCORES, SCORES.round()):
        assert drift._auroc(LABELS.astype(int), scores) == pytest.approx(roc_auc_score(LABELS, scores), abs=1e-12)


def test_no_drift_is_zero_everywhere() -> None:
    found = drift.compared(LABELS.astype(int), SCORES, MAPS, SCORES, MAPS)
    assert found.auroc_change == record.Interval(points=0, low=0, high=0)
    assert found.map_rms == found.map_error == found.score_error == 0 and found.score_spearman == 1


def test_a_known_drift_is_found() -> None:
    noisy = SCORES + 3 * RNG.normal(size=60)
    found = drift.compared(LABELS.astype(int), noisy, MAPS + 0.5, SCORES, MAPS)
    change = roc_auc_score(LABELS, noisy) - roc_auc_score(LABELS, SCORES)
    assert found.auroc_change.points == pytest.approx(100 * change, abs=1e-3) != 0
    assert found.auroc_change.low < found.auroc_change.points < found.auroc_change.high
    assert found.map_rms == pytest.approx(0.5 / np.median(MAPS.std((1, 2))), rel=0.01)
    assert found.map_error == pytest.approx(0.5 / MAPS.std((1, 2)).min(), rel=0.01)
    assert found.score_error == pytest.approx(np.abs(noisy - SCORES).max() / SCORES.std(), rel=0.01)
    assert found.score_spearman < 0.9


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for split, kind, count in (("train", "good", 1), ("test", "good", 3), ("test", "scratch", 3)):
        folder = root / "part" / split / kind
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = RNG.integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((80, 80)).save(folder / f"{i}.png")
    masks = root / "part" / "ground_truth" / "scratch"
    masks.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(np.full((80, 80), 255, np.uint8)).save(masks / f"{i}_mask.png")
    return root


def test_the_command_compares_and_writes(photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "drift.json"
    done = CliRunner().invoke(
        app,
        ["drift", "demo", "--data", str(photos), "--layout", "mvtec", "--scorer", "inversion", "--precision",
         "bf16,fp8", "--device", "cpu", "--output", str(target), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    saved = record.read(target)
    assert json.loads(done.stdout) == saved.dump() and saved.kind == "drift"
    exact, bf16, fp8 = saved.cases
    assert exact.map_error == 0 and exact.photos == 6 and exact.defective == 3
    assert 0 < bf16.map_rms < fp8.map_rms < 1 and bf16.score_spearman > 0.8
    assert "emulated" not in fp8.engine and fp8.precision == "fp8"
    text = report.drift_markdown(saved)
    assert "| inversion | fp8 |" in text and "6 photos of" in text
    with pytest.raises(ConfigError, match="no speeds to compare"):
        compare.compare(saved, saved)


def test_a_precision_that_cannot_run_is_refused_at_once(photos: Path) -> None:
    done = CliRunner().invoke(app, ["drift", "demo", "--precision", "tf32", "--device", "cpu"])
    assert done.exit_code != 0 and "tf32 is a mode of NVIDIA GPUs" in str(done.exception)
