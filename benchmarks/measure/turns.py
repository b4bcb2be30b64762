"""Calls of a candidate and of the reference path in turn, for as long as it takes, and the figures that they give."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowad_fast.benchmarks.measure.cases import Mode
from flowad_fast.benchmarks.measure.processes import Process
from flowad_fast.benchmarks.measure.worker import Samples, Worker, WorkerError
from flowad_fast.benchmarks.record import clock
from flowad_fast.benchmarks.record.record import Measured, Memory, Ratio


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds per row (both sides of a pair together), and the least and most calls of each side.

    `extend` doubles a noisy row's time once. `timeout` ends a process that does not answer.
    """

    seconds: float = 15.0
    least: int = 5
    most: int = 2000
    extend: bool = True
    timeout: float = 3600.0
    roof_seconds: float = 1.0


QUICK = Effort(seconds=3.0, least=3, extend=False, roof_seconds=0.2)


@dataclass(frozen=True)
class Turn:
    """One block of calls of a candidate, and of the reference just before it; None without one."""

    ours: Samples
    theirs: Samples | None


def take_turns(
    process: Process, ref: Process | None, effort: Effort, mode: Mode, deadline: float = float("inf")
) -> list[Turn]:
    """Blocks of calls, reference and candidate in turn, for the time that `effort` allows.

    No block is begun that would probably not end before `deadline`, a time of `time.monotonic`, after the first; and
    what was measured before one that did not is kept.
    """

    def block_size(of: Process) -> int:
        """Calls per turn, after two of warm-up; short ones are grouped, so that a turn is longer than the switch."""
        of.ask(Worker.run, 1)
        return max(1, min(50, int(50 / of.ask(Worker.run, 1).ms[0])))

    ours_size, theirs_size = block_size(process), block_size(ref) if ref else 0
    turns: list[Turn] = []
    try:
        _take(turns, process, ref, (ours_size, theirs_size), effort, mode, deadline)
    except WorkerError as error:
        if error.status != "timeout" or not turns:
            raise
    return turns


def _take(
    turns: list[Turn], process: Process, ref: Process | None, sizes: tuple[int, int], effort: Effort, mode: Mode,
    deadline: float,
) -> None:  # fmt: skip
    """Append turns of blocks of `sizes` calls, ours and the reference's."""
    ours_size, theirs_size = sizes
    begun, allowed = time.perf_counter(), effort.seconds
    while True:
        theirs = ref.ask(Worker.run, theirs_size) if ref else None
        turns.append(Turn(process.ask(Worker.run, ours_size), theirs))
        spent = time.perf_counter() - begun
        if time.monotonic() + 2 * spent / len(turns) > deadline:
            return
        least = effort.least if spent / len(turns) < 10 else min(effort.least, 3)
        if len(turns) >= least and (spent > allowed or len(turns) * ours_size >= effort.most):
            noisy = clock.stability([turn.ours.median for turn in turns]).verdict == "noisy"
            if not (noisy and effort.extend and allowed == effort.seconds and spent < 4 * allowed):
                break
            allowed = 2 * effort.seconds
    if mode == "single-stream":
        # Tail percentiles need many calls, and the reference has no say in them.
        each = float(np.median([v for turn in turns for v in turn.ours.ms]))
        allowed = min(effort.seconds, deadline - time.monotonic())
        calls = int(min(max(allowed * 1e3 / each, 1), effort.most))
        turns.append(Turn(process.ask(Worker.run, calls), None))


def paired(turns: Sequence[Turn]) -> Ratio:
    """The ratio of the medians of each turn in which both sides ran."""
    both = [(turn.theirs.median, turn.ours.median) for turn in turns if turn.theirs]
    return clock.paired_ratio([theirs for theirs, _ in both], [ours for _, ours in both])


def measured(batch: int, blocks: Sequence[Samples], memory: Memory) -> Measured:
    """The figures of calls with `batch` frames each."""
    ms = [v for one in blocks for v in one.ms]
    device_ms = [v for one in blocks for v in one.device_ms]
    return Measured(
        # Frames over time, hiccups included: throughput is not what the typical call would give.
        fps=round(1e3 * batch * len(ms) / sum(ms), 4),
        latency_ms=clock.summary(ms),
        device_time_ms=clock.summary(device_ms) if device_ms else None,
        stability=clock.stability(ms),
        memory_mb=memory,
    )
