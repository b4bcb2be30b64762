"""The scorers' own options as options of a command, so that a new scorer needs no line in any command."""

import inspect
from collections.abc import Callable
from itertools import count
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from flowad_fast.config import VelocityConfig, validated
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.stages.scorers import SCORERS, Scorer, options

EVALUATIONS = "evaluations"
"""The other way to say `steps`: function evaluations of the velocity field per frame."""
_ANY_FLOW = VelocityConfig(channels=1, height=1, width=1, hidden_size=8, depth=1, num_heads=1)
"""How many evaluations some steps take does not depend on the model."""


def add_scorer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with an option for each field of each scorer in place of its **options; None where not given."""
    signature = inspect.signature(function)
    parameters = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    owners = {name: [kind for kind in SCORERS if name in options(kind)] for kind in SCORERS for name in options(kind)}
    for name, kinds in {**owners, EVALUATIONS: list(SCORERS)}.items():
        annotation: Any = int
        text = "function evaluations per frame, instead of --steps"
        if name != EVALUATIONS:
            field = options(kinds[0])[name]
            annotation, text = field.annotation, f"{field.description} [{field.default}]"
        whose = "" if len(kinds) == len(SCORERS) else f"{', '.join(kinds)}: "
        flag = f"--{name}/--no-{name}" if annotation is bool else f"--{name}"
        if get_origin(annotation) is Literal and isinstance(get_args(annotation)[0], int):
            annotation = int  # typer offers choices of strings only; the scorer checks the number
        option = Annotated[annotation | None, typer.Option(flag, help=f"{whose}{text}")]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option))
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def make_scorer(name: str, given: dict[str, Any]) -> Scorer:
    """The scorer `name` with the options that were given (None: not given).

    Raises:
        ConfigError: no such scorer, an option of another one, a value that it does not take, or steps twice.
    """
    if name not in SCORERS:
        raise ConfigError(f"unknown scorer {name!r}; {nearest(name, SCORERS)}")
    chosen = {option: value for option, value in given.items() if value is not None}
    wanted = chosen.pop(EVALUATIONS, None)
    for option in chosen:
        if option not in options(name):
            owners = " and ".join(kind for kind in SCORERS if option in options(kind))
            raise ConfigError(f"--{option} is an option of {owners}, not of {name}; leave it out or change --scorer")
    make: Callable[..., Scorer] = SCORERS[name]
    if wanted is None:
        return validated(make, chosen, f"--scorer {name}")
    if "steps" in chosen:
        raise ConfigError("got --steps and --evaluations, expected one of them")
    return _with_evaluations(name, chosen, wanted)


def _with_evaluations(name: str, chosen: dict[str, Any], wanted: int) -> Scorer:
    """The scorer with the steps per unit time that take `wanted` evaluations."""
    make: Callable[..., Scorer] = SCORERS[name]
    matching: list[Scorer] = []
    found = 0
    for steps in count(1):
        scorer = validated(make, {**chosen, "steps": steps}, f"--scorer {name} --evaluations {wanted}")
        try:
            found = scorer.evaluations(_ANY_FLOW)
        except ConfigError:  # not even one step
            continue
        if found > wanted:
            break
        matching += [scorer] * (found == wanted)
    if not matching:
        raise ConfigError(f"--evaluations {wanted}: {name} with these options takes {found}, but never {wanted}")
    return matching[len(matching) // 2]  # the one that needs no rounding, if any does not
