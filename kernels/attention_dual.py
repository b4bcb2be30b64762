"""Tangents of attention: dO for K tangents that share q, k, v.

One program holds the scores of a block of queries against all keys in registers. With P the softmax,
dS = s (dQ K^T + Q dK^T) and H = P dS, the rule dO = P dV + H V - rowsum(H) O is P dV + (H - rowsum(H) P) V, because
O = P V; as whole rows are on chip, O itself is not needed. That is 5 matrix products per tangent, of which recomputing
the scores is one; it lets every tangent be a program of its own, which fills the GPU at batch 1. The primal is
torch's attention.
"""
# mypy: allow-untyped-defs

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import (
    check_same_shape,
    check_tangents,
    early,
    holds_scores,
    load_tile,
    runs_triton,
    take_turn,
)


class Tile(NamedTuple):
    """What a program takes: queries, columns of a head's width at a time, warps."""

    rows: int
    columns: int
    warps: int


TILES = (Tile(64, 16, 8), Tile(64, 32, 8), Tile(32, 32, 8))
"""The first is what runs. `make gpu-check` times the others beside it, so that its record says which should be the
first; the second does not fit the shared memory of sm_89. Wider ones, and 4 or 16 warps, spill registers."""


@triton.jit
def _kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    do_ptr,
    s_b,
    s_h,
    s_n,
    s_d,
    d_k,
    d_b,
    d_h,
    d_n,
    d_d,
    o_k,
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
    pair, tangent = tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = (pair // H).to(tl.int64), pair % H
    at, dat = b * s_b + h * s_h, tangent * d_k + b * d_b + h * d_h
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        q = load_tile(q_ptr + at, rows, cols, s_n, s_d, N, D)
        k = tl.trans(load_tile(k_ptr + at, keys, cols, s_n, s_d, N, D))
        s = tl.dot(q, k, s)
        dq = load_tile(dq_ptr + dat, rows, cols, d_n, d_d, N, D)
        ds = tl.dot(dq, k, ds)
        dk = tl.trans(load_tile(dk_ptr + dat, keys, cols, d_n, d_d, N, D))
        ds = tl.dot(q, dk, ds)
    s = tl.where(keys[None, :] < N, s * scale, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    h_rows = p * ds * scale
    h_rows -= p * tl.sum(h_rows, 1)[:, None]
    p = p.to(v_ptr.dtype.element_ty)
    h_rows = h_rows.to(v_ptr.dtype.element_ty)
    target = do_ptr + tangent * o_k + b * o_b + h * o_h
    for start in range(0, D, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        acc = tl.dot(p, load_tile(dv_ptr + dat, keys, cols, d_n, d_d, N, D))
        acc = tl.dot(h_rows, load_tile(v_ptr + at, keys, cols, s_n, s_d, N, D), acc)
        inside = (rows[:, None] < N) & (cols[None, :] < D)
        tl.store(target + rows[:, None] * o_n + cols[None, :], acc.to(do_ptr.dtype.element_ty), mask=inside)


def blocks(keys: int, tile: Tile = TILES[0]) -> dict[str, int]:
    """Block sizes and launch options: the tile's, with fewer queries where rows of scores are longer than 256."""
    block = max(triton.next_power_of_2(keys), 16)
    return {
        "BLOCK_M": min(tile.rows, 16384 // block),
        "BLOCK_N": block,
        "CHUNK": tile.columns,
        "num_warps": tile.warps if block > 64 else 4,
        "num_stages": 2,
    }


@triton_op("flowad::attention_dual", mutates_args=())
def attention_dual(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v and its tangents.

    Products accumulate in float32. The kernel takes what `holds_scores` says; all else is the reference anywhere.

    Bytes moved: for each tangent dq, dk, dv and q, k, v read and dO written, the keys once for each block of queries
    out of the L2 cache; the primal as torch's attention moves them. Operands that do not share strides, as the views
    of one qkv projection do, are copied first.

    Args:
        q: (B, heads, N, d), any floating dtype.
        k: as q.
        v: as q.
        dq: tangents (K, B, heads, N, d), same dtype.
        dk: as dq.
        dv: as dq.

    Returns:
        O (B, heads, N, d), and dO (K, B, heads, N, d) stored token-major: heads merge without a copy.

    Raises:
        TypeError: several element types.
        ValueError: shapes that do not fit.
    """
    if not (runs_triton(q) and holds_scores(q.dtype, q.shape[-2])):
        return reference.attention_dual(q, k, v, dq, dk, dv)
    if len({t.dtype for t in (q, k, v, dq, dk, dv)}) != 1:
        raise TypeError(f"got {[t.dtype for t in (q, k, v, dq, dk, dv)]}; all operands must have one element type")
    for x, dx in ((q, dq), (k, dk), (v, dv)):
        check_same_shape(q, x)
        check_same_shape(dq, dx)
    check_tangents(q, dq)
    return reference.attention(q, k, v), tangents(q, k, v, dq, dk, dv)


def tangents(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, tile: Tile = TILES[0]) -> Tensor:
    """dO of `attention_dual`, by the kernel with this tile: on a GPU, of half types that `holds_scores`."""
    batch, heads, tokens, head = q.shape
    count = dq.shape[0]
    q, k, v = _same_strides(q, k, v)
    dq, dk, dv = _same_strides(dq, dk, dv)
    do = q.new_empty(count, batch, tokens, heads, head).transpose(2, 3)
    options = blocks(tokens, tile)
    wrap_triton(_kernel)[(triton.cdiv(tokens, options["BLOCK_M"]), batch * heads, count)](
        q,
        k,
        v,
        dq,
        dk,
        dv,
        do,
        *q.stride(),
        *dq.stride(),
        *do.stride()[:4],
        1 / math.sqrt(head),
        heads,
        N=tokens,
        D=head,
        **options,
        **early(),
    )
    return do


def _same_strides(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.stride() == b.stride() == c.stride():
        return a, b, c
    return a.contiguous(), b.contiguous(), c.contiguous()
