"""Stage 5: applying a schedule to a velocity field; the primal alone, and the primal with tangents for density."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from flowad_fast.config import VelocityConfig
from flowad_fast.kernels.operators import Operators
from flowad_fast.stages import schedule
from flowad_fast.stages.arithmetic import FP32, Arithmetic
from flowad_fast.stages.schedule import Row


class StepField(Protocol):
    """A velocity field at fixed times: what a loop needs. Implemented by `TabledDiT`.

    `ops` is the namespace of operators that the field is built on, and so the loop around it.
    """

    config: VelocityConfig
    ops: Operators

    @property
    def quantises_attention(self) -> bool:
        """Whether attention's result may come quantised, in some block."""

    def __call__(self, tokens: Tensor, step: int, y: Tensor | None = None, /) -> Tensor:
        """Network output (B, N, C) at step `step`."""

    def dual(
        self, tokens: Tensor, tangents: Tensor, step: int, y: Tensor | None = None, chunk: int | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """Network output and Jacobian-vector products (K, B, N, C), `chunk` tangents at a time where that is given."""


class Field(Protocol):
    """A model that can be integrated: implemented by `VelocityModel` and `FlowModel`."""

    config: VelocityConfig

    def at(self, times: tuple[float, ...], how: Arithmetic = FP32) -> StepField:
        """The field at fixed times, computed as `how` says."""

    def check_classes(self, y: Tensor | None, batch: int) -> Tensor | None:
        """`y` as class indices (B,) that fit the model, or a ConfigError."""


def run(field: StepField, rows: Sequence[Row], x: Tensor, y: Tensor | None, first: int = 0) -> Tensor:
    """Apply all rows to the state x (B, N, C); row k is the field's step `first` + k."""
    for k, row in enumerate(rows, first):
        x = field.ops.affine_step(x, field(x, k, y), row.a, row.b)
    return x


def run_to_error(
    field: StepField, rows: Sequence[Row], x: Tensor, y: Tensor | None, ref: Tensor | None = None, first: int = 0
) -> Tensor:
    """As `run`, the last step fused with the squared-error map against `ref` (0 when None): (B, N)."""
    x = run(field, rows[:-1], x, y, first)
    last = first + len(rows) - 1
    return field.ops.affine_error_map(x, field(x, last, y), rows[-1].a, rows[-1].b, ref)


def run_dual(
    field: StepField, rows: Sequence[Row], x: Tensor, probes: Tensor, y: Tensor | None, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The end state and each probe's change of log-density along the way.

    The probes stay fixed; only the state moves. With dt * velocity = (a - 1) x + b f, a step adds
    dt * z.(J z) = (a - 1) z.z + b z.(df/dx z) to log p(X1) - log p(X0), summed over channels at each location.

    Args:
        field: the velocity field at the rows' times.
        rows: the schedule from t = 1 to 0, dt < 0.
        x: X1 (B, N, C).
        probes: tangents (K, 1, N, C).
        y: class indices (B,) or None.
        chunk: tangents whose wide activations exist at a time; None for all.

    Returns:
        X0 (B, N, C) and the accumulated dt-weighted divergences (K, B, N).
    """
    total: Tensor | None = None
    for k, row in enumerate(rows):
        out, dout = field.dual(x, probes, k, y, chunk)
        share = row.b * (probes * dout).sum(-1)
        if row.a != 1:
            share = share + (row.a - 1) * probes.square().sum(-1)
        total = share if total is None else total + share
        x = field.ops.affine_step(x, out, row.a, row.b)
    assert total is not None, "a schedule has at least one row"
    return x, total


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h*w, C)."""
    return x.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h*w, C) to (B, C, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def integrate(
    model: Field, x: Tensor, y: Tensor | None = None, steps: int = 3, start: float = 1.0, stop: float = 0.0
) -> Tensor:
    """Integrate the flow of `model` from t = start to t = stop by fixed-grid Euler.

    Args:
        model: a flow-matching model.
        x: state at `start`, (B, C, h, w).
        y: class indices (B,), or None for an unconditional model.
        steps: steps per unit time; start = 1, stop = 0 is the inversion of the paper's equation 2.
        start: first time.
        stop: last time.

    Returns:
        State at `stop`, (B, C, h, w).

    Raises:
        ConfigError: not even one step, or the model is a diffusion model.

    Example:
        >>> import torch
        >>> from flowad_fast import integrate, load_checkpoint
        >>> model = load_checkpoint("demo")
        >>> x1 = torch.zeros(1, 192, 16, 16)
        >>> x0 = integrate(model, x1, steps=3)
        >>> x0.shape
        torch.Size([1, 192, 16, 16])
    """
    rows = schedule.flow(model.config, steps, start, stop)
    tokens = run(model.at(tuple(row.t for row in rows)), rows, to_tokens(x), y)
    return from_tokens(tokens, *x.shape[2:])
