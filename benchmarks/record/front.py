"""What the Open Inference Protocol costs: requests to a front whose pool answers at once, typed, and as a table."""

from statistics import median
from typing import Literal

from flowad_fast.benchmarks.record.line import Quantiles
from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.machine import Part
from flowad_fast.benchmarks.record.record import Header

Way = Literal["HTTP, binary tensors", "HTTP, JSON", "gRPC"]
HEADS = (
    "way", "requests at a time", "requests/s, median of turns", "least–most", "p50 ms", "p99 ms",
    "ms of a core per request", "kB of a request", "kB of an answer",
)  # fmt: skip


class FrontRow(Part):
    """One way of asking, with so many requests on their way at any time.

    Attributes:
        way: transport and form of the tensors.
        together: requests at a time.
        rates: requests per second of each turn.
        latency: of all requests.
        cpu_ms: processor time of the front's process per request, median of the turns.
        request_bytes: of a body, without headers.
        answer_bytes: likewise.
        failed: requests that had no right answer.
    """

    way: Way
    together: int
    rates: tuple[float, ...]
    latency: Quantiles
    cpu_ms: float
    request_bytes: int
    answer_bytes: int
    failed: int


class FrontRecord(Header):
    """Ways of asking that took turns; a request is one frame, and its answer has the map and everything else."""

    kind: Literal["front"] = "front"
    note: str = ""
    frame_size: tuple[int, int]
    map_side: int
    seconds: float
    """Of each turn."""
    cases: tuple[FrontRow, ...]


def cells(row: FrontRow) -> list[str]:
    """A row's cells, in the order of `HEADS`."""
    p99 = row.latency.p99
    return [
        row.way, str(row.together), f"{median(row.rates):.0f}", f"{min(row.rates):.0f}–{max(row.rates):.0f}",
        f"{row.latency.p50:.2f}", "" if p99 is None else f"{p99:.2f}", f"{row.cpu_ms:.2f}",
        f"{row.request_bytes / 1e3:.0f}", f"{row.answer_bytes / 1e3:.0f}",
    ]  # fmt: skip


def markdown(record: FrontRecord) -> str:
    """As Markdown."""
    height, width = record.frame_size
    remarks = [
        f"frames of {height}x{width}, maps of {record.map_side} pixels a side; a pool that answers at once, in a "
        "process of its own with the front; clients on the same computer, with bodies made beforehand; "
        f"{len(record.cases[0].rates)} turns of {record.seconds:g} s in rotation, "
        f"{sum(row.latency.n for row in record.cases)} requests, {sum(row.failed for row in record.cases)} without a "
        "right answer"
    ]
    if record.note:
        remarks.append(record.note)
    lines = table_lines(HEADS, [cells(row) for row in record.cases])
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks), ""])
