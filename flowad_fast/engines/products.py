"""How the velocity field's matrix products run at a number of rows: measured on the machine when an engine captures.

The GPU's own library is one candidate; the others are the split product of `kernels.linear_split_k`, and for the first
product of the MLP one with GELU in its epilogue, which saves a pass over the widest activation: the library's, and in
fp8 our own, which also quantises. What wins is handed to the field as its `Plan`.

No GPU has judged this yet: neither the split product nor the epilogues have a committed record that shows a gain. They,
and this module, stay until one has, and go if it shows none; with `measure_products=False` an engine uses the library.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.errors import TritonError

from flowad_fast.engines.timing import Clock, graph_clock
from flowad_fast.kernels.operators import NARROW, Rows, quantise
from flowad_fast.stages.linear import Layer
from flowad_fast.stages.plan import Fused, Library, Product, Split
from flowad_fast.stages.velocity import TabledDiT

TILES = ((64, 64), (64, 128), (128, 64), (128, 128))
"""Rows and columns of a program of the split product."""
FUSED_TILES = ((64, 128), (128, 128), (128, 256))
"""Likewise of the product with GELU and e4m3 in its epilogue, which runs at any number of rows; the large for many."""
PARTS = (1, 2, 4, 8)
MOST_ROWS = 1024
"""With more rows a GPU is full without splitting."""
_DRAWN_ROWS = 256
"""Rows that are drawn at random for the measurement, and repeated: float32 rows of all of them would be its peak."""


@dataclass(frozen=True)
class ProductChoice:
    """What runs one part of every block, and microseconds per block of each candidate, both by label."""

    part: str
    rows: int
    chosen: str
    microseconds: dict[str, float]


def candidates(layer: Layer, rows: int, processors: int, gelu: bool) -> list[Product]:
    """What can run a layer at `rows` rows on a GPU of so many multiprocessors, the library first.

    `gelu` says that GELU follows, and then a layer that takes the same rows as this one.
    """
    found: list[Product] = [Library.PLAIN]
    if layer.takes == torch.float32:
        return found
    if gelu and layer.takes not in NARROW:
        found.append(Library.GELU)
    width, inner = layer.out_features, layer.in_features
    if gelu and layer.takes in NARROW:
        tiles = FUSED_TILES[1:] if rows > MOST_ROWS else FUSED_TILES
        found += (Fused(*tile) for tile in tiles if 2 * _tiles(rows, width, tile) >= processors)
    if rows > MOST_ROWS:
        return found
    for tile in TILES:
        for parts in PARTS:
            programs = _tiles(rows, width, tile) * parts
            # Fewer leave half of the GPU idle; with more, splitting only adds traffic.
            if processors / 2 <= programs <= 2 * processors and inner // parts >= 256:
                found.append(Split(*tile, parts))
    return found


def _tiles(rows: int, width: int, tile: tuple[int, int]) -> int:
    return -(-rows // tile[0]) * -(-width // tile[1])


def choose_products(field: TabledDiT, rows: int, clock: Clock | None = None) -> list[ProductChoice]:
    """Measure every candidate for each of a block's four products, and give the field a plan of the fastest.

    Args:
        field: on a GPU; its plan for other numbers of rows stays.
        rows: frames times tokens.
        clock: for tests; None takes a CUDA graph of one call per block, so that weights come from memory as they will.

    Returns:
        The choices with what was measured; a candidate that this GPU cannot run is left out with a warning. Empty where
        there is nothing to choose between, as in float32.
    """
    device = field.table.device
    if device.type != "cuda" and clock is None:
        return []
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    before, best, choices = field.plan, dict[str, Product](), []
    try:
        for part in field.blocks[0].layers:
            layers = [block.layers[part] for block in field.blocks]
            if len({layer.takes for layer in layers}) > 1:
                continue  # a rule of the config keeps some of them in bf16
            gelu = part == "fc1" and all(block.fc1.takes == block.fc2.takes for block in field.blocks)
            able = candidates(layers[0], rows, processors, gelu)
            if len(able) < 2:
                continue
            times = {}
            for one in able:
                field.use(before.at(rows, {part: one}))
                try:
                    times[one] = _microseconds(field, part, rows, clock or graph_clock)
                except TritonError as error:  # a program that this GPU has no room for, say
                    why = " ".join(str(error).split())[:200]
                    warnings.warn(f"{part}: {one.label} is left out: {why}", stacklevel=2)
            best[part] = min(times, key=lambda one: times[one])
            us = {one.label: round(time, 2) for one, time in times.items()}
            choices.append(ProductChoice(part, rows, best[part].label, us))
    finally:
        field.use(before.at(rows, best))
    return choices


def _microseconds(field: TabledDiT, part: str, rows: int, clock: Clock) -> float:
    """Time a block of a product and, for the first of the MLP, of the GELU behind it."""
    layers = [block.layers[part] for block in field.blocks]
    x = _rows(field, layers[0], rows)

    def run() -> None:
        for layer, block in zip(layers, field.blocks, strict=True):
            if part == "fc1":
                field.activated(block, x)
            else:
                layer(x)

    return clock(run) / len(layers)


def _rows(field: TabledDiT, layer: Layer, rows: int) -> Rows:
    """Random rows as the layer takes them, in no more memory than the field itself needs for them."""
    drawn = torch.randn(min(rows, _DRAWN_ROWS), layer.in_features, device=field.table.device)
    x = quantise(field.ops, drawn if layer.takes in NARROW else drawn.to(layer.takes), layer.takes)
    times = -(-rows // len(drawn))
    if isinstance(x, Tensor):
        return x.repeat(times, 1)[:rows]
    q, scale = x
    # repeat() of eight-bit floats is not in every build of torch; their bytes are.
    return q.view(torch.uint8).repeat(times, 1)[:rows].view(q.dtype), scale.repeat(times, 1)[:rows]
