"""The ladder: one optimisation per rung, each measured as a row of its own, with speed, memory and drift."""

from dataclasses import dataclass, replace
from typing import Literal

from flowad_fast.benchmarks.measure import harness
from flowad_fast.benchmarks.measure.cases import REFERENCE, Case, empty_row
from flowad_fast.benchmarks.measure.turns import Effort
from flowad_fast.benchmarks.record.record import Record
from flowad_fast.config import Precision
from flowad_fast.engines.device import torch_device


@dataclass(frozen=True)
class Rung:
    """A switch that is turned on top of those below."""

    number: int
    name: str
    engine: str
    precision: Precision = "fp32"
    ops: str = "reference"
    products: str = "library"
    only: Literal["cuda", "cpu"] | None = None
    """Where it is a step up. On a CPU the fused operators are plain torch, which would measure the rung below again;
    whether bf16 pays there depends on the CPU, so that later rungs do not stand on it."""


RUNGS = (
    Rung(0, "reference path", REFERENCE),
    Rung(1, "modulation table", "eager"),
    Rung(2, "bf16", "eager", "bf16"),
    Rung(3, "torch.compile", "compile", "bf16", only="cuda"),
    Rung(3, "torch.compile, fp32", "compile", only="cpu"),
    Rung(3, "ONNX Runtime, fp32", "onnxruntime", only="cpu"),
    Rung(4, "fused Triton kernels", "eager", "bf16", "fused", only="cuda"),
    Rung(5, "one CUDA graph", "cudagraph", "bf16", "fused", only="cuda"),
    Rung(6, "fp8", "cudagraph", "fp8", "fused", only="cuda"),
    Rung(7, "fastest matrix products, bf16", "cudagraph", "bf16", "fused", "measured", only="cuda"),
    Rung(7, "fastest matrix products, fp8", "cudagraph", "fp8", "fused", "measured", only="cuda"),
)


def run(
    like: Case,
    effort: Effort,
    tell: harness.Tell,
    deadline: float = float("inf"),
    keep: harness.Keep = lambda record: None,
) -> Record:
    """Measure every rung with the scorer, batch and model of `like`; a record whose rows carry `rung`.

    Arguments as `harness.run`. A rung of GPUs is a row without figures on a CPU, one of CPUs no row on a GPU.
    """
    here = torch_device(like.device).type
    rungs = [(rung, case_of(rung, like)) for rung in RUNGS if rung.only in (None, here, "cuda")]
    runnable = [case for rung, case in rungs if rung.only in (None, here)]

    def climbed(record: Record) -> Record:
        measured = {row.name: row for row in record.cases}
        rows = []
        for rung, case in rungs:
            absent = f"rung {rung.number}, {rung.name}, needs an NVIDIA GPU"
            row = measured.get(case.name) or empty_row(case, "not available", absent)
            rows.append(row.but(rung=rung.number, rung_name=rung.name))
        return record.but(cases=tuple(rows), kind="ladder")

    return climbed(harness.run(runnable, effort, tell, deadline, lambda record: keep(climbed(record))))


def case_of(rung: Rung, like: Case) -> Case:
    """The row of a rung with the scorer, batch and model of `like`."""
    products = rung.products if rung.engine == "cudagraph" else like.products
    return replace(like, engine=rung.engine, precision=rung.precision, ops=rung.ops, products=products)
