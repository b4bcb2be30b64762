"""Every kernel on a GPU against the reference: the interpreter's cases, paper scale, compiled, captured."""

import kernel_cases
import pytest
import torch
from kernel_cases import CASES, DTYPES, Draw
from torch import Tensor, nn

from flowad_fast.kernels import fused, launch, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: kernels checked in the interpreter only"),
]
D, N, K = 2048, 256, 2


@pytest.fixture(autouse=True)
def nan_filled() -> object:
    """Uninitialised memory becomes NaN, so that what a kernel does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _needs_fp8(operator: str) -> None:
    if ("fp8" in operator or operator == "quantise_rows") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no e4m3 conversions (needs compute capability 8.9)")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_reference(case: kernel_cases.Case, dtype: str) -> None:
    _needs_fp8(case.operator)
    assert launch.runs_triton(torch.empty(0, device="cuda"))
    kernel_cases.check(kernel_cases.measure(case, DTYPES[dtype], "cuda"), case.summed)


def _paper_cases() -> list[kernel_cases.Case]:
    ln, attention, case = kernel_cases._ln, kernel_cases._attention, kernel_cases.Case
    cases = [case("attention_dual", "paper", attention(2, 8, N, D // 8, K, views=True))]
    linear = kernel_cases._linear
    for suffix in ("", "_fp8"):
        summed = D if suffix else 0  # by a part
        cases += [
            case("linear_split_k" + suffix, "paper", linear(N, 4 * D, D, 128, 128, 4, fp8=bool(suffix)), 2, summed),
            case("linear_split_k" + suffix, "paper-whole", linear(N, D, D, 64, 64, 1, fp8=bool(suffix)), 1, summed),
            case("gate_residual_ln_modulate" + suffix, "paper", ln(2, N, D, False, residual=True)),
            case("gate_residual_ln_modulate_dual" + suffix, "paper", ln(2, N, D, False, K, residual=True)),
            case("gelu_tanh" + suffix, "paper", lambda d: (3 * d(2, N, 4 * D),)),
            case("gelu_tanh_dual" + suffix, "paper", lambda d: (3 * d(2, N, 4 * D), d(K, 2, N, 4 * D))),
        ]
    return cases


@pytest.mark.parametrize("case", _paper_cases(), ids=str)
def test_paper_scale(case: kernel_cases.Case) -> None:
    _needs_fp8(case.operator)
    entries = kernel_cases.measure(case, torch.bfloat16, "cuda")
    for entry in entries:
        tolerance = kernel_cases.TOLERANCES[getattr(torch, entry["dtype"].removeprefix("torch."))]
        # A hundred times the values of the other cases reach further into the tails: only the rms is bounded.
        assert entry["error"][1] <= tolerance.rms
        assert entry["error"][1] <= kernel_cases.allowed(tolerance, entry["torch"][1], case.summed), entry


class _Loop(nn.Module):
    def __init__(self, ops: object) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x: Tensor, v: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        ops = self.ops
        h = ops.gelu_tanh(ops.ln_modulate(v, shift, scale))
        v, h = ops.gate_residual_ln_modulate(v, h, shift, shift, scale)
        error = ops.affine_error_map(x, h, 1.0, -0.5)
        return h, *ops.upsample_score(error.unflatten(1, (16, 16)), 256)


def _loop_inputs(batch: int) -> tuple[Tensor, ...]:
    d = Draw(torch.float32, "cuda", seed=batch)
    return d(batch, N, 272), d(batch, N, 272), *d.table(1, 272)[:2]


def test_inductor_sees_through() -> None:
    compiled = torch.compile(_Loop(fused), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            torch.testing.assert_close(
                compiled(*_loop_inputs(batch)), _Loop(reference)(*_loop_inputs(batch)), rtol=1e-4, atol=1e-4
            )


def test_captures_in_a_cuda_graph() -> None:
    # The allocator may not fill memory while a graph is captured.
    torch.utils.deterministic.fill_uninitialized_memory = False
    loop, inputs = _Loop(fused), _loop_inputs(2)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = loop(*inputs)
        fresh = _loop_inputs(2)[0] + 1
        inputs[0].copy_(fresh)
        graph.replay()
        torch.testing.assert_close(got, _Loop(reference)(*inputs), rtol=1e-4, atol=1e-4)


def test_scores_repeat_bit_for_bit() -> None:
    inputs = _loop_inputs(4)
    first, second = _Loop(fused)(*inputs), _Loop(fused)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_results_of_more_than_two_billion_values() -> None:
    """The offset of the last tangent does not fit 32 bits; 4.3 GB."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    d = Draw(torch.bfloat16, "cuda")
    x, dx = d(128, 8192), d(1, 128, 8192)
    tangents = 2**31 // x.numel() + 2
    _, dy = fused.gelu_tanh_dual(x, dx.expand(tangents, -1, -1))
    assert dy.numel() > 2**31
    torch.testing.assert_close(dy[-1], fused.gelu_tanh_dual(x, dx)[1][0], rtol=0, atol=0)
