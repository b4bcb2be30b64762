"""Which of torch's attention backends runs: measured on the machine when an engine is loaded, or stored and read."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.errors import TritonError

from flowad_fast.config import VelocityConfig
from flowad_fast.engines.precision import arithmetic
from flowad_fast.engines.timing import Clock, graph_clock
from flowad_fast.errors import EngineUnavailableError, nearest
from flowad_fast.kernels import operators
from flowad_fast.kernels.attention_short import ROWS, attention_short, attention_short_fp8
from flowad_fast.kernels.launch import holds_scores, runs_triton
from flowad_fast.kernels.quantise_rows import quantise_rows

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""torch's backends of scaled_dot_product_attention by the name that is reported and stored."""
SHORT = {f"short{rows}": rows for rows in ROWS}
"""The kernel of `kernels.attention_short` likewise, with its queries per program."""
NAMES = (*BACKENDS, *SHORT)
MOST_ERROR = 2e-2
"""Largest relative rms error against the math backend in float32 of a backend that may run.

bfloat16's rounding is 0.4 %. Backends have been released that compute something else for head widths above 128.
"""
_CALLS = 8
"""Calls in one measurement: one alone is shorter than what starts a graph."""

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values (B, heads, N, d)."""


@dataclass(frozen=True)
class AttentionChoice:
    """The backend that runs, and milliseconds and error of each that could run this shape here (others: None).

    The error is the relative rms against the math backend in float32; a backend above `MOST_ERROR` is refused, however
    fast. Without a measurement (`milliseconds` empty) the backend is the one that torch takes by itself.
    """

    backend: str
    milliseconds: dict[str, float | None]
    errors: dict[str, float | None] = field(default_factory=dict)

    @property
    def shown_errors(self) -> dict[str, float | None]:
        """`errors` as JSON values: None also where a backend that ran gave something that is not finite."""
        return {name: error if error is None or error < float("inf") else None for name, error in self.errors.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Only this backend, inside the context; the switch belongs to the process, see `precision.arithmetic`."""
        if not self.milliseconds:
            yield
            return
        with taking(self.backend):
            yield


def choose_attention(
    config: VelocityConfig,
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 8,
    stored: str | None = None,
    clock: Clock | None = None,
    quantised: bool = False,
) -> AttentionChoice:
    """The fastest right backend for a velocity field's (tokens, d_head) on this GPU; on the CPU the one torch takes.

    Args:
        config: gives tokens, heads and their width.
        dtype: of queries, keys and values.
        device: where it will run.
        batch: frames of the measurement: which is fastest depends on it.
        stored: a choice that was made before: it alone is tried, and must still be able to run, and right.
        clock: for tests; None takes a CUDA graph, and on the CPU the wall clock.
        quantised: whether the next layer takes e4m3 rows: their making then counts, in a pass of its own after torch's
            backends, in the epilogue of ours.

    Raises:
        EngineUnavailableError: the stored choice is unknown, cannot run here, or computes something else.
    """
    if stored is not None and stored not in NAMES:
        raise EngineUnavailableError(f"unknown attention backend {stored!r}; {nearest(stored, NAMES)}")
    heads = _views(config, dtype, device, batch)
    if device.type != "cuda" and stored is None and clock is None:
        own = SDPBackend(torch._fused_sdp_choice(*heads))
        return AttentionChoice(next(name for name, one in BACKENDS.items() if one == own), {})
    clock = clock or (graph_clock if device.type == "cuda" else _wall_clock)
    names = (stored,) if stored else NAMES
    with torch.inference_mode(), arithmetic("fp32", device):
        exact = attend("math", heads[0].float(), heads[1].float(), heads[2].float())
        tried = {name: _tried(name, heads, exact, clock, quantised) for name in names}
    times = {name: one[0] if one else None for name, one in tried.items()}
    errors = {name: one[1] if one else None for name, one in tried.items()}
    able = {name: one for name, one in tried.items() if one and one[1] <= MOST_ERROR}
    if not able:
        why = ", ".join(
            f"{name} {'cannot run' if error is None else f'has an error of {error:.2g} (at most {MOST_ERROR:g}) for'}"
            for name, error in errors.items()
        )
        raise EngineUnavailableError(
            f"attention backend {why} {tuple(heads[0].shape)} {dtype} on {device}; measure again"
        )
    return AttentionChoice(min(able, key=lambda name: able[name][0]), times, errors)


@contextmanager
def taking(name: str) -> Iterator[None]:
    """Attention of the velocity field runs on this backend inside the context, where it can."""
    if name in SHORT:
        with operators.short_attention(SHORT[name]):
            yield
        return
    with sdpa_kernel(BACKENDS[name]):
        yield


def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, N, d) by a backend of `NAMES`.

    Raises:
        RuntimeError: it cannot run these.
    """
    if name in SHORT:
        if not (runs_triton(q) and holds_scores(q.dtype, q.shape[-2])):
            raise RuntimeError(f"{name} has no kernel for {tuple(q.shape)} {q.dtype} on {q.device}")
        out: Tensor = attention_short(q, k, v, SHORT[name])
        return out
    with taking(name):
        return F.scaled_dot_product_attention(q, k, v)


def _views(config: VelocityConfig, dtype: torch.dtype, device: torch.device, batch: int) -> Heads:
    """q, k, v (B, heads, N, d) as the field has them: views of one qkv product's result."""
    width = config.hidden_size // config.num_heads
    qkv = torch.randn(batch, config.tokens, 3, config.num_heads, width, device=device, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def _quantised(name: str, heads: Heads, ceiling: operators.Ceiling) -> None:
    """As `attend`, to the e4m3 rows that the next layer takes."""
    if name in SHORT:
        attention_short_fp8(*heads, *ceiling, SHORT[name])
    else:
        quantise_rows(operators.merge(attend(name, *heads)))


def _tried(name: str, heads: Heads, exact: Tensor, clock: Clock, quantised: bool) -> tuple[float, float] | None:
    """Milliseconds of a call and its relative rms error (infinite where it is not finite); None: it cannot run."""
    v = heads[2]
    batch, _, tokens, _ = v.shape
    ceiling = operators.Ceiling(v.new_ones(batch, tokens, 1, dtype=torch.float32), v.new_ones(2, dtype=torch.float32))

    def several() -> None:
        for _ in range(_CALLS):
            if quantised:
                _quantised(name, heads, ceiling)
            else:
                attend(name, *heads)

    try:
        difference = attend(name, *heads).float() - exact
        error = float(difference.square().mean().sqrt() / exact.square().mean().sqrt())
        return clock(several) / _CALLS / 1e3, error if error == error else float("inf")
    except (RuntimeError, TritonError):
        return None


def _wall_clock(run: Callable[[], object], repeats: int = 5) -> float:
    """Median microseconds of a call on the CPU, after one of warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return sorted(times[1:])[repeats // 2]
