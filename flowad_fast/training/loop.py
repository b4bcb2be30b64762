"""Training a detector's velocity field from good parts, on frozen features.

Minimises ||u(X_t, t, y) - (X1 - X0)||² with t ~ U[0, 1], X0 ~ N(0, I) and X_t = t X1 + (1 - t) X0; other times,
predictions and losses are in `objective`. No random state
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic_core import PydanticUndefined
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowad_fast.checkpoints.load import backbone_loader, save_checkpoint
from flowad_fast.config import ModelConfig, VelocityConfig
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Sample
from flowad_fast.errors import CheckpointError, ConfigError, EngineUnavailableError, FlowADError, require
from flowad_fast.files import digest, replacing
from flowad_fast.masks import draw_mask
from flowad_fast.model import FlowModel
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.stages.tiling import Tiler
from flowad_fast.stages.velocity import DiT
from flowad_fast.training.batches import (
    DirectFeatures,
    FeatureSource,
    Progress,
    cached_features,
    draw_batch,
    feature_statistics,
    require_writable,
    seed_of,
    training_images,
    training_samples,
)
from flowad_fast.training.certify import add_certificate, divided
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.objective import draw_times, drop_classes, flow_loss
from flowad_fast.training.students import Teacher

STATE, LOG, CHECKPOINT, CONFIG = "state.pt", "log.jsonl", "model.safetensors", "config.json"
"""Files of an output folder: resumable state, loss curve, trained model (with its JSON), what was asked for."""
_WHERE_AND_WHEN = {
    "root", "lists", "feature_cache", "backbone_weights", "teacher", "mask", "log_every", "save_every", "dtype",
}  # fmt: skip
"""Fields that say where data lie and when files are written, and so may differ between a run and its resumption."""
_SCHEMA = 1


class Identity(TypedDict):
    """Everything that determines a training's result, without machine paths."""

    config: dict[str, object]
    data: dict[str, str | int]
    backbone_sha256: str
    processes: int
    teacher_sha256: NotRequired[str]
    mask_sha256: NotRequired[str]


class DivergedError(FlowADError, RuntimeError):
    """The loss or its gradient is not finite; the last saved state is from before."""


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
    """Train and write `output`/model.safetensors with its JSON, in the project's own format.

    The result are the averaged weights, or those of the last step where `ema_decay` is 0. With a teacher they are a
    student's, with its certificate; the same call on a finished training measures the certificate again.

    State is saved every `save_every` steps, and on Ctrl-C or SIGTERM after the step that runs; with `resume` a run
    goes on from there. `distributed` takes part in the processes that `accelerate launch` started.

    Raises:
        ConfigError: the configuration does not fit the data, the saved state is from another configuration, another
            training writes to `output`, or a file cannot be written.
        CheckpointError: the backbone's weights or the saved state cannot be read.
        FrameError: a training image cannot be read.
        EngineUnavailableError: the device does not exist.
        MissingExtraError: `distributed`, without accelerate.
        DivergedError: the loss became NaN or infinite.
    """
    started = time.perf_counter()
    runtime = _runtime(device, distributed)
    if config.batch_size % runtime.world:
        raise ConfigError(f"batch_size {config.batch_size} is not a multiple of the {runtime.world} processes")
    output = Path(output)
    with ExitStack() as stack:
        stack.callback(runtime.leave)
        if runtime.rank == 0:  # what cannot be written is told before anything is computed
            stack.enter_context(_sole_writer(output))
            if config.feature_cache is not None:
                require_writable(config.feature_cache)
        teacher = None
        if config.teacher is not None:
            teacher = Teacher.of(config, runtime.device)
            config = teacher.config(config)
        dataset = read_dataset(config.layout, config.root, config.lists)
        categories, samples = training_samples(config, dataset)
        parts = None
        if teacher is not None:
            parts = divided(dataset, categories, samples)
            samples = parts.training
        paths, tiling = [sample.path for sample in samples], config.tiling
        mask = None if config.mask is None else draw_mask(config.mask)
        tiler = None if tiling is None else Tiler(tiling, config.image_size, mask, config.image().mean)
        config = config.counted(len(training_images(paths, tiler)))
        if teacher is None:
            velocity = config.velocity(len(categories))
            names = categories if velocity.use_class_labels else ()
            spec = ModelConfig(
                velocity=velocity, backbone=config.backbone, image=config.image(), class_names=names, tiling=tiling
            )
            extractor = backbone_loader(spec, config.backbone_weights, {}, str(output))().to(runtime.device)
        else:
            spec = teacher.student(config, categories)
            velocity, names, extractor = spec.velocity, spec.class_names, teacher.raw_features()
        order = names or categories
        identity = _identity(config, dataset.name, samples, extractor, runtime.world)
        if tiler is not None and tiler.mask_sha256 is not None:
            identity["mask_sha256"] = tiler.mask_sha256
        if teacher is not None:
            identity["teacher_sha256"] = teacher.sha256
        learner = Learner(config, velocity, runtime, teacher)
        if resume and (output / STATE).is_file():
            learner.load(output / STATE, identity)
        direct = DirectFeatures(extractor, paths, config, spec.image, tiler)
        stack.callback(direct.pool.shutdown)
        labels = torch.tensor([order.index(samples[photo].category) for photo, _ in direct.places])
        source: FeatureSource = direct
        if config.feature_cache is not None:
            shown = progress if runtime.rank == 0 else None
            source = cached_features(direct, config.feature_cache, identity["backbone_sha256"], shown)
        if teacher is not None:
            learner.mean, learner.std = extractor.mean.clone(), extractor.std.clone()
        elif config.normalise_features and learner.step == 0:
            learner.mean, learner.std = feature_statistics(source)
        first = learner.step
        if runtime.rank == 0:
            with replacing(output / CONFIG) as file:
                file.write(config.model_dump_json(indent=2).encode() + b"\n")
            _cut_log(output / LOG, first)
        _loop(config, learner, source, labels, identity, output, progress)
        finished = learner.step == config.steps
        if finished and runtime.rank == 0:
            _save_result(config, learner, spec, extractor, mask, identity, output / CHECKPOINT)
            if teacher is not None and parts is not None:
                add_certificate(output / CHECKPOINT, teacher, parts, config, progress)
    checkpoint = output / CHECKPOINT if finished else None
    seconds = time.perf_counter() - started
    return TrainResult(
        finished, learner.step, first, learner.mean_loss, seconds, str(runtime.device), checkpoint, runtime.rank
    )


class Learner:
    """Everything that a step changes: weights, their average, optimiser, learning rate, and the step count.

    `losses` are those since the last line of the log, `mean_loss` is the mean that this line gave.
    """

    def __init__(
        self, config: TrainConfig, velocity: VelocityConfig, runtime: "Runtime", teacher: Teacher | None = None
    ) -> None:
        self.config, self.runtime, self.teacher = config, runtime, teacher
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.dit = DiT(velocity).initialise()
        self.dit.y_embedder.requires_grad_(velocity.use_class_labels)
        self.dit.to(runtime.device)
        self.field = runtime.wrap(self.dit)
        self.ema = AveragedModel(self.dit, multi_avg_fn=self._average) if config.ema_decay else None
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
            low = config.start_lr / config.lr
            return low + (1 - low) * ((step + 1) / config.warmup_steps)
        done = min(1.0, (step - config.warmup_steps) / (config.steps - config.warmup_steps))
        low = config.min_lr / config.lr
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))

    def advance(self, features: Tensor, y: Tensor | None) -> tuple[float, float]:
        """One step on raw features (B, h*w, C) and classes (B,); returns the loss and the gradient's norm.

        Raises:
            DivergedError: either is not finite; the weights are untouched.
        """
        config, device = self.config, self.runtime.device
        generator = torch.Generator(device).manual_seed(seed_of(config.seed, 3, self.step, self.runtime.rank))
        x1 = (features - self.mean) / self.std
        if self.teacher is not None:
            lesson = self.teacher.lesson(x1, y, generator)
            loss = F.mse_loss(self._output(lesson.x, lesson.t, lesson.y), lesson.target)
        else:
            x0 = torch.randn(x1.shape, generator=generator, device=device)
            t = draw_times(config, len(x1), generator)
            if y is not None and config.class_dropout:
                y = drop_classes(y, config.class_dropout, self.dit.config.num_classes, generator)
            along = t[:, None, None]
            u = self._output(along * x1 + (1 - along) * x0, t, y)
            loss = flow_loss(u, x0, x1, t, config.predict, config.loss, config.div_eps)
        self.optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.weights, config.grad_clip or math.inf))
        value = loss.item()
        if not math.isfinite(norm) or not math.isfinite(value):
            raise DivergedError(
                f"step {self.step + 1}: loss {value}, gradient norm {norm}; expected finite numbers. The last "
                "saved state is intact: start anew (--no-resume) with a lower learning rate, or with precision fp32"
            )
        self.optimizer.step()
        self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.dit)
        self.step += 1
        return value, norm

    def _output(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's output (B, h*w, C) float32, computed in the configuration's precision."""
        with torch.autocast(self.runtime.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out: Tensor = self.field(x, t, y)
        return out.float()

    def save(self, path: Path, identity: Identity) -> None:
        """Write the state aside and rename it: a crash at any moment leaves the old or the new one."""
        state = {
            "schema": _SCHEMA,
            "identity": json.dumps(identity),
            "sha256": digest(identity),
            "step": self.step,
            "model": self.dit.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "mean": self.mean,
            "std": self.std,
            "losses": self.losses,
            "mean_loss": self.mean_loss,
        }
        with replacing(path) as file:
            torch.save(state, file)

    def load(self, path: Path, identity: Identity) -> None:
        """Continue from a saved state.

        Raises:
            ConfigError: it was made with another configuration; the message names what differs.
            CheckpointError: it is not a state.
        """
        try:
            state = torch.load(path, map_location=self.runtime.device, weights_only=True)
            if state["schema"] != _SCHEMA:
                raise CheckpointError(f"{path}: schema {state['schema']}, expected {_SCHEMA}; train anew (--no-resume)")
            made = json.loads(state["identity"])
            made["config"] = _defaults() | made["config"]  # a state from before an option existed had its default
            if digest(made) != digest(identity):
                differences = _differences(made, identity)
                raise ConfigError(
                    f"{path}: was made with another configuration ({differences}); repeat the old one, "
                    "start anew (--no-resume), or choose another output folder"
                )
            self.dit.load_state_dict(state["model"])
            if self.ema is not None:
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
    identity: Identity,
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
    mask: NDArray[np.bool_] | None,
    identity: Identity,
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
    dit.load_state_dict((learner.dit if learner.ema is None else learner.ema.module).state_dict())
    spec = spec.model_copy(update={"feature_normalisation": config.normalise_features, "provenance": provenance})
    alone = learner.teacher is not None and learner.teacher.stands_alone
    save_checkpoint(FlowModel(spec, dit, extractor, mask), path, getattr(torch, config.dtype), include_backbone=alone)


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

    def leave(self) -> None:
        """End the processes' group: its threads abort a process that ends while they run."""
        if self.accelerator is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _runtime(device: str, distributed: bool) -> Runtime:
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailableError("device cuda: no usable NVIDIA GPU or driver was found; use device cpu")
    if distributed:
        require("train", "accelerate", by="distributed training")
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
) -> Identity:
    base = Path(os.path.commonpath([sample.path.parent for sample in samples]))
    files = [(s.path.relative_to(base).as_posix(), s.category, s.path.stat().st_size) for s in samples]
    weights = hashlib.sha256()
    for tensor in extractor.backbone.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    return {
        "config": config.model_dump(mode="json", exclude=_WHERE_AND_WHEN),
        "data": {"name": name, "images": len(files), "sha256": digest(files)},
        "backbone_sha256": weights.hexdigest(),
        "processes": processes,
    }


def _defaults() -> dict[str, object]:
    """The options' defaults as they are in an identity; None for what must be given."""
    fields = {name: field.get_default() for name, field in TrainConfig.model_fields.items()}
    known = {name: None if value is PydanticUndefined else value for name, value in fields.items()}
    return {name: value for name, value in known.items() if name not in _WHERE_AND_WHEN}


def _differences(old: Identity, new: Identity) -> str:
    """The entries that differ, as `name: old -> new`."""
    flat: list[dict[str, object]] = [{**one, **one["config"], "config": None} for one in (old, new)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name}: {flat[0].get(name)} -> {flat[1].get(name)}" for name in names)


@contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    require_writable(output)
    lock = FileLock(output / "train.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{output}: another training writes here; wait for it or choose another folder") from None
    with lock:
        lock.release()  # the one of `acquire`: `with` holds the lock from here
        yield


def _cut_log(path: Path, step: int) -> None:
    """Keep the log's lines up to `step`: a killed run logs steps that its last saved state does not have."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    with replacing(path) as file:
        for line in lines:
            # The last line of a killed run may be incomplete.
            if line.endswith("}") and json.loads(line)["step"] <= step:
                file.write(line.encode() + b"\n")
