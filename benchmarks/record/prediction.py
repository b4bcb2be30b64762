"""What one H100 should do at the goals' rows, by the account: backbone, launches and host included. A prediction.

The account gives bytes and operations; how much of a roof kernels reach is assumed here, each assumption with where it
is from. The first record of a GPU replaces the assumptions by measurements.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from flowad_fast.benchmarks.record.fewer import Backbone, backbone_cost, fused_backbone_cost
from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.config import Precision
from flowad_fast.kernels.account import H100, WIDTHS, OpCost, VelocityShape, account

PAPER = VelocityShape()
BACKBONE = "efficientnet-b4"
EXTRA_NODES = 20
"""Launches of a call outside the loop and the backbone: normalising, copies in and out, extremes of the frames."""


@dataclass(frozen=True)
class Assumed:
    """What kernels reach on an H100, as shares of `account.H100`, and what calls cost beside them.

    Attributes:
        products: share of the arithmetic roof, large matrix products: 680 of 790 and 1,200 of 1,500 TFLOP/s, common for
            the library's products at a few thousand rows.
        weights: share of the memory roof when a product has only 256 rows and reads all weights for them.
        attention: share of the arithmetic roof at width 256, and its shortest call in seconds (two programs' waves).
        memory: share of the memory roof of row operators and convolutions: 2.6 of 3.35 TB/s, as large copies reach.
        kernel: shortest kernel in seconds, and `gap` between two nodes of a graph.
        host: seconds per call that nothing hides, and `staged` bytes per second of copies by one core.
        epilogues: see `account`; the product among them reaches the share `own` of what the library's reaches.
    """

    products: Mapping[str, float] = field(default_factory=lambda: {"bf16": 0.86, "fp8": 0.8})
    weights: float = 0.55
    attention: float = 0.32
    shortest_attention: float = 5e-6
    memory: float = 0.78
    kernel: float = 2e-6
    gap: float = 0.6e-6
    host: float = 60e-6
    staged: float = 8e9
    fused_backbone: bool = True
    overlapped: bool = True
    epilogues: bool = False
    own: float = 0.9


NOW = Assumed()
EPILOGUES = Assumed(epilogues=True)
"""With the candidates that quantise in their own epilogues, as if they were chosen."""
AUDITED = Assumed(shortest_attention=10e-6, fused_backbone=False, overlapped=False)
"""The design before backbone, host and attention were reshaped, for the column that says what that is worth."""


def seconds(
    precision: Precision, batch: int, evaluations: int, probes: int = 0, how: Assumed = NOW
) -> dict[str, float]:
    """Seconds of a call at paper scale by part; their sum is the call's."""
    parts = dict.fromkeys(("products", "attention", "row operators", "backbone", "gaps", "host"), 0.0)
    nodes = EXTRA_NODES
    for cost in account(PAPER, batch, evaluations, probes, precision, how.epilogues):
        part, one = _seconds(cost, precision, batch, how)
        parts[part] += one
        nodes += cost.calls
    backbone = (fused_backbone_cost if how.fused_backbone else backbone_cost)(BACKBONE, PAPER.image, batch)
    parts["backbone"] = _backbone(backbone, how)
    nodes += backbone.launches
    # A node's launch hides behind the one before as soon as that takes longer.
    parts["gaps"] = nodes * how.gap if batch == 1 else 0.0
    staged = batch * 3 * PAPER.image**2 / how.staged
    parts["host"] = how.host + (0.0 if how.overlapped and batch > 1 else staged + _passes(batch, how))
    return parts


def _passes(batch: int, how: Assumed) -> float:
    """Extremes of the frames, finiteness of the maps and a fresh array for them, where the host does all that."""
    return 0.0 if how.overlapped else batch * 0.2e-3


def _seconds(cost: OpCost, precision: str, batch: int, how: Assumed) -> tuple[str, float]:
    memory = cost.bytes / (H100.bytes * how.memory)
    if cost.operator.startswith("linear"):
        reached = how.products.get(cost.precision, how.products["bf16"])
        if how.epilogues and cost.operator == "linear fc1":
            reached *= how.own
        if batch == 1:
            memory = cost.bytes / (H100.bytes * how.weights)
        return "products", max(cost.flops / (H100.flops[cost.precision] * reached), memory)
    if cost.operator.startswith("attention"):
        busy = cost.flops / (H100.flops[cost.precision] * how.attention)
        return "attention", max(busy, memory, cost.calls * how.shortest_attention)
    return "row operators", max(memory, cost.calls * how.kernel)


def _backbone(cost: Backbone, how: Assumed) -> float:
    busy = max(cost.flops / H100.flops[cost.precision], cost.bytes / (H100.bytes * how.memory))
    if not how.fused_backbone:  # depthwise convolutions in float32 are far from either roof
        busy *= 1.7
    return max(busy, cost.launches * how.kernel)


ROWS: tuple[tuple[str, Precision, int, int, int, str], ...] = (
    ("frames/s, bf16, batch 32, 3 evaluations", "bf16", 32, 3, 0, "450"),
    ("frames/s, bf16, batch 32, 2 evaluations", "bf16", 32, 2, 0, "620"),
    ("frames/s, bf16, batch 32, 1 evaluation", "bf16", 32, 1, 0, "1,100"),
    ("frames/s, fp8, batch 32, 3 evaluations", "fp8", 32, 3, 0, "800"),
    ("frames/s, fp8, batch 32, 2 evaluations", "fp8", 32, 2, 0, "900"),
    ("frames/s, fp8, batch 32, 1 evaluation", "fp8", 32, 1, 0, "1,600"),
    ("ms, bf16, batch 1, 3 evaluations", "bf16", 1, 3, 0, "4.0 (p99)"),
    ("ms, bf16, batch 1, 1 evaluation", "bf16", 1, 1, 0, "2.0 (p99)"),
    ("ms, fp8, batch 1, 3 evaluations", "fp8", 1, 3, 0, "2.8 (p99)"),
    ("ms, fp8, batch 1, 1 evaluation", "fp8", 1, 1, 0, "1.6 (p99)"),
    ("frames/s, bf16, batch 32, density K = 10", "bf16", 32, 3, 10, "30"),
    ("frames/s, bf16, batch 32, density K = 1", "bf16", 32, 3, 1, "200"),
)
"""The goals' rows: label, precision, batch, evaluations, probes, goal."""


def section() -> list[str]:
    """The section of `docs/scaling.md`."""
    return [
        "## One H100 at paper scale, predicted",
        "**Predicted, not measured: no GPU has run this.** The account with backbone, launches and host, at the shares "
        f"of an H100's roofs that kernels of each kind usually reach: products {NOW.products['bf16']:.0%} of the bf16 "
        f"and {NOW.products['fp8']:.0%} of the fp8 roof, {NOW.weights:.0%} of the memory roof at one frame; attention "
        f"{NOW.attention:.0%}, at least {NOW.shortest_attention * 1e6:.0f} µs; row operators and convolutions "
        f"{NOW.memory:.0%} of the memory roof, at least {NOW.kernel * 1e6:.0f} µs; {NOW.gap * 1e6:.1f} µs between the "
        f"nodes of a graph; {NOW.host * 1e6:.0f} µs of the host per call. Each may be off by 30 %. Before: backbone in "
        "float32 operator by operator, torch's attention, and the host's passes over frames and maps. Epilogues: fp8 "
        "where attention and the MLP's first product quantise their own results, if a GPU finds them faster, with a "
        f"product at {EPILOGUES.own:.0%} of the library's speed ([why they can](decisions/bounded-row-scales.md)). "
        "Where a goal is not reached by the prediction, the products alone take most of the time that the goal leaves.",
        _table(),
    ]


def _table() -> str:
    head = (
        "row", "goal", "predicted", "epilogues", "before", "products", "attention", "row operators", "backbone", "gaps",
        "host",
    )  # fmt: skip
    rows = []
    for label, precision, batch, evaluations, probes, goal in ROWS:
        parts = seconds(precision, batch, evaluations, probes)
        before = sum(seconds(precision, batch, evaluations, probes, AUDITED).values())
        ours, old = (_value(label, batch, one) for one in (sum(parts.values()), before))
        narrow = WIDTHS[precision].rest and not probes
        fewer = sum(seconds(precision, batch, evaluations, probes, EPILOGUES).values()) if narrow else None
        quantising = "" if fewer is None else _value(label, batch, fewer)
        rows.append([label, goal, ours, quantising, old, *(f"{one * 1e3:.2f}" for one in parts.values())])
    return "\n".join(table_lines(head, rows, "---:")) + "\n\nParts are ms per call."


def _value(label: str, batch: int, seconds_: float) -> str:
    return f"{seconds_ * 1e3:.1f}" if label.startswith("ms") else f"{batch / seconds_:,.0f}"
