"""What a precision costs, layer by layer: each linear layer's error against float32 on real frames."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flowad_fast.config import Precision
from flowad_fast.model import FlowModel
from flowad_fast.stages.integration import run
from flowad_fast.stages.linear import Fp8Linear, make_linear
from flowad_fast.stages.scorers import Inversion


@dataclass(frozen=True)
class LinearError:
    """One linear layer on the activations that it sees in float32.

    Attributes:
        name: embed, blocks.<i>.{qkv,proj,fc1,fc2} or head.
        arithmetic: what was measured, e.g. "fp8 (emulated on cpu)" or, for a layer that fp8 keeps, "bf16".
        rms: root mean square of the output's error, relative to the output's own.
        worst: largest error of an element, relative to the output's rms.
    """

    name: str
    arithmetic: str
    rms: float
    worst: float


def linear_report(
    model: FlowModel,
    frames: np.ndarray,
    classes: list[str | int] | None = None,
    precision: Precision = "fp8",
    steps: int = 3,
) -> list[LinearError]:
    """Each layer's error in `precision` over the steps of an inversion, in the order of the network.

    Layers that hurt can be kept: `VelocityConfig.keep_bf16` holds name patterns.

    Args:
        model: a trained model.
        frames: uint8 (B, H, W, 3), real ones; activations of random data say little.
        classes: class of each frame, for conditional models.
        precision: that is compared with fp32.
        steps: of the inversion.
    """
    rows = Inversion(steps=steps).rows(model.config)
    field = model.at(tuple(row.t for row in rows))
    layers = {name: m for name, m in field.named_modules() if hasattr(m, "quantised")}
    cheap = {
        name: make_linear(name, layer.weight, layer.bias, precision, model.config.keep_bf16)
        for name, layer in layers.items()
    }
    sums = {name: [0.0, 0.0, 0.0, 0] for name in layers}

    def observe(name: str) -> "torch.utils.hooks.RemovableHandle":
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            error = (cheap[name](inputs[0]).float() - out).abs()
            total = sums[name]
            total[0] += float(error.square().sum(dtype=torch.float64))
            total[1] += float(out.square().sum(dtype=torch.float64))
            total[2] = max(total[2], float(error.max()))
            total[3] += out.numel()

        return layers[name].register_forward_hook(hook)

    handles = [observe(name) for name in layers]
    try:
        y = model.check_classes(model.class_indices(classes, len(frames)), len(frames))
        with torch.no_grad():
            for i in range(len(frames)):
                x1 = model.features(frames[i : i + 1]).flatten(2).transpose(1, 2)
                run(field, rows, x1, None if y is None else y[i : i + 1])
    finally:
        for handle in handles:
            handle.remove()
    return [
        LinearError(name, _arithmetic(cheap[name], precision), (wrong / right) ** 0.5, worst / (right / count) ** 0.5)
        for name, (wrong, right, worst, count) in sums.items()
    ]


def _arithmetic(layer: nn.Module, precision: Precision) -> str:
    if precision != "fp8":
        return precision
    if not isinstance(layer, Fp8Linear):
        return "bf16"
    return "fp8 (emulated on cpu)" if layer.weight.device.type == "cpu" else "fp8"
