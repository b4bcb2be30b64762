"""A depthwise convolution on channels-last maps with bias, activation and the sums that squeeze-excite needs."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.activation import activate
from flowad_fast.kernels.launch import check_contiguous, check_floats, early, runs_triton, take_turn

_CHANNELS = 64
"""Channels of a program: a cache line of a half type."""


@triton.jit
def _kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    sums_ptr,
    H,
    W,
    OUT_H,
    OUT_W,
    TILES,
    ACROSS,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    BEFORE: tl.constexpr,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    tile, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pixel = tl.arange(0, SIDE * SIDE)
    out_y, out_x = tile // ACROSS * SIDE + pixel // SIDE, tile % ACROSS * SIDE + pixel % SIDE
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (out_y < OUT_H) & (out_x < OUT_W)
    acc = tl.zeros([SIDE * SIDE, CHANNELS], tl.float32)
    for dy in range(SIZE):  # unrolled as well, its masks would take half the registers
        for dx in tl.static_range(SIZE):
            y, x = out_y * STRIDE + (dy - BEFORE), out_x * STRIDE + (dx - BEFORE)
            there = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            at = x_ptr + ((b * H + y) * W + x)[:, None] * C + c[None, :]
            value = tl.load(at, mask=there[:, None] & (c[None, :] < C), other=0.0).to(tl.float32)
            weight = tl.load(w_ptr + (dy * SIZE + dx) * C + c, mask=c < C, other=0.0).to(tl.float32)
            acc += value * weight[None, :]
    acc = activate(acc + tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :], ACTIVATION)
    mask = inside[:, None] & (c[None, :] < C)
    at = out_ptr + ((b * OUT_H + out_y) * OUT_W + out_x)[:, None] * C + c[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        tl.store(sums_ptr + (b * TILES + tile) * C + c, tl.sum(tl.where(mask, acc, 0.0), 0), mask=c < C)


@triton_op("flowad::depthwise", mutates_args=())
def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int, activation: str = "none", sums: bool = False
) -> tuple[Tensor, Tensor]:
    """activate(x * w + b), each channel with its own kernel, accumulated in float32.

    Bytes moved: x read once as far as the caches hold a tile of 8x8 pixels with its rim, the result written once.

    Args:
        x: (B, H, W, C) float32, bfloat16 or float16, contiguous.
        weight: (k, k, C), same type, contiguous.
        bias: (C,) float32.
        stride: of the convolution; the result has ceil(H / stride) by ceil(W / stride) pixels.
        before: rows and columns of zeros above and left of x; as many as are needed follow below and right.
        activation: see `reference.activate`.
        sums: whether sums are wanted.

    Returns:
        (B, H', W', C) in the type of x, and the sums of its 8x8 tiles before rounding, (B, tiles, C) float32, tiles
        row by row; (B, 0, C) where they are not wanted.

    Raises:
        TypeError: another element type, or two of them.
        ValueError: shapes that do not fit, or an operand that is not contiguous.
    """
    if not runs_triton(x):
        return reference.depthwise(x, weight, bias, stride, before, activation, sums)
    check_contiguous(x, weight, bias)
    check_floats(x, weight)
    batch, height, width, channels = x.shape
    size = weight.shape[0]
    if weight.shape != (size, size, channels) or weight.dtype != x.dtype:
        raise ValueError(
            f"got a weight {tuple(weight.shape)} {weight.dtype} for {channels} channels, expected (k, k, {channels}) "
            f"{x.dtype}"
        )
    out_height, out_width = triton.cdiv(height, stride), triton.cdiv(width, stride)
    side = reference.TILE
    across = triton.cdiv(out_width, side)
    tiles = triton.cdiv(out_height, side) * across
    out = x.new_empty(batch, out_height, out_width, channels)
    found = x.new_empty(batch, tiles if sums else 0, channels, dtype=torch.float32)
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    wrap_triton(_kernel)[(tiles, triton.cdiv(channels, block), batch)](
        x,
        weight,
        bias,
        out,
        found if sums else None,
        height,
        width,
        out_height,
        out_width,
        tiles,
        across,
        C=channels,  # a constant, so that Triton knows how rows are aligned
        STRIDE=stride,
        BEFORE=before,
        SIZE=size,
        ACTIVATION=activation,
        SIDE=side,
        CHANNELS=block,
        num_warps=8,
        **early(),
    )
    return out, found
