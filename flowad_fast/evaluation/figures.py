"""A report as figures, and pictures of what the detector got wrong."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowad_fast.data.images import read_frame
from flowad_fast.evaluation.metrics import METRICS
from flowad_fast.evaluation.overlay import overlay
from flowad_fast.evaluation.report import DetectorLike, ImageRow, Report, class_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_report(report: Report, path: str | Path) -> None:
    """Write a figure with the metrics of each category as bars and, below, a histogram of scores per category."""
    from matplotlib.figure import Figure

    categories = list(report.metrics)
    columns = min(4, len(categories))
    grid_rows = math.ceil(len(categories) / columns)
    figure = Figure(figsize=(max(8, 3 * columns), 3.5 + 2.2 * grid_rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.5, 2.2 * grid_rows]).ravel()

    _bars(upper.subplots(), report)
    cells = lower.subplots(grid_rows, columns, squeeze=False).ravel()
    for cell, category in zip(cells[: len(categories)], categories, strict=True):
        _histogram(cell, report, category)
    cells[0].legend(fontsize="small")
    for cell in cells[len(categories) :]:
        cell.set_axis_off()
    figure.savefig(path, dpi=120)


def _bars(axes: "Axes", report: Report) -> None:
    categories, values = list(report.metrics), list(report.metrics.values())
    shown = [name for name in METRICS if any(one[name] is not None for one in values)]
    places = np.arange(len(categories))
    width = 0.8 / max(1, len(shown))
    for i, name in enumerate(shown):
        heights = [np.nan if (value := one[name]) is None else 100 * value for one in values]
        axes.bar(places + (i - (len(shown) - 1) / 2) * width, heights, width, label=name)
    axes.set_xticks(places, map(_caption, categories), rotation=30 if len(categories) > 4 else 0, parse_math=False)
    axes.set(ylabel="%", ylim=(0, 100))
    title = f"{report.dataset}: {report.detector}, image score {report.image_score}"
    axes.set_title(_caption(title), parse_math=False)
    if shown:
        axes.legend(fontsize="small", ncols=len(METRICS), loc="upper center", bbox_to_anchor=(0.5, -0.15))


def _histogram(axes: "Axes", report: Report, category: str) -> None:
    scores = [(row.label, row.score) for row in report.images if row.category == category and row.score is not None]
    edges = list(np.histogram_bin_edges([score for _, score in scores], bins=30))
    for label, name in enumerate(("good", "defective")):
        axes.hist([score for of, score in scores if of == label], bins=edges, alpha=0.6, label=name)
    axes.set_title(_caption(category), fontsize="medium", parse_math=False)
    axes.tick_params(labelsize="small")


def worst_mistakes(report: Report, n: int = 12) -> list[tuple[ImageRow, float]]:
    """Up to n images that are ranked worst, half good and half defective, each with its share of wrong comparisons.

    That share is the part of the category's images of the other label whose score is on the wrong side: scale-free,
    so that categories compare, and 1 - AUROC on average. Ties are ordered by score: high for good, low for defective.
    """
    scored = [(row, row.score) for row in report.images if row.score is not None]
    scores: dict[tuple[str, int], list[float]] = {}
    for row, score in scored:
        scores.setdefault((row.category, row.label), []).append(score)
    ranked: dict[int, list[tuple[float, float, ImageRow]]] = {0: [], 1: []}
    for row, score in scored:
        sign = -1 if row.label else 1
        others = np.array(scores.get((row.category, 1 - row.label), []))
        wrong = float(np.mean(sign * score >= sign * others)) if others.size else 0.0
        ranked[row.label].append((wrong, sign * score, row))
    good, defective = (sorted(ranked[label], key=lambda one: one[:2], reverse=True) for label in (0, 1))
    return [(row, wrong) for wrong, _, row in good[: n - n // 2] + defective[: n // 2]]


def save_mistakes(report: Report, detector: DetectorLike, folder: str | Path, n: int = 12) -> list[Path]:
    """Run the detector again on `worst_mistakes` and write each frame beside its heat map, with a caption, as PNG.

    All share one colour scale. Returns the files in the order of `worst_mistakes`; the folder is made if needed.

    Raises:
        FrameError: an image cannot be read any more.
    """
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mistakes = worst_mistakes(report, n)
    names = class_names(detector)
    frames = [read_frame(row.path) for row, _ in mistakes]
    maps = [
        np.asarray(detector(frame[None], [row.category] if names else None).map)[0]
        for frame, (row, _) in zip(frames, mistakes, strict=True)
    ]
    low, high = min((map.min() for map in maps), default=0.0), max((map.max() for map in maps), default=0.0)
    if high == low:  # constant maps: nothing to show, but the frames still are
        high = low + 1
    files = []
    for i, (frame, map, (row, wrong)) in enumerate(zip(frames, maps, mistakes, strict=True), start=1):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        for axes, picture in zip(figure.subplots(1, 2), (frame, overlay(frame, map, low, high)), strict=True):
            axes.imshow(picture)
            axes.set_axis_off()
        opposite = "defective images score no higher" if row.label == 0 else "good images score no lower"
        caption = f"{row.category}, {'defective: ' + row.defect if row.label else 'good'}, {Path(row.path).name}"
        text = f"{_caption(caption)}\nscore {row.score:.4g}; {wrong:.1%} of the {opposite}"
        figure.suptitle(text, fontsize="medium", parse_math=False)
        name = f"{i:02d}_{'defective' if row.label else 'good'}_{row.category}_{Path(row.path).stem}"
        file = folder / f"{_file_name(name)}.png"
        figure.savefig(file, dpi=110)
        files.append(file)
    return files


def _caption(text: str) -> str:
    """`text` for a figure, on one line: what no font can draw as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _file_name(text: str) -> str:
    """`text` as a file's name that every system takes; a class name may hold separators."""
    return re.sub(r"[^\w.()+ -]", "_", text)[:120]
