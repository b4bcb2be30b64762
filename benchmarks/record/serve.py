"""Replicas behind a server: what `flowad-bench serve` measured, typed, and as tables for people."""

from collections.abc import Mapping
from typing import Literal

from rich.table import Table

from flowad_fast.benchmarks.record.line import Quantiles
from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.machine import Part
from flowad_fast.benchmarks.record.record import Header

HEADS = (
    "what judged", "frames a second, median of turns", "least–most", "p50 ms", "p99 ms", "requests", "no result",
    "wrong verdicts",
)  # fmt: skip


class ServeSetting(Part):
    """What was measured with: a request is one frame; `concurrency` of them are on their way at any time."""

    bundle: str
    frame_size: tuple[int, int]
    threads: int
    """Of each detector."""
    largest_batch: int
    concurrency: int
    deadline_s: float
    seconds: float
    """Of each turn."""
    ray: str
    """Its version."""


class ServeRow(Part):
    """One way of judging: frames a second of each turn, and of its requests how long each took, where it was one.

    `replicas` is None for the bare detector, which is called with `batch` frames at a time.
    """

    name: str
    replicas: int | None
    batch: int | None
    fps: tuple[float, ...]
    latency: Quantiles
    results: Mapping[str, int]
    """Answered, and by the reason of no result."""
    wrong: int
    """Verdicts that the bare detector did not give for the same frame."""

    @property
    def median(self) -> float:
        """Frames a second, median of the turns."""
        ordered = sorted(self.fps)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class ServeRecord(Header):
    """Ways of judging that took turns on one machine."""

    kind: Literal["serve"] = "serve"
    note: str = ""
    setting: ServeSetting
    cases: tuple[ServeRow, ...]

    @property
    def passed(self) -> bool:
        """Whether no verdict was wrong; speed is for people to judge."""
        return not any(row.wrong for row in self.cases)


def cells(row: ServeRow) -> list[str]:
    """A row's cells, in the order of `HEADS`."""
    lost = [f"{count} {name}" for name, count in sorted(row.results.items()) if name != "answered"]
    p99 = row.latency.p99
    return [
        row.name,
        f"{row.median:.2f}",
        f"{min(row.fps):.2f}–{max(row.fps):.2f}",
        f"{row.latency.p50:.1f}",
        "" if p99 is None else f"{p99:.1f}",
        str(sum(row.results.values())),
        ", ".join(lost) or "none",
        str(row.wrong),
    ]


def remarks(record: ServeRecord) -> list[str]:
    """Below the table: what was measured with, and what the figures say of each other."""
    one = record.setting
    height, width = one.frame_size
    found = [
        f"{one.bundle}, frames of {height}x{width}, {one.threads} threads per detector, calls of up to "
        f"{one.largest_batch} frames, {one.concurrency} requests of one frame at any time, deadline {one.deadline_s:g} "
        f"s, {len(record.cases[0].fps)} turns of {one.seconds:g} s in rotation, Ray {one.ray}; requests come from the "
        "process of the front, without HTTP or gRPC"
    ]
    by = {row.replicas: row for row in record.cases if row.replicas is not None}
    if 1 in by and 2 in by and by[1].median:
        ratios = sorted(two / one for one, two in zip(by[1].fps, by[2].fps, strict=True) if one)
        found.append(
            f"two replicas judge {by[2].median / by[1].median:.2f} times as many frames as one "
            f"(turn by turn {ratios[0]:.2f}–{ratios[-1]:.2f}), on {record.environment.cores} cores"
        )
    if record.note:
        found.append(record.note)
    return found


def markdown(record: ServeRecord) -> str:
    """As Markdown."""
    lines = table_lines(HEADS, [cells(row) for row in record.cases])
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks(record)), ""])


def table(record: ServeRecord) -> Table:
    """For a terminal."""
    caption = "\n".join(remarks(record))
    found = Table(*HEADS, title="replicas", title_justify="left", caption=caption, caption_justify="left")
    for row in record.cases:
        found.add_row(*cells(row))
    return found
