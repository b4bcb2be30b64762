"""A replica of a Ray cluster: one detector, which judges what arrives together, and a canary that says it is well.

Requests wait while the detector is busy; when it is free, all that wait go to Serve's batching at once, so that batches
grow with the load and an idle detector waits for nobody longer than `wait`. What a batch holds is judged in calls that
the tightest deadline allows. A reply is a value, never an exception, so that nothing depends on how Ray wraps those.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowad_fast import bundle as bundles
from flowad_fast.bundle import Manifest
from flowad_fast.errors import BundleError, EngineUnavailableError, FlowADError
from flowad_fast.files import sha256
from flowad_fast.line.canary import CanaryCheck
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.policy import Pace
from flowad_fast.line.scoring import Call, HangError, InThread, Scoring
from flowad_fast.line.settings import Canary
from flowad_fast.serve.judging import Names, card_of, judge
from flowad_fast.serve.pool import Answered, ModelCard

_log = logging.getLogger(__name__)
FAREWELL = 0.5
"""Seconds between the last replies of a detector that hangs and the end of its process."""


@dataclass(frozen=True)
class Start:
    """How a replica loads its detector.

    Attributes:
        name: of the model.
        bundle: folder.
        version: first 12 hex digits of the manifest's SHA-256, which it must have.
        engine, device, threads: see `flowad_fast.load`.
        largest_batch: frames of one call, at most.
        wait: seconds that an idle detector waits for more.
        first, call: seconds that the first call, which may compile, and every other may take.
        canary: seconds between two judgements of the canary.
        make: a function of a module that makes the detector; None: `flowad_fast.load`.
    """

    name: str
    bundle: str
    version: str
    engine: str = "auto"
    device: str = "auto"
    threads: int | None = None
    largest_batch: int = 4
    wait: float = 0.002
    first: float = 120.0
    call: float = 10.0
    canary: float = 10.0
    make: Callable[["Start"], Call] | None = None


@dataclass(frozen=True)
class Request:
    """Frames (B, H, W, 3) that were checked, their classes, and the seconds that are left for them on arrival."""

    frames: NDArray[np.uint8]
    classes: Names
    seconds: float


@dataclass(frozen=True)
class Refused:
    """No result; `again` where another replica may judge the request in the time that is left."""

    result: NoResult
    reason: str = ""
    again: bool = False


Reply = Answered | Refused
_Waiting = tuple[Request, float]
"""A request, and when its time is over on this process's clock."""


def load_verified(start: Start) -> tuple[Manifest, Call]:
    """The manifest of the bundle that was meant, and its detector.

    Raises:
        BundleError: the folder holds another bundle, or an altered one, or none.
        EngineUnavailableError: see `flowad_fast.load`.
    """
    from flowad_fast.detector import load

    folder, manifest = bundles.read(start.bundle, verify=False)  # `load` verifies
    if (found := sha256(folder / bundles.MANIFEST)[:12]) != start.version:
        raise BundleError(
            f"{Path(start.bundle).resolve()} is {found} on this machine, expected {start.version}; copy the bundle to "
            "every machine of the cluster"
        )
    if start.make is not None:
        return manifest, start.make(start)
    return manifest, load(folder, start.engine, start.device, threads=start.threads)


@dataclass(frozen=True)
class Opened:
    """A detector that runs and has judged the canary once."""

    manifest: Manifest
    scoring: Scoring
    canary: CanaryCheck


def opened(start: Start) -> Opened:
    """Load and verify the bundle, start its engine, judge the canary.

    Raises:
        FlowADError: the bundle or the engine is not what was meant, or the canary frame has no finite score.
    """
    manifest, detector = load_verified(start)
    scoring = InThread(detector, start.version)
    scoring.start(start.first)
    canary = CanaryCheck(Canary(), None, verdicts=manifest.calibration is not None)
    canary(scoring, start.first)
    return Opened(manifest, scoring, canary)


class Replica:
    """What Serve runs, a process each. Its coroutines share one event loop."""

    def __init__(self, start: Start, leave: Callable[[int], object] = os._exit) -> None:
        """Load and verify the bundle, start its engine, judge the canary twice.

        Args:
            start: which bundle, and how.
            leave: ends this process with an exit code.

        Raises:
            FlowADError: see `opened`; also where the canary frame has no steady score.
        """
        from ray import serve

        self._start, self._leave = start, leave
        found = opened(start)
        self._scoring, self._canary = found.scoring, found.canary
        self._card = card_of(start.name, start.version, found.manifest, self._scoring.engine, start.largest_batch)
        begin = time.monotonic()
        self._check()
        self._checked = time.monotonic()
        self._pace = Pace({1: self._checked - begin})
        self._failed = ""
        self._ends: list[float] = []
        self._running = 0
        self._free = asyncio.Condition()
        self._detector = asyncio.Lock()
        self._batch: Any = serve.batch(
            max_batch_size=start.largest_batch, batch_wait_timeout_s=start.wait, batch_size_fn=_frames
        )(self._together)

    async def ask(self, request: Request) -> Reply:
        """The answer to a request, or why there is none."""
        end = time.monotonic() + request.seconds
        if self._failed:
            return Refused(NoResult.ENGINE_FAILED, self._failed, again=True)
        self._ends.append(end)
        try:
            if not await self._turn(end):
                return Refused(NoResult.LATE, "the detector was busy")
            slack = min(self._ends) - time.monotonic() - self._pace(len(request.frames))
            self._batch.set_batch_wait_timeout_s(min(self._start.wait, max(0.0, slack)))
            reply: Reply = await self._batch((request, end))
            return reply
        finally:
            self._ends.remove(end)

    async def card(self) -> ModelCard:
        """What this replica runs."""
        return self._card

    async def canary_map(self) -> NDArray[np.float32]:
        """The map of the canary frame, (S, S) float32, as last judged."""
        return self._canary.maps[self._start.version]

    async def check_health(self) -> None:
        """Serve asks now and then; raises where the replica must be replaced.

        Raises:
            FlowADError: the detector hangs, has failed, or gives the canary frame another score.
        """
        if not self._failed and time.monotonic() - self._checked >= self._start.canary:
            # Whoever asked may go away: a call that nobody waits for would leave its answer to the next one.
            await asyncio.shield(asyncio.ensure_future(self._well()))
        if self._failed:
            raise EngineUnavailableError(self._failed)

    async def _turn(self, end: float) -> bool:
        """Wait until the detector is free; False where the time is over before."""
        async with self._free:
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    await self._free.wait_for(lambda: not self._running)
            except TimeoutError:
                return False
        return True

    async def _together(self, waiting: list[_Waiting]) -> list[Reply]:
        """Judge a batch of Serve's in calls of frames of one size, each as large as the tightest deadline allows."""
        self._running += 1
        replies: dict[int, Reply] = {}
        try:
            async with self._detector:
                order = sorted(range(len(waiting)), key=lambda i: waiting[i][1])
                while order:
                    now = time.monotonic()
                    if self._failed:
                        replies |= dict.fromkeys(order, Refused(NoResult.ENGINE_FAILED, self._failed, again=True))
                        break
                    for i in [i for i in order if waiting[i][1] <= now]:
                        replies[i] = Refused(NoResult.LATE, "its time was over before it was judged")
                        order.remove(i)
                    if order:
                        chosen = self._fit(waiting, order, now)
                        order = [i for i in order if i not in chosen]
                        replies |= zip(chosen, await self._judge([waiting[i] for i in chosen]), strict=True)
        finally:
            async with self._free:
                self._running -= 1
                self._free.notify_all()
        return [replies[i] for i in range(len(waiting))]

    def _fit(self, waiting: list[_Waiting], order: list[int], now: float) -> list[int]:
        """The most urgent, and those with frames of its size that fit into its time; `order` is by time left."""
        first, end = waiting[order[0]]
        chosen, frames = [order[0]], len(first.frames)
        for i in order[1:]:
            other = waiting[i][0].frames
            fits = now + self._pace(frames + len(other)) <= end
            if other.shape[1:] == first.frames.shape[1:] and fits:
                chosen.append(i)
                frames += len(other)
        return chosen

    async def _judge(self, chosen: list[_Waiting]) -> list[Reply]:
        begin = time.monotonic()
        try:
            requests = [(one.frames, one.classes) for one, _ in chosen]
            answers = await asyncio.to_thread(judge, self._scoring, requests, self._start.call)
        except FlowADError as error:
            if isinstance(error, HangError):
                self._fail(str(error))
            else:
                _log.warning("a call failed, the canary is judged: %s", error)
                await self._well(locked=True)
            return [Refused(NoResult.ENGINE_FAILED, str(error))] * len(chosen)
        now = time.monotonic()
        self._pace.learn(sum(len(one.frames) for one, _ in chosen), now - begin)
        late = Refused(NoResult.LATE, "it was judged too late")
        return [answer if now <= end else late for answer, (_, end) in zip(answers, chosen, strict=True)]

    async def _well(self, locked: bool = False) -> None:
        """Judge the canary; what it says is in `_failed`."""
        try:
            if locked:
                await asyncio.to_thread(self._check)
            else:
                async with self._detector:
                    await asyncio.to_thread(self._check)
        except FlowADError as error:
            self._fail(str(error))
        self._checked = time.monotonic()

    def _check(self) -> None:
        self._canary(self._scoring, self._start.call)

    def _fail(self, reason: str) -> None:
        """From now on nothing is judged here. A call that hangs holds its thread, which ends with the process alone."""
        _log.error("the replica is replaced: %s", reason)
        self._failed = reason
        threading.Timer(FAREWELL, self._leave, (1,)).start()


def _frames(waiting: list[_Waiting]) -> int:
    return sum(len(request.frames) for request, _ in waiting)
