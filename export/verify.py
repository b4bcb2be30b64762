"""The parity certificate: an artefact against the fp32 reference, on the same real frames."""

from dataclasses import dataclass

import numpy as np
import torch

from flowad_fast.bundle import Parity
from flowad_fast.config import Precision
from flowad_fast.decision import Aggregate, image_score
from flowad_fast.engines import Engine
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.reference_path import reference_map
from flowad_fast.scorers import Density, Scorer

TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1, "fp8": 4e-1}
"""Largest map error, relative to the standard deviation of the reference map, by precision."""


@dataclass(frozen=True)
class ParityFrames:
    """Frames uint8 (n, H, W, 3), where they come from, and (where known) labels 0/1 and classes of each."""

    frames: np.ndarray
    source: str
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None


def reference_outputs(
    model: FlowModel, scorer: Scorer, aggregate: Aggregate, frames: np.ndarray, y: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Map (n, S, S) and raw score of the fp32 reference.

    The training form, adaLN computed at every step. For density the divergence comes from the forward-mode scorer,
    which the tests hold against the exact trace; reverse mode has other per-location noise.
    """
    classes = None if y is None else torch.from_numpy(y)
    maps = []
    for i in range(len(frames)):
        y1 = None if classes is None else classes[i : i + 1]
        x1 = model.features(frames[i : i + 1])
        maps.append(scorer.map(model, x1, y1) if isinstance(scorer, Density) else reference_map(model, scorer, x1, y1))
    upsampled = ops.upsample(torch.cat(maps), model.spec.image.size)
    return upsampled.numpy(), image_score(upsampled, aggregate).numpy()


def compare(
    got: tuple[np.ndarray, np.ndarray],
    expected: tuple[np.ndarray, np.ndarray],
    source: str,
    precision: Precision,
    labels: np.ndarray | None = None,
) -> Parity:
    """The certificate for maps and raw scores of n frames; anything that is not finite fails."""
    (maps, raw), (ref_maps, ref_raw) = got, expected
    error = maps.astype(np.float64) - ref_maps
    scale = float(ref_maps.std()) or 1.0
    worst = float(np.abs(error).max()) / scale if np.isfinite(error).all() else float("inf")
    rms = float(np.sqrt((error**2).mean())) / scale if np.isfinite(error).all() else float("inf")
    tolerance = TOLERANCES[precision]
    first, ref_first = raw.reshape(len(raw), -1)[:, 0], ref_raw.reshape(len(ref_raw), -1)[:, 0]
    score_scale = float(ref_first.std()) or float(np.abs(ref_first).max()) or 1.0
    score_error = float(np.abs(first - ref_first).max()) / score_scale
    spearman = auroc_difference = None
    if len(raw) > 2:
        from scipy.stats import spearmanr

        spearman = float(spearmanr(first, ref_first).statistic)
    if labels is not None and 0 < labels.sum() < len(labels):
        from sklearn.metrics import roc_auc_score

        auroc_difference = float(roc_auc_score(labels, first) - roc_auc_score(labels, ref_first))
    return Parity(
        passed=bool(worst <= tolerance and np.isfinite(score_error) and score_error <= 10 * tolerance),
        frames=len(maps),
        source=source,
        scale=scale,
        max_error=min(worst, 1e30),
        rms_error=min(rms, 1e30),
        spearman=spearman,
        score_error=min(score_error, 1e30) if np.isfinite(score_error) else 1e30,
        tolerance=tolerance,
        auroc_difference=auroc_difference,
    )


def run_in_batches(
    engine: Engine, frames: np.ndarray, y: np.ndarray | None, batch: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """An engine's outputs for many frames, in batches that are not all equal, so that a fixed batch shows itself."""
    parts = [
        engine.run(frames[i : i + batch], None if y is None else y[i : i + batch]) for i in range(0, len(frames), batch)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
