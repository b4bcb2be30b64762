"""The operators as a model calls them: one name each, whatever the next layer takes, with or without tangents.

A namespace of operators (`reference`, or `fused` with the same names) holds up to four variants of one: plain or with
tangents (`_dual`), in a floating type or quantised by rows (`_fp8`). The functions here pick the variant; they are not
registered, so compilers and exporters see only what they call. A type in `NARROW` is all that a model has to be told of
another quantisation.

`to` is the type of the rows that the consumer of a result takes. `tangents` are chunks of tangents (k, B, ...), of
which each call takes one and the primal again; the primal's result is the first call's. Without chunks the plain
operator runs. Results that are as wide as an MLP come chunk by chunk, when the caller asks for them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowad_fast.kernels import reference

Quantised = tuple[Tensor, Tensor]
"""Rows (..., D) in a narrow type, with their float32 scales (..., 1)."""
Rows = Tensor | Quantised
"""What a linear layer takes."""
Heads = tuple[Tensor, Tensor, Tensor]
"""q, k and v, each (..., heads, N, d)."""


class Ceiling(NamedTuple):
    """What bounds the values that attention averages, so that it can quantise its result.

    `scale` (B, N, 1) is of the rows whose product gave v, `reach` (2,) of the weights, see `reference.bounded`.
    """

    scale: Tensor
    reach: Tensor


class Narrow(NamedTuple):
    """How operators quantise to a type: the end of the names of those that do, and the one that does nothing else."""

    suffix: str
    quantise: str


NARROW = {reference.FP8: Narrow("_fp8", "quantise_rows")}
"""Types that rows are quantised to."""


class Operators(Protocol):
    """A namespace of operators, `reference` or `fused`. What it holds in variants is called by the functions below."""

    __name__: str

    def stem(self, x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int, activation: str) -> Tensor:
        """See `reference.stem`."""

    def depthwise(
        self, x: Tensor, weight: Tensor, bias: Tensor, stride: int, before: int, activation: str, sums: bool
    ) -> tuple[Tensor, Tensor]:
        """See `reference.depthwise`."""

    def squeeze_excite(
        self, sums: Tensor, pixels: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str
    ) -> Tensor:
        """See `reference.squeeze_excite`."""

    def pointwise(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        activation: str,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """See `reference.pointwise`."""

    def pyramid_gather(self, stages: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """See `reference.pyramid_gather`."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `reference.attention`."""

    def attention_short(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        """See `reference.attention_short`."""

    def attention_short_fp8(
        self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, reach: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        """See `reference.attention_short_fp8`."""

    def attention_dual(
        self, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `reference.attention_dual`."""

    def affine_step(self, x: Tensor, v: Tensor, a: float, b: float) -> Tensor:
        """See `reference.affine_step`."""

    def affine_error_map(self, x: Tensor, v: Tensor, a: float, b: float, ref: Tensor | None = None) -> Tensor:
        """See `reference.affine_error_map`."""

    def upsample_score(self, maps: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `reference.upsample_score`."""


def quantise(ops: Operators, x: Rows, to: torch.dtype) -> Rows:
    """x (..., D) as a layer takes it: quantised by rows where `to` is narrow and x is not quantised already."""
    return getattr(ops, NARROW[to].quantise)(x) if to in NARROW and isinstance(x, Tensor) else x


def ln_modulate(
    ops: Operators, x: Tensor, shift: Tensor, scale: Tensor, to: torch.dtype, tangents: Iterable[Tensor] = ()
) -> tuple[Rows, list[Rows]]:
    """LN(x) * (1 + scale) + shift of x (B, N, D), and of each chunk (k, B, N, D)."""
    found = [_variant(ops, "ln_modulate_dual", to, (x, dx, shift, scale)) for dx in tangents]
    primal, *_ = found[0] if found else _variant(ops, "ln_modulate", to, (x, shift, scale))
    return primal, [dh for _, dh in found]


def gate_residual_ln_modulate(
    ops: Operators,
    x: Tensor,
    o: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    to: torch.dtype,
    tangents: Iterable[tuple[Tensor, Tensor]] = (),
) -> tuple[Tensor, list[Tensor], Rows, list[Rows]]:
    """x' = x + gate * o and h = LN(x') * (1 + scale) + shift; with chunks of (dx, do): x', its tangents, h, its."""
    name, mods = "gate_residual_ln_modulate", (gate, shift, scale)
    found = [_variant(ops, f"{name}_dual", to, (x, dx, o, do, *mods), kept=2) for dx, do in tangents]
    if not found:
        x, h = _variant(ops, name, to, (x, o, *mods), kept=1)
        return x, [], h, []
    x, _, h, _ = found[0]
    return x, [dx for _, dx, _, _ in found], h, [dh for *_, dh in found]


def gelu_tanh(
    ops: Operators, x: Tensor, to: torch.dtype, tangents: Iterable[Tensor] = ()
) -> tuple[Rows, Iterator[Rows]]:
    """GELU of x (..., D), and of each chunk (k, ..., D)."""
    duals = map(lambda dx: _variant(ops, "gelu_tanh_dual", to, (x, dx)), tangents)
    return _primal_first(lambda: _variant(ops, "gelu_tanh", to, (x,))[0], duals)


_short: int | None = None
"""Queries per program of `attention_short`, see `short_attention`. A plain variable, which compilers can read."""


@contextmanager
def short_attention(rows: int) -> Iterator[None]:
    """Plain `attention` runs on `attention_short`, with so many queries per program, inside the context.

    The switch belongs to the process, as torch's own between backends does: other threads get the same values from it.
    """
    global _short
    before, _short = _short, rows
    try:
        yield
    finally:
        _short = before


def merge(x: Tensor) -> Tensor:
    """Heads (..., heads, N, d) side by side again, (..., N, heads d)."""
    return x.transpose(-3, -2).flatten(-2)


def attention(
    ops: Operators, qkv: Heads, tangents: Iterable[Heads] = (), ceiling: Ceiling | None = None
) -> tuple[Rows, Iterator[Tensor]]:
    """Attention of q, k and v (B, heads, N, d), and of each chunk's tangents of them; heads merged, (B, N, heads d).

    With a `ceiling` the plain result may be quantised, which an operator that does so itself then does.
    """

    def plain() -> Rows:
        if _short is None:
            return merge(ops.attention(*qkv))
        if ceiling is None:
            return merge(ops.attention_short(*qkv, _short))
        return ops.attention_short_fp8(*qkv, *ceiling, _short)

    def dual(dqkv: Heads) -> tuple[Tensor, ...]:
        return tuple(map(merge, ops.attention_dual(*qkv, *dqkv)))

    return _primal_first(plain, map(dual, tangents))


def _variant(ops: Operators, name: str, to: torch.dtype, tensors: tuple[Tensor, ...], kept: int = 0) -> tuple[Any, ...]:
    """The results of an operator: the first `kept` as they are, the others in what `to` says."""
    if to not in NARROW:
        found = getattr(ops, name)(*tensors, to)
        return found if isinstance(found, tuple) else (found,)
    found = getattr(ops, name + NARROW[to].suffix)(*tensors)
    return *found[:kept], *zip(found[kept::2], found[kept + 1 :: 2], strict=True)


def _primal_first(plain: Callable[[], Any], duals: Iterator[Sequence[Any]]) -> tuple[Any, Iterator[Any]]:
    """The primal of pairs and their tangents, each made when it is asked for; without pairs, the plain operator's."""
    first = next(duals, None)
    if first is None:
        return plain(), iter(())
    # Nothing here may hold a chunk that the caller has used, as a generator's variables or a tuple in `chain` would.
    return first[0], chain(iter((first[1],)), map(itemgetter(1), duals))
