"""`docs/scaling.md`: what a scorer costs as sizes grow, predicted by the account and measured where records exist."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flowad_fast.benchmarks.record import capacity, fewer, prediction, report
from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.record import Record, read
from flowad_fast.config import Precision
from flowad_fast.kernels.account import H100, VelocityShape, account, predicted_seconds

PAGE = report.HERE.parent / "docs" / "scaling.md"
PAPER = VelocityShape()
SMALL = VelocityShape(hidden=768, depth=12, mlp=3072)
MEDIUM = VelocityShape(hidden=1280, depth=16, mlp=5120)
PRECISION: Precision = "bf16"


def page(folder: Path = report.RESULTS) -> str:
    """The page, from the account and the records in `folder`."""
    parts = [
        "# How the cost scales",
        "This page is written by `flowad-bench report`. All tables but the last, and those of *Capacity* that name a "
        "record, are **predicted, not measured**: the account of bytes and operations in `kernels/account.py`, at the "
        f"roofs of one {H100.name} ({H100.source}), in {PRECISION}. The account leaves out backbone, launches and "
        "caches: it is a limit. The paper's sizes hold unless a table varies them (DiT 2048x16, 256 tokens, 3 function "
        "evaluations).",
        "## Batch",
        "One frame reads all weights for 256 rows of work; from two frames on, arithmetic is the limit.",
        _predicted("frames per call", [(str(b), PAPER, b, 3) for b in (1, 2, 4, 8, 16, 32, 64)]),
        "## Function evaluations",
        "Cost is proportional to them.",
        _predicted("NFE", [(str(n), PAPER, 32, n) for n in (1, 2, 3, 5, 10)]),
        *prediction.section(),
        *fewer.section(),
        "## Probes of density",
        "K probes cost 1 + K evaluations per step; inversion is K = 0.",
        _probes((0, 1, 2, 4, 10)),
        "## Width",
        "Work grows with the square of the width, attention only with the width.",
        _predicted(
            "DiT",
            [(f"{s.hidden}x{s.depth}, {s.weights / 1e6:.0f} M weights", s, 32, 3) for s in (SMALL, MEDIUM, PAPER)],
        ),
        "## Frame size",
        "The model's image size sets the tokens, one per 16x16 pixels; attention's share grows with them. Frames of "
        "other sizes are resized to it first, which touches each pixel once.",
        _predicted(
            "model image",
            [(f"{s} pixels, {(s // 16) ** 2} tokens", replace(PAPER, tokens=(s // 16) ** 2, image=s), 32, 3)
             for s in (128, 256, 384, 512)],
        ),
        *capacity.section(folder),
        "## Measured",
        "Rows of committed records, beside what the account predicts from the roofs measured in the same run.",
        _measured(folder),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _predicted(axis: str, points: Sequence[tuple[str, VelocityShape, int, int]]) -> str:
    head = (axis, "inversion: ms per call", "frames/s, at most", "density K = 1: frames/s", "K = 10: frames/s")
    rows = []
    for label, shape, batch, nfe in points:
        seconds = [predicted_seconds(account(shape, batch, nfe, k, PRECISION), H100) for k in (0, 1, 10)]
        rows.append([label, f"{seconds[0] * 1e3:.2f}", *(f"{batch / s:.0f}" for s in seconds)])
    return "\n".join(table_lines(head, rows, "---:"))


def _probes(counts: Sequence[int]) -> str:
    rows = []
    for k in counts:
        seconds = predicted_seconds(account(PAPER, 32, 3, k, PRECISION), H100)
        rows.append([str(k), f"{seconds * 1e3:.1f}", f"{32 / seconds:.0f}"])
    return "\n".join(table_lines(("K", "ms per call of 32 frames", "frames/s, at most"), rows, "---:"))


def _measured(folder: Path) -> str:
    head = ("DiT", "scorer", "K", "NFE", "batch", "frame", "engine", "precision", "p50 ms", "predicted ms", "ratio",
            "machine")  # fmt: skip
    found = []
    for path in sorted(folder.glob("*.json")):
        record = read(path)
        if not isinstance(record, Record):
            continue
        machine = record.environment.gpu or record.environment.cpu
        for row in record.cases:
            shape, times, predicted = row.shape, row.measured, row.prediction
            if record.kind == "peers" or shape is None or times is None or predicted is None:
                continue
            cells = (
                f"{shape.hidden}x{shape.depth}", row.scorer, row.probes or "", row.nfe, row.batch,
                "x".join(map(str, row.frame_size or ())), row.engine, row.precision, f"{times.latency_ms.p50:.1f}",
                f"{predicted.ms:.1f}", f"{predicted.measured_over_predicted:.2f}", machine,
            )  # fmt: skip
            found.append(((machine, shape.hidden, row.name), [str(cell) for cell in cells]))
    if not found:
        return "No record has been committed yet."
    return "\n".join(table_lines(head, [cells for _, cells in sorted(found, key=lambda one: one[0])]))
