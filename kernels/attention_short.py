"""Attention with few queries per program, for calls that are too small to fill a GPU otherwise.

torch's kernels give a program 64 or 128 queries. One frame of 256 tokens and 8 heads is then 32 programs or fewer for
the 132 multiprocessors of an H100; with 16 queries it is 128. Keys and values are read more often for it, out of the
L2 cache, so larger batches are better served by torch. A program holds the scores of its queries against all keys.
"""
# mypy: allow-untyped-defs

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import bounded, check_same_shape, early, holds_scores, load_tile, runs_triton, take_turn

ROWS = (16, 32, 64)
"""Queries per program; 64 are as many as torch's, for the sake of results in e4m3, which torch's cannot write."""


@triton.jit
def _kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    x_scale_ptr,
    reach_ptr,
    o_ptr,
    o_scale_ptr,
    s_b,
    s_h,
    s_n,
    s_d,
    o_b,
    o_h,
    o_n,
    scale,
    H,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    pair = tl.program_id(1)
    b, h = (pair // H).to(tl.int64), pair % H
    at = b * s_b + h * s_h
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        q = load_tile(q_ptr + at, rows, cols, s_n, s_d, N, D)
        s = tl.dot(q, tl.trans(load_tile(k_ptr + at, keys, cols, s_n, s_d, N, D)), s)
    s = tl.where(keys[None, :] < N, s * scale, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    total = tl.sum(p, 1)[:, None]
    p = p.to(v_ptr.dtype.element_ty)
    if reach_ptr is not None:
        limit = bounded(tl.max(tl.load(x_scale_ptr + b * N + keys, mask=keys < N, other=0.0), 0), reach_ptr)
        total *= limit
        if h == 0:
            tl.store(o_scale_ptr + b * N + rows, limit + tl.zeros([BLOCK_M], tl.float32), mask=rows < N)
    target = o_ptr + b * o_b + h * o_h
    for start in range(0, D, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        out = tl.dot(p, load_tile(v_ptr + at, keys, cols, s_n, s_d, N, D)) / total
        inside = (rows[:, None] < N) & (cols[None, :] < D)
        tl.store(target + rows[:, None] * o_n + cols[None, :], out.to(o_ptr.dtype.element_ty), mask=inside)


@triton_op("flowad::attention_short", mutates_args=())
def attention_short(q: Tensor, k: Tensor, v: Tensor, rows: int = 16) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, products accumulated in float32. The kernel takes what `holds_scores` says.

    Bytes moved: queries and result once, keys and values once for each `rows` queries, out of the L2 cache. Operands
    that do not share strides, as the views of one qkv projection do, are copied first.

    Args:
        q: (B, heads, N, d), any floating dtype.
        k: as q.
        v: as q.
        rows: queries per program, a power of two from 16.

    Returns:
        (B, heads, N, d), stored token-major: heads merge without a copy.

    Raises:
        TypeError: several element types.
        ValueError: shapes that do not fit.
    """
    if not (runs_triton(q) and holds_scores(q.dtype, q.shape[-2])):
        return reference.attention_short(q, k, v, rows)
    batch, heads, tokens, head = q.shape
    out = q.new_empty(batch, tokens, heads, head)
    _launch(q, k, v, None, None, out, None, rows)
    return out.transpose(1, 2)


@triton_op("flowad::attention_short_fp8", mutates_args=())
def attention_short_fp8(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, reach: Tensor, rows: int = 16
) -> tuple[Tensor, Tensor]:
    """`attention_short` with its heads merged, in e4m3: what the next product takes.

    Bytes moved: as `attention_short`, the result in e4m3, and N + 1 scales.

    Args:
        q: (B, heads, N, d), any floating dtype.
        k: as q.
        v: as q.
        scale: (B, N, 1) float32, of the rows whose product gave v.
        reach: (2,) float32, `reference.farthest` of the weights that did.
        rows: as `attention_short`.

    Returns:
        (B, N, heads d) float8_e4m3fn, and scales (B, N, 1) float32, see `reference.bounded`.

    Raises:
        TypeError: as `attention_short`.
        ValueError: as `attention_short`.
    """
    if not (runs_triton(q) and holds_scores(q.dtype, q.shape[-2])):
        return reference.attention_short_fp8(q, k, v, scale, reach, rows)
    batch, heads, tokens, head = q.shape
    out = q.new_empty(batch, tokens, heads, head, dtype=reference.FP8)
    check_same_shape(out[:, :, 0, :1], scale)
    limits = torch.empty_like(scale, memory_format=torch.contiguous_format)
    _launch(q, k, v, scale.contiguous(), reach, out, limits, rows)
    return out.flatten(2), limits


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    reach: Tensor | None,
    out: Tensor,
    limits: Tensor | None,
    rows: int,
) -> None:
    """Attention into out (B, N, heads, d)."""
    if len({t.dtype for t in (q, k, v)}) != 1:
        raise TypeError(f"got {[t.dtype for t in (q, k, v)]}; all operands must have one element type")
    check_same_shape(q, k)
    check_same_shape(q, v)
    if not q.stride() == k.stride() == v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, heads, tokens, head = q.shape
    block = max(triton.next_power_of_2(tokens), 16)
    wrap_triton(_kernel)[(triton.cdiv(tokens, rows), batch * heads)](
        q,
        k,
        v,
        scale,
        reach,
        out,
        limits,
        *q.stride(),
        heads * head * tokens,
        head,
        heads * head,
        1 / math.sqrt(head),
        heads,
        N=tokens,
        D=head,
        BLOCK_M=rows,
        BLOCK_N=block,
        CHUNK=32,
        num_warps=4 if rows * block <= 8192 else 8,
        num_stages=3,
        **early(),
    )
