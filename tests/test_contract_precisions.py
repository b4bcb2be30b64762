"""What every precision in `Precision` and every backbone in `Backbone` promises. A new entry is tested here without a
new test."""

from typing import get_args

import pytest
import torch
from models import tiny_frames, tiny_model

from flowad_fast.config import Backbone, Certified, Precision, grid_side
from flowad_fast.detector import Detector
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.export.formats import FORMATS
from flowad_fast.export.verify import TOLERANCES, compare, reference_outputs
from flowad_fast.stages.features import BACKBONES, FeatureExtractor
from flowad_fast.stages.scorers import SCORERS


def test_every_precision_has_a_tolerance_and_a_format() -> None:
    assert set(TOLERANCES) == set(get_args(Certified)) > set(get_args(Precision))
    assert {one.quantises for one in FORMATS.values()} - {None} == set(get_args(Certified)) - set(get_args(Precision))
    assert {precision for one in FORMATS.values() for precision in one.precisions} == set(get_args(Precision))


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_precision_stays_within_its_tolerance_or_is_refused(precision: Precision, kind: str) -> None:
    model, scorer, frames = tiny_model(depth=2), SCORERS[kind](), tiny_frames(4)
    try:
        detector = Detector.from_model(model, scorer, precision=precision)
    except EngineUnavailableError as error:
        assert precision in str(error) and len(str(error).splitlines()) == 1
        return
    got = detector(frames)
    # Of density, the reference is the scorer in float32, with the same probes.
    parity = compare(
        (got.map, got.raw_score), reference_outputs(model, scorer, "max", frames, None), "noise", precision, "here"
    )
    assert parity.passed, parity


def test_every_backbone_is_described() -> None:
    assert set(BACKBONES) == set(get_args(Backbone))


@pytest.mark.parametrize("name", get_args(Backbone))
def test_a_backbone_gives_its_channels_on_the_grid(name: str) -> None:
    side = 224  # of both 14 and 32 a multiple
    extractor = FeatureExtractor(name, size=side)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens = extractor(images)
    assert (
        tokens.shape == (2, grid_side(name, side) ** 2, sum(BACKBONES[name].channels)) and tokens.dtype == torch.float32
    )
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    torch.testing.assert_close(extractor(images[:1]), tokens[:1], atol=1e-4 * float(tokens.std()), rtol=1e-4)
