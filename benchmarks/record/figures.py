"""Figures of a record as PNG: FPS against memory, ladder, latency distribution, roofline."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from flowad_fast.benchmarks.measure.memory import whole  # noqa: E402
from flowad_fast.benchmarks.record import paper, report  # noqa: E402

COLOURS = {"density": "#c1440e", "inversion": "#1f6f8b", "reconstruction": "#3d8f5f"}


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Write every figure that the record has data for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in record["cases"] if row["status"] == "ok"]
    if not rows:
        return []
    made = [
        _save(folder / "fps_memory.png", lambda a: _fps_memory(a, rows), record),
        _save(folder / "latency.png", lambda a: _latency(a, rows), record),
    ]
    if any(row["prediction"] for row in rows):
        made.append(_save(folder / "roofline.png", lambda a: _roofline(a, rows, record["roofs"]), record))
    if any(row.get("rung") is not None for row in rows):
        made.append(_save(folder / "ladder.png", lambda a: _ladder(a, record["cases"]), record))
    return made


def _save(path: Path, fill: Any, record: dict[str, Any]) -> Path:
    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    labels = fill(axes)
    axes.set_title(f"{record['preset']} · {report.where(record)}", fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if labels:
        _place(axes, labels)
    figure.savefig(path)
    plt.close(figure)
    return path


def _place(axes: Axes, labels: list[tuple[float, float, str]]) -> None:
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


def _label(row: dict[str, Any]) -> str:
    probes = f" K={row['probes']}" if row["probes"] else ""
    return f"{row['scorer']}{probes} {report.runs(row)} {row['precision']} b{row['batch']}"


def _fps_memory(axes: Axes, rows: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    labels = []
    for row in rows:
        memory = whole(row["memory_mb"])
        if memory is None:
            continue
        marker = "x" if row["engine"] == "reference" else "o"
        axes.plot(memory / 1e3, row["fps"], marker, color=COLOURS[row["scorer"]], ms=7)
        labels.append((memory / 1e3, row["fps"], _label(row)))
    points: dict[tuple[float, float], list[str]] = {}
    for method in paper.FLOWAD.values():
        assert method.memory_gb is not None, "FlowAD's rows have a memory figure"
        points.setdefault((method.memory_gb, method.fps), []).append(str(method.scorer))
    for point, names in points.items():
        axes.plot(*point, "D", mfc="none", color="#777")
        axes.annotate(
            f"FlowAD {', '.join(names)}: paper, reported (H100)", point, xytext=(-8, -3), textcoords="offset points",
            ha="right", fontsize=7, color="#777",
        )  # fmt: skip
    axes.margins(0.15)
    axes.set(xscale="log", yscale="log", xlabel="peak memory, GB, weights included", ylabel="frames a second")
    return labels


def _latency(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.boxplot(
        [row["latency_ms"]["raw"] for row in rows], orientation="horizontal", whis=(0, 90), widths=0.6,
        tick_labels=[f"{_label(row)} (n={row['latency_ms']['n']})" for row in rows],
    )  # fmt: skip
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="latency, ms a call: box quartiles, whiskers minimum and p90, circles beyond")


def _roofline(axes: Axes, rows: list[dict[str, Any]], roofs: dict[str, Any]) -> list[tuple[float, float, str]]:
    shown = [row for row in rows if row["prediction"]]
    labels = []
    for row in shown:
        work, moved = row["prediction"]["gflop"], row["prediction"]["gb"]
        point = (work / moved, work / row["latency_ms"]["p50"])
        axes.plot(*point, "x" if row["engine"] == "reference" else "o", color=COLOURS[row["scorer"]], ms=7)
        labels.append((*point, _label(row)))
    tops: dict[str, float] = {}
    for gemm in roofs["gemm"]:
        tops[gemm["precision"]] = max(tops.get(gemm["precision"], 0.0), gemm.get("tflop_s", 0.0))
    low = min(row["prediction"]["gflop"] / row["prediction"]["gb"] for row in shown) / 3
    high = max(row["prediction"]["gflop"] / row["prediction"]["gb"] for row in shown) * 10
    for precision, top in tops.items():
        if top:
            ridge = 1e3 * top / roofs["copy_gb_s"]
            xs = [min(low, ridge / 3), ridge, max(high, 3 * ridge)]
            axes.plot(xs, [xs[0] * roofs["copy_gb_s"] / 1e3, top, top], color="#999", lw=1)
            axes.annotate(f"{precision} products", (xs[2], top), ha="right", va="bottom", fontsize=7, color="#777")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (account)", ylabel="TFLOP/s")
    return labels


def _ladder(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rungs = [row for row in rows if row.get("rung") is not None]
    names = [f"{row['rung']} {row['rung_name']}" for row in rungs]
    for place, row in enumerate(rungs):
        if row["status"] != "ok":
            axes.annotate(row["status"], (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
            continue
        axes.barh(place, row["fps"], color=COLOURS[row["scorer"]])
        error = (row["parity"] or {}).get("max_error")
        note = f"{row['fps']:.2f} FPS" + (f", map error {error:.0e}" if error is not None else "")
        axes.annotate(note, (row["fps"], place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(rungs)), names, fontsize=8)
    axes.margins(x=0.3)
    axes.set_ylim(len(rungs) - 0.4, -0.6)
    axes.set(xlabel="frames a second")
