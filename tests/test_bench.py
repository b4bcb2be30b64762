import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from flowad_fast.benchmarks.cli import app
from flowad_fast.benchmarks.measure import gate, harness, roofs
from flowad_fast.benchmarks.measure.cases import (
    PRESETS,
    REFERENCE,
    Case,
    empty_row,
    expand,
    make_frames,
    make_scorer,
    make_scorers,
    random_model,
    random_pictures,
    reference_of,
    spec_of,
)
from flowad_fast.benchmarks.measure.memory import held_by_graphs
from flowad_fast.benchmarks.measure.processes import started
from flowad_fast.benchmarks.measure.turns import Effort, Turn
from flowad_fast.benchmarks.measure.turns import measured as figures_of
from flowad_fast.benchmarks.measure.worker import Held, Samples, Worker, WorkerError
from flowad_fast.benchmarks.record import clock, compare, paper, record, report, scaling
from flowad_fast.benchmarks.record.limits import NoProducts, Products, Roofs
from flowad_fast.benchmarks.record.record import Memory, Ratio, Record, Row
from flowad_fast.benchmarks.runs import gpu_check, ladder
from flowad_fast.config import VelocityConfig
from flowad_fast.errors import ConfigError
from flowad_fast.kernels.account import VelocityShape
from flowad_fast.model import FlowModel
from flowad_fast.stages.scorers import SCORERS, Inversion

EFFORT = Effort(seconds=0.1, least=3, most=6, extend=False, roof_seconds=0.01)
ROW_KEYS = {
    "name", "preset", "mode", "scorer", "options", "engine", "ran", "details", "precision", "ops", "products", "early",
    "batch", "pieces", "steps", "nfe", "probes", "shape", "frames", "frame_size", "status", "reason", "note", "parity",
    "density", "latency_ms", "device_time_ms", "fps", "stability", "memory_mb", "ratio_to_reference",
    "load_s", "export_s", "start_s", "compile_s", "first_call_s", "roof", "prediction", "rung", "rung_name", "method",
}  # fmt: skip


def tiny(kind: str = "inversion", **options) -> Case:
    return Case("tiny", make_scorer(kind, probes=2), **{"engine": "eager", "device": "cpu", **options})


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def measured() -> Record:
    cases = [
        tiny("density", batch=2),
        tiny(),
        tiny(precision="bf16"),
        tiny(engine="cudagraph"),
        tiny(engine="nonsense"),
    ]
    return harness.run(cases, EFFORT, quiet)


def row_of(result: Record, engine: str, scorer: str = "inversion", precision: str = "fp32") -> Row:
    return next(r for r in result.cases if (r.engine, r.scorer, r.precision) == (engine, scorer, precision))


def test_record_has_the_stable_schema_and_is_json(measured, tmp_path):
    saved = measured.dump()
    assert set(saved) == {"schema", "kind", "preset", "title", "environment", "cases", "roofs", "parts"}
    assert saved["schema"] == 1
    assert all(set(row) == ROW_KEYS for row in saved["cases"])
    assert json.loads(json.dumps(saved, allow_nan=False)) == saved
    assert saved["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]
    assert saved["environment"]["commit"] is None or len(saved["environment"]["commit"]) >= 12
    record.write(measured, tmp_path / "r.json")
    assert record.read(tmp_path / "r.json") == measured


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_records_are_read_whole(path: Path):
    """What is read and written again says the same; only what a mode that is gone left empty may be missing."""
    before, after = json.loads(path.read_text()), record.read(path).dump()
    assert set(before) <= set(after) and len(before["cases"]) == len(after["cases"])
    for old, new in zip(before["cases"], after["cases"], strict=True):
        assert old.pop("line", None) is None
        if old.get("engine") == REFERENCE and before["kind"] != "fewer":  # there it is held against the scorer
            assert (old.pop("parity") or {}).keys() <= {"passed", "note"}, "it is the reference itself"
        for key, value in old.items():  # what was not written then is null now, or a scorer's default
            assert value == new[key] or value.items() <= new[key].items(), key


def test_rows_are_measured_in_turn_with_the_reference(measured):
    assert [r.engine for r in measured.cases].count(REFERENCE) == 2
    for row in (row_of(measured, "eager"), row_of(measured, "eager", "density")):
        assert row.status == "ok", row.reason
        assert row.ran == "eager on cpu"
        ratio = row.ratio_to_reference
        assert ratio.pairs >= 3
        assert ratio.low <= ratio.speed <= ratio.high
        assert ratio.memory > 0
        assert row.parity.passed and row.parity.max_error < 1e-3
        assert row.parity.map_spearman > 0.999
        assert row.nfe == 3
        found = row.measured
        assert found.fps == pytest.approx(1e3 * row.batch / np.mean(found.latency_ms.raw), rel=1e-3)
        assert found.memory_mb.peak >= found.memory_mb.above_idle >= 0
        assert row.roof.share > 0 and row.prediction.ms > 0
    half, full = row_of(measured, "eager", precision="bf16"), row_of(measured, "eager")
    assert half.parity.max_error > full.parity.max_error
    assert row_of(measured, REFERENCE).ran == "reference on cpu"


def test_density_rows_state_their_standard_error(measured):
    density = row_of(measured, "eager", "density").density
    assert density.standard_error > 0
    assert 0 < density.share_of_spread < 1
    assert 0.5 < density.spearman_with_10 <= 1
    assert row_of(measured, "eager").density is None


def test_what_cannot_run_says_why_and_costs_only_its_row(measured):
    graph, nonsense = row_of(measured, "cudagraph"), row_of(measured, "nonsense")
    assert graph.status == "not available" and "NVIDIA GPU" in graph.reason
    assert nonsense.status == "not available" and "unknown engine 'nonsense'" in nonsense.reason
    assert graph.measured is None
    assert graph.model_dump()["fps"] is None and graph.model_dump()["latency_ms"] is None


def test_table_and_markdown_show_every_row_and_no_speed_for_failures(measured):
    text = report.markdown(measured)
    assert text.count("| inversion |") == 5 and text.count("| density |") == 2
    assert "not available" in text
    assert len(report.tables(measured)) == 2
    line = next(line for line in text.splitlines() if "cudagraph" in line)
    assert "not available |  |  |" in line


def test_a_crash_costs_one_row(tmp_path):
    with started(tmp_path, EFFORT.timeout) as process:
        assert process.ask(Worker.load, tiny()).ran == "eager on cpu"
        process._process.kill()
        with pytest.raises(WorkerError) as caught:
            process.ask(Worker.run, 1)
    assert caught.value.status == "crashed" and "SIGKILL during run" in caught.value.reason


def test_a_silent_process_is_ended(tmp_path):
    with started(tmp_path, 0.01) as process, pytest.raises(WorkerError) as caught:
        process.ask(Worker.load, tiny())
    assert caught.value.status == "timeout"


def test_running_out_of_memory_is_a_status(tmp_path):
    with started(tmp_path, EFFORT.timeout) as process, pytest.raises(WorkerError) as caught:
        process.ask(Worker.load, tiny(batch=5 * 10**7))
    assert caught.value.status == "out of memory", caught.value


def test_a_row_that_computes_something_else_has_no_speed(tmp_path):
    memory = Memory(idle=1, peak=2, above_idle=1)
    row = empty_row(tiny()).but(
        ran="eager on cpu",
        frames="random pictures",
        measured=figures_of(1, [Samples([1.0, 1.0, 1.0], [])], memory),
        ratio_to_reference=Ratio(speed=2, low=1, high=3, pairs=3),
    )
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "want.npz", maps=maps, raw=maps.max((1, 2)), cells=maps, aggregate="max", power=2)
    np.savez(tmp_path / "got.npz", maps=maps * 1.02, raw=maps.max((1, 2)))
    expected = gate.Expected(tmp_path / "want.npz", tmp_path / "none.npz")
    failed = gate.judged(row, tmp_path / "got.npz", expected)
    assert failed.status == "failed parity" and "map error" in failed.reason
    assert failed.measured is None and failed.ratio_to_reference is None
    assert failed.parity.max_error > 0.02
    unchecked = gate.judged(row, tmp_path / "got.npz", gate.Expected(*[tmp_path] * 2, WorkerError("failed", "boom")))
    assert (unchecked.status, unchecked.measured) == ("not checked", None) and "boom" in unchecked.reason
    quantised = gate.judged(row.but(engine="openvino-int8"), tmp_path / "got.npz", expected)
    assert quantised.status == "ok" and quantised.parity.tolerance > failed.parity.tolerance, "by int8's own limits"
    assert row.status == "ok" and row.measured.fps == 1000, "rows are never changed"


def test_rows_after_the_deadline_are_skipped():
    result = harness.run([tiny()], EFFORT, quiet, deadline=-1)
    assert [row.status for row in result.cases] == ["skipped"]
    assert result.roofs.reason == "no row was measured" and not result.roofs.gemm


def test_percentiles_need_samples():
    assert clock.summary([1.0, 2.0, 3.0]).model_dump() == {
        "p50": 2.0, "p90": None, "p99": None, "p999": None, "n": 3, "raw": (1.0, 2.0, 3.0),
    }  # fmt: skip
    many = clock.summary(list(range(1000)))
    assert (many.p50, many.p99, many.p999) == (499.5, 989.01, 998.001)


def test_stability_names_spread_and_drift():
    assert clock.stability([10.0] * 20).verdict == "stable"
    assert clock.stability([10.0] * 10 + [13.0] * 10).drift == pytest.approx(0.3)
    assert clock.stability([10.0] * 10 + [13.0] * 10).verdict == "noisy"
    assert clock.stability([1.0, 1.0]).verdict == "too few samples"


def test_paired_ratio_cancels_what_both_sides_met():
    noise = np.random.default_rng(0).uniform(1, 3, 50)
    ratio = clock.paired_ratio(list(20 * noise), list(10 * noise))
    assert ratio == Ratio(speed=2, low=2, high=2, pairs=50)


def change(result: Record, factor: float) -> Record:
    """The record with every ratio multiplied."""
    cases = []
    for row in result.cases:
        ratio = row.ratio_to_reference
        if ratio:
            ratio = ratio.but(**{k: factor * getattr(ratio, k) for k in ("speed", "low", "high")})
        cases.append(row.but(ratio_to_reference=ratio))
    return result.but(cases=tuple(cases))


def test_compare_knows_noise_from_change(measured, tmp_path):
    record.write(measured, tmp_path / "a.json")
    record.write(change(measured, 100.0), tmp_path / "b.json")
    old, new = record.read(tmp_path / "a.json"), record.read(tmp_path / "b.json")
    assert {one.verdict for one in compare.compare(old, old)} == {"no difference", "not comparable"}
    assert {one.verdict for one in compare.compare(old, new)} == {"faster", "not comparable"}
    assert {one.verdict for one in compare.compare(new, old)} == {"slower", "not comparable"}
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == [asdict(one) for one in compare.compare(old, new)]


def test_committed_records_of_two_runs_are_compared():
    old, new = (record.read(report.RESULTS / f"{name}.json") for name in ("cpu-small", "cpu-small-again"))
    changes = compare.compare(old, new)
    assert len(changes) == 4 and all(one.basis == "ratio to the reference path" for one in changes)


def test_an_unknown_field_of_a_record_is_refused(tmp_path, measured):
    saved = measured.dump()
    saved["cases"][0]["latncy_ms"] = saved["cases"][0].pop("load_s")
    (tmp_path / "bad.json").write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="latncy_ms"):
        record.read(tmp_path / "bad.json")


def test_other_schemas_are_refused(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"schema": 0, "cases": []}))
    with pytest.raises(ConfigError, match="schema 1, got schema 0"):
        record.read(tmp_path / "old.json")


def test_axes_expand_to_cases():
    scorers = make_scorers(["density", "inversion"], probes=[10, 1])
    cases = expand(
        "paper", scorers, engines=["eager", REFERENCE], precisions=["fp32", "bf16"],
        batches=[1, 8], modes=["offline", "single-stream"],
    )  # fmt: skip
    offline = [c for c in cases if c.mode == "offline"]
    assert len(offline) == (2 + 1) * 2 * (2 + 1)
    assert {c.batch for c in cases if c.mode == "single-stream"} == {1}
    assert all(c.precision == "fp32" for c in cases if c.engine == REFERENCE)
    assert len({c.name for c in cases}) == len(cases)
    assert {reference_of(c).engine for c in cases} == {REFERENCE}
    with pytest.raises(ConfigError, match="unknown mode 'ofline'; did you mean 'offline'"):
        expand("demo", [], engines=[], precisions=[], modes=["ofline"])
    with pytest.raises(ConfigError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        expand("demo", [], engines=[], precisions=["bf61"])
    with pytest.raises(ConfigError, match="unknown scorer 'densty'"):
        make_scorer("densty")


@pytest.mark.parametrize("wanted", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", SCORERS)
def test_every_scorer_takes_as_many_evaluations_as_asked(kind, wanted):
    velocity = PRESETS["paper"].velocity
    assert make_scorer(kind, evaluations=wanted, config=velocity).evaluations(velocity) == wanted


def test_evaluations_are_not_steps_and_presets_take_three():
    half = make_scorer("reconstruction")
    assert (half.steps, half.evaluations(PRESETS["paper"].velocity)) == (6, 3)
    assert make_scorer("reconstruction", steps=4).evaluations(PRESETS["paper"].velocity) == 2
    assert make_scorer("inversion", steps=4).evaluations(PRESETS["paper"].velocity) == 4
    assert {tiny(kind).name.split("/")[0] for kind in SCORERS} >= {
        "density-K2-s3",
        "inversion-s3",
        "reconstruction-s6",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scorer", "inversion", "--probes", "4"], "an option of density, not of inversion"),
        (["--steps", "3", "--evaluations", "3"], "give one of them"),
        (["ladder", "--scorer", "reconstruction", "--probes", "4"], "an option of density"),
        (["ladder", "--scorer", "density", "--probes", "1,2"], "a ladder is of one scorer"),
        (["drift", "demo", "--scorer", "inversion", "--probes", "4"], "an option of density"),
        (["--preset", "invad", "--scorer", "density"], "use Inversion"),
        (["--preset", "invad", "--evaluations", "1"], "at least 2 steps"),
    ],
)
def test_options_of_other_scorers_are_refused(arguments, message):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0 and message in str(done.exception)


def test_presets_are_the_papers_sizes():
    velocity = PRESETS["paper"].velocity
    assert (velocity.hidden_size, velocity.depth, velocity.num_heads, velocity.channels) == (2048, 16, 8, 272)
    invad: VelocityConfig = PRESETS["invad"].spec.velocity
    assert (invad.pred_type, invad.t_scale, invad.use_class_labels) == ("epsilon", 1.0, False)


def test_invad_runs_in_the_same_runtime():
    velocity = PRESETS["invad"].velocity
    assert make_scorer("inversion", config=velocity).evaluations(velocity) == 3


def test_random_models_are_seeded_and_of_order_one():
    a, b = (random_model(PRESETS["tiny"].spec, torch.device("cpu")) for _ in range(2))
    frames, source = make_frames(tiny(), 3, 64)
    assert source == "random pictures" and frames.shape == (3, 64, 64, 3) and frames.std() > 10
    x1 = a.features(frames)
    assert torch.equal(x1, b.features(frames))
    assert all(parameter.abs().max() > 0 for parameter in a.dit.parameters())


@pytest.mark.parametrize("backbone, size", [("efficientnet-lite0", 64), ("efficientnet-b4", 256)])
def test_a_random_models_maps_show_its_field(backbone: str, size: int):
    """Untrained features that grow by orders of magnitude would drown the field, and the parity gate with it."""
    model = random_model(spec_of(32, 2, 2, backbone=backbone, size=size), torch.device("cpu"))
    frames = random_pictures(4, size)
    x1, scorer, y = model.features(frames), Inversion(steps=3), torch.arange(4)
    assert all(0.3 < one.std() < 6 for one in x1)
    before = scorer.map(model, x1, y)
    model.dit.blocks[0].mlp.fc1.weight.data *= 1.1
    changed = (scorer.map(FlowModel(model.spec, model.dit, model.backbone), x1, y) - before).abs()
    # Each several times the gate's limit of a thousandth.
    relative = [float(one.max() / map.std()) for one, map in zip(changed, before, strict=True)]
    assert min(relative) > 4e-3, relative


def test_gemm_roof_is_the_models_own_products():
    shape = VelocityShape(hidden=32, mlp=128, depth=2, heads=2, tokens=16, channels=192, image=64)
    result = roofs.measure(shape, [16, 32], ["fp32", "bf16", "fp8"], "cpu", seconds=0.01)
    assert [g.precision for g in result.gemm] == ["fp32", "fp32", "bf16", "bf16", "fp8"]
    assert isinstance(result.gemm[-1], NoProducts) and "needs a GPU" in result.gemm[-1].reason
    first = result.gemm[0]
    assert isinstance(first, Products) and set(first.ms) == {"qkv", "proj", "fc1", "fc2"}
    flops = 2 * 16 * 32 * (96 + 32 + 128 + 128)
    assert first.tflop_s == pytest.approx(flops / first.block_ms / 1e9, rel=0.01, abs=1e-4)
    assert result.copy_gb_s > 0
    row = empty_row(tiny(precision="bf16", batch=2)).but(
        shape=shape, nfe=3, measured=figures_of(2, [Samples([1.0] * 3, [])], Memory(idle=1, peak=2, above_idle=1))
    )
    assert roofs.attached(row, result).prediction.ms > 0
    few = result.but(gemm=tuple(g for g in result.gemm if (g.precision, getattr(g, "rows", 0)) != ("fp32", 32)))
    assert roofs.attached(row, few).prediction.ms > 0, "float32 at another number of rows"
    assert roofs.attached(row, result.but(gemm=result.gemm[2:])).prediction is None


@pytest.mark.parametrize("scales", ["rows", *roofs.SCALES])
def test_scales_have_the_shapes_by_which_torch_knows_them(scales: str):
    """torch's own checks, on GPU tensors without storage."""
    with FakeTensorMode():
        first, *_ = roofs._product(256, 512, 1024, "fp8", torch.device("cuda"), scales)
        assert first().shape == (256, 1024) and first().dtype == torch.bfloat16


def test_products_that_the_library_refuses_say_why(monkeypatch: pytest.MonkeyPatch):
    shape = VelocityShape(hidden=32, mlp=128, depth=2, heads=2, tokens=16, channels=192, image=64)
    refused = roofs._scaled(shape, 32, "128 values", torch.device("cpu"), 0.01)
    assert refused.ms is None and refused.reason
    monkeypatch.setattr(roofs, "_product", lambda *_: [lambda: None])
    found = roofs._scaled(shape, 32, "tensor", torch.device("cpu"), 0.01)
    assert found.reason is None and set(found.ms) == {"qkv", "proj", "fc1", "fc2"}
    limits = Roofs(gemm=(Products(precision="fp8", model=(32, 128), rows=32, ms={}, block_ms=2.0, tflop_s=1.0),),
                   scaled=(refused, found.but(block_ms=1.5)))  # fmt: skip
    lines = report._scaled(limits)
    assert "per 128 values: not measured: " in lines[0] and lines[1].endswith("per tensor: 1.50 ms, per row 2.00 ms")


def test_the_backbone_alone_is_timed_by_layout_and_stays_as_it_is():
    model = random_model(PRESETS["tiny"].spec, torch.device("cpu"))
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    found = roofs.backbone(model, [1, 2], torch.device("cpu"), 0.01)
    assert [(one.operators, one.layout, one.dtype, one.batch) for one in found] == [
        ("torch", "NHWC", "fp32", 1), ("torch", "NHWC", "fp32", 2),
        ("torch", "NCHW", "fp32", 1), ("torch", "NCHW", "fp32", 2),
        ("fused", "NHWC", "fp16", 1), ("fused", "NHWC", "fp16", 2),
    ]  # fmt: skip
    assert all(one.ms > 0 for one in found)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert all(one.is_contiguous() for one in model.backbone.parameters())


def test_paper_table_has_every_method_and_says_that_figures_conflict():
    text = report._table1({})
    for name in ("HVQ-Trans", "CFLOW-AD", "InvAD", "OmiAD", "FlowAD (a)", "FlowAD (b)", "FlowAD (c)"):
        assert name in text
    assert "ours, one evaluation" in text and "ours, two evaluations" in text
    assert text.count("not run") == 7 + 2
    assert "88 FPS for InvAD and 39 for OmiAD" in text and "41 and 17" in text
    assert (paper.METHODS["FlowAD (a) density"].fps, paper.METHODS["FlowAD (a) density"].memory_gb) == (5, 53)


def test_paper_table_puts_measured_beside_reported(measured):
    rows = [row.but(preset="paper", probes=10 if row.probes else None) for row in measured.cases]
    text = report._table1({"x": measured.but(cases=tuple(rows))})
    assert text.count("not run") == 5 + 2
    line = next(line for line in text.splitlines() if line.startswith("| FlowAD (b)"))
    assert re.search(r"\| 41 \| 10 \| .*\| 3 \| .*eager (fp32|bf16), batch 1", line)  # whichever was faster


@pytest.mark.parametrize("page, text", [(report.README, report.readme), (scaling.PAGE, scaling.page)])
def test_committed_pages_are_what_the_records_give(page: Path, text):
    assert page.read_text(encoding="utf-8") == text(), "run flowad-bench report and commit the result"


def test_finished_rows_are_kept_while_others_run():
    kept: list[dict] = []
    harness.run(
        [tiny(), tiny("reconstruction")],
        EFFORT,
        quiet,
        keep=lambda found: kept.append(json.loads(json.dumps(found.dump()))),
    )
    assert [len(found["cases"]) for found in kept] == [1, 2, 3, 4], "after every row, and with the reference path's"
    first = kept[0]["cases"][0]
    assert first["status"] == "ok" and first["parity"]["passed"] and kept[0]["roofs"]["reason"] == "not measured yet"


def test_the_deadline_holds_inside_a_group_and_keeps_what_was_measured():
    """Two engines of one group: the second is not begun, the first keeps the calls that it has made."""
    long = replace(EFFORT, seconds=600.0, most=10**6)
    begun = time.monotonic()
    result = harness.run([tiny(), tiny(precision="bf16")], long, quiet, deadline=12.0)
    assert time.monotonic() - begun < 30
    rows = {row.precision: row for row in result.cases if row.engine != REFERENCE}
    assert rows["fp32"].status == "ok" and rows["fp32"].measured.latency_ms.n >= 3, rows["fp32"].reason
    assert rows["fp32"].parity.passed and rows["fp32"].ratio_to_reference.pairs >= 1
    assert rows["bf16"].status in ("skipped", "timeout") and rows["bf16"].measured is None


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a = rng.integers(0, 6, (3, 4, 5)).astype(np.float32)  # with ties
    b = a + rng.normal(size=a.shape).astype(np.float32)
    expected = np.mean([spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)])
    assert gate._rank_correlation(a, b) == pytest.approx(expected, abs=1e-6)
    assert gate._rank_correlation(a * 0, b) is None and gate._rank_correlation(a * np.nan, b) is None


def test_figures_that_are_not_finite_are_null_and_cost_nothing(measured, tmp_path):
    density = row_of(measured, "eager", "density")
    wrong = gate._density(10, np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), np.ones((1, 4, 4)))
    assert wrong.spread == 0 and np.isnan(wrong.share_of_spread)
    odd = density.but(density=wrong, details={"attentions": {8: {"error": {"flash": float("inf")}}}})
    record.write(measured.but(cases=(odd,)), tmp_path / "r.json")
    (row,) = json.loads((tmp_path / "r.json").read_text())["cases"]
    assert row["density"]["share_of_spread"] is None and row["details"]["attentions"]["8"]["error"]["flash"] is None
    (again,) = record.read(tmp_path / "r.json").cases
    assert np.isnan(again.density.share_of_spread) and again.measured == density.measured


def test_memory_of_a_row_includes_its_graphs_and_not_what_the_process_keeps():
    pool = {"total_size": 100, "allocated_size": 30, "segment_pool_id": (0, 1)}
    usual = {"total_size": 1000, "allocated_size": 10, "segment_pool_id": (0, 0)}
    assert held_by_graphs([pool, usual]) == 70


def test_a_process_keeps_its_model_for_several_rows_and_notices_when_it_is_changed(tmp_path):
    with started(tmp_path, EFFORT.timeout) as process:
        assert process.ask(Worker.hold, tiny()) > 0
        for case in (tiny(), tiny(precision="bf16"), tiny("reconstruction", batch=2)):
            row = process.ask(Worker.load, case)
            process.ask(Worker.outputs, tmp_path / "got.npz")
            process.ask(Worker.expected, reference_of(case), tmp_path / "want.npz", None)
            row = row.but(measured=figures_of(case.batch, [process.ask(Worker.run, 3)], process.ask(Worker.peak)))
            judged = gate.judged(row, tmp_path / "got.npz", gate.Expected(tmp_path / "want.npz", tmp_path / "none.npz"))
            assert judged.status == "ok" and judged.parity.passed, judged.reason
            assert row.load_s < 0.05, "the model is there"
    held = Held("tiny", random_model(PRESETS["tiny"].spec, torch.device("cpu")))
    held.check()
    held.model.dit.final_layer.linear.weight.data *= 1.01
    with pytest.raises(RuntimeError, match="was changed by an engine"):
        held.check()


def test_an_engine_without_memory_beside_the_reference_is_measured_after_it(monkeypatch):
    candidate = harness._candidate

    def crowded(case: Case, ref: object, *rest) -> tuple:
        if ref is not None:
            return empty_row(case, "out of memory", "fake"), []
        return candidate(case, ref, *rest)

    monkeypatch.setattr(harness, "_candidate", crowded)
    reference, row = harness.run([tiny()], EFFORT, quiet).cases
    assert (reference.status, row.status) == ("ok", "ok") and reference.measured.latency_ms.n >= 3
    assert row.ratio_to_reference is None and row.parity.passed
    assert re.search(r"both do not fit in memory; the reference path's median is \d+\.\d\d times", row.note)


def test_the_reference_is_not_credited_with_calls_of_a_candidate(monkeypatch):
    """In single-stream mode a candidate runs on its own at the end."""
    turns = [Turn(Samples([1.0], []), Samples([10.0], []))] * 3 + [Turn(Samples([1.0] * 5, []), None)]
    monkeypatch.setattr(harness, "take_turns", lambda *_: turns)
    reference, row = harness.run([tiny(mode="single-stream")], EFFORT, quiet).cases
    assert reference.measured.latency_ms.raw == (10.0,) * 3 and row.measured.latency_ms.raw == (1.0,) * 8
    assert (row.ratio_to_reference.speed, row.ratio_to_reference.pairs) == (10, 3)


def test_a_reference_that_does_not_run_costs_the_ratio_only(monkeypatch):
    """Its process is ended, so that the candidates have its memory."""
    monkeypatch.setattr(harness, "reference_of", lambda case: replace(case, engine=REFERENCE, batch=5 * 10**7))
    reference, row = harness.run([tiny()], EFFORT, quiet).cases
    assert (reference.status, row.status) == ("out of memory", "ok")
    assert row.ratio_to_reference is None and "no ratio: the reference path is out of memory" in row.note


def test_the_ladder_has_the_rungs_of_its_machine(monkeypatch, measured):
    asked: list[list[Case]] = []

    def run(cases: list[Case], *_, **__) -> Record:
        asked.append(cases)
        return measured.but(cases=tuple(empty_row(case) for case in cases))

    monkeypatch.setattr(ladder.harness, "run", run)
    rows = {(row.rung, row.rung_name): row for row in ladder.run(tiny(), EFFORT, quiet).cases}
    assert [case.engine for case in asked[0]] == [REFERENCE, "eager", "eager", "compile", "onnxruntime"]
    assert {number for number, _ in rows} == set(range(8)) and rows[5, "one CUDA graph"].status == "not available"
    monkeypatch.setattr(ladder, "torch_device", lambda device: torch.device("cuda"))
    rows = {row.name: row for row in ladder.run(tiny(), EFFORT, quiet).cases}
    assert len(rows) == len(asked[1]) == 9 and "onnxruntime" not in {row.engine for row in rows.values()}
    assert [case.products for case in asked[1] if case.engine == "cudagraph"] == ["library"] * 2 + ["measured"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_gpu_check_without_a_gpu_says_what_is_missing():
    done = CliRunner().invoke(_gpu_app(), [])
    assert done.exit_code == gpu_check.EXIT_NO_GPU
    assert "finds no usable NVIDIA GPU" in (gpu_check.missing() or "") or "without CUDA" in (gpu_check.missing() or "")


def _gpu_app():
    import typer

    gpu = typer.Typer()
    gpu.command()(gpu_check.check)
    return gpu


def test_figures_are_drawn(measured, tmp_path):
    from flowad_fast.benchmarks.record import figures

    rungs = tuple(row.but(rung=i, rung_name=row.engine) for i, row in enumerate(measured.cases))
    made = figures.draw(measured.but(cases=rungs), tmp_path)
    assert [path.name for path in made] == ["fps_memory.png", "latency.png", "roofline.png", "ladder.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)


def test_cli_writes_record_table_and_figures(tmp_path):
    done = CliRunner().invoke(
        app,
        ["--preset", "tiny", "--scorer", "inversion", "--quick", "--seconds", "0.1", "--device", "cpu", "--output",
         str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md"), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    saved = record.read(tmp_path / "r.json")
    assert [row.status for row in saved.cases] == ["ok", "ok"]
    assert "| inversion | eager |" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    "arguments, message", [(["--batch", "0"], "positive whole"), (["--preset", "nope"], "no preset")]
)
def test_cli_refuses_nonsense(arguments, message):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert message in str(done.exception)


def test_records_do_not_tell_where_they_were_made():
    from flowad_fast.benchmarks.measure.environment import command

    options = ["--preset", "demo", "--output", "/home/someone/results/a.json", "results/b.json"]
    shown = command("/home/someone/bin/flowad-bench", options)
    assert shown == "flowad-bench --preset demo --output a.json results/b.json"
    for program, module in (
        ("/x/flowad_fast/benchmarks/runs/peers.py", "runs.peers"),
        ("/x/flowad_fast/benchmarks/demo/__main__.py", "demo"),
        ("/x/flowad_fast/benchmarks/gpu_check.py", "gpu_check"),
    ):
        assert command(program, ["--seconds", "8"]) == f"python -m flowad_fast.benchmarks.{module} --seconds 8"


def test_memory_beside_published_figures_includes_the_weights():
    cpu = Memory(idle=460, peak=500, above_idle=40)
    assert (cpu.whole, cpu.footprint) == (500, 40)
    gpu = cpu.but(allocator_peak=900.0)
    assert gpu.whole == gpu.footprint == 900


def test_the_suite_of_kernels_is_a_command():
    done = CliRunner().invoke(app, ["kernels", "--collect-only", "-k", "gelu_tanh"])
    assert done.exit_code == 0, done.output
