"""The line: `policy` with threads, clocks, cameras and sinks.

One thread per source brings parts, one scores them, one watches their deadlines, and each sink has its own. The policy
and everything that counts is under one lock, which nobody holds while a detector, a camera or a sink works.
"""

import logging
import threading
import time
from collections.abc import Callable, Container, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from flowad_fast.errors import FlowADError, FrameError, LineStoppedError
from flowad_fast.line.acquisition import Acquisition
from flowad_fast.line.canary import CanaryCheck
from flowad_fast.line.event import Alarm, Record, Sink
from flowad_fast.line.health import Counts, Health
from flowad_fast.line.judging import Failures, Judge
from flowad_fast.line.keeping import Keeping
from flowad_fast.line.outcome import Outcome, Part
from flowad_fast.line.outlets import Outlets
from flowad_fast.line.policy import Batch, Policy
from flowad_fast.line.records import Item, lost_record, make_record
from flowad_fast.line.scoring import Call, EngineLostError, HangError, InProcess, Scoring, Start, as_scoring
from flowad_fast.line.settings import Canary, Limits, LineSettings, sink_names
from flowad_fast.line.sources import Shot, Source
from flowad_fast.stages.frames import check_frames

_log = logging.getLogger(__name__)


class Line:
    """Parts in, exactly one record per part out, on time or openly not.

    Attributes:
        scoring: what judges; `swap` changes it.
        cameras, judge, canary: their names, what each sees, and the frame whose score is known.
        largest_batch: parts that are judged in one call, at most.

    Example:
        A detector with a calibration, frames from anywhere:

            line = Line(detector, {"left": IteratorSource(frames)}, deadline=0.2)
            line.listen(lambda event: print(event))
            line.run()
    """

    def __init__(
        self,
        scoring: Scoring | Call,
        sources: Mapping[str, Source],
        *,
        deadline: float,
        sinks: Mapping[str, Sink] | None = None,
        promising: Container[str] = (),
        classes: Mapping[str, str] | None = None,
        on_no_result: Literal["reject", "pass", "stop"] = "reject",
        capacity: int = 64,
        largest_batch: int = 4,
        limits: Limits | None = None,
        canary: Canary | None = None,
        journal: Path | None = None,
        spool: int = 256 << 20,
    ) -> None:
        """Put the line together; nothing is started yet.

        Args:
            scoring: a detector, which is called in a thread of this process; or how to call one.
            sources: by the name of the camera.
            deadline: seconds from a part's trigger until its outcome must be there.
            sinks: by name.
            promising: names of sinks for which what they missed is kept in the journal's folder.
            classes: product that each camera sees, for conditional models.
            on_no_result: what becomes of a part without a verdict.
            capacity: parts that may wait; as many pictures wait for each sink that has no spool, and each listener.
            largest_batch: parts that are judged in one call, at most.
            limits: see there.
            canary: see there.
            journal: folder of this line alone; None: a kill loses the parts in flight, and what sinks missed.
            spool: bytes on disk for each promising sink.
        """
        self.scoring: Scoring = as_scoring(scoring)
        self._sources = dict(sources)
        self.cameras = tuple(self._sources)
        self.judge = Judge(self._sources, dict(classes or {}))
        self._deadline, self._on_no_result = deadline, on_no_result
        self._limits = limits or Limits()
        self.canary = CanaryCheck(canary or Canary(), journal / "canary.json" if journal else None)
        self.largest_batch = largest_batch
        self._policy = Policy(capacity, largest_batch)
        self._lock = threading.RLock()
        self._work, self._clock = threading.Condition(self._lock), threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._over = False
        self._items: dict[str, Item] = {}
        self._batch: Batch | None = None
        self._busy: Scoring | None = None  # what the thread that scores is calling, or starting again
        self._beyond = float("inf")  # monotonic: when the call that runs is beyond its limit
        self._watched = float("inf")  # the deadline that the clock's thread waits for
        self._counts, self._failures = Counts(), Failures(self._limits.restarts, self._limits.window)
        self._loud, self._ready = "", "the line was not started"
        self._stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
        self._numbers = dict.fromkeys(self._sources, 0)
        self._keeping = Keeping(journal, self.tell)
        folder = None if journal is None else journal / "spool"
        self._outlets = Outlets(sinks or {}, promising, folder, spool, capacity)
        self._cameras: dict[str, Acquisition] = {}
        self._left = 0
        self._threads: list[threading.Thread] = []

    @classmethod
    def from_settings(cls, settings: LineSettings) -> "Line":
        """The line of a settings file; its detector gets a process of its own."""
        scoring = InProcess(Start(settings.bundle, settings.engine, settings.device, settings.threads))
        names = sink_names(settings.sinks)
        return cls(
            scoring,
            {name: one.open(settings.journal / f"{name}.taken") for name, one in settings.sources.items()},
            deadline=settings.deadline,
            sinks={name: one.open() for name, one in zip(names, settings.sinks, strict=True)},
            promising={name for name, one in zip(names, settings.sinks, strict=True) if one.promises_delivery},
            classes={name: one.class_name for name, one in settings.sources.items() if one.class_name is not None},
            on_no_result=settings.on_no_result,
            capacity=settings.capacity,
            largest_batch=settings.largest_batch,
            limits=settings.limits,
            canary=settings.canary,
            journal=settings.journal,
            spool=settings.spool,
        )

    def listen(self, listener: Callable[[Record | Alarm], None]) -> None:
        """Have a function called with every record and alarm, in order, from a thread of its own. Before `start`."""
        self._outlets.listeners.append(listener)

    def start(self) -> None:
        """Start the engine, judge the canary, name parts that a killed run has left, and take parts.

        Raises:
            FlowADError: the engine does not start, or is not what it was; no calibration; another line runs here.
        """
        for camera in self._sources:  # a wrong class fails now, not part by part
            self.scoring.classes.indices(self.judge.names([camera]), 1)
        self._keeping.open()
        try:
            self.scoring.start(self._limits.start)
            self._check(self.scoring)
        except BaseException:
            self.scoring.close()
            self._keeping.close()
            raise
        self._outlets.open(self.tell, [lost_record(part, self._on_no_result) for part in self._keeping.lost])
        for part in self._keeping.lost:
            self._keeping.end(part.part)
        for name, target in (("scoring", self._score), ("deadlines", self._watch)):
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
        shared = {"stopping": self._stopping, "arrive": self._arrive, "tell": self.tell, "ended": self._ended}
        for camera, source in self._sources.items():
            self._cameras[camera] = Acquisition(camera, source, **shared)  # type: ignore[arg-type]
        self._left = len(self._cameras)
        for thread in (*self._threads, *self._cameras.values()):
            thread.start()

    def stop(self, reason: str = "") -> None:
        """Wish the end: `wait` returns. With a reason, the end is an error of `run`. Safe in signal handlers."""
        self._loud = self._loud or reason
        self._stopping.set()
        self._wake.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the line is to end: `stop` was called, or every source has ended. False after `seconds`."""
        return self._wake.wait(seconds)

    def close(self) -> None:
        """Drain within the limit: sources end, waiting parts are judged, the rest is told so, sinks are served."""
        if self._over:
            return
        end = time.monotonic() + self._limits.drain
        self._stopping.set()
        for thread in self._cameras.values():
            thread.join(max(0.0, end - self._limits.drain * 0.7 - time.monotonic()))
        with self._lock:
            while self._policy.pending and (left := end - self._limits.drain * 0.4 - time.monotonic()) > 0:
                self._idle.wait(left)
            self._tell(self._policy.close(time.monotonic()))
            if self._batch is not None:
                self._tell(self._policy.fail(self._batch, "the line was stopped", time.monotonic()))
            self._over = True
            self._work.notify_all()
            self._clock.notify_all()
        self.scoring.close()
        self._outlets.close(max(0.2, end - time.monotonic()))
        self._keeping.close()

    def run(self) -> Health:
        """Start, wait, close; the last state.

        Raises:
            LineStoppedError: the line could not go on; every part has its outcome nevertheless.
        """
        with self:
            self.wait()
        self.raise_if_stopped()
        return self.health()

    def raise_if_stopped(self) -> None:
        """LineStoppedError where the line has stopped because it could not go on."""
        if self._loud:
            raise LineStoppedError(self._loud)

    def __enter__(self) -> "Line":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def swap(self, scoring: Scoring | Call) -> Scoring:
        """Judge with another detector from the next batch on; the one before, which still runs, for going back.

        Whether it may replace the running one, and is ready, is for the caller to check. A `Scoring` must have been
        started. Returns once the one before has given its last answer.
        """
        other = as_scoring(scoring)
        if other is not scoring:
            other.start(self._limits.start)
        with self._lock:
            before, self.scoring = self.scoring, other
            self._ready = ""
            while self._busy is before and before is not other and not (self._over or self._loud):
                self._idle.wait(0.1)
        return before

    def tell(self, alarm: Alarm) -> None:
        """Give an alarm to every sink and listener."""
        _log.warning("%s: %s", alarm.kind, alarm.text)
        with self._lock:
            self._counts.alarms.append(alarm)
        self._outlets.give(alarm)

    def health(self) -> Health:
        """How the line is now."""
        with self._lock:
            hangs = time.monotonic() > self._beyond + 1
            alive = not self._over and all(one.is_alive() for one in self._threads) and not hangs
            why = self._loud or ("a call of the detector hangs" if hangs else "" if alive else "the line does not run")
            unready = self._ready or ("the line is stopping" if self._stopping.is_set() else "")
            if self._cameras and all(one.trouble for one in self._cameras.values()):
                unready = unready or "no camera gives parts"
            return self._counts.health(
                alive=alive,
                why=why,
                unready=unready,
                scoring=self.scoring,
                policy=self._policy,
                sources={camera: one.trouble for camera, one in self._cameras.items()},
                transport={camera: one.counters for camera, one in self._cameras.items()},
                sinks=self._outlets.states(),
            )

    # Sources

    def _ended(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._wake.set()

    def _arrive(self, camera: str, shot: Shot) -> None:
        now = time.monotonic()
        frame, lost = shot.frame, shot.lost
        if frame is not None and not lost:
            try:
                frame = check_frames(frame, self.scoring.size)[0]
            except FrameError as error:
                lost = str(error)
        elif not lost:
            lost = "the source gave no frame"
        arrived = datetime.now(UTC) - timedelta(seconds=shot.age)
        with self._lock:
            if self._over:
                return  # the source outlived the line; as it was not begun, it comes again at the next start
            self._numbers[camera] += 1
            name = f"{camera}/{self._stamp}/{shot.name or self._numbers[camera]}"
            if name in self._items:
                name += f"~{self._numbers[camera]}"
            part = Part(name, camera, now - shot.age, now - shot.age + self._deadline)
            self._items[name] = Item(camera, arrived, frame, shot.stamp)
            self._counts.arrived += 1
            self._keeping.begin(name, camera, arrived)
            self._keeping.taken(shot.begun, camera)
            now = time.monotonic()
            self._tell(self._policy.lose(part, now, lost) if lost else self._policy.arrive(part, now))
            self._work.notify()
            if part.deadline < self._watched:
                self._clock.notify()

    # Deadlines

    def _watch(self) -> None:
        with self._lock:
            while not self._over:
                now = time.monotonic()
                self._tell(self._policy.expire(now))
                # Where no part is pending, until the first that may come would be late: then none has to wake this
                # thread, which would take the lock from the one that is to judge it.
                until = self._policy.next_deadline()
                self._watched = now + self._deadline if until is None else until
                self._clock.wait(max(0.0, self._watched - now) + 2e-4)

    # Scoring

    def _score(self) -> None:
        while self._score_batch():
            pass

    def _score_batch(self) -> bool:
        """Wait for a batch and judge it; False when the line is over. Between batches nothing holds their pictures."""
        with self._lock:
            self._busy = None
            self._idle.notify_all()
            while not self._over and (batch := self._policy.take(time.monotonic())) is None:
                self._work.wait()
            if self._over:
                return False
            assert batch is not None
            items = [self._items[part.id] for part in batch.parts]
            scoring, self._batch = self.scoring, batch
            self._busy = scoring
            self._beyond = time.monotonic() + self._limits.call
        failure = None
        try:
            judgements = self.judge(scoring, batch, items, self._limits.call)
        except (HangError, EngineLostError) as error:
            failure = str(error)
        except Exception as error:  # about these parts, not about the engine
            with self._lock:
                self._batch, self._beyond = None, float("inf")
                reason = f"{type(error).__name__}: {error}"
                self._tell(self._policy.fail(batch, reason, time.monotonic()))
            return True
        with self._lock:
            self._batch, self._beyond = None, float("inf")
            now = time.monotonic()
            if failure is None:
                self._tell(self._policy.finish(batch, judgements, now))
            else:
                self._tell(self._policy.fail(batch, failure, now))
        return failure is None or self._restart(scoring, failure)

    def _check(self, scoring: Scoring) -> None:
        """Judge the canary, learn how long batches take, and say that the line is ready; FlowADError otherwise."""
        _log.info("canary: %s", self.canary(scoring, self._limits.start))
        found = self.canary.warm(scoring, self.largest_batch, self._limits.start)
        with self._lock:
            for size, seconds in found.items():
                self._policy.pace.learn(size, seconds)
            self._ready = ""

    def _restart(self, scoring: Scoring, reason: str) -> bool:
        """Start the engine again after a failure; False when the line stops instead."""
        while True:
            too_many = self._failures.add(time.monotonic())
            with self._lock:
                self._counts.failures += 1
                self._ready = reason
                if self._over:
                    return False
            figures = {"failures": float(len(self._failures))}
            self.tell(Alarm("engine failed", datetime.now(UTC), reason, figures=figures))
            if too_many:
                self.stop(f"the engine failed {len(self._failures)} times in {self._limits.window:g} s, last: {reason}")
                self._abandon()
                return False
            if self.scoring is not scoring:  # it was replaced meanwhile
                return True
            try:
                scoring.start(self._limits.start)
                self._check(scoring)
            except FlowADError as error:
                reason = f"starting again failed: {error}"
                continue
            self.tell(Alarm("engine failed", datetime.now(UTC), f"{scoring.engine} works again", over=True))
            return True

    def _abandon(self) -> None:
        """No engine any more: what waits, and what still comes, is told so at once."""
        with self._lock:
            while (batch := self._policy.take(time.monotonic())) is not None:
                self._tell(self._policy.fail(batch, self._loud, time.monotonic()))
            self._tell(self._policy.close(time.monotonic()))

    # Outcomes, under the lock

    def _tell(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            record = make_record(outcome, self._items.pop(outcome.part.id), self._on_no_result)
            self._counts.add(record)
            self._outlets.give(record)
            self._keeping.end(record.part)
            if record.action == "stop":
                self.stop(f"part {record.part} has no result ({record.result}: {record.reason}) and on_no_result=stop")
        if outcomes and not self._policy.pending:
            self._idle.notify_all()
