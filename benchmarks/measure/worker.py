"""The process that measures one case. It obeys its parent command by command, so that two cases can take turns.

A fresh process a case makes memory figures clean, and a crash costs one row.
"""

import gc
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowad_fast import bundle
from flowad_fast.benchmarks.measure import engines, roofs
from flowad_fast.benchmarks.measure.cases import Case, function_evaluations, load_model, make_frames
from flowad_fast.benchmarks.measure.memory import PeakMemory, limit_to_available
from flowad_fast.detector import Detector
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.precision import arithmetic
from flowad_fast.errors import EngineUnavailableError, ParityError
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.stages.decision import calibrate
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import Density, Scorer

INDEPENDENT_PROBES = 10
"""Probes of the independent density estimate that every density row is compared with."""


class Worker:
    """A case, loaded once and then run on request."""

    def __init__(self) -> None:
        self.case: Case
        self.detector: Detector
        self.memory: PeakMemory
        self.device: torch.device

    def load(self, case: dict[str, Any], artefact: str | None = None) -> dict[str, Any]:
        """Load the model, start the engine, and run the first call; each timed on its own."""
        self.case = Case(**case)
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
        self.scorer = self.case.make_scorer()
        self.detector = engines.start(self.case, model, self.scorer, artefact)
        # The engine holds what it needs; the training form's weights must not count as the engine's memory.
        del model
        gc.collect()
        started = time.perf_counter()
        frames, source = make_frames(self.case, max(self.case.parity_frames, 1), spec.image.size)
        self.distinct = frames
        self.batch = frames[np.arange(self.case.batch) % len(frames)]
        names = spec.class_names if spec.velocity.use_class_labels else ()
        self.classes = [names[i % len(names)] for i in range(len(frames))] if names else None
        self.memory = PeakMemory(self.device)
        before = time.perf_counter()
        self.detector.prepare(*self.batch.shape[1:3])
        prepared = time.perf_counter()
        first = self._score(self.batch)
        first_call = time.perf_counter() - prepared
        # A verdict needs thresholds; these make every call take the whole way from frame to verdict.
        self.detector.calibration = calibrate(first.raw_score, 0.5, first.classes)
        velocity = spec.velocity
        return {
            "engine": first.engine,
            "details": self.detector.details,
            "load_s": round(loaded - start, 3),
            "start_s": round(started - loaded, 3),
            "compile_s": round(prepared - before, 3),
            "first_call_s": round(first_call, 3),
            "nfe": function_evaluations(self.scorer, velocity),
            "frames": source,
            "frame_size": list(frames.shape[1:3]),
            "shape": {
                "hidden": velocity.hidden_size,
                "depth": velocity.depth,
                "heads": velocity.num_heads,
                "tokens": velocity.tokens,
                "channels": velocity.channels * velocity.patch_size**2,
                "mlp": velocity.mlp_hidden,
                "image": spec.image.size,
            },
        }

    def run(self, n: int) -> dict[str, Any]:
        """`n` calls: host frames to host verdict in ms, and the device's own time where events can be placed."""
        wall, device = [], []
        for _ in range(n):
            start = time.perf_counter()
            _ = self._score(self.batch).verdict
            wall.append((time.perf_counter() - start) * 1e3)
        if self.device.type == "cuda":
            device = engines.device_times(self.detector, self.batch, self._classes(self.batch), n)
        return {"ms": wall, "device_ms": device}

    def line(self, rate: float, frames: int, deadline_ms: float) -> dict[str, Any]:
        """Frames arrive every 1/rate s whether or not the last one is done; latency counts from arrival to verdict."""
        latencies = []
        start = time.perf_counter() + 0.05
        for i in range(frames):
            arrival = start + i / rate
            while (wait := arrival - time.perf_counter()) > 0:
                time.sleep(min(wait, 0.001) if wait > 0.002 else 0)
            _ = self._score(self.batch).verdict
            latencies.append((time.perf_counter() - arrival) * 1e3)
        return {"ms": latencies, "misses": sum(v > deadline_ms for v in latencies)}

    def peak(self) -> dict[str, Any]:
        """Peak memory since the engine was started."""
        return self.memory.read()

    def outputs(self, path: str) -> dict[str, Any]:
        """Map and score of the distinct frames, in the very batch that is timed, written to `path`."""
        maps, raw = [], []
        for i in range(0, len(self.distinct), self.case.batch):
            wanted = min(self.case.batch, len(self.distinct) - i)
            part = self.distinct[(i + np.arange(self.case.batch)) % len(self.distinct)]
            got = self._score(part, first=i)
            maps.append(got.map[:wanted])
            raw.append(got.raw_score[:wanted])
        np.savez(path, maps=np.concatenate(maps), raw=np.concatenate(raw))
        return {}

    def export(self, case: dict[str, Any], folder: str) -> dict[str, Any]:
        """Make the artefact that the case's engine runs, in a process of its own so that it leaves no memory behind."""
        self.case = Case(**case)
        start = time.perf_counter()
        model = load_model(self.case)
        frames, _ = make_frames(self.case, 1, model.spec.image.size)
        path = engines.export(self.case, model, self.case.make_scorer(), frames[:1], Path(folder))
        return {"artefact": path, "export_s": round(time.perf_counter() - start, 3)}

    def expected(self, case: dict[str, Any], path: str, independent: str | None) -> dict[str, Any]:
        """The fp32 reference's map and score of the same frames; for density also an independent estimate's.

        `independent` is a file that is made when it is missing: it serves every number of probes.
        """
        self.case = Case(**case)
        self.device = torch_device(self.case.device)
        model = load_model(self.case).to(self.device)
        scorer = self.case.make_scorer()
        frames, _ = make_frames(self.case, max(self.case.parity_frames, 1), model.spec.image.size)
        y = None
        if model.config.use_class_labels:
            y = torch.arange(len(frames)) % model.config.num_classes
        with arithmetic("fp32", self.device):
            return self._expected(model, scorer, frames, y, path, independent)

    def _expected(
        self, model: FlowModel, scorer: Scorer, frames: np.ndarray, y: torch.Tensor | None, path: str,
        independent: str | None,
    ) -> dict[str, Any]:  # fmt: skip
        cells = []
        for i in range(len(frames)):
            y1 = None if y is None else y[i : i + 1]
            x1 = model.features(frames[i : i + 1])
            cells.append(scorer.expected(model, x1, y1))
        maps = ops.upsample(torch.cat(cells), model.spec.image.size)
        raw = image_score(maps, "max")
        np.savez(path, maps=maps.cpu().numpy(), raw=raw.cpu().numpy(), cells=torch.cat(cells).cpu().numpy())
        if isinstance(scorer, Density) and independent is not None and not Path(independent).exists():
            other = Density(steps=scorer.steps, probes=INDEPENDENT_PROBES, seed=scorer.seed + 1)
            pairs = [
                other.map_with_error(model, model.features(frames[i : i + 1]), None if y is None else y[i : i + 1])
                for i in range(len(frames))
            ]
            found, errors = (torch.cat(part).cpu().numpy() for part in zip(*pairs, strict=True))
            np.savez(independent, cells=found, errors=errors)
        return {}

    def roofs(self, **what: Any) -> dict[str, Any]:
        """Measure this machine's roofs; see `roofs.measure`."""
        return roofs.measure(**what)

    def _score(self, frames: np.ndarray, first: int = 0) -> Any:
        return self.detector(frames, self._classes(frames, first))

    def _classes(self, frames: np.ndarray, first: int = 0) -> list[str] | None:
        if self.classes is None:
            return None
        return [self.classes[(first + i) % len(self.classes)] for i in range(len(frames))]


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
            do, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        method: Callable[..., dict[str, Any]] = getattr(worker, do)
        try:
            answer = {"status": "ok", **method(**arguments)}
        except EngineUnavailableError as error:
            answer = {"status": "not available", "reason": str(error)}
        except ParityError as error:
            answer = {"status": "failed parity", "reason": str(error)}
        except Exception as error:
            memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
            traceback.print_exc()
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            answer = {
                "status": "out of memory" if memory else "failed",
                "reason": f"{type(error).__name__}: {first}"[:500],
            }
        pipe.send(answer)
