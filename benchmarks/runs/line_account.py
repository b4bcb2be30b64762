"""Whether a line accounts for all that it was fed, and let nothing pass that the bare detector does not call good."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowad_fast.benchmarks.runs.line_rig import DEADLINE, WHOLE, Fed, Rig, name_of
from flowad_fast.benchmarks.runs.line_work import Work


@dataclass(frozen=True)
class Account:
    """What came in, what came out by result, what passed, what is wrong, and what is to be known."""

    parts: int = 0
    outcomes: int = 0
    results: dict[str, int] = field(default_factory=dict)
    good: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def account(rig: Rig, bundles: frozenset[str]) -> Account:
    """Hold what came out against what went in, and every "good" against the bare detector and the deadline.

    Args:
        rig: whose line has ended.
        bundles: hashes that may have judged.
    """
    rows, problems, notes = rig.rows(), [], []
    fed = rig.feed.given(rows)
    by_file: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_file.setdefault(name_of(row), []).append(row)
    if missing := fed.keys() - by_file.keys():
        problems.append(f"{len(missing)} parts have no outcome, the first is {min(missing)}")
    if unknown := by_file.keys() - fed.keys():
        problems.append(f"{len(unknown)} outcomes are of parts that never came, the first is {min(unknown)}")
    parts = Counter(row["part"] for row in rows)
    if twice := [part for part, count in parts.items() if count > 1]:
        problems.append(f"{len(twice)} parts have several outcomes, the first is {twice[0]}")
    again = [name for name, found in by_file.items() if len({row["part"] for row in found}) > 1]
    if judged := [name for name in again if sum(row["result"] == "good" for row in by_file[name]) > 1]:
        problems.append(f"{len(judged)} parts passed twice, the first is {judged[0]}")
    if again:
        notes.append(
            f"{len(again)} parts fell between journal and list of taken files: named as in flight, then given again"
        )
    doubts = [doubt(rig.work, fed, row, bundles) for row in rows]
    problems += [problem for problem in doubts if problem]
    good = sum(row["result"] == "good" and not problem for row, problem in zip(rows, doubts, strict=True))
    problems += disorder(rows)
    stored = rig.stored()
    written = {(row["part"], row["result"]) for row in rows}
    if stored != written:
        problems.append(f"{len(stored ^ written)} outcomes are not the same in the database and the JSON lines")
    results = Counter(row["result"] for row in rows)
    return Account(len(fed), len(parts) - len(again), dict(results), good, problems[:5], notes)


def doubt(work: Work, given: Mapping[str, Fed], row: Mapping[str, Any], bundles: frozenset[str]) -> str | None:
    """Why an outcome may not be what it is, or None: what the bare detector said, and whether it came in time."""
    fed, result = given.get(name_of(row)), row["result"]
    if fed is None or result not in ("good", "anomalous"):
        return f"{row['part']} passed without a verdict" if row["action"] == "pass" else None
    if fed.way != WHOLE:
        return f"{row['part']} is {result}, but was torn, frozen or lost"
    if row["seconds"] > DEADLINE:
        return f"{row['part']} is {result} after {row['seconds']:.3f} s, its deadline is {DEADLINE:g} s"
    if row["bundle"] not in bundles:
        return f"{row['part']} was judged by {row['bundle']}, which was not to judge"
    expected = work.scores[fed.picture]
    if abs(row["score"] - expected) > 1e-3 * max(abs(expected), 1e-9):
        return f"{row['part']} has the score {row['score']:g}, the bare detector gave {expected:g}"
    if (result == "anomalous") != work.anomalous[fed.picture] or (row["action"] == "pass") != (result == "good"):
        return (
            f"{row['part']} is {result} and does {row['action']}, the bare detector's score {expected:g} says otherwise"
        )
    return None


def disorder(rows: list[dict[str, Any]]) -> list[str]:
    """Whether the outcomes of a run are in another order than its parts; those that a killed run left come first."""
    last: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        if "killed" in row["reason"] or (place := place_of(name_of(row))) is None:
            continue
        run = row["part"].split("/")[1]
        if place < last.get(run, place):
            return [f"{row['part']} was told after {'.'.join(map(str, last[run]))}"]
        last[run] = place
    return []


def place_of(name: str) -> tuple[Any, ...] | None:
    """What parts of a run are ordered by; None of a part that only stands for those that nobody saw."""
    numbers = name.split(".")
    if not all(one.isdecimal() for one in numbers):
        return (name,)
    if len(numbers) == 1:
        return None
    series, *rounds, frame = map(int, numbers)
    return (series, *(rounds or [0]), frame)
