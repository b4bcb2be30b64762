"""How a velocity field is computed, apart from what: precision, operators, memory."""

from dataclasses import dataclass

import torch

from flowad_fast.config import Precision
from flowad_fast.kernels import reference
from flowad_fast.kernels.operators import Operators


@dataclass(frozen=True)
class Numbers:
    """What a precision is made of.

    Attributes:
        dtype: of activations between the matrix products, and of layers that a quantising precision leaves alone.
        capability: the compute capability that a GPU needs.
        features: of the backbone on a GPU. float16 moves half as much and adds about 0.6 % of a map's spread (rms, the
            demo's checkpoint); more than fp16's parity allows, a third of what bf16 itself may add.
        residual: of the residual stream. In fp8 bfloat16 adds nothing to the drift (0.036 rms of a map's spread either
            way, 16 blocks of random weights) and saves a third of the traffic between products; in bf16 it would add
            half (0.007 to 0.011).
    """

    dtype: torch.dtype
    capability: tuple[int, int]
    features: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32


NUMBERS: dict[str, Numbers] = {
    "fp32": Numbers(torch.float32, (0, 0)),
    "tf32": Numbers(torch.float32, (8, 0)),
    "bf16": Numbers(torch.bfloat16, (8, 0), torch.float16),
    "fp16": Numbers(torch.float16, (7, 0)),
    "fp8": Numbers(torch.bfloat16, (8, 9), torch.float16, torch.bfloat16),
}
"""By precision, see `config.Precision`."""


@dataclass(frozen=True)
class Arithmetic:
    """How a scorer's evaluations run; the result is the same up to the rounding of the precision.

    Attributes:
        precision: of the velocity field's matrix products.
        ops: namespace of operators: `kernels.reference` (plain torch), or `kernels.fused` with the same names.
        probe_bytes: memory that the states of the density's tangents may take, None for what the device can spare; more
            probes are processed in turn, each time with the primal again.
    """

    precision: Precision = "fp32"
    ops: Operators = reference
    probe_bytes: int | None = None


FP32 = Arithmetic()
"""float32 products and plain torch operators."""
