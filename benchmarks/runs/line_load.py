"""How many parts a second a line keeps up with, and what it adds to a bare call of the detector."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from flowad_fast.benchmarks.record.line import AddedResult, Quantiles, RateResult, Setting, Trial
from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.detection import Detection
from flowad_fast.detector import load
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.runner import Line
from flowad_fast.line.scoring import InProcess, Start
from flowad_fast.line.settings import Limits
from flowad_fast.line.sources import EndOfSource, Shot
from flowad_fast.stages.decision import Verdict

LEAST = 1000
"""Parts of a trial, at least: fewer could not show that one of a thousand is late."""
OVER = 0.02
"""A rate so much above what can be judged must use up a deadline in a trial: parts wait before they are late."""
LOWEST, HIGHEST = 0.5, 1.15
"""Where the sustained rate is looked for, as shares of the engine's own."""
ALLOWED = 1e-3
"""Share of parts without a verdict in time at which p99.9 of the deadlines still holds."""
STEPS = 6
"""Halvings of the range in which the sustained rate lies."""
LIMITS = Limits(call=30.0, start=120.0, drain=60.0)
Frames = NDArray[np.uint8]


class Paced:
    """Frames at a rate, in turn; a deadline counts from when a part was due, also where it was taken late."""

    def __init__(self, frames: Frames, rate: float, count: int) -> None:
        """Times count from the first read."""
        self._frames, self._rate, self._count = frames, rate, count
        self._start, self.given = 0.0, 0

    def read(self, wait: float) -> Shot | None:
        """See `Source`."""
        if self.given >= self._count:
            raise EndOfSource
        self._start = self._start or time.monotonic()
        due = self._start + self.given / self._rate
        if (left := due - time.monotonic()) > 0:
            time.sleep(min(left, wait))
            if left > wait:
                return None
        self.given += 1
        frame = self._frames[self.given % len(self._frames)]
        return Shot(frame, age=max(0.0, time.monotonic() - due))

    def close(self) -> None:
        """Nothing is open."""


class Handed:
    """Frames that are handed over one by one."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Frames | None] = SimpleQueue()

    def hand(self, frame: Frames | None) -> None:
        """A part passes now; None: no more will."""
        self._queue.put(frame)

    def read(self, wait: float) -> Shot | None:
        """See `Source`."""
        try:
            frame = self._queue.get(timeout=wait)
        except Empty:
            return None
        if frame is None:
            raise EndOfSource
        return Shot(frame)

    def close(self) -> None:
        """Nothing is open."""


class Heard:
    """A listener that keeps what is measured of records, and lets one wait for the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.timings: list[dict[str, float]] = []
        self.missed = 0
        self.one = threading.Semaphore(0)

    def __call__(self, event: Record | Alarm) -> None:
        """One event, in the listener's own thread."""
        if isinstance(event, Record):
            self.seconds.append(event.seconds)
            self.timings.append(dict(event.timings))
            self.missed += event.result not in (Verdict.GOOD, Verdict.ANOMALOUS)
            self.one.release()


def sustained(work: Work, setting: Setting, seconds: float, journal: Path, tell: Callable[[str], None]) -> RateResult:
    """Bisect for the largest rate at which at most one part of a thousand has no verdict in time.

    Args:
        work: bundle and frames.
        setting: threads, deadline, batch.
        seconds: of each trial, longer where that is no thousand parts or fifty deadlines; the last one, which confirms,
            takes thrice as long.
        journal: folder for the lines' journals.
        tell: hears what is done.
    """
    tell("rate: the engine alone")
    before = engine_fps(work, setting, seconds)
    trials: list[Trial] = []

    def holds(rate: float, times: int = 1) -> bool:
        tell(f"rate: {rate:.2f} parts a second")
        count = times * max(LEAST, round(rate * max(seconds, setting.deadline_s / OVER)))
        trials.append(trial(work, setting, rate, count, journal / f"{len(trials)}"))
        return trials[-1].held

    low, high = LOWEST * before, HIGHEST * before
    best = low if holds(low) else None
    for _ in range(STEPS if best is not None else 0):
        middle = (low + high) / 2
        if holds(middle):
            best = low = middle
        else:
            high = middle
    while best is not None and not holds(best, 3):  # a rate that held once, by luck, is no sustained one
        best = best * 0.95 if best * 0.95 >= LOWEST * before else None
    after = engine_fps(work, setting, seconds)
    share = None if best is None else best / ((before + after) / 2)
    return RateResult(setting=setting, engine_fps=(before, after), sustained=best, share=share, trials=tuple(trials))


def trial(work: Work, setting: Setting, rate: float, count: int, journal: Path) -> Trial:
    """A line of its own at one rate; parts that came but have no record count as missed."""
    source, heard = Paced(work.frames, rate, count), Heard()
    line = Line(
        _scoring(work, setting), {"cell": source}, deadline=setting.deadline_s, largest_batch=setting.largest_batch,
        limits=LIMITS, journal=journal,
    )  # fmt: skip
    line.listen(heard)
    line.run()
    missed = heard.missed + source.given - len(heard.seconds)
    return Trial(rate=rate, parts=source.given, missed=missed, held=missed <= ALLOWED * source.given)


def engine_fps(work: Work, setting: Setting, seconds: float) -> float:
    """Frames a second of the bare detector in this process, in calls of `largest_batch`."""
    detector = load(work.bundle, device="cpu", threads=setting.threads)
    batch = np.resize(work.frames, (setting.largest_batch, *work.frames.shape[1:]))
    detector(batch)
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        _ = detector(batch).verdict
        calls += 1
    return calls * len(batch) / passed


def added(work: Work, setting: Setting, parts: int, journal: Path, tell: Callable[[str], None]) -> AddedResult:
    """The same frame bare, bare in a child, and through a line, one after the other, `parts` times in changing order.

    The line waits for its part alone, so that nothing is counted that other parts cost. A bare call gives what a record
    holds of a detection: the verdict, and the regions of an anomalous part.
    """
    tell(f"added: {parts} parts in turn")
    detector = load(work.bundle, device="cpu", threads=setting.threads)
    child = _scoring(work, setting)
    child.start(LIMITS.start)
    source, heard = Handed(), Heard()
    line = Line(
        _scoring(work, setting), {"cell": source}, deadline=setting.deadline_s, largest_batch=setting.largest_batch,
        limits=LIMITS, journal=journal,
    )  # fmt: skip
    line.listen(heard)
    times: dict[str, list[float]] = {"bare": [], "child": [], "line": []}

    def bare(frame: Frames) -> None:
        start = time.perf_counter()
        _said(detector(frame[None]))
        times["bare"].append(time.perf_counter() - start)

    def in_child(frame: Frames) -> None:
        start = time.perf_counter()
        _said(child(frame[None], None, LIMITS.call))
        times["child"].append(time.perf_counter() - start)

    def through(frame: Frames) -> None:
        source.hand(frame)
        heard.one.acquire(timeout=LIMITS.call)
        times["line"].append(heard.seconds[-1])

    ways: Sequence[Callable[[Frames], None]] = (bare, in_child, through)
    warm_up = 20
    try:
        with line:
            for number in range(parts + warm_up):
                for way in ways[number % 3 :] + ways[: number % 3]:  # type: ignore[operator]
                    way(work.frames[number % len(work.frames)])
            source.hand(None)
            line.wait(LIMITS.call)
    finally:
        child.close()
    ms = {name: 1e3 * np.array(found[warm_up:]) for name, found in times.items()}
    bare_q, line_q = quantiles(ms["bare"]), quantiles(ms["line"])
    differences = {"p50": line_q.p50 - bare_q.p50}
    if bare_q.p99 is not None and line_q.p99 is not None:
        differences["p99"] = line_q.p99 - bare_q.p99
    stages = {
        name: quantiles(1e3 * np.array([one[name] for one in heard.timings[warm_up:] if name in one]))
        for name in ("waiting", "scoring", "ordering")
    }
    return AddedResult(
        setting=setting, bare=bare_q, child=quantiles(ms["child"]), line=line_q, added=differences,
        paired=quantiles(ms["line"] - ms["bare"]), stages=stages,
    )  # fmt: skip


def _said(found: Detection) -> None:
    if Verdict.ANOMALOUS in found.verdict:
        _ = found.regions


def quantiles(ms: NDArray[np.float64]) -> Quantiles:
    """Median and p99; None for the latter below 100 samples."""
    p99 = round(float(np.percentile(ms, 99)), 4) if len(ms) >= 100 else None
    return Quantiles(p50=round(float(np.median(ms)), 4), p99=p99, n=len(ms))


def _scoring(work: Work, setting: Setting) -> InProcess:
    return InProcess(Start(work.bundle, device="cpu", threads=setting.threads))
