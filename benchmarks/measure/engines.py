"""Engines as rows: the product's own, and the reference path in the same clothes."""

from pathlib import Path

import numpy as np
import torch

import flowad_fast
from flowad_fast.benchmarks.measure.cases import REFERENCE, Case
from flowad_fast.detector import Detector
from flowad_fast.engines import Engine, backend
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.precision import arithmetic
from flowad_fast.engines.start import operators
from flowad_fast.errors import EngineUnavailableError, ParityError
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.formats import FORMATS
from flowad_fast.export.verify import FAILED_PARITY
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.reference_path import reference_map
from flowad_fast.stages.arithmetic import Arithmetic
from flowad_fast.stages.image import normalise
from flowad_fast.stages.integration import from_tokens
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import Scorer


class ReferenceEngine(Engine):
    """The paper's cost model from frame to score: reference path, with the same image, backbone and score stages."""

    name = REFERENCE
    on_tensors = True

    def __init__(self, model: FlowModel, scorer: Scorer, device: str) -> None:
        self._device = torch_device(device)
        self.device = str(self._device)
        self.model, self.scorer = model.to(self._device), scorer
        _ = self.model.backbone

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        maps, scores = self.on_device(
            torch.from_numpy(frames).to(self._device), None if y is None else torch.from_numpy(y).to(self._device)
        )
        return maps.cpu().numpy(), scores.cpu().numpy()

    def on_device(self, frames: torch.Tensor, y: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same on tensors of the engine's device."""
        spec = self.model.spec
        with arithmetic("fp32", self._device):
            with torch.no_grad():
                tokens = self.model.backbone(normalise(frames, spec.image))
            x1 = from_tokens(tokens, spec.velocity.height, spec.velocity.width)
            maps = ops.upsample(reference_map(self.model, self.scorer, x1, y), spec.image.size)
            return maps, image_score(maps, "max")


def needs_artefact(engine: str) -> bool:
    """Whether an engine runs exported artefacts only."""
    return engine != REFERENCE and backend(engine).starts_from == "artefact"


def start(case: Case, model: FlowModel | None, artefact: str | None) -> Detector:
    """The case's engine, from an artefact (a bundle) or from the model.

    Raises:
        EngineUnavailableError: what the engine, precision or operators need is not there.
    """
    if artefact is not None:
        return flowad_fast.load(artefact, engine=case.engine, device=case.device)
    assert model is not None, "without an artefact there is a model"
    if case.engine == REFERENCE:
        return Detector(ReferenceEngine(model, case.scorer, case.device), model.spec)
    if case.engine == "cudagraph":
        from flowad_fast.engines.cudagraph import CudaGraphEngine, CudaGraphStep, EarlyCudaGraphStep

        # Only the row's own batch: other captures would count as its memory.
        pipeline = ScoringPipeline(model, case.scorer, "max", Arithmetic(case.precision, operators(case.ops)))
        step, measure = EarlyCudaGraphStep if case.early else CudaGraphStep, case.products == "measured"
        engine = CudaGraphEngine(pipeline, case.device, (case.batch,), step, measure_products=measure)
        return Detector(engine, model.spec)
    return Detector.from_model(
        model, case.scorer, engine=case.engine, precision=case.precision, device=case.device, ops=case.ops
    )


def export(case: Case, model: FlowModel, frames: np.ndarray, folder: Path) -> str:
    """A bundle with the artefact that the case's engine runs; returns its folder.

    Raises:
        EngineUnavailableError: the format cannot be made here.
        ParityError: what was made disagrees with the reference.
    """
    wanted = backend(case.engine).artefact
    name = next((name for name, one in FORMATS.items() if one.engine == wanted), None)
    if name is None:
        raise EngineUnavailableError(f"no export format makes what the engine {case.engine} runs")
    batch = (1, case.batch, case.batch)
    result = export_bundle(
        model, case.scorer, folder / "bundle", formats=(name,), frames=frames, quiet=True, batch=batch,
        precision=case.precision, device=case.device, frame_size=(frames.shape[1], frames.shape[2]),
    )  # fmt: skip
    outcome = result.outcomes[name]
    if outcome.status == FAILED_PARITY:
        raise ParityError(str(outcome))
    if not outcome.ok:
        raise EngineUnavailableError(str(outcome))
    return str(result.path)


def device_times(detector: Detector, frames: np.ndarray, classes: list[str | int] | None, n: int) -> list[float]:
    """Milliseconds on the GPU of `n` calls, frames already there and results left there, by events.

    Empty where the engine has no such entry (its frames always come from the host).
    """
    engine = detector.running()
    if not engine.on_tensors:
        return []
    device = torch.device(engine.device)
    x, y = torch.from_numpy(frames).to(device), None
    if classes is not None:
        y = torch.from_numpy(detector.classes.indices(classes, len(frames))).to(device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    with torch.cuda.device(device):
        for begin, end in marks:
            begin.record()
            engine.on_device(x, y)
            end.record()
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]
