"""Location statistics: their fit, what they leave alone, the graph that takes them, fitting anew, the guarantee."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models import PARTS, entries, tiny_frames, tiny_model

import flowad_fast
from flowad_fast import bundle
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.errors import BundleError, CalibrationError, ConfigError, EngineUnavailableError, FrameError
from flowad_fast.export.calibration import recalibrate
from flowad_fast.export.exporter import check_bundle, export_bundle
from flowad_fast.export.formats import FORMATS
from flowad_fast.export.frames import GoodParts, ParityFrames
from flowad_fast.export.location import StatisticsParts, refuse_overlap, split
from flowad_fast.export.verify import TOLERANCES, auroc, reference_outputs
from flowad_fast.files import sha256
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.decision import calibrate
from flowad_fast.stages.location import MIN_PARTS, LocationStatistics, apply, cells, identity
from flowad_fast.stages.scorers import Inversion, Mismatch

SIDE = 8


def places(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of the maps of parts that always lie the same way."""
    random = np.random.RandomState(seed)
    return random.gamma(4.0, 2.0, (SIDE, SIDE)), random.gamma(4.0, 0.3, (SIDE, SIDE))


def posed(count: int, seed: int) -> np.ndarray:
    """Maps of good parts with a fixed pose; cells of a part rise and fall together a little."""
    mean, std = places()
    random = np.random.RandomState(seed)
    return mean + std * (random.standard_normal((count, SIDE, SIDE)) + 0.3 * random.standard_normal((count, 1, 1)))


def unposed(count: int, seed: int) -> np.ndarray:
    """The same parts, each turned and shifted at random."""
    random = np.random.RandomState(seed)
    return np.stack(
        [np.roll(np.rot90(one, random.randint(4)), random.randint(0, SIDE, 2), (0, 1)) for one in posed(count, seed)]
    )


def defective(maps: np.ndarray, seed: int) -> np.ndarray:
    """Maps with one cell raised by what is much at some places and little at others."""
    random, raised = np.random.RandomState(seed), maps.copy()
    for one in raised:
        one[tuple(random.randint(0, SIDE, 2))] += 4
    return raised


def ranked(good: np.ndarray, bad: np.ndarray) -> float:
    scores = np.concatenate([good, bad]).reshape(len(good) + len(bad), -1).max(1)
    return auroc(np.repeat([0, 1], [len(good), len(bad)]), scores)


def test_a_part_that_fits_its_place_is_zero_and_one_that_does_not_counts_its_deviations() -> None:
    fitted = LocationStatistics.fit(posed(400, 1))
    mean, std = places()
    assert fitted.mean_weight == (1.0,) and fitted.std_weight[0] > 0.5 and fitted.parts == (400,) and fitted.fitted[0]
    np.testing.assert_allclose(fitted.mean[0], mean, atol=0.35)
    np.testing.assert_allclose(fitted.apply((mean + 3 * std * 1.044)[None]), 3, atol=0.8)
    new = fitted.apply(posed(400, 2))
    np.testing.assert_allclose(new.mean(0), 0, atol=0.3)
    np.testing.assert_allclose(new.std(0), 1, atol=0.25)


def test_they_help_where_parts_have_a_pose_and_do_no_harm_where_they_have_none() -> None:
    good, bad = posed(300, 11), defective(posed(300, 12), 13)
    fitted = LocationStatistics.fit(posed(120, 10))
    assert ranked(fitted.apply(good), fitted.apply(bad)) > ranked(good, bad) + 0.1
    good, bad = unposed(300, 11), defective(unposed(300, 12), 13)
    for count in (25, 60, 400):
        gains = []
        for seed in range(5):
            fitted = LocationStatistics.fit(unposed(count, 20 + seed))
            assert fitted.mean_weight[0] <= 0.25 and fitted.std_weight[0] <= 0.25
            gains.append(ranked(fitted.apply(good), fitted.apply(bad)) - ranked(good, bad))
        assert np.mean(gains) >= -0.003


def test_weights_of_zero_change_no_ranking() -> None:
    fits = [LocationStatistics.fit(np.random.RandomState(i).standard_normal((60, SIDE, SIDE))) for i in range(6)]
    zero = [fit for fit in fits if (fit.mean_weight, fit.std_weight) == ((0.0,), (0.0,))]
    assert len(zero) >= 3, "places that say nothing are seldom believed"
    assert all(fit.mean_weight[0] + fit.std_weight[0] <= 0.25 for fit in fits), "and then hardly"
    assert all(np.ptp(fit.mean) == 0 and np.ptp(fit.std) < 1e-5 for fit in zero)


def test_classes_have_their_own_and_one_with_too_few_parts_stays_as_it_is() -> None:
    maps = np.concatenate([posed(50, 1), posed(50, 2) * 3, posed(MIN_PARTS - 1, 3)])
    labels = [0] * 50 + [1] * 50 + [2] * (MIN_PARTS - 1)
    fitted = LocationStatistics.fit(maps, labels, 4)
    assert fitted.parts == (50, 50, MIN_PARTS - 1, 0) and fitted.fitted == (True, True, False, False)
    alone = LocationStatistics.fit(posed(50, 2) * 3)
    np.testing.assert_array_equal(fitted.table[1], alone.table[0])
    np.testing.assert_array_equal(fitted.table[2:], identity(2, SIDE, SIDE))
    np.testing.assert_array_equal(fitted.apply(maps[-3:], [2, 3, 2]), maps[-3:].astype(np.float32))
    with pytest.raises(CalibrationError, match="expected one of 0 to 1"):
        LocationStatistics.fit(maps, labels, 2)
    with pytest.raises(CalibrationError, match="not finite"):
        LocationStatistics.fit(np.full((20, 2, 2), np.nan))
    constant = LocationStatistics.fit(np.full((20, 2, 2), 7.0))
    assert np.isfinite(constant.table).all() and (constant.apply(np.full((1, 2, 2), 7.0)) == 0).all()


@pytest.mark.parametrize(("small", "large"), [((4, 4), 64), ((16, 16), 256), ((5, 3), 32), ((7, 7), 7)])
def test_cells_come_back_from_the_enlarged_map(small: tuple[int, int], large: int) -> None:
    import torch

    maps = torch.rand(3, *small) * 500
    got = cells(ops.upsample(maps, large).numpy(), *small)
    np.testing.assert_allclose(got, maps.numpy(), atol=2e-3)


def part_frames(count: int, seed: int = 0, classes: int = 0) -> GoodParts:
    names = [PARTS[i % classes] if classes else "" for i in range(count)]
    return GoodParts(tiny_frames(count, seed=seed), names, [f"{seed}-{i}.png" for i in range(count)])


def located(
    path: Path, name: str, classes: int = 0, parts: int = 20, **options: object
) -> tuple[FlowModel, bundle.Manifest]:
    """An exported bundle with location statistics; a machine that cannot write the format is a reason to skip."""
    model = tiny_model(classes, real_backbone=name == "eager")
    fields: dict[str, object] = {"good": part_frames(40, 1, classes), "alpha": 0.2} | options
    result = export_bundle(
        model, Mismatch(), path, formats=(name,), frames=tiny_frames(6, seed=3), device="cpu", quiet=True,
        location=StatisticsParts(part_frames(parts * max(classes, 1), 2, classes), "a test"), **fields,
    )  # fmt: skip
    if not result.published:
        assert result.status[name].startswith("not available"), result.status[name]
        pytest.skip(f"{name}: {result.status[name]}")
    return model, result.manifest


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("name", entries([n for n in FORMATS if "tensorrt" not in n], ("aoti",)))
def test_every_format_applies_them_and_is_certified_with_them(tmp_path: Path, name: str, classes: int) -> None:
    model, manifest = located(tmp_path / "b", name, classes)
    assert manifest.location is not None and manifest.artefacts[name].parity is not None
    folder, read = bundle.read(tmp_path / "b")
    assert read == manifest
    table = bundle.location_table(folder, manifest)
    frames, y = tiny_frames(5, seed=9), np.array([0, 1, 1, 0, 1]) if classes else None
    names = [PARTS[i] for i in y] if y is not None else None
    plain, _ = reference_outputs(model, manifest.scorer, "max", frames, y)
    expected = ops.upsample(_tensor(apply(table, cells(plain, 4, 4), y)), 64).numpy()
    # Quantised graphs run where they are asked for by name, and come as near as their certificate says.
    quantised = FORMATS[name].quantises is not None
    engine, limit = (FORMATS[name].engine, TOLERANCES["int8"].max) if quantised else ("auto", 1e-3)
    got = flowad_fast.load(tmp_path / "b", engine, device="cpu")(frames, names)
    assert np.abs(got.map - expected).max() < limit * expected.std()
    np.testing.assert_allclose(got.score, expected.max((1, 2)), atol=limit * expected.std())
    assert np.abs(plain - expected).max() > expected.std(), "they do something"
    assert all(outcome.ok for outcome in check_bundle(folder, model, ParityFrames(frames, "a test")).values())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "location statistics from a test" in card


def _tensor(array: np.ndarray):  # noqa: ANN202
    import torch

    return torch.from_numpy(array)


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("located") / "b"
    located(path, "onnx")
    return path


def test_a_photo_that_lies_in_the_folder_twice_is_never_in_both_parts() -> None:
    once = part_frames(30, 8)
    twice = GoodParts(
        [*once.frames, *once.frames], [*once.classes] * 2, [f"{i}-{label}" for i in (1, 2) for label in once.labels]
    )
    statistics, rest = split(twice, 0.1, "max")
    assert sorted(statistics.good.labels + rest.labels) == sorted(twice.labels)
    refuse_overlap(statistics.good, rest)


def test_fitting_anew_needs_no_export(onnx_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(onnx_bundle, path)
    before = bundle.read(path)[1]
    graph = sha256(path / "model.onnx")
    good = part_frames(60, 5)
    after = recalibrate(path, good, 0.1)
    assert after == bundle.read(path)[1] and before.location and after.location and after.calibration
    assert sha256(path / "model.onnx") == graph and after.artefacts == before.artefacts
    assert after.location.file != before.location.file and not (path / before.location.file).exists()
    assert after.location.parts == {"": 30} and after.calibration.classes[""].parts == 30
    assert "30 of the 60 good parts given, drawn with seed 0" in after.location.source
    statistics, rest = split(good, 0.1, "max")
    assert sorted(statistics.good.labels + rest.labels) == sorted(good.labels)
    # The same table as from the model itself, and thresholds from the others' scores.
    model = tiny_model()
    maps = reference_outputs(model, after.scorer, "max", np.stack(list(statistics.good.frames)), None)[0]
    direct = LocationStatistics.fit(cells(maps, 4, 4))
    np.testing.assert_allclose(bundle.location_table(path, after), direct.table, rtol=1e-3, atol=1e-2)
    scores = flowad_fast.load(path)(np.stack(list(rest.frames))).score
    assert after.calibration == calibrate(scores, 0.1).model_copy(
        update={"classes": {"": after.calibration.classes[""]}, "regions": after.calibration.regions}
    )
    assert after.calibration.classes[""].threshold == pytest.approx(calibrate(scores, 0.1).classes[""].threshold)
    pixels = after.calibration.classes[""].pixels
    assert pixels is not None and pixels.threshold == pytest.approx(after.calibration.classes[""].threshold, rel=1e-5)


def test_a_failed_fit_leaves_the_bundle_as_it_was(onnx_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(onnx_bundle, path)
    before = {file.name: sha256(file) for file in path.iterdir()}
    bad = part_frames(40, 6)
    black = GoodParts([*bad.frames, np.zeros((64, 64, 3), np.uint8)], [*bad.classes, ""], [*bad.labels, "black.png"])
    with pytest.raises(FrameError, match=r"black\.png"):
        recalibrate(path, black, 0.2)
    with pytest.raises(CalibrationError, match="too few"):
        recalibrate(path, part_frames(5, 6), 0.1)
    same = part_frames(40, 7)
    some = GoodParts(same.frames[:20], same.classes[:20], same.labels[:20])
    with pytest.raises(CalibrationError, match=r"7-0\.png is also among those of the location statistics"):
        recalibrate(path, same, 0.2, location=StatisticsParts(some, "the same"))
    assert {file.name: sha256(file) for file in path.iterdir()} == before


def test_parts_in_both_would_break_the_promise_and_are_refused_before_the_export(tmp_path: Path) -> None:
    good = part_frames(40, 1)
    refuse_overlap(part_frames(40, 2), good)
    with pytest.raises(CalibrationError, match="false-reject rate would not hold"):
        located(tmp_path / "b", "onnx", good=part_frames(20, 2))
    assert not (tmp_path / "b").exists()


def test_an_altered_table_is_no_bundle(onnx_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "b"
    shutil.copytree(onnx_bundle, path)
    manifest = bundle.read(path)[1]
    assert manifest.location is not None
    file = path / manifest.location.file
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(BundleError, match="altered or damaged"):
        flowad_fast.load(path)
    file.unlink()
    with pytest.raises(BundleError, match="missing"):
        flowad_fast.load(path)
    file.write_bytes(b"\0" * 4)
    short = manifest.location.model_copy(update={"sha256": sha256(file)})
    bundle.write_manifest(path, manifest.model_copy(update={"location": short}))
    with pytest.raises(BundleError, match="1 numbers, expected 32"):
        flowad_fast.load(path)


def test_graphs_without_a_place_for_them_and_aggregates_without_a_meaning_refuse(tmp_path: Path) -> None:
    model = tiny_model()
    plain = export_bundle(model, Mismatch(), tmp_path / "p", formats=("onnx",), frames=tiny_frames(3), quiet=True)
    assert plain.manifest.location is None and not list((tmp_path / "p").glob("location*"))
    with pytest.raises(CalibrationError, match="exported without location statistics"):
        recalibrate(tmp_path / "p", part_frames(40), 0.2, location=StatisticsParts(part_frames(20, 2), "others"))
    table = identity(1, 4, 4)
    with pytest.raises(EngineUnavailableError, match="no place for location statistics"):
        flowad_fast.load(tmp_path / "p").running().locate(table)
    with pytest.raises(ConfigError, match=r"range\+nll is made of the latent itself"):
        export_bundle(
            model, Inversion(), tmp_path / "r", formats=("onnx",), aggregate="range+nll", frames=tiny_frames(3),
            location=StatisticsParts(part_frames(20, 2), "others"), quiet=True,
        )  # fmt: skip


@pytest.mark.long
def test_the_servers_graph_holds_them_and_is_not_fitted_anew(tmp_path: Path) -> None:
    _, manifest = located(tmp_path / "b", "triton-server")
    folder, _ = bundle.read(tmp_path / "b")
    text = next(folder.rglob("config.pbtxt")).read_text(encoding="utf-8")
    assert "frames" in text and "location" not in text
    with pytest.raises(CalibrationError, match="as constants.*export the bundle again"):
        recalibrate(tmp_path / "b", part_frames(40, 6), 0.2)


def promised(together: bool, splits: int = 200, alpha: float = 0.1) -> tuple[float, float]:
    """Mean false-reject rate over random splits, and its standard error; `together`: statistics from the same parts."""
    rates = []
    for seed in range(splits):
        random = np.random.RandomState(1000 + seed)
        mean, std = random.gamma(4.0, 2.0, (4, 4)), random.gamma(4.0, 0.3, (4, 4))
        maps = mean + std * random.standard_normal((38 + 100, 4, 4)) * random.gamma(8, 1 / 8, (138, 1, 1))
        statistics, threshold, new = maps[:19], maps[19:38], maps[38:]
        fitted = LocationStatistics.fit(threshold if together else statistics, seed=seed)
        limit = calibrate(fitted.apply(threshold).max((1, 2)), alpha).classes[""].threshold
        rates.append(float((fitted.apply(new).max((1, 2)) > limit).mean()))
    return float(np.mean(rates)), float(np.std(rates) / splits**0.5)


def test_the_false_reject_rate_holds_on_average_over_splits() -> None:
    rate, error = promised(together=False)
    assert 0.1 - 4 * error <= rate <= 0.1 + 3 * error


def test_it_would_not_hold_if_the_thresholds_parts_gave_the_statistics() -> None:
    rate, error = promised(together=True)
    assert rate > 0.1 + 6 * error


@pytest.mark.long
@pytest.mark.slow
def test_real_cells_gain_and_lose_nothing_without_a_fixed_pose() -> None:
    """Mono cells of ELPV, one evaluation: what training parts give, and the same without their pose.

    Once their maps are shifted and turned at random, once their photos are, by up to 20 of 300 pixels.
    """
    model, data = flowad_fast.load_checkpoint("demo"), read_dataset("elpv", None)
    pipeline = ScoringPipeline(model, Mismatch(tau=0.5, seed=0)).eval()

    def maps(split: str, change: Callable[[np.ndarray], np.ndarray] = lambda frame: frame) -> np.ndarray:
        paths = [sample.path for sample in data.select(split)]
        with torch.inference_mode():
            found = [
                pipeline.cells(torch.from_numpy(np.stack([change(read_frame(path)) for path in paths[i : i + 16]])))
                for i in range(0, len(paths), 16)
            ]
        return torch.cat(found).numpy().reshape(-1, model.config.height, model.config.width)

    def moved_photo(frame: np.ndarray) -> np.ndarray:
        (dy, dx), (height, width, _) = photos.randint(0, 41, 2), frame.shape
        wide = np.pad(np.rot90(frame, photos.randint(4)), ((20, 20), (20, 20), (0, 0)), "reflect")
        return wide[dy : dy + height, dx : dx + width]

    def loose(maps: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        side = maps.shape[1]
        turned = [np.roll(np.rot90(one, random.randint(4)), random.randint(0, side, 2), (0, 1)) for one in maps]
        return np.stack(turned)

    labels = np.array([sample.label for sample in data.select("test")])
    train, test = maps("train"), maps("test")

    def ranking(maps: np.ndarray, count: int) -> float:
        return auroc(labels, np.sort(maps.reshape(len(maps), -1), 1)[:, -count:].mean(1))

    for highest, gain in ((1, 0.018), (3, 0.014)):  # max, and the highest 1 % of the cells
        assert ranking(LocationStatistics.fit(train).apply(test), highest) >= ranking(test, highest) + gain
        for seed in range(3):
            random = np.random.RandomState(seed)
            moved = loose(test, random)
            for parts in (413, 60, 20):
                fitted = LocationStatistics.fit(loose(train[:parts], random))
                assert ranking(fitted.apply(moved), highest) >= ranking(test, highest) - 0.003, (highest, seed, parts)
    photos = np.random.RandomState(0)
    train, test = maps("train", moved_photo), maps("test", moved_photo)
    for highest in (1, 3):
        for parts in (413, 60, 20):
            gained = ranking(LocationStatistics.fit(train[:parts]).apply(test), highest) - ranking(test, highest)
            assert gained >= -0.003, (highest, parts)


def test_evaluation_of_a_checkpoint_takes_them_from_training_parts_and_a_recipe_asks_for_them(
    tmp_path: Path, onnx_bundle: Path
) -> None:
    from PIL import Image

    from flowad_fast.checkpoints.own import save_checkpoint
    from flowad_fast.cli.eval import Asked, _load
    from flowad_fast.data.samples import Sample
    from flowad_fast.tuning.recipe import read_recipe, write_recipe

    model, path = tiny_model(real_backbone=True), tmp_path / "tiny.safetensors"
    save_checkpoint(model, path, include_backbone=True)
    parts = []
    for i, frame in enumerate(tiny_frames(20, seed=2)):
        Image.fromarray(frame).save(tmp_path / f"{i:02}.png")
        parts.append(Sample(tmp_path / f"{i:02}.png", "part", "train", 0))
    detector, _, remarks = _load(Asked(str(path), "mismatch", aggregate="top", location=True, training=tuple(parts)))
    assert "location statistics of 20 good training parts" in remarks
    frames = tiny_frames(5, seed=9)
    seen, new = (
        reference_outputs(model, Mismatch(), "top", each, None)[0] for each in (tiny_frames(20, seed=2), frames)
    )
    expected = ops.upsample(_tensor(LocationStatistics.fit(cells(seen, 4, 4)).apply(cells(new, 4, 4))), 64).numpy()
    assert np.abs(detector(frames).map - expected).max() < 1e-2 * expected.std()

    chosen = read_recipe(Path(__file__).parents[1] / "benchmarks" / "demo" / "recipe.json")
    change = {"checkpoint": sha256(path), "location": True, "scorer": Inversion(steps=2), "aggregate": "mean"}
    write_recipe(chosen.model_copy(update=change), tmp_path / "recipe.json")
    asked = Asked(str(path), recipe=tmp_path / "recipe.json", training=tuple(parts))
    detector, _, remarks = _load(asked)
    assert detector.aggregate == "mean" and "location statistics of 20 good training parts" in remarks
    with pytest.raises(ConfigError, match="the data have none"):
        _load(Asked(str(path), location=True))
    with pytest.raises(ConfigError, match="has its scorer fixed, got --location"):
        _load(Asked(str(onnx_bundle), location=True))
