"""Calls of a detector that may hang: behind a limit, and started again.

A call that never returns cannot be ended from within a process: a thread cannot be killed, and C code that holds
Python's lock stops every thread. So `InProcess`, which a settings file gets, runs the detector in a child that is
killed; frames and maps travel through shared memory. `InThread` is for those who hand a detector of their own to the
line: it abandons the thread that hangs, which helps as long as the call has let go of Python's lock.
"""

import logging
import math
import multiprocessing
import os
import pickle
import socket
import sys
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from mmap import mmap
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

    def send(self, message: object, files: Sequence[int] = ()) -> None:
        """A message, and files that the other end may use too; OSError where that is closed."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        if files:
            socket.send_fds(self._end, [data], files)
        else:
            self._end.sendall(data)

    def receive(self, limit: float | None = None) -> tuple[object, list[int]]:
        """The next message and its files.

        Raises:
            TimeoutError: none came within `limit` seconds.
            EOFError, OSError: the other end is closed.
        """
        self._end.settimeout(None if limit is None else max(limit, 1e-3))
        size, more, _, _ = self._end.recvmsg_into([self._room], socket.CMSG_SPACE(_SLOTS * array("i").itemsize))
        if not size:
            raise EOFError("the other end is closed")
        return pickle.loads(memoryview(self._room)[:size]), [fd for _, _, given in more for fd in array("i", given)]

    def close(self) -> None:
        """Both ends notice."""
        self._end.close()


_SLOTS = 6
"""Places of memory that both processes see: of the frames, of maps that are copied, and of maps that are lent."""


class _Memory:
    """Memory that both processes see, in numbered slots; the kernel frees it when neither holds it any more.

    A map is lent as it lies there: its slot is used again when nobody holds it. Where all are held, maps are copied.
    """

    def __init__(self) -> None:
        self._slots: list[NDArray[np.uint8] | None] = [None] * _SLOTS
        self._given: dict[int, int] = {}

    def frames(self, size: int) -> NDArray[np.uint8]:
        """The slot of the frames, with room for `size` bytes."""
        return self._room(0, size)

    def maps(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """A slot that nobody holds, and its memory; slot 1 is for maps that the caller must copy."""
        slots = self._slots  # a count of 2 is of this list and of the call that counts
        free = (i for i in range(2, _SLOTS) if slots[i] is None or sys.getrefcount(slots[i]) == 2)
        slot = next(free, 1)
        return slot, self._room(slot, size)

    def given(self) -> dict[int, int]:
        """Slots that the other process does not know, and their files, which the caller closes."""
        given, self._given = self._given, {}
        return given

    def _room(self, slot: int, size: int) -> NDArray[np.uint8]:
        there = self._slots[slot]
        if there is None or len(there) < size:
            file = os.memfd_create("flowad-line")
            os.ftruncate(file, size)
            there = self._slots[slot] = _mapped(file)
            self._given[slot] = file
        return there


def _mapped(file: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap(file, 0), np.uint8)


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
        self._memory = _Memory()

    def start(self, limit: float) -> None:
        """Kill the child that there is, and start another."""
        if not hasattr(os, "memfd_create"):
            raise EngineUnavailableError(
                "a detector in a process of its own shares memory in a way that only Linux has"
            )
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
        shape = (len(frames), *self.manifest.map_size(frames.shape[1], frames.shape[2]))
        size = math.prod(shape) * 4
        self._memory.frames(frames.nbytes)[: frames.nbytes].reshape(frames.shape)[...] = frames
        slot, memory = self._memory.maps(size)
        given = self._memory.given()
        try:
            self._messages.send((frames.shape, classes, slot, tuple(given)), tuple(given.values()))
        except OSError as error:
            raise EngineLostError(f"the detector's process has ended ({error})") from None
        finally:
            for file in given.values():
                os.close(file)
        answer = self._answer(limit)
        if not isinstance(answer, tuple):
            raise EngineLostError(f"the detector's process said {answer!r}, expected a result")
        raw, names, invalid = answer
        maps = memory[:size].view(np.float32).reshape(shape)
        maps = maps.copy() if slot == 1 else maps
        scores, frame_size = np.array(raw, np.float32), (frames.shape[1], frames.shape[2])
        return Detection(maps, scores, names, invalid, self.engine, self.calibration, frame_size)

    def close(self) -> None:
        """Kill the child and free the memory."""
        if self._child is not None:
            self._child.kill()
            self._child.join(5)
            self._child = None
        if self._messages is not None:
            self._messages.close()
            self._messages = None
        self._memory = _Memory()  # maps that somebody holds keep theirs

    def _answer(self, limit: float) -> object:
        assert self._messages is not None
        try:
            answer, _ = self._messages.receive(limit)
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
    slots: dict[int, NDArray[np.uint8]] = {}
    try:
        try:
            detector: Call = make(start) if make is not None else _loaded(start)
        except Exception as error:
            messages.send(EngineUnavailableError(f"{type(error).__name__}: {error}"))
            return
        messages.send(detector.engine)
        while True:
            job: tuple[tuple[int, ...], Names, int, tuple[int, ...]]
            job, files = messages.receive()  # type: ignore[assignment]
            shape, classes, slot, given = job
            for number, file in zip(given, files, strict=True):
                slots[number] = _mapped(file)
                os.close(file)
            try:
                found = detector(slots[0][: math.prod(shape)].reshape(shape), classes)
                slots[slot][: found.map.nbytes].view(np.float32).reshape(found.map.shape)[...] = found.map
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
