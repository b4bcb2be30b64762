"""What a machine can do at most, as records hold it: copies, matrix products, the backbone alone."""

from typing import Literal

from flowad_fast.benchmarks.record.machine import Part
from flowad_fast.config import Precision


class Products(Part):
    """A block's four matrix products in one precision; `model` is width and MLP width, `rows` what they multiply."""

    precision: Precision
    model: tuple[int, int]
    rows: int
    ms: dict[str, float]
    block_ms: float
    tflop_s: float


class NoProducts(Part):
    """A precision that this machine cannot multiply in."""

    precision: Precision
    reason: str


class ScaledProducts(Part):
    """A block's four fp8 products with other scales than the model's, which are one per row: ms, or why not."""

    scales: Literal["tensor", "128 values"]
    rows: int
    ms: dict[str, float] | None = None
    block_ms: float | None = None
    reason: str | None = None


class TangentTile(Part):
    """Attention's tangents alone, by one tile of `kernels.attention_dual.TILES`: ms of a call, or why not.

    `tile` is queries and columns of a program, and its warps; the first tile of a record is the one that scorers run.
    """

    tile: tuple[int, int, int]
    batch: int
    probes: int
    ms: float | None = None
    reason: str | None = None


class Roofs(Part):
    """What the machine can do at most, or the reason why that was not measured."""

    reason: str | None = None
    device: str | None = None
    copy_gb_s: float | None = None
    copy_bytes: int | None = None
    gemm: tuple[Products | NoProducts, ...] = ()
    scaled: tuple[ScaledProducts, ...] = ()
    tangents: tuple[TangentTile, ...] = ()


class BackboneTime(Part):
    """The backbone alone, without launches where it runs on a GPU: ms for a batch in a layout and type."""

    batch: int
    layout: Literal["NHWC", "NCHW"]
    dtype: Literal["fp32", "fp16"]
    operators: Literal["torch", "fused"] = "torch"
    """Whose they are: torch's one by one, or those of `stages.fused_backbone`."""
    ms: float
