"""The one-evaluation account for `docs/scaling.md`: what one, two and three evaluations cost, and what remains.

Everything here is predicted: the velocity field by `kernels/account.py`, the backbone by counting the operators that
run for it, on tensors without memory.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.config import ModelConfig, Precision
from flowad_fast.kernels.account import H100, OpCost, VelocityShape, account

PRECISION: Precision = "bf16"
BATCH = 32
COUNTS = (1, 2, 3)
GOALS = (
    ("frames per second, bf16, batch 32", "41", "450", "620", "1,100"),
    ("frames per second, fp8, batch 32", "41", "800", "900", "1,600"),
    ("p99 ms, bf16, batch 1", "–", "4.0", "–", "2.0"),
    ("p99 ms, fp8, batch 1", "–", "2.8", "–", "1.6"),
    ("memory GB, bf16 / fp8", "10", "2.5 / 1.7", "2.5 / 1.7", "2.5 / 1.7"),
)
"""One H100 at paper scale: what is aimed at, not what was measured or predicted."""


@dataclass(frozen=True)
class Backbone:
    """One call of a backbone: operations, bytes to and from memory, operators launched, and its precision."""

    flops: float
    bytes: float
    launches: int
    precision: str = "fp32"

    @property
    def seconds(self) -> float:
        """What the H100's roofs allow."""
        return max(self.flops / H100.flops[self.precision], self.bytes / H100.bytes)


@cache
def backbone_cost(name: str, size: int, batch: int) -> Backbone:
    """Count a backbone's operators as the eager engine runs them: each reads its operands and writes its results."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    from flowad_fast.stages.features import FeatureExtractor

    class Traffic(TorchDispatchMode):
        launches, bytes = 0, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
                self.launches += 1
                self.bytes += sum(x.numel() * x.element_size() for x in tensors)
            return out

    with torch.device("meta"):
        extractor = FeatureExtractor(name, size=size)
    extractor = extractor.to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Traffic() as traffic:
        extractor(torch.empty(batch, 3, size, size, device="meta"))
    return Backbone(flops.get_total_flops(), traffic.bytes, traffic.launches)


@cache
def fused_backbone_cost(name: str, size: int, batch: int) -> Backbone:
    """Count a backbone as the captured graph runs it in half precision; each operator is one launch."""
    import torch
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    from flowad_fast.kernels import reference
    from flowad_fast.stages.features import FeatureExtractor
    from flowad_fast.stages.fused_backbone import with_fused_backbone

    class Counter:
        """The operators, each call of which is counted."""

        __name__ = "counter"
        launches, bytes = 0, 0

        def __getattr__(self, operator: str) -> Any:
            def call(*args: Any) -> Any:
                out = getattr(reference, operator)(*args)
                self.launches += 1
                self.bytes += sum(x.numel() * x.element_size() for x in tree_leaves((args, out)) if torch.is_tensor(x))
                return out

            return call

    counter = Counter()
    with torch.device("meta"):
        extractor = with_fused_backbone(FeatureExtractor(name, size=size), counter, torch.float16)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        extractor(torch.empty(batch, 3, size, size, device="meta"), counter)
    return Backbone(flops.get_total_flops(), counter.bytes, counter.launches, "fp16")


@dataclass(frozen=True)
class Scale:
    """A model size: its velocity field, backbone, and name."""

    name: str
    shape: VelocityShape
    backbone: str


def scales() -> tuple[Scale, ...]:
    """The demo's, `small`'s and the paper's sizes."""
    from flowad_fast.benchmarks.measure.cases import PRESETS, shape_of
    from flowad_fast.checkpoints.load import DEMO

    demo = ModelConfig.model_validate(json.loads(DEMO.with_suffix(".json").read_text(encoding="utf-8")))
    specs = {"demo": demo, **{name: spec for name in ("small", "paper") if (spec := PRESETS[name].spec) is not None}}
    found = []
    for name, spec in specs.items():
        v = spec.velocity
        found.append(Scale(f"{name}, {v.hidden_size}x{v.depth}", shape_of(spec), spec.backbone))
    return tuple(found)


def section() -> list[str]:
    """The section's paragraphs and tables."""
    return [
        "## One evaluation",
        "The scorer mismatch needs one evaluation of the velocity field, inversion two or three. **Predicted, not "
        f"measured**: the velocity field by the account, in {PRECISION}; the backbone as the captured graph runs it, "
        "in float16 on four operators, each reading its operands from memory and writing its results. Launches are "
        f"operators of a call. Milliseconds and bytes are per frame, at batch {BATCH} unless a column says otherwise.",
        _costs(),
        "A third of the evaluations is a third of the velocity field's work; the backbone stays, which weighs in small "
        "models. Where the time of a frame goes at paper scale:",
        _parts(),
        "At one frame per call each evaluation reads all weights once, so that there too the field's time is "
        "proportional to the evaluations, and launches are a larger part of what remains.",
        "**Goals** for one H100 at paper scale: aimed at, neither measured nor predicted. The paper's figures are as "
        "reported there.",
        "\n".join(table_lines(("", "paper, 3 evaluations", "3 evaluations", "2 evaluations", "1 evaluation"), GOALS)),
        "What fewer evaluations cost in accuracy is in [the benchmarks](../benchmarks/README.md): image AUROC on real "
        "cells beside three evaluations.",
    ]


def _velocity(shape: VelocityShape, batch: int, nfe: int) -> list[OpCost]:
    return account(shape, batch, nfe, 0, PRECISION)


def _costs() -> str:
    head = (
        "model", "evaluations", "GFLOP", "GFLOP, backbone", "MB", "MB, backbone", "MB at batch 1", "launches",
        "launches, backbone", "ms", "backbone's share of ms", "frames/s, at most", "ms at batch 1",
    )  # fmt: skip
    rows = []
    for scale in scales():
        many, one = (fused_backbone_cost(scale.backbone, scale.shape.image, batch) for batch in (BATCH, 1))
        for n in COUNTS:
            costs, single = (_velocity(scale.shape, batch, n) for batch in (BATCH, 1))
            seconds = sum(c.seconds(H100) for c in costs)
            whole = (seconds + many.seconds) / BATCH
            alone = sum(c.seconds(H100) for c in single) + one.seconds
            rows.append([
                scale.name,
                str(n),
                f"{(sum(c.flops for c in costs) + many.flops) / BATCH / 1e9:.1f}",
                f"{many.flops / BATCH / 1e9:.1f}",
                f"{(sum(c.bytes for c in costs) + many.bytes) / BATCH / 1e6:.0f}",
                f"{many.bytes / BATCH / 1e6:.0f}",
                f"{(sum(c.bytes for c in single) + one.bytes) / 1e6:.0f}",
                str(sum(c.calls for c in costs) + many.launches),
                str(many.launches),
                f"{whole * 1e3:.3f}",
                f"{many.seconds / BATCH / whole:.0%}",
                f"{1 / whole:.0f}",
                f"{alone * 1e3:.3f}",
            ])  # fmt: skip
    return "\n".join(table_lines(head, rows, "---:"))


def _parts() -> str:
    paper = scales()[-1]
    backbone = fused_backbone_cost(paper.backbone, paper.shape.image, BATCH).seconds
    rows = []
    for n in COUNTS:
        parts = {"products": 0.0, "attention": 0.0, "row operators": 0.0, "features, map and score": 0.0}
        for cost in _velocity(paper.shape, BATCH, n):
            parts[_part(cost)] += cost.seconds(H100)
        parts["backbone"] = backbone
        whole = sum(parts.values())
        rows.append([str(n), *(f"{s / BATCH * 1e3:.3f} ({s / whole:.0%})" for s in parts.values())])
    return "\n".join(table_lines(("evaluations", *(f"{part}, ms" for part in parts)), rows, "---:"))


def _part(cost: OpCost) -> str:
    if cost.operator.startswith("linear"):
        return "products"
    if cost.operator == "attention":
        return "attention"
    if cost.operator in ("pyramid_gather", "affine_error_map", "affine_step", "upsample_score"):
        return "features, map and score"
    return "row operators"
