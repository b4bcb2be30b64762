"""What a user of the authors' repositories expects: their image scores, class orders, step grid and settings."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from models import tiny_frames, tiny_model
from PIL import Image

from flowad_fast.checkpoints import foreign
from flowad_fast.checkpoints.defaults import EvaluationDefaults, evaluation_defaults, read_defaults
from flowad_fast.checkpoints.load import load_checkpoint, save_checkpoint
from flowad_fast.cli import eval as cli
from flowad_fast.cli.authors import choose
from flowad_fast.config import CLASS_ORDERS, MPDD_CLASSES, REALIAD_CLASSES, VISA_CLASSES
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Dataset
from flowad_fast.detector import Detection, Detector
from flowad_fast.errors import ConfigError
from flowad_fast.evaluation.evaluate import PUBLISHED, evaluate, plot_report, save_mistakes
from flowad_fast.stages.scorers import Density, Inversion, Mismatch, Reconstruction

Call = Callable[..., tuple[int, str, str]]

# Image scores that the test set normalises


class Scale:
    """Maps are the photo's red channel; raw scores are two terms of it. Category b's photos are 3 times as bright."""

    engine, class_names, image_size, aggregate, tiler = "fake", (), 16, "range+nll", None

    def __call__(self, frames: np.ndarray, classes: object = None) -> Detection:
        maps = frames[..., 0].astype(np.float32)
        raw = np.stack([np.sqrt(maps.max((1, 2))) - np.sqrt(maps.min((1, 2))), maps.sum((1, 2)) / 2], 1)
        return Detection(maps, raw.astype(np.float32), ("",) * len(maps), (None,) * len(maps), self.engine)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)


def scenes(root: Path, scales: dict[str, int], marked: bool = True) -> Path:
    """A data set in MVTec's layout whose categories differ in brightness alone."""
    for name, scale in scales.items():
        random = np.random.RandomState(0)
        save(root / name / "train/good/0.png", np.zeros((16, 16, 3)))
        for i in range(4):
            save(root / name / f"test/good/{i}.png", scale * random.randint(5, 40, (16, 16, 3)))
            photo, mask = scale * random.randint(5, 40, (16, 16, 3)), np.zeros((16, 16))
            photo[2:6, 2:6] += scale * 5 * (i + 1)
            mask[2:6, 2:6] = 255 if marked else 0
            save(root / name / f"test/spot/{i}.png", photo)
            save(root / name / f"ground_truth/spot/{i}_mask.png", mask)
    return root


@pytest.fixture
def two(tmp_path: Path) -> Dataset:
    return read_dataset("mvtec", scenes(tmp_path / "set", {"dim": 1, "lit": 3}))


def scores(dataset: Dataset, aggregate: Any) -> dict[str, list[float]]:
    report = evaluate(Scale(), dataset, mask_size=16, test_set_normalisation=aggregate)
    return {
        name: [row.score for row in report.images if row.category == name and row.score is not None]
        for name in report.metrics
    }


def test_flowads_terms_are_normalised_over_all_categories_together(two: Dataset) -> None:
    got = scores(two, "diff+sum")
    maps = [Scale()(np.asarray(Image.open(s.path))[None]).map[0] for c in got for s in two.select("test", c)]
    terms = np.array([[np.ptp(map), map.sum(dtype=np.float64)] for map in maps])
    expected = ((terms - terms.min(0)) / np.ptp(terms, axis=0)).sum(1)
    np.testing.assert_allclose(got["dim"] + got["lit"], expected)
    assert max(got["dim"]) < 1 < max(got["lit"]) == pytest.approx(2, abs=0.2)


def test_invads_terms_are_normalised_for_each_category(two: Dataset) -> None:
    got = scores(two, "range+nll")
    for name in got:
        raw = np.concatenate(
            [Scale()(np.asarray(Image.open(s.path))[None]).raw_score for s in two.select("test", name)]
        ).astype(np.float64)
        np.testing.assert_allclose(got[name], ((raw - raw.min(0)) / np.ptp(raw, axis=0)).sum(1))
    # The same photos, three times as bright: each category fills its own range.
    np.testing.assert_allclose(got["dim"], got["lit"], rtol=1e-5)


def test_a_category_alone_has_other_scores_in_flowads_evaluation_only(two: Dataset) -> None:
    alone = Dataset("mvtec", two.select("test", "dim"), has_masks=True)
    assert scores(alone, "range+nll")["dim"] == scores(two, "range+nll")["dim"]
    assert scores(alone, "diff+sum")["dim"] != scores(two, "diff+sum")["dim"]


def test_terms_that_the_detector_has_not_are_refused(two: Dataset) -> None:
    class Plain(Scale):
        def __call__(self, frames: np.ndarray, classes: object = None) -> Detection:
            one = super().__call__(frames)
            return Detection(one.map, one.map.max((1, 2)), one.classes, one.invalid, one.engine)

    with pytest.raises(ConfigError, match=r"no terms of range\+nll"):
        evaluate(Plain(), two, mask_size=16, test_set_normalisation="range+nll")


def test_the_report_says_what_a_comparison_must_know(two: Dataset) -> None:
    report = evaluate(Scale(), two, mask_size=16, test_set_normalisation="range+nll", remarks=("mine",))
    assert report.image_score == "range+nll (test-set normalised)" and report.remarks[0] == "mine"
    assert "of each category by itself" in report.remarks[1] and report.remarks[-1] == PUBLISHED
    assert "best on the test set" in PUBLISHED and "bins" in PUBLISHED and "exact" in PUBLISHED


def epsilon_model() -> Any:
    return tiny_model(pred_type="epsilon", t_scale=1.0)


def test_the_switch_knows_invads_models(tmp_path: Path) -> None:
    save_checkpoint(epsilon_model(), tmp_path / "invad.safetensors")
    save_checkpoint(tiny_model(), tmp_path / "flow.safetensors")
    for name, aggregate in (("invad", "range+nll"), ("flow", "diff+sum")):
        asked = cli.Asked(str(tmp_path / f"{name}.safetensors"), authors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Detector, "from_model", lambda model, scorer, aggregate: (scorer, aggregate))
            (scorer, used), scaled, remarks = cli._load(asked)  # type: ignore[misc]
        assert (used, scaled) == (aggregate, aggregate) and scorer == Inversion(power=1)
        assert f"aggregate {aggregate} [as the authors' code]" in remarks[0]


def test_an_aggregate_without_ranges_is_refused_before_the_work(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), tmp_path / "flow.safetensors")
    path = str(tmp_path / "flow.safetensors")
    with pytest.raises(ConfigError, match="diff.sum needs ranges of good parts"):
        cli._load(cli.Asked(path, aggregate="diff+sum"))
    with pytest.raises(ConfigError, match="image score diff.sum, got --aggregate top"):
        cli._load(cli.Asked(path, aggregate="top", authors=True))
    with pytest.raises(ConfigError, match=r"range\+nll is made of the latent"):
        cli._load(cli.Asked(path, "density", aggregate="range+nll", authors=True))


def test_a_latents_score_on_a_line_has_its_ranges_from_good_parts() -> None:
    detector = Detector.from_model(epsilon_model(), Inversion(steps=2), device="cpu", aggregate="range+nll")
    detection = detector(tiny_frames(2))
    assert detection.raw_score.shape == (2, 2)


# What FlowAD's checkpoints bring with them


@pytest.mark.parametrize(
    ("name", "order"),
    [("visa_all", VISA_CLASSES), ("mpdd_all", MPDD_CLASSES), ("realiad_all", REALIAD_CLASSES), ("other", ())],
)
def test_class_order_by_the_name_of_the_data_set(name: str, order: tuple[str, ...]) -> None:
    settings = foreign.Settings({"data": {"dataset_name": name, "category": "all"}}, "c.yaml")
    assert foreign._class_names(settings) == order


def test_class_orders_are_whole() -> None:
    assert {name: len(order) for name, order in CLASS_ORDERS.items()} == {
        "mvtec_ad": 15, "visa": 12, "mpdd": 6, "realiad": 30,
    }  # fmt: skip
    assert all(len(set(order)) == len(order) for order in CLASS_ORDERS.values())
    assert REALIAD_CLASSES[-3:] == ("zipper", "mounts", "tape") and VISA_CLASSES[-1] == "pipe_fryum"


@pytest.fixture
def released(golden: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A FlowAD checkpoint, its configuration, and that as values."""
    from test_checkpoint import as_training_saves, class_state, write

    values = yaml.safe_load((golden / "dit_class.yaml").read_text())
    config = tmp_path / "ad [G].yaml"
    config.write_text(yaml.safe_dump(values))
    return write(tmp_path / "ckpt_best.pth", as_training_saves(class_state())), config, values


def test_their_checkpoints_have_their_step_grid_and_ours_the_equal_one(released: Any, tmp_path: Path) -> None:
    path, config, _ = released
    model = load_checkpoint(path, config)
    assert model.config.step_grid == "short-last" and tiny_model().config.step_grid == "equal"
    sizes = [row.b for row in Reconstruction(steps=5).schedules(model.config)]
    np.testing.assert_allclose(sizes, [0.2, 0.2, 0.1])
    assert len(Reconstruction(steps=5).schedules(tiny_model().config)) == 2


def test_their_settings_are_kept_with_the_model(released: Any, tmp_path: Path) -> None:
    path, config, values = released
    values["logging"]["eval"] = {"eval_strategy": "density", "steps": 5, "hutchinson_samples": 7}
    config.write_text(yaml.safe_dump(values))
    model = load_checkpoint(path, config)
    kept = {"source": "ad [G].yaml", "scorer": "density", "steps": 5, "probes": 7}
    assert model.spec.provenance["evaluation"] == kept and model.spec.provenance["format"] == "flowad"
    (tmp_path / "own.json").write_text(model.spec.model_dump_json())
    assert evaluation_defaults(tmp_path / "own.safetensors", None) == EvaluationDefaults(**kept)
    assert evaluation_defaults("demo", None) is None


# Their settings as defaults

FULL = {
    "eval_strategy": "recon", "steps": 5, "hutchinson_samples": 4, "inv_steps": 20, "recon_steps": 20,
    "inv_stop_time": 0.25, "img_score_agg": "diff+sum", "solver_name": "euler", "metrics": ["img_auroc"],
    "exact_divergence": False,
}  # fmt: skip


def defaults(**values: Any) -> EvaluationDefaults | None:
    return read_defaults({"logging": {"eval": values}}, "a.yaml")


def test_what_the_file_says_is_the_default() -> None:
    theirs = defaults(**FULL)
    assert choose(None, None, {}, theirs).scorer == Reconstruction(steps=20, tau=0.25, start="inversion")
    assert choose(None, None, {}, theirs).aggregate == "diff+sum"
    assert choose("density", None, {}, theirs).scorer == Density(steps=5, probes=4)
    assert choose("inversion", None, {}, theirs).scorer == Inversion(steps=5)
    assert choose("mismatch", None, {}, theirs).scorer == Mismatch()
    assert choose(None, None, {}, defaults(eval_strategy="inversion", steps=100)).scorer == Inversion(100, power=1)


def test_the_command_line_wins_and_each_setting_says_where_it_came_from() -> None:
    choice = choose(None, "top", {"steps": 4, "tau": None}, defaults(**FULL))
    assert choice.scorer == Reconstruction(steps=4, tau=0.25, start="inversion") and choice.aggregate == "top"
    assert dict(choice.sources) == {
        "scorer": "a.yaml", "steps": "command line", "tau": "a.yaml", "start": "as the authors' code",
        "seed": "default", "aggregate": "command line",
    }  # fmt: skip
    assert "steps 4 [command line]" in str(choice) and "tau 0.25 [a.yaml]" in str(choice)
    by_evaluations = choose(None, None, {"evaluations": 2}, defaults(eval_strategy="inversion", steps=100))
    assert by_evaluations.scorer == Inversion(steps=2, power=1) and by_evaluations.sources["steps"] == "command line"


def test_without_a_file_nothing_changes() -> None:
    choice = choose(None, None, {}, None)
    assert choice.scorer == Inversion() and choice.aggregate == "max" and set(choice.sources.values()) == {"default"}


@pytest.mark.parametrize("values", [{}, {"logging": None}, {"logging": {}}, {"logging": {"eval": None}}])
def test_absent_settings_are_no_settings(values: dict[str, Any]) -> None:
    assert read_defaults(values, "a.yaml") is None
    assert defaults(metrics=["img_auroc"], eval_epoch_freq=25) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eval_strategy": "inverse"}, "eval_strategy 'inverse' is unknown; did you mean 'inversion'"),
        ({"img_score_agg": "median"}, "img_score_agg 'median' is unknown; .*valid: diff"),
        ({"img_score_agg": ["max"]}, r"img_score_agg \['max'\] is unknown"),
        ({"steps": "many"}, "steps"),
        ({"steps": 0}, "steps"),
        ({"hutchinson_samples": -1}, "probes"),
        ({"inv_stop_time": 2}, "tau"),
        ({"solver_name": "midpoint"}, "solver_name is 'midpoint', only 'euler'"),
    ],
)
def test_a_value_that_is_none_of_theirs_is_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"a\.yaml: logging\.eval.*{message}"):
        defaults(**values)


def test_a_reconstruction_has_as_many_steps_down_as_up() -> None:
    theirs = defaults(eval_strategy="recon", inv_steps=20, recon_steps=1, inv_stop_time=0.5)
    with pytest.raises(ConfigError, match="inv_steps 20 and recon_steps 1.*--steps"):
        choose(None, None, {}, theirs)
    assert choose(None, None, {"steps": 6}, theirs).scorer == Reconstruction(steps=6, start="inversion")


def test_eval_takes_max_where_the_files_aggregate_has_no_ranges(tmp_path: Path) -> None:
    model = tiny_model()
    kept = {"source": "ad.yaml", "aggregate": "diff+sum", "steps": 2}
    model.spec = model.spec.model_copy(update={"provenance": {"evaluation": kept}})
    save_checkpoint(model, tmp_path / "m.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "from_model", lambda model, scorer, aggregate: (scorer, aggregate))
        (scorer, used), scaled, remarks = cli._load(cli.Asked(str(tmp_path / "m.safetensors")))  # type: ignore[misc]
    assert (scorer, used, scaled) == (Inversion(steps=2), "max", None)
    assert "steps 2 [ad.yaml]" in remarks[0] and "diff+sum needs ranges" in remarks[1]


def test_export_takes_the_files_settings_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flowad_fast.export import cli as export

    model = tiny_model()
    kept = {"source": "ad [G].yaml", "scorer": "density", "steps": 2, "probes": 3, "aggregate": "diff+sum"}
    model.spec = model.spec.model_copy(update={"provenance": {"evaluation": kept}})
    save_checkpoint(model, tmp_path / "m.safetensors")
    arguments = ["make", tmp_path / "m.safetensors", "--steps", 4, "--dry-run", "--json", "--output", tmp_path / "b"]
    monkeypatch.setattr("sys.argv", ["flowad-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        export.main()
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert (
        not stop.value.code and plan["scorer"] == repr(Density(steps=4, probes=3)) and plan["aggregate"] == "diff+sum"
    )
    assert plan["sources"]["probes"] == "ad [G].yaml" and plan["sources"]["steps"] == "command line"
    assert "steps 4 [command line], probes 3 [ad [G].yaml]" in err


# Masks, and what is written


def test_empty_masks_are_named_and_leave_the_pixel_metrics_alone(tmp_path: Path) -> None:
    root = scenes(tmp_path / "set", {"dim": 1})
    whole = evaluate(Scale(), read_dataset("mvtec", root), mask_size=16, test_set_normalisation="diff+sum")
    save(root / "dim/ground_truth/spot/3_mask.png", np.zeros((16, 16)))
    report = evaluate(Scale(), read_dataset("mvtec", root), mask_size=16, test_set_normalisation="diff+sum")
    (row,) = report.unmarked
    assert row.path.endswith("spot/3.png") and "3_mask.png: marks no defect at 16x16" in (row.unmarked or "")
    assert report.pixel_images == {"dim": 7} and not report.errors and row.score is not None
    assert report.metrics["dim"]["image_auroc"] == whole.metrics["dim"]["image_auroc"]
    assert report.metrics["dim"]["pixel_ap"] not in (None, whole.metrics["dim"]["pixel_ap"])


def test_no_mask_that_marks_anything_is_no_pixel_metric(tmp_path: Path) -> None:
    dataset = read_dataset("mvtec", scenes(tmp_path / "set", {"dim": 1}, marked=False))
    report = evaluate(Scale(), dataset, mask_size=16, test_set_normalisation="diff+sum")
    assert report.metrics["dim"]["pixel_auroc"] is None and report.metrics["dim"]["image_auroc"] is not None
    assert report.pixel_images == {"dim": 4} and len(report.unmarked) == 4


def test_a_mask_of_another_shape_is_an_error_row(tmp_path: Path) -> None:
    root = scenes(tmp_path / "set", {"dim": 1})
    save(root / "dim/ground_truth/spot/2_mask.png", np.full((9, 16), 255))
    report = evaluate(Scale(), read_dataset("mvtec", root), mask_size=16, test_set_normalisation="diff+sum")
    (row,) = report.errors
    assert row.path.endswith("spot/2.png") and "the mask is 16x9 pixels, its image 16x16" in (row.error or "")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`flowad-eval` with `Scale` as the model: exit code, standard output and standard error."""
    monkeypatch.setattr(cli, "_load", lambda asked: (Scale(), "diff+sum", ()))
    monkeypatch.setattr(cli.common.out, "_width", 250)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["flowad-eval", "m", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        code = stop.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


NAMES = {"x[bold]": 1, "$a$ 100% $$": 2}


def test_names_are_text_in_tables_figures_and_files(tmp_path: Path, command: Call) -> None:
    root = scenes(tmp_path / "set", NAMES)
    code, out, _ = command("--data", root, "--output", tmp_path / "o [lot7]")
    assert code == 0 and "x[bold]" in out and "$a$ 100% $$" in out and "note: " + PUBLISHED in out
    report = json.loads((tmp_path / "o [lot7]/report.json").read_text())
    assert list(report["metrics"]) == sorted(NAMES)
    assert len(list((tmp_path / "o [lot7]/mistakes").glob("*.png"))) == 12


def test_class_names_with_separators_and_line_breaks_have_figures(two: Dataset, tmp_path: Path) -> None:
    report = evaluate(Scale(), two, mask_size=16, test_set_normalisation="diff+sum")
    odd = "a/b\n\udcff$x$"
    rows = tuple(replace(row, category=odd) for row in report.images)
    renamed = replace(report, images=rows, metrics={odd: report.metrics["dim"]})
    plot_report(renamed, tmp_path / "r.png")
    files = save_mistakes(renamed, Scale(), tmp_path / "m", n=2)
    assert [file.parent for file in files] == [tmp_path / "m"] * 2
    json.loads(renamed.to_json().encode())


def test_an_output_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = scenes(tmp_path / "set", {"dim": 1})
    (tmp_path / "report.json").write_text("old")
    monkeypatch.setattr(cli, "_load", lambda asked: pytest.fail("the model was loaded"))
    code, out, err = command("--data", root, "--output", tmp_path / "report.json")
    assert code == 1 and not out and "cannot be made" in err and (tmp_path / "report.json").read_text() == "old"


def test_what_was_computed_is_printed_though_writing_fails(
    tmp_path: Path, command: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, output = scenes(tmp_path / "set", {"dim": 1}), tmp_path / "o"

    def load(asked: cli.Asked) -> Any:
        shutil.rmtree(output)
        output.write_text("in the way")
        return Scale(), "diff+sum", ()

    monkeypatch.setattr(cli, "_load", load)
    code, out, err = command("--data", root, "--output", output)
    assert code == 1 and "AUPRO" in out and "cannot be written" in err and "Traceback" not in err


def test_what_was_left_out_is_named_counted_and_no_success(tmp_path: Path, command: Call) -> None:
    root = scenes(tmp_path / "set", {"dim": 1})
    save(root / "dim/ground_truth/spot/3_mask.png", np.zeros((16, 16)))
    code, out, err = command("--data", root)
    assert code == 1 and "AUPRO" in out and "left out of the pixel metrics: " in err and "3_mask.png" in err
    assert "1 have an empty mask: the pixel metrics cover the others (7 of dim)" in " ".join(err.split())
    (root / "dim/test/good/1.png").write_bytes(b"x")
    code, _, err = command("--data", root)
    assert code == 1 and "1.png" in err and "1 of 8 images are in no metric" in " ".join(err.split())


# Real-IAD as the authors keep it


def realiad(root: Path, lists: Path, *between: str) -> Path:
    good = {"anomaly_class": "OK", "image_path": "OK/S1/a.jpg", "mask_path": None}
    bad = {"anomaly_class": "HS", "image_path": "NG/HS/b.jpg", "mask_path": "NG/HS/b.png"}
    images = root.joinpath("toy", *between)
    for name in ("OK/S1/a.jpg", "NG/HS/b.jpg", "NG/HS/b.png"):
        save(images / name, np.zeros((4, 4, 3)))
    lists.mkdir(parents=True)
    (lists / "toy.json").write_text(json.dumps({"train": [good], "test": [good, bad]}))
    return images


@pytest.mark.parametrize("between", [(), ("toy",)])
def test_realiad_in_both_layouts_with_lists_elsewhere(tmp_path: Path, between: tuple[str, ...]) -> None:
    images = realiad(tmp_path / "d", tmp_path / "meta", *between)
    with pytest.raises(ConfigError, match="realiad_jsons is missing.*--lists"):
        read_dataset("realiad", tmp_path / "d")
    dataset = read_dataset("realiad", tmp_path / "d", tmp_path / "meta")
    assert dataset.categories == ("toy",) and dataset.samples[0].path == images / "OK/S1/a.jpg"
    assert all(sample.path.is_file() for sample in dataset.samples)
    with pytest.raises(ConfigError, match="'mvtec' has no folder of lists"):
        read_dataset("mvtec", tmp_path / "d", tmp_path / "meta")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_turns_out_empty_is_named(tmp_path: Path, split: str) -> None:
    realiad(tmp_path / "d", tmp_path / "meta")
    file = tmp_path / "meta/toy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {split: []}))
    with pytest.raises(ConfigError, match=rf"toy\.json: its {split} list is empty"):
        read_dataset("realiad", tmp_path / "d", tmp_path / "meta")
    for name in ("c/N/0.png", "c/A/0.png", "c/M/0.png"):
        save(tmp_path / "v" / name, np.zeros((4, 4, 3)))
    other = {"train": "test", "test": "train"}[split]
    table = f"object,split,label,image,mask\nc,{other},normal,c/N/0.png,\n"
    (tmp_path / "v/split_csv").mkdir()
    (tmp_path / "v/split_csv/1cls.csv").write_text(table)
    with pytest.raises(ConfigError, match=f"no row of the split {split} for 'c'"):
        read_dataset("visa", tmp_path / "v")
    (tmp_path / "v/split_csv/1cls.csv").write_text(table.partition("\n")[0] + "\n")
    with pytest.raises(ConfigError, match="no images in the layout 'visa'"):
        read_dataset("visa", tmp_path / "v")
