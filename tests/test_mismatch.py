"""The scorer of one evaluation: its definition, its identity with reconstruction, and its draws."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, photos, small_model

import flowad_fast
from flowad_fast import Mismatch, Reconstruction
from flowad_fast.errors import ConfigError
from flowad_fast.model import VelocityModel
from flowad_fast.reference_path import reference_map


def features(seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 6, 4, 4, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.std())


@pytest.mark.parametrize("tau", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("pred_type", ["velocity", "data", "noise"])
def test_it_is_the_sum_over_channels_as_defined(tiny: VelocityModel, tau: float, pred_type: str) -> None:
    model = VelocityModel(tiny.config.model_copy(update={"pred_type": pred_type}), tiny.dit)
    x1, scorer = features(), Mismatch(tau=tau, draws=3, seed=5)
    eps = scorer.draw(TINY)
    maps = []
    for one in eps:
        noise = one.transpose(1, 2).unflatten(2, (4, 4))
        velocity = model.velocity(tau * x1 + (1 - tau) * noise, tau)
        maps.append((x1 - noise - velocity).square().sum(1))
    assert error(scorer.map(model, x1), torch.stack(maps).mean(0)) < 1e-5
    assert error(reference_map(model, scorer, x1), torch.stack(maps).mean(0)) < 1e-5


def test_it_is_one_step_of_reconstruction_from_noise(tiny: VelocityModel) -> None:
    x1 = features()
    for tau, steps in ((0.5, 2), (0.75, 4)):
        one = Reconstruction(steps=steps, tau=tau, seed=3)
        assert one.evaluations(TINY) == 1
        assert error(one.map(tiny, x1), (1 - tau) ** 2 * Mismatch(tau=tau, seed=3).map(tiny, x1)) < 1e-5


def test_draws_are_averaged_and_the_first_is_that_of_one(tiny: VelocityModel) -> None:
    x1, scorer = features(), Mismatch(draws=4, seed=1)
    assert torch.equal(scorer.draw(TINY)[:1], Mismatch(seed=1).draw(TINY)) and scorer.evaluations(TINY) == 4
    assert not torch.equal(Mismatch(seed=1).draw(TINY), Mismatch(seed=2).draw(TINY))
    assert error(scorer.map(tiny, x1), Mismatch(seed=1).map(tiny, x1)) > 1e-3


def test_each_frame_is_evaluated_as_its_own_class_in_every_draw() -> None:
    model = small_model(classes=("bottle", "screw"))
    x1, y = model.features(photos(3)), torch.tensor([1, 0, 1])
    scorer = Mismatch(draws=2)
    each = torch.cat([scorer.map(model, x1[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert error(scorer.map(model, x1, y), each) < 1e-5
    assert error(scorer.map(model, x1, 1 - y), each) > 1e-3


def test_diffusion_models_have_none(tiny: VelocityModel) -> None:
    model = VelocityModel(tiny.config.model_copy(update={"pred_type": "epsilon"}), tiny.dit)
    with pytest.raises(ConfigError, match="mismatch needs a flow-matching model"):
        Mismatch().map(model, features())


def test_the_exported_graph_takes_any_batch(tiny: VelocityModel) -> None:
    module = Mismatch(draws=2).prepare(tiny)
    tokens = features(batch=2).flatten(2).transpose(1, 2).contiguous()
    with torch.no_grad():
        graph = torch.export.export(module, (tokens,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
        many = torch.cat([tokens, 2 * tokens, tokens])[:5]
        assert error(graph(many), module(many)) < 1e-5


def test_it_is_public_and_validated() -> None:
    assert flowad_fast.Mismatch is Mismatch and replace(Mismatch(), seed=4).seed == 4
    with pytest.raises(ValueError, match="tau"):
        Mismatch(tau=1.0)
