"""Tiny models of random weights, frames for them, and their exports: one builder for every test that needs any model.

A model looks at 64-pixel images through a 4x4 grid. Its backbone is `Means` unless a real one is asked for: the same
channels without a network, so that starting, tracing and compiling take a fraction of the time.
"""

import atexit
import functools
import tempfile
from collections.abc import Container, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

from flowad_fast.config import ImageConfig, ModelConfig, VelocityConfig
from flowad_fast.export.exporter import ExportResult, export_bundle
from flowad_fast.model import FlowModel, VelocityModel
from flowad_fast.stages.features import BACKBONES, FeatureExtractor
from flowad_fast.stages.scorers import Inversion
from flowad_fast.stages.velocity import DiT

IMAGE, GRID, CHANNELS = 64, 4, sum(BACKBONES["efficientnet-lite0"].channels)
PARTS = ("nut", "screw", "nail")
"""Class names of conditional models."""


class Means(FeatureExtractor):
    """Mean colours of each cell, repeated: a stand-in for a backbone."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, images: Tensor, ops: ModuleType | None = None) -> Tensor:
        """Images (B, 3, 64, 64) to X1 (B, 16, 192)."""
        return nn.functional.avg_pool2d(images, 16).repeat(1, CHANNELS // 3, 1, 1).flatten(2).transpose(1, 2)


def tiny_field(classes: int = 0, *, seed: int = 0, **velocity: object) -> VelocityModel:
    """A bare velocity field of random weights on (6, 4, 4).

    Args:
        classes: how many; 0 makes it unconditional.
        seed: of the weights.
        velocity: fields of its `VelocityConfig` that differ, e.g. `pred_type`.
    """
    torch.manual_seed(seed)
    fields: dict[str, object] = {"channels": 6, "height": GRID, "width": GRID, "hidden_size": 32, "depth": 1}
    fields |= {"num_heads": 2, "mlp_ratio": 2, "num_classes": max(classes, 1), "use_class_labels": classes > 0}
    config = VelocityConfig(**fields | velocity)  # type: ignore[arg-type]
    dit = DiT(config)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return VelocityModel(config, dit)


def tiny_model(classes: int = 0, *, real_backbone: bool = False, seed: int = 0, **velocity: object) -> FlowModel:
    """As `tiny_field`, with features of 64-pixel images, classes named as in `PARTS`.

    Args:
        classes: see `tiny_field`.
        real_backbone: EfficientNet-Lite0 (random weights) instead of `Means`, which cannot be saved.
        seed: see `tiny_field`.
        velocity: see `tiny_field`.
    """
    field = tiny_field(classes, seed=seed, channels=CHANNELS, **velocity)
    image = ImageConfig(size=IMAGE)
    spec = ModelConfig(velocity=field.config, backbone="efficientnet-lite0", image=image, class_names=PARTS[:classes])
    return FlowModel(spec, field.dit, FeatureExtractor("efficientnet-lite0") if real_backbone else Means())


def tiny_frames(count: int, height: int = IMAGE, width: int = IMAGE, seed: int = 0) -> np.ndarray:
    """Noise around a colour of their own, uint8 (count, height, width, 3)."""
    random = np.random.RandomState(seed)
    colours = random.randint(40, 216, (count, 1, 1, 3))
    return np.clip(colours + random.randint(-40, 40, (count, height, width, 3)), 0, 255).astype(np.uint8)


@functools.cache
def exported(name: str, classes: int = 0) -> tuple[FlowModel, ExportResult]:
    """A model and its bundle of one format, made once per test run for this machine; look, do not change it."""
    model = tiny_model(classes, real_backbone=name == "eager")
    folder = tempfile.TemporaryDirectory(prefix="flowad-contract-")
    atexit.register(folder.cleanup)
    target, frames = Path(folder.name) / "bundle", tiny_frames(4)
    return model, export_bundle(model, Inversion(), target, formats=(name,), frames=frames, device="auto", quiet=True)


def entries(registry: Iterable[str], slow: Container[str] = (), long: Container[str] = ()) -> list[ParameterSet]:
    """The names of a registry as test parameters: a C++ compiler takes a minute for those in `slow`, `long` seconds."""
    marks = {name: [mark for mark, names in (("slow", slow), ("long", long)) if name in names] for name in registry}
    return [pytest.param(name, marks=[getattr(pytest.mark, mark) for mark in marks[name]]) for name in registry]
