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
from flowad_fast.benchmarks.measure.cases import Case, empty_row, load_model, make_frames, scored_as
from flowad_fast.benchmarks.measure.memory import PeakMemory, limit_to_available
from flowad_fast.benchmarks.record.record import Memory, Roofs, Row, Status
from flowad_fast.config import Precision
from flowad_fast.detector import Detection, Detector
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


class Worker:
    """A case, loaded once and then run on request."""

    def __init__(self) -> None:
        self.case: Case
        self.detector: Detector
        self.memory: PeakMemory
        self.device: torch.device

    def load(self, case: Case, artefact: str | None = None) -> Row:
        """Load the model, start the engine, and run the first call, each timed on its own: a row without figures."""
        self.case = case
        self.device = torch_device(self.case.device)
        if self.device.type == "cpu":
            limit_to_available()
        start = time.perf_counter()
        if artefact is None:
            model: FlowModel | None = load_model(self.case)
            assert model is not None and model.backbone is not None
            spec = model.spec
        else:
            model, spec = None, bundle.read(artefact, verify=False)[1].model
        loaded = time.perf_counter()
        self.detector = engines.start(case, model, artefact)
        # The engine holds what it needs; the training form's weights must not count as the engine's memory.
        del model
        gc.collect()
        started = time.perf_counter()
        frames, source = make_frames(self.case, max(self.case.parity_frames, 1), spec.image.size)
        self.distinct = frames
        self.batch = frames[np.arange(self.case.batch) % len(frames)]
        self.memory = PeakMemory(self.device)
        before = time.perf_counter()
        self.detector.prepare(*self.batch.shape[1:3])
        prepared = time.perf_counter()
        first = self._score(self.batch)
        first_call = time.perf_counter() - prepared
        # A verdict needs thresholds; these make every call take the whole way from frame to verdict.
        self.detector.calibration = calibrate(first.raw_score, 0.5, first.classes)
        velocity = spec.velocity
        return empty_row(case).but(
            ran=first.engine,
            details=self.detector.details,
            load_s=round(loaded - start, 3),
            start_s=round(started - loaded, 3),
            compile_s=round(prepared - before, 3),
            first_call_s=round(first_call, 3),
            nfe=case.scorer.evaluations(velocity),
            frames=source,
            frame_size=(frames.shape[1], frames.shape[2]),
            shape=VelocityShape(
                hidden=velocity.hidden_size,
                depth=velocity.depth,
                heads=velocity.num_heads,
                tokens=velocity.tokens,
                channels=velocity.channels * velocity.patch_size**2,
                mlp=velocity.mlp_hidden,
                image=spec.image.size,
            ),
        )

    def run(self, n: int) -> Samples:
        """`n` calls: host frames to host verdict in ms, and the device's own time where events can be placed."""
        wall = []
        for _ in range(n):
            start = time.perf_counter()
            _ = self._score(self.batch).verdict
            wall.append((time.perf_counter() - start) * 1e3)
        if self.device.type != "cuda":
            return Samples(wall, [])
        return Samples(wall, engines.device_times(self.detector, self.batch, self._classes(self.batch), n))

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
        model = load_model(case).to(device)
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
        self, shape: VelocityShape, rows: Sequence[int], precisions: Sequence[Precision], device: str, seconds: float
    ) -> Roofs:
        """Measure this machine's roofs; see `roofs.measure`."""
        return roofs.measure(shape, rows, precisions, device, seconds)

    def _score(self, frames: np.ndarray, first: int = 0) -> Detection:
        return self.detector(frames, self._classes(frames, first))

    def _classes(self, frames: np.ndarray, first: int = 0) -> list[str | int] | None:
        classes = self.detector.classes
        labels = [classes.label(text) for text in classes.labels]
        of = [(first + i) % len(self.distinct) for i in range(len(frames))]
        return [labels[i % len(labels)] for i in of] if labels else None


def serve(pipe: Connection, log: str) -> None:
    """Answer until the commands end; everything that libraries print goes to `log`.

    An error is an answer too: its kind decides the row's status.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    worker = Worker()
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
