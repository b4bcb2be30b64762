"""What every operator of the inference path computes, in plain torch: the specification.

Shapes: B frames, N tokens, C feature channels, D hidden width, K tangents. Everything is token-major, channels
contiguous. `*_dual` operators take a primal and K tangents that share it, (K, *primal.shape), and return both; the
tangent rules are exact forward-mode derivatives, written out so that they compile, export and capture like any code.

All functions are pure and accept any floating dtype. Half inputs are widened to float32 on entry and rounded once on
exit; only the matrix products of attention take half operands. `dtype` names the output's type where it may differ
from the input's; a residual or a state keeps its own. `*_fp8` operators return what they compute as float8_e4m3fn
(..., D) and one float32 scale per row, (..., 1), of which the value is the product.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-6
"""LayerNorm epsilon of the DiT."""
TILE = 8
"""Side in pixels of the tiles that `depthwise` sums."""
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""
FP8_TINY = 1e-12
"""A row whose largest magnitude is below this is scaled as if it were this, so that rows of zeros stay zeros."""


def pyramid_gather(stages: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Backbone stage outputs brought to the grid of the last one, as tokens.

    Bilinear interpolation by 1/s (align_corners=False, no antialias) for even s is exactly the mean of the 2x2 pixels
    around each cell's centre, so only those pixels are read.

    Args:
        stages: (B, C_i, s_i*h, s_i*w), s_i in {1, 2, 4, ...}; the last one has s = 1.
        dtype: of the result; None keeps the stages'.

    Returns:
        (B, h*w, sum C_i), channels in stage order.
    """
    h, w = stages[-1].shape[-2:]
    cells = []
    for stage in stages:
        s = stage.shape[-1] // w
        stage = _wide(stage)
        if s == 1:
            cells.append(stage)
            continue
        low = s // 2 - 1
        rows = stage[:, :, low::s] + stage[:, :, low + 1 :: s]
        cells.append((rows[..., low::s] + rows[..., low + 1 :: s]) * 0.25)
    return _cast(torch.cat(cells, 1).flatten(2).transpose(1, 2), dtype or stages[-1].dtype)


def stem(x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int, activation: str = "none") -> Tensor:
    """A convolution of x (B, C, H, W) by weight (N, k, k, C) as channels-last maps (B, H', W', N), in its dtype.

    H' is ceil(H / stride), W' likewise; `before` rows and columns of zeros are above and left of x, as many as are
    needed below and right. bias (N,) float32; see `activate`.
    """
    x = _padded(_wide(_cast(x, weight.dtype)), weight.shape[1], stride, before)
    out = F.conv2d(x, _wide(weight).permute(0, 3, 1, 2), _wide(bias), stride)
    return _cast(activate(out, activation), weight.dtype).permute(0, 2, 3, 1).contiguous()


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int, activation: str = "none", sums: bool = False
) -> tuple[Tensor, Tensor]:
    """A convolution of each channel of x (B, H, W, C) by its own of weight (k, k, C), padded as in `stem`.

    Returns:
        (B, H', W', C) in the dtype of x, and the sums of its `TILE` x `TILE` tiles before rounding, (B, tiles, C),
        tiles row by row, float32 or wider; (B, 0, C) unless `sums`.
    """
    wide = _padded(_wide(x).permute(0, 3, 1, 2), weight.shape[0], stride, before)
    channels = x.shape[-1]
    out = activate(
        F.conv2d(wide, _wide(weight).permute(2, 0, 1)[:, None], _wide(bias), stride, groups=channels), activation
    )
    tiles = out.new_empty(len(x), 0, channels)
    if sums:
        rest = (-out.shape[3] % TILE, -out.shape[2] % TILE)
        tiles = F.avg_pool2d(F.pad(out, (0, rest[0], 0, rest[1])), TILE, divisor_override=1).flatten(2).mT.contiguous()
    return _cast(out, x.dtype).permute(0, 2, 3, 1).contiguous(), tiles


def squeeze_excite(
    sums: Tensor, pixels: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str = "silu"
) -> Tensor:
    """sigmoid(W2 activate(W1 mean + b1) + b2), (B, C) float32 or wider, of the means over images of `pixels` pixels.

    sums (B, tiles, C) as `depthwise` gives them; w1 (R, C), w2 (C, R).
    """
    mean = sums.sum(1) / pixels
    hidden = activate(F.linear(mean, _wide(w1), _wide(b1)), activation)
    return torch.sigmoid(F.linear(hidden, _wide(w2), _wide(b2)))


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activate((x * gate) W^T + b) + residual; x (B, H, W, K), weight (N, K), bias (N,) float32, see `activate`.

    gate (B, K) is float32 and its product with x rounded to the dtype of x, which is that of the residual
    (B, H, W, N) and of the result.
    """
    if gate is not None:
        x = _cast(_wide(x) * _wide(gate)[:, None, None], x.dtype)
    out = activate(F.linear(_wide(x), _wide(weight), _wide(bias)), activation)
    return _cast(out if residual is None else out + _wide(residual), x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine parameters, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) as float8_e4m3fn (..., D) and float32 row scales (..., 1): x = q * scale, |q| <= 448."""
    x = _wide(x)
    scale = x.abs().amax(-1, keepdim=True).clamp(min=FP8_TINY) / FP8_MAX
    # The largest element may come out one rounding above 448; it still rounds to 448, so nothing needs clamping.
    return (x * scale.reciprocal()).to(FP8), scale.float()


def farthest(weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """How far the product of e4m3 rows with e4m3 weights can get: (2,) float32, which is the `reach` of `bounded`.

    A row's values are at most 448 of its scales, so no sum exceeds that times the largest sum of magnitudes of a row of
    weights, (N, D) with scales (1, N), plus the largest magnitude of the bias (N,).
    """
    gain = (weight.float().abs().sum(-1) * weight_scale[0]).amax()
    offset = gain.new_zeros(()) if bias is None else bias.float().abs().amax() / FP8_MAX
    return torch.stack([gain, offset])


def bounded(scale: Tensor, reach: Tensor) -> Tensor:
    """Scales (..., 1) with which e4m3 holds every possible result of a product, known before there is one.

    The product is that of e4m3 rows with scales (..., 1) and weights whose `reach` is `farthest`. A scale that is too
    large moves a row towards the small end of e4m3, a floating type with all bits of its mantissa from 2^-6 to 448, so
    it costs precision only where values leave that range. An epilogue can so quantise by rows, without a row's largest
    value, which no program of a tiled product has.
    """
    return (scale * reach[0] + reach[1]).clamp(min=FP8_TINY)


def ln_modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) * (1 + scale) + shift; x (B, N, D), shift and scale (B or 1, 1, D)."""
    return _cast(layer_norm(_wide(x)) * (1 + _wide(scale)) + _wide(shift), dtype or x.dtype)


def ln_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of `ln_modulate`: (B, N, D) and (B, N, 1)."""
    return quantise_rows(ln_modulate(x, shift, scale, _wide_dtype(x)))


def ln_modulate_dual(
    x: Tensor, dx: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`ln_modulate` of x (B, N, D) with tangents dx (K, B, N, D); shift and scale carry no tangent."""
    out, dout = dtype or x.dtype, dtype or dx.dtype
    x, dx, shift, scale = _wide(x), _wide(dx), _wide(shift), _wide(scale)
    centred = x - x.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LN_EPS)
    y = centred * r
    # Factors that all tangents share are multiplied first: on a CPU each pass over the tangents costs memory traffic.
    gain = 1 + scale
    dy = torch.addcmul(dx - dx.mean(-1, keepdim=True), y, (y * dx).mean(-1, keepdim=True), value=-1) * (r * gain)
    return _cast(y * gain + shift, out), _cast(dy, dout)


def ln_modulate_dual_fp8(x: Tensor, dx: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantise_rows` of both results of `ln_modulate_dual`: q, its scales, dq, its scales."""
    y, dy = ln_modulate_dual(x, dx, shift, scale, _wide_dtype(x))
    return *quantise_rows(y), *quantise_rows(dy)


def gate_residual_ln_modulate(
    x: Tensor, o: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * o and LN(x') * (1 + scale) + shift; x and o (B, N, D); returns both, (B, N, D).

    x' has the dtype of x and is what LN sees; `dtype` is that of the second result, None the same.
    """
    x = _residual(x, o, gate)
    return x, ln_modulate(x, shift, scale, dtype)


def gate_residual_ln_modulate_fp8(
    x: Tensor, o: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_residual_ln_modulate` with its second result quantised by rows: x', q, its scales."""
    x = _residual(x, o, gate)
    return x, *ln_modulate_fp8(x, shift, scale)


def gate_residual_ln_modulate_dual(
    x: Tensor,
    dx: Tensor,
    o: Tensor,
    do: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gate_residual_ln_modulate` with tangents (K, B, N, D); returns x', dx', y, dy."""
    x, dx = _residual(x, o, gate), _residual(dx, do, gate)
    return x, dx, *ln_modulate_dual(x, dx, shift, scale, dtype)


def gate_residual_ln_modulate_dual_fp8(
    x: Tensor, dx: Tensor, o: Tensor, do: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gate_residual_ln_modulate_dual` quantised by rows: x', dx', q, its scales, dq, its scales."""
    x, dx = _residual(x, o, gate), _residual(dx, do, gate)
    return x, dx, *ln_modulate_dual_fp8(x, dx, shift, scale)


def gelu_tanh(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """GELU in its tanh form."""
    return _cast(F.gelu(_wide(x), approximate="tanh"), dtype or x.dtype)


def gelu_tanh_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of `gelu_tanh`: (..., D) and (..., 1)."""
    return quantise_rows(gelu_tanh(x, _wide_dtype(x)))


def gelu_tanh_dual(x: Tensor, dx: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`gelu_tanh` of x (..., D) with tangents dx (K, ..., D); the derivative is evaluated once for all tangents."""
    out, dout = dtype or x.dtype, dtype or dx.dtype
    x, dx = _wide(x), _wide(dx)
    # The derivative as torch computes it, in one pass.
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
    return _cast(F.gelu(x, approximate="tanh"), out), _cast(dx * slope, dout)


def gelu_tanh_dual_fp8(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantise_rows` of both results of `gelu_tanh_dual`: q, its scales, dq, its scales."""
    y, dy = gelu_tanh_dual(x, dx, _wide_dtype(x))
    return *quantise_rows(y), *quantise_rows(dy)


def linear_split_k(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int = 64, columns: int = 64, parts: int = 1
) -> Tensor:
    """x W^T + b; how a GPU would cut the work (`rows`, `columns`, `parts`) changes nothing here."""
    return F.linear(x, weight, bias)


def linear_split_k_fp8(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, rows: int = 64,
    columns: int = 64, parts: int = 1,
) -> Tensor:  # fmt: skip
    """`linear_split_k` of e4m3 rows (..., D) and weights (N, D) with their scales (..., 1) and (1, N): bfloat16."""
    out = F.linear(q.float(), weight.float()) * (scale * weight_scale)
    return (out if bias is None else out + bias).bfloat16()


def linear_gelu_fp8(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, reach: Tensor, rows: int = 64,
    columns: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GELU in its tanh form of `linear_split_k_fp8`, before that is rounded, in e4m3 with `bounded` scales."""
    out = F.linear(q.float(), weight.float()) * (scale * weight_scale)
    limit = bounded(scale, reach)
    return (gelu_tanh(out if bias is None else out + bias.float()) * limit.reciprocal()).to(FP8), limit


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v (B, heads, N, d)."""
    return F.scaled_dot_product_attention(q, k, v)


def attention_short(q: Tensor, k: Tensor, v: Tensor, rows: int = 16) -> Tensor:
    """`attention`; how many queries a GPU's program takes (`rows`) changes nothing here. Stored token-major."""
    return attention(q, k, v).transpose(1, 2).contiguous().transpose(1, 2)


def attention_short_fp8(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, reach: Tensor, rows: int = 16
) -> tuple[Tensor, Tensor]:
    """`attention` with its heads merged, in e4m3 (B, N, heads d) with scales (B, N, 1), one for a frame.

    v is the product of rows with scales (B, N, 1) and weights of that `reach`, see `bounded`; averages of its rows
    reach no further.
    """
    limit = bounded(scale.amax(-2, keepdim=True), reach)
    merged = _wide(attention(q, k, v)).transpose(1, 2).flatten(2)
    return (merged * limit.reciprocal()).to(FP8), limit.expand(scale.shape).contiguous()


def attention_dual(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """`attention` of (B, heads, N, d) with tangents (K, B, heads, N, d): dO = P dV + H V - rowsum(H) O, H = P dS."""
    scale = 1 / math.sqrt(q.shape[-1])
    p = torch.softmax(_wide((q * scale) @ k.transpose(-1, -2)), -1)
    o = _cast(p, v.dtype) @ v
    ds = _wide(dq @ (k * scale).transpose(-1, -2)) + _wide((q * scale) @ dk.transpose(-1, -2))
    h = p * ds
    do = _wide(_cast(p, dv.dtype) @ dv) + _wide(_cast(h, v.dtype) @ v)
    do = torch.addcmul(do, h.sum(-1, keepdim=True), _wide(o), value=-1)
    return o, _cast(do, dq.dtype)


def affine_step(x: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """One integrator step x' = a x + b v; x and v (B, N, C); x' has the dtype of x."""
    wide, v = _wide(x), _wide(v)
    return _cast(wide + b * v if a == 1 else a * wide + b * v, x.dtype)


def affine_error_map(x: Tensor, v: Tensor, a: float, b: float, ref: Tensor | None = None) -> Tensor:
    """The squared-error map sum_c (x' - ref)^2 of the last integrator step, whose x' nobody reads; ref = 0 when None.

    Args:
        x: state (B, N, C).
        v: network output (B, N, C).
        a: factor of the state.
        b: factor of the network output.
        ref: (B, N, C) or None.

    Returns:
        The map (B, N), float32 or wider, of x' in the dtype of x.
    """
    x = affine_step(x, v, a, b)
    error = _wide(x) if ref is None else _wide(x) - _wide(ref)
    return error.square().sum(-1)


def upsample(maps: Tensor, size: int) -> Tensor:
    """(B, h, w) to (B, size, size), bilinear, align_corners=False."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def upsample_score(maps: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`upsample` of maps (B, h, w) and the maximum, minimum and sum of each result: (B, size, size), 3 x (B,)."""
    large = upsample(maps, size)
    flat = large.flatten(1)
    return large, flat.amax(1), flat.amin(1), flat.sum(1)


def activate(x: Tensor, name: str) -> Tensor:
    """x through `none`, `silu` or `relu6`.

    Raises:
        ValueError: another name.
    """
    if name not in ("none", "silu", "relu6"):
        raise ValueError(f"got the activation {name!r}, expected none, silu or relu6")
    return F.silu(x) if name == "silu" else F.relu6(x) if name == "relu6" else x


def _padded(x: Tensor, size: int, stride: int, before: int) -> Tensor:
    """x (B, C, H, W) with zeros around it for a convolution to ceil(H / stride) by ceil(W / stride) pixels."""
    after = [(-(-side // stride) - 1) * stride + size - side - before for side in x.shape[:1:-1]]
    return F.pad(x, (before, after[0], before, after[1]))


def _residual(x: Tensor, o: Tensor, gate: Tensor) -> Tensor:
    return _cast(torch.addcmul(_wide(x), _wide(gate), _wide(o)), x.dtype)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return _cast(x, _wide_dtype(x))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # A cast to the same type would leave a node in exported graphs.
    return x if x.dtype == dtype else x.to(dtype)
