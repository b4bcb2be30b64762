"""The demo's pictures: overlays of chosen cells by every bundle, histograms of scores, ROC curves."""

import base64
import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowad_fast.benchmarks.demo.judging import BATCH, GAUSSIAN, GAUSSIAN_LOCATED, Judged

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowad_fast.data.samples import Sample

_EACH = 1
"""Pictures of each kind and product in the report."""
KINDS = {
    "false rejects": "good cells with the highest scores",
    "misses": "defective cells with the lowest scores",
    "detections": "defective cells with the highest scores",
    "other defects": "drawn at random from the rest of the defective cells",
    "good": "drawn at random from the rest of the good cells",
}
_COLOURS = ("#e76f51", "#2a9d8f", "#5a7dd6", "#b07aa1", "#888888", "#bbbbbb")


@dataclass(frozen=True)
class Heat:
    """A cell's overlay by one method, as a data URI; `share` is the score on the overlay's scale, if it has one."""

    image: str
    status: str
    share: float | None


@dataclass(frozen=True)
class Cell:
    """A cell in the report: its photo as a data URI, and an overlay by each method."""

    kind: str
    name: str
    product: str
    defect: str
    photo: str
    overlays: dict[str, Heat]


def choose(
    test: Sequence["Sample"], scores: NDArray[np.float64], each: int = _EACH, seed: int = 0
) -> list[tuple[str, "Sample"]]:
    """Cells to look at, each with its kind: the ends of the ranking, and some drawn from between."""
    rng = np.random.RandomState(seed)
    labels = np.array([sample.label for sample in test])
    good, defective = (np.flatnonzero(labels == label) for label in (0, 1))
    good, defective = good[np.argsort(scores[good])], defective[np.argsort(scores[defective])]
    middle = defective[each:-each]
    chosen = {
        "false rejects": good[: -each - 1 : -1],
        "misses": defective[:each],
        "detections": defective[: -each - 1 : -1],
        "other defects": rng.permutation(middle)[:each],
        "good": rng.permutation(good[:-each])[:each],
    }
    return [(kind, test[i]) for kind, index in chosen.items() for i in index]


def pictures(
    bundles: Mapping[str, Path], chosen: Sequence[tuple[str, "Sample"]], folder: Path
) -> dict[str, list[Cell]]:
    """Photos of the chosen cells and their overlays by every bundle, by kind, for the report; PNG files in `folder`.

    Within a method and a product all overlays share one scale.
    """
    from PIL import Image

    import flowad_fast
    from flowad_fast.evaluation.inspection import heat_ranges, inspect_files, threshold
    from flowad_fast.evaluation.overlay import overlay

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    paths = [sample.path for _, sample in chosen]
    photos: list[str] = []
    overlays: list[dict[str, Heat]] = [{} for _ in chosen]
    for method, bundle in bundles.items():
        detector = flowad_fast.load(bundle, engine="onnxruntime")
        names = [sample.category if detector.conditional else "" for _, sample in chosen]
        spans = heat_ranges(detector, paths, names)
        results = inspect_files(detector, paths, names if detector.conditional else None, batch=BATCH)
        for i, ((kind, sample), result) in enumerate(zip(chosen, results, strict=True)):
            assert result.frame is not None and result.map is not None and result.score is not None, result.reason
            low, high = spans[names[i]]
            limit = threshold(detector, names[i])
            heat = overlay(result.frame, result.map, low, high)
            name = f"{i:02d}-{kind.replace(' ', '-')}-{sample.path.stem}-{method}.png"
            Image.fromarray(heat).save(folder / name)
            if len(photos) == i:
                photos.append(jpeg(result.frame))
            share = None if limit is None else (result.score - low) / (limit - low)
            overlays[i][method] = Heat(jpeg(heat), result.status, share)
    cells = [
        Cell(kind, sample.path.stem, sample.category, sample.defect, photo, heats)
        for (kind, sample), photo, heats in zip(chosen, photos, overlays, strict=True)
    ]
    return {kind: [cell for cell in cells if cell.kind == kind] for kind in KINDS}


def histograms(judged: Sequence[Judged]) -> "Figure":
    """Scores of a product's good and defective cells by method, with the threshold where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.7), layout="constrained")
    for axes, one in zip(np.ravel(figure.subplots(1, len(judged))), judged, strict=True):
        labels = np.array([cell.label for cell in one.cells])
        edges = np.histogram_bin_edges(one.scores, bins=36)
        for label, name, colour in ((0, "good", "#2a9d8f"), (1, "defective", "#e76f51")):
            axes.hist(one.scores[labels == label], bins=list(edges), alpha=0.7, label=name, color=colour)
        if one.outcome.threshold is not None:
            axes.axvline(one.outcome.threshold, color="#888888", linestyle="--", label="threshold")
        axes.set_title(one.outcome.method, fontsize="small")
        _both_themes(axes)
    axes.legend(fontsize="x-small", frameon=False, labelcolor="#888888")
    return figure


def roc_curves(judged: Sequence[Judged]) -> "Figure":
    """ROC of each method over a product's test cells."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for one, colour in zip(judged, _COLOURS[: len(judged)], strict=True):
        false, true, _ = roc_curve([cell.label for cell in one.cells], one.scores)
        dashed = one.outcome.method in (GAUSSIAN, GAUSSIAN_LOCATED)
        axes.plot(false, true, label=one.outcome.method, color=colour, linestyle="--" if dashed else "-")
    axes.set(xlabel="good cells rejected", ylabel="defective cells found", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(fontsize="small", frameon=False, labelcolor="#888888", loc="lower right")
    _both_themes(axes)
    return figure


def _both_themes(axes: Any) -> None:
    """A grey that is readable on white and on black, without a background."""
    axes.set_facecolor("none")
    axes.tick_params(colors="#888888", labelsize="small")
    for item in (axes.title, axes.xaxis.label, axes.yaxis.label):
        item.set_color("#888888")
    for spine in axes.spines.values():
        spine.set_color("#888888")
    axes.spines[["top", "right"]].set_visible(False)


def svg(figure: "Figure") -> str:
    """A figure as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def jpeg(picture: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) as a data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "image/jpeg")


def colour_bar() -> str:
    """The heat's colours as an overlay on grey shows them, from no heat to most."""
    from flowad_fast.evaluation.overlay import overlay

    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(12, 0)
    return jpeg(overlay(np.full((12, 256, 3), 128, np.uint8), ramp, 0, 1))


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
