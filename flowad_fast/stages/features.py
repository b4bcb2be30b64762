"""Stage 2: a frozen timm backbone, the pyramid gather, and the optional feature normalisation: images to X1."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowad_fast.errors import CheckpointError
from flowad_fast.kernels import reference
from flowad_fast.kernels.operators import Operators


@dataclass(frozen=True)
class BackboneSpec(ABC):
    """What this project knows about a backbone.

    Attributes:
        timm_name: timm's name.
        trained: timm's name of its weights.
        channels: of the stages that the features are made of.
        outblocks: the flat blocks whose outputs these are, as training configurations name them; () for transformers.
    """

    timm_name: str
    trained: str
    channels: tuple[int, ...]
    outblocks: tuple[int, ...] = ()

    @abstractmethod
    def build(self, size: int) -> nn.Module:
        """The network without weights: images (B, 3, size, size) to the list of its stages, (B, C_i, h_i, w_i)."""

    @abstractmethod
    def named(self, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole network's weights under the names, and in the sizes, of the built one's (`wanted`)."""


@dataclass(frozen=True)
class EfficientNet(BackboneSpec):
    """Four stages at strides 2, 4, 8 and 16, cut after the last block that the features need.

    Attributes:
        stage_sizes: blocks per stage, for mapping flat block numbers.
        padded: depthwise convolutions (stage, block) that pad as their reference does, by half a kernel on each side.
    """

    stage_sizes: tuple[int, ...] = ()
    padded: tuple[tuple[int, int], ...] = ()

    def build(self, size: int) -> nn.Module:
        """See `BackboneSpec`; any size."""
        network: Any = timm.create_model(self.timm_name, features_only=True, out_indices=(0, 1, 2, 3), pretrained=False)
        network.blocks = network.blocks[:5]
        for stage, block in self.padded:
            inner = network.blocks[stage][block]
            old = inner.conv_dw
            inner.conv_dw = nn.Conv2d(
                old.in_channels, old.out_channels, old.kernel_size, stride=old.stride,
                padding=old.kernel_size[0] // 2, groups=old.groups, bias=False,
            )  # fmt: skip
        return network

    def named(self, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """EfficientNet-PyTorch's names to timm's, which pass through."""
        if not any(key.startswith("_conv_stem") for key in state):
            return state
        place = [(s, j) for s, size in enumerate(self.stage_sizes) for j in range(size)]
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


@dataclass(frozen=True)
class VisionTransformer(BackboneSpec):
    """One stage: the patch tokens after the last block, before the final normalisation."""

    def build(self, size: int) -> nn.Module:
        """See `BackboneSpec`; the position embedding is that of this size."""
        options: dict[str, Any] = {"features_only": True, "out_indices": (-1,), "img_size": size}
        network: nn.Module = timm.create_model(self.timm_name, pretrained=False, **options)
        return network

    def named(self, state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's and the original names, which are the same; positions are resampled to the grid of `wanted`."""
        if "model.cls_token" not in state:
            state = {f"model.{key}": value for key, value in state.items()}
        key = "model.pos_embed"
        if key in state and state[key].ndim == 3:
            state = state | {key: _resampled(state[key], wanted[key].shape[1])}
        return state


def _resampled(positions: Tensor, tokens: int) -> Tensor:
    """A square grid's position embedding (1, 1 + n², C), class token first, for another grid: (1, tokens, C).

    Bicubic without antialias, as the code of published models does. Other embeddings are given back as they are.
    """
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(tokens - 1)
    if old == new or old**2 != positions.shape[1] - 1:
        return positions
    grid = positions[:, 1:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)


BACKBONES: dict[str, BackboneSpec] = {
    "efficientnet-b4": EfficientNet(
        "tf_efficientnet_b4",
        "aa_in1k",
        (24, 32, 56, 160),
        (1, 5, 9, 21),
        (2, 4, 4, 6, 6, 8, 2),
        # The reference fixes its "same" padding for 380-pixel inputs. At 256 pixels only this stride-2 5x5
        # convolution differs from timm's padding for the actual size; every trained model has learned (2, 2).
        padded=((2, 0),),
    ),
    "efficientnet-lite0": EfficientNet(
        "tf_efficientnet_lite0", "in1k", (16, 24, 40, 112), (0, 2, 4, 10), (1, 2, 2, 3, 3, 4, 1)
    ),
    "dinov2-small": VisionTransformer("vit_small_patch14_dinov2", "lvd142m", (384,)),
    "dinov2-base": VisionTransformer("vit_base_patch14_dinov2", "lvd142m", (768,)),
}
"""By name, see `config.Backbone`."""
STRIDES = (2, 4, 8, 16)
"""Of the stages of an EfficientNet."""


class FeatureExtractor(nn.Module):
    """Images (B, 3, s, s) float32, normalised, to X1 as tokens (B, h*w, C) float32.

    h and w are `config.grid_side`; `size` is s, for backbones whose weights depend on it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, normalise: bool = False, size: int = 224) -> None:
        super().__init__()
        self.name = name
        self.backbone = BACKBONES[name].build(size)
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
        tokens = ops.pyramid_gather(self.backbone(images), torch.float32)
        return (tokens - self.mean) / self.std if self.normalise else tokens


def fold_batch_norms(network: nn.Module) -> None:
    """Put the batch norms of a network that only infers into the convolutions before them, in place.

    A batch norm is y = a x + b with a, b of its own; with a in the convolution's weights and b as its bias, a pass over
    the activations goes. What a batch norm does afterwards (timm's have an activation) stays. Parameters are replaced,
    never written, so a network that shares them stays as it is.
    """
    for parent in list(network.modules()):
        convolution: nn.Conv2d | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                convolution = child
            elif isinstance(child, nn.BatchNorm2d) and convolution is not None:
                scale, shift = affine(child)
                bias = shift if convolution.bias is None else shift + scale * convolution.bias
                weight = convolution.weight * scale[:, None, None, None]
                convolution.weight = nn.Parameter(weight, requires_grad=False)
                convolution.bias = nn.Parameter(bias, requires_grad=False)
                setattr(parent, name, getattr(child, "act", nn.Identity()))
                convolution = None


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and summand per channel of a batch norm that only infers."""
    assert norm.running_mean is not None and norm.running_var is not None and not norm.training
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - scale * norm.running_mean


def load_backbone_weights(extractor: FeatureExtractor, state: dict[str, Tensor], source: str) -> None:
    """Fill the backbone from a whole network's state dict in either naming; later blocks and the head are ignored.

    Raises:
        CheckpointError: a tensor that the features need is missing, of another shape, or not finite.
    """
    wanted = extractor.backbone.state_dict()
    try:
        state = BACKBONES[extractor.name].named(state, wanted)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{source}: not the weights of {extractor.name} (unexpected block {error})") from None
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
