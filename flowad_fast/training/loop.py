"""Training a detector's velocity field from good parts, on frozen features.

Minimises ||u(X_t, t, y) - (X1 - X0)||² with t ~ U[0, 1], X0 ~ N(0, I) and X_t = t X1 + (1 - t) X0; other times,
predictions and losses are in `objective`. No random state is carried from step to step: images, flips, t and X0 of a
step are functions of (seed, step, process) alone. A run that was killed at any moment and resumed therefore computes
what an uninterrupted one does, bit for bit on a CPU (GPU kernels that are not deterministic themselves may differ in
the last bits).
"""

import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from flowad_fast.checkpoints.load import backbone_loader, save_checkpoint
from flowad_fast.config import ModelConfig
from flowad_fast.data.layouts import read_dataset
from flowad_fast.errors import ConfigError
from flowad_fast.files import replacing
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
    training_images,
    training_samples,
)
from flowad_fast.training.certify import add_certificate, divided
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.identity import Identity, identity_of
from flowad_fast.training.learner import DivergedError as DivergedError
from flowad_fast.training.learner import Learner
from flowad_fast.training.runtime import deferred_signals, runtime
from flowad_fast.training.students import Teacher

STATE, LOG, CHECKPOINT, CONFIG = "state.pt", "log.jsonl", "model.safetensors", "config.json"
"""Files of an output folder: resumable state, loss curve, trained model (with its JSON), what was asked for."""


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
    here = runtime(device, distributed)
    if config.batch_size % here.world:
        raise ConfigError(f"batch_size {config.batch_size} is not a multiple of the {here.world} processes")
    output = Path(output)
    with ExitStack() as stack:
        stack.callback(here.leave)
        if here.rank == 0:  # what cannot be written is told before anything is computed
            stack.enter_context(_sole_writer(output))
            if config.feature_cache is not None:
                require_writable(config.feature_cache)
        teacher = None
        if config.teacher is not None:
            teacher = Teacher.of(config, here.device)
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
            extractor = backbone_loader(spec, config.backbone_weights, {}, str(output))().to(here.device)
        else:
            spec = teacher.student(config, categories)
            velocity, names, extractor = spec.velocity, spec.class_names, teacher.raw_features()
        order = names or categories
        identity = identity_of(config, dataset.name, samples, extractor, here.world)
        if tiler is not None and tiler.mask_sha256 is not None:
            identity["mask_sha256"] = tiler.mask_sha256
        if teacher is not None:
            identity["teacher_sha256"] = teacher.sha256
        learner = Learner(config, velocity, here, teacher)
        if resume and (output / STATE).is_file():
            learner.load(output / STATE, identity)
        direct = DirectFeatures(extractor, paths, config, spec.image, tiler)
        stack.callback(direct.pool.shutdown)
        labels = torch.tensor([order.index(samples[photo].category) for photo, _ in direct.places])
        source: FeatureSource = direct
        if config.feature_cache is not None:
            shown = progress if here.rank == 0 else None
            source = cached_features(direct, config.feature_cache, identity["backbone_sha256"], shown)
        if teacher is not None:
            learner.mean, learner.std = extractor.mean.clone(), extractor.std.clone()
        elif config.normalise_features and learner.step == 0:
            learner.mean, learner.std = feature_statistics(source)
        first = learner.step
        if here.rank == 0:
            with replacing(output / CONFIG) as file:
                file.write(config.model_dump_json(indent=2).encode() + b"\n")
            _cut_log(output / LOG, first)
        _loop(config, learner, source, labels, identity, output, progress)
        finished = learner.step == config.steps
        if finished and here.rank == 0:
            _save_result(config, learner, spec, extractor, mask, identity, output / CHECKPOINT)
            if teacher is not None and parts is not None:
                add_certificate(output / CHECKPOINT, teacher, parts, config, progress)
    checkpoint = output / CHECKPOINT if finished else None
    seconds = time.perf_counter() - started
    return TrainResult(
        finished, learner.step, first, learner.mean_loss, seconds, str(here.device), checkpoint, here.rank
    )


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
    with ThreadPoolExecutor(1, thread_name_prefix="flowad-batch") as ahead, deferred_signals() as stop:

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
