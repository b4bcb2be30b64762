"""What this machine can do at most, measured beside the rows: copy bandwidth, and the model's own matrix products."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from triton.errors import TritonError

from flowad_fast.benchmarks.record.limits import BackboneTime, NoProducts, Products, Roofs, ScaledProducts, TangentTile
from flowad_fast.benchmarks.record.record import Prediction, Roof, Row
from flowad_fast.config import Precision
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.precision import arithmetic
from flowad_fast.engines.timing import graph_clock
from flowad_fast.kernels import attention_dual, fused
from flowad_fast.kernels.account import Roofs as AccountRoofs
from flowad_fast.kernels.account import VelocityShape, account, predicted_seconds
from flowad_fast.kernels.operators import Heads
from flowad_fast.model import FlowModel
from flowad_fast.stages.arithmetic import NUMBERS
from flowad_fast.stages.fused_backbone import with_fused_backbone

COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
SCALES: tuple[Literal["tensor", "128 values"], ...] = ("tensor", "128 values")
"""Scales of fp8 products beside the model's own, one per row, which they are compared with."""
WEIGHTS, FEW_WEIGHTS, MANY_ROWS = 16, 4, 2048
"""Weights that a product on a GPU is timed over, so that each comes from memory as a model's do and not from the cache;
fewer where a product has more rows than that, and its time is the multiplications'."""


def gemm_shapes(shape: VelocityShape) -> dict[str, tuple[int, int]]:
    """(K, N) of a block's four products: qkv, proj, fc1, fc2."""
    d, mlp = shape.hidden, shape.mlp
    return {"qkv": (d, 3 * d), "proj": (d, d), "fc1": (d, mlp), "fc2": (mlp, d)}


def measure(
    shape: VelocityShape,
    rows: Sequence[int],
    precisions: Sequence[Precision],
    device: str = "auto",
    seconds: float = 1.0,
    probes: tuple[int, int] | None = None,
) -> Roofs:
    """Copy bandwidth in GB/s, and for each precision and number of rows M the four products' median ms and TFLOP/s.

    Args:
        shape: the model's sizes.
        rows: M, tokens times frames (times tangents) of the rows that are compared with it.
        precisions: those that this device cannot multiply in are listed with the reason.
        device: as everywhere.
        seconds: time for each product on the CPU; on a GPU a captured graph over distinct weights is replayed.
        probes: frames and tangents of which the tiles of attention's tangents are timed, on a GPU.
    """
    where = torch_device(device)
    source = torch.randn(COPY_BYTES[where.type] // 4, device=where)
    target = torch.empty_like(source)
    copy = _milliseconds([lambda: target.copy_(source)], where, seconds)
    gemm: list[Products | NoProducts] = []
    for precision in precisions:
        if precision in ("tf32", "fp8") and where.type == "cpu":
            gemm.append(NoProducts(precision=precision, reason=f"not measured: {precision} needs a GPU"))
            continue
        gemm += [_products(shape, m, precision, where, seconds) for m in rows]
    scaled: tuple[ScaledProducts, ...] = ()
    if "fp8" in precisions and where.type == "cuda":
        scaled = tuple(_scaled(shape, max(rows), scales, where, seconds) for scales in SCALES)
    return Roofs(
        device=str(where),
        copy_gb_s=round(2 * source.nbytes / copy / 1e6, 2),
        copy_bytes=source.nbytes,
        gemm=tuple(gemm),
        scaled=scaled,
        tangents=tuple(_tangents(shape, *probes, tile, where) for tile in attention_dual.TILES)
        if probes and where.type == "cuda"
        else (),
    )


def backbone(
    model: FlowModel, batches: Sequence[int], device: torch.device, seconds: float
) -> tuple[BackboneTime, ...]:
    """The backbone's stages alone: float32 channels last and first, on a GPU float16, and on the fused operators.

    On a GPU a captured graph, so that launches do not count; nothing of `model` is changed.
    """
    network, size = model.backbone.backbone, model.spec.image.size
    kinds: list[tuple[Literal["NHWC", "NCHW"], Literal["fp32", "fp16"]]] = [("NHWC", "fp32"), ("NCHW", "fp32")]
    if device.type == "cuda":
        kinds.append(("NHWC", "fp16"))
    found = []
    for layout, dtype in kinds:
        memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        kind = torch.float16 if dtype == "fp16" else torch.float32
        ours = copy.deepcopy(network).to(device, kind).to(memory_format=memory).eval()  # type: ignore[call-overload]
        for batch in batches:
            images = torch.randn(batch, 3, size, size, device=device, dtype=kind).contiguous(memory_format=memory)
            with torch.inference_mode(), arithmetic("fp32", device):
                ms = _milliseconds([partial(ours, images)], device, seconds)
            found.append(BackboneTime(batch=batch, layout=layout, dtype=dtype, ms=round(ms, 4)))
    ours = with_fused_backbone(model.backbone, fused, torch.float16)  # type: ignore[arg-type]
    if ours is not model.backbone:
        stages = copy.deepcopy(ours.backbone, {id(fused): fused}).to(device)
        for batch in batches:
            images = torch.randn(batch, 3, size, size, device=device)
            with torch.inference_mode():
                ms = _milliseconds([partial(stages, images)], device, seconds)
            row = BackboneTime(batch=batch, layout="NHWC", dtype="fp16", operators="fused", ms=round(ms, 4))
            found.append(row)
    return tuple(found)


def _products(shape: VelocityShape, m: int, precision: Precision, device: torch.device, seconds: float) -> Products:
    times, flops = {}, 0
    for name, (k, n) in gemm_shapes(shape).items():
        with arithmetic(precision, device):
            times[name] = _milliseconds(_product(m, k, n, precision, device), device, seconds)
        flops += 2 * m * k * n
    block = sum(times.values())
    return Products(
        precision=precision,
        model=(shape.hidden, shape.mlp),
        rows=m,
        ms={name: round(ms, 4) for name, ms in times.items()},
        block_ms=round(block, 4),
        tflop_s=float(f"{flops / block / 1e9:.4g}"),  # never rounded to zero, however small the model
    )


def _scaled(
    shape: VelocityShape, m: int, scales: Literal["tensor", "128 values"], device: torch.device, seconds: float
) -> ScaledProducts:
    """The four products in fp8 with other scales; what the library refuses is said, and costs nothing else."""
    found = ScaledProducts(scales=scales, rows=m)
    try:
        with arithmetic("fp8", device):
            times = {
                name: _milliseconds(_product(m, k, n, "fp8", device, scales), device, seconds)
                for name, (k, n) in gemm_shapes(shape).items()
            }
    except (RuntimeError, ValueError) as error:
        return found.but(reason=" ".join(str(error).split())[:200])
    ms = {name: round(one, 4) for name, one in times.items()}
    return found.but(ms=ms, block_ms=round(sum(times.values()), 4))


def _tangents(
    shape: VelocityShape, batch: int, probes: int, tile: attention_dual.Tile, device: torch.device
) -> TangentTile:
    """Attention's tangents in bfloat16 on the views that they get in a block; a tile that does not fit says so."""
    found = TangentTile(tile=(tile.rows, tile.columns, tile.warps), batch=batch, probes=probes)

    def views(*lead: int) -> Heads:
        qkv = torch.randn(*lead, shape.tokens, 3 * shape.hidden, device=device, dtype=torch.bfloat16)
        q, k, v = (part.unflatten(-1, (shape.heads, -1)).transpose(-3, -2) for part in qkv.chunk(3, -1))
        return q, k, v

    call = partial(attention_dual.tangents, *views(batch), *views(probes, batch), tile)
    try:
        return found.but(ms=round(_milliseconds([call], device, 0.0), 4))
    except (RuntimeError, TritonError) as error:
        return found.but(reason=" ".join(str(error).split())[:200])


def _scales(m: int, k: int, n: int, kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of one of operands (m, k) and (n, k)^T, in the shapes and strides by which torch knows the kind."""
    ones = partial(torch.ones, device=device)
    if kind == "tensor":
        return ones(()), ones(())
    if kind == "rows":
        return ones(m, 1), ones(1, n)
    return ones(-(-k // 128), m).T, ones(-(-k // 128), n)


def _product(
    m: int, k: int, n: int, precision: str, device: torch.device, scales: str = "rows"
) -> list[Callable[[], Any]]:
    """Linear layers of random operands, (m, k) to (m, n), one per weight; in fp8 with row scales, as the model's."""
    dtype = NUMBERS[precision].dtype
    count = 1 if device.type == "cpu" else WEIGHTS if m <= MANY_ROWS else FEW_WEIGHTS

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, weights, bias = drawn(m, k), [drawn(n, k) for _ in range(count)], drawn(n)
    if precision != "fp8":
        return [partial(F.linear, x, w, bias) for w in weights]
    q, (scale, weight_scale) = x.to(torch.float8_e4m3fn), _scales(m, k, n, scales, device)
    # Sums of 128 values leave the tensor cores to be scaled, so the question of their accumulator does not arise.
    fast = scales != "128 values"
    return [
        partial(
            torch._scaled_mm, q, w.to(torch.float8_e4m3fn).T, scale, weight_scale, out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )
        for w in weights
    ]  # fmt: skip


def _milliseconds(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float) -> float:
    """Median time of one of `calls`: on a GPU all of them in a graph, without launches and synchronising between."""
    if device.type == "cpu":
        return median_ms(calls[0], seconds)

    def run() -> None:
        for call in calls:
            call()

    return graph_clock(run) / len(calls) / 1e3


def median_ms(call: Callable[[], Any], seconds: float, least: int = 3, most: int = 200) -> float:
    """The median time of `call` on the CPU after a warm-up."""
    samples: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < end and len(samples) < most):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return sorted(samples)[len(samples) // 2]


def attached(row: Row, roofs: Roofs) -> Row:
    """A measured row with its share of the roof, and the time that the byte and operation account predicts.

    The share is the model's own products alone over the row's whole time. The prediction uses the roofs of this run and
    leaves the backbone out.
    """
    shape, nfe = row.shape, row.nfe
    if row.measured is None or shape is None or nfe is None or roofs.copy_gb_s is None:
        return row
    sizes = ((shape.hidden, shape.mlp), rows_of(shape, row.batch, row.probes))
    fitting = {g.precision: g for g in roofs.gemm if isinstance(g, Products) and (g.model, g.rows) == sizes}
    gemm = fitting.get(row.precision)
    if gemm is None:
        return row
    p50 = row.measured.latency_ms.p50
    alone = gemm.block_ms * shape.depth * nfe
    row = row.but(roof=Roof(gemm_ms=round(alone, 3), share=round(alone / p50, 4)))
    flops: dict[str, float] = {precision: 1e12 * g.tflop_s for precision, g in fitting.items()}
    # Of float32 the account has row operators, whose time is that of their bytes: another number of rows will do.
    plain = [g for g in roofs.gemm if isinstance(g, Products) and (g.precision, g.model) == ("fp32", sizes[0])]
    if plain:
        flops.setdefault("fp32", 1e12 * plain[-1].tflop_s)
    limits = AccountRoofs("this machine", "measured in the same run", 1e9 * roofs.copy_gb_s, flops)
    costs = account(shape, row.batch, nfe, row.probes or 0, row.precision)
    if any(cost.precision not in flops for cost in costs):
        return row
    predicted = 1e3 * predicted_seconds(costs, limits)
    prediction = Prediction(
        ms=round(predicted, 3),
        measured_over_predicted=round(p50 / predicted, 3),
        gflop=round(sum(cost.flops for cost in costs) / 1e9, 4),
        gb=round(sum(cost.bytes for cost in costs) / 1e9, 5),
    )
    return row.but(prediction=prediction)


def rows_of(shape: VelocityShape, batch: int, probes: int | None) -> int:
    """Rows of the matrix products in a row's loop: tokens of all frames, and of all tangents beside the primal."""
    return shape.tokens * batch * (1 + (probes or 0))
