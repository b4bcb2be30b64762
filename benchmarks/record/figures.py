"""Figures of a record as PNG: FPS against memory, ladder, latency distribution, roofline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from flowad_fast.benchmarks.record import paper, report  # noqa: E402
from flowad_fast.benchmarks.record.limits import Products, Roofs  # noqa: E402
from flowad_fast.benchmarks.record.record import Measured, Record, Row  # noqa: E402
from flowad_fast.stages.scorers import SCORERS  # noqa: E402

Labels = list[tuple[float, float, str]]
Ran = Sequence[tuple[Row, Measured]]
"""Rows that ran, with what they measured."""

PALETTE = ("#c1440e", "#1f6f8b", "#3d8f5f", "#8a5fa8", "#b8860b", "#5a6472")
COLOURS = {kind: PALETTE[i % len(PALETTE)] for i, kind in enumerate(SCORERS)}


def draw(record: Record, folder: Path) -> list[Path]:
    """Write every figure that the record has data for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    ran = [(row, row.measured) for row in record.cases if row.measured is not None]
    if not ran:
        return []
    made = [
        _save(folder / "fps_memory.png", lambda a: _fps_memory(a, ran), record),
        _save(folder / "latency.png", lambda a: _latency(a, ran), record),
    ]
    if any(row.prediction for row, _ in ran):
        made.append(_save(folder / "roofline.png", lambda a: _roofline(a, ran, record.roofs), record))
    if any(row.rung is not None for row in record.cases):
        made.append(_save(folder / "ladder.png", lambda a: _ladder(a, record.cases), record))
    return made


def _save(path: Path, fill: Callable[[Axes], Labels], record: Record) -> Path:
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    labels = fill(axes)
    axes.set_title(f"{record.preset} · {report.where(record)}", fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if labels:
        place(axes, labels)
    figure.savefig(path)
    plt.close(figure)
    return path


def place(axes: Axes, labels: Labels) -> None:
    """Texts beside their points (x, y), moved down where they would cover each other, and to the left at the edge."""
    axes.figure.canvas.draw()  # the layout, and with it where points lie, is known from here on
    taken: list[Any] = []
    for x, y, text in sorted(labels, key=lambda one: (-one[1], one[0])):
        place: dict[str, Any] = {"xytext": (7, -3), "ha": "left"}
        line = {"arrowstyle": "-", "lw": 0.4, "color": "#999", "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        note = axes.annotate(text, (x, y), textcoords="offset points", fontsize=7, arrowprops=line, **place)
        if note.get_window_extent().x1 > axes.bbox.x1:
            note.set_horizontalalignment("right")
            note.set_position((-7, -3))
        box, down = note.get_window_extent(), 0
        while any(box.translated(0, -down).overlaps(other) for other in taken):
            down += 1
        note.set_position((note.get_position()[0], -3 - down * 72 / axes.figure.dpi))
        taken.append(box.translated(0, -down))


def _label(row: Row) -> str:
    probes = f" K={row.probes}" if row.probes else ""
    return f"{row.scorer}{probes} {report.runs(row)} {row.precision} b{row.batch}"


def _marker(row: Row) -> str:
    return "x" if row.engine == "reference" else "o"


def _fps_memory(axes: Axes, ran: Ran) -> Labels:
    labels = []
    for row, found in ran:
        memory = found.memory_mb.whole
        if memory is not None:
            axes.plot(memory / 1e3, found.fps, _marker(row), color=COLOURS[row.scorer], ms=7)
            labels.append((memory / 1e3, found.fps, _label(row)))
    points: dict[tuple[float, float], list[str]] = {}
    for method in paper.FLOWAD.values():
        assert method.memory_gb is not None and method.fps is not None, "FlowAD's rows have both figures"
        points.setdefault((method.memory_gb, method.fps), []).append(str(method.scorer))
    for point, names in points.items():
        axes.plot(*point, "D", mfc="none", color="#777")
        axes.annotate(
            f"FlowAD {', '.join(names)}: paper, reported (H100)", point, xytext=(-8, -3), textcoords="offset points",
            ha="right", fontsize=7, color="#777",
        )  # fmt: skip
    axes.margins(0.15)
    axes.set(xscale="log", yscale="log", xlabel="peak memory, GB, weights included", ylabel="frames per second")
    return labels


def _latency(axes: Axes, ran: Ran) -> Labels:
    axes.boxplot(
        [found.latency_ms.raw for _, found in ran], orientation="horizontal", whis=(0, 90), widths=0.6,
        tick_labels=[f"{_label(row)} (n={found.latency_ms.n})" for row, found in ran],
    )  # fmt: skip
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="latency, ms per call: box quartiles, whiskers minimum and p90, circles beyond")
    return []


def _roofline(axes: Axes, ran: Ran, roofs: Roofs) -> Labels:
    labels, intensities = [], []
    for row, found in ran:
        if row.prediction is None:
            continue
        intensity = row.prediction.gflop / row.prediction.gb
        point = (intensity, row.prediction.gflop / found.latency_ms.p50)
        axes.plot(*point, _marker(row), color=COLOURS[row.scorer], ms=7)
        labels.append((*point, _label(row)))
        intensities.append(intensity)
    tops: dict[str, float] = {}
    for gemm in roofs.gemm:
        if isinstance(gemm, Products):
            tops[gemm.precision] = max(tops.get(gemm.precision, 0.0), gemm.tflop_s)
    copy = roofs.copy_gb_s
    assert copy is not None, "a prediction was made from it"
    for precision, top in tops.items():
        ridge = 1e3 * top / copy
        xs = [min(min(intensities) / 3, ridge / 3), ridge, max(10 * max(intensities), 3 * ridge)]
        axes.plot(xs, [xs[0] * copy / 1e3, top, top], color="#999", lw=1)
        axes.annotate(f"{precision} products", (xs[2], top), ha="right", va="bottom", fontsize=7, color="#777")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (account)", ylabel="TFLOP/s")
    return labels


def _ladder(axes: Axes, rows: Sequence[Row]) -> Labels:
    rungs = [row for row in rows if row.rung is not None]
    for place, row in enumerate(rungs):
        fps, note = 0.0, str(row.status)
        if row.measured is not None:
            fps, error = row.measured.fps, row.parity and row.parity.max_error
            note = f"{fps:.2f} FPS" + ("" if error is None else f", map error {error:.0e}")
            axes.barh(place, fps, color=COLOURS[row.scorer])
        axes.annotate(note, (fps, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(rungs)), [f"{row.rung} {row.rung_name}" for row in rungs], fontsize=8)
    axes.margins(x=0.3)
    axes.set_ylim(len(rungs) - 0.4, -0.6)
    axes.set(xlabel="frames per second")
    return []
