"""Matrix products with few rows: the inner dimension is split among programs, so that they fill a whole GPU.

At batch 1 the paper's field multiplies 256 rows. The two products of a block that are 2048 wide then have 32 tiles of
128 x 128 for the 132 multiprocessors of an H100; smaller tiles fill it but read every operand more often. With the
inner dimension in S parts there are S times as many programs at the same reuse. Their float32 parts are summed by a
second kernel in a fixed order, so results repeat bit for bit.

Which split is best, and whether it beats the GPU's own library, is measured where it runs: see
`flowad_fast.engines.products`.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import bounded, check_floats, check_rows, early, gelu_share, runs_triton, take_turn

_LINE = 128
"""Bytes of a row that a program loads at a time: a cache line."""
_SUM = 1024
"""Values per program of the sum."""
PROMOTE_FP8: int | None = None
"""After how many e4m3 products float32 takes a tensor core's sum over; None: never within a part.

Hopper's tensor cores keep about 13 bits of mantissa in sums of e4m3 products. Summing a whole part there is what
torch's scaled product does with `use_fast_accum`, the other candidate of the measured choice, so both compute alike;
its error at the paper's sizes is a tenth of what quantising the operands costs. 128, a chunk, would make the sum
exact to float32 for one addition per accumulator and chunk outside the tensor cores, which is what bounds their speed.
The tests' tolerance follows from this choice, and the compiled kernel is held to it.
"""


@triton.jit
def _kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    reach_ptr,
    out_ptr,
    out_scale_ptr,
    M,
    N,
    D,
    x_m,
    w_n,
    PART,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PROMOTE: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    part = tl.program_id(1)
    tiles = tl.cdiv(M, ROWS)
    # Neighbouring programs share weights, the larger operand.
    m = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    n = (tl.program_id(0) // tiles) * COLUMNS + tl.arange(0, COLUMNS)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_m
    w_rows = w_ptr + n.to(tl.int64)[None, :] * w_n
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, D), CHUNK):
        d = start + tl.arange(0, CHUNK)
        x = tl.load(x_rows + d[None, :], mask=(m[:, None] < M) & (d[None, :] < D), other=0.0)
        w = tl.load(w_rows + d[:, None], mask=(n[None, :] < N) & (d[:, None] < D), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE)
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[:, None]
        acc *= tl.load(w_scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if bias_ptr is not None:
        if part == 0:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if reach_ptr is not None:
        limit = bounded(tl.load(x_scale_ptr + m, mask=m < M, other=0.0), reach_ptr)
        acc = acc * gelu_share(acc) * (1.0 / limit)[:, None]
        if tl.program_id(0) < tiles:
            tl.store(out_scale_ptr + m, limit, mask=m < M)
    at = out_ptr + (part.to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _sum_kernel(parts_ptr, out_ptr, SIZE, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    take_turn(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + part * SIZE + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    rows: int,
    columns: int,
    parts: int,
    dtype: torch.dtype,
    reach: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    width, inner = weight.shape
    if x.shape[-1] != inner:
        raise ValueError(f"got x {tuple(x.shape)} for a weight {tuple(weight.shape)}, expected (..., {inner})")
    flat = x.reshape(-1, inner)
    if flat.stride(-1) != 1 or weight.stride(-1) != 1:
        raise ValueError("x and weight must be contiguous in the inner dimension: call .contiguous() first")
    count = flat.shape[0]
    chunk = _LINE // x.element_size()
    # A last part may be empty: its zeros are part of the sum.
    span = triton.cdiv(triton.cdiv(inner, chunk), parts) * chunk
    out = x.new_empty(*x.shape[:-1], width, dtype=dtype)
    target = out if parts == 1 else x.new_empty(parts, count, width, dtype=torch.float32)
    wrap_triton(_kernel)[(triton.cdiv(count, rows) * triton.cdiv(width, columns), parts)](
        flat,
        x_scale,
        weight,
        weight_scale,
        bias,
        reach,
        target,
        out_scale,
        count,
        width,
        inner,
        flat.stride(0),
        weight.stride(0),
        span,
        ROWS=rows,
        COLUMNS=columns,
        CHUNK=chunk,
        PROMOTE=PROMOTE_FP8 if x.dtype == reference.FP8 else None,
        num_warps=4 if rows * columns <= 8192 else 8 if rows * columns <= 16384 else 16,
        num_stages=3,
        **early(),
    )
    if parts > 1:
        size = count * width
        wrap_triton(_sum_kernel)[(triton.cdiv(size, _SUM),)](
            target, out, size, PARTS=parts, BLOCK=_SUM, num_warps=4, **early()
        )
    return out


@triton_op("flowad::linear_split_k", mutates_args=())
def linear_split_k(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int = 64, columns: int = 64, parts: int = 1
) -> Tensor:
    """x W^T + b, accumulated in float32.

    Bytes moved: x once for each `columns` of the width and W once for each `rows` of x, mostly out of the L2 cache, the
    result once; with more than one part also `parts` float32 results, written and read.

    Args:
        x: (..., D) float32, bfloat16 or float16; float32 is multiplied without tensor cores.
        weight: (N, D), same type.
        bias: (N,) or None.
        rows: rows of a program's tile, a power of two from 16.
        columns: columns of a program's tile, a power of two from 16.
        parts: of the inner dimension.

    Returns:
        (..., N) in the type of x.

    Raises:
        TypeError: another element type, or two of them.
        ValueError: shapes that do not fit, or an inner dimension that is not contiguous.
    """
    if not runs_triton(x):
        return reference.linear_split_k(x, weight, bias, rows, columns, parts)
    check_floats(x, weight, bias)
    if weight.dtype != x.dtype:
        raise TypeError(f"got x {x.dtype} and weight {weight.dtype}, which must be equal")
    return _launch(x, None, weight, None, bias, rows, columns, parts, x.dtype)


@triton_op("flowad::linear_split_k_fp8", mutates_args=())
def linear_split_k_fp8(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, rows: int = 64,
    columns: int = 64, parts: int = 1,
) -> Tensor:  # fmt: skip
    """`linear_split_k` of rows and weights in e4m3, with one float32 scale per row of each; bfloat16 out.

    Args:
        q: (..., D) float8_e4m3fn.
        scale: (..., 1) float32.
        weight: (N, D) float8_e4m3fn.
        weight_scale: (1, N) float32.
        bias: (N,) or None.
        rows: as `linear_split_k`.
        columns: as `linear_split_k`.
        parts: as `linear_split_k`.

    Returns:
        (..., N) bfloat16.

    Raises:
        TypeError: another element type.
        ValueError: as `linear_split_k`.
    """
    if not runs_triton(q):
        return reference.linear_split_k_fp8(q, scale, weight, weight_scale, bias, rows, columns, parts)
    if q.dtype != reference.FP8 or weight.dtype != reference.FP8:
        raise TypeError(f"got q {q.dtype} and weight {weight.dtype}, expected {reference.FP8}")
    scales = _scales(scale, weight_scale)
    return _launch(q, scales[0], weight, scales[1], bias, rows, columns, parts, torch.bfloat16)


@triton_op("flowad::linear_gelu_fp8", mutates_args=())
def linear_gelu_fp8(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, reach: Tensor, rows: int = 64,
    columns: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GELU in its tanh form of `linear_split_k_fp8`, quantised in the product's epilogue: what the next product takes.

    Bytes moved: as `linear_split_k` in one part, the result in e4m3; nothing else touches the widest activation.

    Args:
        q: as `linear_split_k_fp8`.
        scale: as `linear_split_k_fp8`.
        weight: as `linear_split_k_fp8`.
        weight_scale: as `linear_split_k_fp8`.
        bias: as `linear_split_k_fp8`.
        reach: (2,) float32, `reference.farthest` of the layer.
        rows: as `linear_split_k`.
        columns: as `linear_split_k`.

    Returns:
        (..., N) float8_e4m3fn, and scales (..., 1) float32, see `reference.bounded`.

    Raises:
        TypeError: as `linear_split_k_fp8`.
        ValueError: as `linear_split_k`.
    """
    if not runs_triton(q):
        return reference.linear_gelu_fp8(q, scale, weight, weight_scale, bias, reach, rows, columns)
    if q.dtype != reference.FP8 or weight.dtype != reference.FP8:
        raise TypeError(f"got q {q.dtype} and weight {weight.dtype}, expected {reference.FP8}")
    scales, limits = _scales(scale, weight_scale), torch.empty_like(scale)
    y = _launch(q, scales[0], weight, scales[1], bias, rows, columns, 1, reference.FP8, reach, limits)
    return y, limits


def _scales(scale: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(scale.reshape(-1, 1), weight_scale)
    return scale.reshape(-1), weight_scale.reshape(-1)
