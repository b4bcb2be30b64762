"""Backends: one file each, one protocol. An engine turns a batch of frames into maps and raw scores."""

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """What a detector needs from a backend. `run` may be called from many threads."""

    name: str
    device: str

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Frames uint8 (B, H, W, 3), classes int64 (B,) or None: map (B, S, S) and raw score (B,) float32."""
