"""Beside a production line: what `flowad-bench line` measured, typed, and as tables for people."""

from collections.abc import Mapping
from typing import Literal

from rich.table import Table

from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.machine import Part
from flowad_fast.benchmarks.record.record import Header

RATE_GOAL = 0.9
"""Share of the engine's own rate at which the line must keep its deadlines."""
ADDED_GOALS = {"p50": 1.0, "p99": 3.0}
"""Milliseconds that the line may add to a bare call, by quantile, at 256x256 on a CPU."""
FLAT = 0.02
"""Share by which memory may differ after warming up."""
FAULTS = (
    "fault", "parts", "outcomes", "good, timely and confirmed", "not good", "back after s", "limit s",
    "passed",
)  # fmt: skip


class Setting(Part):
    """What was measured with: the model, its frames, threads of the detector, and the deadline of a part."""

    bundle: str
    frame_size: tuple[int, int]
    threads: int
    deadline_s: float
    largest_batch: int


class Trial(Part):
    """One rate: parts a second asked for, how many came, how many had no verdict in time, and whether that holds."""

    rate: float
    parts: int
    missed: int
    held: bool


class RateResult(Part):
    """The largest rate at which 99.9 % of the deadlines hold, against the engine called bare in the same run."""

    setting: Setting
    engine_fps: tuple[float, ...]
    """Before and after; frames a second in calls of `largest_batch` frames."""
    sustained: float | None
    """Parts a second; None where no rate held."""
    share: float | None
    trials: tuple[Trial, ...]


class Quantiles(Part):
    """Milliseconds."""

    p50: float
    p99: float | None
    n: int


class AddedResult(Part):
    """A part through the line in turn with bare calls of the same frame: `added` is line - bare, of the quantiles."""

    setting: Setting
    bare: Quantiles
    child: Quantiles
    """A bare call of a detector in a child process: what messages and shared memory cost."""
    line: Quantiles
    added: Mapping[str, float]
    paired: Quantiles
    """The differences part by part."""
    stages: Mapping[str, Quantiles]


class Sample(Part):
    """Memory (resident, MB) at so many seconds, and parts judged until then.

    Memory is the smallest of readings within half a second: what stays. `line_peak_mb`, the largest of them, has the
    pictures that were in hand for a moment as well; None in records of one reading each.
    """

    seconds: float
    line_mb: float
    line_peak_mb: float | None = None
    child_mb: float
    parts: int


class Steady(Part):
    """Memory after warming up: largest against smallest, and the trend over an hour by least squares, as shares."""

    spread: float
    slope_per_hour: float
    flat: bool


class EnduranceResult(Part):
    """A line under load for so long; `problems` is what was not accounted for."""

    setting: Setting
    minutes: float
    asked_minutes: float
    load: float
    rate: float
    engine_fps: float
    parts: int
    outcomes: int
    results: Mapping[str, int]
    line: Steady | None
    child: Steady | None
    samples: tuple[Sample, ...]
    problems: tuple[str, ...]
    holds: int = 0
    """How often the detector's process was held for a moment while memory was warming up."""

    @property
    def passed(self) -> bool:
        """Whether memory was flat and every part is accounted for, over the whole time that was asked for."""
        flat = self.line is not None and self.child is not None and self.line.flat and self.child.flat
        return flat and not self.problems and self.minutes >= self.asked_minutes * 0.99


class FaultRow(Part):
    """One fault on a line that runs; times are seconds."""

    name: str
    fault: str
    how: str
    parts: int
    """What the source was given, by its own count."""
    outcomes: int
    results: Mapping[str, int]
    good: int
    """Parts that passed, each by the bare detector's score too, and within the deadline."""
    recovery_s: float | None
    """From the end of the fault until the line is ready and has judged a part that came later, in time."""
    limit_s: float
    status: Literal["ok", "failed", "not run"]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether everything held."""
        return self.status == "ok"


class CampaignSetting(Part):
    """What every fault met: parts a second, pictures with known scores, and how many of those are anomalous."""

    seed: int
    rate: float
    deadline_s: float
    pictures: int
    anomalous: int
    bundle: str


class LineRecord(Header):
    """Parts of `flowad-bench line` that were run; `cases` are the campaign's faults."""

    kind: Literal["line"] = "line"
    note: str = ""
    campaign: CampaignSetting | None = None
    cases: tuple[FaultRow, ...] = ()
    rate: RateResult | None = None
    added: AddedResult | None = None
    endurance: EnduranceResult | None = None


def fault_cells(row: FaultRow) -> list[str]:
    """A fault's cells, in the order of `FAULTS`."""
    others = [f"{count} {name}" for name, count in sorted(row.results.items()) if name != "good"]
    back = "no" if row.recovery_s is None else f"{row.recovery_s:.1f}"
    verdict = "yes" if row.passed else row.status if row.status == "not run" else "**no**"
    return [
        row.fault, str(row.parts), str(row.outcomes), str(row.good), ", ".join(others) or "none", back,
        f"{row.limit_s:g}", verdict,
    ]  # fmt: skip


def sections(record: LineRecord) -> list[tuple[str, tuple[str, ...], list[list[str]], list[str]]]:
    """Of each part that was run: a title, heads, rows, and remarks."""
    found = []
    if record.cases:
        found.append(_faults(record))
    if (rate := record.rate) is not None:
        found.append(_rate(rate))
    if (added := record.added) is not None:
        found.append(_added(added))
    if (endurance := record.endurance) is not None:
        found.append(_endurance(endurance))
    return found


def markdown(record: LineRecord) -> str:
    """As Markdown."""
    lines = [record.note, ""] if record.note else []
    for title, heads, rows, remarks in sections(record):
        lines += [f"**{title}**", "", *table_lines(heads, rows), "", *(f"- {remark}" for remark in remarks), ""]
    return "\n".join(lines)


def tables(record: LineRecord) -> list[Table]:
    """For a terminal."""
    result = []
    for title, heads, rows, remarks in sections(record):
        table = Table(*heads, title=title, title_justify="left", caption="\n".join(remarks), caption_justify="left")
        for row in rows:
            table.add_row(*row)
        result.append(table)
    return result


def _faults(record: LineRecord) -> tuple[str, tuple[str, ...], list[list[str]], list[str]]:
    remarks = []
    if (setting := record.campaign) is not None:
        remarks.append(
            f"seed {setting.seed}, {setting.rate:g} parts a second, deadline {setting.deadline_s:g} s, "
            f"{setting.pictures} pictures whose scores the bare detector gave before, {setting.anomalous} of them "
            "anomalous"
        )
    for row in record.cases:
        remarks.append(f"{row.fault}: {row.how}" + "".join(f"; {note}" for note in row.notes))
        remarks += [f"{row.fault} **{row.status}**: {problem}" for problem in row.problems]
    passed = sum(row.passed for row in record.cases)
    title = f"fault campaign: {passed} of {len(record.cases)} faults passed"
    return title, FAULTS, [fault_cells(row) for row in record.cases], remarks


def _rate(found: RateResult) -> tuple[str, tuple[str, ...], list[list[str]], list[str]]:
    rows = [
        [f"{one.rate:.2f}", str(one.parts), str(one.missed), "yes" if one.held else "no"]
        for one in sorted(found.trials, key=lambda one: one.rate)
    ]
    engine = " and ".join(f"{fps:.2f}" for fps in found.engine_fps)
    remark = f"the engine alone, before and after: {engine} frames a second; {_with(found.setting)}"
    if found.sustained is None or found.share is None:
        title = "sustained rate: not even the lowest rate held"
    else:
        met = "met" if found.share >= RATE_GOAL else "not met"
        title = (
            f"sustained rate: {found.sustained:.2f} parts a second, {found.share:.0%} of the engine's own "
            f"(goal ≥ {RATE_GOAL:.0%}: {met})"
        )
    return title, ("parts a second", "parts", "without a verdict in time", "p99.9 holds"), rows, [remark]


def _added(found: AddedResult) -> tuple[str, tuple[str, ...], list[list[str]], list[str]]:
    named = {"bare call": found.bare, "bare call in a child process": found.child, "through the line": found.line}
    named |= {"line − bare, part by part": found.paired}
    named |= {f"in the line: {name}": one for name, one in found.stages.items()}
    rows = [
        [name, f"{one.p50:.3f}", "" if one.p99 is None else f"{one.p99:.3f}", str(one.n)] for name, one in named.items()
    ]
    parts = [
        f"{name} {value:.2f} ms (goal ≤ {ADDED_GOALS[name]:g}: {'met' if value <= ADDED_GOALS[name] else 'not met'})"
        for name, value in found.added.items()
    ]
    return f"added by the line: {', '.join(parts)}", ("", "p50 ms", "p99 ms", "n"), rows, [_with(found.setting)]


def _endurance(found: EnduranceResult) -> tuple[str, tuple[str, ...], list[list[str]], list[str]]:
    rows = []
    for name, steady, key in (("line", found.line, "line_mb"), ("detector's child", found.child, "child_mb")):
        sizes = [getattr(one, key) for one in found.samples]
        first, last = (f"{sizes[0]:.1f}", f"{sizes[-1]:.1f}") if sizes else ("", "")
        shown = ["", "", "too short"] if steady is None else [
            f"{steady.spread:.2%}", f"{steady.slope_per_hour:+.2%}", "yes" if steady.flat else "no",
        ]  # fmt: skip
        rows.append([name, first, last, *shown])
    results = ", ".join(f"{count} {name}" for name, count in sorted(found.results.items()))
    peaks = sorted(one.line_peak_mb for one in found.samples if one.line_peak_mb is not None)[-1:]
    remarks = [
        f"{found.rate:.2f} parts a second, {found.load:.0%} of the engine's own {found.engine_fps:.2f}; {found.parts} "
        f"parts, {found.outcomes} outcomes ({results}); {_with(found.setting)}",
        f"while it warmed up, the detector was held for a moment {found.holds} times, so that queue and batches grew",
        *(
            f"memory is what stays; with pictures in hand for a moment the line had up to {peak:.1f} MB"
            for peak in peaks
        ),
        *found.problems,
    ]
    title = (
        f"endurance: {found.minutes:.1f} of {found.asked_minutes:g} minutes, {'passed' if found.passed else 'failed'}"
    )
    heads = ("memory", "first MB", "last MB", "largest − smallest", "trend per hour", f"flat within {FLAT:.0%}")
    return title, heads, rows, remarks


def _with(setting: Setting) -> str:
    height, width = setting.frame_size
    return (
        f"{setting.bundle}, frames of {height}x{width}, {setting.threads} threads, deadline {setting.deadline_s:g} s, "
        f"batches of up to {setting.largest_batch}"
    )
