"""The certificate of a student: the scores of both on parts that neither was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowad_fast.checkpoints.load import load_checkpoint, save_checkpoint
from flowad_fast.config import Ranking, StudentCertificate, VelocityConfig
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.evaluation.certificate import RESAMPLES, ranking
from flowad_fast.kernels.account import account
from flowad_fast.kernels.reference import upsample_score
from flowad_fast.model import FlowModel
from flowad_fast.stages.aggregates import Aggregate, Heat, norm_power
from flowad_fast.stages.integration import from_tokens
from flowad_fast.stages.score import aggregated
from flowad_fast.stages.scorers import Scorer
from flowad_fast.stages.velocity import sizes
from flowad_fast.training.batches import DirectFeatures, Progress
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.students import Teacher, perturbed

AGGREGATES: tuple[Aggregate, ...] = ("max", "top")
"""Image scores that are compared."""
_BATCH = 8
_HELD_OUT = 10
"""One training part of so many is held out where a data set has no other parts."""


@dataclass(frozen=True)
class Parts:
    """What a student is trained and certified on; `labelled` where every category has good and defective parts."""

    training: tuple[Sample, ...]
    tested: tuple[Sample, ...]
    labelled: bool
    description: str


def divided(dataset: Dataset, categories: Sequence[str], training: tuple[Sample, ...]) -> Parts:
    """The training parts, and others for the certificate: labelled test parts, else good ones that are held out."""
    tests = {category: dataset.select("test", category) for category in categories}
    if all({sample.label for sample in samples} == {0, 1} for samples in tests.values()):
        tested = tuple(sample for samples in tests.values() for sample in samples)
        return Parts(training, tested, True, f"labelled test parts of {dataset.name}")
    good = tuple(
        sample
        for category in categories
        for split in ("test", "calibration")
        for sample in dataset.select(split, category, 0)
    )
    if {sample.category for sample in good} == set(categories):
        return Parts(training, good, False, f"good test parts of {dataset.name}, and the same perturbed")
    held: list[Sample] = []
    for category in categories:
        own = [sample for sample in training if sample.category == category]
        held += own[:: max(_HELD_OUT, 2)] if len(own) > 1 else []
    kept = tuple(sample for sample in training if sample not in held)
    return Parts(kept, tuple(held), False, f"held-out training parts of {dataset.name}, and the same perturbed")


def add_certificate(
    path: Path, teacher: Teacher, parts: Parts, config: TrainConfig, progress: Progress | None = None
) -> StudentCertificate:
    """Measure the student in the file `path` as it was saved, and store its certificate there.

    Raises:
        FrameError: a part cannot be read; the student is kept, without a certificate.
    """
    student = load_checkpoint(path, backbone_weights=config.backbone_weights).to(teacher.model.device)
    known = student.spec.student
    assert known is not None, "saved as a student"
    # The teacher's backbone gave raw features until now; both models take those that the student's file asks for.
    source = DirectFeatures(student.backbone, [one.path for one in parts.tested], config, student.spec.image)
    y = None
    if student.config.use_class_labels:
        order = student.class_names or tuple(dict.fromkeys(sample.category for sample in parts.tested))
        y = torch.tensor([order.index(sample.category) for sample in parts.tested])
    try:
        certificate = certify(teacher.model, student, teacher.scorer, parts, source, y, progress)
    finally:
        source.pool.shutdown()
    update = {"student": known.model_copy(update={"certificate": certificate})}
    student.spec = student.spec.model_copy(update=update)
    save_checkpoint(student, path, getattr(torch, config.dtype), include_backbone=teacher.stands_alone)
    return certificate


def certify(
    teacher: FlowModel,
    student: FlowModel,
    scorer: Scorer,
    parts: Parts,
    source: DirectFeatures,
    y: Tensor | None,
    progress: Progress | None = None,
) -> StudentCertificate:
    """Compare both models' scores of the parts.

    Args:
        teacher: the model that the student learned from.
        student: the student, on the same device.
        scorer: what both compute.
        parts: see `divided`.
        source: features of `parts.tested`, as both models take them.
        y: the class of each of them (n,), None for unconditional models.
        progress: called with the stage "certificate".

    Raises:
        FrameError: a part cannot be read.
    """
    count = len(parts.tested)
    generator = torch.Generator(student.device).manual_seed(0)
    scores: list[list[Tensor]] = [[], []]
    changed: list[list[Tensor]] = [[], []]
    for start in range(0, count, _BATCH):
        rows = np.arange(start, min(start + _BATCH, count))
        x = source.finish(source.load(rows, np.zeros_like(rows)))
        classes = None if y is None else y[rows].to(x.device)
        other = None
        if not parts.labelled:
            other = perturbed(x, (teacher.config.height, teacher.config.width), 1.0, generator)
        for model, own, others in zip((teacher, student), scores, changed, strict=True):
            own.append(_scores(model, scorer, x, classes))
            if other is not None:
                others.append(_scores(model, scorer, other, classes))
        if progress is not None:
            progress("certificate", int(rows[-1]) + 1, count, None)
    names = sorted({sample.category for sample in parts.tested})
    groups = np.array([names.index(sample.category) for sample in parts.tested])
    labels = np.array([sample.label for sample in parts.tested]) if parts.labelled else None
    if labels is None:
        groups = np.concatenate([groups, groups])
    theirs, ours = (torch.cat(own + others).double().cpu().numpy() for own, others in zip(scores, changed, strict=True))
    rankings: dict[str, Ranking] = {
        name: ranking(theirs[:, i], ours[:, i], labels, groups) for i, name in enumerate(AGGREGATES)
    }
    defective = count if labels is None else int(labels.sum())
    return StudentCertificate(
        parts=parts.description,
        labelled=parts.labelled,
        good=count if labels is None else count - defective,
        others=defective,
        operations=operations(student.config) / operations(teacher.config),
        resamples=0 if labels is None else RESAMPLES,
        rankings=rankings,
    )


def operations(config: VelocityConfig) -> float:
    """Floating-point operations of one evaluation with its map, one frame, as `kernels.account` counts them."""
    return sum(cost.flops for cost in account(sizes(config), batch=1, nfe=1, probes=0, precision="fp32"))


@torch.no_grad()
def _scores(model: FlowModel, scorer: Scorer, x: Tensor, y: Tensor | None) -> Tensor:
    """Raw image scores (B, 2) of features x (B, N, C), one column per aggregate."""
    config = model.config
    cells = scorer.map(model, from_tokens(x, config.height, config.width), y)
    maps, high, low, total = upsample_score(cells, model.spec.image.size)
    heat = Heat(cells.flatten(1), high, low, total, maps[0].numel(), norm_power(scorer))
    return torch.stack([aggregated(heat, name) for name in AGGREGATES], 1)
