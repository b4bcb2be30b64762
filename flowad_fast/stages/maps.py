"""The scorers' computation: tokens (B, N, C) and class indices y (B,) or None to a map (B, N).

One class per scorer. `bind` makes it of the scorer's description and a model: it is what engines run and exporters
trace. `reference` is the same map at the cost of the paper's code, see `reference_path`.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from flowad_fast.config import VelocityConfig
from flowad_fast.model import VelocityModel
from flowad_fast.stages.arithmetic import Arithmetic
from flowad_fast.stages.integration import Field, StepField, run, run_dual, run_to_error
from flowad_fast.stages.schedule import Row
from flowad_fast.stages.scorers import Density, Inversion, Mismatch, Reconstruction, Scorer
from flowad_fast.stages.velocity import TabledDiT

WIDE_BYTES = 16 * 2**20
"""Memory of one widest activation of the tangents on a CPU: what its cache holds."""
STATE_SHARE, WIDE_SHARE = 8, 16
"""Parts of a GPU's free memory that the states of the tangents, and one widest activation of them, may be: what an
80 GB GPU needs for the primal once per step at batch 32 and K = 10 of the paper's model."""
PROBE_BYTES = 3 * 2**30
"""Of the states on a CPU."""


_Scorer = TypeVar("_Scorer", bound=Scorer)


class MapModule(nn.Module, Generic[_Scorer]):
    """A scorer bound to a model: tokens (B, N, C) and y (B,) or None to a map (B, N)."""

    def __init__(self, field: StepField) -> None:
        super().__init__()
        self.field = field

    @classmethod
    @abstractmethod
    def bind(cls, scorer: _Scorer, model: Field, how: Arithmetic) -> "MapModule[_Scorer]":
        """The module of a scorer's description, for a model, computed as `how` says."""

    @staticmethod
    @abstractmethod
    def reference(scorer: _Scorer, model: VelocityModel, x: Tensor, y: Tensor | None) -> Tensor:
        """The map (B, N) of tokens x, float32, adaLN computed at every evaluation."""

    @abstractmethod
    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        """The map (B, N)."""


class InversionMap(MapModule[Inversion]):
    """||X0||^power."""

    def __init__(self, field: StepField, rows: tuple[Row, ...], power: int) -> None:
        super().__init__(field)
        self.rows, self.power = rows, power

    @classmethod
    def bind(cls, scorer: Inversion, model: Field, how: Arithmetic) -> "InversionMap":
        """See `MapModule`."""
        rows = scorer.rows(model.config)
        return cls(model.at(_times(rows), how), rows, scorer.power)

    @staticmethod
    def reference(scorer: Inversion, model: VelocityModel, x: Tensor, y: Tensor | None) -> Tensor:
        """See `MapModule`."""
        with torch.no_grad():
            square = euler(model, scorer.rows(model.config), x, y).square().sum(-1)
        return square if scorer.power == 2 else square.sqrt()

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        """The map (B, N)."""
        square = run_to_error(self.field, self.rows, tokens, y)
        return square if self.power == 2 else square.sqrt()


class ReconstructionMap(MapModule[Reconstruction]):
    """||X1 - X1^||²."""

    noise: Tensor | None

    def __init__(
        self, field: StepField, down: tuple[Row, ...], up: tuple[Row, ...], tau: float, noise: Tensor | None
    ) -> None:
        super().__init__(field)
        self.down, self.up, self.tau = down, up, tau
        self.register_buffer("noise", noise, persistent=False)

    @classmethod
    def bind(cls, scorer: Reconstruction, model: Field, how: Arithmetic) -> "ReconstructionMap":
        """See `MapModule`."""
        down, up = scorer.rows(model.config)
        field = model.at(_times(down + up), how)
        noise = scorer.draw(model.config).to(_device(field)) if scorer.start == "noise" else None
        return cls(field, down, up, scorer.tau, noise)

    @staticmethod
    def reference(scorer: Reconstruction, model: VelocityModel, x: Tensor, y: Tensor | None) -> Tensor:
        """See `MapModule`."""
        down, up = scorer.rows(model.config)
        with torch.no_grad():
            if down:
                start = euler(model, down, x, y)
            else:
                start = scorer.tau * x + (1 - scorer.tau) * scorer.draw(model.config).to(x.device)
            return (x - euler(model, up, start, y)).square().sum(-1)

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        """The map (B, N)."""
        if self.noise is None:
            x = run(self.field, self.down, tokens, y)
        else:
            x = self.tau * tokens + (1 - self.tau) * self.noise
        return run_to_error(self.field, self.up, x, y, ref=tokens, first=len(self.down))


class DensityMap(MapModule[Density]):
    """-log p1(X1), the divergence in forward mode."""

    probes: Tensor

    def __init__(
        self,
        field: StepField,
        rows: tuple[Row, ...],
        probes: Tensor,
        config: VelocityConfig,
        exact: bool,
        probe_bytes: int | None,
    ) -> None:
        super().__init__(field)
        self.rows, self.exact, self.probe_bytes = rows, exact, probe_bytes
        self._budgets: dict[int, tuple[int, int]] = {}
        self.register_buffer("probes", probes, persistent=False)
        # Four states of a tangent exist at a time: its residual and the norm of it, before and after a branch.
        self.state_bytes = 4 * 4 * config.tokens * config.hidden_size
        self.wide_bytes = 4 * config.tokens * max(config.mlp_hidden, config.num_heads * config.tokens)

    @classmethod
    def bind(cls, scorer: Density, model: Field, how: Arithmetic) -> "DensityMap":
        """See `MapModule`."""
        rows = scorer.rows(model.config)
        field = model.at(_times(rows), how)
        probes = scorer.draw(model.config).to(_device(field))
        return cls(field, rows, probes, model.config, scorer.exact, how.probe_bytes)

    @staticmethod
    def reference(scorer: Density, model: VelocityModel, x: Tensor, y: Tensor | None) -> Tensor:
        """z.(J^T z) by reverse mode, the input repeated once per probe, the graph kept along the whole trajectory.

        It has the same expectation over probes as the product's map, and for each probe the same total over locations.
        """
        probes = scorer.draw(model.config).to(x.device)
        count, batch = len(probes), x.shape[0]
        z = probes.expand(-1, batch, -1, -1).flatten(0, 1)
        y_repeated = None if y is None else y.repeat(count)
        x = x.detach().requires_grad_()
        total = torch.zeros(count, *x.shape[:2], device=x.device)
        for row in scorer.rows(model.config):
            repeated = x.repeat(count, 1, 1)
            out = model.dit(repeated, torch.full((count * batch,), row.t, device=x.device), y_repeated)
            (pulled,) = torch.autograd.grad((out * z).sum(), repeated, retain_graph=True)
            share = row.b * (z * pulled).sum(-1) + (row.a - 1) * z.square().sum(-1)
            total = total + share.unflatten(0, (count, batch)).detach()
            x = row.a * x + row.b * out[:batch]
        return -(_log_normal(x.detach()) + (total.sum(0) if scorer.exact else total.mean(0)))

    def plan(self, batch: int, device: torch.device) -> tuple[int, int]:
        """Probes that are integrated together, and of those the ones whose wide activations exist at a time.

        What is integrated apart repeats the primal, so each number is the smallest that needs as few rounds.
        """
        if torch.compiler.is_exporting():
            # An exported graph has one chunk: its batch is symbolic, and engines plan their own memory. Chunks in it
            # make builders slow (TensorRT-RTX ten times at 10) and save them little.
            return len(self.probes), len(self.probes)
        if device.type == "cuda":
            # Once for each batch: while a graph is captured the free memory is not to be asked for.
            if batch not in self._budgets:
                free, _ = torch.cuda.mem_get_info(device)
                self._budgets[batch] = (min(self.probe_bytes or free, free // STATE_SHARE), free // WIDE_SHARE)
            states, wide = self._budgets[batch]
        else:
            states, wide = self.probe_bytes or PROBE_BYTES, WIDE_BYTES
        together = _equal(len(self.probes), states // (self.state_bytes * batch))
        return together, _equal(together, wide // (self.wide_bytes * batch))

    def shares(self, tokens: Tensor, y: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """X0 (B, N, C) and the probes' shares (k, B, N), for as many probes at a time as the budget allows."""
        together, chunk = self.plan(tokens.shape[0], tokens.device)
        for probes in self.probes.split(together):
            yield run_dual(self.field, self.rows, tokens, probes, y, chunk)

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        """The map (B, N)."""
        (x0, share), *more = ((x0, share.sum(0)) for x0, share in self.shares(tokens, y))  # X0 is the same for all
        total = sum((one for _, one in more), start=share)
        return -(_log_normal(x0) + (total if self.exact else total / len(self.probes)))

    def with_error(self, tokens: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The map and its standard error, (B, N) each; an exact map has error 0."""
        parts = list(self.shares(tokens, y))
        x0, each = parts[0][0], torch.cat([share for _, share in parts])
        if self.exact:
            return -(_log_normal(x0) + each.sum(0)), torch.zeros_like(each[0])
        return -(_log_normal(x0) + each.mean(0)), each.std(0) / len(each) ** 0.5


class MismatchMap(MapModule[Mismatch]):
    """||(X1 - eps) - u(X_tau, tau)||², averaged over draws of eps."""

    noise: Tensor

    def __init__(self, field: StepField, row: Row, tau: float, noise: Tensor) -> None:
        super().__init__(field)
        self.row, self.tau = row, tau
        self.register_buffer("noise", noise, persistent=False)

    @classmethod
    def bind(cls, scorer: Mismatch, model: Field, how: Arithmetic) -> "MismatchMap":
        """See `MapModule`."""
        row = scorer.row(model.config)
        field = model.at((row.t,), how)
        return cls(field, row, scorer.tau, scorer.draw(model.config).to(_device(field)))

    @staticmethod
    def reference(scorer: Mismatch, model: VelocityModel, x: Tensor, y: Tensor | None) -> Tensor:
        """See `MapModule`."""
        row, maps = scorer.row(model.config), []
        with torch.no_grad():
            for eps in scorer.draw(model.config).to(x.device):
                velocity = euler(model, (row,), scorer.tau * x + (1 - scorer.tau) * eps, y)
                maps.append((x - eps - velocity).square().sum(-1))
        return torch.stack(maps).mean(0)

    def forward(self, tokens: Tensor, y: Tensor | None = None) -> Tensor:
        """The map (B, N)."""
        draws = len(self.noise)  # K: states are (K B, N, C)
        x = (self.tau * tokens + (1 - self.tau) * self.noise).flatten(0, 1)
        target = (tokens - self.noise).flatten(0, 1)
        y = None if y is None else y.repeat(draws)
        square = self.field.ops.affine_error_map(x, self.field(x, 0, y), self.row.a, self.row.b, target)
        return square if draws == 1 else square.unflatten(0, (draws, -1)).mean(0)


MAPS: dict[str, type[MapModule[Any]]] = {
    "density": DensityMap,
    "inversion": InversionMap,
    "reconstruction": ReconstructionMap,
    "mismatch": MismatchMap,
}
"""By `Scorer.kind`."""


def euler(model: VelocityModel, rows: tuple[Row, ...], x: Tensor, y: Tensor | None) -> Tensor:
    """A schedule applied with the training form: what the paper's code does."""
    for row in rows:
        x = row.a * x + row.b * model.dit(x, torch.full(x.shape[:1], row.t, device=x.device), y)
    return x


def _equal(count: int, most: int) -> int:
    """The largest part where `count` is cut into as few parts of nearly one size as have at most `most` each."""
    return -(-count // -(-count // min(max(most, 1), count)))


def _log_normal(x: Tensor) -> Tensor:
    """Standard normal log-density N(x; 0, I) summed over channels: (B, N, C) to (B, N)."""
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * np.log(2 * np.pi))


def _times(rows: tuple[Row, ...]) -> tuple[float, ...]:
    return tuple(row.t for row in rows)


def _device(field: StepField) -> torch.device | None:
    return field.table.device if isinstance(field, TabledDiT) else None
