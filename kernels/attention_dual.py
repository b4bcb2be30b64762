"""Attention with tangents: O and dO for K tangents that share q, k, v, by streaming over keys.

The first kernel is the primal with an online softmax and keeps the log of each row's normaliser. The second rebuilds
P from it, block by block, for each tangent: with dS = s (dQ K^T + Q dK^T) and H = P dS it accumulates
P dV + H V and rowsum(H), and ends with dO = P dV + H V - rowsum(H) O. That is 2 + 5 K matrix products: recomputing
P's scores costs one of them, and buys a register budget that does not depend on the number of keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import check_floats, check_same_shape, runs_triton

_LOG2E = math.log2(math.e)


@triton.jit
def _primal(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    log_ptr,
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
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // H, pair % H
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < N) & (cols[None, :] < D)
    head = b * s_b + h * s_h
    q = tl.load(q_ptr + head + rows[:, None] * s_n + cols[None, :] * s_d, mask=inside, other=0.0)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        at = head + keys[:, None] * s_n + cols[None, :] * s_d
        valid = (keys[:, None] < N) & (cols[None, :] < D)
        k = tl.load(k_ptr + at, mask=valid, other=0.0)
        v = tl.load(v_ptr + at, mask=valid, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.where(keys[None, :] < N, s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        shrink = tl.exp2(peak - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        peak = higher
    acc = acc / total[:, None]
    o_at = b * o_b + h * o_h + rows[:, None] * o_n + cols[None, :]
    tl.store(o_ptr + o_at, acc.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(log_ptr + pair * N + rows, peak + tl.log2(total), mask=rows < N)


@triton.jit
def _tangent(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    log_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    do_ptr,
    s_b,
    s_h,
    s_n,
    s_d,
    o_b,
    o_h,
    o_n,
    d_k,
    d_b,
    d_h,
    d_n,
    d_d,
    do_k,
    scale,
    dscale,
    H,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pair, tangent = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = pair // H, pair % H
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < N) & (cols[None, :] < D)
    head = b * s_b + h * s_h
    dhead = tangent * d_k + b * d_b + h * d_h
    q = tl.load(q_ptr + head + rows[:, None] * s_n + cols[None, :] * s_d, mask=inside, other=0.0)
    dq = tl.load(dq_ptr + dhead + rows[:, None] * d_n + cols[None, :] * d_d, mask=inside, other=0.0)
    log = tl.load(log_ptr + pair * N + rows, mask=rows < N, other=0.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        at = head + keys[:, None] * s_n + cols[None, :] * s_d
        dat = dhead + keys[:, None] * d_n + cols[None, :] * d_d
        valid = (keys[:, None] < N) & (cols[None, :] < D)
        k = tl.load(k_ptr + at, mask=valid, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.where(keys[None, :] < N, tl.exp2(s - log[:, None]), 0.0)
        ds = tl.dot(dq, tl.trans(k), input_precision=PRECISION)
        dk = tl.load(dk_ptr + dat, mask=valid, other=0.0)
        ds = tl.dot(q, tl.trans(dk), ds, input_precision=PRECISION)
        hp = p * ds * dscale
        total += tl.sum(hp, 1)
        dv = tl.load(dv_ptr + dat, mask=valid, other=0.0)
        acc = tl.dot(p.to(dv.dtype), dv, acc, input_precision=PRECISION)
        v = tl.load(v_ptr + at, mask=valid, other=0.0)
        acc = tl.dot(hp.to(v.dtype), v, acc, input_precision=PRECISION)
    o_at = b * o_b + h * o_h + rows[:, None] * o_n + cols[None, :]
    o = tl.load(o_ptr + o_at, mask=inside, other=0.0).to(tl.float32)
    acc -= total[:, None] * o
    tl.store(do_ptr + tangent * do_k + o_at, acc.to(do_ptr.dtype.element_ty), mask=inside)


def blocks(dtype: torch.dtype, head: int) -> dict[str, int]:
    """Block sizes and launch options for a head width: what keeps the second kernel's tiles in shared memory."""
    wide = triton.next_power_of_2(head) * dtype.itemsize > 256
    return {
        "BLOCK_M": 32 if wide else 64,
        "BLOCK_N": 16 if wide else 32,
        "BLOCK_D": max(triton.next_power_of_2(head), 16),
        "num_warps": 4,
        "num_stages": 1,
    }


@triton_op("flowad::attention_dual", mutates_args=())
def attention_dual(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v and its tangents.

    Products accumulate in float32. float32 operands follow `torch.set_float32_matmul_precision`, as torch's own
    products do: exact unless it allows TF32.

    Bytes moved: q, k, v and the result once for the primal, twice that and again q, k, v and O for each tangent, the
    keys once for each block of queries out of the L2 cache. Operands that do not share strides, as the views of one
    qkv projection do, are copied first.

    Args:
        q: (B, heads, N, d) float32, bfloat16 or float16.
        k: as q.
        v: as q.
        dq: tangents (K, B, heads, N, d), same dtype.
        dk: as dq.
        dv: as dq.

    Returns:
        O (B, heads, N, d) and dO (K, B, heads, N, d), stored token-major: heads merge without a copy.

    Raises:
        TypeError: another element type, or several.
        ValueError: shapes that do not fit.
    """
    if not runs_triton(q):
        return reference.attention_dual(q, k, v, dq, dk, dv)
    check_floats(q, k, v, dq, dk, dv)
    if len({t.dtype for t in (q, k, v, dq, dk, dv)}) != 1:
        raise TypeError(f"got {[t.dtype for t in (q, k, v, dq, dk, dv)]}; all operands must have one element type")
    for x, dx in ((q, dq), (k, dk), (v, dv)):
        check_same_shape(q, x)
        check_same_shape(dq, dx)
    check_same_shape(q, dq[0])
    q, k, v = _same_strides(q, k, v)
    dq, dk, dv = _same_strides(dq, dk, dv)
    batch, heads, tokens, head = q.shape
    tangents = dq.shape[0]
    o = q.new_empty(batch, tokens, heads, head).transpose(1, 2)
    do = q.new_empty(tangents, batch, tokens, heads, head).transpose(2, 3)
    log = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    options = blocks(q.dtype, head) | {"PRECISION": "ieee" if exact else "tf32"}
    grid = (triton.cdiv(tokens, options["BLOCK_M"]), batch * heads)
    scale = 1 / math.sqrt(head)
    wrap_triton(_primal)[grid](
        q,
        k,
        v,
        o,
        log,
        *q.stride(),
        *o.stride()[:3],
        scale * _LOG2E,
        heads,
        N=tokens,
        D=head,
        **options,
    )
    wrap_triton(_tangent)[(*grid, tangents)](
        q,
        k,
        v,
        o,
        log,
        dq,
        dk,
        dv,
        do,
        *q.stride(),
        *o.stride()[:3],
        *dq.stride(),
        do.stride(0),
        scale * _LOG2E,
        scale,
        heads,
        N=tokens,
        D=head,
        **options,
    )
    return o, do


def _same_strides(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.stride() == b.stride() == c.stride():
        return a, b, c
    return a.contiguous(), b.contiguous(), c.contiguous()
