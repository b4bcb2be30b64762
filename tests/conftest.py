"""Fixtures that several test files share. Golden cases lie in tests/golden (see its README)."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flowad_fast
from flowad_fast.config import ModelConfig, VelocityConfig
from flowad_fast.model import FlowModel, VelocityModel
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.stages.velocity import DiT

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))


LONG = (
    "test_export", "test_export_cli", "test_export_samples", "test_tensorrt", "test_aoti", "test_onnx", "test_fuzz",
    "test_kernels_interpreter", "test_kernels_compiled", "test_bench", "test_demo", "test_onnxruntime",
    "test_training", "test_triton_server", "test_docs", "test_method", "test_fast_engines", "test_inspect",
    "test_line_policy", "test_line_command", "test_line_scoring",
    "test_serve_protocol", "test_serve_refusals", "test_serve_limits", "test_serve_fuzz",
    "test_serve_ray", "test_serve_cluster",
)  # fmt: skip
"""Files of tests that build, compile, train or start processes: `make quick` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in LONG:
            item.add_marker(pytest.mark.long)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; there is none here"))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


TINY = VelocityConfig(channels=6, height=4, width=4, hidden_size=32, depth=2, num_heads=2, mlp_ratio=2)
"""The field of the golden cases `dit_tiny` and `density_tiny`."""


@pytest.fixture(scope="session")
def tiny() -> VelocityModel:
    return flowad_fast.load_velocity(GOLDEN / "dit_tiny_ckpt.pth", TINY)


def class_state() -> dict[str, torch.Tensor]:
    """The network of the golden case `dit_class`, under its plain names."""
    import weights

    config = VelocityConfig(
        channels=272, height=16, width=16, hidden_size=128, depth=3, num_heads=4, num_classes=15,
        class_dropout_prob=0.1, use_class_labels=True,
    )  # fmt: skip
    state = weights.fill(DiT(config).state_dict())
    return state | weights.fill({"x_embedder_linear.weight": torch.zeros(128, 272)})


def as_training_saves(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """A FlowAD checkpoint of distributed training: prefixed, every tensor of the network twice."""
    model = {f"module.model.{key}": value for key, value in state.items()}
    return {"epoch": 1, "model": model | {f"module.solver.velocity_model.{key}": v for key, v in state.items()}}


@pytest.fixture(scope="session")
def class_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt_best.pth"
    torch.save(as_training_saves(class_state()), path)
    return path


@pytest.fixture(scope="session")
def class_model(class_checkpoint: Path) -> FlowModel:
    return flowad_fast.load_checkpoint(class_checkpoint, GOLDEN / "dit_class.yaml")


def small_model(image_size: int = 64, classes: tuple[str, ...] = (), seed: int = 0) -> FlowModel:
    """A random detector model that is quick to run: Lite0 features of 64-pixel images, a small DiT."""
    import weights

    torch.manual_seed(seed)
    grid = image_size // 16
    velocity = VelocityConfig(
        channels=192, height=grid, width=grid, hidden_size=32, depth=2, num_heads=2, mlp_ratio=2,
        num_classes=max(1, len(classes)), use_class_labels=bool(classes),
    )  # fmt: skip
    dit = DiT(velocity)
    dit.load_state_dict(weights.fill(dit.state_dict()))
    extractor = FeatureExtractor("efficientnet-lite0", normalise=True)
    extractor.backbone.load_state_dict(weights.fill(extractor.backbone.state_dict()))
    spec = ModelConfig(
        velocity=velocity, backbone="efficientnet-lite0", image={"size": image_size}, feature_normalisation=True,
        class_names=classes,
    )  # fmt: skip
    model = FlowModel(spec, dit, extractor)
    x1 = model.features(photos(4, image_size))  # statistics, so that X1 is of order one as after training
    extractor.mean.copy_(x1.mean((0, 2, 3)))
    extractor.std.copy_(x1.std((0, 2, 3)).clamp_min(1e-3))
    return model


def photos(count: int = 2, size: int = 64, seed: int = 7) -> np.ndarray:
    """Frames (count, size, size, 3) uint8: smooth gradients plus noise."""
    import weights

    return weights.images(count, size, seed)
