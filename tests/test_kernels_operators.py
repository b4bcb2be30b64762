"""The operators' registrations: schemas and fakes are right, and compile and export see through or around them."""

import kernel_cases
import pytest
import torch
from kernel_cases import CASES, Draw
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from flowad_fast.kernels import fused, launch, reference
from flowad_fast.kernels.attention_dual import attention_dual

FIRST = list({case.operator: case for case in CASES}.values())


def _leaves(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _same(got: object, expected: object) -> None:
    got, expected = _leaves(got), _leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_registration(case: kernel_cases.Case) -> None:
    args = case.make(Draw(torch.float32))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(arg, Tensor) and arg.dtype == reference.FP8 for arg in args):
        checks.remove("test_schema")  # torch multiplies the inputs by a number to see whether they change
    torch.library.opcheck(getattr(torch.ops.flowad, case.operator).default, args, test_utils=checks)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_cpu_runs_the_reference(case: kernel_cases.Case) -> None:
    args = case.make(Draw(torch.bfloat16))
    _same(getattr(fused, case.operator)(*args), getattr(reference, case.operator)(*args))


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_fake_results_are_those_of_a_gpu(case: kernel_cases.Case) -> None:
    """The launchers themselves, traced on GPU tensors without storage: results like the reference's."""
    args = case.make(Draw(torch.bfloat16))
    expected = _leaves(getattr(reference, case.operator)(*args))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [
            [_fake(a) for a in arg] if isinstance(arg, list) else _fake(arg) if isinstance(arg, Tensor) else arg
            for arg in args
        ]
        launcher = getattr(fused, case.operator)._abstract_fn
        graph = make_fx(lambda *args: launcher(*args))(*fakes)
        got = _leaves(getattr(fused, case.operator)(*fakes))
    kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in node.name]
    assert len(kernels) == case.launches
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device.type == "cuda"


def _fake(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


class _Loop(nn.Module):
    def forward(self, x: Tensor, v: Tensor, shift: Tensor, scale: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        h = fused.gelu_tanh(fused.ln_modulate(v, shift, scale))
        _, h = fused.gate_residual_ln_modulate(v, h, shift, shift, scale)
        error = fused.affine_error_map(x, h, 1.0, -0.5)
        return error, fused.upsample_score(maps, 32)[1]


def _loop_inputs(batch: int) -> tuple[Tensor, ...]:
    d = Draw(torch.float32)
    return d(batch, 4, 24), d(batch, 4, 24), *d.table(1, 24)[:2], d(batch, 4, 4)


def test_compile_sees_through() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        from torch._dynamo.backends.common import aot_autograd

        def keep(inner: torch.fx.GraphModule, _: list) -> object:
            seen.extend(str(node.target) for node in inner.graph.nodes if node.op == "call_function")
            return inner

        return aot_autograd(fw_compiler=keep)(graph, inputs)

    with torch.no_grad():
        inputs = _loop_inputs(3)
        got = torch.compile(_Loop(), backend=backend, fullgraph=True)(*inputs)
        torch.testing.assert_close(got, _Loop()(*inputs))
    assert seen and not any("flowad" in name for name in seen), seen


def test_compile_with_changing_batch() -> None:
    compiled = torch.compile(_Loop(), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5):
            inputs = _loop_inputs(batch)
            got, expected = compiled(*inputs), _Loop()(*inputs)
            torch.testing.assert_close(got, expected)


def test_export_keeps_operators_and_batch() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = {"x": {0: batch}, "v": {0: batch}, "shift": None, "scale": None, "maps": {0: batch}}
    program = torch.export.export(_Loop(), _loop_inputs(3), dynamic_shapes=dynamic)
    called = {str(node.target) for node in program.graph.nodes}
    for name in ("ln_modulate", "gelu_tanh", "gate_residual_ln_modulate", "affine_error_map", "upsample_score"):
        assert f"flowad.{name}.default" in called
    inputs = _loop_inputs(5)
    _same(program.module()(*inputs), _Loop()(*inputs))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers check their arguments as on a GPU."""
    for module in (module for module in fused.MODULES if hasattr(module, "runs_triton")):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)


@pytest.mark.usefixtures("on_gpu")
def test_launchers_refuse_what_they_cannot_do() -> None:
    d = Draw(torch.float32)
    shift = d(1, 1, 24)
    with pytest.raises(TypeError, match="float64.*convert it first"):
        fused.ln_modulate(d(1, 2, 24).double(), shift, shift)
    with pytest.raises(ValueError, match=r"contiguous.*\.contiguous\(\)"):
        fused.ln_modulate(d(1, 24, 2).transpose(1, 2), shift, shift)
    with pytest.raises(ValueError, match="must be equal"):
        fused.affine_step(d(1, 2, 24), d(1, 3, 24), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"tangents \(2, 3\) of \(1, 3\), expected \(K, 1, 3\)"):
        fused.gelu_tanh_dual(d(1, 3), d(2, 3))
    with pytest.raises(ValueError, match="even multiple"):
        fused.pyramid_gather([d(1, 2, 9, 9), d(1, 2, 3, 3)])
    with pytest.raises(ValueError, match="at most 4"):
        fused.pyramid_gather([d(1, 2, 3, 3)] * 5)
    x, weight, bias = d(1, 4, 4, 8), d(16, 8), d(16)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 8\)"):
        fused.pointwise(d(1, 4, 4, 9), weight, bias)
    with pytest.raises(TypeError, match="must be equal"):
        fused.pointwise(x, weight.half(), bias)
    with pytest.raises(ValueError, match=r"contiguous.*\.contiguous\(\)"):
        fused.pointwise(x.transpose(1, 2), weight, bias)
    with pytest.raises(ValueError, match=r"\(k, k, 8\)"):
        fused.depthwise(x, d(3, 3, 9), bias, 1, 1)
    with pytest.raises(ValueError, match="8 channels"):
        fused.squeeze_excite(d(1, 2, 8), 16, d(2, 9), d(2), d(8, 2), d(8))
    with pytest.raises(ValueError, match=r"\(N, k, k, 3\)"):
        fused.stem(d(1, 3, 4, 4), d(8, 3, 3, 4), d(8), 2, 0)
    with pytest.raises(ValueError, match="'tanh', expected none, silu or relu6"):
        reference.pointwise(x, weight, bias, "tanh")
    q, dq = d(1, 1, 4, 8).half(), d(2, 1, 1, 4, 8).half()
    with pytest.raises(TypeError, match="one element type"):
        attention_dual(q, q, q, dq, dq, dq.float())


def test_attention_dual_kernel_is_for_half_types_and_short_rows() -> None:
    assert launch.holds_scores(torch.bfloat16, 256) and launch.holds_scores(torch.float16, 512)
    assert not launch.holds_scores(torch.float32, 256) and not launch.holds_scores(torch.bfloat16, 513)


def test_kernels_run_on_gpus_only() -> None:
    assert not launch.runs_triton(torch.empty(0)) and not launch.runs_triton(torch.empty(0, device="meta"))


def _cut(x: torch.Tensor, bits: int = kernel_cases.NARROW_BITS) -> torch.Tensor:
    """x towards zero to so many bits behind the leading one."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.trunc(torch.ldexp(mantissa, torch.tensor(bits + 1))), exponent - bits - 1)


def _aligned(terms: torch.Tensor, bits: int = kernel_cases.NARROW_BITS) -> torch.Tensor:
    """The sum over dim 0, every term first cut to the place of the largest one's last bit."""
    last = torch.exp2(torch.frexp(terms.abs().amax(0))[1].double() - 1 - bits)
    return (torch.trunc(terms / last) * last).sum(0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("inner", "parts"), [(8192, 4), (2048, 1)])
def test_the_tolerance_of_fp8_products_covers_narrow_sums(inner: int, parts: int, aligned: bool) -> None:
    """Two published models of Hopper's accumulator (its exact form is disputed), on the GPU tests' own inputs."""
    q, scale, w, w_scale, bias, *_ = kernel_cases._linear(48, inner, 96, 64, 64, parts, fp8=True)(
        Draw(torch.bfloat16, "cpu")
    )
    total = torch.zeros(48, 96, dtype=torch.float64)
    for x_part, w_part in zip(q.double().chunk(parts, 1), w.double().chunk(parts, 1), strict=True):
        acc = torch.zeros_like(total)
        steps = [one.split(kernel_cases.NARROW_STEP, 1) for one in (x_part, w_part)]
        for x_step, w_step in zip(*steps, strict=True):
            if aligned:
                products = x_step.T[:, :, None] * w_step.T[:, None, :]
                acc = _aligned(torch.cat([acc[None], products]))
            else:
                acc = _cut(acc + x_step @ w_step.T)
        total += acc
    exact = q.double() @ w.double().T * (scale.double() * w_scale.double()) + bias.double()
    narrow = (total * scale.double() * w_scale.double() + bias.double()).bfloat16()
    plain = exact.float().bfloat16()
    (_, error), (_, torchs) = (kernel_cases._errors(one, None, exact) for one in (narrow, plain))
    tolerance = kernel_cases.TOLERANCES[torch.bfloat16]
    assert error <= min(tolerance.rms, kernel_cases.allowed(tolerance, torchs, inner // parts))
    assert error > tolerance.ratio * torchs, "without its own tolerance this would fail"
    assert kernel_cases.allowed(tolerance, torchs) == tolerance.ratio * torchs, "all other operators keep theirs"
