"""Stage 2: a frozen timm backbone, the pyramid gather, and the optional feature normalisation: images to X1."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from flowad_fast.errors import CheckpointError
from flowad_fast.kernels import reference
from flowad_fast.kernels.operators import Operators


@dataclass(frozen=True)
class BackboneSpec:
    """What this project knows about a backbone.

    Attributes:
        timm_name: timm's name.
        channels: of the four stages that the features are made of.
        outblocks: the flat blocks whose outputs these are, as training configurations name them.
        stage_sizes: blocks per stage, for mapping flat block numbers.
        padded: depthwise convolutions (stage, block) that pad as their reference does, by half a kernel on each side.
    """

    timm_name: str
    channels: tuple[int, ...]
    outblocks: tuple[int, ...]
    stage_sizes: tuple[int, ...]
    padded: tuple[tuple[int, int], ...] = ()


BACKBONES: dict[str, BackboneSpec] = {
    "efficientnet-b4": BackboneSpec(
        "tf_efficientnet_b4",
        (24, 32, 56, 160),
        (1, 5, 9, 21),
        (2, 4, 4, 6, 6, 8, 2),
        # The reference fixes its "same" padding for 380-pixel inputs. At 256 pixels only this stride-2 5x5
        # convolution differs from timm's padding for the actual size; every trained model has learned (2, 2).
        padded=((2, 0),),
    ),
    "efficientnet-lite0": BackboneSpec(
        "tf_efficientnet_lite0", (16, 24, 40, 112), (0, 2, 4, 10), (1, 2, 2, 3, 3, 4, 1)
    ),
}
"""By name, see `config.Backbone`."""
STRIDES = (2, 4, 8, 16)


class FeatureExtractor(nn.Module):
    """Images (B, 3, s, s) float32, normalised, to X1 as tokens (B, (s/16)², C) float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, normalise: bool = False) -> None:
        super().__init__()
        self.name = name
        self.backbone = build_backbone(name)
        channels = sum(BACKBONES[name].channels)
        self.normalise = normalise
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, ops: Operators = reference) -> Tensor:
        """See the class; `ops` is the namespace of operators."""
        if not torch.compiler.is_exporting():  # engines lay their own graphs out
            # Depthwise convolutions want channels last; on a CPU it takes a quarter off the backbone's time.
            images = images.contiguous(memory_format=torch.channels_last)
        tokens = ops.pyramid_gather(self.backbone(images))
        return (tokens - self.mean) / self.std if self.normalise else tokens


def build_backbone(name: str) -> nn.Module:
    """The backbone without weights, cut after the last block that the features need."""
    spec = BACKBONES[name]
    backbone: Any = timm.create_model(spec.timm_name, features_only=True, out_indices=(0, 1, 2, 3), pretrained=False)
    backbone.blocks = backbone.blocks[:5]
    for stage, block in spec.padded:
        inner = backbone.blocks[stage][block]
        old = inner.conv_dw
        inner.conv_dw = nn.Conv2d(
            old.in_channels, old.out_channels, old.kernel_size, stride=old.stride,
            padding=old.kernel_size[0] // 2, groups=old.groups, bias=False,
        )  # fmt: skip
    return backbone


def to_timm_names(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """EfficientNet-PyTorch names to timm's; state dicts in timm's own naming pass through."""
    if not any(key.startswith("_conv_stem") for key in state):
        return state
    spec = BACKBONES[name]
    place = [(s, j) for s, size in enumerate(spec.stage_sizes) for j in range(size)]
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    common = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    renamed = {}
    for key, tensor in state.items():
        head, *rest = key.split(".")
        if head == "_blocks":
            stage, j = place[int(rest[0])]
            part = ((first if stage == 0 else later) | common)[rest[1]]
            renamed[f"blocks.{stage}.{j}.{part}.{rest[2]}"] = tensor
        else:
            stem = {"_conv_stem": "conv_stem", "_bn0": "bn1"}.get(head)
            if stem:
                renamed[f"{stem}.{rest[0]}"] = tensor
    return renamed


def load_backbone_weights(extractor: FeatureExtractor, state: dict[str, Tensor], source: str) -> None:
    """Fill the backbone from a whole network's state dict in either naming; later blocks and the head are ignored.

    Raises:
        CheckpointError: a tensor that the features need is missing, of another shape, or not finite.
    """
    try:
        state = to_timm_names(state, extractor.name)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{source}: not the weights of {extractor.name} (unexpected block {error})") from None
    wanted = extractor.backbone.state_dict()
    problems = [f"missing {key}" for key in wanted if key not in state and "num_batches" not in key]
    problems += [
        f"{key}: shape {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems += [f"{key}: not finite" for key in wanted if key in state and not torch.isfinite(state[key]).all()]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source}: not the weights of {extractor.name}: {'; '.join(problems[:3])}{more}")
    extractor.backbone.load_state_dict({key: state.get(key, wanted[key]) for key in wanted})
