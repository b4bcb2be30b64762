"""Peers on the same photos and clock: what `runs/peers.py` found, typed, and as tables for people."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.table import Table

from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.machine import Part
from flowad_fast.benchmarks.record.record import Header, Measured, Ratio, Status

Weights = Literal["shipped", "own", "random"]
"""Of a backbone: those that come with the project's extra `demo`, the peer's own (downloaded), or none that were
trained: then only speed says anything."""
NOTHING = "not measured"
HEADS = (
    "method", "backbone, weights", "evaluations", "ms per frame, p50", "p90", "× the anchor's time", "memory MB",
    "one model serves",
)  # fmt: skip


class Training(Part):
    """What a method saw of a product's good parts within its budget.

    Attributes:
        budget_s: seconds of one thread that it was allowed (of the clock on a GPU).
        spent_s: that it took.
        threads: of this process.
        parts: good parts that went into it, of `of`.
        of: good parts that there are.
        steps: of the optimiser; None where nothing is optimised.
        ended: what ended it: all parts seen, the method's own limit, or the budget.
        note: what differs from the method as published.
    """

    budget_s: float
    spent_s: float
    threads: int
    parts: int
    of: int
    steps: int | None = None
    ended: Literal["all parts", "own limit", "budget"]
    note: str = ""

    @property
    def short(self) -> str:
        """What the budget left of the training, where not every part went into it once; "" else."""
        if self.parts >= self.of:
            return ""
        return f"{self.parts} of {self.of} parts" if self.steps is None else f"{self.steps} training steps"


class Accuracy(Part):
    """How a method ranks a product's test photos, as fractions; `low` and `high` are a 95 % bootstrap interval."""

    product: str
    photos: int
    defective: int
    image_auroc: float
    low: float
    high: float
    image_ap: float
    image_f1max: float
    training: Training | None = None

    @property
    def short(self) -> str:
        """See `Training`."""
        return self.training.short if self.training is not None else ""


class PeerRow(Part):
    """One method: what it is, how it ranks each product, and how long a frame takes.

    Attributes:
        name: unique in a record.
        ours: whether it is this project's.
        library: what computes it.
        backbone, weights: of the features.
        proof: how it was made sure that the backbone's weights are those.
        options: in full.
        input_size: side of the square that a frame is resized to.
        evaluations: of a velocity field, where there is one.
        products: that one model serves: the number of classes that it was trained for.
        accuracy: by product; empty where there is none, and `accuracy_reason` says why.
        status, reason: of the time.
        measured: whole frames, from uint8 in host memory to map and score there.
        anchor: in turns with the record's anchor row: how many times as fast this row is as the anchor.
    """

    name: str
    ours: bool
    library: str
    backbone: str
    weights: Weights
    proof: str = ""
    options: str = ""
    input_size: int
    evaluations: int | None = None
    products: int = 1
    accuracy: tuple[Accuracy, ...] = ()
    accuracy_reason: str = ""
    status: Status = "skipped"
    reason: str | None = None
    measured: Measured | None = None
    anchor: Ratio | None = None
    note: str = ""

    def of(self, product: str) -> Accuracy | None:
        """How it ranks a product's photos, if that was measured."""
        return next((one for one in self.accuracy if one.product == product), None)


class PeersRecord(Header):
    """Methods on the same photos; each has its accuracy, its time, or both."""

    kind: Literal["peers-photos"] = "peers-photos"
    dataset: str
    products: tuple[str, ...]
    budget_s: float
    threads: int
    frames: str
    frame_size: tuple[int, int]
    anchor: str
    cases: tuple[PeerRow, ...]


def cells(row: PeerRow, products: Sequence[str]) -> list[str]:
    """A row's cells, in the order of `heads`."""
    found = row.measured
    time = [row.status if row.reason is None else f"{row.status}: {row.reason}", "", ""]
    if found is not None:
        latency = found.latency_ms
        beside = "" if row.anchor is None else f"{1 / row.anchor.speed:.2f}"
        time = [f"{latency.p50:.1f}", "" if latency.p90 is None else f"{latency.p90:.1f}", beside]
    memory = "" if found is None or found.memory_mb.whole is None else f"{found.memory_mb.whole:.0f}"
    accuracy = []
    for product in products:
        one = row.of(product)
        if one is None:
            accuracy.append(NOTHING)
            continue
        short = f", {one.short}" if one.short else ""
        accuracy.append(f"{one.image_auroc:.3f} ({one.low:.3f}–{one.high:.3f}){short}")
    return [
        row.name, f"{row.backbone}, {row.weights}", "" if row.evaluations is None else str(row.evaluations), *time,
        memory, f"{row.products} product{'s' if row.products > 1 else ''}", *accuracy,
    ]  # fmt: skip


def heads(products: Sequence[str]) -> tuple[str, ...]:
    """The columns: what and how fast, then each product's image AUROC."""
    return (*HEADS, *(f"image AUROC, {product} (95 %)" for product in products))


def table(record: PeersRecord) -> Table:
    """For a terminal."""
    result = Table(title=title(record), title_justify="left")
    for head in heads(record.products):
        result.add_column(head, justify="left" if head in HEADS[:2] else "right")
    for row in record.cases:
        result.add_row(*cells(row, record.products))
    return result


def title(record: PeersRecord) -> str:
    """In one line."""
    return f"peers on {record.dataset}: accuracy and time per frame, batch 1, {record.threads} thread(s)"


def markdown(record: PeersRecord) -> str:
    """Table and remarks."""
    height, width = record.frame_size
    lines = [
        *table_lines(heads(record.products), [cells(row, record.products) for row in record.cases]),
        "",
        f"Time: whole frames of {height}x{width} ({record.frames}), one per call, from uint8 in host memory to map and "
        f"score there, {record.threads} thread(s); every row in turns with the anchor, *{record.anchor}*. Accuracy: "
        "the same test photos, nothing of which was seen before; each method was trained on the same good parts of "
        f"the product with a budget of {record.budget_s:g} s of one thread (a step that cannot be stopped may end "
        "after it; what each took is below, and beside an accuracy stands what the budget left of a training that had "
        "not seen every part), except ours, whose one model was trained before, on "
        "those good parts of all products, and for longer. No threshold is involved.",
        "",
        *(f"- {remark}" for remark in remarks(record)),
        "",
    ]
    return "\n".join(lines)


def remarks(record: PeersRecord) -> list[str]:
    """What the numbers do not say: options, what was reached in the budget, how weights were made sure of, noise."""
    found = []
    for row in record.cases:
        said = [row.options, row.proof, row.note, row.accuracy_reason, *map(_trained, row.accuracy)]
        if row.measured is not None and row.measured.stability.verdict != "stable":
            spread = row.measured.stability.spread
            said.append(f"time {row.measured.stability.verdict}, interquartile range {spread:.0%} of the median")
        if text := "; ".join(filter(None, said)):
            found.append(f"{row.name} ({row.library}, input {row.input_size}): {text}")
    return found


def _trained(one: Accuracy) -> str:
    t = one.training
    if t is None:
        return ""
    steps = "" if t.steps is None else f", {t.steps} steps"
    note = f" ({t.note})" if t.note else ""
    return f"{one.product}: {t.parts} of {t.of} parts{steps}, {t.spent_s:.0f} s, ended by {t.ended}{note}"


def front(points: Iterable[tuple[float, float, str]]) -> list[str]:
    """The names that no other beats: (ms, AUROC, name), where less time and more AUROC are better."""
    kept, best = [], -1.0
    for _, auroc, name in sorted(points, key=lambda one: (one[0], -one[1])):
        if auroc > best:
            kept.append(name)
            best = auroc
    return kept
