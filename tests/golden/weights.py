"""Deterministic weights for the golden cases: every tensor is a function of its key name alone.

`fill(state_dict)` returns a new dict with the same keys, shapes and dtypes. Nothing large has to be stored:
the reference outputs in this folder were computed with exactly these weights.
"""

import zlib

import numpy as np
import torch


def tensor_for(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 array of `shape`, drawn from a RandomState seeded with crc32(name)."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) <= 1 and name.endswith("weight"):  # batch-norm scale
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) <= 1:  # biases, running means
        return (0.05 * rng.standard_normal(shape)).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    if name.endswith("pos_embed"):
        return (0.5 * rng.standard_normal(shape)).astype(np.float32)
    return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def fill(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():  # num_batches_tracked
            out[name] = torch.zeros_like(tensor)
        else:
            out[name] = torch.from_numpy(tensor_for(name, tuple(tensor.shape))).to(tensor.dtype)
    return out


def images(count: int = 2, size: int = 256, seed: int = 7) -> np.ndarray:
    """uint8 RGB images, shape (count, size, size, 3): smooth gradients plus noise."""
    rng = np.random.RandomState(seed)
    yy, xx = np.mgrid[0:size, 0:size] / size
    base = np.stack([np.sin(6 * xx + 2 * yy), np.cos(5 * yy - xx), xx * yy], -1)
    noisy = base[None] + 0.25 * rng.standard_normal((count, size, size, 3))
    return np.clip(127 + 80 * noisy, 0, 255).astype(np.uint8)
