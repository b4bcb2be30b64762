"""How peers are trained on good parts within a budget: anomalib's own steps, stopped when the budget is spent."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from flowad_fast.benchmarks.measure.cases import random_pictures
from flowad_fast.benchmarks.record.peers import Training
from flowad_fast.benchmarks.runs.peers_backbone import lite0

BATCH = 8
PROBE, STEPS = 48, 40
"""Parts, and steps of PatchCore's coreset on them, that say how long one takes: more than fit into a cache."""
CAREFUL = 0.7
"""Share of what is left that a step is planned for which cannot be stopped."""
RATE = 1e-4
FIBRES = 4096
"""Positions that CFLOW-AD decodes at a time when it judges: faster than the library's 64, with the same result."""
Ended = Literal["all parts", "own limit", "budget"]


@dataclass
class Budget:
    """Seconds that a training may take, of one thread on a CPU (other work on the machine does not count), else wall.

    It starts when it is made.
    """

    seconds: float
    threads: int = 1
    device: str = "cpu"
    _begun: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self._now()

    def _now(self) -> float:
        return time.process_time() / self.threads if self.device == "cpu" else time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return self._now() - self._begun

    @property
    def left(self) -> float:
        """Seconds; negative when it is overdrawn."""
        return self.seconds - self.spent


@dataclass(frozen=True)
class Parts:
    """A product's good parts.

    Attributes:
        frames: of the training split, (H, W, 3) uint8 each.
        held: of the calibration split, for what a method fits on parts that it was not trained on.
        prepare: frames (n, H, W, 3) uint8 to a model's input (n, 3, s, s) float32.
        device: where inputs go.
    """

    frames: Sequence[NDArray[np.uint8]]
    held: Sequence[NDArray[np.uint8]]
    prepare: Callable[[Tensor], Tensor]
    device: str = "cpu"

    def __len__(self) -> int:
        return len(self.frames)

    def inputs(self, indices: Sequence[int], held: bool = False) -> Tensor:
        """Of some parts, (n, 3, s, s)."""
        source = self.held if held else self.frames
        return torch.cat([self.prepare(torch.from_numpy(source[i])[None]) for i in indices]).to(self.device)

    def evenly(self, count: int) -> list[int]:
        """At most `count` indices, spread over all."""
        return [int(i) for i in np.linspace(0, len(self) - 1, min(count, len(self))).round()]


def padim(module: Any, parts: Parts, budget: Budget) -> Training:
    """One Gaussian per position, of as many parts as the budget allows."""
    model, seen = module.model.train(), 0
    for start in range(0, len(parts), BATCH):
        if budget.left < budget.seconds * (1 - CAREFUL):
            break
        taken = range(start, min(start + BATCH, len(parts)))
        model(parts.inputs(taken))
        seen = taken.stop
    model.fit()
    return told(budget, parts, seen, "all parts" if seen == len(parts) else "budget")


def patchcore(module: Any, parts: Parts, budget: Budget) -> Training:
    """A memory bank of as many parts as the budget allows: the time of their coreset grows with their square.

    Each step of it goes over all vectors, and there are as many steps as vectors are kept; some steps on some parts say
    how long one takes.
    """
    model, share = module.model.train(), module.coreset_sampling_ratio

    def embed(indices: Sequence[int]) -> int:
        for start in range(0, len(indices), BATCH):
            model(parts.inputs(indices[start : start + BATCH]))
        return sum(map(len, model.embedding_store))

    probe = parts.evenly(PROBE)
    begun = budget.spent
    vectors = embed(probe)
    embedded = budget.spent
    model.subsample_embedding(min(1.0, STEPS / vectors))
    step = (budget.spent - embedded) / len(model.memory_bank)  # the projection before it counts as well
    each = (embedded - begun) / len(probe)
    square = step / len(probe) * share * vectors / len(probe)
    allowed = max(budget.left, 0.0) * CAREFUL
    count = int((-each + math.sqrt(each**2 + 4 * square * allowed)) / (2 * square))
    chosen = parts.evenly(max(count, 1))
    embed(chosen)
    model.subsample_embedding(share)
    return told(
        budget, parts, len(chosen), "all parts" if len(chosen) == len(parts) else "budget",
        note=f"{len(model.memory_bank)} vectors in the memory bank",
    )  # fmt: skip


def cflow(module: Any, parts: Parts, budget: Budget) -> Training:
    """Flows of each stage, by the library's own step and fibre batches of 64."""
    module.model.fiber_batch_size = 64
    done = fitted(module, parts, budget, {"max_epochs": 50})
    module.model.fiber_batch_size = FIBRES
    return done


def super_simple_net(module: Any, parts: Parts, budget: Budget) -> Training:
    """The library's schedule of 300 epochs."""
    return fitted(module, parts, budget, {"max_epochs": 300})


def dinomaly(module: Any, parts: Parts, budget: Budget) -> Training:
    """The library's schedule of 5000 steps."""
    return fitted(module, parts, budget, {"max_steps": 5000, "max_epochs": -1})


def inp_former(module: Any, parts: Parts, budget: Budget) -> Training:
    """The library's schedule of 200 epochs."""
    return fitted(module, parts, budget, {"max_epochs": 200})


def efficient_ad(module: Any, parts: Parts, budget: Budget) -> Training:
    """A teacher that learns the Lite0's features in half of the budget, then student and autoencoder in the other."""
    steps = distilled(module.model.teacher, parts, budget, budget.seconds / 2)
    module.prepare_pretrained_model = lambda: None
    pictures = torch.from_numpy(random_pictures(16, 256)).permute(0, 3, 1, 2) / 255

    def stand_ins(size: Any) -> None:
        module.imagenet_loader = [(pictures[i : i + 1], None) for i in range(len(pictures))]
        module.imagenet_iterator = iter(module.imagenet_loader)

    module.prepare_imagenette_data = stand_ins
    done = efficient_ad_published(module, parts, budget)
    return done.but(note=f"the teacher took {steps} steps on the same parts before")


def efficient_ad_published(module: Any, parts: Parts, budget: Budget) -> Training:
    """The library's schedule of 70,000 steps with one part each, and the quantiles of maps of held-out good parts."""
    done = fitted(module, parts, budget, {"max_steps": 70000, "max_epochs": -1}, batch=1)
    module.model.eval()
    held = [_batch(parts.inputs([i], held=True)) for i in range(len(parts.held))]
    with torch.inference_mode():
        found = module.map_norm_quantiles(held)
    module.model.quantiles.update({key: value.clone() for key, value in found.items()})
    return done


def distilled(teacher: nn.Module, parts: Parts, budget: Budget, seconds: float) -> int:
    """Teach a patch description network the Lite0's features at strides 4, 8 and 32, whose channels are 384 in all.

    Returns:
        Steps of the optimiser.
    """
    network, steps = lite0((1, 2, 4)).to(parts.device), 0
    mean, std = (torch.tensor(v, device=parts.device)[:, None, None] for v in (_MEAN, _STD))
    draw = np.random.default_rng(0)

    def target(x: Tensor, size: Sequence[int]) -> Tensor:
        found = network((x - mean) / std)
        return torch.cat([functional.interpolate(one, size=tuple(size), mode="bilinear") for one in found], 1)

    teacher.train().requires_grad_(True)
    optimiser = torch.optim.Adam(teacher.parameters(), lr=RATE)
    with torch.no_grad():
        sample = parts.inputs(parts.evenly(16))
        every = target(sample, teacher(sample[:1]).shape[2:])
        centre, scale = every.mean((0, 2, 3), keepdim=True), every.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    while budget.spent < seconds:
        x = parts.inputs(draw.integers(0, len(parts), 4).tolist())
        made = teacher(x)
        with torch.no_grad():
            wanted = (target(x, made.shape[2:]) - centre) / scale
        optimiser.zero_grad()
        functional.mse_loss(made, wanted).backward()
        optimiser.step()
        steps += 1
    teacher.eval().requires_grad_(False)
    return steps


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fitted(module: Any, parts: Parts, budget: Budget, limits: dict[str, int], batch: int = BATCH) -> Training:
    """Train one of anomalib's modules by Lightning, until its own limit or the end of the budget."""
    import lightning  # type: ignore[import-not-found]

    class Stop(lightning.Callback):
        """Ends the training when the budget is spent, and counts."""

        seen, over = 0, False

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seen += batch
            if budget.left <= 0:
                self.over = trainer.should_stop = True

    class Cells(lightning.LightningDataModule):
        """Good parts in an order that a seed gives."""

        train_batch_size = batch

        def train_dataloader(self) -> Any:
            loader: Any = torch.utils.data.DataLoader(
                range(len(parts)), batch_size=batch, shuffle=True, drop_last=True,  # type: ignore[arg-type]
                generator=torch.Generator().manual_seed(0), collate_fn=lambda taken: _batch(parts.inputs(taken)),
            )  # fmt: skip
            return loader

    stop = Stop()
    arguments: dict[str, Any] = {**module.trainer_arguments, **limits}
    trainer = lightning.Trainer(
        accelerator="cpu" if parts.device == "cpu" else "gpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[stop], **arguments,
    )  # fmt: skip
    torch.manual_seed(0)
    try:
        trainer.fit(module, datamodule=Cells())
    except SystemExit:  # what Lightning makes of Ctrl-C and of SIGTERM
        raise KeyboardInterrupt from None
    return told(
        budget, parts, min(stop.seen, len(parts)), "budget" if stop.over else "own limit", int(trainer.global_step),
        note=f"{stop.seen / len(parts):.1f} passes over them",
    )  # fmt: skip


def _batch(images: Tensor) -> Any:
    """Good parts as anomalib's modules want them."""
    from anomalib.data import ImageBatch

    n, _, height, width = images.shape
    return ImageBatch(
        image=images, gt_label=torch.zeros(n, dtype=torch.bool), gt_mask=torch.zeros(n, height, width, dtype=torch.bool)
    )


def told(budget: Budget, parts: Parts, seen: int, ended: Ended, steps: int | None = None, note: str = "") -> Training:
    """What was reached."""
    return Training(
        budget_s=budget.seconds, spent_s=round(budget.spent, 1), threads=budget.threads, parts=seen, of=len(parts),
        steps=steps, ended=ended, note=note,
    )  # fmt: skip
