"""Detectors of this computer as a `Pool`, without a cluster: one per model, each in a process that may be killed.

Requests are judged one by one in the order of their arrival, each in one call of the detector, so that an answer does
not depend on what else was asked. A request whose time will not suffice is refused before it costs anything, unless it
is the only one: how long a call takes is learned from those that were made, and may have been learned wrongly.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from flowad_fast.bundle import Manifest
from flowad_fast.errors import FlowADError, FrameError, nearest
from flowad_fast.line.canary import CanaryCheck
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.policy import Pace
from flowad_fast.line.scoring import InProcess, Scoring, Start
from flowad_fast.line.settings import Canary
from flowad_fast.serve.judging import card_of, checked, judge
from flowad_fast.serve.pool import Answered, Asked, ModelCard, NoResultError, UnknownModelError
from flowad_fast.serve.settings import ModelSettings, ServeLimits

_log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two tries to start an engine that does not start; doubled after each."""


@dataclass(frozen=True)
class Local:
    """A detector, and what to know of its bundle.

    Attributes:
        scoring: not started yet.
        manifest: of the bundle.
        largest_batch: frames of one request, at most.
        queue: requests that may wait; one more is refused.
    """

    scoring: Scoring
    manifest: Manifest
    largest_batch: int = 4
    queue: int = 64


class LocalPool:
    """See `Pool`. Nothing can be asked before `start`."""

    def __init__(self, models: Mapping[str, Local], limits: ServeLimits | None = None) -> None:
        """Detectors by the name of their model; nothing is started."""
        limits = limits or ServeLimits()
        self._workers = {name: _Worker(name, local, limits) for name, local in models.items()}

    @classmethod
    def of(cls, models: Mapping[str, ModelSettings], limits: ServeLimits) -> "LocalPool":
        """Bundles by the name of their model, each in a child process; `replicas`, `cpus`, `gpus` and `wait` are Ray's.

        Raises:
            BundleError, ConfigError: a bundle is missing, altered, or of another version.
        """
        found = {}
        for name, model in models.items():
            scoring = InProcess(Start(model.bundle, model.engine, model.device, model.threads))
            found[name] = Local(scoring, scoring.manifest, model.largest_batch, model.queue)
        return cls(found, limits)

    async def start(self) -> None:
        """Start every engine and judge the canary frame.

        Raises:
            FlowADError: one does not start, or its canary has no finite score; none runs then.
        """
        try:
            for worker in self._workers.values():
                await asyncio.wrap_future(worker.start())
        except BaseException:
            for worker in self._workers.values():
                worker.stop()
                worker.end()
            raise

    async def models(self) -> Sequence[ModelCard]:
        """See `Pool`."""
        return [worker.card for worker in self._workers.values() if worker.card is not None]

    async def ready(self, model: str) -> str:
        """See `Pool`."""
        return self._worker(model).trouble

    async def ask(self, asked: Asked) -> Answered:
        """See `Pool`."""
        worker = self._worker(asked.model)
        card = worker.card
        if card is None or asked.version not in ("", card.version):
            raise UnknownModelError(f"no version {asked.version!r} of {asked.model}")
        job = _Job(checked(asked, card), time.monotonic() + asked.seconds)
        worker.put(job)
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(job.answer), max(0.0, asked.seconds))
        except TimeoutError:
            raise NoResultError(NoResult.LATE, worker.trouble or "it was not judged in its time") from None
        finally:
            worker.forget(job)
        if time.monotonic() > job.end:
            raise NoResultError(NoResult.LATE, "it was judged too late")
        return answer

    async def close(self) -> None:
        """See `Pool`."""
        for worker in self._workers.values():
            worker.stop()
        for worker in self._workers.values():
            while worker.going:  # not in a thread of the loop's, which would have to end before the process may
                await asyncio.sleep(0.01)
            worker.end()

    def _worker(self, model: str) -> "_Worker":
        if model not in self._workers:
            raise UnknownModelError(f"no model {model!r}; {nearest(model, self._workers)}")
        return self._workers[model]


@dataclass(eq=False)
class _Job:
    """A request that was checked, when its time is over, and what becomes of it."""

    asked: Asked
    end: float
    answer: "Future[Answered]" = field(default_factory=Future)

    def refuse(self, result: NoResult, reason: str = "") -> None:
        self.answer.set_exception(NoResultError(result, reason))


class _Worker:
    """One detector and the requests that wait for it; everything that calls the detector is on one thread.

    Attributes:
        card: None before the first start.
    """

    def __init__(self, name: str, local: Local, limits: ServeLimits) -> None:
        self._name, self._local, self._limits = name, local, limits
        self._canary = CanaryCheck(Canary(), None, verdicts=local.manifest.calibration is not None)
        self._pace = Pace()
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failed = "it was not started"
        self._due, self._pause = 0.0, FIRST_PAUSE
        self._thread: threading.Thread | None = None
        self.card: ModelCard | None = None

    @property
    def trouble(self) -> str:
        """Why it is not ready, "" when it is."""
        return "it is shutting down" if self._closed else self._failed

    def start(self) -> "Future[None]":
        """Start the engine, then answer; done when it runs, or FlowADError."""
        started: Future[None] = Future()
        started.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._live, args=(started,), name=f"model {self._name}", daemon=True)
        self._thread.start()
        return started

    def put(self, job: _Job) -> None:
        """One more request; NoResultError where it is refused."""
        with self._changed:
            if self._closed:
                raise NoResultError(NoResult.SHUTTING_DOWN)
            if len(self._waiting) >= self._local.queue:
                raise NoResultError(NoResult.QUEUE_FULL, f"{len(self._waiting)} requests wait for {self._name}")
            self._waiting.append(job)
            self._changed.notify_all()

    def forget(self, job: _Job) -> None:
        """Nobody waits for this request any more."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Refuse what waits and what comes."""
        with self._changed:
            self._closed = True
            while self._waiting:
                job = self._waiting.popleft()
                if job.answer.set_running_or_notify_cancel():
                    job.refuse(NoResult.SHUTTING_DOWN)
            self._changed.notify_all()

    @property
    def going(self) -> bool:
        """Whether a call is being made."""
        return self._thread is not None and self._thread.is_alive()

    def end(self) -> None:
        """End the engine, whatever it does."""
        self._local.scoring.close()

    def _live(self, started: "Future[None]") -> None:
        try:
            self._start_engine()
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(None)
        self._work()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting) and (left := self._due - time.monotonic()) > 0:
                    self._changed.wait(left)
                if self._closed:
                    return
                job = self._waiting.popleft() if self._waiting else None
            if time.monotonic() >= self._due:
                self._look_after()
            if job is not None and job.answer.set_running_or_notify_cancel():
                self._judge(job)

    def _judge(self, job: _Job) -> None:
        begin, frames = time.monotonic(), len(job.asked.frames)
        if self._failed:
            return job.refuse(NoResult.ENGINE_FAILED, self._failed)
        if begin >= job.end:
            return job.refuse(NoResult.LATE, "others were judged before it")
        if self._waiting and begin + self._pace(frames) > job.end:
            return job.refuse(NoResult.LATE, f"{job.end - begin:.3f} s are left, which do not suffice for judging it")
        try:
            answer = judge(self._local.scoring, [(job.asked.frames, job.asked.classes)], self._limits.call)[0]
        except FrameError as error:
            return job.answer.set_exception(error)
        except Exception as error:
            _log.warning("%s: a call failed, the engine is started again: %s", self._name, error)
            self._fail(error, 0.0)
            return job.refuse(NoResult.ENGINE_FAILED, str(error))
        now = time.monotonic()
        self._pace.learn(frames, now - begin)
        if now > job.end:
            return job.refuse(NoResult.LATE, "it was judged too late")
        job.answer.set_result(answer)

    def _fail(self, error: Exception, pause: float) -> None:
        self._failed = str(error) or type(error).__name__
        self._due = time.monotonic() + pause

    def _look_after(self) -> None:
        """Start an engine that does not run; judge the canary with one that does."""
        try:
            if self._failed:
                self._start_engine()
            else:
                self._check(self._limits.call)
        except Exception as error:
            pause = self._pause if self._failed else 0.0
            _log.error("%s: not ready, the engine is started again in %g s: %s", self._name, pause, error)
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            self._fail(error, pause)

    def _check(self, limit: float) -> None:
        self._canary(self._local.scoring, limit)
        self._due = time.monotonic() + self._limits.canary

    def _start_engine(self) -> None:
        """Start, judge the canary, learn how long a call takes; FlowADError, also for another score than before."""
        scoring, local = self._local.scoring, self._local
        try:
            scoring.start(self._limits.start)
            self._check(self._limits.start)
            self._pace = Pace(self._canary.warm(scoring, local.largest_batch, self._limits.start))
        except FlowADError:
            scoring.close()
            raise
        self.card = card_of(self._name, scoring.bundle, local.manifest, scoring.engine, local.largest_batch)
        self._failed, self._pause = "", FIRST_PAUSE
