"""Fewer evaluations: `flowad-bench evaluations` and `flowad-bench fewer`, and our rows of the paper's table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from flowad_fast.benchmarks.cli import app
from flowad_fast.benchmarks.measure.cases import PRESETS, Case, axes_of, random_model, spec_of
from flowad_fast.benchmarks.measure.turns import Effort
from flowad_fast.benchmarks.record import accuracy, compare, fewer, paper, record, report
from flowad_fast.benchmarks.record import evaluations as tables
from flowad_fast.benchmarks.record.record import Ratio
from flowad_fast.benchmarks.runs import evaluations
from flowad_fast.benchmarks.runs import fewer as fewer_run
from flowad_fast.checkpoints.load import save_checkpoint
from flowad_fast.config import ModelConfig, parse
from flowad_fast.data.samples import Sample
from flowad_fast.errors import ConfigError
from flowad_fast.kernels.account import H100, account
from flowad_fast.model import FlowModel
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.stages.scorers import SCORERS, Inversion, Mismatch
from flowad_fast.stages.velocity import DiT

RNG = np.random.default_rng(0)
EFFORT = Effort(seconds=0.1, least=3, most=6, extend=False, roof_seconds=0.01)


@pytest.fixture(scope="module")
def model() -> FlowModel:
    spec = spec_of(32, 2, 2, backbone="efficientnet-lite0", size=64)
    velocity = spec.velocity.model_copy(update={"num_classes": 1, "use_class_labels": False})
    return random_model(spec.model_copy(update={"velocity": velocity, "class_names": ()}), torch.device("cpu"))


def photos_in(folder: Path) -> evaluations.Photos:
    folder.mkdir()
    samples = []
    for i in range(12):
        path = folder / f"{i}.png"
        pixels = RNG.integers(0, 255, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(path)
        samples.append(Sample(path, "part", "train" if i < 4 else "test", int(i >= 8)))  # type: ignore[arg-type]
    return evaluations.Photos("folder", "part", tuple(samples[:4]), tuple(samples[4:]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> evaluations.Photos:
    return photos_in(tmp_path_factory.mktemp("data") / "photos")


def test_a_row_is_what_the_scorer_and_the_metric_say(model: FlowModel, photos: evaluations.Photos) -> None:
    scorers = evaluations.scorers_of(["inversion", "mismatch"], [1, 3], 2, model)
    assert scorers[3] == [Mismatch(draws=3), Mismatch(draws=3, seed=1)] and scorers[1] == [Inversion(steps=3)]
    found = evaluations.run(model, photos, scorers, locate=None)
    assert [row.name for row in found.cases] == [
        "inversion/1/max", "inversion/1/top", "mismatch/1/max", "mismatch/1/top",
        "inversion/3/max", "inversion/3/top", "mismatch/3/max", "mismatch/3/top",
    ]  # fmt: skip
    frames = [np.asarray(Image.open(sample.path))[None] for sample in photos.test]
    labels = [sample.label for sample in photos.test]
    for row in found.cases:
        for seed, auroc in zip(row.seeds or (0,), row.by_seed or (row.auroc,), strict=True):
            scorer = row.options if isinstance(row.options, Inversion) else replace(row.options, seed=seed)
            maps = torch.cat([scorer.map(model, model.features(frame)) for frame in frames])
            large = torch.nn.functional.interpolate(maps[:, None], size=64, mode="bilinear", align_corners=False)
            scores = maps.flatten(1).amax(1) if row.aggregate == "top" else large.flatten(1).amax(1)  # 1 % of 16 cells
            assert auroc == pytest.approx(roc_auc_score(labels, scores), abs=1e-5)
        assert row.low <= row.auroc <= row.high
    three = found.cases[4]
    assert three.evaluations == 3 and three.change is None
    assert found.cases[0].change.points == pytest.approx(100 * (found.cases[0].auroc - three.auroc), abs=2e-3)
    text = tables.markdown(found)
    assert "| 1 | mismatch | no | top |" in text and "8 photos of folder part, 4 defective" in text


def test_location_statistics_are_of_the_good_parts_alone(model: FlowModel, photos: evaluations.Photos) -> None:
    seen = []

    def locate(good: torch.Tensor):
        seen.append(good)
        mean = good.mean(0)
        return lambda maps: maps - mean

    scorers = evaluations.scorers_of(["mismatch"], [1], 1, model)
    found = evaluations.run(model, photos, scorers, locate=locate)
    plain, located = (row for row in found.cases if row.aggregate == "max")
    assert (plain.located, located.located) == (False, True)
    frames = [np.asarray(Image.open(sample.path))[None] for sample in photos.good]
    own = torch.cat([scorers[0][0].map(model, model.features(frame)) for frame in frames])
    assert all(torch.allclose(one, own, rtol=1e-4, atol=1e-4) for one in seen) and seen
    assert "location statistics of 4 training parts" in tables.remark(found)


def test_a_category_of_cells_is_a_class_of_the_model(model: FlowModel, tmp_path: Path) -> None:
    lines = [
        f"images/{kind}{i:02d}.png {'0.0' if i < 20 else '1.0'} {kind}" for kind in ("mono", "poly") for i in range(23)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    velocity = model.spec.velocity.model_copy(update={"num_classes": 2, "use_class_labels": True})
    spec = model.spec.model_copy(update={"velocity": velocity, "class_names": ("mono", "poly")})
    both = random_model(spec, torch.device("cpu"))
    found = evaluations.read(both, "elpv", tmp_path, None, "poly", 5)
    assert found.index == 1 and len(found.good) == 5 and [sample.label for sample in found.test] == [0] * 4 + [1] * 3
    assert all(sample.path.name.startswith("poly") for sample in found.every)
    assert {sample.split for sample in found.good} == {"train"}
    assert evaluations.read(model, "elpv", tmp_path, None, "mono", 50).index is None
    with pytest.raises(ConfigError, match="valid: mono, poly"):
        evaluations.read(model, "elpv", tmp_path, None, "cells", 5)
    with pytest.raises(ConfigError, match="expected at least 2"):
        evaluations.read(model, "elpv", tmp_path, None, "poly", 1)


def test_a_run_goes_on_from_what_was_kept(
    model: FlowModel, photos: evaluations.Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = evaluations.Kept(tmp_path / "kept")
    scorers = evaluations.scorers_of(["inversion", "mismatch"], [1], 1, model)
    evaluations.run(model, photos, scorers[:1], locate=None, kept=kept)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    monkeypatch.setattr(evaluations, "_features", None)
    whole = evaluations.run(model, photos, scorers, locate=None, kept=kept)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    monkeypatch.setattr(evaluations, "_maps", None)
    assert evaluations.run(model, photos, scorers, locate=None, kept=kept).cases == whole.cases
    monkeypatch.undo()
    other = random_model(model.spec, torch.device("cpu"), seed=1)
    assert evaluations.run(other, photos, scorers, locate=None, kept=kept).cases != whole.cases


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Scores with a known AUROC of Phi(1 / sqrt 2), in 200 samples."""
    labels = np.repeat([0, 1], 60)
    draws, truth, held, rng = evaluations.Draws(labels), 0.76025, 0, np.random.default_rng(1)
    for _ in range(200):
        points, resampled = draws.auroc([(rng.normal(size=120) + labels).astype(np.float32)])
        low, high = np.percentile(resampled, [2.5, 97.5])
        held += low <= truth <= high
    assert 180 <= held <= 199  # 190 of 200, and three standard deviations


def test_ties_count_half() -> None:
    labels = np.array([0, 0, 1, 1])
    points, _ = evaluations.Draws(labels).auroc([np.array([1, 2, 2, 3], np.float32)])
    assert points == [roc_auc_score(labels, [1, 2, 2, 3])]
    with pytest.raises(ConfigError, match="0 defective"):
        evaluations.Draws(np.zeros(3, int))


def test_the_command_writes_a_record_and_a_table(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split, kind, count in (("train", "good", 3), ("test", "good", 2), ("test", "scratch", 2)):
        folder = root / "part" / split / kind
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(RNG.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    (root / "part" / "ground_truth" / "scratch").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(root / f"part/ground_truth/scratch/{i}_mask.png")
    options = ["evaluations", "demo", "--data", str(root), "--layout", "mvtec", "--category", "part"]
    done = CliRunner().invoke(
        app,
        [*options, "--scorer", "mismatch", "--evaluations", "1", "--seeds", "2", "--json", "--output",
         str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    saved = record.read(tmp_path / "r.json")
    assert json.loads(done.stdout) == saved.dump() and saved.kind == "evaluations"
    assert {row.scorer for row in saved.cases} == {"mismatch"} and saved.good == 3 and saved.defective == 2
    assert "| 1 | mismatch | no | max |" in (tmp_path / "r.md").read_text()
    with pytest.raises(ConfigError, match="no speeds to compare"):
        compare.compare(saved, saved)
    assert "mismatch" in report.readme(tmp_path)
    done = CliRunner().invoke(app, [*options, "--lists", str(root)])
    assert "leave --lists out" in str(done.exception)


def like(**options) -> Case:
    return Case("tiny", Mismatch(), **{"engine": "eager", "device": "cpu", **options})


def test_pairs_take_turns_and_finished_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    states: list[record.Record] = []
    real, calls = fewer_run._measure, []

    def interrupted(match: fewer_run.Match, effort: Effort):
        calls.append(match.what)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(match, effort)

    monkeypatch.setattr(fewer_run, "_measure", interrupted)
    first = fewer_run.run(like(), EFFORT, told.append, states.append)
    assert [len(state.pairs) for state in states] == [1, 2]
    assert [pair.reason for pair in first.pairs] == [None, None, "interrupted", "interrupted"]
    record.write(first, tmp_path / "r.json")
    earlier = record.read(tmp_path / "r.json")
    assert earlier == first and fewer_run.resumable(earlier, like()) is None
    monkeypatch.setattr(fewer_run, "_measure", lambda match, effort: (calls.append(match.what), real(match, effort))[1])
    calls.clear()
    whole = fewer_run.run(like(), EFFORT, told.append, earlier=earlier)
    assert calls == [match.what for match in fewer_run.matches(like())[2:]]
    assert whole.pairs[:2] == first.pairs[:2] and all(pair.ratio.pairs >= 3 for pair in whole.pairs)
    rows = {row.name: row for row in whole.cases}
    assert {(row.scorer, row.engine, row.nfe) for row in rows.values()} == {
        ("mismatch", "eager", 1), ("inversion", "eager", 2), ("inversion", "eager", 3), ("inversion", "reference", 3),
    }  # fmt: skip
    for row in rows.values():
        assert row.status == "ok" and row.parity.passed and row.measured.memory_mb.peak > 0
    pair = whole.pairs[2]  # the first in which its fast row is measured
    slow = rows[pair.slow].measured.memory_mb.peak
    assert pair.ratio.memory == pytest.approx(slow / rows[pair.fast].measured.memory_mb.peak, rel=0.05)
    text = report.markdown(whole)
    assert "| one evaluation against our own three |" in text


def test_a_pair_with_a_side_that_cannot_run_has_no_ratio() -> None:
    found = fewer_run.run(like(engine="cudagraph"), EFFORT, lambda line: None)
    assert all(pair.ratio is None and "not available" in pair.reason for pair in found.pairs)
    assert not any(row.measured for row in found.cases)


def test_goals_are_of_small_and_shown_as_met_or_not() -> None:
    goals = [match.goal for match in fewer_run.matches(replace(like(), preset="small"))]
    assert goals == [2.6, 3.5, None, None]
    assert {match.goal for match in fewer_run.matches(like())} == {None}
    ratio = Ratio(speed=2.7, low=2.6, high=2.8, pairs=9, memory=1.0)
    pair = record.Pair(fast="a", slow="b", what="w", goal=2.6, ratio=ratio)
    assert report.pair_cells(pair)[1:4] == ["2.70 (2.60–2.80, 9 pairs)", "≥ 2.6", "yes"]
    assert report.pair_cells(pair.but(goal=3.5))[3] == "no"
    assert report.pair_cells(pair.but(ratio=None, reason="why"))[1] == "not measured"


def test_a_student_takes_turns_with_its_teacher_each_held_to_its_own_reference() -> None:
    teacher = "demo"  # of another shape: what is right for one model is wrong for the other
    found = fewer_run.run(like(), EFFORT, lambda line: None, teacher=teacher)
    assert [pair.what for pair in found.pairs] == [match.what for match in fewer_run.matches(like(), teacher)]
    assert all(pair.ratio is not None for pair in found.pairs), found.pairs
    rows = {row.name.split("/")[0]: row for row in found.cases}
    assert rows["student"].preset == "tiny" and rows["teacher"].preset == "demo"
    assert all(row.status == "ok" for row in found.cases)
    assert fewer_run.resumable(found, like(), teacher) is None and fewer_run.resumable(found, like()) == "other rows"


def test_another_record_is_not_gone_on_with(tmp_path: Path) -> None:
    found = fewer_run.run(like(engine="cudagraph"), EFFORT, lambda line: None)
    assert fewer_run.resumable(found, like(engine="cudagraph")) is None
    assert fewer_run.resumable(found, like()) == "other rows"
    elsewhere = found.but(environment=found.environment.but(cpu="another"))
    assert fewer_run.resumable(elsewhere, like(engine="cudagraph")) == "another commit, machine or version"
    record.write(elsewhere, tmp_path / "r.json")
    done = CliRunner().invoke(app, ["fewer", "--preset", "tiny", "--output", str(tmp_path / "r.json")])
    assert "move it, or name another --output" in str(done.exception)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_of_a_flow_has_the_papers_three_and_mismatch(name: str) -> None:
    axes = axes_of(name)
    if name == "invad":
        assert axes.scorers == ("inversion",) and axes.also == ()
    else:
        assert axes.scorers == tuple(SCORERS) == ("density", "inversion", "reconstruction", "mismatch")
        assert axes.also == (Inversion(steps=2),)


def test_the_papers_table_has_ours_with_their_accuracy(tmp_path: Path) -> None:
    outcome = {"method": "mismatch", "options": "Mismatch(tau=0.5, draws=1, seed=0)", "image_auroc": 0.95}
    three = {"method": "inversion", "options": "Inversion(steps=3, power=2)", "image_auroc": 0.938}
    two = {"method": "inversion", "options": "Inversion(steps=2, power=2)", "image_auroc": 0.9371}
    summary = tmp_path / "demo" / "summary.json"
    summary.parent.mkdir()
    lines = report._table1({}, tmp_path).splitlines()
    assert "mono not measured (not measured with three)" in next(x for x in lines if "ours, one" in x)
    summary.write_text(json.dumps({"outcomes": [outcome, three]}))
    assert "mono 0.950 (0.938 with three), poly not measured" in accuracy.condition("mismatch", 1, summary)
    assert "mono not measured (0.938 with three)" in accuracy.condition("inversion", 2, summary)
    rows = [
        {"scorer": scorer, "evaluations": n, "located": located, "aggregate": aggregate, "auroc": auroc}
        for scorer, n, located, aggregate, auroc in (
            ("mismatch", 1, True, "top", 0.91), ("mismatch", 1, False, "top", 0.5), ("mismatch", 1, True, "max", 0.5),
            ("inversion", 3, True, "top", 0.92),
        )
    ]  # fmt: skip
    of_records = tmp_path / "cpu-evaluations-cells-mono.json"
    of_records.write_text(json.dumps({"cases": rows}))
    assert "mono 0.910 (0.920 with three), poly not measured" in accuracy.condition("mismatch", 1, summary)
    of_records.unlink()
    both = {"products": {"mono": {"outcomes": [three, two]}, "poly": {"outcomes": [outcome | {"image_auroc": 0.87}]}}}
    listed = {"outcomes": [three | {"product": "mono"}, two | {"product": "mono"}, outcome | {"product": "poly",
              "image_auroc": 0.87}]}  # fmt: skip
    for one in (both, listed):
        summary.write_text(json.dumps(one))
        assert "mono 0.937 (0.938 with three), poly not measured" in accuracy.condition("inversion", 2, summary)
        assert "poly 0.870 (not measured with three)" in accuracy.condition("mismatch", 1, summary)


def test_ours_are_rows_of_the_papers_model_with_so_many_evaluations() -> None:
    found = fewer_run.run(like(), EFFORT, lambda line: None)
    rows = tuple(row.but(preset="paper") for row in found.cases)
    lines = report._table1({"x": found.but(cases=rows)}).splitlines()
    for ours, nfe in zip(paper.OURS, (1, 2), strict=True):
        cells = next(line for line in lines if line.startswith(f"| {ours.name}")).split(" | ")
        assert cells[6] == str(nfe) and "eager fp32, batch 1" in cells


def test_the_account_of_one_evaluation_adds_up() -> None:
    text = "\n".join(fewer.section())
    assert "aimed at, neither measured nor predicted" in text and "**Predicted, not measured**" in text
    b4 = fewer.backbone_cost("efficientnet-b4", 256, 1)
    assert 2.3e9 < b4.flops < 2.5e9  # as counted by hand
    assert b4.launches > 300 and fewer.backbone_cost("efficientnet-b4", 256, 2).flops == 2 * b4.flops
    scale = fewer.scales()[-1]
    row = next(line for line in text.splitlines() if line.startswith("| paper, 2048x16 | 1 |")).split(" | ")
    many = fewer.fused_backbone_cost(scale.backbone, 256, 32)
    seconds = sum(cost.seconds(H100) for cost in account(scale.shape, 32, 1, 0, "bf16")) + many.seconds
    assert float(row[9]) == pytest.approx(seconds / 32 * 1e3, abs=1e-3)
    parts = text[text.index("| evaluations | products") :].splitlines()[2].split(" | ")[1:]
    assert sum(float(part.strip(" |").split()[0]) for part in parts) == pytest.approx(float(row[9]), abs=3e-3)


@pytest.mark.parametrize("preset", ["demo", "tiny"])
def test_weights_are_chosen_of_checkpoints_only(preset: str) -> None:
    done = CliRunner().invoke(app, ["--preset", preset, "--weights", "ema"])
    assert "an option of checkpoints" in str(done.exception)


@pytest.mark.long
def test_a_dinov2_checkpoint_is_measured_and_judged(tmp_path: Path) -> None:
    """Speed and accuracy of a checkpoint whose backbone, with random weights, is a vision transformer."""
    velocity = {"channels": 384, "height": 4, "width": 4, "hidden_size": 32, "depth": 1, "num_heads": 2}
    spec = parse(ModelConfig, {"velocity": velocity, "backbone": "dinov2-small", "image": {"size": 56}}, "spec")
    torch.manual_seed(0)
    dit = DiT(spec.velocity)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "dino.safetensors"
    save_checkpoint(FlowModel(spec, dit, FeatureExtractor(spec.backbone, size=56)), path, include_backbone=True)
    done = CliRunner().invoke(
        app,
        ["--preset", str(path), "--scorer", "mismatch", "--quick", "--seconds", "0.1", "--device", "cpu",
         "--output", str(tmp_path / "r.json"), "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    saved = record.read(tmp_path / "r.json")
    (row,) = (row for row in saved.cases if row.engine == "eager")
    assert row.status == "ok" and row.parity.passed and row.ratio_to_reference.pairs >= 3, row.reason
    assert (row.shape.channels, row.shape.tokens, row.shape.image) == (384, 16, 56)
    folder = tmp_path / "part"
    for kind in ("good", "scratch"):
        (folder / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(RNG.integers(0, 255, (60, 60, 3)).astype(np.uint8)).save(folder / kind / f"{i}.png")
    done = CliRunner().invoke(
        app,
        ["drift", str(path), "--layout", "folder", "--data", str(folder), "--scorer", "mismatch", "--precision", "bf16",
         "--device", "cpu", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    exact, bf16 = json.loads(done.stdout)["cases"]
    assert exact["map_error"] == 0 < bf16["map_rms"] < 0.2 and bf16["photos"] == 6
