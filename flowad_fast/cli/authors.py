"""What a command computes, put together from the command line, the authors' configuration and the built-in defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flowad_fast.checkpoints.defaults import AS_THEIRS, EvaluationDefaults
from flowad_fast.cli.scorer_options import EVALUATIONS, scorer_from
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.stages.aggregates import AGGREGATES, Aggregate, check_scorer
from flowad_fast.stages.scorers import SCORERS, Scorer, options
from flowad_fast.tuning.recipe import RecipeDefaults

COMMAND_LINE, BUILT_IN, AUTHORS = "command line", "default", "as the authors' code"


@dataclass(frozen=True)
class Choice:
    """A scorer and an aggregate, and where each setting came from by its name; `aggregate` is among them."""

    scorer: Scorer
    aggregate: Aggregate
    sources: Mapping[str, str]

    def with_aggregate(self, aggregate: Aggregate, source: str) -> "Choice":
        """The same scorer with another aggregate."""
        return replace(self, aggregate=aggregate, sources={**self.sources, "aggregate": source})

    def __str__(self) -> str:
        values = {"scorer": self.scorer.kind} | {name: getattr(self.scorer, name) for name in options(self.scorer.kind)}
        values["aggregate"] = self.aggregate
        return "computed: " + ", ".join(f"{name} {value} [{self.sources[name]}]" for name, value in values.items())


def choose(
    kind: str | None,
    aggregate: str | None,
    given: Mapping[str, Any],
    defaults: EvaluationDefaults | RecipeDefaults | None,
    authors: bool = False,
) -> Choice:
    """What is given on the command line wins, then the authors' configuration or a recipe, then the defaults.

    Args:
        kind: the scorer's name; None where it was not given.
        aggregate: its name; None where it was not given.
        given: a scorer's options by name, `evaluations` among them; None stands for one that was not given.
        defaults: what the configuration says.
        authors: also take the options that the authors' code fixes, as a scorer of their configuration does.

    Raises:
        ConfigError: see `scorer_from`; an unknown aggregate, or one that the scorer cannot have.
    """
    source = defaults.source if defaults else ""
    from_file = defaults.scorer if defaults and kind is None else None
    chosen = kind or from_file or "inversion"
    sources = {"scorer": COMMAND_LINE if kind else source if from_file else BUILT_IN}
    if chosen not in SCORERS:
        raise ConfigError(f"unknown scorer {chosen!r}; {nearest(chosen, SCORERS)}")
    wanted = {name: value for name, value in given.items() if value is not None}
    theirs = authors or (from_file and isinstance(defaults, EvaluationDefaults))
    fixed = AS_THEIRS.get(chosen, {}) if theirs else {}
    filed = defaults.options(chosen, counted=not {"steps", "draws", EVALUATIONS}.isdisjoint(wanted)) if defaults else {}
    for values, where in ((fixed, AUTHORS), (filed, source), (wanted, COMMAND_LINE)):
        sources |= dict.fromkeys(values, where)
    merged = {**fixed, **filed, **wanted}
    scorer = scorer_from(chosen, merged)
    if EVALUATIONS in wanted:
        sources[scorer.counted_by] = COMMAND_LINE
    filed_aggregate = defaults.aggregate if defaults else None
    score = _aggregate(aggregate) if aggregate else filed_aggregate or "max"
    sources["aggregate"] = COMMAND_LINE if aggregate else source if filed_aggregate else BUILT_IN
    check_scorer(score, scorer.kind)
    return Choice(scorer, score, {name: BUILT_IN for name in options(chosen)} | sources)


def _aggregate(name: str) -> Aggregate:
    for known in AGGREGATES:
        if known == name:
            return known
    raise ConfigError(f"unknown aggregate {name!r}; {nearest(name, AGGREGATES)}")
