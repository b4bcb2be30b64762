"""pytest-benchmark suite of the operators, reference beside fused, at a model's sizes; synchronised inside.

    flowad-bench kernels [--benchmark-compare]      (or pytest benchmarks/bench_kernels.py)

On a CPU the fused operators are the reference itself, so only the reference is timed there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowad_fast.kernels import fused, reference
from flowad_fast.kernels.account import VelocityShape

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPE = VelocityShape() if CUDA else VelocityShape(hidden=768, depth=12, mlp=3072)
BATCH, PROBES = (32, 2) if CUDA else (1, 2)
DTYPES = (torch.float32, torch.bfloat16) if CUDA else (torch.float32,)


def _inputs(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rand(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(kind)

    d, n, c = SHAPE.hidden, SHAPE.tokens, SHAPE.channels
    x, o, dx = rand(BATCH, n, d), rand(BATCH, n, d), rand(PROBES, BATCH, n, d)
    heads = (BATCH, SHAPE.heads, n, d // SHAPE.heads)
    row = [rand(1, 1, d, kind=torch.float32) for _ in range(3)]
    qkv, dqkv = [rand(*heads) for _ in range(3)], [rand(PROBES, *heads) for _ in range(3)]
    state = rand(BATCH, n, c, kind=torch.float32)
    return {
        "ln_modulate": (x, *row[:2]),
        "ln_modulate_dual": (x, dx, *row[:2]),
        "gate_residual_ln_modulate": (x, o, *row),
        "gate_residual_ln_modulate_dual": (x, dx, o, dx.clone(), *row),
        "gelu_tanh": (rand(BATCH, n, SHAPE.mlp),),
        "gelu_tanh_dual": (rand(BATCH, n, SHAPE.mlp), rand(PROBES, BATCH, n, SHAPE.mlp)),
        "attention": qkv,
        "attention_dual": (*qkv, *dqkv),
        "affine_step": (state, rand(BATCH, n, c), 1.0, -1 / 3),
        "affine_error_map": (state, rand(BATCH, n, c), 1.0, -1 / 3),
    }


OPERATORS = (
    "ln_modulate", "ln_modulate_dual", "gate_residual_ln_modulate", "gate_residual_ln_modulate_dual", "gelu_tanh",
    "gelu_tanh_dual", "attention", "attention_dual", "affine_step", "affine_error_map",
)  # fmt: skip


def synchronised(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call and wait for the device, so that the clock sees the work and not its launch."""
    result = function(*arguments)
    if CUDA:
        torch.cuda.synchronize()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("ops", (reference, fused) if CUDA else (reference,), ids=lambda m: m.__name__.split(".")[-1])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(benchmark: Any, name: str, ops: Any, dtype: torch.dtype) -> None:
    """One operator's time; its result is finite."""
    benchmark.group = f"{name} {dtype}"
    with torch.inference_mode():
        result = benchmark(synchronised, getattr(ops, name), *_inputs(dtype)[name])
    for tensor in result if isinstance(result, tuple) else (result,):
        assert torch.isfinite(tensor).all()
