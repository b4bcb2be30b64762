"""Calls of a detector that may hang: behind a limit, and started again.

A call that never returns cannot be ended from within a process: a thread cannot be killed, and C code that holds
Python's lock stops every thread. So `InProcess`, which a settings file gets, runs the detector in a child that is
killed; frames and maps travel through shared memory. `InThread` is for those who hand a detector of their own to the
line: it abandons the thread that hangs, which helps as long as the call has let go of Python's lock.
"""

import logging
import math
import multiprocessing
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flowad_fast import bundle as bundles
from flowad_fast.config import Classes
from flowad_fast.detector import Detection, Detector, load
from flowad_fast.errors import EngineUnavailableError, FlowADError, FrameError
from flowad_fast.files import sha256
from flowad_fast.stages.decision import Calibration

_log = logging.getLogger(__name__)
Frames: TypeAlias = NDArray[np.uint8]
Names: TypeAlias = Sequence[str | int] | None


class HangError(FlowADError, RuntimeError):
    """The detector did not answer within its limit."""


class EngineLostError(FlowADError, RuntimeError):
    """The process of the detector has ended, or it raised something that is not about a frame."""


class Scoring(Protocol):
    """What the line calls. From one thread at a time.

    Attributes:
        bundle: hash of the bundle, "" for detectors without one.
        engine: what runs.
        classes: the model's classes.
        size: height and width that frames must have, None for any.
        image_size: side of the maps, pixels.
        calibration: thresholds, None for a model that was not calibrated.
    """

    bundle: str
    engine: str
    classes: Classes
    size: tuple[int, int] | None
    image_size: int
    calibration: Calibration | None

    def start(self, limit: float) -> None:
        """Start, or after a failure start again, within `limit` seconds; FlowADError where that fails."""

    def __call__(self, frames: Frames, classes: Names, limit: float) -> Detection:
        """Frames (B, H, W, 3) of one size; FrameError, HangError, or EngineLostError."""

    def close(self) -> None:
        """End it; calling it again does nothing."""


class Call(Protocol):
    """The part of `Detector` that judging needs, so that tests and embedders can bring their own."""

    engine: str
    classes: Classes
    frame_size: tuple[int, int] | None
    image_size: int

    def __call__(self, frames: Frames, classes: Names = None) -> Detection:
        """Judge frames (B, H, W, 3)."""


_Job: TypeAlias = tuple[Frames, Names]
_Answer: TypeAlias = Detection | Exception


class InThread:
    """A detector of the embedder's own, which is not closed with the line."""

    def __init__(self, detector: Call, bundle: str = "") -> None:
        """Nothing is started yet."""
        self._detector, self.bundle = detector, bundle
        self.engine, self.classes, self.size = detector.engine, detector.classes, detector.frame_size
        self.image_size = detector.image_size
        self.calibration: Calibration | None = getattr(detector, "calibration", None)
        self._jobs: SimpleQueue[_Job | None] | None = None
        self._answers: SimpleQueue[_Answer] = SimpleQueue()

    def start(self, limit: float) -> None:
        """A new thread; one that hangs is left behind."""
        self.close()
        self._jobs, self._answers = SimpleQueue(), SimpleQueue()
        threading.Thread(target=self._work, args=(self._jobs, self._answers), name="detector", daemon=True).start()

    def __call__(self, frames: Frames, classes: Names, limit: float) -> Detection:
        """See `Scoring`."""
        if self._jobs is None:
            raise EngineLostError("the detector was closed")
        self._jobs.put((frames, classes))
        try:
            answer = self._answers.get(timeout=limit)
        except Empty:
            raise HangError(f"the detector did not answer within {limit:g} s") from None
        if isinstance(answer, FrameError):
            raise answer
        if isinstance(answer, Exception):
            raise EngineLostError(f"the detector raised {type(answer).__name__}: {answer}")
        return answer

    def close(self) -> None:
        """Let the thread end after its call."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    def _work(self, jobs: "SimpleQueue[_Job | None]", answers: "SimpleQueue[_Answer]") -> None:
        while (job := jobs.get()) is not None:
            try:
                answers.put(self._detector(*job))
            except Exception as error:
                answers.put(error)


def as_scoring(given: Scoring | Call) -> Scoring:
    """A detector behind a thread of this process; what is a `Scoring` already, as it is."""
    return given if hasattr(given, "start") else InThread(given)  # type: ignore[return-value]


@dataclass(frozen=True)
class Start:
    """How a child loads its detector."""

    bundle: Path
    engine: str = "auto"
    device: str = "auto"
    threads: int | None = None


class _Messages:
    """One end of a wire between two processes. From one thread.

    Not multiprocessing's: after a detector's call nothing is in the caches, and its Python costs a quarter of a
    millisecond in each call. Here the kernel keeps messages apart, and waits.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end, self._room = end, bytearray(1 << 18)  # more than the kernel takes of one message

    def send(self, message: object) -> None:
        """OSError where the other end is closed."""
        self._end.sendall(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def receive(self, limit: float | None = None) -> object:
        """The next message; TimeoutError after `limit` seconds, EOFError or OSError where the other end is closed."""
        self._end.settimeout(None if limit is None else max(limit, 1e-3))
        if not (size := self._end.recv_into(self._room)):
            raise EOFError("the other end is closed")
        return pickle.loads(memoryview(self._room)[:size])

    def close(self) -> None:
        """Both ends notice."""
        self._end.close()


class _MapMemory:
    """Copies of maps in memory that is used again once nobody holds it, for new pages cost more than the copy."""

    def __init__(self, most: int = 4) -> None:
        """No more than `most` blocks are kept; who needs another gets memory of its own."""
        self._most = most
        self._blocks: list[NDArray[np.float32]] = []

    def copy(self, maps: NDArray[np.float32]) -> NDArray[np.float32]:
        """A copy that is the caller's for as long as it, or a view of it, is held."""
        free = [i for i in range(len(self._blocks)) if sys.getrefcount(self._blocks[i]) == 2]  # the list, and the call
        fitting = next((i for i in free if self._blocks[i].size >= maps.size), None)
        if fitting is not None:
            block = self._blocks[fitting]
        else:
            block = np.empty(maps.size, np.float32)
            if free:
                self._blocks[free[0]] = block
            elif len(self._blocks) < self._most:
                self._blocks.append(block)
        found = block[: maps.size].reshape(maps.shape)
        found[...] = maps
        return found


class InProcess:
    """A bundle's detector in a child process, which is killed when it hangs."""

    def __init__(self, start: Start, make: Callable[[Start], Call] | None = None) -> None:
        """Read the bundle; nothing is started yet.

        Args:
            start: what the child loads.
            make: a function of a module that makes the detector in the child; None: `flowad_fast.load`.
        """
        self._start, self._make = start, make
        folder, self.manifest = bundles.read(start.bundle)
        self.bundle = sha256(folder / bundles.MANIFEST)[:12]
        self.engine, self.classes = "", self.manifest.model.classes
        self.size, self.image_size = self.manifest.frame_size, self.manifest.model.image.size
        self.calibration, self.path = self.manifest.calibration, start.bundle
        self._child: multiprocessing.process.BaseProcess | None = None
        self._messages: _Messages | None = None
        self._memory: SharedMemory | None = None
        self._maps = _MapMemory()

    def start(self, limit: float) -> None:
        """Kill the child that there is, and start another."""
        self.close()
        context = multiprocessing.get_context("spawn")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._messages = _Messages(ours)
        self._child = context.Process(
            target=serve, args=(theirs, self._start, self._make), name="flowad-line detector", daemon=True
        )
        self._child.start()
        theirs.close()
        answer = self._answer(limit)
        if not isinstance(answer, str):
            self.close()
            raise EngineUnavailableError(f"the detector's process said {answer!r}, expected the name of its engine")
        if sha256(self._start.bundle / bundles.MANIFEST)[:12] != self.bundle:
            self.close()
            raise EngineUnavailableError(f"{self._start.bundle}: the bundle was replaced; start the line again for it")
        self.engine = answer

    def __call__(self, frames: Frames, classes: Names, limit: float) -> Detection:
        """See `Scoring`."""
        if self._messages is None:
            raise EngineLostError("the detector's process is not running")
        maps = (len(frames), *self.manifest.map_size(frames.shape[1], frames.shape[2]))
        begin = -(-frames.nbytes // 64) * 64
        memory = self._shared(begin + math.prod(maps) * 4)
        np.ndarray(frames.shape, np.uint8, memory.buf)[...] = frames
        try:
            self._messages.send((memory.name, frames.shape, begin, classes))
        except OSError as error:
            raise EngineLostError(f"the detector's process has ended ({error})") from None
        answer = self._answer(limit)
        if not isinstance(answer, tuple):
            raise EngineLostError(f"the detector's process said {answer!r}, expected a result")
        raw, names, invalid = answer
        heat = self._maps.copy(np.ndarray(maps, np.float32, memory.buf, begin))
        scores, size = np.array(raw, np.float32), (frames.shape[1], frames.shape[2])
        return Detection(heat, scores, names, invalid, self.engine, self.calibration, size)

    def close(self) -> None:
        """Kill the child and free the memory."""
        if self._child is not None:
            self._child.kill()
            self._child.join(5)
            self._child = None
        if self._messages is not None:
            self._messages.close()
            self._messages = None
        if self._memory is not None:
            self._memory.close()
            self._memory.unlink()
            self._memory = None

    def _shared(self, size: int) -> SharedMemory:
        if self._memory is None or self._memory.size < size:
            if self._memory is not None:
                self._memory.close()
                self._memory.unlink()
            self._memory = SharedMemory(create=True, size=size)
        return self._memory

    def _answer(self, limit: float) -> object:
        assert self._messages is not None
        try:
            answer = self._messages.receive(limit)
        except TimeoutError:
            raise HangError(f"the detector did not answer within {limit:g} s") from None
        except (EOFError, OSError):
            raise EngineLostError("the detector's process has ended") from None
        if isinstance(answer, FrameError):
            raise answer
        if isinstance(answer, Exception):
            raise EngineLostError(str(answer))
        return answer


def serve(end: socket.socket, start: Start, make: Callable[[Start], Call] | None) -> None:
    """The child: load, say the engine's name, then answer until the other end is closed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the line drains first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as does a service manager's stop; the other end's end ends it
    messages = _Messages(end)
    memory: SharedMemory | None = None
    try:
        try:
            detector: Call = make(start) if make is not None else _loaded(start)
        except Exception as error:
            messages.send(EngineUnavailableError(f"{type(error).__name__}: {error}"))
            return
        messages.send(detector.engine)
        while True:
            job: tuple[str, tuple[int, ...], int, Names] = messages.receive()  # type: ignore[assignment]
            name, shape, begin, classes = job
            if memory is None or memory.name != name:
                if memory is not None:
                    memory.close()
                memory = SharedMemory(name)
            try:
                found = detector(np.ndarray(shape, np.uint8, memory.buf), classes)
                np.ndarray(found.map.shape, np.float32, memory.buf, begin)[...] = found.map
                # Of the detection all but its map, which lies in the shared memory.
                messages.send((found.raw_score.tolist(), found.classes, found.invalid))
            except FrameError as error:
                messages.send(error)
            except Exception as error:
                messages.send(EngineLostError(f"the detector raised {type(error).__name__}: {error}"))
    except (EOFError, OSError):
        return  # the line has ended or let go


def _loaded(start: Start) -> Detector:
    return load(start.bundle, start.engine, start.device, threads=start.threads)
