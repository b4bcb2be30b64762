"""How the authors of a checkpoint evaluated it, as the `logging.eval` part of their YAML says; needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flowad_fast.config import Frozen, ModelConfig, parse, read_mapping
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.stages.aggregates import AGGREGATES, Aggregate

STRATEGIES = {"density": "density", "inversion": "inversion", "recon": "reconstruction"}
"""What their `eval_strategy` is called here."""
AS_THEIRS: dict[str, dict[str, Any]] = {"inversion": {"power": 1}, "reconstruction": {"start": "inversion"}}
"""Options of scorers that their code fixes: the norm, not its square; X_tau from X1, not from noise."""

Count = Annotated[int, Field(gt=0)]


class EvaluationDefaults(Frozen):
    """The authors' settings; None where their file says nothing. `source` is its name.

    `steps` are those of density and inversion; a reconstruction has `inv_steps` down and `recon_steps` up.
    """

    source: str
    scorer: str | None = None
    steps: Count | None = None
    inv_steps: Count | None = None
    recon_steps: Count | None = None
    tau: float | None = Field(default=None, ge=0, le=1)
    probes: Count | None = None
    exact: bool | None = None
    aggregate: Aggregate | None = None

    def options(self, kind: str, counted: bool = False) -> dict[str, Any]:
        """The options of a scorer that the file sets; without steps where they were `counted` elsewhere.

        Raises:
            ConfigError: a reconstruction with other steps down than up.
        """
        found: dict[str, float | None] = {}
        if kind == "density":
            found = {"steps": self.steps, "probes": self.probes, "exact": self.exact}
        elif kind == "inversion":
            found = {"steps": self.steps}
        elif kind == "reconstruction":
            down, up = self.inv_steps, self.recon_steps
            if not counted and down and up and down != up:
                raise ConfigError(
                    f"{self.source}: logging.eval has inv_steps {down} and recon_steps {up}, expected equal ones; "
                    "make them equal, or take them out and give --steps"
                )
            found = {"steps": up or down, "tau": self.tau}
        return {name: value for name, value in found.items() if value is not None and not (counted and name == "steps")}


def read_defaults(values: Mapping[str, Any], source: str) -> EvaluationDefaults | None:
    """The defaults in a FlowAD configuration; None where it has none. Keys that say nothing of a score are ignored.

    Raises:
        ConfigError: a value that is none of theirs.
    """
    logging = values.get("logging")
    given = logging.get("eval") if isinstance(logging, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{source}: logging.eval is {given!r}, expected a mapping")
    solver = given.get("solver_name")
    if solver not in (None, "euler"):
        raise ConfigError(f"{source}: logging.eval.solver_name is {solver!r}, only 'euler' is supported")
    for key, valid in (("eval_strategy", STRATEGIES), ("img_score_agg", AGGREGATES)):
        if given.get(key) is not None and given[key] not in tuple(valid):
            raise ConfigError(
                f"{source}: logging.eval.{key} {given[key]!r} is unknown; {nearest(str(given[key]), valid)}"
            )
    found = {
        "source": source,
        "scorer": STRATEGIES.get(str(given.get("eval_strategy"))),
        "steps": given.get("steps"),
        "inv_steps": given.get("inv_steps"),
        "recon_steps": given.get("recon_steps"),
        "tau": given.get("inv_stop_time"),
        "probes": given.get("hutchinson_samples"),
        "exact": given.get("exact_divergence"),
        "aggregate": given.get("img_score_agg"),
    }
    defaults = parse(EvaluationDefaults, found, f"{source}: logging.eval")
    says_something = any(value is not None for name, value in defaults if name != "source")
    return defaults if says_something else None


def evaluation_defaults(checkpoint: str | Path, config: str | Path | None) -> EvaluationDefaults | None:
    """The defaults of a checkpoint: of its configuration, or of the JSON beside a `.safetensors` made from one."""
    if config is not None:
        return read_defaults(read_mapping(Path(config)), Path(config).name)
    own = Path(checkpoint).with_suffix(".json")
    if Path(checkpoint).suffix != ".safetensors" or not own.is_file():
        return None
    kept = parse(ModelConfig, read_mapping(own), str(own)).provenance.get("evaluation")
    return None if kept is None else parse(EvaluationDefaults, kept, f"{own}: provenance.evaluation")
