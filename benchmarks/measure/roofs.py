"""What this machine can do at most, measured beside the rows: copy bandwidth, and the model's own matrix products."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from flowad_fast.benchmarks.record.record import NoProducts, Prediction, Products, Roof, Roofs, Row
from flowad_fast.config import Precision
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.precision import arithmetic
from flowad_fast.kernels.account import Roofs as AccountRoofs
from flowad_fast.kernels.account import VelocityShape, account, predicted_seconds
from flowad_fast.stages.arithmetic import NUMBERS

COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}


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
) -> Roofs:
    """Copy bandwidth in GB/s, and for each precision and number of rows M the four products' median ms and TFLOP/s.

    Args:
        shape: the model's sizes.
        rows: M, tokens times frames (times tangents) of the rows that are compared with it.
        precisions: those that this device cannot multiply in are listed with the reason.
        device: as everywhere.
        seconds: time for each product.
    """
    where = torch_device(device)
    source = torch.randn(COPY_BYTES[where.type] // 4, device=where)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), where, seconds)
    gemm: list[Products | NoProducts] = []
    for precision in precisions:
        if precision in ("tf32", "fp8") and where.type == "cpu":
            gemm.append(NoProducts(precision=precision, reason=f"not measured: {precision} needs a GPU"))
            continue
        gemm += [_products(shape, m, precision, where, seconds) for m in rows]
    return Roofs(
        device=str(where),
        copy_gb_s=round(2 * source.nbytes / copy / 1e6, 2),
        copy_bytes=source.nbytes,
        gemm=tuple(gemm),
    )


def _products(shape: VelocityShape, m: int, precision: Precision, device: torch.device, seconds: float) -> Products:
    times, flops = {}, 0
    for name, (k, n) in gemm_shapes(shape).items():
        with arithmetic(precision, device):
            times[name] = median_ms(_product(m, k, n, precision, device), device, seconds)
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


def _product(m: int, k: int, n: int, precision: str, device: torch.device) -> Callable[[], Any]:
    """A linear layer of random operands, (m, k) to (m, n); in fp8 with one scale per row, as the model's are."""
    dtype = NUMBERS[precision].dtype
    x, w = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    if precision != "fp8":
        b = torch.randn(n, device=device, dtype=dtype)
        return lambda: F.linear(x, w, b)
    xq, wq = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    xs, ws = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
    return lambda: torch._scaled_mm(xq, wq.T, xs, ws, out_dtype=torch.bfloat16, use_fast_accum=True)


def median_ms(call: Callable[[], Any], device: torch.device, seconds: float, least: int = 3, most: int = 200) -> float:
    """The median time of `call` after a warm-up, each call synchronised."""
    samples: list[float] = []
    call()
    end = time.perf_counter() + seconds
    while len(samples) < least or (time.perf_counter() < end and len(samples) < most):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
