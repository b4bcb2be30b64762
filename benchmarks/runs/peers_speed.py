"""How long a frame takes: every method in a process of its own, in turns with one of ours."""

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flowad_fast.benchmarks.measure.memory import PeakMemory
from flowad_fast.benchmarks.measure.processes import Process, started
from flowad_fast.benchmarks.measure.turns import Effort, measured, paired, take_turns
from flowad_fast.benchmarks.measure.worker import Samples, Worker, WorkerError
from flowad_fast.benchmarks.record.record import Measured, Memory, Ratio, Status
from flowad_fast.benchmarks.runs import peers_models
from flowad_fast.detector import load
from flowad_fast.engines.device import torch_device
from flowad_fast.stages.frames import invalid_frames

TIMEOUT = 900.0
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """One method to be timed.

    Attributes:
        name: of the row.
        bundle: of ours; None for a peer.
        trained: a peer's weights after training; None where it stays untrained.
        download: whether a peer may fetch its backbone's weights.
    """

    name: str
    bundle: Path | None = None
    trained: Path | None = None
    download: bool = False


class PeerWorker(Worker):
    """A method with its frames, run on request."""

    def open(self, job: Job, frames: Frames, labels: Sequence[str], threads: int, device: str) -> None:
        """Load a method; `frames` (n, H, W, 3) are called one by one, in turn, `labels` are their products."""
        torch.set_num_threads(threads)
        self.device = torch_device(device)
        self._frames, self._next = frames, 0
        self._call = self._ours(job.bundle, labels, threads) if job.bundle else self._peer(job)
        gc.collect()
        self.memory = PeakMemory(self.device)
        for _ in range(2):
            self.run(1)

    def _ours(self, bundle: Path, labels: Sequence[str], threads: int) -> Callable[[int], NDArray[np.float32]]:
        detector = load(bundle, engine="onnxruntime", device=str(self.device), threads=threads)
        detector.prepare(*self._frames.shape[1:3])

        def call(at: int) -> NDArray[np.float32]:
            found = detector(self._frames[at : at + 1], labels[at])
            assert found.verdict[0] != "invalid", "real photos have a verdict"
            return found.map

        return call

    def _peer(self, job: Job) -> Callable[[int], NDArray[np.float32]]:
        (peer,) = peers_models.chosen([job.name], job.download)
        model = peer.built(job.download).model
        if job.trained is not None:
            peers_models.restore(model, job.trained)
        model = model.to(self.device).eval()

        def call(at: int) -> NDArray[np.float32]:
            frames = self._frames[at : at + 1]
            maps, scores = peers_models.scores_of(peer, model, torch.from_numpy(frames).to(self.device))
            invalid_frames(frames)  # as ours looks for black and uniform ones
            found = maps.cpu().numpy()
            assert np.isfinite(found).all() and np.isfinite(scores.cpu().numpy()).all(), "untrained or not"
            return found

        return call

    def run(self, n: int, on_device: int | None = None) -> Samples:
        """`n` calls, a frame each, in ms: from the frame in host memory to map and score there."""
        wall = []
        for _ in range(n):
            at = self._next % len(self._frames)
            self._next += 1
            start = time.perf_counter()
            self._call(at)
            wall.append((time.perf_counter() - start) * 1e3)
        return Samples(wall, [])

    def peak(self) -> Memory:
        """Peak memory since the method was loaded."""
        return self.memory.read()


@dataclass(frozen=True)
class Timed:
    """What came of a job."""

    status: Status
    reason: str | None = None
    measured: Measured | None = None
    anchor: Ratio | None = None


def timed(
    jobs: Sequence[Job], anchor: Job, frames: Frames, labels: Sequence[str], threads: int, device: str,
    seconds: float, tell: Callable[[str], None], keep: Callable[[str, Timed], None],
) -> None:  # fmt: skip
    """Time every job in turns with the anchor, and the anchor by its turns; `keep` receives each when it is there.

    Args:
        jobs: without the anchor.
        anchor: one of ours; it stays loaded.
        frames: (n, H, W, 3) uint8.
        labels: the frames' products.
        threads: of each process.
        device: auto, cpu, cuda or cuda:N.
        seconds: per job, both sides of the turns together.
        tell: receives what goes on.
        keep: receives a name and what came of it.
    """
    effort = Effort(seconds=seconds, least=3, extend=False)
    with tempfile.TemporaryDirectory(prefix="flowad-bench-") as scratch:
        folder = Path(scratch)
        with started(folder, TIMEOUT, kind=PeerWorker) as reference:
            tell(f"time: {anchor.name}")
            reference.ask(PeerWorker.open, anchor, frames, labels, threads, device)
            turns = take_turns(reference, None, effort, "offline")
            own = measured(1, [turn.ours for turn in turns], reference.ask(PeerWorker.peak))
            keep(anchor.name, Timed("ok", None, own, Ratio(speed=1, low=1, high=1, pairs=0)))
            for job in jobs:
                tell(f"time: {job.name}")
                keep(job.name, _one(job, reference, folder, frames, labels, threads, device, effort))


def _one(
    job: Job, reference: Process, folder: Path, frames: Frames, labels: Sequence[str], threads: int, device: str,
    effort: Effort,
) -> Timed:  # fmt: skip
    try:
        with started(folder, TIMEOUT, kind=PeerWorker) as process:
            process.ask(PeerWorker.open, job, frames, labels, threads, device)
            turns = take_turns(process, reference, effort, "offline")
            found = measured(1, [turn.ours for turn in turns], process.ask(PeerWorker.peak))
            return Timed("ok", None, found, paired(turns))
    except WorkerError as error:
        if not reference.alive:
            raise
        return Timed(error.status, error.reason)
