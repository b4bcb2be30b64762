"""The parity certificate: an artefact against the fp32 reference, on the same real frames."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowad_fast.bundle import Artefact, Manifest, Parity
from flowad_fast.config import Certified
from flowad_fast.engines import Engine
from flowad_fast.engines.start import start_engine
from flowad_fast.errors import ConfigError, EngineUnavailableError, FlowADError, ParityError
from flowad_fast.export.frames import ParityFrames
from flowad_fast.stages.aggregates import AGGREGATES, Aggregate, Spread, norm_power
from flowad_fast.stages.location import apply as located
from flowad_fast.stages.scorers import Scorer

if TYPE_CHECKING:
    from flowad_fast.model import FlowModel

Outputs = tuple[np.ndarray, np.ndarray]
"""Maps (n, S, S) and raw scores (n,), or (n, k) for k terms."""
OK, UNMEASURED = "ok", "ok, parity not measured"
FAILED_PARITY, NOT_AVAILABLE, FAILED = "failed parity", "not available", "failed"


@dataclass(frozen=True)
class Tolerance:
    """Largest and RMS map error, both relative to the standard deviation of the reference map."""

    max: float
    rms: float


TOLERANCES: dict[Certified, Tolerance] = {
    "fp32": Tolerance(1e-3, 1e-4),
    "tf32": Tolerance(2e-2, 4e-3),
    "fp16": Tolerance(2e-2, 4e-3),
    "bf16": Tolerance(1e-1, 2e-2),
    "fp8": Tolerance(5e-1, 1e-1),
    "int8": Tolerance(3e-1, 3e-2),
}
"""By precision. Worst drift (max, RMS) of the demo checkpoint over the scorers, torch on a CPU: fp32 5e-6 and 7e-7,
fp16 4e-3 and 7e-4, bf16 7e-2 and 6e-3, fp8 (emulated) 3e-1 and 6e-2, all from reconstruction with the inversion start,
which is twice as long; the others stay at a fifth of that. There is room for deeper models; tf32 was not measured.
int8 (the field's products, OpenVINO with AVX-512 VNNI): 7e-2 and 7e-3 over mismatch and inversion; four times that,
since the ranges are those of good parts and a defect that exceeds them is cut off, and far below the 1.4 and 0.17 that
a quantised backbone costs."""
HUGE = 1e30
"""Stands for an error that is not finite, which JSON cannot hold."""


@dataclass(frozen=True)
class Outcome:
    """What became of one format.

    Attributes:
        status: one of ok; ok, parity not measured; failed parity; not available; failed.
        reason: why it is not plainly ok, one line.
        artefact: what was written, with its parity; None when nothing was.
        bytes: size of its files.
    """

    status: str
    reason: str = ""
    artefact: Artefact | None = None
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the artefact may be published."""
        return self.status in (OK, UNMEASURED)

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


@dataclass(frozen=True)
class Reference:
    """What artefacts are held against: the fp32 reference's outputs for real frames of classes `y`."""

    frames: ParityFrames
    y: np.ndarray | None
    expected: Outputs

    @classmethod
    def of(
        cls,
        model: "FlowModel",
        scorer: Scorer,
        aggregate: Aggregate,
        frames: ParityFrames,
        location: np.ndarray | None = None,
    ) -> "Reference":
        """Compute it, with classes in turn where a conditional model's frames have none."""
        y = class_indices(model, frames)
        return cls(frames, y, reference_outputs(model, scorer, aggregate, frames.frames, y, location))

    def measure(
        self,
        name: str,
        artefact: Artefact,
        folder: Path,
        manifest: Manifest,
        device: str,
        engine: str | None = None,
    ) -> Outcome:
        """The outcome of an artefact that lies in `folder`, by running it; what cannot run here is openly unmeasured.

        Args:
            name: of its format.
            artefact: what was written.
            folder: where its files lie.
            manifest: what it computes; its own artefacts do not matter.
            device: where it runs.
            engine: which one runs it, where several read such artefacts; None for the artefact's own.

        Raises:
            EngineUnavailableError: the engine that was asked for by name cannot run here.
        """
        size = sum((folder / file).stat().st_size for file in artefact.files)
        only = manifest.model_copy(update={"artefacts": {name: artefact}})
        try:
            running = start_engine(folder, only, engine or artefact.engine, device, artefact)
            got = run_in_batches(running, self.frames.frames, self.y)
        except ParityError as error:  # of an engine that checks itself when it starts
            failed = artefact.model_copy(update={"parity": None, "unmeasured": one_line(error)})
            return Outcome(FAILED_PARITY, one_line(error), failed, size)
        except EngineUnavailableError as error:
            if engine is not None:  # of what was asked for by name, not measured is no outcome
                raise
            reason = one_line(error)
            unmeasured = artefact.model_copy(update={"parity": None, "unmeasured": reason})
            return Outcome(UNMEASURED, reason, unmeasured, size)
        velocity = manifest.model.velocity
        parity = compare(
            got, self.expected, self.frames.source, artefact.precision,
            running.device if engine is None else running.title, self.frames.labels,
            manifest.aggregate, velocity.height * velocity.width, norm_power(manifest.scorer),
        )  # fmt: skip
        checked = artefact.model_copy(update={"parity": parity, "unmeasured": None})
        return (
            Outcome(OK, "", checked, size) if parity.passed else Outcome(FAILED_PARITY, _excess(parity), checked, size)
        )


def check_size(frames: ParityFrames, size: tuple[int, int] | None) -> None:
    """Refuse frames of another size than the bundle's.

    Raises:
        ConfigError: what was got, and what the bundle is for.
    """
    got = frames.frames.shape[1:3]
    if size is not None and got != size:
        raise ConfigError(
            f"the frames for the parity check are {got[0]}x{got[1]}, the bundle is for {size[0]}x{size[1]}; "
            "give frames of that size with --data"
        )


def class_indices(model: "FlowModel", frames: ParityFrames) -> np.ndarray | None:
    """The class of each frame, in turn where a conditional model's frames have none."""
    classes = model.spec.classes
    given: tuple[str | int, ...] | None = frames.classes
    if classes.conditional and given is None:
        given = tuple(i % classes.count for i in range(len(frames.frames)))
    return classes.indices(given, len(frames.frames))


def one_line(error: Exception) -> str:
    """An exception in one line, with its type where it is not one of the project's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FlowADError) else f"{type(error).__name__}: {text[:300]}"


def reference_outputs(
    model: "FlowModel",
    scorer: Scorer,
    aggregate: Aggregate,
    frames: np.ndarray,
    y: np.ndarray | None,
    location: np.ndarray | None = None,
) -> Outputs:
    """Map (n, S, S) and raw score of the fp32 reference; `location` is a table of location statistics.

    See `Scorer.expected`: the training form, adaLN computed at every evaluation.
    """
    import torch

    from flowad_fast.kernels import reference as ops
    from flowad_fast.stages.score import image_score

    classes = None if y is None else torch.from_numpy(y)
    maps = []
    for i in range(len(frames)):
        y1 = None if classes is None else classes[i : i + 1]
        x1 = model.features(frames[i : i + 1])
        maps.append(scorer.expected(model, x1, y1))
    cells = torch.cat(maps)
    if location is not None:
        cells = torch.from_numpy(located(location, cells.numpy(), y))
    upsampled = ops.upsample(cells, model.spec.image.size)
    return upsampled.numpy(), image_score(upsampled, aggregate, cells, norm_power(scorer)).numpy()


def compare(
    got: Outputs,
    expected: Outputs,
    source: str,
    precision: Certified,
    device: str,
    labels: np.ndarray | None = None,
    aggregate: Aggregate = "max",
    cells: int | None = None,
    power: int = 2,
) -> Parity:
    """The certificate for maps (n, S, S) and raw scores (n,) or (n, k); anything that is not finite fails.

    A score may be off by what the largest map error that is allowed can do to its aggregate, and no more. Of several
    terms the worst one counts. Rank correlation needs three frames, the AUROC difference labels (n,) of both kinds;
    what was not measured is None. A map was enlarged from `cells` values (None: it was not), norms to the `power`.

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
    flat = ref_maps.reshape(len(ref_maps), -1).astype(np.float64)
    spread = Spread(flat.max(1), flat.min(1), flat.mean(1), flat.shape[1], cells or flat.shape[1], power)
    within = all(
        bool((np.abs(a - b) <= term.moved(tolerance.max * scale, spread)).all())
        for (a, b), term in zip(terms, AGGREGATES[aggregate].terms, strict=True)
    )
    finite = bool(np.isfinite(maps).all() and np.isfinite(raw).all())
    spearman = auroc_difference = None
    if finite and len(raw) > 2 and all(len(set(a)) > 1 < len(set(b)) for a, b in terms):
        spearman = min(float(np.corrcoef(ranks(a), ranks(b))[0, 1]) for a, b in terms)
    if finite and labels is not None and 0 < labels.sum() < len(labels):
        differences = [auroc(labels, a) - auroc(labels, b) for a, b in terms]
        auroc_difference = max(differences, key=abs)
    return Parity(
        passed=finite and within and worst <= tolerance.max and rms <= tolerance.rms,
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


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs of a defective (1) and a good (0) frame that the scores order rightly; ties count half."""
    defective = labels == 1
    n = int(defective.sum())
    return float((ranks(scores)[defective].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def _excess(parity: Parity) -> str:
    return (
        f"map error {parity.max_error:.1e} (tolerance {parity.tolerance:.0e}), RMS {parity.rms_error:.1e} "
        f"({parity.rms_tolerance:.0e}), score error {parity.score_error:.1e}"
    )


def run_in_batches(engine: Engine, frames: np.ndarray, y: np.ndarray | None, batch: int = 3) -> Outputs:
    """An engine's outputs for many frames, in batches that are not all equal, so that a fixed batch shows itself."""
    parts = [
        engine.run(frames[i : i + batch], None if y is None else y[i : i + batch]) for i in range(0, len(frames), batch)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
