"""What every scorer in `SCORERS` promises. A new entry is tested here without a new test: with its defaults, and with
each value of its options that are a choice.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from models import GRID, tiny_field
from torch import Tensor
from torch.export import Dim

from flowad_fast.config import validated
from flowad_fast.errors import ConfigError
from flowad_fast.model import VelocityModel
from flowad_fast.stages.arithmetic import FP32, Arithmetic
from flowad_fast.stages.integration import StepField, to_tokens
from flowad_fast.stages.scorers import SCORERS, Scorer, options, scorer_adapter

X1 = torch.randn(3, 6, GRID, GRID, generator=torch.Generator().manual_seed(0))


def variants() -> Iterator[Scorer]:
    for kind, scorer in SCORERS.items():
        yield scorer()
        for name, field in options(kind).items():
            is_choice = get_origin(field.annotation) is Literal or field.annotation is bool
            values = (True, False) if field.annotation is bool else get_args(field.annotation)
            yield from (scorer(**{name: value}) for value in values if is_choice and value != field.default)


VARIANTS = list(variants())
every = pytest.mark.parametrize("scorer", VARIANTS, ids=str)


@pytest.fixture(scope="module")
def model() -> VelocityModel:
    return tiny_field()


class Counting:
    """A field that counts how often it is evaluated."""

    def __init__(self, model: VelocityModel) -> None:
        self.model, self.config, self.calls = model, model.config, 0

    def at(self, times: tuple[float, ...], how: Arithmetic = FP32) -> StepField:
        self.field = self.model.at(times, how)
        self.ops, self.table = self.field.ops, self.field.table
        return self

    def check_classes(self, y: Tensor | None, batch: int) -> Tensor | None:
        return self.model.check_classes(y, batch)

    def __call__(self, *args: Any) -> Tensor:
        self.calls += 1
        return self.field(*args)

    def dual(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.field.dual(*args)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance * float(expected.std()), rtol=0)


def test_kinds_are_the_names_of_the_registry() -> None:
    assert {kind: scorer().kind for kind, scorer in SCORERS.items()} == {kind: kind for kind in SCORERS}


@pytest.mark.parametrize("kind", SCORERS)
def test_every_option_is_described(kind: str) -> None:
    assert SCORERS[kind].__doc__
    for name, field in options(kind).items():
        assert field.description, f"{kind}.{name} has no description, which commands show as its help"
        assert not field.is_required(), f"{kind}.{name} has no default"


@every
def test_it_goes_through_json_unchanged(scorer: Scorer) -> None:
    assert scorer_adapter.validate_json(scorer_adapter.dump_json(scorer)) == scorer


@pytest.mark.parametrize("kind", SCORERS)
def test_a_foreign_option_is_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="no_such_option"):
        validated(SCORERS[kind], {"no_such_option": 1}, kind)


@every
def test_the_map_is_finite_and_the_same_each_time(model: VelocityModel, scorer: Scorer) -> None:
    got = scorer.map(model, X1)
    assert got.shape == (3, GRID, GRID) and got.dtype == torch.float32 and torch.isfinite(got).all()
    torch.testing.assert_close(scorer.map(tiny_field(), X1), got, atol=0, rtol=0)


@every
def test_a_frame_is_scored_alone_as_in_a_batch(model: VelocityModel, scorer: Scorer) -> None:
    close(scorer.map(model, X1[1:2]), scorer.map(model, X1)[1:2])


@pytest.mark.parametrize("kind", [kind for kind in SCORERS if "seed" in options(kind)])
def test_another_seed_is_another_draw(model: VelocityModel, kind: str) -> None:
    maps = [validated(SCORERS[kind], {"seed": seed}, kind).map(model, X1) for seed in (1, 2)]
    assert not torch.equal(*maps)


@every
def test_it_agrees_with_what_artefacts_are_held_against(model: VelocityModel, scorer: Scorer) -> None:
    close(scorer.map(model, X1), scorer.expected(model, X1))


@every
def test_classes_reach_the_field(scorer: Scorer) -> None:
    model = tiny_field(2)
    y = torch.tensor([0, 1, 1])
    got = scorer.map(model, X1, y)
    close(got, scorer.expected(model, X1, y))
    assert not torch.equal(got, scorer.map(model, X1, 1 - y))
    with pytest.raises(ConfigError, match="conditional"):
        scorer.map(model, X1)


@every
def test_evaluations_are_what_is_evaluated(model: VelocityModel, scorer: Scorer) -> None:
    counting = Counting(model)
    scorer.map(counting, X1)  # type: ignore[arg-type]
    assert counting.calls == scorer.evaluations(model.config) == len(scorer.schedules(model.config))


@every
@pytest.mark.parametrize("predicts", ["data", "noise", "epsilon"])
def test_other_predictions_are_scored_or_refused(scorer: Scorer, predicts: str) -> None:
    model = tiny_field(pred_type=predicts)
    try:
        got = scorer.map(model, X1)
    except ConfigError as error:
        assert predicts in str(error), "the message says what the model predicts"
        with pytest.raises(ConfigError):
            scorer.evaluations(model.config)
    else:
        close(got, scorer.expected(model, X1))


@every
def test_it_exports_with_a_symbolic_batch(model: VelocityModel, scorer: Scorer) -> None:
    module = scorer.prepare(model).eval()
    tokens = to_tokens(X1)
    with torch.no_grad():
        program = torch.export.export(module, (tokens[:2],), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
        for batch in (1, 3):
            close(program.module()(tokens[:batch]), module(tokens[:batch]))


@every
def test_the_smallest_field_is_scored(scorer: Scorer) -> None:
    model = tiny_field(channels=1, hidden_size=8, num_heads=1)
    assert torch.isfinite(scorer.map(model, X1[:, :1])).all()
