"""Stage 6: the three scorers, X1 to a per-location anomaly map (B, h, w); higher is more anomalous.

A scorer is a frozen, validated description. `prepare` binds it to a model and gives the module that eager engines run
and exporters trace: tokens (B, N, C) and y (B,) in, map (B, N) out. Random draws come from numpy's RandomState, whose
streams never change, so a seed names the same probes on every machine and version.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flowad_fast import schedule
from flowad_fast.config import Precision, VelocityConfig
from flowad_fast.errors import ConfigError
from flowad_fast.integration import Field as FlowField
from flowad_fast.integration import StepField, run, run_dual, run_to_error, to_tokens
from flowad_fast.kernels import reference
from flowad_fast.schedule import Row

_STRICT = ConfigDict(extra="forbid")
EXACT_LIMIT = 4096
"""Largest C * h * w for which the exact divergence (one probe an input element) is allowed."""
PROBE_BYTES = 3 * 2**30
"""Memory that the tangents' states may take; more probes are processed in turn, each time with the primal again."""
WIDE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""Memory of one widest activation of the tangents: on the CPU what its cache holds, on a GPU what fills the machine."""

Steps = Annotated[int, Field(gt=0, le=10_000)]


class MapModule(nn.Module):
    """A scorer bound to a model: tokens (B, N, C) and y (B,) or None to a map (B, N)."""

    def __init__(self, field: StepField) -> None:
        super().__init__()
        self.field = field

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        """See the class."""
        raise NotImplementedError


class _Scorer:
    def prepare(
        self,
        model: FlowField,
        precision: Precision = "fp32",
        ops: ModuleType = reference,
        probe_bytes: int = PROBE_BYTES,
    ) -> MapModule:
        """Bind the scorer to a model: precision of its matrix products, operators, memory of a chunk of probes."""
        raise NotImplementedError

    def map(self, model: FlowField, x1: Tensor, y: Tensor | None = None) -> Tensor:
        """The anomaly map (B, h, w) of features x1 (B, C, h, w) and class indices y (B,)."""
        y = model.check_classes(y, x1.shape[0])
        with torch.no_grad():
            return self.prepare(model)(to_tokens(x1), y).unflatten(1, tuple(x1.shape[2:]))


@dataclass(frozen=True, config=_STRICT)
class Inversion(_Scorer):
    """(b) inversion: ||X0||^power over channels, X0 integrated from X1 (paper eq. 2; the reference code uses power 1).

    On a diffusion model (InvAD) it is the same map of the latent that InvAD's grid gives.
    """

    steps: Steps = 3
    power: Literal[1, 2] = 2
    kind: Literal["inversion"] = Field(default="inversion", repr=False)

    def rows(self, config: VelocityConfig) -> tuple[Row, ...]:
        """The schedule."""
        return schedule.inversion(config, self.steps)

    def prepare(
        self,
        model: FlowField,
        precision: Precision = "fp32",
        ops: ModuleType = reference,
        probe_bytes: int = PROBE_BYTES,
    ) -> MapModule:
        """See `_Scorer`."""
        rows = self.rows(model.config)
        return _InversionMap(model.at(_times(rows), precision, ops), rows, self.power)


@dataclass(frozen=True, config=_STRICT)
class Reconstruction(_Scorer):
    """(c) reconstruction: ||X1 - X1^||² (paper eq. 3), X1^ integrated from X_tau up to t = 1.

    `start` "noise": X_tau = tau X1 + (1 - tau) eps, eps standard normal, drawn once from `seed` and shared by all
    frames. "inversion": X_tau is X1 integrated down to tau, as the reference code does. `steps` counts steps per unit
    time, as everywhere: at tau = 0.5, 6 steps are 3 evaluations up, and as many down for the inversion start.
    """

    steps: Steps = 3
    tau: float = Field(default=0.5, gt=0, lt=1)
    start: Literal["noise", "inversion"] = "noise"
    seed: int = Field(default=0, ge=0, lt=2**32)
    kind: Literal["reconstruction"] = Field(default="reconstruction", repr=False)

    def rows(self, config: VelocityConfig) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        """The schedules down to tau (empty for the noise start) and up to 1."""
        if config.pred_type == "epsilon":
            raise ConfigError("reconstruction needs a flow-matching model; this one predicts epsilon: use Inversion")
        up = schedule.flow(config, self.steps, self.tau, 1.0)
        return (() if self.start == "noise" else schedule.flow(config, self.steps, 1.0, self.tau)), up

    def draw(self, config: VelocityConfig) -> Tensor:
        """The noise eps of the noise start, (1, h*w, C) float32."""
        shape = (1, config.height * config.width, config.channels)
        return torch.from_numpy(np.random.RandomState(self.seed).standard_normal(shape).astype(np.float32))

    def prepare(
        self,
        model: FlowField,
        precision: Precision = "fp32",
        ops: ModuleType = reference,
        probe_bytes: int = PROBE_BYTES,
    ) -> MapModule:
        """See `_Scorer`."""
        down, up = self.rows(model.config)
        field = model.at(_times(down + up), precision, ops)
        config = model.config
        noise = None
        if self.start == "noise":
            noise = self.draw(config).to(_device(field))
        return _ReconstructionMap(field, down, up, self.tau, noise)


@dataclass(frozen=True, config=_STRICT)
class Density(_Scorer):
    """(a) density: -log p1(X1) at each location (paper eq. 1), by forward-mode Hutchinson.

    The Gaussian term is summed over channels; the trace is restricted to the location's own C x C block of the
    Jacobian, estimated by K Rademacher probes z that stay fixed along the trajectory: sum over channels of z (J z).
    `exact` uses every unit vector instead and is for small models.
    """

    steps: Steps = 3
    probes: int = Field(default=10, gt=0, le=100_000)
    seed: int = Field(default=0, ge=0, lt=2**32)
    exact: bool = False
    kind: Literal["density"] = Field(default="density", repr=False)

    def rows(self, config: VelocityConfig) -> tuple[Row, ...]:
        """The schedule."""
        if config.pred_type == "epsilon":
            raise ConfigError("density needs a flow-matching model; this one predicts epsilon: use Inversion")
        return schedule.flow(config, self.steps, 1.0, 0.0)

    def draw(self, config: VelocityConfig) -> Tensor:
        """The probes, (K, 1, h*w, C) float32: signs, or all unit vectors."""
        n, c = config.height * config.width, config.channels
        if self.exact:
            if n * c > EXACT_LIMIT:
                raise ConfigError(f"exact density needs {n * c} probes for this model; the limit is {EXACT_LIMIT}")
            return torch.eye(n * c).view(n * c, 1, n, c)
        signs = np.random.RandomState(self.seed).randint(0, 2, (self.probes, 1, n, c))
        return torch.from_numpy(signs.astype(np.float32) * 2 - 1)

    def prepare(
        self,
        model: FlowField,
        precision: Precision = "fp32",
        ops: ModuleType = reference,
        probe_bytes: int = PROBE_BYTES,
    ) -> "_DensityMap":
        """See `_Scorer`."""
        rows = self.rows(model.config)
        field = model.at(_times(rows), precision, ops)
        probes = self.draw(model.config).to(_device(field))
        return _DensityMap(field, rows, probes, model.config, self.exact, probe_bytes)

    def map_with_error(self, model: FlowField, x1: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map and its standard error over probes, both (B, h, w); needs at least two random probes.

        Raises:
            ConfigError: one probe (no spread to measure).
        """
        if not self.exact and self.probes < 2:
            raise ConfigError("a standard error needs at least 2 probes")
        y = model.check_classes(y, x1.shape[0])
        with torch.no_grad():
            maps = self.prepare(model).with_error(to_tokens(x1), y)
        return tuple(m.unflatten(1, tuple(x1.shape[2:])) for m in maps)  # type: ignore[return-value]


Scorer = Density | Inversion | Reconstruction
SCORERS: dict[str, Callable[..., Scorer]] = {
    "density": Density,
    "inversion": Inversion,
    "reconstruction": Reconstruction,
}
scorer_adapter: TypeAdapter[Scorer] = TypeAdapter(Annotated[Scorer, Field(discriminator="kind")])
"""Scorers to JSON and back."""


class _InversionMap(MapModule):
    def __init__(self, field: StepField, rows: tuple[Row, ...], power: int) -> None:
        super().__init__(field)
        self.rows, self.power = rows, power

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        square = run_to_error(self.field, self.rows, tokens, y)
        return square if self.power == 2 else square.sqrt()


class _ReconstructionMap(MapModule):
    noise: Tensor | None

    def __init__(
        self, field: StepField, down: tuple[Row, ...], up: tuple[Row, ...], tau: float, noise: Tensor | None
    ) -> None:
        super().__init__(field)
        self.down, self.up, self.tau = down, up, tau
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        if self.noise is None:
            x = run(self.field, self.down, tokens, y)
        else:
            x = self.tau * tokens + (1 - self.tau) * self.noise
        return run_to_error(self.field, self.up, x, y, ref=tokens, first=len(self.down))


class _DensityMap(MapModule):
    probes: Tensor

    def __init__(
        self,
        field: StepField,
        rows: tuple[Row, ...],
        probes: Tensor,
        config: VelocityConfig,
        exact: bool,
        probe_bytes: int,
    ) -> None:
        super().__init__(field)
        self.rows, self.exact, self.probe_bytes = rows, exact, probe_bytes
        self.register_buffer("probes", probes, persistent=False)
        # Three states of a tangent exist at a time: its residual, what is gated into that, and what is normalised.
        self.state_bytes = 3 * 4 * config.tokens * config.hidden_size
        self.wide_bytes = 4 * config.tokens * max(config.mlp_hidden, config.num_heads * config.tokens)

    def plan(self, batch: int, device: torch.device) -> tuple[int, int | None]:
        """Probes that are integrated together, and of those the ones whose wide activations exist at a time."""
        if torch.compiler.is_exporting():
            # An exported graph has one chunk: its batch is symbolic, and engines plan their own memory.
            return len(self.probes), None
        together = max(1, self.probe_bytes // (self.state_bytes * batch))
        return together, max(1, WIDE_BYTES[device.type] // (self.wide_bytes * batch))

    def shares(self, tokens: Tensor, y: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """X0 (B, N, C) and the probes' shares (k, B, N), for as many probes at a time as the budget allows."""
        together, chunk = self.plan(tokens.shape[0], tokens.device)
        for probes in self.probes.split(together):
            yield run_dual(self.field, self.rows, tokens, probes, y, chunk)

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        total: Tensor | None = None
        x0 = tokens
        for x0, share in self.shares(tokens, y):  # noqa: B007 - X0 is the same for all probes
            total = share.sum(0) if total is None else total + share.sum(0)
        assert total is not None, "there is at least one probe"
        return -(_log_normal(x0) + (total if self.exact else total / len(self.probes)))

    def with_error(self, tokens: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map and its standard error, (B, N) each; an exact map has error 0."""
        parts = list(self.shares(tokens, y))
        x0, each = parts[0][0], torch.cat([share for _, share in parts])
        if self.exact:
            return -(_log_normal(x0) + each.sum(0)), torch.zeros_like(each[0])
        return -(_log_normal(x0) + each.mean(0)), each.std(0) / len(each) ** 0.5


def _log_normal(x: Tensor) -> Tensor:
    """Standard normal log-density N(x; 0, I) summed over channels: (B, N, C) to (B, N)."""
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * np.log(2 * np.pi))


def _times(rows: tuple[Row, ...]) -> tuple[float, ...]:
    return tuple(row.t for row in rows)


def _device(field: StepField) -> torch.device | None:
    return field.table.device if isinstance(field, nn.Module) else None  # type: ignore[return-value]
