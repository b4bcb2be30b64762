"""A scorer's options on a command line, generated from the fields of the scorers; needs no torch.

A command takes them as keyword parameters, each None where it was not given:

    def evaluate(model: ..., scorer: ... = None, **scoring: Any) -> None:
        chosen = scorer_from(scorer or "inversion", scoring)

    main = common.command(with_scorer_options(evaluate))
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import typer
from pydantic import ValidationError

from flowad_fast.config import VelocityConfig, validated
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.stages.scorers import SCORERS, Scorer, options

EVALUATIONS = "evaluations"
"""The alternative to `steps`: function evaluations per frame."""
_MODEL = VelocityConfig(channels=1, height=1, width=1, hidden_size=1, depth=1, num_heads=1)
"""Any flow-matching model: how many evaluations a scorer has does not depend on sizes."""


def owners(name: str) -> tuple[str, ...]:
    """The scorers that have an option."""
    return tuple(kind for kind in SCORERS if name in options(kind))


def option_names() -> tuple[str, ...]:
    """The options of all scorers, each once, those of all scorers first."""
    names = dict.fromkeys(name for kind in SCORERS for name in options(kind))
    return tuple(sorted(names, key=lambda name: -len(owners(name))))


def with_scorer_options(
    function: Callable[..., Any], words: Mapping[str, str] | None = None, prefix: str = "", flag: str = ""
) -> Callable[..., Any]:
    """`function` with one option per field of any scorer, and `--evaluations`, in place of its **keywords.

    Args:
        function: a command.
        words: options that take a word besides numbers, with its help; they arrive as text.
        prefix: put before every help text.
        flag: put before every option's name, for a command that has options of these names itself.
    """
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in option_names():
        kinds = owners(name)
        field = options(kinds[0])[name]
        whose = "" if len(kinds) == len(SCORERS) else f"{', '.join(kinds)}: "
        shown = "" if isinstance(field.default, bool) else f" [{field.default}]"
        word = (words or {}).get(name)
        kind = _plain(field.annotation) if word is None else str
        text = f"{prefix}{whose}{field.description}{'' if word is None else f', or {word}'}{shown}"
        parameters.append(_option(flag + name, kind, text))
    text = f"{prefix}function evaluations per frame, instead of --{flag}steps (or --{flag}draws)"
    parameters.append(_option(flag + EVALUATIONS, int, text))
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function


def scorer_from(kind: str, given: Mapping[str, Any]) -> Scorer:
    """The scorer that a command line asks for.

    Args:
        kind: its name.
        given: options by name, `evaluations` among them; None stands for one that was not given.

    Raises:
        ConfigError: an unknown scorer, an option of another scorer, a wrong value, steps as well as evaluations, or a
            number of evaluations that the scorer cannot have.
    """
    if kind not in SCORERS:
        raise ConfigError(f"unknown scorer {kind!r}; {nearest(kind, SCORERS)}")
    wanted = {name: value for name, value in given.items() if value is not None}
    evaluations = wanted.pop(EVALUATIONS, None)
    for name in wanted:
        if name not in options(kind):
            raise ConfigError(f"--{name} belongs to {' and '.join(owners(name))}, not {kind}; leave it out")
    scorer = cast(Scorer, validated(SCORERS[kind], wanted, f"--scorer {kind}"))
    if evaluations is None:
        return scorer
    if scorer.counted_by in wanted:
        raise ConfigError(f"got --{scorer.counted_by} and --evaluations, expected one of them: each sets the other")
    return with_evaluations(scorer, evaluations)


def with_evaluations(scorer: Scorer, count: int) -> Scorer:
    """`scorer` with the steps per unit time (or draws) that make `count` function evaluations per frame.

    Of several such numbers of steps, the one in the middle: there the steps divide the way best.

    Raises:
        ConfigError: no number of steps does; names the nearest counts that one does.
    """
    by_count: dict[int, list[int]] = {}
    for steps in range(1, 10_001):
        try:
            got = _counted(scorer, steps).evaluations(_MODEL)
        except (ConfigError, ValidationError):  # not even one step, or more draws than there may be
            continue
        by_count.setdefault(got, []).append(steps)
        if got > max(count, 0):
            break
    if count in by_count:
        found = by_count[count]
        return _counted(scorer, found[(len(found) - 1) // 2])
    near = sorted(sorted(by_count, key=lambda one: abs(one - count))[:2])
    raise ConfigError(
        f"--evaluations {count}: {scorer!r} cannot have them, near it are {' and '.join(map(str, near))}; "
        f"give one of these, or --{scorer.counted_by}"
    )


def _counted(scorer: Scorer, count: int) -> Scorer:
    changed: dict[str, Any] = {scorer.counted_by: count}
    return replace(scorer, **changed)


def _plain(annotation: Any) -> type:
    """The type that a shell's word is read as; the scorer itself refuses values that it does not take."""
    return type(get_args(annotation)[0]) if get_origin(annotation) is Literal else annotation


def _option(name: str, kind: Any, help: str) -> inspect.Parameter:
    annotation = Annotated[kind | None, typer.Option(f"--{name}", help=help)]
    return inspect.Parameter(
        name.replace("-", "_"), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
