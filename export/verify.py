"""The parity certificate: an artefact against the fp32 reference, on the same real frames."""

from dataclasses import dataclass

import numpy as np
import torch

from flowad_fast.bundle import Parity
from flowad_fast.config import Precision
from flowad_fast.engines import Engine
from flowad_fast.errors import ParityError
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.stages.decision import Aggregate
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import Scorer


@dataclass(frozen=True)
class Tolerance:
    """Largest and RMS map error, both relative to the standard deviation of the reference map."""

    max: float
    rms: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(1e-3, 1e-4),
    "tf32": Tolerance(2e-2, 4e-3),
    "fp16": Tolerance(2e-2, 4e-3),
    "bf16": Tolerance(1e-1, 2e-2),
    "fp8": Tolerance(5e-1, 1e-1),
}
"""By precision. Worst drift (max, RMS) of the demo checkpoint over the scorers, torch on a CPU: fp32 5e-6 and 7e-7,
fp16 4e-3 and 7e-4, bf16 7e-2 and 6e-3, fp8 (emulated) 3e-1 and 6e-2, all from reconstruction with the inversion start,
which is twice as long; the others stay at a fifth of that. There is room for deeper models; tf32 was not measured."""
HUGE = 1e30
"""Stands for an error that is not finite, which JSON cannot hold."""


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

    See `Scorer.expected`: the training form, adaLN computed at every evaluation.
    """
    classes = None if y is None else torch.from_numpy(y)
    maps = []
    for i in range(len(frames)):
        y1 = None if classes is None else classes[i : i + 1]
        x1 = model.features(frames[i : i + 1])
        maps.append(scorer.expected(model, x1, y1))
    upsampled = ops.upsample(torch.cat(maps), model.spec.image.size)
    return upsampled.numpy(), image_score(upsampled, aggregate).numpy()


def compare(
    got: tuple[np.ndarray, np.ndarray],
    expected: tuple[np.ndarray, np.ndarray],
    source: str,
    precision: Precision,
    device: str,
    labels: np.ndarray | None = None,
    aggregate: Aggregate = "max",
) -> Parity:
    """The certificate for maps (n, S, S) and raw scores (n,) or (n, 2); anything that is not finite fails.

    A score may be off by what the largest map error that is allowed can do to its aggregate, and no more. Of two score
    terms (aggregate diff+sum) the worse one counts. Rank correlation needs three frames, the AUROC difference labels
    (n,) of both kinds; what was not measured is None.

    Raises:
        ParityError: the reference itself is not finite, or the artefact's outputs have other shapes.
    """
    (maps, raw), (ref_maps, ref_raw) = got, expected
    if not (np.isfinite(ref_maps).all() and np.isfinite(ref_raw).all()):
        raise ParityError("the fp32 reference is not finite on these frames; check them, and the checkpoint")
    if maps.shape != ref_maps.shape or raw.shape != ref_raw.shape:
        raise ParityError(
            f"outputs are map {maps.shape} and score {raw.shape}, expected {ref_maps.shape} and {ref_raw.shape}"
        )
    tolerance = TOLERANCES[precision]
    error = np.abs(maps.astype(np.float64) - ref_maps)
    scale = float(ref_maps.std()) or 1.0
    worst, rms = float(error.max()) / scale, float(np.sqrt((error**2).mean())) / scale
    terms = list(zip(raw.reshape(len(raw), -1).T.astype(np.float64), ref_raw.reshape(len(raw), -1).T, strict=True))
    score_error = max(float(np.abs(a - b).max()) / (float(b.std()) or float(np.abs(b).max()) or 1.0) for a, b in terms)
    excess = max(
        float(np.abs(a - b).max()) / (unit * scale)
        for (a, b), unit in zip(terms, _units(aggregate, maps[0].size), strict=True)
    )
    finite = bool(np.isfinite(maps).all() and np.isfinite(raw).all())
    spearman = auroc_difference = None
    if finite and len(raw) > 2 and all(len(set(a)) > 1 < len(set(b)) for a, b in terms):
        from scipy.stats import spearmanr

        spearman = min(float(spearmanr(a, b).statistic) for a, b in terms)
    if finite and labels is not None and 0 < labels.sum() < len(labels):
        from sklearn.metrics import roc_auc_score

        differences = [float(roc_auc_score(labels, a) - roc_auc_score(labels, b)) for a, b in terms]
        auroc_difference = max(differences, key=abs)
    return Parity(
        passed=finite and max(worst, excess) <= tolerance.max and rms <= tolerance.rms,
        frames=len(maps),
        source=source,
        device=device,
        scale=scale,
        max_error=worst if finite else HUGE,
        rms_error=rms if finite else HUGE,
        spearman=spearman,
        score_error=score_error if finite else HUGE,
        tolerance=tolerance.max,
        rms_tolerance=tolerance.rms,
        auroc_difference=auroc_difference,
    )


def _units(aggregate: Aggregate, pixels: int) -> tuple[int, ...]:
    """How far a map error of one in every pixel can move each term of an aggregate."""
    return {"max": (1,), "mean": (1,), "sum": (pixels,), "diff": (2,), "diff+sum": (2, pixels)}[aggregate]


def run_in_batches(
    engine: Engine, frames: np.ndarray, y: np.ndarray | None, batch: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """An engine's outputs for many frames, in batches that are not all equal, so that a fixed batch shows itself."""
    parts = [
        engine.run(frames[i : i + batch], None if y is None else y[i : i + batch]) for i in range(0, len(frames), batch)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
