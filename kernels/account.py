"""What a scorer costs: bytes and operations of each operator, and the time that a GPU's roofs allow. No torch.

The account is of the algorithm as the fused path runs it: every operand read and every result written once per call,
weights once for the primal and once for the tangents. It leaves out the backbone, launches, and what caches save; a
prediction is therefore a limit to hold a measurement against, not a measurement.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple


class Widths(NamedTuple):
    """What a precision moves: bytes per activation, per operand of its matrix products, and per value of the residual.

    A precision that quantises says how the names of its operators end, and in what it computes all other layers.
    """

    value: int
    operand: int
    suffix: str = ""
    rest: str = ""
    residual: int = 4


WIDTHS = {
    "fp32": Widths(4, 4),
    "tf32": Widths(4, 4),
    "bf16": Widths(2, 2),
    "fp16": Widths(2, 2),
    "fp8": Widths(2, 1, "_fp8", "bf16", residual=2),
}
"""By precision."""
_STATE = 4
"""Bytes of a value of the integrator's state."""
_ROW_FLOPS = 10
"""Operations per element of a row operator, roughly: far below what its bytes cost."""


@dataclass(frozen=True)
class VelocityShape:
    """Sizes of a velocity field and its frames; the default is the paper's.

    `hidden` D, `mlp` the MLP's width, `tokens` N, `channels` C of a token (p² times the features' for patch size p),
    `image` the side of the upsampled map in pixels.
    """

    hidden: int = 2048
    depth: int = 16
    heads: int = 8
    tokens: int = 256
    channels: int = 272
    mlp: int = 8192
    image: int = 256

    @property
    def weights(self) -> int:
        """Parameters that every evaluation reads, biases included; the modulation table has replaced adaLN."""
        d, blocks = self.hidden, self.depth
        block = 4 * d * d + 2 * d * self.mlp + 5 * d + self.mlp
        return blocks * block + self.channels * d + self.tokens * d + d * self.channels + self.channels


@dataclass(frozen=True)
class OpCost:
    """One operator's share of a whole batch: all its calls together.

    `flops` counts a multiply-add as two and runs at the roof named by `precision`; `bytes` is traffic to and from
    memory.
    """

    operator: str
    calls: int
    flops: float
    bytes: float
    precision: str

    def seconds(self, roofs: "Roofs") -> float:
        """The time that the tighter of the two roofs allows."""
        return max(self.flops / roofs.flops[self.precision], self.bytes / roofs.bytes)


@dataclass(frozen=True)
class Roofs:
    """What a GPU can do: bytes/s, FLOP/s by precision, and where the figures are from."""

    name: str
    source: str
    bytes: float
    flops: Mapping[str, float] = field(hash=False)


H100 = Roofs(
    name="H100 SXM",
    source="bf16 and fp8 as measured by others on random data (989 and 1979 on paper); fp32, tf32, memory nominal",
    bytes=3.35e12,
    flops=MappingProxyType({"fp32": 67e12, "tf32": 495e12, "bf16": 790e12, "fp16": 790e12, "fp8": 1500e12}),
)


def account(
    shape: VelocityShape, batch: int, nfe: int, probes: int, precision: str, epilogues: bool = False
) -> list[OpCost]:
    """The operators of one scorer on one batch, from features to map and score.

    Args:
        shape: the velocity field.
        batch: frames.
        nfe: function evaluations, which is the number of steps.
        probes: K tangents for density; 0 for inversion and reconstruction.
        precision: of the network; fp8 quantises the blocks' linear layers and keeps the rest in bfloat16.
        epilogues: whether attention and the MLP's first layer quantise their own results, where nothing has tangents
            and the precision quantises; else a pass over memory follows each.

    Returns:
        Operators in the order of their first call.

    Raises:
        ValueError: an unknown precision, or a count that is not positive (probes: negative).
    """
    if precision not in WIDTHS:
        raise ValueError(f"got precision {precision!r}, expected one of {', '.join(WIDTHS)}")
    if min(batch, nfe) < 1 or probes < 0:
        raise ValueError(f"got batch {batch}, nfe {nfe}, probes {probes}; batch and nfe start at 1, probes at 0")
    d, n, c, streams = shape.hidden, shape.tokens, shape.channels, 1 + probes
    rows = batch * n
    value, operand, ending, rest, residual = WIDTHS[precision]
    quantised, plain = bool(rest), rest or precision
    dual = "_dual" if probes else ""
    suffix = dual + ending
    passes = quantised and not (epilogues and not probes)  # of their own, to quantise
    narrowed = quantised and not passes

    def linear(name: str, width: int, out: int, calls: int, kind: str, narrow: bool = False) -> OpCost:
        each = WIDTHS[kind].operand
        written = out * each + 4 if narrow else out * value
        moved = streams * rows * (width * each + written) + min(streams, 2) * width * out * each
        return OpCost(name, calls, calls * streams * 2 * rows * width * out, calls * moved, kind)

    def rowwise(name: str, read: int, written: int, calls: int, narrow: int = 0, stream: int = 0) -> OpCost:
        """A row operator that reads `read` and writes `written` values per row.

        `narrow` of those written are quantised, `stream` of all are the residual's.
        """
        each = value * (read + written - narrow - stream) + residual * stream + (narrow * operand + 4 if narrow else 0)
        elements = calls * streams * rows * written
        return OpCost(name, calls, _ROW_FLOPS * elements, calls * streams * rows * each, "fp32")

    evaluations = nfe * shape.depth
    heads = batch * n * n * d
    costs = [
        OpCost("pyramid_gather", 1, 4 * rows * c, rows * c * (4 * value + _STATE), "fp32"),
        linear("linear embed", c, d, nfe, plain),
        rowwise("ln_modulate" + suffix, d, d, nfe, d * quantised, d),
        linear("linear qkv", d, 3 * d, evaluations, precision),
        OpCost(
            "attention_short_fp8" if narrowed else "attention",
            evaluations,
            evaluations * 4 * heads,
            evaluations * rows * (3 * d * value + (d * operand + 4 if narrowed else d * value)),
            plain,
        ),
    ]
    if probes:
        # Each tangent: five products; reads q, k, v and their tangents, writes dO.
        costs.append(
            OpCost(
                "attention_dual",
                evaluations,
                evaluations * probes * 10 * heads,
                evaluations * probes * rows * 7 * d * value,
                plain,
            )
        )
    if passes:
        costs.append(rowwise("quantise_rows", d, d, evaluations, d))
    # The last one feeds the final linear layer, which is not quantised.
    costs += [
        linear("linear proj", d, d, evaluations, precision),
        rowwise("gate_residual_ln_modulate" + suffix, 2 * d, 2 * d, 2 * evaluations - nfe, d * quantised, 2 * d),
        linear("linear fc1", d, shape.mlp, evaluations, precision, narrowed),
    ]
    if not narrowed:
        costs.append(rowwise("gelu_tanh" + suffix, shape.mlp, shape.mlp, evaluations, shape.mlp * quantised))
    costs += [
        linear("linear fc2", shape.mlp, d, evaluations, precision),
        rowwise("gate_residual_ln_modulate" + dual + " final", 2 * d, 2 * d, nfe, 0, 2 * d),
        linear("linear final", d, c, nfe, plain),
    ]
    if probes:
        costs += [
            OpCost("divergence", nfe, nfe * probes * rows * 2 * c, nfe * probes * (rows * value + n * 4) * c, "fp32"),
            OpCost("affine_step", nfe, nfe * 3 * rows * c, nfe * rows * c * (2 * _STATE + value), "fp32"),
        ]
    else:
        steps = nfe - 1
        costs += [
            OpCost("affine_step", steps, steps * 3 * rows * c, steps * rows * c * (2 * _STATE + value), "fp32"),
            OpCost("affine_error_map", 1, 5 * rows * c, rows * (c * (_STATE + value) + 4), "fp32"),
        ]
    pixels = batch * shape.image**2
    costs.append(OpCost("upsample_score", 1, 12 * pixels, 4 * (rows + pixels), "fp32"))
    return costs


def predicted_seconds(costs: list[OpCost], roofs: Roofs) -> float:
    """The time that the roofs allow for a batch, operators one after the other."""
    return sum(cost.seconds(roofs) for cost in costs)
