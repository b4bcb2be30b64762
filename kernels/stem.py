"""The first convolution of a backbone: few input channels in any layout, channels-last out, bias and activation."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.activation import activate
from flowad_fast.kernels.launch import check_contiguous, check_floats, early, runs_triton, take_turn

_PIXELS = 64
"""Pixels of a program."""


@triton.jit
def _kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    x_b,
    x_c,
    x_y,
    x_x,
    M,
    H,
    W,
    OUT_H,
    OUT_W,
    N: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BEFORE: tl.constexpr,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PIXELS: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    m = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    n = tl.arange(0, COLUMNS)
    tap = tl.arange(0, TAPS)
    c = tap % C
    b, pixel = m // (OUT_H * OUT_W), m % (OUT_H * OUT_W)
    y = (pixel // OUT_W * STRIDE - BEFORE)[:, None] + (tap // C // SIZE)[None, :]
    x = (pixel % OUT_W * STRIDE - BEFORE)[:, None] + (tap // C % SIZE)[None, :]
    there = (m < M)[:, None] & (tap < SIZE * SIZE * C)[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    values = tl.load(x_ptr + (b * x_b)[:, None] + (c * x_c)[None, :] + y * x_y + x * x_x, mask=there, other=0.0)
    weights = tl.load(
        w_ptr + n[None, :] * (SIZE * SIZE * C) + tap[:, None],
        mask=(n[None, :] < N) & (tap[:, None] < SIZE * SIZE * C),
        other=0.0,
    )
    acc = tl.dot(values.to(weights.dtype), weights, input_precision="ieee")
    acc = activate(acc + tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :], ACTIVATION)
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton_op("flowad::stem", mutates_args=())
def stem(x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int, activation: str = "none") -> Tensor:
    """activate(x * w + b) as channels-last maps, accumulated in float32.

    Bytes moved: x read once as far as the caches hold a row of tiles, the result written once.

    Args:
        x: (B, C, H, W) float32, bfloat16 or float16, any strides; rounded to the type of the weights.
        weight: (N, k, k, C) float32, bfloat16 or float16, contiguous.
        bias: (N,) float32.
        stride: of the convolution; the result has ceil(H / stride) by ceil(W / stride) pixels.
        before: rows and columns of zeros above and left of x; as many as are needed follow below and right.
        activation: see `reference.activate`.

    Returns:
        (B, H', W', N) in the type of the weights.

    Raises:
        TypeError: another element type.
        ValueError: shapes that do not fit, or weights that are not contiguous.
    """
    if not runs_triton(x):
        return reference.stem(x, weight, bias, stride, before, activation)
    check_contiguous(weight, bias)
    check_floats(x, weight)
    batch, channels, height, width = x.shape
    out_channels, size = weight.shape[:2]
    if weight.shape != (out_channels, size, size, channels):
        raise ValueError(f"got a weight {tuple(weight.shape)} for {channels} channels, expected (N, k, k, {channels})")
    out_height, out_width = triton.cdiv(height, stride), triton.cdiv(width, stride)
    out = weight.new_empty(batch, out_height, out_width, out_channels)
    count = batch * out_height * out_width
    wrap_triton(_kernel)[(triton.cdiv(count, _PIXELS),)](
        x,
        weight,
        bias,
        out,
        *x.stride(),
        count,
        height,
        width,
        out_height,
        out_width,
        N=out_channels,
        C=channels,
        STRIDE=stride,
        BEFORE=before,
        SIZE=size,
        ACTIVATION=activation,
        PIXELS=_PIXELS,
        TAPS=max(triton.next_power_of_2(size * size * channels), 16),
        COLUMNS=max(triton.next_power_of_2(out_channels), 16),
        num_warps=4,
        **early(),
    )
    return out
