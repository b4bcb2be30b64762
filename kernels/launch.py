"""What launchers and kernels share: where Triton runs, launch sizes, argument checks, loading and storing of rows.

A registered operator runs its Triton kernel on GPU tensors and its reference everywhere else; nothing is tried and
given up. Row operators take any batch and token strides, channels contiguous. Device functions carry no hints except
constants: Triton infers the rest, and the type checker is told so at the top of each file.
"""
# mypy: allow-untyped-defs

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowad_fast.kernels import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that kernels read and write; float8_e4m3fn is only written."""

MANY_ROWS = 4096
"""From so many on a GPU is full with a quarter of the programs."""

_FP8_MAX = tl.constexpr(reference.FP8_MAX)
_FP8_TINY = tl.constexpr(reference.FP8_TINY)
_LN_EPS = tl.constexpr(reference.LN_EPS)
GELU_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
GELU_CUBIC = tl.constexpr(0.044715)


def runs_triton(x: Tensor) -> bool:
    """Whether an operator on x runs its Triton kernel: x is on a GPU."""
    return x.is_cuda


MAX_KEYS = 512
"""Rows of attention's scores longer than this do not stay in registers."""


def holds_scores(dtype: torch.dtype, keys: int) -> bool:
    """Whether a program can hold rows of attention's scores: half types, up to `MAX_KEYS` keys.

    All others take the reference on a GPU too. Exact float32 products have no tensor cores, so the GPU's matrix
    library has nothing to gain from a kernel of our own; longer rows would spill.
    """
    return dtype in (torch.bfloat16, torch.float16) and keys <= MAX_KEYS


_early = False
"""See `early_launches`. A plain variable, which compilers can read."""


@contextmanager
def early_launches() -> Iterator[None]:
    """Kernels are started while the one before still runs, inside the context; needs compute capability 9.0.

    This is programmatic dependent launch: a kernel's programs take their places beside the last ones of the kernel
    before, and wait there (`take_turn`) until all that was started before them has ended and is in memory. What was
    started by others, libraries above all, waits as always. The switch belongs to the process.
    """
    global _early
    before, _early = _early, True
    try:
        yield
    finally:
        _early = before


def early() -> dict[str, bool]:
    """Launch options of every kernel of this package, see `early_launches`."""
    return {"EARLY": True, "launch_pdl": True} if _early else {"EARLY": False}


def warps(block: int) -> int:
    """Warps of a program that holds `block` values in registers: 16 values per thread, 1 to 16 warps."""
    return min(max(block // 512, 1), 16)


def rows_together(batch: int, tokens: int) -> int:
    """Rows of one image that a program takes in turn, so that their modulations are read once.

    They are as large as the rows; but few rows are better spread over all multiprocessors.
    """
    return 4 if tokens % 4 == 0 and batch * tokens >= MANY_ROWS else 1


def check_floats(*tensors: Tensor | None) -> None:
    """Check element types.

    Raises:
        TypeError: a tensor of another type than float32, bfloat16 or float16.
    """
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"got {tensor.dtype}, but kernels take float32, bfloat16 and float16: convert it first")


def check_rows(*tensors: Tensor) -> None:
    """Check operands of row operators, see `check_floats`.

    Raises:
        ValueError: channels that are not contiguous.
    """
    check_floats(*tensors)
    for tensor in tensors:
        if tensor.stride(-1) != 1:
            raise ValueError(f"channels must be contiguous, got strides {tensor.stride()}: call .contiguous() first")


def check_contiguous(*tensors: Tensor | None) -> None:
    """Check operands that kernels index as whole arrays.

    Raises:
        ValueError: one is not contiguous.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"expected a contiguous tensor, got strides {tensor.stride()}: call .contiguous() first")


def check_same_shape(x: Tensor, other: Tensor) -> None:
    """Check that `other` has the shape of x.

    Raises:
        ValueError: it has not.
    """
    if other.shape != x.shape:
        raise ValueError(f"got shapes {tuple(x.shape)} and {tuple(other.shape)}, which must be equal")


def check_tangents(x: Tensor, dx: Tensor) -> None:
    """Check that dx is (K, *x.shape).

    Raises:
        ValueError: it is not.
    """
    if dx.shape[1:] != x.shape:
        raise ValueError(
            f"got tangents {tuple(dx.shape)} of {tuple(x.shape)}, expected (K, {', '.join(map(str, x.shape))})"
        )


def empty_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for x (..., D) quantised by rows: float8_e4m3fn (..., D) and float32 (..., 1)."""
    return x.new_empty(x.shape, dtype=reference.FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def modulation(row: Tensor, x: Tensor) -> Tensor:
    """A modulation (B or 1, 1, D) seen as (B, 1, D), stride 0 where it is shared: no copy."""
    return row.expand(x.shape[0], 1, x.shape[-1])


@triton.jit
def take_turn(EARLY: tl.constexpr):
    """The first statement of every kernel: wait for those before, where they may still run, and let the next one in."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_row(ptr, cols, mask):
    """Values of a row whose channels are contiguous, as float32, 0 outside."""
    return tl.load(ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_tile(ptr, rows, cols, stride_n, stride_d, N: tl.constexpr, D: tl.constexpr):
    """A tile of a head (N, D), 0 outside."""
    at = ptr + rows[:, None] * stride_n + cols[None, :] * stride_d
    return tl.load(at, mask=(rows[:, None] < N) & (cols[None, :] < D), other=0.0)


@triton.jit
def store_row(ptr, scale_ptr, row, y, cols, mask, D: tl.constexpr):
    """Store row number `row` of a contiguous (rows, D) result; as e4m3 with its scale where `scale_ptr` is given."""
    if scale_ptr is not None:
        # Maxima drop NaN; as infinity it reaches the scale, so that the row cannot come back finite.
        magnitude = tl.where(y == y, tl.abs(y), float("inf"))
        scale = tl.maximum(tl.max(tl.where(mask, magnitude, 0.0), 0), _FP8_TINY) / _FP8_MAX
        tl.store(scale_ptr + row, scale)
        y = y * (1.0 / scale)
    tl.store(ptr + row * D + cols, y.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_share(x):
    """By what the tanh form of GELU multiplies x: 0.5 (1 + tanh z) is sigmoid(2 z), which does not cancel below 0."""
    return tl.sigmoid(GELU_SLOPE * x * (1.0 + GELU_CUBIC * x * x))


@triton.jit
def bounded(scale, reach_ptr):
    """See `reference.bounded`."""
    return tl.maximum(scale * tl.load(reach_ptr) + tl.load(reach_ptr + 1), _FP8_TINY)


@triton.jit
def normalise_row(x, mask, D: tl.constexpr):
    """LayerNorm of a row held in registers and its reciprocal standard deviation; two passes, so nothing cancels."""
    centred = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, 0) / D + _LN_EPS)
    return centred * r, r


@triton.jit
def normalise_tangent(dx, y, r, D: tl.constexpr):
    """The tangent of `normalise_row` at dx, from its two results."""
    return r * (dx - tl.sum(dx, 0) / D - y * (tl.sum(y * dx, 0) / D))
