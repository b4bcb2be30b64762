"""The gate of a squeeze-excite layer: mean, two small layers and a sigmoid, one program per image."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.activation import activate
from flowad_fast.kernels.launch import check_contiguous, check_floats, early, runs_triton, take_turn

_CHANNELS, _TILES = 64, 16
"""Channels and tiles that a program takes at a time."""


@triton.jit
def _kernel(
    sums_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    out_ptr,
    TILES,
    C,
    PIXELS,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):
    take_turn(EARLY)
    b = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK)
    hidden = tl.load(b1_ptr + r, mask=r < HIDDEN, other=0.0)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        mean = tl.zeros([CHANNELS], tl.float32)
        for first in range(0, TILES, AT_ONCE):
            t = first + tl.arange(0, AT_ONCE)
            at = sums_ptr + (b * TILES + t)[:, None] * C + c[None, :]
            mean += tl.sum(tl.load(at, mask=(t[:, None] < TILES) & (c[None, :] < C), other=0.0), 0)
        w = tl.load(w1_ptr + r[:, None] * C + c[None, :], mask=(r[:, None] < HIDDEN) & (c[None, :] < C), other=0.0)
        hidden += tl.sum(w.to(tl.float32) * (mean / PIXELS)[None, :], 1)
    hidden = activate(hidden, ACTIVATION)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        at = w2_ptr + c[:, None] * HIDDEN + r[None, :]
        w = tl.load(at, mask=(c[:, None] < C) & (r[None, :] < HIDDEN), other=0.0)
        gate = tl.sum(w.to(tl.float32) * hidden[None, :], 1) + tl.load(b2_ptr + c, mask=c < C, other=0.0)
        tl.store(out_ptr + b * C + c, tl.sigmoid(gate), mask=c < C)


@triton_op("flowad::squeeze_excite", mutates_args=())
def squeeze_excite(
    sums: Tensor, pixels: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str = "silu"
) -> Tensor:
    """sigmoid(W2 activate(W1 mean + b1) + b2) of the mean over an image, from the sums of its tiles, in float32.

    Bytes moved: sums and weights once per image, the gate written once.

    Args:
        sums: (B, tiles, C) float32, contiguous, see `depthwise`.
        pixels: of an image.
        w1: (R, C), one of the types that kernels take, contiguous.
        b1: (R,) float32.
        w2: (C, R), like w1.
        b2: (C,) float32.
        activation: see `reference.activate`.

    Returns:
        (B, C) float32.

    Raises:
        TypeError: another element type.
        ValueError: shapes that do not fit, or an operand that is not contiguous.
    """
    if not runs_triton(sums):
        return reference.squeeze_excite(sums, pixels, w1, b1, w2, b2, activation)
    check_contiguous(sums, w1, b1, w2, b2)
    check_floats(w1, w2)
    batch, tiles, channels = sums.shape
    hidden = w1.shape[0]
    if w1.shape != (hidden, channels) or w2.shape != (channels, hidden):
        raise ValueError(f"got weights {tuple(w1.shape)} and {tuple(w2.shape)} for {channels} channels")
    out = sums.new_empty(batch, channels)
    wrap_triton(_kernel)[(batch,)](
        sums,
        w1,
        b1,
        w2,
        b2,
        out,
        tiles,
        channels,
        pixels,
        HIDDEN=hidden,
        ACTIVATION=activation,
        BLOCK=triton.next_power_of_2(hidden),
        CHANNELS=_CHANNELS,
        AT_ONCE=_TILES,
        num_warps=8,
        **early(),
    )
    return out
