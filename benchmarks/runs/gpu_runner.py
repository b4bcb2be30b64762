"""Runs a plan against a clock: nothing is begun that cannot end, nothing that hangs takes a headline's time.

The clock and what executes a piece are given, so that hours of a GPU can be tried in seconds without one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flowad_fast.benchmarks.record.limits import BackboneTime, Roofs
from flowad_fast.benchmarks.record.record import Row, Status
from flowad_fast.benchmarks.runs.gpu_plan import HEADLINES_S, Work

RESERVE = 2.0
"""Times its modelled seconds that every later headline is left."""
PATIENCE = 3.0
"""Times its modelled seconds after which a piece is cut off."""
COLD_S = 16.0
"""Modelled seconds of a row whose process has to be started anew, which any may meet after one that was killed."""


@dataclass(frozen=True)
class Outcome:
    """What came of a piece: its rows, and what it found beside them."""

    status: Status
    reason: str | None = None
    rows: tuple[Row, ...] = ()
    output: tuple[str, ...] | None = None
    backbone: tuple[BackboneTime, ...] = ()
    roofs: Roofs | None = None

    @classmethod
    def of(cls, row: Row) -> "Outcome":
        """A row's; what this machine lacks is no failure."""
        fine = row.status in ("ok", "not available")
        return cls("ok" if fine else row.status, None if fine else row.reason, (row,))


class Executor(Protocol):
    """Carries a piece out."""

    def __call__(self, work: Work, deadline: float) -> Outcome:
        """What came of it, no later than `deadline`, a time of the runner's clock: what it has until then is kept."""


@dataclass(frozen=True)
class Done:
    """A piece, what came of it, and the seconds that it took."""

    work: Work
    outcome: Outcome
    seconds: float


def run(
    works: Sequence[Work],
    execute: Executor,
    clock: Callable[[], float],
    budget: float,
    keep: Callable[[Sequence[Done]], object],
    tell: Callable[[str], None],
) -> list[Done]:
    """Carry the pieces out in order within `budget` seconds; `keep` receives all that is done after each.

    Ctrl-C ends the run like the budget's end: what is left is listed as skipped.
    """
    begun = clock()
    end, headlines_end = begun + budget, begun + min(HEADLINES_S, budget)
    done: list[Done] = []
    interrupted = False
    for i, work in enumerate(works):
        start = clock()
        later = [RESERVE * one.needed for one in works[i + 1 :] if one.headline]
        reserved = sum(later) + (COLD_S if later else 0)
        deadline = _deadline(work, start, end, headlines_end - reserved if reserved else end)
        if interrupted:
            outcome = Outcome("skipped", "interrupted")
        elif deadline - start < work.needed:
            kept = f", {reserved:.0f} s of them kept for headlines" if reserved and not work.headline else ""
            outcome = Outcome("skipped", f"{end - start:.0f} s left{kept}, {work.needed:.0f} s needed")
        else:
            tell(f"{work.name} ({end - start:.0f} s left)")
            try:
                outcome = execute(work, deadline)
            except KeyboardInterrupt:
                outcome, interrupted = Outcome("skipped", "interrupted"), True
            except Exception as error:  # whatever it is, it must not cost the pieces that follow
                outcome = Outcome("failed", f"{type(error).__name__}: {error}"[:500])
            if outcome.status != "ok":
                tell(f"{work.name}: {outcome.status}: {outcome.reason}")
        done.append(Done(work, outcome, clock() - start))
        keep(done)
    return done


def _deadline(work: Work, start: float, end: float, unreserved: float) -> float:
    """When a piece is cut off: where it has taken too long, or where the time of later headlines begins (`unreserved`).

    A headline has the time that was kept for it whatever comes after, since pieces come most important first.
    """
    patient = start + (PATIENCE * max(work.needed, COLD_S) if work.limit is None else work.limit)
    sure = start + RESERVE * work.needed + COLD_S if work.headline else start
    return min(end, max(sure, min(patient, unreserved)))
