"""How the velocity field's matrix products run at a number of rows: measured on the machine when an engine captures.

The GPU's own library is one candidate; the others are the split product of `kernels.linear_split_k`, and for the first
product of the MLP the library's with GELU in its epilogue, which saves a pass over the widest activation. What wins is
kept, so a candidate of ours that does not pay costs nothing but the measurement.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowad_fast.kernels.reference import quantise_rows
from flowad_fast.stages.linear import GELU, LIBRARY, AnyLinear, Fp8Linear, Linear, Product, Quantised, Split
from flowad_fast.stages.velocity import TabledDiT

TILES = ((64, 64), (64, 128), (128, 64), (128, 128))
"""Rows and columns of a program of the split product."""
PARTS = (1, 2, 4, 8)
MOST_ROWS = 1024
"""With more rows a GPU is full without splitting."""
_REPEATS = 10

Clock = Callable[[Callable[[], object]], float]
"""Microseconds of a call."""


@dataclass(frozen=True)
class ProductChoice:
    """What runs one part of every block, and microseconds a block of each candidate."""

    part: str
    rows: int
    chosen: str
    microseconds: dict[str, float]


def candidates(layer: AnyLinear, rows: int, processors: int, gelu: bool) -> list[Product]:
    """What can run a layer at `rows` rows on a GPU of so many multiprocessors, the library first.

    `gelu` says that GELU follows, and its result is not quantised.
    """
    found: list[Product] = [LIBRARY]
    if not isinstance(layer, Linear | Fp8Linear) or layer.weight.dtype == torch.float32:
        return found
    if gelu and isinstance(layer, Linear):
        found.append(GELU)
    width, inner = layer.weight.shape
    if rows > MOST_ROWS:
        return found
    for tile in TILES:
        for parts in PARTS:
            programs = -(-rows // tile[0]) * -(-width // tile[1]) * parts
            # Fewer leave half of the GPU idle; with more, splitting only adds traffic.
            if processors / 2 <= programs <= 2 * processors and inner // parts >= 256:
                found.append(Split(*tile, parts))
    return found


def choose_products(field: TabledDiT, rows: int, clock: Clock | None = None) -> list[ProductChoice]:
    """Measure every candidate for each of a block's four products and let the layers use the fastest at `rows` rows.

    Args:
        field: on a GPU; its layers are changed.
        rows: frames times tokens.
        clock: for tests; None takes a CUDA graph of one call a block, so that weights come from memory as they will.

    Returns:
        The choices with what was measured; empty where there is nothing to choose between, as in float32.
    """
    weight = field.blocks[0].qkv.weight if isinstance(field.blocks[0].qkv, Linear | Fp8Linear) else None
    if weight is None or not (weight.is_cuda or clock):
        return []
    processors = torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 132
    choices = []
    for part in ("qkv", "proj", "fc1", "fc2"):
        layers = [getattr(block, part) for block in field.blocks]
        if len({layer.quantised for layer in layers}) > 1:
            continue  # a rule of the config keeps some of them in bf16
        gelu = part == "fc1" and not any(block.fc2.quantised for block in field.blocks)
        able = candidates(layers[0], rows, processors, gelu)
        if len(able) < 2:
            continue
        times = {str(one): _microseconds(field, part, layers, rows, one, clock or _graph_clock) for one in able}
        best = min(able, key=lambda one: times[str(one)])
        for layer in layers:
            layer.products[rows] = best
        choices.append(ProductChoice(part, rows, str(best), {name: round(us, 2) for name, us in times.items()}))
    return choices


def _microseconds(
    field: TabledDiT, part: str, layers: list[Linear | Fp8Linear], rows: int, product: Product, clock: Clock
) -> float:
    """Time a block of a product and, for the first of the MLP, of the GELU behind it."""
    drawn = torch.randn(rows, layers[0].weight.shape[1], device=layers[0].weight.device)
    x: Tensor | Quantised = quantise_rows(drawn) if layers[0].quantised else drawn.to(layers[0].dtype)
    for layer in layers:
        layer.products[rows] = product

    def run() -> None:
        for layer, block in zip(layers, field.blocks, strict=True):
            if part == "fc1":
                field.fc1_gelu(block, x)
            else:
                layer(x)

    return clock(run) / len(layers)


def _graph_clock(run: Callable[[], object]) -> float:
    """Microseconds of a call, captured and replayed: launches cost there what they cost in the engine's graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
        run()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    times = []
    with torch.cuda.stream(stream):
        for _ in range(_REPEATS + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[2:])[_REPEATS // 2]
