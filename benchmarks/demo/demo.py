"""The main job on real photos, end to end: export, benchmark, judge, report.

The photos are electroluminescence pictures of mono- and polycrystalline solar cells (ELPV): two products, one model.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowad_fast.benchmarks.demo import judging
from flowad_fast.benchmarks.demo.judging import ALPHA, CELLS, RECIPE, Judged, Outcome
from flowad_fast.benchmarks.demo.pictures import (
    KINDS,
    Cell,
    choose,
    colour_bar,
    histograms,
    pictures,
    roc_curves,
    svg,
)
from flowad_fast.cli import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flowad_fast.benchmarks.record.record import Record

_WORKERS = 2


@dataclass(frozen=True)
class Product:
    """What the run found of one product.

    Attributes:
        cells: how many of each split.
        defective: test cells.
        outcomes: the recipe first, then the paper's scorers, then the Gaussians.
    """

    cells: Mapping[str, int]
    defective: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Summary:
    """What the run found, by product, and seconds by step."""

    products: Mapping[str, Product]
    alpha: float
    seconds: Mapping[str, float]

    def dump(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "alpha": self.alpha,
            "seconds": dict(self.seconds),
            "products": {
                name: {
                    "cells": dict(one.cells),
                    "defective": one.defective,
                    "outcomes": [outcome.dump() for outcome in one.outcomes],
                }
                for name, one in self.products.items()
            },
        }


def demo(
    output: Annotated[Path, typer.Option(help="Folder for bundles, results and the report.")] = Path("demo-output"),
) -> None:
    """Export the shipped two-product checkpoint, benchmark it, judge the test cells, and write a report."""
    began = time.perf_counter()
    from flowad_fast.data.layouts import read_dataset
    from flowad_fast.shipped import PHOTOS

    methods = judging.methods()
    dataset = read_dataset(PHOTOS[CELLS], None)
    train, test = dataset.select("train"), dataset.select("test")
    seconds: dict[str, float] = {}

    def lap(step: str, since: float) -> None:
        seconds[step] = round(time.perf_counter() - since, 1)
        common.err.print(f"{step}: {seconds[step]:.0f} s", highlight=False)

    output.mkdir(parents=True, exist_ok=True)
    since = time.perf_counter()
    # Tracing keeps one core busy with Python, so exports run beside each other.
    with ProcessPoolExecutor(_WORKERS, get_context("spawn"), initializer=_share_cores) as pool:
        baseline = pool.submit(judging.gaussians, train, test, methods[0].aggregate)
        exports = {m.name: pool.submit(judging.export, m, output / "bundles" / f"{CELLS}-{m.name}") for m in methods}
        bundles: dict[str, Path] = {}
        with common.err.status(f"exporting {len(methods)} bundles, each checked against the reference and calibrated"):
            for name, export_of in exports.items():
                bundles[name] = export_of.result()
                common.err.print(f"exported: {bundles[name]}", highlight=False)
            gaussians = baseline.result()
    lap("export and baseline", since)
    since = time.perf_counter()
    with common.err.status("benchmark") as status:
        record = benchmark(list(bundles.values()), lambda line: status.update(f"benchmark · {line}"))
    lap("benchmark", since)
    (output / "benchmark.json").write_text(json.dumps(record.dump(), indent=1) + "\n", encoding="utf-8")

    since = time.perf_counter()
    judged: dict[str, list[Judged]] = {product: [] for product in dataset.categories}
    for method in methods:
        some = judging.spread(test, method.every)
        for product, one in judging.judge(method, bundles[method.name], some, output / f"{method.name}.csv").items():
            judged[product].append(one)
    for product, found in gaussians.items():
        judged[product] += found
    lap("judging", since)

    since = time.perf_counter()
    chosen = [pick for found in judged.values() for pick in choose(found[0].cells, found[0].scores)]
    rows = pictures(bundles, chosen, output / "pictures")
    figures = {}
    for product, found in judged.items():
        for name, figure in (("scores", histograms(found)), ("roc", roc_curves(found))):
            figures[f"{name}-{product}"] = figure
            figure.savefig(output / f"{name}-{product}.png", dpi=120, facecolor="white")
    lap("pictures", since)
    seconds["in all"] = round(time.perf_counter() - began, 1)
    splits = {split: judging.counted(dataset.select(split)) for split in ("train", "calibration", "test")}
    summary = Summary(
        {
            product: Product(
                {split: count[product] for split, count in splits.items()},
                len(dataset.select("test", product, 1)),
                tuple(one.outcome for one in found),
            )
            for product, found in judged.items()
        },
        ALPHA,
        seconds,
    )
    (output / "summary.json").write_text(json.dumps(summary.dump(), indent=2) + "\n", encoding="utf-8")
    report = output / "report.html"
    report.write_text(render(summary, record, figures, rows), encoding="utf-8")
    _print(summary, record, report)


def _share_cores() -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


def benchmark(bundles: Sequence[Path], tell: Callable[[str], None]) -> "Record":
    """The record of `flowad-bench --quick` over the bundles' ONNX engines."""
    from flowad_fast.benchmarks.measure import harness
    from flowad_fast.benchmarks.measure.cases import Case
    from flowad_fast.benchmarks.measure.turns import QUICK
    from flowad_fast.bundle import read

    cases = [Case(str(bundle), read(bundle)[1].scorer, "onnxruntime") for bundle in bundles]
    return harness.run(cases, QUICK, tell)


def render(
    summary: Summary, record: "Record", figures: Mapping[str, "Figure"], rows: Mapping[str, Sequence[Cell]]
) -> str:
    """The report: one HTML page that needs no other file."""
    from jinja2 import Environment, StrictUndefined

    from flowad_fast.benchmarks.record import report

    template = files("flowad_fast.benchmarks.demo").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        summary=summary,
        recipe=RECIPE,
        statistics=judging.STATISTICS,
        spread=judging.SPREAD,
        bench={
            "grids": report.grids(record),
            "remarks": report.remarks(record),
            "where": report.where(record),
        },
        figures={name: svg(figure) for name, figure in figures.items()},
        kinds=KINDS,
        rows=rows,
        colours=colour_bar(),
    )


def _print(summary: Summary, record: "Record", report: Path) -> None:
    from rich.table import Table

    from flowad_fast.benchmarks.record import report as bench_report

    for name, product in summary.products.items():
        good = product.cells["test"] - product.defective
        table = Table(title=f"{name}: {good} good and {product.defective} defective test cells", title_justify="left")
        for column in ("method", "cells", "AUROC", "95 %", "AP", "F1max", "good rejected", "defects found", "cells/s"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for o in product.outcomes:
            counts = ["", ""] if o.verdicts is None else [
                f"{o.verdicts[label]['anomalous']} ({share:.1%})"
                for label, share in (("good", o.false_rejects), ("defective", o.detected))
            ]  # fmt: skip
            speed = "" if o.seconds is None else f"{o.cells / o.seconds:.1f}"
            ranking = (f"{o.image_auroc:.3f}", f"{o.low:.3f}–{o.high:.3f}", f"{o.image_ap:.3f}", f"{o.image_f1max:.3f}")
            table.add_row(o.method, str(o.cells), *ranking, *counts, speed)
        common.out.print(table)
    for rows in bench_report.tables(record):
        common.out.print(rows)
    for line in bench_report.remarks(record):
        common.out.print(line, markup=False, highlight=False)
    common.out.print(f"report: {report} ({summary.seconds['in all']:.0f} s in all)", highlight=False)


def readme_table(summary: Mapping[str, Any]) -> str:
    """README's table of a summary as it is on disk, Markdown."""
    lines = [
        "| product | method | evaluations | cells | image AUROC (95 %) | AP | F1max | good rejected | defects found |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, product in summary["products"].items():
        for o in product["outcomes"]:
            shares = ["–" if o[key] is None else f"{o[key]:.1%}" for key in ("false_rejects", "detected")]
            evaluations = "–" if o["evaluations"] is None else o["evaluations"]
            ranking = f"{o['image_auroc']:.3f} ({o['low']:.3f}–{o['high']:.3f})"
            more = f"{o['image_ap']:.3f} | {o['image_f1max']:.3f}"
            lines.append(
                f"| {name} | {o['method']} | {evaluations} | {o['cells']} | {ranking} | {more} | {' | '.join(shares)} |"
            )
    return "\n".join(lines) + "\n"


main = common.command(demo)
