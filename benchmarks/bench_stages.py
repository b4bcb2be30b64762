"""pytest-benchmark suite of the stages of a detection, frames to score, on the small preset; synchronised inside.

pytest benchmarks/bench_stages.py [--benchmark-compare]
"""

from typing import Any

import pytest
import torch

from flowad_fast.benchmarks.bench_kernels import CUDA, DEVICE, synchronised
from flowad_fast.benchmarks.cases import PRESETS, Case, make_frames, random_model, scorer_options
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.stages.image import normalise
from flowad_fast.stages.integration import to_tokens
from flowad_fast.stages.score import image_score

BATCH = 32 if CUDA else 1


@pytest.fixture(scope="module")
def model() -> FlowModel:
    """The small preset on this machine's device."""
    spec = PRESETS["small"].spec
    assert spec is not None, "small is a random preset"
    return random_model(spec, DEVICE)


@pytest.fixture(scope="module")
def frames(model: FlowModel) -> torch.Tensor:
    """Frames uint8 (B, 256, 256, 3) on the device."""
    case = Case("small", scorer_options("inversion", 3, 1), "eager")
    return torch.from_numpy(make_frames(case, BATCH, model.spec.image.size)[0]).to(DEVICE)


def _classes(model: FlowModel) -> torch.Tensor:
    return torch.arange(BATCH, device=DEVICE) % model.config.num_classes


def test_image(benchmark: Any, model: FlowModel, frames: torch.Tensor) -> None:
    """Resize and normalise."""
    result = benchmark(synchronised, normalise, frames, model.spec.image)
    assert result.shape == (BATCH, 3, 256, 256)


def test_features(benchmark: Any, model: FlowModel, frames: torch.Tensor) -> None:
    """Backbone and pyramid gather."""
    images = normalise(frames, model.spec.image)
    with torch.inference_mode():
        result = benchmark(synchronised, model.backbone, images)
    assert torch.isfinite(result).all()


def test_velocity(benchmark: Any, model: FlowModel, frames: torch.Tensor) -> None:
    """One function evaluation of the inference form."""
    tokens, field = to_tokens(model.features(frames)), model.at((1.0,))
    with torch.inference_mode():
        result = benchmark(synchronised, field, tokens, 0, _classes(model))
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("kind", ("inversion", "reconstruction", "density"))
def test_scorer(benchmark: Any, model: FlowModel, frames: torch.Tensor, kind: str) -> None:
    """Features to map; density with one probe."""
    scorer = Case("small", scorer_options(kind, 3, 1), "eager").make_scorer()
    tokens, prepared = to_tokens(model.features(frames)), scorer.prepare(model)
    with torch.inference_mode():
        result = benchmark(synchronised, prepared, tokens, _classes(model))
    assert torch.isfinite(result).all()


def test_decision(benchmark: Any, model: FlowModel) -> None:
    """Upsampling and image score."""
    cells = torch.rand(BATCH, 16, 16, device=DEVICE)
    result = benchmark(synchronised, lambda: image_score(ops.upsample(cells, 256), "max"))
    assert result.shape == (BATCH,)
