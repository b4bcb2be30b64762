"""LayerNorm and modulation in one pass, also quantised to fp8 and with tangents; the reference is the specification.

One program per row; the row stays in registers between its statistics and its result, and with tangents the primal is
read and normalised once for all of them.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import (
    check_rows,
    check_tangents,
    early,
    empty_fp8,
    load_row,
    modulation,
    normalise_row,
    normalise_tangent,
    rows_together,
    runs_triton,
    store_row,
    take_turn,
    warps,
)


@triton.jit
def _kernel(
    x_ptr,
    dx_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    y_scale_ptr,
    dy_ptr,
    dy_scale_ptr,
    x_b,
    x_n,
    dx_k,
    dx_b,
    dx_n,
    shift_b,
    scale_b,
    N,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.num_programs(0) * ROWS
    b = first // N
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    gain = 1.0 + load_row(scale_ptr + b * scale_b, cols, mask)
    shift = load_row(shift_ptr + b * shift_b, cols, mask)
    for i in range(ROWS):
        row = first + i
        n = row % N
        y, r = normalise_row(load_row(x_ptr + b * x_b + n * x_n, cols, mask), mask, D)
        store_row(y_ptr, y_scale_ptr, row, y * gain + shift, cols, mask, D)
        if dx_ptr is not None:
            for k in range(K):
                dx = load_row(dx_ptr + tl.cast(k, tl.int64) * dx_k + b * dx_b + n * dx_n, cols, mask)
                dy = normalise_tangent(dx, y, r, D) * gain
                store_row(dy_ptr, dy_scale_ptr, tl.cast(k, tl.int64) * rows + row, dy, cols, mask, D)


def _launch(
    x: Tensor,
    dx: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    y: Tensor,
    y_scale: Tensor | None,
    dy: Tensor | None = None,
    dy_scale: Tensor | None = None,
) -> None:
    batch, tokens, width = x.shape
    shift, scale = modulation(shift, x), modulation(scale, x)
    check_rows(x, shift, scale)
    tangents = 0
    if dx is not None:
        check_rows(dx)
        check_tangents(x, dx)
        tangents = dx.shape[0]
    block = triton.next_power_of_2(width)
    together = rows_together(batch, tokens)
    wrap_triton(_kernel)[(batch * tokens // together,)](
        x,
        dx,
        shift,
        scale,
        y,
        y_scale,
        dy,
        dy_scale,
        *x.stride()[:2],
        *((0, 0, 0) if dx is None else dx.stride()[:3]),
        shift.stride(0),
        scale.stride(0),
        tokens,
        D=width,
        K=tangents,
        ROWS=together,
        BLOCK=block,
        num_warps=warps(block),
        **early(),
    )


@triton_op("flowad::ln_modulate", mutates_args=())
def ln_modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) * (1 + scale) + shift.

    Bytes moved: x read once, the result written once, 2 D values per row; modulations stay in cache.

    Args:
        x: (B, N, D) float32, bfloat16 or float16.
        shift: (B or 1, 1, D), possibly a view of a table.
        scale: as shift.
        dtype: of the result; None keeps that of x.

    Returns:
        (B, N, D).

    Raises:
        TypeError: another element type.
        ValueError: channels not contiguous.
    """
    if not runs_triton(x):
        return reference.ln_modulate(x, shift, scale, dtype)
    y = x.new_empty(x.shape, dtype=dtype or x.dtype)
    _launch(x, None, shift, scale, y, None)
    return y


@triton_op("flowad::ln_modulate_fp8", mutates_args=())
def ln_modulate_fp8(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`ln_modulate` quantised by rows: float8_e4m3fn (B, N, D) and float32 scales (B, N, 1).

    Bytes moved: x read once, D + 4 bytes per row written. Arguments and errors as `ln_modulate`.
    """
    if not runs_triton(x):
        return reference.ln_modulate_fp8(x, shift, scale)
    q, q_scale = empty_fp8(x)
    _launch(x, None, shift, scale, q, q_scale)
    return q, q_scale


@triton_op("flowad::ln_modulate_dual", mutates_args=())
def ln_modulate_dual(
    x: Tensor, dx: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`ln_modulate` with tangents dx (K, B, N, D), which may be expanded views: (B, N, D) and (K, B, N, D).

    Bytes moved: (1 + K) rows read, (1 + K) written; `dtype` is that of both results, None keeps those of x and dx.
    Errors as `ln_modulate`, and ValueError where dx does not fit x.
    """
    if not runs_triton(x):
        return reference.ln_modulate_dual(x, dx, shift, scale, dtype)
    y, dy = x.new_empty(x.shape, dtype=dtype or x.dtype), dx.new_empty(dx.shape, dtype=dtype or dx.dtype)
    _launch(x, dx, shift, scale, y, None, dy, None)
    return y, dy


@triton_op("flowad::ln_modulate_dual_fp8", mutates_args=())
def ln_modulate_dual_fp8(x: Tensor, dx: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ln_modulate_dual` quantised by rows: q (B, N, D), scales (B, N, 1), dq (K, B, N, D), scales (K, B, N, 1).

    Bytes moved: (1 + K) rows read, (1 + K) (D + 4) bytes per row written. Errors as `ln_modulate_dual`.
    """
    if not runs_triton(x):
        return reference.ln_modulate_dual_fp8(x, dx, shift, scale)
    q, q_scale = empty_fp8(x)
    dq, dq_scale = empty_fp8(dx)
    _launch(x, dx, shift, scale, q, q_scale, dq, dq_scale)
    return q, q_scale, dq, dq_scale
