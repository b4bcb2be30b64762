"""The ladder: one optimisation a rung, each measured as a row of its own, with speed, memory and drift."""

from dataclasses import dataclass, replace
from typing import Any

from flowad_fast.benchmarks import harness
from flowad_fast.benchmarks.cases import REFERENCE, Case
from flowad_fast.engines.eager import torch_device


@dataclass(frozen=True)
class Rung:
    """A switch that is turned on top of those below."""

    number: int
    name: str
    engine: str
    precision: str = "fp32"
    ops: str = "reference"
    gpu: bool = False
    """Needs a GPU: elsewhere the fused operators are plain torch, which would measure the rung below again."""


RUNGS = (
    Rung(0, "reference path", REFERENCE),
    Rung(1, "modulation table", "eager"),
    Rung(2, "bf16", "eager", "bf16"),
    Rung(3, "torch.compile", "compile", "bf16"),
    Rung(4, "fused Triton kernels", "eager", "bf16", "fused", gpu=True),
    Rung(5, "one CUDA graph", "cudagraph", "bf16", "fused", gpu=True),
    Rung(6, "fp8", "cudagraph", "fp8", "fused", gpu=True),
)
"""Better matrix products (stream-K, fused epilogues) are the rung after these; there is nothing to switch on yet."""


def run(like: Case, effort: harness.Effort, tell: harness.Tell, deadline: float = float("inf")) -> dict[str, Any]:
    """Measure every rung with the scorer, batch and model of `like`; a record whose rows carry `rung`."""
    here = torch_device(like.device).type
    rungs = [(r, replace(like, engine=r.engine, precision=r.precision, ops=r.ops)) for r in RUNGS]
    runnable = [case for rung, case in rungs if here == "cuda" or not rung.gpu]
    record = harness.run(runnable, effort, tell, deadline=deadline)
    measured = {row["name"]: row for row in record["cases"]}
    rows = []
    for rung, case in rungs:
        absent = {"status": "not available", "reason": f"rung {rung.number}, {rung.name}, needs an NVIDIA GPU"}
        row = measured.get(case.name) or harness.empty_row(case, absent)
        rows.append(row | {"rung": rung.number, "rung_name": rung.name})
    return record | {"cases": rows, "kind": "ladder"}
