"""A trained model in memory: the velocity field, and the field with its backbone and preprocessing."""

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from flowad_fast.config import ModelConfig, Precision, VelocityConfig
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.features import FeatureExtractor
from flowad_fast.image import normalise
from flowad_fast.integration import from_tokens, to_tokens
from flowad_fast.kernels import reference
from flowad_fast.schedule import velocity_factors
from flowad_fast.velocity import DiT, TabledDiT


class VelocityModel:
    """A bare velocity field on feature maps of any size (C, h, w)."""

    def __init__(self, config: VelocityConfig, dit: DiT) -> None:
        self.config = config
        self.dit = dit.eval().requires_grad_(False)
        self._tables: dict[tuple[tuple[float, ...], Precision, str], TabledDiT] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.dit.pos_embed.device

    def velocity(self, x: Tensor, t: float, y: Tensor | None = None) -> Tensor:
        """The velocity u(x, t, y) of flow models; the predicted noise of diffusion models (`pred_type` epsilon).

        Args:
            x: (B, C, h, w).
            t: time in [0, 1], or the integer timestep for models with t_scale 1.
            y: class indices (B,), None for unconditional models.

        Returns:
            (B, C, h, w).
        """
        y = self.check_classes(y, x.shape[0])
        with torch.no_grad():
            out = self.dit(to_tokens(x), torch.full(x.shape[:1], float(t), device=x.device), y)
        out = from_tokens(out, *x.shape[2:])
        if self.config.pred_type == "epsilon":
            return out
        alpha, beta = velocity_factors(self.config.pred_type, t)
        return beta * out if alpha == 0 else alpha * x + beta * out

    def at(self, times: tuple[float, ...], precision: Precision = "fp32", ops: ModuleType = reference) -> TabledDiT:
        """The inference form at fixed times; the last few are kept, as long as the weights stay where they are."""
        key = (times, precision, ops.__name__)
        table = self._tables.get(key)
        if table is None or table.table.device != self.device:
            while len(self._tables) >= 4:
                self._tables.pop(next(iter(self._tables)))
            table = self._tables[key] = TabledDiT(self.dit, times, precision, ops)
        return table

    def check_classes(self, y: Tensor | None, batch: int) -> Tensor | None:
        """`y` as int64 (B,) on the model's device, after checking that it fits the model.

        Raises:
            ConfigError: classes for an unconditional model, none for a conditional one, or an index out of range.
        """
        if not self.config.use_class_labels:
            if y is not None:
                raise ConfigError("the model is unconditional (use_class_labels: false) but classes were given; omit y")
            return None
        n = self.config.num_classes
        if y is None:
            raise ConfigError(f"the model is conditional on {n} classes; give y, class indices of shape ({batch},)")
        y = torch.as_tensor(y, device=self.device).long()
        if y.shape != (batch,) or int(y.min()) < 0 or int(y.max()) >= n:
            raise ConfigError(f"y must be ({batch},) class indices in 0..{n - 1}, got {tuple(y.shape)}: {y.tolist()}")
        return y

    def to(self, device: torch.device | str) -> "VelocityModel":
        """Move the weights; returns self."""
        self.dit.to(device)
        self._tables.clear()
        return self


class FlowModel(VelocityModel):
    """A whole trained detector model: frames to features to velocity.

    `backbone` may be a function that makes the feature extractor; it is called when features are first needed, so that
    a velocity field can be studied without backbone weights.
    """

    def __init__(
        self, spec: ModelConfig, dit: DiT, backbone: FeatureExtractor | Callable[[], FeatureExtractor]
    ) -> None:
        super().__init__(spec.velocity, dit)
        self.spec = spec
        self._backbone = backbone

    @property
    def backbone(self) -> FeatureExtractor:
        """The frozen feature extractor, loaded on first use."""
        if not isinstance(self._backbone, FeatureExtractor):
            self._backbone = self._backbone().to(self.device)
        return self._backbone

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in index order; empty for unconditional models."""
        return self.spec.class_names if self.config.use_class_labels else ()

    def features(self, frames: np.ndarray | Tensor) -> Tensor:
        """X1 of frames uint8 (B, H, W, 3): (B, C, h, w) float32 on the model's device."""
        tensor = torch.as_tensor(frames)
        if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
            raise ConfigError(f"frames must be uint8 (B, H, W, 3), got {tensor.dtype} {tuple(tensor.shape)}")
        with torch.no_grad():
            tokens = self.backbone(normalise(tensor.to(self.device), self.spec.image))
        return from_tokens(tokens, self.config.height, self.config.width)

    def class_indices(self, classes: Sequence[str | int] | None, batch: int) -> Tensor | None:
        """Class names or indices (one, or one a frame) as y (B,); see `class_index`."""
        return class_indices(classes, batch, self.class_names, self.config.num_classes, self.config.use_class_labels)

    def to(self, device: torch.device | str) -> "FlowModel":
        """Move the weights; returns self."""
        super().to(device)
        if isinstance(self._backbone, nn.Module):
            self._backbone.to(device)
        return self


def class_indices(
    classes: Sequence[str | int] | str | int | None, batch: int, names: tuple[str, ...], count: int, conditional: bool
) -> Tensor | None:
    """Class names or indices as y (B,) int64; a single one stands for the whole batch.

    Raises:
        ConfigError: a class that the model does not have, classes for an unconditional model, or none for a
            conditional one; the message names the classes.
    """
    known = ", ".join(names) if names else f"0..{count - 1}"
    if not conditional:
        if classes is not None:
            raise ConfigError("the model is unconditional but classes were given; omit them")
        return None
    if classes is None:
        raise ConfigError(f"the model is conditional; give the class of each frame: {known}")
    wanted = [classes] * batch if isinstance(classes, (str, int)) else list(classes)
    if len(wanted) == 1:
        wanted *= batch
    if len(wanted) != batch:
        raise ConfigError(f"{len(wanted)} classes for {batch} frames")
    indices = []
    for one in wanted:
        if isinstance(one, str):
            if one not in names:
                raise ConfigError(f"class {one!r} is not in the model; {nearest(one, names)}")
            indices.append(names.index(one))
        elif 0 <= int(one) < count:
            indices.append(int(one))
        else:
            raise ConfigError(f"class index {one} is not in the model; expected 0..{count - 1}: {known}")
    return torch.tensor(indices, dtype=torch.int64)
