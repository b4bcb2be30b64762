"""The scorers: what is computed from X1 as a per-location anomaly map (B, h, w); higher is more anomalous.

A scorer is a frozen, validated description that needs no torch; a bundle's manifest holds one. Its computation is the
class of the same kind in `maps.py`, which `prepare` binds to a model. A new scorer is a class here (add it to `Scorer`)
and one there; commands, exports and benchmarks list whatever is in `SCORERS`, with the fields as options.

Random draws come from numpy's RandomState, whose streams never change, so a seed names the same draw on every machine
and version.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from flowad_fast.config import VelocityConfig
from flowad_fast.errors import ConfigError
from flowad_fast.stages import schedule
from flowad_fast.stages.schedule import Row

if TYPE_CHECKING:
    from torch import Tensor

    from flowad_fast.model import VelocityModel
    from flowad_fast.stages.arithmetic import Arithmetic
    from flowad_fast.stages.integration import Field as FlowField
    from flowad_fast.stages.maps import DensityMap, MapModule

_STRICT = ConfigDict(extra="forbid")
EXACT_LIMIT = 4096
"""Largest C * h * w for which the exact divergence (one probe per input element) is allowed."""

Steps = Annotated[int, Field(gt=0, le=10_000, description="steps per unit time")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="of the random draw")]


class BaseScorer:
    """What all scorers share."""

    kind: str
    reverse_mode: ClassVar[bool] = False
    """Whether the reference path needs gradients, whose per-location noise differs from the product's."""
    counted_by: ClassVar[str] = "steps"
    """The option that sets the number of function evaluations."""

    def schedules(self, config: VelocityConfig) -> tuple[Row, ...]:
        """Every function evaluation in order, as rows of its schedule.

        Raises:
            ConfigError: the model's kind does not have this scorer.
        """
        raise NotImplementedError

    def evaluations(self, config: VelocityConfig) -> int:
        """Function evaluations (NFE) of the velocity field per frame; the tangents of density come on top."""
        return len(self.schedules(config))

    @property
    def count(self) -> int:
        """The value of the option that sets the number of function evaluations."""
        return int(getattr(self, self.counted_by))

    def covers(self, other: "BaseScorer") -> bool:
        """Whether every evaluation of the network that `other` makes is one that this scorer makes too."""
        return self == other

    def check_model(self, model: object) -> None:
        """Refuse a student that was trained for other evaluations than this scorer's.

        Raises:
            ConfigError: names the scorer that the student was trained for.
        """
        student = getattr(getattr(model, "spec", None), "student", None)
        if student is None:
            return
        trained = scorer_adapter.validate_python(student.scorer)
        if not trained.covers(self):
            raise ConfigError(
                f"the model is a student trained for {trained!r} alone, got {self!r}; use that scorer, its teacher, or "
                f"train a student for this one (flowad-train --teacher CHECKPOINT --scorer {self.kind})"
            )

    def prepare(self, model: "FlowField", how: "Arithmetic | None" = None) -> "MapModule[Any]":
        """Bind the scorer to a model: the module that engines run and exporters trace.

        Raises:
            ConfigError: the model does not have this scorer, or is a student for another one.
        """
        self.check_model(model)
        from flowad_fast.stages.arithmetic import FP32
        from flowad_fast.stages.maps import MAPS

        return MAPS[self.kind].bind(self, model, how or FP32)

    def map(self, model: "FlowField", x1: "Tensor", y: "Tensor | None" = None) -> "Tensor":
        """The anomaly map (B, h, w) of features x1 (B, C, h, w) and class indices y (B,)."""
        import torch

        from flowad_fast.stages.integration import to_tokens

        y = model.check_classes(y, x1.shape[0])
        with torch.no_grad():
            map: Tensor = self.prepare(model)(to_tokens(x1), y)
        return map.reshape(map.shape[0], *x1.shape[2:])

    def expected(self, model: "VelocityModel", x1: "Tensor", y: "Tensor | None" = None) -> "Tensor":
        """The map (B, h, w) that artefacts are held against, float32: the training form, adaLN at every evaluation.

        Where the reference path is in reverse mode it is the scorer's own map, which the tests hold against the exact
        trace.
        """
        from flowad_fast.reference_path import reference_map

        self.check_model(model)
        return self.map(model, x1, y) if self.reverse_mode else reference_map(model, self, x1, y)  # type: ignore[arg-type]


@dataclass(frozen=True, config=_STRICT)
class Density(BaseScorer):
    """(a) density: -log p1(X1) at each location (paper eq. 1), by forward-mode Hutchinson.

    The Gaussian term is summed over channels; the trace is restricted to the location's own C x C block of the
    Jacobian, estimated by K Rademacher probes z that stay fixed along the trajectory: sum over channels of z (J z).
    `exact` uses every unit vector instead and is for small models.

    Example:
        >>> from flowad_fast import Density, load_checkpoint
        >>> Density(steps=3, probes=1)
        Density(steps=3, probes=1, seed=0, exact=False)
        >>> Density(steps=5).evaluations(load_checkpoint("demo").config)
        5
    """

    reverse_mode: ClassVar[bool] = True

    steps: Steps = 3
    probes: int = Field(default=10, gt=0, le=100_000, description="probes of the divergence")
    seed: Seed = 0
    exact: bool = Field(default=False, description="every unit vector as a probe, for small models")
    kind: Literal["density"] = Field(default="density", repr=False)

    def rows(self, config: VelocityConfig) -> tuple[Row, ...]:
        """The schedule."""
        if config.pred_type == "epsilon":
            raise ConfigError("density needs a flow-matching model; this one predicts epsilon: use Inversion")
        return schedule.flow(config, self.steps, 1.0, 0.0)

    def schedules(self, config: VelocityConfig) -> tuple[Row, ...]:
        """See `BaseScorer`."""
        return self.rows(config)

    def draw(self, config: VelocityConfig) -> "Tensor":
        """The probes, (K, 1, h*w, C) float32: signs, or all unit vectors."""
        import torch

        n, c = config.height * config.width, config.channels
        if self.exact:
            if n * c > EXACT_LIMIT:
                raise ConfigError(f"exact density needs {n * c} probes for this model; the limit is {EXACT_LIMIT}")
            return torch.eye(n * c).view(n * c, 1, n, c)
        signs = np.random.RandomState(self.seed).randint(0, 2, (self.probes, 1, n, c))
        return torch.from_numpy(signs.astype(np.float32) * 2 - 1)

    def map_with_error(self, model: "FlowField", x1: "Tensor", y: "Tensor | None" = None) -> "tuple[Tensor, Tensor]":
        """The map and its standard error over probes, both (B, h, w); needs at least two random probes.

        Raises:
            ConfigError: one probe (no spread to measure).
        """
        import torch

        from flowad_fast.stages.integration import to_tokens

        if not self.exact and self.probes < 2:
            raise ConfigError("a standard error needs at least 2 probes")
        y = model.check_classes(y, x1.shape[0])
        prepared: DensityMap = self.prepare(model)  # type: ignore[assignment]
        with torch.no_grad():
            map, error = prepared.with_error(to_tokens(x1), y)
        map, error = (each.reshape(each.shape[0], *x1.shape[2:]) for each in (map, error))
        return map, error


@dataclass(frozen=True, config=_STRICT)
class Inversion(BaseScorer):
    """(b) inversion: ||X0||^power over channels, X0 integrated from X1 (paper eq. 2; the reference code uses power 1).

    On a diffusion model (InvAD) it is the same map of the latent that InvAD's grid gives.

    Example:
        >>> import torch
        >>> from flowad_fast import Inversion, load_checkpoint
        >>> model = load_checkpoint("demo")
        >>> Inversion(steps=3).map(model, torch.zeros(2, 192, 16, 16)).shape
        torch.Size([2, 16, 16])
    """

    steps: Steps = 3
    power: Literal[1, 2] = Field(default=2, description="of the norm")
    kind: Literal["inversion"] = Field(default="inversion", repr=False)

    def rows(self, config: VelocityConfig) -> tuple[Row, ...]:
        """The schedule."""
        return schedule.inversion(config, self.steps)

    def covers(self, other: BaseScorer) -> bool:
        """See `BaseScorer`; the power comes after the last evaluation."""
        return isinstance(other, Inversion) and other.steps == self.steps

    def schedules(self, config: VelocityConfig) -> tuple[Row, ...]:
        """See `BaseScorer`."""
        return self.rows(config)


@dataclass(frozen=True, config=_STRICT)
class Reconstruction(BaseScorer):
    """(c) reconstruction: ||X1 - X1^||² (paper eq. 3), X1^ integrated from X_tau up to t = 1.

    `start` "noise": X_tau = tau X1 + (1 - tau) eps, eps standard normal, drawn once from `seed` and shared by all
    frames. "inversion": X_tau is X1 integrated down to tau, as the reference code does. `steps` counts steps per unit
    time, as everywhere: at tau = 0.5, 6 steps are 3 evaluations up, and as many down for the inversion start.

    Example:
        >>> from flowad_fast import Reconstruction, load_checkpoint
        >>> config = load_checkpoint("demo").config
        >>> Reconstruction(steps=6).evaluations(config), Reconstruction(steps=6, start="inversion").evaluations(config)
        (3, 6)
    """

    steps: Steps = 3
    tau: float = Field(default=0.5, gt=0, lt=1, description="time of the noised features")
    start: Literal["noise", "inversion"] = Field(default="noise", description="what X_tau is made of")
    seed: Seed = 0
    kind: Literal["reconstruction"] = Field(default="reconstruction", repr=False)

    def rows(self, config: VelocityConfig) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        """The schedules down to tau (empty for the noise start) and up to 1."""
        if config.pred_type == "epsilon":
            raise ConfigError("reconstruction needs a flow-matching model; this one predicts epsilon: use Inversion")
        up = schedule.flow(config, self.steps, self.tau, 1.0)
        return (() if self.start == "noise" else schedule.flow(config, self.steps, 1.0, self.tau)), up

    def schedules(self, config: VelocityConfig) -> tuple[Row, ...]:
        """See `BaseScorer`."""
        down, up = self.rows(config)
        return down + up

    def draw(self, config: VelocityConfig) -> "Tensor":
        """The noise eps of the noise start, (1, h*w, C) float32."""
        import torch

        shape = (1, config.height * config.width, config.channels)
        return torch.from_numpy(np.random.RandomState(self.seed).standard_normal(shape).astype(np.float32))


@dataclass(frozen=True, config=_STRICT)
class Mismatch(BaseScorer):
    """One evaluation: ||(X1 - eps) - u(X_tau, tau)||², X_tau = tau X1 + (1 - tau) eps, how wrong the velocity is.

    It is the noise-start reconstruction with a single step, divided by (1 - tau)² (published as flow mismatching,
    arXiv 2605.23070; not in the paper). eps is standard normal, drawn once from `seed` and shared by all frames; with
    several `draws` their maps are averaged, all evaluated in one batch.

    Example:
        >>> from flowad_fast import Mismatch, load_checkpoint
        >>> Mismatch(tau=0.5, draws=2).evaluations(load_checkpoint("demo").config)
        2
    """

    counted_by: ClassVar[str] = "draws"

    tau: float = Field(default=0.5, gt=0, lt=1, description="time of the noised features")
    draws: int = Field(default=1, gt=0, le=64, description="draws of the noise, averaged")
    seed: Seed = 0
    kind: Literal["mismatch"] = Field(default="mismatch", repr=False)

    def row(self, config: VelocityConfig) -> Row:
        """The evaluation: the velocity is a x + b f(x, t)."""
        if config.pred_type == "epsilon":
            raise ConfigError("mismatch needs a flow-matching model; this one predicts epsilon: use Inversion")
        return Row(self.tau, *schedule.velocity_factors(config.pred_type, self.tau))

    def schedules(self, config: VelocityConfig) -> tuple[Row, ...]:
        """See `BaseScorer`."""
        return (self.row(config),)

    def covers(self, other: BaseScorer) -> bool:
        """See `BaseScorer`; fewer draws are the first of these."""
        if not isinstance(other, Mismatch):
            return False
        return (other.tau, other.seed) == (self.tau, self.seed) and other.draws <= self.draws

    def evaluations(self, config: VelocityConfig) -> int:
        """One per draw."""
        return self.draws * len(self.schedules(config))

    def draw(self, config: VelocityConfig) -> "Tensor":
        """The noise eps, (draws, 1, h*w, C) float32; the first is that of a `Reconstruction` with the same seed."""
        import torch

        shape = (self.draws, 1, config.height * config.width, config.channels)
        return torch.from_numpy(np.random.RandomState(self.seed).standard_normal(shape).astype(np.float32))


Scorer = Density | Inversion | Reconstruction | Mismatch
SCORERS: dict[str, type[Scorer]] = {one.kind: one for one in get_args(Scorer)}
"""Scorers by name: the paper's three in its order, then ours."""
scorer_adapter: TypeAdapter[Scorer] = TypeAdapter(Annotated[Scorer, Field(discriminator="kind")])
"""Scorers to JSON and back."""


def options(kind: str) -> dict[str, Any]:
    """The options of a scorer by name, as pydantic's field descriptions."""
    fields = SCORERS[kind].__pydantic_fields__  # type: ignore[union-attr]
    return {name: field for name, field in fields.items() if name != "kind"}
