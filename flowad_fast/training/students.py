"""Students: a smaller velocity field regressed on a teacher's output, at only the evaluations that a scorer makes.

The states are the teacher's own: for a noise start X_tau = tau X1 + (1 - tau) eps with the scorer's seeded eps, which
is all that an exported model ever sees; for trajectories the states that the teacher visits on its way. Both are made
of good parts and of good parts whose features were perturbed, since a scorer is asked about defects that no good part
shows. The student learns the network's raw output, so the teacher's schedule holds for it unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.config import ModelConfig, Student, VelocityConfig, parse
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.files import sha256
from flowad_fast.model import FlowModel
from flowad_fast.shipped import weight_file
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.stages.scorers import Mismatch, Reconstruction, Scorer, scorer_adapter
from flowad_fast.training.config import TrainConfig


class Lesson(NamedTuple):
    """States x (B, N, C) with their times (B,) and classes (B,), and the teacher's output there (B, N, C)."""

    x: Tensor
    t: Tensor
    y: Tensor | None
    target: Tensor


@dataclass(frozen=True)
class Teacher:
    """A trained model, the scorer whose evaluations are taught, and the SHA-256 of the model's file.

    `perturbed` is the share of parts whose features are perturbed; `stands_alone` says that the file holds the
    backbone's weights, and so must the student's.
    """

    model: FlowModel
    scorer: Scorer
    sha256: str
    perturbed: float
    stands_alone: bool = False

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> "Teacher":
        """The teacher that a configuration names, on a device.

        Raises:
            CheckpointError: it cannot be read.
            ConfigError: it is a student itself for other evaluations, or does not have the scorer.
        """
        assert config.teacher is not None and config.scorer is not None, "validated by TrainConfig"
        path = weight_file(config.teacher)
        if path.suffix != ".safetensors":
            raise ConfigError(
                f"teacher {path}: expected a checkpoint of this project (.safetensors); make one of it with "
                "save_checkpoint(load_checkpoint(FILE, config), OUTPUT)"
            )
        model = load_checkpoint(path, backbone_weights=config.backbone_weights)
        if model.spec.tiling is not None:
            raise ConfigError(f"teacher {path}: was trained on tiles, and a student learns from whole photos")
        config.scorer.check_model(model)
        config.scorer.schedules(model.config)
        with safe_open(path, "pt") as file:
            alone = any(key.startswith("backbone.") for key in file.keys())  # noqa: SIM118 (not a mapping)
        return cls(model.to(device), config.scorer, sha256(path), config.perturbed, alone)

    def config(self, given: TrainConfig) -> TrainConfig:
        """The configuration with what a student takes from its teacher: features, and classes in their order.

        Raises:
            ConfigError: a class that the teacher does not have, or other features than the teacher's.
        """
        spec = self.model.spec
        names = spec.class_names if spec.velocity.use_class_labels else ()
        for category in given.categories if names else ():
            if category not in names:
                raise ConfigError(f"the teacher has no class {category!r}; {nearest(category, names)}")
        taken: dict[str, object] = {
            "backbone": spec.backbone,
            "image_size": spec.image.size,
            "normalise_features": spec.feature_normalisation,
            "use_class_labels": spec.velocity.use_class_labels,
            "t_scale": spec.velocity.t_scale,
        }
        for name, value in taken.items():
            asked = getattr(given, name)
            if asked not in (value, TrainConfig.model_fields[name].default):
                raise ConfigError(f"{name} {asked}: a student has its teacher's, which is {value}; leave it out")
        return given.model_copy(update=taken | {"categories": given.categories or names})

    def velocity(self, config: TrainConfig) -> VelocityConfig:
        """The student's velocity field: the teacher's, of another width and depth.

        Raises:
            ConfigError: the sizes do not fit.
        """
        sizes = {
            name: getattr(config, name) for name in ("hidden_size", "depth", "num_heads", "mlp_ratio", "patch_size")
        }
        fields = self.model.config.model_dump() | sizes | {"class_dropout_prob": 0.0}
        return parse(VelocityConfig, fields, "the student's sizes")

    def student(self, config: TrainConfig, categories: Sequence[str]) -> ModelConfig:
        """The student's description: the teacher's but for the velocity field, and what it may be used for.

        Raises:
            ConfigError: the sizes do not fit, or classes without names are not as many as the categories.
        """
        own = self.model.config
        if own.use_class_labels and not self.model.class_names and own.num_classes != len(categories):
            raise ConfigError(
                f"the teacher has {own.num_classes} classes without names, got the categories {', '.join(categories)}; "
                "give as many, in the order of its classes"
            )
        student = Student(teacher=self.sha256, scorer=scorer_adapter.dump_python(self.scorer, mode="json"))
        return self.model.spec.model_copy(update={"velocity": self.velocity(config), "student": student})

    def raw_features(self) -> FeatureExtractor:
        """The teacher's backbone without its normalisation, whose mean and standard deviation it keeps."""
        extractor = self.model.backbone
        extractor.normalise = False
        return extractor

    @torch.no_grad()
    def lesson(self, x1: Tensor, y: Tensor | None, generator: torch.Generator) -> Lesson:
        """What the student learns from features x1 (B, N, C), normalised as the teacher's, and classes y (B,)."""
        grid = (self.model.config.height, self.model.config.width)
        x1 = perturbed(x1, grid, self.perturbed, generator)
        scorer, dit = self.scorer, self.model.dit
        rows = scorer.schedules(self.model.config)
        x = x1
        if isinstance(scorer, Mismatch) or (isinstance(scorer, Reconstruction) and scorer.start == "noise"):
            noise = scorer.draw(self.model.config).to(x1.device).reshape(-1, *x1.shape[1:])
            drawn = torch.randint(len(noise), (len(x1),), generator=generator, device=generator.device)
            x = scorer.tau * x1 + (1 - scorer.tau) * noise[drawn]
        states, times, outputs = [], [], []
        for row in rows:
            t = torch.full(x.shape[:1], row.t, device=x.device)
            out = dit(x, t, y)
            states.append(x)
            times.append(t)
            outputs.append(out)
            x = row.a * x + row.b * out
        repeated = None if y is None else y.repeat(len(rows))
        return Lesson(torch.cat(states), torch.cat(times), repeated, torch.cat(outputs))


def perturbed(x: Tensor, grid: tuple[int, int], share: float, generator: torch.Generator) -> Tensor:
    """Features x (B, N, C) of which a share were changed; which, where and how is drawn from the generator.

    One of three changes each, in a random rectangle of cells or (one in four) everywhere: noise of a random strength;
    cells of another part of the batch at the same positions; a block of cells of another part from another place,
    its difference to what was there enlarged up to twice.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    height, width = grid
    batch, _, channels = x.shape
    out = x.unflatten(1, grid).clone()
    other = out.roll(1, 0)
    # All numbers are drawn for all parts, so that what one part gets does not depend on the others' fate.
    choice, place, strength = draw(batch, 3).tolist(), draw(batch, 6).tolist(), (0.1 + 1.9 * draw(batch)).tolist()
    noise = torch.randn(out.shape, generator=generator, device=generator.device)
    mixed = draw(batch, height, width, 1)
    for i, ((changes, kind, everywhere), where) in enumerate(zip(choice, place, strict=True)):
        if changes >= share:
            continue
        high, wide = (height, width) if everywhere < 0.25 else (1 + int(where[0] * height), 1 + int(where[1] * width))
        top, left = int(where[2] * (height - high + 1)), int(where[3] * (width - wide + 1))
        area = out[i, top : top + high, left : left + wide]
        if kind < 1 / 3:
            area += strength[i] * noise[i, :high, :wide]
        elif kind < 2 / 3:
            theirs = other[i, top : top + high, left : left + wide]
            area.copy_(torch.where(mixed[i, :high, :wide] < strength[i] / 2, theirs, area))
        else:
            up, along = int(where[4] * height), int(where[5] * width)
            moved = other[i].roll((-up, -along), (0, 1))[:high, :wide]
            area += strength[i] * (moved - area)
    return out.reshape(batch, height * width, channels)
