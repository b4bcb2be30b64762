"""A 1x1 convolution on channels-last maps with what stands around it: gate before; bias, activation, residual after."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.activation import activate
from flowad_fast.kernels.launch import check_contiguous, check_floats, check_same_shape, early, runs_triton, take_turn

_LINE = 128
"""Bytes of a pixel's channels that a program loads at a time: a cache line."""
_FEW = 132
"""With fewer programs than this, the multiprocessors of an H100, tiles are made smaller."""


@triton.jit
def _kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    gate_ptr,
    residual_ptr,
    out_ptr,
    M,
    PIXELS,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    # Neighbouring programs share pixels, the larger operand.
    across = tl.cdiv(N, COLUMNS)
    m = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = (m[:, None] < M) & (k[None, :] < K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside, other=0.0)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + (m // PIXELS)[:, None] * K + k[None, :], mask=inside, other=0.0)
            x = (x.to(tl.float32) * gate).to(x.dtype)
        w = tl.load(w_ptr + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc = activate(acc + tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :], ACTIVATION)
    mask = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None] * N + n[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


def tile(rows: int, width: int) -> tuple[int, int]:
    """Pixels and channels of a program's tile, for so many pixels of so many channels."""
    columns = min(128, max(triton.next_power_of_2(width), 16))
    if triton.cdiv(rows, 128) * triton.cdiv(width, columns) >= _FEW:
        return 128, columns
    return 64, min(columns, 64)


@triton_op("flowad::pointwise", mutates_args=())
def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activate((x * gate) W^T + b) + residual, accumulated in float32, one rounding at the end.

    Bytes moved: x once for each 128 channels of the result, most of them out of the L2 cache; the residual read and
    the result written once.

    Args:
        x: (B, H, W, K) float32, bfloat16 or float16, contiguous; float32 is multiplied without tensor cores.
        weight: (N, K), same type, contiguous.
        bias: (N,) float32.
        activation: see `reference.activate`.
        gate: (B, K) float32, contiguous, or None; the product with x is rounded to the type of x.
        residual: (B, H, W, N) in the type of x, contiguous, or None.

    Returns:
        (B, H, W, N) in the type of x.

    Raises:
        TypeError: another element type, or two of them.
        ValueError: shapes that do not fit, or an operand that is not contiguous.
    """
    if not runs_triton(x):
        return reference.pointwise(x, weight, bias, activation, gate, residual)
    check_contiguous(x, weight, bias, gate, residual)
    check_floats(x, weight, residual)
    width, inner = weight.shape
    if weight.dtype != x.dtype:
        raise TypeError(f"got x {x.dtype} and weight {weight.dtype}, which must be equal")
    if x.shape[-1] != inner:
        raise ValueError(f"got x {tuple(x.shape)} for a weight {tuple(weight.shape)}, expected (..., {inner})")
    out = x.new_empty(*x.shape[:-1], width)
    if residual is not None:
        check_same_shape(out, residual)
    batch, height, breadth, _ = x.shape
    pixels = height * breadth
    rows, columns = tile(batch * pixels, width)
    wrap_triton(_kernel)[(triton.cdiv(batch * pixels, rows) * triton.cdiv(width, columns),)](
        x,
        weight,
        bias,
        gate,
        residual,
        out,
        batch * pixels,
        pixels,
        # Constants, so that Triton knows how rows are aligned: few are multiples of 16, all are of 8.
        N=width,
        K=inner,
        ACTIVATION=activation,
        ROWS=rows,
        COLUMNS=columns,
        CHUNK=min(_LINE // x.element_size(), max(triton.next_power_of_2(inner), 16)),
        num_warps=8 if rows * columns > 8192 else 4,
        num_stages=3,
        **early(),
    )
    return out
