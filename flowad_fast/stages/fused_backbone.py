"""An EfficientNet for inference on a GPU: channels-last, batch norms folded, three or four launches per block.

Each convolution is one operator with its bias, activation and residual, and the means that squeeze-excite needs come
out of the depthwise one. So an activation is written once and read once or twice, where separate passes for batch norm,
activation, mean, gate and sum move it six times. `operators` are those of `kernels.reference` or `kernels.fused`.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowad_fast.kernels.operators import Operators
from flowad_fast.stages.features import FeatureExtractor, affine

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Identity: "none", nn.SiLU: "silu", nn.ReLU6: "relu6"}


class _Convolution(nn.Module):
    """Weights (in the layout that `lay` makes of (N, C, k, k)), bias and activation of a convolution and its norm."""

    weight: Tensor
    bias: Tensor

    def __init__(self, convolution: Any, norm: Any, dtype: torch.dtype, lay: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        scale, shift = affine(norm)
        self.register_buffer("weight", lay(convolution.weight * scale[:, None, None, None]).contiguous().to(dtype))
        self.register_buffer("bias", shift.float())
        self.activation = _ACTIVATIONS[type(norm.act)]
        self.stride: int = convolution.stride[0]
        self.size: int = convolution.kernel_size[0]
        # timm pads "same" for the size that comes where this depends on it, else by a constant.
        self.padding = int(convolution.padding[0]) if type(convolution) is nn.Conv2d else None

    def before(self, side: int) -> int:
        """Rows of zeros above an image of `side` rows."""
        if self.padding is not None:
            return self.padding
        return max((-(-side // self.stride) - 1) * self.stride + self.size - side, 0) // 2


class _SqueezeExcite(nn.Module):
    """Weights of the two small layers of a squeeze-excite."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(module.gate, nn.Sigmoid), "EfficientNets have sigmoid gates"
        for number, one in (("1", module.conv_reduce), ("2", module.conv_expand)):
            self.register_buffer(f"w{number}", one.weight.flatten(1).clone().to(dtype))
            self.register_buffer(f"b{number}", one.bias.clone().float())
        self.activation = _ACTIVATIONS[type(module.act1)]


class _Block(nn.Module):
    """Expansion (not in the first stage), depthwise convolution, squeeze-excite (not in every network), projection."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        deep = hasattr(block, "conv_pwl")
        depthwise, projection = (block.bn2, block.bn3) if deep else (block.bn1, block.bn2)
        self.expand = _Convolution(block.conv_pw, block.bn1, dtype, _matrix) if deep else None
        self.depthwise = _Convolution(block.conv_dw, depthwise, dtype, lambda w: w[:, 0].permute(1, 2, 0))
        self.excite = None if isinstance(block.se, nn.Identity) else _SqueezeExcite(block.se, dtype)
        self.project = _Convolution(block.conv_pwl if deep else block.conv_pw, projection, dtype, _matrix)
        self.has_skip: bool = block.has_skip

    def forward(self, x: Tensor, ops: Operators) -> Tensor:
        """(B, H, W, C) to (B, H', W', C')."""
        y = x
        if self.expand is not None:
            y = ops.pointwise(x, self.expand.weight, self.expand.bias, self.expand.activation)
        conv, excite = self.depthwise, self.excite
        before = conv.before(y.shape[1])
        y, sums = ops.depthwise(y, conv.weight, conv.bias, conv.stride, before, conv.activation, excite is not None)
        gate = None
        if excite is not None:
            pixels = y.shape[1] * y.shape[2]
            gate = ops.squeeze_excite(sums, pixels, excite.w1, excite.b1, excite.w2, excite.b2, excite.activation)
        out = self.project
        return ops.pointwise(y, out.weight, out.bias, out.activation, gate, x if self.has_skip else None)


class FusedEfficientNet(nn.Module):
    """Images (B, 3, s, s), normalised, to the stages of a timm EfficientNet, each a view (B, C_i, h_i, w_i) of NHWC.

    Args:
        network: timm's, cut after the last stage that is needed, for inference.
        ops: namespace of operators.
        dtype: of weights and activations; sums are float32.
    """

    def __init__(self, network: Any, ops: Operators, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.ops = ops
        with torch.no_grad():
            self.stem = _Convolution(network.conv_stem, network.bn1, dtype, lambda w: w.permute(0, 2, 3, 1))
            stages = (nn.ModuleList(_Block(block, dtype) for block in stage) for stage in network.blocks)
            self.stages = nn.ModuleList(stages)
        # timm counts the stem's output as stage 0.
        self.given = tuple(i - 1 for i in network._stage_out_idx)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """See the class."""
        stem = self.stem
        x = self.ops.stem(images, stem.weight, stem.bias, stem.stride, stem.before(images.shape[-1]), stem.activation)
        given = []
        for i, stage in enumerate(self.stages):
            for block in cast(nn.ModuleList, stage):
                x = block(x, self.ops)
            if i in self.given:
                given.append(x.permute(0, 3, 1, 2))
        return given


def with_fused_backbone(extractor: FeatureExtractor, ops: Operators, dtype: torch.dtype) -> FeatureExtractor:
    """The extractor with a `FusedEfficientNet` in place of its network; itself where that is of another kind.

    Everything else is shared, and the one given stays as it is.
    """
    if not hasattr(extractor.backbone, "conv_stem"):
        return extractor
    fused = copy.copy(extractor)
    fused._modules = dict(extractor._modules)
    fused.backbone = FusedEfficientNet(extractor.backbone, ops, dtype)
    return fused


def _matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight (N, C, 1, 1) as (N, C)."""
    return weight.flatten(1)
