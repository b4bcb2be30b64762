"""What every operator of the inference path computes, in plain torch: the specification.

Shapes: B frames, N tokens, C feature channels, D hidden width, K tangents. Everything is token-major, channels
contiguous. Operators with a `dtype` compute in float32 (float64 stays) whatever they are given and round the result to
`dtype`, by default that of x; a residual stream keeps its own. `*_fp8` forms return e4m3 rows with float32 scales, see
`quantise_rows`. `*_dual` operators take a primal and K tangents that share it, (K, *primal.shape), and return both; the
tangent rules are exact forward-mode derivatives, written out so that they compile, export and capture like any code.
All functions are pure and accept any floating dtype; accumulation happens in that dtype or better.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LN_EPS = 1e-6
"""LayerNorm epsilon of the DiT."""
FP8_MAX = 448.0
"""Largest finite e4m3 value."""
FP8_TINY = 1e-12
"""Smallest row maximum that a scale is made of, so that rows of zeros stay zeros."""


def pyramid_gather(stages: list[Tensor]) -> Tensor:
    """Backbone stage outputs brought to the grid of the last one, as tokens.

    Bilinear interpolation by 1/s (align_corners=False, no antialias) for even s is exactly the mean of the 2x2 pixels
    around each cell's centre, so only those pixels are read.

    Args:
        stages: (B, C_i, s_i*h, s_i*w), s_i in {1, 2, 4, ...}; the last one has s = 1.

    Returns:
        (B, h*w, sum C_i), channels in stage order.
    """
    h, w = stages[-1].shape[-2:]
    cells = []
    for stage in stages:
        s = stage.shape[-1] // w
        if s == 1:
            cells.append(stage)
            continue
        low = s // 2 - 1
        rows = stage[:, :, low::s] + stage[:, :, low + 1 :: s]
        cells.append((rows[..., low::s] + rows[..., low + 1 :: s]) * 0.25)
    return torch.cat(cells, 1).flatten(2).transpose(1, 2)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine parameters, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=LN_EPS)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) as e4m3 (..., D) with one float32 scale a row (..., 1): x ~ q * scale, scale = amax / 448."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(FP8_TINY) / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def ln_modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) * (1 + scale) + shift; x (B, N, D), shift and scale (B or 1, 1, D)."""
    return (layer_norm(_wide(x)) * (1 + scale) + shift).to(dtype or x.dtype)


def ln_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`ln_modulate` as e4m3 rows and scales."""
    return quantise_rows(ln_modulate(_wide(x), shift, scale))


def ln_modulate_dual(
    x: Tensor, dx: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`ln_modulate` of x (B, N, D) with tangents dx (K, B, N, D); shift and scale carry no tangent."""
    out = dtype or x.dtype
    x, dx = _wide(x), _wide(dx)
    centred = x - x.mean(-1, keepdim=True)
    r = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LN_EPS)
    y = centred * r
    dy = r * (dx - dx.mean(-1, keepdim=True) - y * (y * dx).mean(-1, keepdim=True))
    return (y * (1 + scale) + shift).to(out), (dy * (1 + scale)).to(out)


def gate_residual_ln_modulate(
    x: Tensor, o: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * o and LN(x') * (1 + scale) + shift; x and o (B, N, D); returns both, (B, N, D)."""
    new = _wide(x) + gate * o
    return new.to(x.dtype), ln_modulate(new, shift, scale, dtype or x.dtype)


def gate_residual_ln_modulate_fp8(
    x: Tensor, o: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_residual_ln_modulate` with the second result as e4m3 rows and scales: x', q, scales."""
    new = _wide(x) + gate * o
    return new.to(x.dtype), *ln_modulate_fp8(new, shift, scale)


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
    new, dnew = _wide(x) + gate * o, _wide(dx) + gate * do
    return new.to(x.dtype), dnew.to(dx.dtype), *ln_modulate_dual(new, dnew, shift, scale, dtype or x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")


def gelu_tanh_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_tanh` as e4m3 rows and scales."""
    return quantise_rows(gelu_tanh(_wide(x)))


def gelu_tanh_dual(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_tanh` of x (..., D) with tangents dx (K, ..., D); the derivative is evaluated once for all tangents."""
    out = x.dtype
    x, dx = _wide(x), _wide(dx)
    c, k = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    tanh = torch.tanh(c * x * (1 + k * square))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * k * square)
    return (0.5 * x * (1 + tanh)).to(out), (dx * slope).to(out)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v (B, heads, N, d)."""
    return F.scaled_dot_product_attention(q, k, v)


def attention_dual(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """`attention` of (B, heads, N, d) with tangents (K, B, heads, N, d): dO = P dV + H V - rowsum(H) O, H = P dS."""
    scale = 1 / math.sqrt(q.shape[-1])
    p = torch.softmax((q * scale) @ k.transpose(-1, -2), -1)
    o = p @ v
    ds = (dq * scale) @ k.transpose(-1, -2) + (q * scale) @ dk.transpose(-1, -2)
    h = p * ds
    return o, p @ dv + h @ v - h.sum(-1, keepdim=True) * o


def affine_step(x: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """One integrator step x' = a x + b v; x and v (B, N, C)."""
    return x + b * v if a == 1 else a * x + b * v


def affine_step_error(x: Tensor, v: Tensor, a: float, b: float, ref: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The last integrator step fused with the squared-error map sum_c (x' - ref)^2, ref = 0 when None.

    Args:
        x: state (B, N, C).
        v: network output (B, N, C).
        a: factor of the state.
        b: factor of the network output.
        ref: (B, N, C) or None.

    Returns:
        x' (B, N, C) and the map (B, N).
    """
    x = affine_step(x, v, a, b)
    error = x if ref is None else x - ref
    return x, error.square().sum(-1)


def upsample(maps: Tensor, size: int) -> Tensor:
    """(B, h, w) to (B, size, size), bilinear, align_corners=False."""
    return F.interpolate(maps[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]


def _wide(x: Tensor) -> Tensor:
    """Half precision to float32, where statistics and sums are kept; wider dtypes as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
