"""DINOv2 as a backbone: its grid, its weights, its positions, in training, in a bundle, and where it is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from models import tiny_frames

from flowad_fast.checkpoints import backbones
from flowad_fast.checkpoints.load import load_checkpoint, save_checkpoint
from flowad_fast.config import ModelConfig, VelocityConfig, grid_side, parse
from flowad_fast.detector import Detector, load
from flowad_fast.errors import CheckpointError, ConfigError
from flowad_fast.export.exporter import export_bundle
from flowad_fast.model import FlowModel
from flowad_fast.stages import features
from flowad_fast.stages.features import BACKBONES, FeatureExtractor, load_backbone_weights
from flowad_fast.stages.scorers import Inversion
from flowad_fast.stages.velocity import DiT

SIDE, SIZE = 4, 56
"""A 4x4 grid of 14-pixel patches."""


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks instead of twelve: the same code, in a sixth of the time."""
    create = timm.create_model

    def create_shallow(name: str, **options: Any) -> Any:
        return create(name, **options | ({"depth": 2} if "dinov2" in name else {}))

    monkeypatch.setattr(features.timm, "create_model", create_shallow)


def spec_of(size: int = SIZE, side: int = SIDE) -> ModelConfig:
    velocity = {"channels": 384, "height": side, "width": side, "hidden_size": 32, "depth": 1, "num_heads": 2}
    return parse(ModelConfig, {"velocity": velocity, "backbone": "dinov2-small", "image": {"size": size}}, "spec")


def dino_model() -> FlowModel:
    torch.manual_seed(0)
    spec = spec_of()
    dit = DiT(spec.velocity)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return FlowModel(spec, dit, FeatureExtractor(spec.backbone, size=SIZE))


def whole_network(size: int = 70) -> dict[str, torch.Tensor]:
    """timm's whole network at another size than the features', with the original's extra entry."""
    torch.manual_seed(1)
    network = features.timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=size)
    return network.state_dict() | {"mask_token": torch.zeros(1, 384)}


@pytest.mark.parametrize(("name", "channels"), [("dinov2-small", 384), ("dinov2-base", 768)])
def test_a_224_pixel_image_gives_the_grid_of_published_models(name: str, channels: int) -> None:
    assert sum(BACKBONES[name].channels) == channels and grid_side(name, 224) == 16
    with torch.no_grad():
        assert FeatureExtractor(name)(torch.zeros(1, 3, 224, 224)).shape == (1, 256, channels)


def test_features_are_the_patch_tokens_of_the_last_block() -> None:
    state = whole_network(SIZE)
    extractor = FeatureExtractor("dinov2-small", size=SIZE)
    load_backbone_weights(extractor, state, "weights.pth")
    network = features.timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=SIZE).eval()
    network.load_state_dict({key: value for key, value in state.items() if key != "mask_token"})
    network.norm = torch.nn.Identity()
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(extractor(images), network.forward_features(images)[:, 1:], rtol=1e-4, atol=1e-5)


def test_positions_are_resampled_to_the_grid() -> None:
    state = whole_network(70)
    ramp = torch.arange(5.0)[:, None].expand(5, 5).reshape(1, 25, 1)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 384), 9.0), ramp.expand(1, 25, 384)], 1)
    extractor = FeatureExtractor("dinov2-small", size=SIZE)
    load_backbone_weights(extractor, state, "weights.pth")
    got = extractor.backbone.state_dict()["model.pos_embed"][0, :, 0]
    rows = got[1:].view(SIDE, SIDE)
    assert got[0] == 9 and torch.equal(rows[:, 0], rows[:, 3])
    # Bicubic keeps a ramp's values away from its ends: row centres 0.125, 1.375, 2.625, 3.875 of 5.
    torch.testing.assert_close(rows[1:3, 0], torch.tensor([1.375, 2.625]), rtol=0, atol=0.05)


def test_wrong_weights_are_named() -> None:
    state = whole_network()
    del state["blocks.1.attn.qkv.weight"]
    with pytest.raises(CheckpointError, match=r"w.pth: not the weights of dinov2-small: missing .*blocks.1.attn.qkv"):
        load_backbone_weights(FeatureExtractor("dinov2-small", size=SIZE), state, "w.pth")


def test_without_weights_timm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, pretrained: bool) -> Any:
        assert name == "vit_base_patch14_dinov2.lvd142m" and pretrained
        raise OSError("no network")

    monkeypatch.setattr(backbones.timm, "create_model", fails)
    with pytest.raises(CheckpointError, match="vit_base_patch14_dinov2.lvd142m cannot be downloaded.*backbone_weights"):
        backbones._default("dinov2-base")


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="image size 256 is not a multiple of 14.*take 252, or 224"):
        spec_of(256, 16)
    with pytest.raises(ConfigError, match="a 56-pixel image gives a 4² grid, not 3x3"):
        spec_of(SIZE, 3)
    assert VelocityConfig(**spec_of().velocity.model_dump()).tokens == SIDE**2


def test_own_checkpoint_stands_alone(tmp_path: Path) -> None:
    model = dino_model()
    save_checkpoint(model, tmp_path / "a.safetensors", include_backbone=True)
    again = load_checkpoint(tmp_path / "a.safetensors")
    frames = tiny_frames(2)
    torch.testing.assert_close(again.features(frames), model.features(frames), rtol=0, atol=0)
    weights = tmp_path / "vits14.pth"
    torch.save(whole_network(), weights)
    other = load_checkpoint(tmp_path / "a.safetensors", backbone_weights=weights)
    assert not torch.equal(other.features(frames), model.features(frames))


def test_a_bundle_scores_as_the_model_at_any_batch(tmp_path: Path) -> None:
    model, scorer, frames = dino_model(), Inversion(steps=2), tiny_frames(5)
    result = export_bundle(
        model, scorer, tmp_path / "bundle", formats=("onnx",), frames=frames[:4], device="cpu", quiet=True
    )
    assert result.ok
    want = Detector.from_model(model, scorer, engine="eager", device="cpu")(frames).score
    detector = load(tmp_path / "bundle")
    for batch in (frames, frames[:1]):
        np.testing.assert_allclose(detector(batch).score, want[: len(batch)], rtol=1e-3)
