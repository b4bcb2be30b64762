"""Gated residual, LayerNorm and modulation in one pass, also quantised to fp8 and with tangents.

Four passes over a row instead of nine: x and o are read, x' and the modulated row are written; with tangents the same
for each of them. x' is rounded to its stored type before LayerNorm sees it, so both results agree.
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
    check_same_shape,
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
    o_ptr,
    do_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    x_out_ptr,
    dx_out_ptr,
    y_ptr,
    y_scale_ptr,
    dy_ptr,
    dy_scale_ptr,
    x_b,
    x_n,
    dx_k,
    dx_b,
    dx_n,
    o_b,
    o_n,
    do_k,
    do_b,
    do_n,
    gate_b,
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
    gate = load_row(gate_ptr + b * gate_b, cols, mask)
    gain = 1.0 + load_row(scale_ptr + b * scale_b, cols, mask)
    shift = load_row(shift_ptr + b * shift_b, cols, mask)
    for i in range(ROWS):
        row = first + i
        n = row % N
        x = load_row(x_ptr + b * x_b + n * x_n, cols, mask) + gate * load_row(o_ptr + b * o_b + n * o_n, cols, mask)
        stored = x.to(x_out_ptr.dtype.element_ty)
        tl.store(x_out_ptr + row * D + cols, stored, mask=mask)
        y, r = normalise_row(stored.to(tl.float32), mask, D)
        store_row(y_ptr, y_scale_ptr, row, y * gain + shift, cols, mask, D)
        if dx_ptr is not None:
            for k in range(K):
                dx = load_row(dx_ptr + tl.cast(k, tl.int64) * dx_k + b * dx_b + n * dx_n, cols, mask)
                dx += gate * load_row(do_ptr + tl.cast(k, tl.int64) * do_k + b * do_b + n * do_n, cols, mask)
                dstored = dx.to(dx_out_ptr.dtype.element_ty)
                tl.store(dx_out_ptr + (tl.cast(k, tl.int64) * rows + row) * D + cols, dstored, mask=mask)
                dy = normalise_tangent(dstored.to(tl.float32), y, r, D) * gain
                store_row(dy_ptr, dy_scale_ptr, tl.cast(k, tl.int64) * rows + row, dy, cols, mask, D)


def _launch(
    x: Tensor,
    o: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_out: Tensor,
    y: Tensor,
    y_scale: Tensor | None,
    dx: Tensor | None = None,
    do: Tensor | None = None,
    dx_out: Tensor | None = None,
    dy: Tensor | None = None,
    dy_scale: Tensor | None = None,
) -> None:
    batch, tokens, width = x.shape
    gate, shift, scale = modulation(gate, x), modulation(shift, x), modulation(scale, x)
    check_rows(x, o, gate, shift, scale)
    check_same_shape(x, o)
    tangents = 0
    if dx is not None and do is not None:
        check_rows(dx, do)
        check_same_shape(dx, do)
        check_tangents(x, dx)
        tangents = dx.shape[0]
    block = triton.next_power_of_2(width)
    together = rows_together(batch, tokens)
    wrap_triton(_kernel)[(batch * tokens // together,)](
        x,
        dx,
        o,
        do,
        gate,
        shift,
        scale,
        x_out,
        dx_out,
        y,
        y_scale,
        dy,
        dy_scale,
        *x.stride()[:2],
        *((0, 0, 0) if dx is None else dx.stride()[:3]),
        *o.stride()[:2],
        *((0, 0, 0) if do is None else do.stride()[:3]),
        gate.stride(0),
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


@triton_op("flowad::gate_residual_ln_modulate", mutates_args=())
def gate_residual_ln_modulate(
    x: Tensor, o: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * o, and LN(x') * (1 + scale) + shift.

    Bytes moved: x and o read, x' and the second result written, once each: 4 D values per row.

    Args:
        x: residual (B, N, D) float32, bfloat16 or float16.
        o: branch output (B, N, D).
        gate: (B or 1, 1, D), possibly a view of a table.
        shift: as gate.
        scale: as gate.
        dtype: of the second result; None keeps that of x.

    Returns:
        x' (B, N, D) in the dtype of x, and the modulated rows (B, N, D).

    Raises:
        TypeError: another element type.
        ValueError: channels not contiguous, or o does not fit x.
    """
    if not runs_triton(x):
        return reference.gate_residual_ln_modulate(x, o, gate, shift, scale, dtype)
    x_out, y = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype or x.dtype)
    _launch(x, o, gate, shift, scale, x_out, y, None)
    return x_out, y


@triton_op("flowad::gate_residual_ln_modulate_fp8", mutates_args=())
def gate_residual_ln_modulate_fp8(
    x: Tensor, o: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_residual_ln_modulate`, its second result quantised by rows: x', q (B, N, D), scales (B, N, 1).

    Bytes moved: x and o read, x' written, D + 4 bytes per row for the quantised result. Errors as the plain form.
    """
    if not runs_triton(x):
        return reference.gate_residual_ln_modulate_fp8(x, o, gate, shift, scale)
    x_out = x.new_empty(x.shape)
    q, q_scale = empty_fp8(x)
    _launch(x, o, gate, shift, scale, x_out, q, q_scale)
    return x_out, q, q_scale


@triton_op("flowad::gate_residual_ln_modulate_dual", mutates_args=())
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
    """`gate_residual_ln_modulate` with tangents dx and do (K, B, N, D): x', dx', y, dy.

    Bytes moved: 4 D values per row for the primal and each tangent; `dtype` is that of y and dy. dx and do may be
    expanded views. Errors as the plain form.
    """
    if not runs_triton(x):
        return reference.gate_residual_ln_modulate_dual(x, dx, o, do, gate, shift, scale, dtype)
    x_out, dx_out = x.new_empty(x.shape), dx.new_empty(dx.shape)
    y, dy = x.new_empty(x.shape, dtype=dtype or x.dtype), dx.new_empty(dx.shape, dtype=dtype or dx.dtype)
    _launch(x, o, gate, shift, scale, x_out, y, None, dx, do, dx_out, dy, None)
    return x_out, dx_out, y, dy


@triton_op("flowad::gate_residual_ln_modulate_dual_fp8", mutates_args=())
def gate_residual_ln_modulate_dual_fp8(
    x: Tensor, dx: Tensor, o: Tensor, do: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gate_residual_ln_modulate_dual` quantised by rows: x', dx', q, its scales, dq, its scales.

    Bytes moved: 3 D values and D + 4 bytes per row, for the primal and each tangent. Errors as the plain form.
    """
    if not runs_triton(x):
        return reference.gate_residual_ln_modulate_dual_fp8(x, dx, o, do, gate, shift, scale)
    x_out, dx_out = x.new_empty(x.shape), dx.new_empty(dx.shape)
    q, q_scale = empty_fp8(x)
    dq, dq_scale = empty_fp8(dx)
    _launch(x, o, gate, shift, scale, x_out, q, q_scale, dx, do, dx_out, dq, dq_scale)
    return x_out, dx_out, q, q_scale, dq, dq_scale
