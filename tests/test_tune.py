"""Choosing a recipe by evidence: synthetic defects, judgement, the resumable measurement, its page, the export."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flowad_fast.cli.tune import start_eager
from flowad_fast.errors import ConfigError
from flowad_fast.export import cli as export_cli
from flowad_fast.export.tune import start_onnxruntime
from flowad_fast.files import sha256
from flowad_fast.shipped import weight_file
from flowad_fast.stages.scorers import Inversion, Mismatch
from flowad_fast.tuning import judge, measure
from flowad_fast.tuning.defects import DEFECTS, Defect, spoil
from flowad_fast.tuning.measure import Result, Settings, Watch, tune
from flowad_fast.tuning.page import write_page
from flowad_fast.tuning.parts import Parts, contents_of, labelled_parts, split
from flowad_fast.tuning.recipe import RecipeDefaults, Timing, describe, followed, read_recipe, write_recipe
from tests.models import PARTS, tiny_frames, tiny_model

CHECKPOINT = "ab" * 32


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "RUNS", 3)


def images(folder: Path, count: int, seed: int) -> list[Path]:
    folder.mkdir(parents=True)
    for i, frame in enumerate(tiny_frames(count, seed=seed)):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def good(folder: Path, count: int = 12, classes: Sequence[str] = ("",)) -> Parts:
    pairs = [(name, path) for i, name in enumerate(classes) for path in images(folder / f"c{name}", count, i)]
    return Parts(tuple(path for _, path in pairs), tuple(name for name, _ in pairs), (0,) * len(pairs))


def labelled(folder: Path) -> Parts:
    images(folder / "good", 8, 50)
    images(folder / "bad", 8, 51)
    return labelled_parts(str(folder), ())


def measured(
    folder: Path, parts: Parts, test: Parts | None = None, checkpoint: str = CHECKPOINT, **rest: object
) -> Result:
    return tune(tiny_model(), checkpoint, parts, test, folder, start_eager, **rest)  # type: ignore[arg-type]


def without_times(result: Result) -> list[dict[str, object]]:
    return [row.model_dump(exclude={"time"}) for row in result.rows]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda one: one.name)
def test_defects_are_seeded_and_stay_in_a_patch_of_their_size(defect: Defect) -> None:
    frame = tiny_frames(1, 96, 128)[0]
    spoilt = spoil(frame, defect, 3)
    changed = (spoilt != frame).any(2)
    assert np.array_equal(spoilt, spoil(frame, defect, 3)) and not np.array_equal(spoilt, spoil(frame, defect, 4))
    assert 0 < changed.sum() <= 1.5 * max(4, (defect.size * 96) ** 2) and spoilt.dtype == np.uint8


def test_a_defect_of_contrast_0_is_the_part_and_separates_like_chance(tmp_path: Path) -> None:
    nothing = tuple(Defect(kind, 0.2, 0.0) for kind in ("cutpaste", "perlin"))  # type: ignore[arg-type]
    frame = tiny_frames(1)[0]
    assert all(np.array_equal(spoil(frame, one, 1), frame) for one in nothing)
    result = measured(tmp_path / "out", good(tmp_path / "good"), settings=Settings(defects=nothing))
    # The same frame in another batch may differ in the last bits, which decides ties.
    assert all(abs(row.synthetic.auroc - 0.5) < 0.02 for row in result.rows)
    strong = measured(
        tmp_path / "strong", good(tmp_path / "good2"), settings=Settings(defects=(Defect("perlin", 0.5, 1.0),))
    )
    assert max(row.synthetic.auroc for row in strong.rows) > 0.6


def test_auroc_agrees_with_the_usual_one_and_counts_ties_half() -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.RandomState(0)
    a, b = random.randint(0, 8, 40).astype(float), random.randint(2, 10, 60).astype(float)
    wa, wb = random.randint(0, 4, (3, 40)).astype(float), random.randint(0, 4, (3, 60)).astype(float)
    labels = np.r_[np.zeros(40), np.ones(60)]
    expected = [roc_auc_score(labels, np.r_[a, b], sample_weight=np.r_[x, y]) for x, y in zip(wa, wb, strict=True)]
    np.testing.assert_allclose(judge.aurocs(a, b, wa, wb), expected)


def test_rank_correlation_agrees_with_scipy() -> None:
    from scipy.stats import spearmanr

    a, b = np.random.RandomState(0).randint(0, 9, (2, 30)).astype(float)
    assert judge.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert judge.rank_correlation(a, a) == pytest.approx(1) and judge.rank_correlation(a, np.ones(30)) == 0


def test_the_choice_is_the_fastest_within_half_a_point_and_the_front_has_no_beaten_recipe() -> None:
    times, values = [10.0, 10.2, 20.0, 30.0, 40.0], [0.80, 0.949, 0.948, 0.952, 0.90]
    assert judge.choose(times, values) == 1
    assert judge.choose(times, [0.80, 0.94, 0.948, 0.952, 0.90]) == 2
    assert judge.front(times, values) == [0, 1, 3]


def test_parts_are_split_without_overlap_and_never_shared_with_the_labelled_ones(tmp_path: Path) -> None:
    parts = good(tmp_path / "good", classes=PARTS)
    statistics, held = split(parts, 4, seed=0)
    assert not set(statistics.paths) & set(held.paths)
    assert [held.classes.count(name) for name in PARTS] == [4, 4, 4] == [statistics.classes.count(n) for n in PARTS]
    copy = tmp_path / "copy.png"
    copy.write_bytes(parts.paths[3].read_bytes())
    with pytest.raises(ConfigError, match="must not be among the good parts, 1 are"):
        contents_of(parts, Parts((copy,), ("",), (0,)))
    with pytest.raises(ConfigError, match="3 good parts of nut, expected at least 4"):
        split(parts.take([0, 1, 2]), 4, 0)


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are measured, so they differ from run to run; here each takes the same."""
    same = Timing(median=1.0, quarter=1.0, three_quarters=1.0, runs=1)
    monkeypatch.setattr(measure, "_timed", lambda *_: same)
    parts, test = good(tmp_path / "good"), labelled(tmp_path / "test")
    whole = measured(tmp_path / "whole", parts, test)
    started: list[object] = []

    def stops(model: object, scorer: object) -> object:
        if len(started) == 3:
            raise KeyboardInterrupt
        started.append(scorer)
        return start_eager(model, scorer)

    with pytest.raises(KeyboardInterrupt):
        tune(tiny_model(), CHECKPOINT, parts, test, tmp_path / "part", stops)  # type: ignore[arg-type]
    kept = {path: path.read_bytes() for path in (tmp_path / "part" / "times").iterdir()}
    assert len(kept) == 3
    features = {path: path.stat().st_mtime_ns for path in (tmp_path / "part" / "features").iterdir()}
    result = measured(tmp_path / "part", parts, test)
    assert without_times(result) == without_times(whole)
    assert result.agreement == whole.agreement and result.sorts == whole.sorts
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert features == {path: path.stat().st_mtime_ns for path in (tmp_path / "part" / "features").iterdir()}


def test_another_checkpoint_or_other_data_begin_anew_and_say_so(tmp_path: Path) -> None:
    parts, said = good(tmp_path / "good"), list[str]()
    watch = Watch(said.append)
    measured(tmp_path / "out", parts, watch=watch)
    assert not said
    measured(tmp_path / "out", parts, checkpoint="cd" * 32, watch=watch)
    measured(tmp_path / "out", parts.take(range(10)), checkpoint="cd" * 32, watch=watch)
    assert [line.split(" changed")[0] for line in said] == ["starting anew: checkpoint", "starting anew: data"]


def test_the_choice_keeps_to_the_evaluations_that_are_allowed(tmp_path: Path) -> None:
    parts = good(tmp_path / "good"), labelled(tmp_path / "test")
    found = {
        most: tune(
            tiny_model(), CHECKPOINT, *parts, tmp_path / "out", start_eager, measure.Settings(most_evaluations=most)
        )
        for most in (1, 2, None)
    }
    assert len({len(one.rows) for one in found.values()}) == 1, "all are measured"
    for most in (1, 2):
        one = found[most]
        assert one.rows[one.chosen].evaluations <= most and one.rows[one.without_labels].evaluations <= most
        assert f"at most {most} evaluations" in one.recipe.evidence.rule
        best = max(row.labelled.auroc for row in one.rows if row.labelled and row.evaluations <= most)
        assert one.recipe.evidence.best == best
    assert found[None].recipe.evidence.rule == judge.RULE


def test_a_conditional_model_is_judged_by_class(tmp_path: Path) -> None:
    parts = good(tmp_path / "good", classes=PARTS)
    result = tune(tiny_model(len(PARTS)), CHECKPOINT, parts, None, tmp_path / "out", start_eager)
    assert set(result.rows[0].synthetic.classes) == set(PARTS)
    assert result.rows[0].synthetic.auroc == pytest.approx(np.mean(list(result.rows[0].synthetic.classes.values())))


def test_the_page_needs_no_network_and_escapes_names(tmp_path: Path) -> None:
    result = measured(tmp_path / "out", good(tmp_path / "good"), labelled(tmp_path / "test"))
    write_page(result, "<script>alert(1)</script>", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    words = re.sub(r"base64,[\w+/=]+", "", page)  # in which any four letters can stand
    assert len(words) < len(page) and "http" not in words and result.recipe.text in words
    assert "Spearman" in page and f"{result.agreement.spearman:.2f}" in page  # type: ignore[union-attr]


def test_a_recipe_goes_through_its_file_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    recipe = measured(tmp_path / "out", good(tmp_path / "good")).recipe
    path = tmp_path / "recipe.json"
    write_recipe(recipe, path)
    assert read_recipe(path) == recipe and recipe.evidence.recipes == 48
    assert recipe.evidence.parts["statistics"] > 0
    for change, said in (({"schema_version": 2}, "recipe schema 2"), ({"colour": 1}, "unknown key 'colour'")):
        path.write_text(json.dumps(json.loads(recipe.model_dump_json()) | change))
        with pytest.raises(ConfigError, match=said):
            read_recipe(path)
    other = Inversion(steps=7) if recipe.scorer != Inversion(steps=7) else Inversion(steps=8)
    assert (
        "aggregate" not in followed(recipe, other, recipe.aggregate).overruled
        and followed(recipe, other, recipe.aggregate).overruled
    )
    assert followed(recipe, recipe.scorer, recipe.aggregate).overruled == ()


def test_descriptions_name_what_differs_from_the_default() -> None:
    assert describe(Mismatch(tau=0.7), "top", False) == "mismatch (tau 0.7, draws 1), top"
    assert describe(Inversion(steps=2), "max", True) == "inversion (steps 2), max, location"


@pytest.fixture
def demo_recipe(tmp_path: Path) -> Path:
    recipe = measured(tmp_path / "out", good(tmp_path / "good")).recipe
    changes = {"checkpoint": sha256(weight_file("demo")), "scorer": Mismatch(tau=0.7), "aggregate": "top"}
    write_recipe(recipe.model_copy(update=changes), tmp_path / "recipe.json")
    return tmp_path / "recipe.json"


def make(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(export_cli.app, ["make", "demo", "--dry-run", "--json", *map(str, words)])
    return done.exit_code, done.stdout if done.exit_code == 0 else str(done.exception)


def test_an_export_follows_a_recipe_and_the_command_line_wins(demo_recipe: Path, tmp_path: Path) -> None:
    output = ("--output", tmp_path / "bundle", "--data", tmp_path / "good")
    _, text = make("--recipe", demo_recipe, *output)
    plan = json.loads(text)
    assert plan["scorer"] == repr(Mismatch(tau=0.7)) and plan["aggregate"] == "top"
    assert plan["sources"]["tau"] == plan["sources"]["aggregate"] == "recipe.json"
    _, text = make("--recipe", demo_recipe, "--tau", "0.4", "--aggregate", "max", *output)
    plan = json.loads(text)
    assert plan["scorer"] == repr(Mismatch(tau=0.4)) and plan["sources"]["tau"] == "command line"
    assert plan["aggregate"] == "max" and plan["sources"]["draws"] == "recipe.json"


def test_an_export_refuses_another_checkpoints_recipe_and_location_statistics_without_parts(demo_recipe: Path) -> None:
    recipe = read_recipe(demo_recipe)
    write_recipe(recipe.model_copy(update={"checkpoint": CHECKPOINT}), demo_recipe)
    assert "run flowad-tune on this checkpoint" in make("--recipe", demo_recipe)[1]
    write_recipe(recipe.model_copy(update={"location": True}), demo_recipe)
    assert "needs good parts: give --calibrate" in make("--recipe", demo_recipe)[1]


def test_the_manifest_keeps_the_recipe_with_its_evidence(tmp_path: Path) -> None:
    from flowad_fast import bundle
    from flowad_fast.export.exporter import export_bundle

    recipe = measured(tmp_path / "out", good(tmp_path / "good")).recipe
    kept = followed(recipe, recipe.scorer, recipe.aggregate)
    model, scorer = tiny_model(real_backbone=True), recipe.scorer
    export_bundle(
        model, scorer, tmp_path / "bundle", formats=("eager",), aggregate=recipe.aggregate, frames=tiny_frames(4),
        recipe=kept, quiet=True,
    )  # fmt: skip
    assert bundle.read(tmp_path / "bundle")[1].recipe == kept


def test_onnxruntime_is_timed_on_a_graph_of_the_same_score() -> None:
    model, frame = tiny_model(), tiny_frames(1)
    got, expected = (start(model, Mismatch()).run(frame, None) for start in (start_onnxruntime, start_eager))
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)


def test_timings_are_positive_and_ordered() -> None:
    engine = start_eager(tiny_model(), Inversion(steps=1))
    timing = measure._timed(engine, tiny_frames(1), None)
    assert isinstance(timing, Timing) and 0 < timing.quarter <= timing.median <= timing.three_quarters


def test_recipe_defaults_leave_counts_out_where_they_are_given() -> None:
    class Fake:
        scorer, aggregate = Inversion(steps=2), "top"

    defaults = RecipeDefaults(Fake(), "r.json")  # type: ignore[arg-type]
    assert defaults.options("inversion") == {"steps": 2, "power": 2}
    assert defaults.options("inversion", counted=True) == {"power": 2} and defaults.options("density") == {}


def test_location_statistics_come_from_the_other_half_and_need_enough_parts(tmp_path: Path) -> None:
    def pairs(count: int) -> list[tuple[float, float]]:
        folder = tmp_path / str(count)
        result = measured(folder / "out", posed(folder / "good", count))
        assert result.recipe.evidence.parts["statistics"] == count // 2
        plain, located = ([r.synthetic.auroc for r in result.rows if r.location is side] for side in (False, True))
        return list(zip(plain, located, strict=True))

    assert all(plain == pytest.approx(located) for plain, located in pairs(12))
    changed = [located - plain for plain, located in pairs(48)]
    assert max(changed) > 0.01


def posed(folder: Path, count: int) -> Parts:
    """Parts that are all noisy in the same corner."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for i in range(count):
        frame = np.full((64, 64, 3), 128) + random.randint(-3, 4, (64, 64, 3))
        frame[:16, :16] += random.randint(-100, 100, (1, 1, 3))
        Image.fromarray(frame.astype(np.uint8)).save(folder / f"{i:02}.png")
    paths = tuple(sorted(folder.iterdir()))
    return Parts(paths, ("",) * count, (0,) * count)


@pytest.mark.long
def test_the_command_writes_recipes_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flowad_fast.checkpoints.own import save_checkpoint
    from flowad_fast.cli.tune import tune as command

    save_checkpoint(tiny_model(real_backbone=True), tmp_path / "tiny.safetensors", include_backbone=True)
    images(tmp_path / "good", 8, 0)
    labelled(tmp_path / "test")
    out = tmp_path / "out"
    command(
        str(tmp_path / "tiny.safetensors"), str(tmp_path / "good"), str(tmp_path / "test"), out,
        engine="eager", grid="quick", parts=4, seed=0, config=None, backbone_weights=None, json=True,
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    recipe = read_recipe(out / "recipe.json")
    assert recipe.checkpoint == sha256(tmp_path / "tiny.safetensors") and recipe.evidence.chosen_by == "labelled"
    assert read_recipe(out / "recipe-without-labels.json").evidence.chosen_by == "synthetic"
    assert found["recipe"] == recipe.model_dump(mode="json") and (out / "tune.html").stat().st_size > 10_000
