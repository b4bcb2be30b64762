"""The main job on real photos, end to end: export, benchmark, judge, report.

The photos are electroluminescence pictures of monocrystalline solar cells (ELPV), split as `data.layouts.elpv` says.
"""

import base64
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from flowad_fast.cli import common
from flowad_fast.errors import ParityError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowad_fast.benchmarks.record.record import Record
    from flowad_fast.data.samples import Sample
    from flowad_fast.model import FlowModel
    from flowad_fast.stages.scorers import Scorer

ALPHA = 0.05
"""Accepted false-reject rate; the calibration split has three times the good parts that it needs."""
BATCH = 8
PARITY_FRAMES = 8
BASELINE = "Gaussian baseline"
_WORKERS = 2
_EACH = 3
"""Pictures of each kind in the report."""
_KINDS = {
    "false rejects": "good cells with the highest scores",
    "misses": "defective cells with the lowest scores",
    "detections": "defective cells with the highest scores",
    "other defects": "drawn at random from the rest of the defective cells",
    "good": "drawn at random from the rest of the good cells",
}


@dataclass(frozen=True)
class Outcome:
    """How one method did on the test cells; metrics are fractions.

    Verdicts count good and defective cells; None for the baseline, which has no calibration.
    """

    method: str
    options: str
    engine: str
    image_auroc: float
    image_ap: float
    image_f1max: float
    threshold: float | None = None
    verdicts: dict[str, dict[str, int]] | None = None
    seconds: float | None = None

    @property
    def false_rejects(self) -> float | None:
        """Share of good test cells that were called anomalous."""
        return self._share("good")

    @property
    def detected(self) -> float | None:
        """Share of defective test cells that were called anomalous."""
        return self._share("defective")

    def _share(self, label: str) -> float | None:
        return None if self.verdicts is None else self.verdicts[label]["anomalous"] / sum(self.verdicts[label].values())


@dataclass(frozen=True)
class Summary:
    """What the run had to do with, and seconds by step."""

    cells: dict[str, int]
    defective: int
    alpha: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class Heat:
    """A cell's overlay by one scorer, as a data URI; `share` is the score on the overlay's scale."""

    image: str
    status: str
    share: float | None


@dataclass(frozen=True)
class Cell:
    """A cell in the report: its photo as a data URI, and an overlay by each scorer."""

    kind: str
    name: str
    defect: str
    photo: str
    overlays: dict[str, Heat]


def demo(
    output: Annotated[Path, typer.Option(help="Folder for bundles, results and the report.")] = Path("demo-output"),
) -> None:
    """Export the demo checkpoint, benchmark it, judge the test cells, and write a report."""
    began = time.perf_counter()
    from flowad_fast.data.layouts import read_dataset
    from flowad_fast.stages.scorers import Density, Inversion, Reconstruction

    # One probe ranks the cells as well as two; three evaluations of the velocity field for each scorer.
    scorers = (Density(steps=3, probes=1), Inversion(steps=3), Reconstruction(steps=6, tau=0.5))
    dataset = read_dataset("elpv", None)
    train, test = dataset.select("train"), dataset.select("test")
    seconds: dict[str, float] = {}

    def lap(step: str, since: float) -> None:
        seconds[step] = time.perf_counter() - since
        common.err.print(f"{step}: {seconds[step]:.0f} s", highlight=False)

    output.mkdir(parents=True, exist_ok=True)
    since = time.perf_counter()
    # Tracing keeps one core busy with Python, so exports run beside each other.
    with ProcessPoolExecutor(_WORKERS, get_context("spawn"), initializer=_share_cores) as pool:
        exports = {s.kind: pool.submit(export, s, output / "bundles" / f"demo-{s.kind}") for s in scorers}
        baseline = pool.submit(baseline_scores, train, test)
        bundles: dict[str, Path] = {}
        with common.err.status("exporting three bundles, each checked against the reference and calibrated"):
            for kind, export_of in exports.items():
                bundles[kind] = export_of.result()
                common.err.print(f"exported: {bundles[kind]}", highlight=False)
            scores = {BASELINE: baseline.result()}
    lap("export and baseline", since)
    since = time.perf_counter()
    with common.err.status("benchmark") as status:
        record = benchmark(list(bundles.values()), lambda line: status.update(f"benchmark · {line}"))
    lap("benchmark", since)
    (output / "benchmark.json").write_text(json.dumps(record.dump(), indent=1) + "\n", encoding="utf-8")

    since = time.perf_counter()
    outcomes = []
    for name, bundle in bundles.items():
        outcome, scores[name] = judge(bundle, test, output / f"{name}.csv")
        outcomes.append(outcome)
    outcomes.append(
        _outcome(BASELINE, "one per position, full covariance, 100 channels", "torch", test, scores[BASELINE])
    )
    lap("judging", since)

    since = time.perf_counter()
    best = max(outcomes[:-1], key=lambda outcome: outcome.image_auroc).method
    rows = pictures(bundles, choose(test, scores[best]), output / "pictures")
    labels = np.array([sample.label for sample in test])
    figures = {
        "scores": histograms(labels, scores, {o.method: o.threshold for o in outcomes}),
        "roc": roc_curves(labels, scores),
    }
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=120, facecolor="white")
    lap("pictures", since)
    seconds["in all"] = time.perf_counter() - began
    summary = Summary(
        cells={"train": len(train), "calibration": len(dataset.select("calibration")), "test": len(test)},
        defective=int(labels.sum()),
        alpha=ALPHA,
        seconds={step: round(value, 1) for step, value in seconds.items()},
    )
    judged = [{**asdict(o), "false_rejects": o.false_rejects, "detected": o.detected} for o in outcomes]
    (output / "summary.json").write_text(
        json.dumps({**asdict(summary), "outcomes": judged}, indent=2) + "\n", encoding="utf-8"
    )
    report = output / "report.html"
    report.write_text(render(summary, outcomes, record, figures, rows, best), encoding="utf-8")
    _print(outcomes, record, summary, report)


def _share_cores() -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


def export(scorer: "Scorer", target: Path, model: "FlowModel | None" = None) -> Path:
    """A calibrated bundle (ONNX and eager) with the scorer, of the demo checkpoint unless another model is given.

    Raises:
        ParityError: an artefact does not agree with the fp32 reference.
    """
    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.export.exporter import export_bundle
    from flowad_fast.export.frames import DEMO, good_parts, parity_frames

    result = export_bundle(
        model or load_checkpoint(DEMO), scorer, target, formats=("onnx", "eager"),
        frames=parity_frames(DEMO, PARITY_FRAMES), good=good_parts(DEMO), alpha=ALPHA, quiet=True,
    )  # fmt: skip
    if not result.ok or result.path is None:
        raise ParityError(f"{scorer.kind}: {result.status}; kept as {result.rejected}")
    return result.path


def benchmark(bundles: Sequence[Path], tell: Callable[[str], None]) -> "Record":
    """The record of `flowad-bench --quick` over the bundles' ONNX engines."""
    from flowad_fast.benchmarks.measure import harness
    from flowad_fast.benchmarks.measure.cases import Case
    from flowad_fast.benchmarks.measure.turns import QUICK
    from flowad_fast.bundle import read

    cases = [Case(str(bundle), read(bundle)[1].scorer, "onnxruntime") for bundle in bundles]
    return harness.run(cases, QUICK, tell)


def judge(bundle: Path, test: Sequence["Sample"], results: Path) -> tuple[Outcome, NDArray[np.float64]]:
    """Judge the test cells as `flowad-inspect` does, through the bundle's ONNX engine; the rows go to `results`."""
    import flowad_fast
    from flowad_fast.bundle import read
    from flowad_fast.evaluation.inspection import ResultFile, bundle_identity, inspect_files

    scorer = read(bundle)[1].scorer
    detector = flowad_fast.load(bundle, engine="onnxruntime")
    scores, verdicts = [], {"good": Counter[str](), "defective": Counter[str]()}
    began = time.perf_counter()
    with (
        ResultFile(results, "csv", bundle_identity(bundle), detector.engine, resume=False) as file,
        common.progress(scorer.kind, len(test)) as advance,
    ):
        for sample, result in zip(test, inspect_files(detector, [s.path for s in test], batch=BATCH), strict=True):
            file.append(result)
            assert result.score is not None, f"{sample.path}: {result.reason}"
            scores.append(result.score)
            verdicts[sample.defect][result.status] += 1
            advance(1)
    assert detector.calibration is not None, "`export` calibrates"
    return (
        _outcome(
            scorer.kind, repr(scorer), detector.engine, test, np.array(scores),
            threshold=detector.calibration.classes[""].threshold,
            verdicts={label: dict.fromkeys(("good", "anomalous"), 0) | counts for label, counts in verdicts.items()},
            seconds=time.perf_counter() - began,
        ),
        np.array(scores),
    )  # fmt: skip


def _outcome(
    method: str, options: str, engine: str, test: Sequence["Sample"], scores: NDArray[np.float64], **more: Any
) -> Outcome:
    from flowad_fast.evaluation.metrics import image_metrics

    metrics: dict[str, Any] = {**image_metrics([s.label for s in test], scores)}
    return Outcome(method, options, engine, **metrics, **more)


def baseline_scores(train: Sequence["Sample"], test: Sequence["Sample"]) -> NDArray[np.float64]:
    """Scores of the Gaussian baseline on the demo checkpoint's features, (n,): maxima of upsampled maps."""
    import torch

    from flowad_fast.benchmarks.demo.gaussian import PositionGaussians
    from flowad_fast.checkpoints.load import load_checkpoint
    from flowad_fast.data.images import read_frame
    from flowad_fast.kernels import reference as ops

    model = load_checkpoint("demo")

    def features(samples: Sequence["Sample"]) -> torch.Tensor:
        return torch.cat([model.features(read_frame(s.path)[None]) for s in samples])  # one fits the cache best

    gaussians = PositionGaussians.fit(features(train))
    maps = gaussians.map(features(test))
    return np.array([float(ops.upsample(one[None], model.spec.image.size).max()) for one in maps])


def choose(test: Sequence["Sample"], scores: NDArray[np.float64], seed: int = 0) -> list[tuple[str, "Sample"]]:
    """Cells to look at, each with its kind: the ends of the ranking, and some drawn from between."""
    rng = np.random.RandomState(seed)
    labels = np.array([sample.label for sample in test])
    good, defective = (np.flatnonzero(labels == label) for label in (0, 1))
    good, defective = good[np.argsort(scores[good])], defective[np.argsort(scores[defective])]
    middle = defective[_EACH:-_EACH]
    chosen = {
        "false rejects": good[: -_EACH - 1 : -1],
        "misses": defective[:_EACH],
        "detections": defective[: -_EACH - 1 : -1],
        "other defects": rng.permutation(middle)[:_EACH],
        "good": rng.permutation(good[:-_EACH])[:_EACH],
    }
    return [(kind, test[i]) for kind, index in chosen.items() for i in index]


def pictures(bundles: dict[str, Path], chosen: Sequence[tuple[str, "Sample"]], folder: Path) -> dict[str, list[Cell]]:
    """Photos of the chosen cells and their overlays by every bundle, by kind, for the report; PNG files in `folder`.

    Within a scorer all overlays share one scale.
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
    for scorer, bundle in bundles.items():
        detector = flowad_fast.load(bundle, engine="onnxruntime")
        (span,) = heat_ranges(detector, paths).values()
        limit = threshold(detector)
        for i, ((kind, sample), result) in enumerate(
            zip(chosen, inspect_files(detector, paths, batch=BATCH), strict=True)
        ):
            assert result.frame is not None and result.map is not None and result.score is not None, result.reason
            heat = overlay(result.frame, result.map, *span)
            name = f"{i:02d}-{kind.replace(' ', '-')}-{sample.path.stem}-{scorer}.png"
            Image.fromarray(heat).save(folder / name)
            if len(photos) == i:
                photos.append(_jpeg(result.frame))
            share = None if limit is None else (result.score - span[0]) / (limit - span[0])
            overlays[i][scorer] = Heat(_jpeg(heat), result.status, share)
    cells = [
        Cell(kind, sample.path.stem, sample.defect, photo, heats)
        for (kind, sample), photo, heats in zip(chosen, photos, overlays, strict=True)
    ]
    return {kind: [cell for cell in cells if cell.kind == kind] for kind in _KINDS}


def histograms(
    labels: NDArray[np.int_], scores: dict[str, NDArray[np.float64]], thresholds: dict[str, float | None]
) -> "Figure":
    """Scores of good and defective cells by method, with the threshold where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.7), layout="constrained")
    for axes, (method, values) in zip(figure.subplots(1, len(scores)), _baseline_last(scores), strict=True):
        edges = np.histogram_bin_edges(values, bins=36)
        for label, name, colour in ((0, "good", "#2a9d8f"), (1, "defective", "#e76f51")):
            axes.hist(values[labels == label], bins=list(edges), alpha=0.7, label=name, color=colour)
        limit = thresholds.get(method)
        if limit is not None:
            axes.axvline(limit, color="#888888", linestyle="--", label="threshold")
        axes.set_title(method, fontsize="medium")
        axes.legend(fontsize="x-small", frameon=False, labelcolor="#888888")
        _both_themes(axes)
    return figure


def roc_curves(labels: NDArray[np.int_], scores: dict[str, NDArray[np.float64]]) -> "Figure":
    """ROC of each method over the test cells."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes = figure.subplots()
    colours = ("#e76f51", "#2a9d8f", "#5a7dd6", "#888888")
    for (method, values), colour in zip(_baseline_last(scores), colours[: len(scores)], strict=True):
        false, true, _ = roc_curve(labels, values)
        axes.plot(false, true, label=method, color=colour, linestyle="--" if method == BASELINE else "-")
    axes.set(xlabel="good cells rejected", ylabel="defective cells found", xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(fontsize="small", frameon=False, labelcolor="#888888", loc="lower right")
    _both_themes(axes)
    return figure


def _baseline_last(scores: dict[str, NDArray[np.float64]]) -> list[tuple[str, NDArray[np.float64]]]:
    return sorted(scores.items(), key=lambda item: item[0] == BASELINE)


def _both_themes(axes: Any) -> None:
    """A grey that is readable on white and on black, without a background."""
    axes.set_facecolor("none")
    axes.tick_params(colors="#888888", labelsize="small")
    for item in (axes.title, axes.xaxis.label, axes.yaxis.label):
        item.set_color("#888888")
    for spine in axes.spines.values():
        spine.set_color("#888888")
    axes.spines[["top", "right"]].set_visible(False)


def render(
    summary: Summary,
    outcomes: Sequence[Outcome],
    record: "Record",
    figures: dict[str, "Figure"],
    rows: dict[str, list[Cell]],
    best: str,
) -> str:
    """The report: one HTML page that needs no other file."""
    from jinja2 import Environment, StrictUndefined

    from flowad_fast.benchmarks.record import report

    template = files("flowad_fast.benchmarks.demo").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        summary=summary,
        outcomes=outcomes,
        best=best,
        baseline=BASELINE,
        bench={
            "grids": report.grids(record),
            "remarks": report.remarks(record),
            "where": report.where(record),
        },
        figures={name: _svg(figure) for name, figure in figures.items()},
        kinds=_KINDS,
        rows=rows,
        colours=_colour_bar(),
    )


def _svg(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True)
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _jpeg(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    return _data_uri(buffer.getvalue(), "image/jpeg")


def _colour_bar() -> str:
    """The heat's colours as an overlay on grey shows them, from no heat to most."""
    from flowad_fast.evaluation.overlay import overlay

    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(12, 0)
    return _jpeg(overlay(np.full((12, 256, 3), 128, np.uint8), ramp, 0, 1))


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _print(outcomes: Sequence[Outcome], record: "Record", summary: Summary, report: Path) -> None:
    from rich.table import Table

    from flowad_fast.benchmarks.record import report as bench_report

    good = summary.cells["test"] - summary.defective
    table = Table(title=f"{good} good and {summary.defective} defective test cells", title_justify="left")
    for column in ("method", "AUROC", "AP", "F1max", "good rejected", "defects found", "cells/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for o in outcomes:
        counts = ["", ""] if o.verdicts is None else [
            f"{o.verdicts[label]['anomalous']} ({share:.1%})"
            for label, share in (("good", o.false_rejects), ("defective", o.detected))
        ]  # fmt: skip
        speed = "" if o.seconds is None else f"{summary.cells['test'] / o.seconds:.1f}"
        metrics = (f"{value:.3f}" for value in (o.image_auroc, o.image_ap, o.image_f1max))
        table.add_row(o.method, *metrics, *counts, speed)
    common.out.print(table)
    for rows in bench_report.tables(record):
        common.out.print(rows)
    for line in bench_report.remarks(record):
        common.out.print(line, markup=False, highlight=False)
    common.out.print(f"report: {report} ({summary.seconds['in all']:.0f} s in all)", highlight=False)


main = common.command(demo)
