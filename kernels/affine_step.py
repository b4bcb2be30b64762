"""The integrator step x' = a x + b v, or the squared-error map of its result.

Any strides are taken, because features enter as a transposed view. Tiny in bytes; what it saves is launches.
"""
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import check_floats, check_same_shape, early, runs_triton, take_turn, warps


@triton.jit
def _kernel(
    x_ptr,
    v_ptr,
    ref_ptr,
    out_ptr,
    map_ptr,
    a,
    b,
    x_b,
    x_n,
    x_c,
    v_b,
    v_n,
    v_c,
    ref_b,
    ref_n,
    ref_c,
    N,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    batch, n = row // N, row % N
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    x = tl.load(x_ptr + batch * x_b + n * x_n + cols * x_c, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + batch * v_b + n * v_n + cols * v_c, mask=mask, other=0.0).to(tl.float32)
    # The map is of x' as it is stored, whether or not it is.
    step = (a * x + b * v).to(x_ptr.dtype.element_ty)
    if out_ptr is not None:
        tl.store(out_ptr + row * C + cols, step, mask=mask)
    if map_ptr is not None:
        error = step.to(tl.float32)
        if ref_ptr is not None:
            error -= tl.load(ref_ptr + batch * ref_b + n * ref_n + cols * ref_c, mask=mask, other=0.0).to(tl.float32)
        tl.store(map_ptr + row, tl.sum(error * error, 0))


def _launch(
    x: Tensor, v: Tensor, a: float, b: float, ref: Tensor | None, out: Tensor | None, error: Tensor | None
) -> None:
    check_floats(x, v, ref)
    check_same_shape(x, v)
    if ref is not None:
        check_same_shape(x, ref)
    batch, tokens, channels = x.shape
    block = triton.next_power_of_2(channels)
    wrap_triton(_kernel)[(batch * tokens,)](
        x,
        v,
        ref,
        out,
        error,
        a,
        b,
        *x.stride(),
        *v.stride(),
        *((0, 0, 0) if ref is None else ref.stride()),
        tokens,
        C=channels,
        BLOCK=block,
        num_warps=warps(block),
        **early(),
    )


@triton_op("flowad::affine_step", mutates_args=())
def affine_step(x: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """x' = a x + b v.

    Bytes moved: x and v read, x' written, once each.

    Args:
        x: state (B, N, C), float32 in every precision of this package; bfloat16 and float16 are taken too.
        v: network output (B, N, C), its own dtype.
        a: factor of the state.
        b: factor of the network output.

    Returns:
        x' (B, N, C), contiguous, in the dtype of x.

    Raises:
        TypeError: another element type.
        ValueError: x and v of different shapes.
    """
    if not runs_triton(x):
        return reference.affine_step(x, v, a, b)
    out = x.new_empty(x.shape)
    _launch(x, v, a, b, None, out, None)
    return out


@triton_op("flowad::affine_error_map", mutates_args=())
def affine_error_map(x: Tensor, v: Tensor, a: float, b: float, ref: Tensor | None = None) -> Tensor:
    """The map sum_c (x' - ref)² of `affine_step`, for the last step of a loop; ref (B, N, C) or None for 0.

    Bytes moved: x, v and ref read, 4 bytes per row written; x' is not. Errors as `affine_step`.

    Returns:
        (B, N) float32.
    """
    if not runs_triton(x):
        return reference.affine_error_map(x, v, a, b, ref)
    error = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _launch(x, v, a, b, ref, None, error)
    return error
