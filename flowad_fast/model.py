"""A trained model in memory: the velocity field, and the field with its backbone and preprocessing."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from flowad_fast.config import ModelConfig, Precision, VelocityConfig
from flowad_fast.errors import ConfigError
from flowad_fast.stages.arithmetic import FP32, Arithmetic
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.stages.image import normalise
from flowad_fast.stages.integration import from_tokens, to_tokens
from flowad_fast.stages.schedule import velocity_factors
from flowad_fast.stages.tiling import Tiler
from flowad_fast.stages.velocity import DiT, TabledDiT


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

    def at(self, times: tuple[float, ...], how: Arithmetic = FP32) -> TabledDiT:
        """The inference form at fixed times; the last few are kept, as long as the weights stay where they are."""
        key = (times, how.precision, how.ops.__name__)
        table = self._tables.get(key)
        if table is None or table.table.device != self.device:
            while len(self._tables) >= 4:
                self._tables.pop(next(iter(self._tables)))
            table = self._tables[key] = TabledDiT(self.dit, times, how)
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
    a velocity field can be studied without backbone weights. `mask` (H, W) bool are the pixels of training frames that
    were never looked at, None for none.
    """

    def __init__(
        self,
        spec: ModelConfig,
        dit: DiT,
        backbone: FeatureExtractor | Callable[[], FeatureExtractor],
        mask: np.ndarray | None = None,
    ) -> None:
        super().__init__(spec.velocity, dit)
        self.spec = spec
        self.mask = mask
        self._backbone = backbone

    @property
    def tiler(self) -> Tiler | None:
        """How the frames were cut that it was trained on; None for whole frames."""
        image, tiling = self.spec.image, self.spec.tiling
        return None if tiling is None else Tiler(tiling, image.size, self.mask, image.mean)

    @property
    def backbone(self) -> FeatureExtractor:
        """The frozen feature extractor, loaded on first use."""
        if not isinstance(self._backbone, FeatureExtractor):
            self._backbone = self._backbone().to(self.device)
        return self._backbone

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in index order; empty for unconditional models."""
        return self.spec.classes.names

    def features(self, frames: np.ndarray | Tensor) -> Tensor:
        """X1 of frames uint8 (B, H, W, 3): (B, C, h, w) float32 on the model's device."""
        tensor = torch.as_tensor(frames)
        if tensor.dtype != torch.uint8 or tensor.ndim != 4 or tensor.shape[-1] != 3:
            raise ConfigError(f"frames must be uint8 (B, H, W, 3), got {tensor.dtype} {tuple(tensor.shape)}")
        with torch.no_grad():
            tokens = self.backbone(normalise(tensor.to(self.device), self.spec.image))
        return from_tokens(tokens, self.config.height, self.config.width)

    def class_indices(self, classes: Sequence[str | int] | None, batch: int) -> Tensor | None:
        """Class names or indices (one, or one per frame) as y (B,); see `Classes.indices`."""
        y = self.spec.classes.indices(classes, batch)
        return None if y is None else torch.from_numpy(y)

    def to(self, device: torch.device | str) -> "FlowModel":
        """Move the weights; returns self."""
        super().to(device)
        if isinstance(self._backbone, nn.Module):
            self._backbone.to(device)
        return self
