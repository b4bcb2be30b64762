"""Anomaly maps to frame size and their largest, smallest and summed value in the same pass."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import check_floats, early, runs_triton, take_turn

_PIXELS = 4096
"""Of a program: 16 programs share a map of 256x256 pixels, so that a single frame does not wait for one."""


@triton.jit
def _corners(pixel, ratio, LENGTH: tl.constexpr):
    """The two source indices of an output index, and the weight of the second (align_corners=False)."""
    source = tl.maximum((pixel.to(tl.float32) + 0.5) * ratio - 0.5, 0.0)
    low = tl.minimum(source.to(tl.int32), LENGTH - 1)
    return low, tl.minimum(low + 1, LENGTH - 1), source - low.to(tl.float32)


@triton.jit
def _kernel(
    map_ptr,
    out_ptr,
    parts_ptr,
    m_b,
    m_y,
    m_x,
    ratio_y,
    ratio_x,
    H: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    base = map_ptr + b * m_b
    pixel = part * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < SIZE * SIZE
    y0, y1, wy = _corners(pixel // SIZE, ratio_y, H)
    x0, x1, wx = _corners(pixel % SIZE, ratio_x, W)
    top = (1.0 - wx) * tl.load(base + y0 * m_y + x0 * m_x, mask=mask, other=0.0).to(tl.float32)
    top += wx * tl.load(base + y0 * m_y + x1 * m_x, mask=mask, other=0.0).to(tl.float32)
    low = (1.0 - wx) * tl.load(base + y1 * m_y + x0 * m_x, mask=mask, other=0.0).to(tl.float32)
    low += wx * tl.load(base + y1 * m_y + x1 * m_x, mask=mask, other=0.0).to(tl.float32)
    value = ((1.0 - wy) * top + wy * low).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + b * SIZE * SIZE + pixel, value, mask=mask)
    value = value.to(tl.float32)
    at = parts_ptr + b * 3 * PARTS + part
    tl.store(at, tl.max(tl.where(mask, value, -float("inf")), 0))
    tl.store(at + PARTS, tl.min(tl.where(mask, value, float("inf")), 0))
    tl.store(at + 2 * PARTS, tl.sum(tl.where(mask, value, 0.0), 0))


@triton.jit
def _score_kernel(parts_ptr, max_ptr, min_ptr, sum_ptr, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    take_turn(EARLY)
    b = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    mask = part < PARTS
    at = parts_ptr + b * 3 * PARTS + part
    total = tl.sum(tl.load(at + 2 * PARTS, mask=mask, other=0.0), 0)
    # A map that is not finite must not get a finite score: maxima drop NaN, sums keep it.
    nan = total != total
    tl.store(max_ptr + b, tl.where(nan, total, tl.max(tl.load(at, mask=mask, other=-float("inf")), 0)))
    tl.store(min_ptr + b, tl.where(nan, total, tl.min(tl.load(at + PARTS, mask=mask, other=float("inf")), 0)))
    tl.store(sum_ptr + b, total)


@triton_op("flowad::upsample_score", mutates_args=())
def upsample_score(maps: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """maps (B, h, w) to (B, size, size), bilinear, align_corners=False, with each result's maximum, minimum and sum.

    Bytes moved: the map read out of cache, the result written once and not read again. Its parts are reduced by a
    second kernel in one order: scores repeat bit for bit.

    Args:
        maps: (B, h, w) float32, bfloat16 or float16.
        size: S.

    Returns:
        (B, S, S) in the dtype of maps, then maximum, minimum and sum, (B,) in the same dtype.

    Raises:
        TypeError: another element type.
    """
    if not runs_triton(maps):
        return reference.upsample_score(maps, size)
    check_floats(maps)
    batch, height, width = maps.shape
    large = maps.new_empty(batch, size, size)
    largest, smallest, total = (maps.new_empty(batch) for _ in range(3))
    count = triton.cdiv(size * size, _PIXELS)
    parts = maps.new_empty(batch, 3, count, dtype=torch.float32)
    wrap_triton(_kernel)[(count, batch)](
        maps,
        large,
        parts,
        *maps.stride(),
        height / size,
        width / size,
        H=height,
        W=width,
        SIZE=size,
        PARTS=count,
        BLOCK=_PIXELS,
        num_warps=8,
        **early(),
    )
    block = triton.next_power_of_2(count)
    results = largest, smallest, total
    wrap_triton(_score_kernel)[(batch,)](parts, *results, PARTS=count, BLOCK=block, num_warps=1, **early())
    return large, largest, smallest, total
