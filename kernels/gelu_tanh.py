"""GELU in its tanh form, also quantised to fp8 and with tangents, which share one evaluation of the derivative."""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import (
    GELU_CUBIC,
    GELU_SLOPE,
    check_rows,
    check_tangents,
    early,
    empty_fp8,
    gelu_share,
    load_row,
    runs_triton,
    store_row,
    take_turn,
    warps,
)

_COLUMNS = 2048


@triton.jit
def _kernel(
    x_ptr,
    dx_ptr,
    y_ptr,
    y_scale_ptr,
    dy_ptr,
    dy_scale_ptr,
    x_m,
    dx_k,
    dx_m,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < D
    x = load_row(x_ptr + row * x_m, cols, mask)
    half = gelu_share(x)
    store_row(y_ptr, y_scale_ptr, row, x * half, cols, mask, D)
    slope = half + x * half * (1.0 - half) * GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * x * x)
    if dx_ptr is not None:
        for k in range(K):
            dy = slope * load_row(dx_ptr + tl.cast(k, tl.int64) * dx_k + row * dx_m, cols, mask)
            store_row(dy_ptr, dy_scale_ptr, tl.cast(k, tl.int64) * rows + row, dy, cols, mask, D)


def _launch(
    x: Tensor,
    dx: Tensor | None,
    y: Tensor,
    y_scale: Tensor | None,
    dy: Tensor | None = None,
    dy_scale: Tensor | None = None,
) -> None:
    width = x.shape[-1]
    x_rows = x.reshape(-1, width)
    check_rows(x_rows)
    dx_rows, tangents = None, 0
    if dx is not None:
        check_tangents(x, dx)
        tangents = dx.shape[0]
        dx_rows = dx.reshape(tangents, -1, width)
        check_rows(dx_rows)
    block = triton.next_power_of_2(width)
    if y_scale is None:
        block = min(block, _COLUMNS)
    wrap_triton(_kernel)[(x_rows.shape[0], triton.cdiv(width, block))](
        x_rows,
        dx_rows,
        y,
        y_scale,
        dy,
        dy_scale,
        x_rows.stride(0),
        *((0, 0) if dx_rows is None else dx_rows.stride()[:2]),
        D=width,
        K=tangents,
        BLOCK=block,
        num_warps=warps(block),
        **early(),
    )


@triton_op("flowad::gelu_tanh", mutates_args=())
def gelu_tanh(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """GELU in its tanh form.

    Bytes moved: x read and the result written, once each. Leading dimensions that do not merge are copied first.

    Args:
        x: (..., D) float32, bfloat16 or float16.
        dtype: of the result; None keeps that of x.

    Returns:
        (..., D).

    Raises:
        TypeError: another element type.
        ValueError: channels not contiguous.
    """
    if not runs_triton(x):
        return reference.gelu_tanh(x, dtype)
    y = x.new_empty(x.shape, dtype=dtype or x.dtype)
    _launch(x, None, y, None)
    return y


@triton_op("flowad::gelu_tanh_fp8", mutates_args=())
def gelu_tanh_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_tanh` quantised by rows: float8_e4m3fn (..., D) and float32 scales (..., 1).

    Bytes moved: x read once, D + 4 bytes per row written; a program holds the whole row. Errors as `gelu_tanh`.
    """
    if not runs_triton(x):
        return reference.gelu_tanh_fp8(x)
    q, q_scale = empty_fp8(x)
    _launch(x, None, q, q_scale)
    return q, q_scale


@triton_op("flowad::gelu_tanh_dual", mutates_args=())
def gelu_tanh_dual(x: Tensor, dx: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`gelu_tanh` of x (..., D) with tangents dx (K, ..., D): results of the same shapes.

    Bytes moved: (1 + K) rows read and written; `dtype` is that of both results, None keeps those of x and dx.
    Errors as `gelu_tanh`, and ValueError where dx does not fit x.
    """
    if not runs_triton(x):
        return reference.gelu_tanh_dual(x, dx, dtype)
    y, dy = x.new_empty(x.shape, dtype=dtype or x.dtype), dx.new_empty(dx.shape, dtype=dtype or dx.dtype)
    _launch(x, dx, y, None, dy, None)
    return y, dy


@triton_op("flowad::gelu_tanh_dual_fp8", mutates_args=())
def gelu_tanh_dual_fp8(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gelu_tanh_dual` quantised by rows: q (..., D), scales (..., 1), dq (K, ..., D), scales (K, ..., 1).

    Bytes moved: (1 + K) rows read, (1 + K) (D + 4) bytes per row written. Errors as `gelu_tanh_dual`.
    """
    if not runs_triton(x):
        return reference.gelu_tanh_dual_fp8(x, dx)
    q, q_scale = empty_fp8(x)
    dq, dq_scale = empty_fp8(dx)
    _launch(x, dx, q, q_scale, dq, dq_scale)
    return q, q_scale, dq, dq_scale
