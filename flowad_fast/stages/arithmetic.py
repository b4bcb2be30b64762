"""How a velocity field is computed, apart from what: precision, operators, memory."""

from dataclasses import dataclass

from flowad_fast.config import Precision
from flowad_fast.kernels import reference
from flowad_fast.kernels.operators import Operators


@dataclass(frozen=True)
class Arithmetic:
    """How a scorer's evaluations run; the result is the same up to the rounding of the precision.

    Attributes:
        precision: of the velocity field's matrix products.
        ops: namespace of operators: `kernels.reference` (plain torch), or `kernels.fused` with the same names.
        probe_bytes: memory that the states of the density's tangents may take; more probes are processed in turn, each
            time with the primal again.
    """

    precision: Precision = "fp32"
    ops: Operators = reference
    probe_bytes: int = 3 * 2**30


FP32 = Arithmetic()
"""float32 products and plain torch operators."""
