"""Which of torch's attention backends runs: measured on the machine when an engine is loaded, or stored and read."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowad_fast.config import VelocityConfig
from flowad_fast.errors import EngineUnavailableError, nearest

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""torch's backends of scaled_dot_product_attention by the name that is reported and stored."""


@dataclass(frozen=True)
class AttentionChoice:
    """The backend that runs, and milliseconds of each that could (None: it cannot run this shape here).

    Without a measurement (`milliseconds` empty) it is the one that torch takes by itself.
    """

    backend: str
    milliseconds: dict[str, float | None]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Only this backend, inside the context; the switch belongs to the process, see `precision.arithmetic`."""
        if not self.milliseconds:
            yield
            return
        with sdpa_kernel(BACKENDS[self.backend]):
            yield


def choose_attention(
    config: VelocityConfig, dtype: torch.dtype, device: torch.device, batch: int = 8, stored: str | None = None
) -> AttentionChoice:
    """The fastest backend for a velocity field's (tokens, d_head) on this GPU; on the CPU the one that torch takes.

    Args:
        config: gives tokens, heads and their width.
        dtype: of queries, keys and values.
        device: where it will run.
        batch: of the measurement.
        stored: a choice that was made before; it is not measured again, but must still be able to run.

    Raises:
        EngineUnavailableError: the stored choice is unknown or cannot run here.
    """
    if stored is not None and stored not in BACKENDS:
        raise EngineUnavailableError(f"unknown attention backend {stored!r}; {nearest(stored, BACKENDS)}")
    shape = (batch, config.num_heads, config.tokens, config.hidden_size // config.num_heads)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    if device.type != "cuda" and stored is None:
        own = SDPBackend(torch._fused_sdp_choice(q, k, v))
        return AttentionChoice(next(name for name, one in BACKENDS.items() if one == own), {})
    names = (stored,) if stored else tuple(BACKENDS)
    times = {name: _milliseconds(BACKENDS[name], q, k, v) for name in names}
    able = {name: ms for name, ms in times.items() if ms is not None}
    if not able:
        raise EngineUnavailableError(
            f"attention backend {', '.join(names)} cannot run {tuple(shape)} {dtype} on {device}; measure again"
        )
    return AttentionChoice(min(able, key=lambda name: able[name]), times)


def _milliseconds(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, repeats: int = 20
) -> float | None:
    """Median time of a call, None when the backend cannot run it."""
    times = []
    try:
        with sdpa_kernel(backend), torch.inference_mode():
            for i in range(repeats + 3):
                start = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v)
                if q.is_cuda:
                    torch.cuda.synchronize(q.device)
                if i >= 3:
                    times.append(time.perf_counter() - start)
    except RuntimeError:
        return None
    return sorted(times)[repeats // 2] * 1e3
