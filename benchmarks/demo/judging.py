"""The demo's numbers: bundles of the chosen recipe and of the paper's scorers, and what each says of the test cells."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowad_fast.cli import common
from flowad_fast.errors import ParityError

if TYPE_CHECKING:
    from flowad_fast.data.samples import Sample
    from flowad_fast.model import FlowModel
    from flowad_fast.stages.aggregates import Aggregate
    from flowad_fast.stages.scorers import Scorer

CELLS = "cells"
"""The checkpoint, and its photos."""
ALPHA = 0.05
"""Accepted false-reject rate; each product has two times the good cells that it needs, or more."""
BATCH = 8
PARITY_FRAMES = 8
STATISTICS = 200
"""Training cells of each product that location statistics are fitted on."""
SPREAD = 4
"""The paper's scorers judge every fourth test cell; the recipe and the Gaussians judge all."""
RECIPE = "recipe"
GAUSSIAN = "Gaussian"
GAUSSIAN_LOCATED = "Gaussian, located"


@dataclass(frozen=True)
class Method:
    """What a bundle computes.

    Attributes:
        name: of the method, in tables, figures and file names.
        scorer: what is computed.
        aggregate: map to image score.
        located: whether with location statistics.
        every: which share of the test cells it judges: one of so many.
    """

    name: str
    scorer: "Scorer"
    aggregate: "Aggregate" = "max"
    located: bool = False
    every: int = 1


@dataclass(frozen=True)
class Outcome:
    """How one method did on one product's test cells; metrics are fractions.

    Attributes:
        method: its name; that of the recipe is "SCORER (recipe)".
        options: what it computes, in full.
        engine: what ran.
        cells: how many test cells it judged.
        evaluations: of the velocity field per cell; None for the Gaussians.
        image_auroc, low, high: with the 95 % interval of a bootstrap over the cells.
        image_ap, image_f1max: further metrics of the ranking.
        threshold: of the calibration, None for the Gaussians, which have none.
        verdicts: counts of good and defective cells by verdict.
        seconds: of judging.
    """

    method: str
    options: str
    engine: str
    cells: int
    evaluations: int | None
    image_auroc: float
    low: float
    high: float
    image_ap: float
    image_f1max: float
    threshold: float | None = None
    verdicts: dict[str, dict[str, int]] | None = None
    seconds: float | None = None

    @property
    def false_rejects(self) -> float | None:
        """Share of good test cells that were called anomalous."""
        return self._share("good")

    @property
    def detected(self) -> float | None:
        """Share of defective test cells that were called anomalous."""
        return self._share("defective")

    def dump(self) -> dict[str, Any]:
        """As JSON values, the shares of verdicts among them."""
        return {**asdict(self), "false_rejects": self.false_rejects, "detected": self.detected}

    def _share(self, label: str) -> float | None:
        return None if self.verdicts is None else self.verdicts[label]["anomalous"] / sum(self.verdicts[label].values())


@dataclass(frozen=True)
class Judged:
    """One method's outcome on a product, with the cells that it judged and their scores (n,)."""

    outcome: Outcome
    cells: "tuple[Sample, ...]"
    scores: NDArray[np.float64]


def methods() -> tuple[Method, ...]:
    """The recipe that flowad-tune chose for the two products, and the paper's three scorers."""
    from flowad_fast.stages.scorers import Density, Inversion, Reconstruction
    from flowad_fast.tuning.recipe import read_recipe

    chosen = read_recipe(Path(__file__).with_name("recipe.json"))
    # One probe ranks the cells as well as two; three evaluations of the velocity field for each scorer.
    paper = (Density(steps=3, probes=1), Inversion(steps=3), Reconstruction(steps=6, tau=0.5))
    return (
        Method(RECIPE, chosen.scorer, chosen.aggregate, chosen.location),
        *(Method(scorer.kind, scorer, every=SPREAD) for scorer in paper),
    )


def export(method: Method, target: Path, model: "FlowModel | None" = None, source: str = CELLS) -> Path:
    """A calibrated bundle (ONNX and eager) of a method, of the shipped checkpoint unless another model is given.

    Raises:
        ParityError: an artefact does not agree with the fp32 reference.
    """
    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.export.exporter import export_bundle
    from flowad_fast.export.frames import good_parts, parity_frames, training_parts
    from flowad_fast.export.location import StatisticsParts, some_of_each

    model = model or load_checkpoint(CELLS)
    labels = model.spec.classes.labels
    location = None
    if method.located:
        parts = some_of_each(training_parts(source, labels), STATISTICS)
        location = StatisticsParts(parts, f"{len(parts)} training cells")
    result = export_bundle(
        model, method.scorer, target, formats=("onnx", "eager"), aggregate=method.aggregate, location=location,
        frames=parity_frames(source, PARITY_FRAMES), good=good_parts(source, labels), alpha=ALPHA, quiet=True,
    )  # fmt: skip
    if not result.ok or result.path is None:
        raise ParityError(f"{method.name}: {result.status}; kept as {result.rejected}")
    return result.path


def judge(method: Method, bundle: Path, test: Sequence["Sample"], results: Path) -> dict[str, Judged]:
    """Judge test cells as `flowad-inspect` does, through the bundle's ONNX engine: what came of it, by product.

    The rows go to `results`.
    """
    import time

    import flowad_fast
    from flowad_fast.evaluation.inspection import inspect_files
    from flowad_fast.evaluation.results import ResultFile, bundle_identity

    detector = flowad_fast.load(bundle, engine="onnxruntime")
    classes = [sample.category for sample in test] if detector.conditional else None
    scores, found = [], []
    seconds: dict[str, float] = defaultdict(float)
    with (
        ResultFile(results, "csv", bundle_identity(bundle), detector.engine, resume=False) as file,
        common.progress(method.name, len(test)) as advance,
    ):
        began = time.perf_counter()
        paths = [sample.path for sample in test]
        for sample, result in zip(test, inspect_files(detector, paths, classes, batch=BATCH), strict=True):
            file.append(result)
            assert result.score is not None, f"{sample.path}: {result.reason}"
            scores.append(result.score)
            found.append(result.status)
            seconds[sample.category] += (now := time.perf_counter()) - began
            began = now
            advance(1)
    assert detector.calibration is not None, "`export` calibrates"
    judged = {}
    for product in dict.fromkeys(sample.category for sample in test):
        at = [i for i, sample in enumerate(test) if sample.category == product]
        verdicts = {label: {"good": 0, "anomalous": 0} for label in ("good", "defective")}
        for i in at:
            verdicts[test[i].defect][found[i]] += 1
        judged[product] = judged_as(
            f"{method.scorer.kind} ({RECIPE})" if method.name == RECIPE else method.name,
            f"{method.scorer!r}, {method.aggregate}{', location statistics' if method.located else ''}",
            detector.engine, [test[i] for i in at], np.array([scores[i] for i in at]),
            evaluations=method.scorer.evaluations(flowad_fast.bundle.read(bundle)[1].model.velocity),
            threshold=detector.calibration.classes[product if classes else ""].threshold, verdicts=verdicts,
            seconds=seconds[product],
        )  # fmt: skip
    return judged


def judged_as(
    method: str, options: str, engine: str, cells: Sequence["Sample"], scores: NDArray[np.float64], **more: Any
) -> Judged:
    """Scores (n,) of test cells as an outcome; `more` are further fields of it."""
    from flowad_fast.benchmarks.runs.evaluations import Draws
    from flowad_fast.evaluation.metrics import image_metrics

    labels = np.array([cell.label for cell in cells])
    metrics: dict[str, Any] = {**image_metrics(labels, scores)}
    _, resampled = Draws(labels).auroc([scores.astype(np.float32)])
    low, high = (float(value) for value in np.percentile(resampled, [2.5, 97.5]))
    fields = {"evaluations": None} | metrics | {"low": low, "high": high} | more
    return Judged(Outcome(method, options, engine, len(cells), **fields), tuple(cells), scores)


def gaussians(train: Sequence["Sample"], test: Sequence["Sample"], aggregate: "Aggregate") -> dict[str, list[Judged]]:
    """What one Gaussian per position and product says of the test cells, without and with location statistics."""
    from flowad_fast.benchmarks.demo.gaussian import PositionGaussians
    from flowad_fast.stages.location import LocationStatistics

    judged: dict[str, list[Judged]] = {}
    for product in dict.fromkeys(sample.category for sample in test):
        good = [sample for sample in train if sample.category == product]
        cells = [sample for sample in test if sample.category == product]
        seen = _features(good)
        fitted = PositionGaussians.fit(seen)
        maps = fitted.map(_features(cells)).numpy()
        located = LocationStatistics.fit(fitted.map(seen).numpy()).apply(maps)
        options = f"one per position, full covariance, {len(fitted.channels)} channels, {aggregate}"
        judged[product] = [
            judged_as(name, f"{options}{more}", "torch", cells, _scored(shown, aggregate))
            for name, shown, more in ((GAUSSIAN, maps, ""), (GAUSSIAN_LOCATED, located, ", location statistics"))
        ]
    return judged


def _features(samples: Sequence["Sample"]) -> Any:
    """X1 of photos, (n, C, h, w), by the shipped checkpoint's backbone and normalisation."""
    import torch

    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.data.images import read_frame
    from flowad_fast.stages.features import fold_batch_norms

    model = load_checkpoint(CELLS)
    fold_batch_norms(model.backbone)
    return torch.cat([model.features(read_frame(sample.path)[None]) for sample in samples])  # one fits the cache best


def _scored(maps: NDArray[np.float32], aggregate: "Aggregate", size: int = 256) -> NDArray[np.float64]:
    """Image scores (n,) of maps (n, h, w), as engines make them."""
    import torch

    from flowad_fast.kernels import reference as ops
    from flowad_fast.stages.score import image_score

    parts = torch.from_numpy(maps).split(32)
    return torch.cat([image_score(ops.upsample(part, size), aggregate, part) for part in parts]).double().numpy()


def spread(test: Sequence["Sample"], every: int) -> list["Sample"]:
    """One of so many test cells, of every product and label alike."""
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in test:
        groups.setdefault((sample.category, sample.label), []).append(sample)
    chosen = {sample.path for group in groups.values() for sample in group[::every]}
    return [sample for sample in test if sample.path in chosen]


def counted(samples: Sequence["Sample"]) -> Mapping[str, int]:
    """How many of each product."""
    return Counter(sample.category for sample in samples)
