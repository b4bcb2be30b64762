"""Everything that a training step changes, and how it is saved."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowad_fast.config import VelocityConfig
from flowad_fast.errors import CheckpointError, ConfigError, FlowADError
from flowad_fast.files import digest, replacing
from flowad_fast.stages.velocity import DiT
from flowad_fast.training.batches import seed_of
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.identity import Identity, defaults, differences
from flowad_fast.training.objective import draw_times, drop_classes, flow_loss
from flowad_fast.training.runtime import Runtime
from flowad_fast.training.students import Teacher

_SCHEMA = 1


class DivergedError(FlowADError, RuntimeError):
    """The loss or its gradient is not finite; the last saved state is from before."""


class Learner:
    """Everything that a step changes: weights, their average, optimiser, learning rate, and the step count.

    `losses` are those since the last line of the log, `mean_loss` is the mean that this line gave.
    """

    def __init__(
        self, config: TrainConfig, velocity: VelocityConfig, runtime: Runtime, teacher: Teacher | None = None
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
            made["config"] = defaults() | made["config"]  # a state from before an option existed had its default
            if digest(made) != digest(identity):
                what = differences(made, identity)
                raise ConfigError(
                    f"{path}: was made with another configuration ({what}); repeat the old one, "
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
