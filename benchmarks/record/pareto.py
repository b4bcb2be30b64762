"""The figure of a record of peers: image AUROC against time per frame, one panel a product."""

from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from flowad_fast.benchmarks.record.figures import PALETTE, place
from flowad_fast.benchmarks.record.peers import PeerRow, PeersRecord, front
from flowad_fast.benchmarks.record.report import where

OURS, PEER, LINE = PALETTE[0], PALETTE[1], "#999"


def draw(record: PeersRecord, folder: Path) -> list[Path]:
    """Write `pareto.png`, if any row has both a time and an accuracy; returns its path."""
    panels = {product: points for product in record.products if (points := _points(record, product))}
    if not panels:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 5), dpi=120, layout="constrained", squeeze=False
    )
    for one, (product, points) in zip(axes[0], panels.items(), strict=True):
        _panel(one, product, points)
    figure.suptitle(
        f"{record.dataset}, batch 1, {record.threads} thread(s) · {where(record)}", fontsize=8, x=0.01, ha="left"
    )
    path = folder / "pareto.png"
    figure.savefig(path)
    plt.close(figure)
    return [path]


def _points(record: PeersRecord, product: str) -> list[tuple[float, float, float, float, PeerRow]]:
    """(ms, AUROC, low, high, row) of the rows that have both."""
    found = []
    for row in record.cases:
        accuracy = row.of(product)
        if accuracy is not None and row.measured is not None:
            ms = row.measured.latency_ms.p50
            found.append((ms, accuracy.image_auroc, accuracy.low, accuracy.high, row))
    return found


def _panel(axes: Axes, product: str, points: list[tuple[float, float, float, float, PeerRow]]) -> None:
    for ms, auroc, low, high, row in points:
        axes.errorbar(
            ms, auroc, yerr=[[auroc - low], [high - auroc]], fmt="o" if row.ours else "s", ms=7, lw=1,
            color=OURS if row.ours else PEER,
        )  # fmt: skip
    best = front((ms, auroc, row.name) for ms, auroc, _, _, row in points)
    line = sorted((ms, auroc) for ms, auroc, _, _, row in points if row.name in best)
    axes.step(*zip(*line, strict=True), where="post", color=LINE, lw=1, ls="--", zorder=0)
    axes.set(xscale="log", xlabel="ms per frame (median; log scale)", ylabel="image AUROC, 95 % interval")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.2, y=0.1)
    axes.set_title(f"{product}: circles ours, squares peers, dashed: nothing is both faster and better", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    place(axes, [(ms, auroc, _label(row, product)) for ms, auroc, _, _, row in points])


def _label(row: PeerRow, product: str) -> str:
    """Its name, and what the budget left of its training."""
    accuracy = row.of(product)
    return row.name if accuracy is None or not accuracy.short else f"{row.name}, {accuracy.short}"
