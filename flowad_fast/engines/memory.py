"""Running out of GPU memory: the batch is split, the order kept, and the size that fits remembered."""

import warnings
from collections.abc import Callable

import numpy as np
import torch

from flowad_fast.errors import EngineUnavailableError

Outputs = tuple[np.ndarray, np.ndarray]
"""Map (B, S, S) and raw score (B,) or (B, 2), float32."""


class BatchLimit:
    """Halves a batch that does not fit, at most log2(B) times, and remembers the size for the calls that follow.

    `largest` is that size, None as long as everything has fitted.
    """

    def __init__(self) -> None:
        self.largest: int | None = None

    def run(self, once: Callable[[np.ndarray, np.ndarray | None], Outputs], frames: np.ndarray,
            y: np.ndarray | None) -> Outputs:  # fmt: skip
        """The outputs of `once` for all frames, in their order.

        Raises:
            EngineUnavailableError: not even one frame fits.
        """
        parts: list[Outputs] = []
        start = 0
        while start < len(frames):
            size = min(len(frames) - start, self.largest or len(frames))
            part = _attempt(once, frames[start : start + size], None if y is None else y[start : start + size])
            if part is None:
                self.largest = _smaller(size)
                continue
            parts.append(part)
            start += size
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception is, or was raised while handling, CUDA's out of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False


def _attempt(
    once: Callable[[np.ndarray, np.ndarray | None], Outputs], frames: np.ndarray, y: np.ndarray | None
) -> Outputs | None:
    """None when memory ran out; by then the failed call's tensors are gone, since its frames are no longer held."""
    try:
        return once(frames, y)
    except torch.OutOfMemoryError:
        return None


def _smaller(size: int) -> int:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if size == 1:
        raise EngineUnavailableError(
            "out of GPU memory for a single frame; close other programs on the GPU, ask for precision bf16 or fp8, "
            "fewer probes, or for device='cpu'"
        )
    warnings.warn(f"out of GPU memory at batch {size}; batches are split to {size // 2} from now on", stacklevel=4)
    return size // 2
