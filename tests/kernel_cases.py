"""Inputs and tolerances of the kernel tests, shared by the interpreter and the GPU.

An operator's error is taken against the reference in float64 on the same inputs, in units of the exact result's rms,
and the reference in the inputs' own precision is measured the same way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowad_fast.kernels import fused, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Tolerance:
    """Largest and rms error of a result, and how much larger its rms error may be than that of same-precision torch."""

    largest: float
    rms: float
    ratio: float


TOLERANCES = {
    torch.float32: Tolerance(largest=1e-5, rms=1e-6, ratio=2),
    torch.float16: Tolerance(largest=5e-3, rms=4e-4, ratio=1.05),
    torch.bfloat16: Tolerance(largest=4e-2, rms=3e-3, ratio=1.05),
    reference.FP8: Tolerance(largest=0.3, rms=0.03, ratio=1.02),
}
"""By the type of the result."""
NARROW_BITS, NARROW_STEP = 13, 32
"""Mantissa bits of the sums that Hopper's tensor cores keep of e4m3 products, and products added at a time."""


def narrow_error(summed: int) -> float:
    """Relative rms error at most of `summed` e4m3 products that a tensor core sums to 13 bits.

    Each of n additions cuts half a last place of the sum so far on average. Cut towards zero, the errors add up as far
    as the sum keeps its sign; it grows as the root of the additions, so they come to 2/3 n halves of the final sum's
    last place at most.
    """
    return 2.0 ** -(NARROW_BITS + 1) * 2 / 3 * summed / NARROW_STEP


def allowed(tolerance: Tolerance, torch_rms: float, summed: int = 0) -> float:
    """The rms error that a result may have beside same-precision torch's; `summed` as `Case.summed`."""
    return math.hypot(tolerance.ratio * max(torch_rms, ERROR_FLOOR), narrow_error(summed))


ERROR_FLOOR = 2e-7
"""Below this rms error the ratio says nothing: both are within a few roundings of float32."""


@dataclass(frozen=True)
class Case:
    operator: str
    label: str
    make: Callable[["Draw"], tuple]
    launches: int = 1
    """Kernels that a call starts."""
    summed: int = 0
    """e4m3 products that a tensor core sums into one value before float32 takes over; 0 for all other operators."""

    def __str__(self) -> str:
        return f"{self.operator}-{self.label}"


class Draw:
    """Seeded normal tensors of one type on one device."""

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def table(self, batch: int, width: int) -> list[Tensor]:
        """Three modulations (batch, 1, width) that are strided views of one table."""
        return list((0.5 * self(batch, 6, width)).unsqueeze(-2).unbind(1)[1:4])

    def half_rows(self, *shape: int) -> Tensor:
        """(*shape), every row followed by as many values of somebody else."""
        return self(*shape[:-1], 2 * shape[-1])[..., : shape[-1]]


def _ln(batch: int, tokens: int, width: int, shared: bool, tangents: int = 0, residual: bool = False) -> Callable:
    def make(d: Draw) -> tuple:
        mods = d.table(1 if shared else batch, width)
        x = d.half_rows(batch, tokens, width) + 0.5
        streams = [x]
        if tangents:
            streams.append(d(tangents, 1, tokens, width).expand(-1, batch, -1, -1))
        if residual:
            streams.append(d(batch, tokens, width))
            if tangents:
                streams.append(d(tangents, batch, tokens, width))
        return (*streams, *mods[0 if residual else 1 :])

    return make


def _mixed(tangents: int, residual: bool) -> Callable:
    """A float32 residual stream, everything else in the case's type."""

    def make(d: Draw) -> tuple:
        wide = {"dtype": torch.float32}
        streams = [d(3, 4, 192, **wide), *([d(tangents, 3, 4, 192, **wide)] if tangents else [])]
        if residual:
            streams += [d(3, 4, 192), *([d(tangents, 3, 4, 192)] if tangents else [])]
        return (*streams, *d.table(3, 192)[0 if residual else 1 :], d.dtype)

    return make


def _attention(batch: int, heads: int, tokens: int, head: int, tangents: int, views: bool) -> Callable:
    def make(d: Draw) -> tuple:
        def split(x: Tensor) -> list[Tensor]:
            parts = [p.unflatten(-1, (heads, -1)).transpose(-3, -2) for p in x.chunk(3, -1)]
            return parts if views else [parts[0].contiguous(), *parts[1:]]

        width = 3 * heads * head
        return (*split(d(batch, tokens, width)), *split(d(tangents, batch, tokens, width)))

    return make


def _affine(a: float, b: float, ref: bool | None, transposed: bool) -> Callable:
    def make(d: Draw) -> tuple:
        shape = (3, 6, 272)
        x = d(3, 272, 6, dtype=torch.float32).transpose(1, 2) if transposed else d(*shape, dtype=torch.float32)
        args = (x, d(*shape), a, b)
        return args if ref is None else (*args, d(*shape, dtype=torch.float32) if ref else None)

    return make


def _linear(rows: int, inner: int, width: int, *tiling: int, fp8: bool = False) -> Callable:
    def make(d: Draw) -> tuple:
        x, weight, bias = d.half_rows(rows, inner), d(width, inner) / inner**0.5, d(width)
        if not fp8:
            return x, weight, bias, *tiling
        (q, scale), (w, w_scale) = reference.quantise_rows(x), reference.quantise_rows(weight)
        return q, scale, w, w_scale.T.contiguous(), bias, *tiling

    return make


def _linear_gelu(rows: int, inner: int, width: int, *tiling: int) -> Callable:
    def make(d: Draw) -> tuple:
        q, scale, w, w_scale, bias, *_ = _linear(rows, inner, width, fp8=True)(d)
        return q, scale, w, w_scale, bias, reference.farthest(w, w_scale, bias), *tiling

    return make


def _attention_fp8(batch: int, heads: int, tokens: int, head: int, rows: int, views: bool) -> Callable:
    def make(d: Draw) -> tuple:
        q, k, v = _attention(batch, heads, tokens, head, 1, views)(d)[:3]
        scale = d(batch, tokens, 1, dtype=torch.float32).abs() + 0.5
        # A frame's own limit is 2 to 10 times what its values reach, as it is after a product.
        reach = torch.stack([4 * v.abs().amax().float() / reference.FP8_MAX, torch.tensor(1e-3, device=v.device)])
        return q, k, v, scale, reach, rows

    return make


def _stem(height: int, width: int, size: int, before: int, activation: str) -> Callable:
    def make(d: Draw) -> tuple:
        weight = d(20, size, size, 3) / (size * 1.7)
        return d(2, 3, height, 2 * width)[..., ::2], weight, d(20, dtype=torch.float32), 2, before, activation

    return make


def _depthwise(shape: tuple[int, ...], size: int, stride: int, before: int, activation: str, sums: bool) -> Callable:
    def make(d: Draw) -> tuple:
        x, weight = d(*shape), d(size, size, shape[-1]) / size
        return x, weight, d(shape[-1], dtype=torch.float32), stride, before, activation, sums

    return make


def _squeeze(tiles: int, channels: int, hidden: int) -> Callable:
    def make(d: Draw) -> tuple:
        wide = {"dtype": torch.float32}
        w1, w2 = d(hidden, channels) / channels**0.5, d(channels, hidden) / hidden**0.5
        return 50 * d(3, tiles, channels, **wide), tiles * 60, w1, d(hidden, **wide), w2, d(channels, **wide)

    return make


def _pointwise(shape: tuple[int, ...], width: int, activation: str, gate: bool, residual: bool) -> Callable:
    def make(d: Draw) -> tuple:
        wide = {"dtype": torch.float32}
        x, weight, bias = d(*shape), d(width, shape[-1]) / shape[-1] ** 0.5, d(width, **wide)
        scale = torch.sigmoid(d(shape[0], shape[-1], **wide)) if gate else None
        return x, weight, bias, activation, scale, d(*shape[:-1], width) if residual else None

    return make


def _stages(channels: tuple[int, ...], factors: tuple[int, ...], last: bool) -> Callable:
    def make(d: Draw) -> tuple:
        stages = [d(2, c, 5 * s, 7 * s) for c, s in zip(channels, factors, strict=True)]
        return ([s.contiguous(memory_format=torch.channels_last) if last else s for s in stages],)

    return make


def _cases() -> list[Case]:
    cases = []
    for suffix in ("", "_fp8"):
        cases += [
            Case("ln_modulate" + suffix, "3x5x272", _ln(3, 5, 272, shared=False)),
            Case("ln_modulate" + suffix, "1x3x1280-shared", _ln(1, 3, 1280, shared=True)),
            Case("ln_modulate_dual" + suffix, "3x4x192-k3", _ln(3, 4, 192, shared=False, tangents=3)),
            Case("ln_modulate_dual" + suffix, "2x3x272-k1-shared", _ln(2, 3, 272, shared=True, tangents=1)),
            Case("gate_residual_ln_modulate" + suffix, "3x5x272", _ln(3, 5, 272, shared=False, residual=True)),
            Case("gate_residual_ln_modulate" + suffix, "1x3x1280-shared", _ln(1, 3, 1280, True, residual=True)),
            Case("gate_residual_ln_modulate_dual" + suffix, "3x4x192-k3", _ln(3, 4, 192, False, 3, residual=True)),
            Case("gate_residual_ln_modulate_dual" + suffix, "2x3x272-k1-shared", _ln(2, 3, 272, True, 1, True)),
            Case("gelu_tanh" + suffix, "3x5x272", lambda d: (3 * d.half_rows(3, 5, 272),)),
            Case("gelu_tanh" + suffix, "3x2500", lambda d: (3 * d(3, 2500),)),
            Case("gelu_tanh_dual" + suffix, "3x5x192-k3", lambda d: (3 * d(3, 5, 192), d.half_rows(3, 3, 5, 192))),
            Case("gelu_tanh_dual" + suffix, "3x2500-k1", lambda d: (3 * d(3, 2500), d(1, 3, 2500))),
        ]
    cases += [
        Case("ln_modulate", "mixed", _mixed(0, residual=False)),
        Case("ln_modulate_dual", "mixed-k2", _mixed(2, residual=False)),
        Case("gate_residual_ln_modulate", "mixed", _mixed(0, residual=True)),
        Case("gate_residual_ln_modulate_dual", "mixed-k2", _mixed(2, residual=True)),
        Case("gelu_tanh", "mixed", lambda d: (d(3, 192, dtype=torch.float32), d.dtype)),
        Case("quantise_rows", "3x5x272", lambda d: (d.half_rows(3, 5, 272) * d(3, 5, 1).exp(),)),
        Case("attention_dual", "1x2x40x24-k2", _attention(1, 2, 40, 24, 2, views=True)),
        Case("attention_dual", "3x1x70x32-k1-copied", _attention(3, 1, 70, 32, 1, views=False)),
        Case("attention_dual", "1x1x33x256-k1", _attention(1, 1, 33, 256, 1, views=True)),
        Case("attention_short", "1x2x40x24", lambda d: (*_attention(1, 2, 40, 24, 1, views=True)(d)[:3], 16)),
        Case("attention_short", "3x1x70x32-copied", lambda d: (*_attention(3, 1, 70, 32, 1, views=False)(d)[:3], 32)),
        Case("attention_short", "1x1x33x256", lambda d: (*_attention(1, 1, 33, 256, 1, views=True)(d)[:3], 16)),
        Case("attention_short_fp8", "2x2x40x24", _attention_fp8(2, 2, 40, 24, 16, views=True)),
        Case("attention_short_fp8", "3x1x70x32-copied", _attention_fp8(3, 1, 70, 32, 32, views=False)),
        Case("attention_short_fp8", "1x1x70x256", _attention_fp8(1, 1, 70, 256, 64, views=True)),
        Case("affine_step", "flow-transposed", _affine(1.0, -1 / 3, None, transposed=True)),
        Case("affine_step", "diffusion", _affine(0.27893447, 0.95752484, None, transposed=False)),
        Case("affine_error_map", "flow", _affine(1.0, -1 / 3, False, transposed=False)),
        Case("affine_error_map", "reference-transposed", _affine(0.9, 0.3, True, transposed=True)),
        Case("affine_error_map", "reference", _affine(0.9, 0.3, True, transposed=False)),
        Case("linear_split_k", "35x272to80", _linear(35, 272, 80, 16, 32, 1)),
        Case("linear_split_k", "35x272to80-parts3", _linear(35, 272, 80, 32, 32, 3), launches=2),
        Case("linear_split_k", "5x192to40-empty-part", _linear(5, 192, 40, 16, 16, 4), launches=2),
        Case("linear_split_k_fp8", "35x272to80", _linear(35, 272, 80, 16, 32, 1, fp8=True), summed=272),
        Case("linear_split_k_fp8", "35x784to80-parts3", _linear(35, 784, 80, 32, 32, 3, fp8=True), 2, summed=384),
        Case("linear_gelu_fp8", "35x272to80", _linear_gelu(35, 272, 80, 16, 32), summed=272),
        Case("linear_gelu_fp8", "40x144to144", _linear_gelu(40, 144, 144, 32, 64), summed=144),
        Case("stem", "3x3-silu", _stem(9, 13, 3, 0, "silu")),
        Case("stem", "3x3-relu6", _stem(16, 10, 3, 1, "relu6")),
        Case("depthwise", "3x3-sums", _depthwise((2, 11, 9, 40), 3, 1, 1, "silu", sums=True)),
        Case("depthwise", "5x5-stride2-sums", _depthwise((2, 20, 18, 72), 5, 2, 1, "silu", sums=True)),
        Case("depthwise", "5x5-stride2-wide-rim", _depthwise((1, 20, 17, 24), 5, 2, 2, "relu6", sums=False)),
        Case("squeeze_excite", "4-tiles", _squeeze(4, 72, 6)),
        Case("squeeze_excite", "21-tiles", _squeeze(21, 144, 40)),
        Case("pointwise", "expand", _pointwise((2, 5, 7, 24), 144, "silu", gate=False, residual=False)),
        Case("pointwise", "project", _pointwise((2, 5, 7, 144), 24, "none", gate=True, residual=False)),
        Case("pointwise", "project-residual", _pointwise((3, 4, 4, 200), 56, "none", gate=True, residual=True)),
        Case("pointwise", "relu6", _pointwise((1, 9, 9, 40), 40, "relu6", gate=False, residual=True)),
        Case("pyramid_gather", "four", _stages((6, 10, 24, 40), (8, 4, 2, 1), last=False)),
        Case("pyramid_gather", "four-channels-last", _stages((6, 10, 24, 40), (8, 4, 2, 1), last=True)),
        Case("pyramid_gather", "two", _stages((3, 5), (4, 1), last=False)),
        Case("pyramid_gather", "to-float32", lambda d: (*_stages((6, 24), (2, 1), False)(d), torch.float32)),
        Case("upsample_score", "16to64", lambda d: (d(3, 16, 16), 64), 2),
        Case("upsample_score", "5x7to33", lambda d: (d(2, 5, 14)[..., ::2] + 3, 33), 2),
        Case("upsample_score", "16to90-parts", lambda d: (d(2, 16, 16), 90), 2),
    ]
    return cases


CASES = _cases()


def measure(case: Case, dtype: torch.dtype, device: str) -> list[dict]:
    """One entry per result of the fused operator: its type, shape, and errors, and those of same-precision torch."""
    args = case.make(Draw(dtype, device))
    plain = getattr(reference, case.operator)
    got = _tuple(getattr(fused, case.operator)(*args))
    torchs = _tuple(plain(*args))
    exact = _exact(case.operator, args)
    entries = []
    for value, scale, torch_value, torch_scale, truth in _paired(got, torchs, exact):
        entries.append(
            {
                "dtype": str(value.dtype),
                "like": value.shape == torch_value.shape and value.dtype == torch_value.dtype,
                "scales": scale is None or (scale.shape == torch_scale.shape and scale.dtype == torch.float32),
                "error": _errors(value, scale, truth),
                "torch": _errors(torch_value, torch_scale, truth),
            }
        )
    return entries


def check(entries: list[dict], summed: int = 0) -> None:
    """Hold the entries of one case against `TOLERANCES`; NaN, which stands for what was never written, fails.

    `summed` is that of a case which runs on tensor cores, see `narrow_error`.
    """
    assert entries
    for entry in entries:
        tolerance = TOLERANCES[getattr(torch, entry["dtype"].removeprefix("torch."))]
        assert entry["like"] and entry["scales"], entry
        largest, rms = entry["error"]
        assert largest <= tolerance.largest and rms <= tolerance.rms, entry
        assert rms <= allowed(tolerance, entry["torch"][1], summed), entry


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _exact(operator: str, args: tuple) -> tuple[Tensor, ...]:
    """What the operator computes, in float64 and never quantised."""
    wide = [_widened(arg) for arg in args]
    if operator == "quantise_rows":
        return (wide[0],)
    if operator in ("linear_split_k_fp8", "linear_gelu_fp8"):
        q, scale, weight, weight_scale, bias, *_ = wide
        out = q @ weight.T * (scale * weight_scale) + bias
        return (out if operator == "linear_split_k_fp8" else reference.gelu_tanh(out),)
    if operator == "attention_short_fp8":
        return (reference.attention(*wide[:3]).transpose(1, 2).flatten(2),)
    return _tuple(getattr(reference, operator.removesuffix("_fp8"))(*wide))


def _widened(arg: object) -> object:
    if isinstance(arg, Tensor):
        return arg.double()
    if isinstance(arg, list):
        return [stage.double() for stage in arg]
    return torch.float64 if isinstance(arg, torch.dtype) else arg


def _paired(got: tuple, torchs: tuple, exact: tuple) -> list[tuple]:
    """(value, its scales or None, torch's value, its scales or None, exact value) per result."""
    pairs, at = [], 0
    for truth in exact:
        quantised = got[at].dtype == reference.FP8
        scales = (got[at + 1], torchs[at + 1]) if quantised else (None, None)
        pairs.append((got[at], scales[0], torchs[at], scales[1], truth))
        at += 2 if quantised else 1
    assert at == len(got) == len(torchs)
    return pairs


def _errors(value: Tensor, scale: Tensor | None, truth: Tensor) -> tuple[float, float]:
    """Largest and rms error in units of the exact result's rms; NaN where anything is."""
    if truth.numel() == 0:  # a result that was not asked for
        return 0.0, 0.0
    wide = value.double() if scale is None else value.double() * scale.double()
    error = (wide - truth) / truth.square().mean().sqrt()
    return error.abs().max().item(), error.square().mean().sqrt().item()
