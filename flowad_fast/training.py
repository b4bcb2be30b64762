"""Training a detector's velocity field from good parts, on frozen features.

Minimises ||u(X_t, t, y) - (X1 - X0)||² with t ~ U[0, 1], X0 ~ N(0, I) and X_t = t X1 + (1 - t) X0. No random state
is carried from step to step: images, flips, t and X0 of a step are functions of (seed, step, process) alone. A run
that was killed at any moment and resumed therefore computes what an uninterrupted one does, bit for bit on a CPU (GPU
kernels that are not deterministic themselves may differ in the last bits).
"""

import hashlib
import json
import math
import os
import pickle
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowad_fast.checkpoint import _backbone_loader, save_checkpoint
from flowad_fast.config import Frozen, ImageConfig, ModelConfig, VelocityConfig, parse
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.errors import CheckpointError, ConfigError, EngineUnavailableError, FlowADError, nearest
from flowad_fast.features import BACKBONES, STRIDES, FeatureExtractor
from flowad_fast.image import normalise
from flowad_fast.model import FlowModel
from flowad_fast.velocity import DiT

STATE, LOG, CHECKPOINT, CONFIG = "state.pt", "log.jsonl", "model.safetensors", "config.json"
"""Files of an output folder: resumable state, loss curve, trained model (with its JSON), what was asked for."""
FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (-1,)),
    "vertical": ((), (-2,)),
    "both": ((), (-1,), (-2,), (-2, -1)),
}
"""Flip variants of a setting, each as the image axes to reverse; the first is the image itself."""
_WHERE_AND_WHEN = {"root", "feature_cache", "backbone_weights", "log_every", "save_every", "dtype"}
"""Fields that say where data lie and when files are written, and so may differ between a run and its resumption."""
_SCHEMA = 1

Progress = Callable[[str, int, int, float | None], object]
"""Called as progress(stage, done, total, loss) with stage "features" (images) or "training" (steps)."""


class DivergedError(FlowADError, RuntimeError):
    """The loss or its gradient is not finite; the last saved state is from before."""


class TrainConfig(Frozen):
    """What to train, on what, and how. `batch_size` is per step, over all processes together."""

    layout: str = Field(description="layout of the data set: mvtec, visa, realiad, elpv")
    root: Path | None = Field(None, description="folder of the data set; elpv can come from its package instead")
    categories: tuple[str, ...] = Field((), description="category to train on, repeatable, in class order [all]")
    backbone: Literal["efficientnet-b4", "efficientnet-lite0"] = Field("efficientnet-b4", description="frozen features")
    backbone_weights: Path | None = Field(None, description="weight file of the backbone")
    image_size: int = Field(256, gt=0, multiple_of=32, description="pixels a side after resizing")
    normalise_features: bool = Field(True, description="bring each channel to mean 0 and std 1 over the good parts")
    use_class_labels: bool | None = Field(None, description="condition on the category [with more than one]")
    hidden_size: int = Field(768, gt=0, description="width of the DiT")
    depth: int = Field(12, gt=0, description="blocks of the DiT")
    num_heads: int = Field(8, gt=0, description="attention heads")
    mlp_ratio: float = Field(4.0, gt=0, description="MLP width / hidden size")
    batch_size: int = Field(32, gt=0, description="images a step, over all processes")
    steps: int = Field(50_000, gt=0, description="optimiser steps")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: int = Field(500, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights, which are the result")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    flips: Literal["none", "horizontal", "vertical", "both"] = Field("none", description="random flips of the image")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the DiT (bf16: autocast)")
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, batches, flips, times and noise")
    feature_cache: Path | None = Field(None, description="folder for features on disk, computed once for all flips")
    log_every: int = Field(50, gt=0, description="steps between lines of the log")
    save_every: int = Field(500, gt=0, description="steps between saved states")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of the weights in the result")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} must not exceed lr {self.lr}")
        return self

    def image(self) -> ImageConfig:
        """How frames become the backbone's input."""
        return ImageConfig(size=self.image_size)

    def velocity(self, classes: int) -> VelocityConfig:
        """The velocity field for a data set of `classes` categories; ConfigError when the sizes do not fit."""
        conditional = classes > 1 if self.use_class_labels is None else self.use_class_labels
        grid = self.image_size // STRIDES[-1]
        fields = self.model_dump(include={"hidden_size", "depth", "num_heads", "mlp_ratio"})
        fields |= {"channels": sum(BACKBONES[self.backbone].channels), "height": grid, "width": grid}
        fields |= {"use_class_labels": conditional, "num_classes": classes if conditional else 1}
        return parse(VelocityConfig, fields, "training configuration")


@dataclass(frozen=True)
class TrainResult:
    """Outcome of `train`: `checkpoint` is None when it was interrupted; `loss` is the mean of the last log interval.

    `rank` is this process's number, 0 for the one that writes.
    """

    finished: bool
    step: int
    resumed_from: int
    loss: float | None
    seconds: float
    device: str
    checkpoint: Path | None
    rank: int = 0


def train(
    config: TrainConfig,
    output: str | Path,
    resume: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    distributed: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train and write `output`/model.safetensors with its JSON: the averaged weights, in the project's own format.

    State is saved every `save_every` steps, and on Ctrl-C or SIGTERM after the step that runs; with `resume` a run
    goes on from there. `distributed` takes part in the processes that `accelerate launch` started.

    Raises:
        ConfigError: the configuration does not fit the data, the saved state is from another configuration, another
            training writes to `output`, or a file cannot be written.
        CheckpointError: the backbone's weights or the saved state cannot be read.
        FrameError: a training image cannot be read.
        EngineUnavailableError: the device does not exist.
        DivergedError: the loss became NaN or infinite.
    """
    started = time.perf_counter()
    runtime = _runtime(device, distributed)
    if config.batch_size % runtime.world:
        raise ConfigError(f"batch_size {config.batch_size} is not a multiple of the {runtime.world} processes")
    output = Path(output)
    dataset = read_dataset(config.layout, config.root)
    categories, samples = training_samples(config, dataset)
    velocity = config.velocity(len(categories))
    labels = torch.tensor([categories.index(sample.category) for sample in samples])
    names = categories if velocity.use_class_labels else ()
    spec = ModelConfig(velocity=velocity, backbone=config.backbone, image=config.image(), class_names=names)
    extractor = _backbone_loader(spec, config.backbone_weights, {}, str(output))().to(runtime.device)
    identity = _identity(config, dataset.name, samples, extractor, runtime.world)
    learner = Learner(config, velocity, runtime)
    with ExitStack() as stack:
        if runtime.rank == 0:
            stack.enter_context(_sole_writer(output))
        if resume and (output / STATE).is_file():
            learner.load(output / STATE, identity)
        direct = DirectFeatures(extractor, [sample.path for sample in samples], config)
        stack.callback(direct.pool.shutdown)
        source: FeatureSource = direct
        if config.feature_cache is not None:
            shown = progress if runtime.rank == 0 else None
            source = cached_features(direct, config.feature_cache, identity["backbone_sha256"], shown)
        if config.normalise_features and learner.step == 0:
            learner.mean, learner.std = feature_statistics(source)
        first = learner.step
        if runtime.rank == 0:
            with _aside(output / CONFIG) as file:
                file.write(config.model_dump_json(indent=2).encode() + b"\n")
            _cut_log(output / LOG, first)
        _loop(config, learner, source, labels, identity, output, progress)
        finished = learner.step == config.steps
        if finished and runtime.rank == 0:
            _save_result(config, learner, spec, extractor, identity, output / CHECKPOINT)
    checkpoint = output / CHECKPOINT if finished else None
    seconds = time.perf_counter() - started
    return TrainResult(
        finished, learner.step, first, learner.mean_loss, seconds, str(runtime.device), checkpoint, runtime.rank
    )


def training_samples(config: TrainConfig, dataset: Dataset) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    """The categories in class order and their good training images.

    Raises:
        ConfigError: an unknown category, or one without good training images.
    """
    chosen = tuple(dict.fromkeys(config.categories or dataset.categories))
    samples: list[Sample] = []
    for category in chosen:
        if category not in dataset.categories:
            raise ConfigError(f"no category {category!r} in {dataset.name}; {nearest(category, dataset.categories)}")
        found = dataset.select("train", category, 0)
        if not found:
            raise ConfigError(f"category {category!r} of {dataset.name} has no good training images")
        samples += found
    if not samples:
        raise ConfigError(f"{dataset.name} has no images; check the data folder")
    return chosen, tuple(samples)


def draw_batch(config: TrainConfig, images: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Image indices and flip variants (batch_size,) of a step: every epoch is one permutation of all images."""
    epochs, places = np.divmod(np.arange(step * config.batch_size, (step + 1) * config.batch_size), images)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        order = np.random.RandomState(_seed(config.seed, 1, int(epoch))).permutation(images)
        indices[epochs == epoch] = order[places[epochs == epoch]]
    variants = np.random.RandomState(_seed(config.seed, 2, step)).randint(0, len(FLIPS[config.flips]), len(indices))
    return indices, variants


def _seed(*numbers: int) -> int:
    """A 32-bit seed that mixes all numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class FeatureSource(Protocol):
    """Raw (not normalised) features of training images, in a part for a reading thread and a part for the device."""

    images: int

    def load(self, indices: np.ndarray, variants: np.ndarray) -> Tensor:
        """What the features of these images (B,) in these flip variants (B,) need, on the CPU; any thread."""

    def finish(self, loaded: Tensor) -> Tensor:
        """Features (B, h*w, C) float32 on the device, from what `load` gave."""


class DirectFeatures:
    """Features computed from the image files whenever they are asked for."""

    def __init__(self, extractor: FeatureExtractor, paths: Sequence[Path], config: TrainConfig) -> None:
        self.extractor, self.paths, self.images = extractor, paths, len(paths)
        self.image, self.variants = config.image(), FLIPS[config.flips]
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="flowad-read")

    def read(self, index: int) -> Tensor:
        """The backbone's input (3, size, size) for one image."""
        return normalise(torch.from_numpy(read_frame(self.paths[index]))[None], self.image)[0]

    def load(self, indices: np.ndarray, variants: np.ndarray) -> Tensor:
        """Images (B, 3, size, size), flipped."""
        images = self.pool.map(self.read, indices.tolist())
        return torch.stack([i.flip(self.variants[v]) for i, v in zip(images, variants.tolist(), strict=True)])

    @torch.no_grad()
    def finish(self, loaded: Tensor) -> Tensor:
        """Features of the images."""
        return self.extractor(loaded.to(self.extractor.mean.device))


class CachedFeatures:
    """Features (images, variants, h*w, C) float32 read from a memory-mapped file."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        self.array, self.device, self.images = array, device, len(array)

    def load(self, indices: np.ndarray, variants: np.ndarray) -> Tensor:
        """Features from disk."""
        return torch.from_numpy(self.array[indices, variants])

    def finish(self, loaded: Tensor) -> Tensor:
        """Features on the device."""
        return loaded.to(self.device)


def cached_features(
    direct: DirectFeatures, folder: Path, backbone_sha256: str, progress: Progress | None = None
) -> CachedFeatures:
    """The features of all images and flip variants as a file in `folder`, computed if it is not there yet.

    Its name is a hash of the images (path, size, time of change), the backbone's weights and the image configuration.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in direct.paths]
    key = _digest([files, backbone_sha256, direct.image.model_dump(mode="json"), direct.variants])
    _make_folder(folder)
    path = folder / f"features-{key[:20]}.npy"
    # Processes of one training, and other trainings, wait here for the one that computes.
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            with _aside(path) as file:
                _write_features(direct, file, progress)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ConfigError(f"{path}: a damaged feature cache ({error}); delete it") from None
    return CachedFeatures(array, direct.extractor.mean.device)


def _write_features(direct: DirectFeatures, file: BinaryIO, progress: Progress | None) -> None:
    for start in range(0, direct.images, 8):
        rows = np.arange(start, min(start + 8, direct.images))
        images = direct.load(rows, np.zeros_like(rows))
        block = torch.stack([direct.finish(images.flip(axes)) for axes in direct.variants], 1).cpu().numpy()
        if start == 0:
            shape = (direct.images, *block.shape[1:])
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        # Written in order rather than through a memory map: a full disk is then an error, not a bus error.
        file.write(block.astype("<f4").tobytes())
        if progress is not None:
            progress("features", int(rows[-1]) + 1, direct.images, None)


def feature_statistics(source: FeatureSource) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of each channel, over all images (not flipped) and locations."""
    total = square = torch.zeros(())
    count = 0
    for start in range(0, source.images, 8):
        rows = np.arange(start, min(start + 8, source.images))
        x = source.finish(source.load(rows, np.zeros_like(rows))).double().flatten(0, 1)
        total, square, count = total.to(x.device) + x.sum(0), square.to(x.device) + x.square().sum(0), count + len(x)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    # A channel that never varies on good parts would magnify its first change without bound.
    return mean.float(), std.clamp_min(1e-4 * float(std.max())).float()


class Learner:
    """Everything that a step changes: weights, their average, optimiser, learning rate, and the step count.

    `losses` are those since the last line of the log, `mean_loss` is the mean that this line gave.
    """

    def __init__(self, config: TrainConfig, velocity: VelocityConfig, runtime: "Runtime") -> None:
        self.config, self.runtime = config, runtime
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.dit = DiT(velocity).initialise()
        self.dit.y_embedder.requires_grad_(velocity.use_class_labels)
        self.dit.to(runtime.device)
        self.field = runtime.wrap(self.dit)
        self.ema = AveragedModel(self.dit, multi_avg_fn=self._average)
        self.weights = [p for p in self.dit.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=config.lr, weight_decay=config.weight_decay)
        self.scheduler = LambdaLR(self.optimizer, self._lr_factor)
        self.mean = torch.zeros(velocity.channels, device=runtime.device)
        self.std = torch.ones(velocity.channels, device=runtime.device)
        self.step = 0
        self.losses: list[float] = []
        self.mean_loss: float | None = None

    def _average(self, averaged: Any, current: Any, count: Any) -> None:
        # The first steps' weights are noise: a young average forgets them faster.
        decay = min(self.config.ema_decay, (1 + int(count)) / (10 + int(count)))
        get_ema_multi_avg_fn(decay)(averaged, current, count)

    def _lr_factor(self, step: int) -> float:
        config = self.config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = min(1.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
        low = config.min_lr / config.lr
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))

    def advance(self, features: Tensor, y: Tensor | None) -> tuple[float, float]:
        """One step on raw features (B, h*w, C) and classes (B,); returns the loss and the gradient's norm.

        Raises:
            DivergedError: either is not finite; the weights are untouched.
        """
        device = self.runtime.device
        generator = torch.Generator(device).manual_seed(_seed(self.config.seed, 3, self.step, self.runtime.rank))
        x1 = (features - self.mean) / self.std
        x0 = torch.randn(x1.shape, generator=generator, device=device)
        t = torch.rand(len(x1), generator=generator, device=device)
        along = t[:, None, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            u = self.field(along * x1 + (1 - along) * x0, t, y)
        loss = F.mse_loss(u.float(), x1 - x0)
        self.optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.weights, self.config.grad_clip))
        value = loss.item()
        if not math.isfinite(norm) or not math.isfinite(value):
            raise DivergedError(
                f"step {self.step + 1}: loss {value}, gradient norm {norm}; expected finite numbers. The last "
                "saved state is intact: start anew (--no-resume) with a lower learning rate, or with precision fp32"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.dit)
        self.step += 1
        return value, norm

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write the state aside and rename it: a crash at any moment leaves the old or the new one."""
        state = {
            "schema": _SCHEMA,
            "identity": json.dumps(identity),
            "sha256": _digest(identity),
            "step": self.step,
            "model": self.dit.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "mean": self.mean,
            "std": self.std,
            "losses": self.losses,
            "mean_loss": self.mean_loss,
        }
        with _aside(path) as file:
            torch.save(state, file)

    def load(self, path: Path, identity: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ConfigError: it was made with another configuration; the message names what differs.
            CheckpointError: it is not a state.
        """
        try:
            state = torch.load(path, map_location=self.runtime.device, weights_only=True)
            if state["schema"] != _SCHEMA:
                raise CheckpointError(f"{path}: schema {state['schema']}, expected {_SCHEMA}; train anew (--no-resume)")
            if state["sha256"] != _digest(identity):
                differences = _differences(json.loads(state["identity"]), identity)
                raise ConfigError(
                    f"{path}: was made with another configuration ({differences}); repeat the old one, "
                    "start anew (--no-resume), or choose another output folder"
                )
            self.dit.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.mean, self.std, self.step = state["mean"], state["std"], state["step"]
            self.losses, self.mean_loss = state["losses"], state["mean_loss"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{path}: not a saved training ({reason}); train anew (--no-resume)") from None


def _loop(
    config: TrainConfig,
    learner: Learner,
    source: FeatureSource,
    labels: Tensor,
    identity: dict[str, Any],
    output: Path,
    progress: Progress | None,
) -> None:
    """Steps until the end or an interruption, with logs and saved states."""
    runtime = learner.runtime
    conditional = learner.dit.config.use_class_labels
    with ThreadPoolExecutor(1, thread_name_prefix="flowad-batch") as ahead, _deferred_signals() as stop:

        def fetch(step: int) -> tuple[Tensor, Tensor]:
            indices, variants = (part[runtime.rank :: runtime.world] for part in draw_batch(config, len(labels), step))
            return source.load(indices, variants), labels[indices]

        pending = ahead.submit(fetch, learner.step)
        while learner.step < config.steps:
            loaded, y = pending.result()
            pending = ahead.submit(fetch, learner.step + 1)
            lr = learner.scheduler.get_last_lr()[0]
            loss, norm = learner.advance(source.finish(loaded), y.to(runtime.device) if conditional else None)
            loss, stopping = runtime.mean(loss, float(stop.is_set()))
            learner.losses.append(loss)
            step = learner.step
            if step % config.log_every == 0 or step == config.steps:
                learner.mean_loss = sum(learner.losses) / len(learner.losses)
                learner.losses = []
                line = {"step": step, "loss": learner.mean_loss, "lr": lr, "grad_norm": norm}
                if runtime.rank == 0:
                    with (output / LOG).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            if runtime.rank == 0:
                if step % config.save_every == 0 or step == config.steps or stopping:
                    learner.save(output / STATE, identity)
                if progress is not None:
                    progress("training", step, config.steps, loss)
            if stopping:
                break


def _save_result(
    config: TrainConfig,
    learner: Learner,
    spec: ModelConfig,
    extractor: FeatureExtractor,
    identity: dict[str, Any],
    path: Path,
) -> None:
    packages = {name: version(name) for name in ("flowad-fast", "torch", "timm", "numpy")}
    provenance = {
        "format": "flowad-fast",
        **identity,
        "loss": learner.mean_loss,
        "device": learner.runtime.device.type,
        "versions": {"python": platform.python_version(), **packages},
    }
    extractor.normalise = config.normalise_features
    extractor.mean.copy_(learner.mean)
    extractor.std.copy_(learner.std)
    dit = DiT(spec.velocity)
    dit.load_state_dict(learner.ema.module.state_dict())
    spec = spec.model_copy(update={"feature_normalisation": config.normalise_features, "provenance": provenance})
    save_checkpoint(FlowModel(spec, dit, extractor), path, getattr(torch, config.dtype))


@dataclass(frozen=True)
class Runtime:
    """The device, and this process's place among several (`accelerator` is None when there is one)."""

    device: torch.device
    rank: int = 0
    world: int = 1
    accelerator: Any = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def mean(self, *values: float) -> tuple[float, ...]:
        """Each value's mean over the processes."""
        if self.accelerator is None:
            return values
        return tuple(self.accelerator.reduce(torch.tensor(values, device=self.device), "mean").tolist())


def _runtime(device: str, distributed: bool) -> Runtime:
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailableError("device cuda: no usable NVIDIA GPU or driver was found; use device cpu")
    if distributed:
        if find_spec("accelerate") is None:
            raise ConfigError('distributed training needs accelerate; install it: pip install "flowad-fast[train]"')
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        return Runtime(accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a launcher started several processes, which would overwrite each other; add --distributed")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Runtime(torch.device(device))


@contextmanager
def _deferred_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event instead of breaking a step; a second one acts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        event.set()
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        restore()


def _identity(
    config: TrainConfig, name: str, samples: Sequence[Sample], extractor: FeatureExtractor, processes: int
) -> dict[str, Any]:
    """Everything that determines the result, without machine paths."""
    base = Path(os.path.commonpath([sample.path.parent for sample in samples]))
    files = [(s.path.relative_to(base).as_posix(), s.category, s.path.stat().st_size) for s in samples]
    weights = hashlib.sha256()
    for tensor in extractor.backbone.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    return {
        "config": config.model_dump(mode="json", exclude=_WHERE_AND_WHEN),
        "data": {"name": name, "images": len(files), "sha256": _digest(files)},
        "backbone_sha256": weights.hexdigest(),
        "processes": processes,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The entries that differ, as `name: old -> new`."""
    flat = [{**{k: v for k, v in d.items() if k != "config"}, **d.get("config", {})} for d in (old, new)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name}: {flat[0].get(name)} -> {flat[1].get(name)}" for name in names)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error}); choose another folder") from None


@contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    _make_folder(output)
    try:
        with FileLock(output / "train.lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"{output}: another training writes here; wait for it or choose another folder") from None


@contextmanager
def _aside(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` once it is complete and on the disk; an unfinished one never does."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); free space or choose another folder") from None
    finally:
        part.unlink(missing_ok=True)


def _cut_log(path: Path, step: int) -> None:
    """Keep the log's lines up to `step`: a killed run logs steps that its last saved state does not have."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    with _aside(path) as file:
        for line in lines:
            # The last line of a killed run may be incomplete.
            if line.endswith("}") and json.loads(line)["step"] <= step:
                file.write(line.encode() + b"\n")
