"""Options of scorers on a command line, and the two ways to say how many evaluations."""

import inspect
from typing import Any

import pytest

from flowad_fast.cli.scorer_options import option_names, owners, scorer_from, with_evaluations, with_scorer_options
from flowad_fast.config import VelocityConfig
from flowad_fast.errors import ConfigError
from flowad_fast.stages.scorers import SCORERS, Density, Inversion, Reconstruction, Scorer, options

MODEL = VelocityConfig(channels=4, height=2, width=2, hidden_size=8, depth=1, num_heads=1)


def test_every_field_of_every_scorer_is_an_option() -> None:
    def command(model: str, **scoring: Any) -> None: ...

    made = inspect.signature(with_scorer_options(command, {"probes": "few"})).parameters
    assert set(made) == {"model", "evaluations"} | {name for kind in SCORERS for name in options(kind)}
    assert all(made[name].default is None for name in option_names())
    texts = {name: made[name].annotation.__metadata__[0].help for name in option_names()}
    assert texts["steps"] == "density, inversion, reconstruction: steps per unit time [3]"
    assert texts["probes"] == "density: probes of the divergence, or few [10]"
    assert texts["tau"] == "reconstruction, mismatch: time of the noised features [0.5]"
    assert texts["seed"].startswith("density, reconstruction, mismatch: ")


@pytest.mark.parametrize("kind", SCORERS)
def test_options_of_other_scorers_are_refused_and_name_their_owner(kind: str) -> None:
    assert scorer_from(kind, dict.fromkeys(option_names())) == SCORERS[kind]()
    for name in option_names():
        if kind not in owners(name):
            with pytest.raises(ConfigError, match=f"--{name} belongs to {' and '.join(owners(name))}, not {kind}"):
                scorer_from(kind, {name: 1})


def test_values_are_checked_by_the_scorer() -> None:
    assert scorer_from("density", {"probes": "4", "seed": 3}) == Density(probes=4, seed=3)
    with pytest.raises(ConfigError, match="--scorer density: probes: Input should be a valid integer"):
        scorer_from("density", {"probes": "many"})
    with pytest.raises(ConfigError, match="unknown scorer 'inversoin'; did you mean 'inversion'"):
        scorer_from("inversoin", {})


@pytest.mark.parametrize(
    ("scorer", "count", "steps"),
    [
        (Inversion(), 3, 3),
        (Density(), 7, 7),
        (Reconstruction(tau=0.5), 3, 6),
        (Reconstruction(tau=0.5), 2, 4),
        (Reconstruction(tau=0.5), 1, 2),
        (Reconstruction(tau=0.3), 7, 10),
        (Reconstruction(tau=0.5, start="inversion"), 6, 6),
    ],
    ids=repr,
)
def test_evaluations_become_steps(scorer: Scorer, count: int, steps: int) -> None:
    got = with_evaluations(scorer, count)
    assert got.steps == steps and got.evaluations(MODEL) == count


def test_evaluations_that_no_steps_make_are_refused_with_the_nearest() -> None:
    given = {"tau": 0.5, "start": "inversion", "evaluations": 3}
    with pytest.raises(ConfigError, match="--evaluations 3: .* cannot have them, near it are 2 and 4"):
        scorer_from("reconstruction", given)
    for count in (0, -1):
        with pytest.raises(ConfigError, match="cannot have them"):
            scorer_from("inversion", {"evaluations": count})
    with pytest.raises(ConfigError, match="got --steps and --evaluations"):
        scorer_from("inversion", {"evaluations": 3, "steps": 3})
