"""Row-wise quantisation to fp8, for operands whose producer is not one of this package's kernels."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from flowad_fast.kernels import reference
from flowad_fast.kernels.launch import check_rows, early, empty_fp8, load_row, runs_triton, store_row, take_turn, warps


@triton.jit
def _kernel(x_ptr, q_ptr, scale_ptr, x_m, D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    take_turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < D
    store_row(q_ptr, scale_ptr, row, load_row(x_ptr + row * x_m, cols, mask), cols, mask, D)


@triton_op("flowad::quantise_rows", mutates_args=())
def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) as float8_e4m3fn (..., D) and float32 scales (..., 1): x = q * scale.

    Bytes moved: x read once, D + 4 bytes per row written. Leading dimensions that do not merge are copied first.

    Args:
        x: (..., D) float32, bfloat16 or float16.

    Returns:
        q and its scales, largest magnitude of the row / 448.

    Raises:
        TypeError: another element type.
        ValueError: channels not contiguous.
    """
    if not runs_triton(x):
        return reference.quantise_rows(x)
    q, scale = empty_fp8(x)
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    check_rows(rows)
    block = triton.next_power_of_2(width)
    wrap_triton(_kernel)[(rows.shape[0],)](
        rows, q, scale, rows.stride(0), D=width, BLOCK=block, num_warps=warps(block), **early()
    )
    return q, scale
