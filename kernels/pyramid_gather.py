"""Backbone stages to feature tokens: reads only the 2x2 pixels around each cell's centre, writes tokens, one launch."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import check_floats, early, runs_triton, take_turn

MAX_STAGES = 4
_CELLS = 32


@triton.jit
def _gather(
    stage_ptr,
    out_ptr,
    s_b,
    s_c,
    s_y,
    s_x,
    b,
    first,
    W,
    N,
    TOTAL: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cells = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_C)
    mask = (cells[:, None] < N) & (cols[None, :] < C)
    y, x = cells // W * S, cells % W * S
    if S > 1:
        y += S // 2 - 1
        x += S // 2 - 1
    at = stage_ptr + b * s_b + y[:, None] * s_y + x[:, None] * s_x + cols[None, :] * s_c
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if S > 1:
        value += tl.load(at + s_y, mask=mask, other=0.0).to(tl.float32)
        right = tl.load(at + s_x, mask=mask, other=0.0).to(tl.float32)
        right += tl.load(at + s_x + s_y, mask=mask, other=0.0).to(tl.float32)
        value = (value + right) * 0.25
    target = out_ptr + (b * N + cells[:, None]) * TOTAL + first + cols[None, :]
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kernel(
    p0,
    p1,
    p2,
    p3,
    out_ptr,
    b0,
    c0,
    y0,
    x0,
    b1,
    c1,
    y1,
    x1,
    b2,
    c2,
    y2,
    x2,
    b3,
    c3,
    y3,
    x3,
    W,
    N,
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    S3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    b = tl.program_id(1).to(tl.int64)
    stage = tl.program_id(2)
    total: tl.constexpr = C0 + C1 + C2 + C3
    if stage == 0:
        _gather(p0, out_ptr, b0, c0, y0, x0, b, 0, W, N, total, C0, S0, BLOCK_N, BLOCK_0)
    if stage == 1:
        _gather(p1, out_ptr, b1, c1, y1, x1, b, C0, W, N, total, C1, S1, BLOCK_N, BLOCK_1)
    if stage == 2:
        _gather(p2, out_ptr, b2, c2, y2, x2, b, C0 + C1, W, N, total, C2, S2, BLOCK_N, BLOCK_2)
    if stage == 3:
        _gather(p3, out_ptr, b3, c3, y3, x3, b, C0 + C1 + C2, W, N, total, C3, S3, BLOCK_N, BLOCK_3)


@triton_op("flowad::pyramid_gather", mutates_args=())
def pyramid_gather(stages: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Stage outputs brought to the grid of the last one, as tokens, each the mean of its 2x2 centre pixels.

    Bytes moved: 4 pixels per cell and channel of the larger stages and 1 of the last read, the tokens written once;
    NCHW and channels-last are both taken as they are.

    Args:
        stages: 1 to 4 of (B, C_i, s_i h, s_i w) float32, bfloat16 or float16, one dtype; s_i is 1 or even, the last 1.
        dtype: of the result; None keeps the stages'.

    Returns:
        (B, h w, sum C_i), contiguous, channels in stage order.

    Raises:
        TypeError: another element type.
        ValueError: more than 4 stages, or sizes that are no even multiple of the last one's.
    """
    last = stages[-1]
    if not runs_triton(last):
        return reference.pyramid_gather(list(stages), dtype)
    check_floats(*stages)
    batch, _, height, width = last.shape
    factors = [stage.shape[-1] // width for stage in stages]
    for stage, s in zip(stages, factors, strict=True):
        if stage.shape[-2:] != (s * height, s * width) or (s != 1 and s % 2):
            raise ValueError(f"got a stage {tuple(stage.shape)}, expected 1 or an even multiple of {(height, width)}")
    if len(stages) > MAX_STAGES:
        raise ValueError(f"got {len(stages)} stages, expected at most {MAX_STAGES}: gather them in two calls")
    channels = [stage.shape[1] for stage in stages]
    out = last.new_empty(batch, height * width, sum(channels), dtype=dtype or last.dtype)
    missing = MAX_STAGES - len(stages)
    padded = [*stages, *[last] * missing]
    channels += [0] * missing
    factors += [1] * missing
    wrap_triton(_kernel)[(triton.cdiv(height * width, _CELLS), batch, len(stages))](
        *padded,
        out,
        *(stride for stage in padded for stride in stage.stride()),
        width,
        height * width,
        *channels,
        *factors,
        _CELLS,
        *(triton.next_power_of_2(max(c, 1)) for c in channels),
        num_warps=4,
        **early(),
    )
    return out
