"""The cost account against hand numbers, against torch's own operation counter, and against tensors' sizes."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import Draw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowad_fast.config import VelocityConfig
from flowad_fast.kernels import fused
from flowad_fast.kernels.account import H100, OpCost, VelocityShape, account, predicted_seconds
from flowad_fast.stages.arithmetic import NUMBERS
from flowad_fast.stages.velocity import DiT, TabledDiT

PAPER = VelocityShape()
SMALL = VelocityShape(hidden=48, depth=2, heads=4, tokens=16, channels=20, mlp=192, image=64)


def _flops(costs: list[OpCost]) -> float:
    """Operations of matrix products only."""
    return sum(cost.flops for cost in costs if cost.operator.startswith(("linear", "attention")))


def _limit(costs: list[OpCost], batch: int) -> float:
    """Frames per second if matrix products were all there is, and bound by arithmetic."""
    products = [cost for cost in costs if cost.operator.startswith(("linear", "attention"))]
    return batch / sum(cost.flops / H100.flops[cost.precision] for cost in products)


def test_paper_scale_by_hand() -> None:
    assert PAPER.weights == pytest.approx(805e6, rel=0.005)
    assert _flops(account(PAPER, 1, 1, 0, "bf16")) == pytest.approx(0.42e12, rel=0.01)
    assert _flops(account(PAPER, 1, 3, 0, "bf16")) == pytest.approx(1.264e12, rel=0.001)
    assert _limit(account(PAPER, 1, 3, 0, "bf16"), 1) == pytest.approx(625, rel=0.005)
    # The hand numbers take a tangent for an evaluation; its attention is 5 products instead of 2, 3 % more in all.
    assert _limit(account(PAPER, 1, 3, 10, "bf16"), 1) == pytest.approx(57, rel=0.035)
    assert _limit(account(PAPER, 1, 3, 1, "bf16"), 1) == pytest.approx(312, rel=0.035)
    assert _limit(account(PAPER, 1, 3, 0, "fp32"), 1) == pytest.approx(53, rel=0.005)


def test_products_equal_what_torch_counts() -> None:
    config = VelocityConfig(hidden_size=48, depth=2, num_heads=4, channels=20, height=4, width=4)
    field = TabledDiT(DiT(config).eval(), (0.5,))
    tokens, tangents = torch.randn(3, 16, 20), torch.randn(2, 3, 16, 20)
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        field(tokens, 0)
    assert counter.get_total_flops() == _flops(account(SMALL, 3, 1, 0, "fp32"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        field.dual(tokens, tangents, 0)
    # The reference keeps the primal's scores where the kernel recomputes them: one product per tangent and block.
    recomputed = config.depth * len(tangents) * 2 * 3 * 16 * 16 * 48
    assert counter.get_total_flops() == _flops(account(SMALL, 3, 1, 2, "fp32")) - recomputed


@pytest.mark.parametrize("probes", [0, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_bytes_of_row_operators_are_those_of_their_tensors(precision: str, probes: int) -> None:
    d = Draw(torch.bfloat16)
    name = "gate_residual_ln_modulate" + ("_dual" if probes else "") + ("_fp8" if precision == "fp8" else "")
    shape = (3, SMALL.tokens, SMALL.hidden)
    outputs = [d(*shape)] if not probes else [d(*shape), d(probes, *shape)]
    streams = [one.to(NUMBERS[precision].residual) for one in outputs]
    to = () if precision == "fp8" else (torch.bfloat16,)
    results = getattr(fused, name)(*streams, *outputs, *d.table(3, SMALL.hidden), *to)
    moved = sum(t.nbytes for t in (*streams, *outputs, *results))
    cost = next(c for c in account(SMALL, 3, 1, probes, precision) if c.operator == name)
    assert cost.bytes == cost.calls * moved


def test_bytes_of_epilogues_are_those_of_their_tensors() -> None:
    d, rows = Draw(torch.bfloat16), 3 * SMALL.tokens
    fp8, values = torch.float8_e4m3fn, (3, SMALL.tokens)
    costs = {cost.operator: cost for cost in account(SMALL, 3, 1, 0, "fp8", epilogues=True)}
    assert not {"quantise_rows", "gelu_tanh_fp8"} & costs.keys()
    passes = {cost.operator: cost for cost in account(SMALL, 3, 1, 0, "fp8")}
    assert {"quantise_rows", "gelu_tanh_fp8"} <= passes.keys()
    assert account(SMALL, 3, 1, 2, "fp8", epilogues=True) == account(SMALL, 3, 1, 2, "fp8"), "tangents"
    assert account(SMALL, 3, 1, 0, "bf16", epilogues=True) == account(SMALL, 3, 1, 0, "bf16")

    qkv = [d(3, SMALL.heads, SMALL.tokens, SMALL.hidden // SMALL.heads) for _ in range(3)]
    scale, reach = torch.ones(*values, 1), torch.ones(2)
    moved = sum(t.nbytes for t in (*qkv, *fused.attention_short_fp8(*qkv, scale, reach, 16)))
    assert costs["attention_short_fp8"].bytes == SMALL.depth * moved
    q, weight = torch.zeros(*values, SMALL.hidden).to(fp8), torch.zeros(SMALL.mlp, SMALL.hidden).to(fp8)
    made = fused.linear_gelu_fp8(q, scale, weight, torch.ones(1, SMALL.mlp), None, reach)
    assert costs["linear fc1"].bytes == SMALL.depth * (q.nbytes + weight.nbytes + sum(t.nbytes for t in made))
    assert costs["linear fc1"].flops == passes["linear fc1"].flops and rows * SMALL.mlp == made[0].nbytes


def test_bytes_of_the_step_are_those_of_its_tensors() -> None:
    d = Draw(torch.bfloat16)
    x, v = d(3, 16, 20, dtype=torch.float32), d(3, 16, 20)
    moved: list[Tensor] = [x, v, fused.affine_step(x, v, 1.0, 0.5)]
    costs = {cost.operator: cost for cost in account(SMALL, 3, 3, 0, "bf16")}
    assert costs["affine_step"].bytes == 2 * sum(t.nbytes for t in moved)
    assert costs["affine_error_map"].bytes == x.nbytes + v.nbytes + fused.affine_error_map(x, v, 1.0, 0.5).nbytes


def test_prediction_is_the_sum_of_the_tighter_roofs() -> None:
    costs = [OpCost("a", 1, 790e12, 0, "bf16"), OpCost("b", 1, 1, 2 * 3.35e12, "fp32")]
    assert predicted_seconds(costs, H100) == pytest.approx(3)


def test_small_batches_are_bound_by_weights() -> None:
    costs = account(PAPER, 1, 3, 0, "bf16")
    qkv = next(cost for cost in costs if cost.operator == "linear qkv")
    assert qkv.bytes / H100.bytes > qkv.flops / H100.flops["bf16"]
    weights = 3 * PAPER.weights * 2 / H100.bytes
    assert weights < predicted_seconds(costs, H100) < 2 * weights


def test_every_operator_of_the_account_exists() -> None:
    for probes in (0, 2):
        for precision in ("bf16", "fp8"):
            for cost in account(SMALL, 2, 3, probes, precision):
                name = cost.operator.removesuffix(" final")
                assert name.startswith("linear") or name == "divergence" or hasattr(fused, name), cost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 3, 0, "int8"), "int8.*fp32"), ((0, 3, 0, "bf16"), "batch 0"), ((1, 1, -1, "bf16"), "-1")],
)
def test_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        account(PAPER, *arguments)


def test_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import flowad_fast.kernels.account"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
