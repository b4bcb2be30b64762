"""Stage 1: uint8 frames to the backbone's normalised input."""

import torch
from torch import Tensor

from flowad_fast.config import ImageConfig


def resize_weights(source: int | torch.SymInt | Tensor, target: int, device: torch.device | None = None) -> Tensor:
    """Antialiased bilinear resampling of one axis as a matrix, (target, source), rows summing to 1.

    The triangle filter widens with the reduction, which is what PIL's bilinear resize does (and so what the training
    code saw). As two matrix products the resize runs on every backend, at any frame size, inside an exported graph.
    """
    scale = source / target
    # The maximum is taken of integers: Inductor truncates a symbolic maximum of floats to an integer.
    support = torch.sym_max(source, target) / target
    centre = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * scale
    pixel = torch.arange(source, device=device, dtype=torch.float32) + 0.5  # type: ignore[arg-type]
    weights = (1 - (pixel[None] - centre[:, None]).abs() / support).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


FRAME_BY_FRAME = 1 << 24
"""Batches of more values than this are resized one frame at a time: only one frame is float32 at full size."""


def normalise(frames: Tensor, config: ImageConfig) -> Tensor:
    """Frames (B, H, W, 3) uint8 to the backbone's input (B, 3, size, size) float32.

    Resize (bilinear, antialiased), /255, ImageNet-style normalisation; agrees with a PIL resize to about 1/255, the
    rounding that PIL does between its passes.
    """
    batch, height, width, _ = sizes = frames.shape
    # In a graph with symbolic sizes there is one path for all; there the caller's batch bounds the memory.
    if all(isinstance(size, int) for size in sizes) and batch > 1 and frames.numel() > FRAME_BY_FRAME:
        return torch.cat([normalise(frame, config) for frame in frames.split(1)])
    x = frames.float()  # cast first: TensorRT accepts uint8 only as the input of a cast
    if not isinstance(height, int) or height != config.size:  # a symbolic size stays general in an exported graph
        # Rows first, with the channels still inside a row: the frame is not transposed at its full size.
        rows = resize_weights(height, config.size, x.device) @ x.flatten(2)
        x = rows.unflatten(2, (width, 3))
    x = x.permute(0, 3, 1, 2)
    if not isinstance(width, int) or width != config.size:
        x = x @ resize_weights(width, config.size, x.device).T
    return (x / 255 - _channels(config.mean, x.device)) / _channels(config.std, x.device)


def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), filled on the device: a copy from the host cannot be part of a captured CUDA graph."""
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])
