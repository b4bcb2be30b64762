"""The process that measures one case. It obeys its parent command by command, so that two cases can take turns.

A fresh process per case makes memory figures clean, and a crash costs one row.
"""

import gc
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from flowad_fast import bundle
from flowad_fast.benchmarks.measure import engines, roofs
from flowad_fast.benchmarks.measure.cases import (
    REFERENCE,
    Case,
    empty_row,
    load_model,
    make_frames,
    scored_as,
    shape_of,
)
from flowad_fast.benchmarks.measure.memory import PeakMemory, limit_to_available
from flowad_fast.benchmarks.record.limits import BackboneTime, Roofs
from flowad_fast.benchmarks.record.record import Memory, Row, Status
from flowad_fast.config import Precision
from flowad_fast.detector import Detection, Detector
from flowad_fast.engines import Engine
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.precision import arithmetic
from flowad_fast.errors import EngineUnavailableError, ParityError
from flowad_fast.kernels import reference as ops
from flowad_fast.kernels.account import VelocityShape
from flowad_fast.model import FlowModel
from flowad_fast.stages import location
from flowad_fast.stages.aggregates import Aggregate, norm_power
from flowad_fast.stages.decision import calibrate
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import Density, Scorer

INDEPENDENT_PROBES = 10
"""Probes of the independent density estimate that every density row is compared with."""


class WorkerError(Exception):
    """A command that a worker did not carry out; `status` and `reason` go into the row."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(status, reason)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Samples:
    """Milliseconds of some calls: host frames to host verdict, and the device's own time where it is known."""

    ms: list[float]
    device_ms: list[float]

    @property
    def median(self) -> float:
        """Of the wall times."""
        return float(np.median(self.ms))


class Held:
    """A model that a process keeps for several rows.

    Every row's reference is computed from it, so it must stay what it was: an engine that changed it would be compared
    with its own mistake.
    """

    def __init__(self, preset: str, model: FlowModel) -> None:
        self.preset, self.model = preset, model
        self._sums = self._fingerprint()

    def check(self) -> None:
        """Refuse to go on with a model that somebody has changed.

        Raises:
            RuntimeError: its weights are not those that were loaded.
        """
        found = self._fingerprint()
        if len(found) != len(self._sums) or not np.allclose(found, self._sums, rtol=1e-9, atol=1e-9):
            raise RuntimeError("the held model was changed by an engine: its rows have no reference any more")

    def unused_by(self, engine: Engine) -> int:
        """Bytes of the model on a GPU that an engine does not share."""
        own = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in self._tensors() if one.is_cuda
        }
        if isinstance(engine, engines.ReferenceEngine):
            return 0
        pipeline = getattr(engine, "pipeline", None)
        shared = () if pipeline is None else (*pipeline.parameters(), *pipeline.buffers())
        for one in shared:
            own.pop(one.untyped_storage().data_ptr(), None)
        return sum(own.values())

    def _tensors(self) -> list[torch.Tensor]:
        parts = (self.model.dit, self.model.backbone)
        return [one for part in parts for one in (*part.parameters(), *part.buffers())]

    @torch.no_grad()
    def _fingerprint(self) -> list[float]:
        sums = [one.sum(dtype=torch.float64) for one in self._tensors() if one.dtype == torch.float32]
        return [float(one) for one in torch.stack(sums).cpu()]


class Worker:
    """A case, loaded once and then run on request; with `hold`, one after the other on the same model."""

    def __init__(self) -> None:
        self.case: Case
        self.detector: Detector | None = None
        self.memory: PeakMemory
        self.device: torch.device
        self.held: Held | None = None

    def hold(self, case: Case) -> float:
        """Load the case's model and keep it for all that follows; returns the seconds."""
        start = time.perf_counter()
        device = torch_device(case.device)
        self.held = Held(case.preset, load_model(case).to(device))
        return round(time.perf_counter() - start, 3)

    def load(self, case: Case, artefact: str | None = None) -> Row:
        """Load the model, start the engine, and run the first call, each timed on its own: a row without figures."""
        self.case, self.detector = case, None
        self.device = torch_device(self.case.device)
        if self.held is not None:  # what it has made for another scorer, and the engine before has left
            self.held.model.to(self.device)
            gc.collect()
        if self.device.type == "cpu":
            limit_to_available()
        else:
            torch.cuda.empty_cache()
        start = time.perf_counter()
        if artefact is None:
            model: FlowModel | None = self._model(case)
            assert model is not None and model.backbone is not None
            spec = model.spec
        else:
            model, spec = None, bundle.read(artefact, verify=False)[1].model
        loaded = time.perf_counter()
        detector = self.detector = engines.start(case, model, artefact)
        # The engine holds what it needs; the training form's weights must not count as the engine's memory.
        del model
        gc.collect()
        started = time.perf_counter()
        frames, source = make_frames(self.case, max(self.case.parity_frames, 1), spec.image.size)
        self.distinct = frames
        self.batch = frames[np.arange(self.case.batch) % len(frames)]
        self.memory = PeakMemory(self.device, self.held.unused_by(detector.running()) if self.held else 0)
        before = time.perf_counter()
        detector.prepare(*self.batch.shape[1:3])
        prepared = time.perf_counter()
        self.memory.restart()
        called = time.perf_counter()
        first = self._score(self.batch)
        first_call = time.perf_counter() - called
        # A verdict needs thresholds; these make every call take the whole way from frame to verdict.
        detector.calibration = calibrate(first.raw_score, 0.5, first.classes)
        velocity = spec.velocity
        return empty_row(case).but(
            ran=first.engine,
            details=detector.details,
            load_s=round(loaded - start, 3),
            start_s=round(started - loaded, 3),
            compile_s=round(prepared - before, 3),
            first_call_s=round(first_call, 3),
            nfe=case.scorer.evaluations(velocity),
            frames=source,
            frame_size=(frames.shape[1], frames.shape[2]),
            shape=shape_of(spec),
        )

    def run(self, n: int, on_device: int | None = None) -> Samples:
        """`n` calls: host frames to host verdict in ms, and the device's own time of as many, or of `on_device`.

        Of a call with several batches in flight (`Case.pieces`) each batch has its share.
        The device's time is known where events can be placed. The reference path's is nobody's figure, and would double
        what it costs.
        """
        wall, pieces = [], self.case.pieces
        shown = np.tile(self.batch, (pieces, 1, 1, 1)) if pieces > 1 else self.batch
        for _ in range(n):
            start = time.perf_counter()
            _ = self._score(shown).verdict
            wall.append((time.perf_counter() - start) * 1e3 / pieces)
        if self.device.type != "cuda" or self.case.engine == REFERENCE or on_device == 0:
            return Samples(wall, [])
        count = n if on_device is None else on_device
        return Samples(wall, engines.device_times(self._running, self.batch, self._classes(self.batch), count))

    def peak(self) -> Memory:
        """Peak memory since the engine was started."""
        return self.memory.read()

    def outputs(self, path: Path) -> None:
        """Map and score of the distinct frames, in the very batch that is timed, written to `path`."""
        maps, raw = [], []
        for i in range(0, len(self.distinct), self.case.batch):
            wanted = min(self.case.batch, len(self.distinct) - i)
            part = self.distinct[(i + np.arange(self.case.batch)) % len(self.distinct)]
            got = self._score(part, first=i)
            maps.append(got.map[:wanted])
            raw.append(got.raw_score[:wanted])
        np.savez(path, maps=np.concatenate(maps), raw=np.concatenate(raw))

    def export(self, case: Case, folder: Path) -> tuple[str, float]:
        """Make the artefact that the case's engine runs, in a process of its own so that it leaves no memory behind.

        Returns:
            The bundle's folder, and seconds.
        """
        start = time.perf_counter()
        model = load_model(case)
        frames, _ = make_frames(case, 1, model.spec.image.size)
        path = engines.export(case, model, frames[:1], folder)
        return path, round(time.perf_counter() - start, 3)

    def expected(self, case: Case, path: Path, independent: Path | None) -> None:
        """The fp32 reference's map and score of the same frames; for density also an independent estimate's.

        `independent` is a file that is made when it is missing: it serves every number of probes.
        """
        device = torch_device(case.device)
        model = self._model(case).to(device)
        if self.held is not None:
            self.held.check()
        frames, _ = make_frames(case, max(case.parity_frames, 1), model.spec.image.size)
        y = None
        if model.config.use_class_labels:
            y = torch.arange(len(frames)) % model.config.num_classes
        aggregate, table = scored_as(case)
        with arithmetic("fp32", device):
            self._expected(model, case.scorer, frames, y, path, independent, aggregate, table)

    def _expected(
        self, model: FlowModel, scorer: Scorer, frames: np.ndarray, y: torch.Tensor | None, path: Path,
        independent: Path | None, aggregate: Aggregate, table: np.ndarray | None,
    ) -> None:  # fmt: skip
        cells = []
        for i in range(len(frames)):
            y1 = None if y is None else y[i : i + 1]
            x1 = model.features(frames[i : i + 1])
            cells.append(scorer.expected(model, x1, y1))
        plain = torch.cat(cells)
        shown = plain
        if table is not None:
            labels = None if y is None else y.cpu().numpy()
            shown = torch.from_numpy(location.apply(table, plain.cpu().numpy(), labels)).to(plain)
        maps = ops.upsample(shown, model.spec.image.size)
        raw = image_score(maps, aggregate, shown, norm_power(scorer))
        np.savez(
            path, maps=maps.cpu().numpy(), raw=raw.cpu().numpy(), cells=plain.cpu().numpy(), aggregate=aggregate,
            power=norm_power(scorer),
        )  # fmt: skip
        if isinstance(scorer, Density) and independent is not None and not independent.exists():
            other = Density(steps=scorer.steps, probes=INDEPENDENT_PROBES, seed=scorer.seed + 1)
            pairs = [
                other.map_with_error(model, model.features(frames[i : i + 1]), None if y is None else y[i : i + 1])
                for i in range(len(frames))
            ]
            found, errors = (torch.cat(part).cpu().numpy() for part in zip(*pairs, strict=True))
            np.savez(independent, cells=found, errors=errors)

    def roofs(
        self, shape: VelocityShape, rows: Sequence[int], precisions: Sequence[Precision], device: str, seconds: float,
        probes: tuple[int, int] | None = None,
    ) -> Roofs:  # fmt: skip
        """Measure this machine's roofs; see `roofs.measure`."""
        return roofs.measure(shape, rows, precisions, device, seconds, probes)

    def backbone(self, case: Case, batches: Sequence[int], seconds: float) -> tuple[BackboneTime, ...]:
        """The backbone of the case's model alone, in the layouts and types that an engine may give it."""
        return roofs.backbone(self._model(case), batches, torch_device(case.device), seconds)

    def _model(self, case: Case) -> FlowModel:
        """The held model, or the case's where none is held."""
        if self.held is None:
            return load_model(case)
        assert case.preset == self.held.preset, "a process keeps one model"
        return self.held.model

    @property
    def _running(self) -> Detector:
        assert self.detector is not None, "load comes first"
        return self.detector

    def _score(self, frames: np.ndarray, first: int = 0) -> Detection:
        return self._running(frames, self._classes(frames, first))

    def _classes(self, frames: np.ndarray, first: int = 0) -> list[str | int] | None:
        classes = self._running.classes
        labels = [classes.label(text) for text in classes.labels]
        of = [(first + i) % len(self.distinct) for i in range(len(frames))]
        return [labels[i % len(labels)] for i in of] if labels else None


def serve(pipe: Connection, log: str, kind: type[Worker] = Worker) -> None:
    """Answer until the commands end, by methods of a `kind` of worker; what libraries print goes to `log`.

    An error is an answer too: its kind decides the row's status.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    worker = kind()
    while True:
        try:
            do, arguments, more = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(worker, do)(*arguments, **more)
        except EngineUnavailableError as error:
            answer = WorkerError("not available", str(error))
        except ParityError as error:
            answer = WorkerError("failed parity", str(error))
        except Exception as error:
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
            traceback.print_exc()
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            answer = WorkerError("out of memory" if memory else "failed", f"{type(error).__name__}: {first}"[:500])
        pipe.send(answer)
