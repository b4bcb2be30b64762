"""The demo's parts on a tiny model and a few real cells: bundles, verdicts, pictures, report; and its baseline."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowad_fast.benchmarks.demo import demo, judging, pictures
from flowad_fast.benchmarks.demo.gaussian import SHRINKAGE, PositionGaussians
from flowad_fast.benchmarks.measure import harness
from flowad_fast.benchmarks.measure.cases import Case, empty_row, make_scorer, random_model, spec_of
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.record import Latency, Measured, Memory, Parity, Ratio, Record, Stability
from flowad_fast.benchmarks.record.report import RESULTS
from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.evaluation.inspection import ResultFile, bundle_identity
from flowad_fast.stages.scorers import Inversion

ROOT = Path(__file__).parents[1]
METHOD = judging.Method("inversion", Inversion(steps=2))


@pytest.fixture(scope="module")
def cells():
    test = read_dataset("elpv", None).select("test")
    return [s for label in (0, 1) for s in [s for s in test if s.label == label][:10]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """One of a tiny model with random weights, as the demo exports its bundles: parity, calibration on real cells."""
    model = random_model(spec_of(32, 1, 2, backbone="efficientnet-lite0", size=64, invad=True), torch.device("cpu"))
    return {"inversion": judging.export(METHOD, tmp_path_factory.mktemp("bundles") / "tiny", model, "demo")}


@pytest.fixture(scope="module")
def judged(bundles, cells, tmp_path_factory):
    results = tmp_path_factory.mktemp("results") / "inversion.csv"
    return results, judging.judge(METHOD, bundles["inversion"], cells, results)["mono"]


def row(status="ok"):
    """A benchmark row as the harness makes it."""
    case = Case("demo", make_scorer("density", probes=10), "eager")
    return empty_row(case, status, "a reason").but(nfe=3)


def record():
    """Two rows with everything that the report reads; figures are made up."""
    measured = row().but(
        measured=Measured(
            latency_ms=Latency(p50=12.34, p90=13, p99=14.5, n=9, raw=(12.34,)),
            fps=81.0,
            memory_mb=Memory(above_idle=55.0, peak=100.0, idle=45.0),
            stability=Stability(verdict="noisy", spread=0.3, drift=0.1),
        ),
        ratio_to_reference=Ratio(speed=1.7, low=1.5, high=1.9, pairs=3, memory=4.2),
        parity=Parity(
            passed=True,
            frames=4,
            source="cells",
            device="cpu",
            scale=1,
            max_error=2e-6,
            rms_error=1e-7,
            spearman=1,
            score_error=0,
            tolerance=1e-3,
            rms_tolerance=1e-4,
            map_spearman=0.9999,
        ),  # fmt: skip
    )
    here = environment(moment()).but(gpu=None, cpu="A <CPU> & more")
    return Record(preset="demo", environment=here, cases=(measured, row("not available")))


def test_judging_writes_the_rows_that_the_metrics_come_from(judged, cells, bundles):
    results, one = judged
    outcome, scores = one.outcome, one.scores
    with ResultFile(results, "csv", bundle_identity(bundles["inversion"]), "") as file:
        rows = file.rows
    assert [r["path"] for r in rows] == [str(s.path) for s in cells] and len(scores) == len(cells) == 20
    np.testing.assert_allclose([float(r["score"]) for r in rows], scores, rtol=1e-6)
    pairs = scores[10:, None] - scores[None, :10]
    assert outcome.image_auroc == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    assert outcome.low <= outcome.image_auroc <= outcome.high and outcome.evaluations == 2 and outcome.cells == 20
    for label, part in (("good", slice(10)), ("defective", slice(10, 20))):
        assert outcome.verdicts[label]["anomalous"] == np.sum(scores[part] > outcome.threshold)
        assert sum(outcome.verdicts[label].values()) == 10
    assert outcome.false_rejects == outcome.verdicts["good"]["anomalous"] / 10
    assert outcome.engine == "onnxruntime on cpu" and "Inversion" in outcome.options


def test_chosen_cells_are_the_ends_of_the_ranking_and_none_comes_twice(cells):
    scores = np.random.RandomState(1).permutation(20).astype(float)
    chosen = pictures.choose(cells, scores, each=3)
    of = {kind: [cells.index(s) for k, s in chosen if k == kind] for kind in pictures.KINDS}
    order = np.argsort(scores).tolist()
    good, defective = [i for i in order if i < 10], [i for i in order if i >= 10]
    assert of["false rejects"] == good[::-1][:3] and of["misses"] == defective[:3]
    assert of["detections"] == defective[::-1][:3]
    assert set(of["other defects"]) <= set(defective[3:-3]) and set(of["good"]) <= set(good[:-3])
    everything = [i for index in of.values() for i in index]
    assert len(set(everything)) == len(everything) == 15
    assert pictures.choose(cells, scores, each=3) == chosen


def test_the_report_is_one_file_with_the_pictures_and_numbers(judged, cells, bundles, tmp_path):
    _, one = judged
    other = judging.judged_as(judging.GAUSSIAN, "a <test>", "torch", cells, one.scores[::-1].copy())
    rows = pictures.pictures(bundles, pictures.choose(cells, one.scores, each=3), tmp_path / "pictures")
    figures = {"scores-mono": pictures.histograms([one, other]), "roc-mono": pictures.roc_curves([one, other])}
    counts = {"train": 413, "calibration": 59, "test": 20}
    product = demo.Product(counts, 10, (one.outcome, other.outcome))
    html = demo.render(demo.Summary({"mono": product}, judging.ALPHA, {"in all": 1.5}), record(), figures, rows)
    outcome, baseline = one.outcome, other.outcome
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 15
    sources = re.findall(r'src="([^"]+)"', html)
    assert len(sources) == 15 * 2 + 3 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|<script|<link|url\(", re.sub(r'src="[^"]+"', "", html))
    for source in sources:
        kind, data = source.split(";base64,")
        if kind == "data:image/jpeg":
            assert Image.open(io.BytesIO(base64.b64decode(data))).size in {(300, 300), (256, 12)}
        else:
            assert b"<svg" in base64.b64decode(data)
    for text in (f"{outcome.image_auroc:.3f}", f"{baseline.image_auroc:.3f}", "not available", "a reason", "1.70 ("):
        assert text in html
    assert "A &lt;CPU&gt; &amp; more" in html and "a &lt;test&gt;" in html
    assert max(table.count("<th>") for table in html.split("<table>")) <= 14, "wider than a window of 1,300 pixels"
    assert {kind: len(part) for kind, part in rows.items()} == dict.fromkeys(pictures.KINDS, 3)


def test_pictures_are_the_overlays_of_the_bundle_on_one_scale(bundles, cells, tmp_path):
    import flowad_fast
    from flowad_fast.evaluation.inspection import heat_ranges, threshold
    from flowad_fast.evaluation.overlay import overlay

    chosen = [("good", cells[0]), ("misses", cells[12])]
    pictures.pictures(bundles, chosen, tmp_path / "p")
    detector = flowad_fast.load(bundles["inversion"], engine="onnxruntime")
    (span,) = heat_ranges(detector, [s.path for _, s in chosen]).values()
    assert sum(span) / 2 == pytest.approx(threshold(detector))
    for file, (_, sample) in zip(sorted((tmp_path / "p").iterdir()), chosen, strict=True):
        frame = read_frame(sample.path)
        expected = overlay(frame, detector(frame).map[0], *span)
        assert np.abs(np.asarray(Image.open(file)).astype(int) - expected).max() <= 1


@pytest.mark.long
def test_a_bundle_with_its_own_image_score_and_location_statistics_passes_the_gate(tmp_path):
    model = random_model(spec_of(32, 1, 2, backbone="efficientnet-lite0", size=64, invad=True), torch.device("cpu"))
    located = judging.Method("located", Inversion(steps=2), "top", located=True)
    judging.STATISTICS, kept = 20, judging.STATISTICS
    try:
        bundle = judging.export(located, tmp_path / "located", model, "demo")
    finally:
        judging.STATISTICS = kept
    found = demo.benchmark([bundle], lambda line: None)
    (row,) = [one for one in found.cases if one.engine == "onnxruntime"]
    assert row.status == "ok" and row.parity.passed and row.measured, row.reason


def test_the_benchmark_runs_the_bundles(bundles, monkeypatch):
    seen = []
    monkeypatch.setattr(harness, "run", lambda cases, effort, tell: seen.extend(cases) or "the record")
    assert demo.benchmark(list(bundles.values()), lambda line: None) == "the record"
    (one,) = seen
    assert (one.preset, one.engine, one.scorer.kind) == (str(bundles["inversion"]), "onnxruntime", "inversion")


def test_the_baseline_is_the_mahalanobis_distance_at_each_position():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, 2, 3, generator=generator) * torch.arange(1, 7)[:, None, None]
    model = PositionGaussians.fit(features, channels=4, seed=1)
    assert len(model.channels) == 4
    new = torch.randn(5, 6, 2, 3, generator=generator)
    got = model.map(new).numpy()
    assert got.shape == (5, 2, 3)
    fitted, variance = [], []
    for i in range(2):
        for j in range(3):
            x = features[:, model.channels, i, j].double().numpy()
            fitted.append((i, j, x.mean(0), np.cov(x.T)))
            variance.append(np.diag(fitted[-1][3]).mean())
    for i, j, mean, covariance in fitted:
        inverse = np.linalg.inv(covariance + SHRINKAGE * np.mean(variance) * np.eye(4))
        d = new[:, model.channels, i, j].double().numpy() - mean
        np.testing.assert_allclose(got[:, i, j], np.sqrt(np.einsum("nc,cd,nd->n", d, inverse, d)), rtol=1e-4)


def test_the_baselines_judge_every_cell_of_every_product():
    samples = read_dataset("elpv-cells", None)
    train = [s for kind in ("mono", "poly") for s in samples.select("train", kind)[:14]]
    test = [s for kind in ("mono", "poly") for label in (0, 1) for s in samples.select("test", kind, label)[:2]]
    found = judging.gaussians(train, test, "top")
    assert list(found) == ["mono", "poly"]
    for judged in found.values():
        assert [one.outcome.method for one in judged] == [judging.GAUSSIAN, judging.GAUSSIAN_LOCATED]
        for one in judged:
            assert one.scores.shape == (4,) and np.isfinite(one.scores).all() and one.outcome.verdicts is None
        assert not np.allclose(judged[0].scores, judged[1].scores)


def test_the_share_of_cells_that_the_papers_scorers_judge_is_of_every_product_and_label():
    test = read_dataset("elpv-cells", None).select("test")
    some = judging.spread(test, judging.SPREAD)
    for kind in ("mono", "poly"):
        for label in (0, 1):
            whole, part = ([s for s in of if (s.category, s.label) == (kind, label)] for of in (test, some))
            assert len(part) == -(-len(whole) // judging.SPREAD) and set(part) <= set(whole)
    assert judging.spread(test, 1) == list(test)


def test_the_methods_are_the_recipe_with_at_most_two_evaluations_and_the_papers_three():
    recipe, *paper = judging.methods()
    config = load_checkpoint("cells").config
    assert recipe.scorer.evaluations(config) <= 2 and recipe.every == 1
    assert [m.scorer.kind for m in paper] == ["density", "inversion", "reconstruction"]
    assert all(m.scorer.evaluations(config) == 3 and not m.located for m in paper)


def test_readmes_table_is_that_of_the_committed_summary():
    summary = json.loads((RESULTS / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert demo.readme_table(summary) in (ROOT / "README.md").read_text(encoding="utf-8")
    for name, bar in (("mono", 0.955), ("poly", 0.885)):
        recipe, *others = summary["products"][name]["outcomes"]
        gaussian = next(o for o in others if o["method"] == judging.GAUSSIAN)
        assert recipe["evaluations"] <= 2 and recipe["image_auroc"] >= bar
        assert recipe["image_auroc"] >= gaussian["image_auroc"] or gaussian["image_auroc"] <= recipe["high"]
