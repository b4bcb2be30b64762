"""What to train: the options of `flowad-train`, validated."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from flowad_fast.config import Backbone, Frozen, ImageConfig, VelocityConfig, parse
from flowad_fast.data.layouts import LAYOUTS

FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (-1,)),
    "vertical": ((), (-2,)),
    "both": ((), (-1,), (-2,), (-2, -1)),
}
"""Flip variants of a setting, each as the image axes to reverse; the first is the image itself."""


class TrainConfig(Frozen):
    """What to train, on what, and how. `batch_size` is per step, over all processes together."""

    layout: str = Field(description=f"layout of the data set: {', '.join(LAYOUTS)}")
    root: Path | None = Field(None, description="folder of the data set; elpv can come from its package instead")
    categories: tuple[str, ...] = Field((), description="category to train on, repeatable, in class order [all]")
    backbone: Backbone = Field("efficientnet-b4", description="frozen features")
    backbone_weights: Path | None = Field(None, description="weight file of the backbone")
    image_size: int = Field(256, gt=0, multiple_of=32, description="side of the resized image, pixels")
    normalise_features: bool = Field(True, description="bring each channel to mean 0 and std 1 over the good parts")
    use_class_labels: bool | None = Field(None, description="condition on the category [with more than one]")
    hidden_size: int = Field(768, gt=0, description="width of the DiT")
    depth: int = Field(12, gt=0, description="blocks of the DiT")
    num_heads: int = Field(8, gt=0, description="attention heads")
    mlp_ratio: float = Field(4.0, gt=0, description="MLP width / hidden size")
    batch_size: int = Field(32, gt=0, description="images per step, over all processes")
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
        from flowad_fast.stages.features import BACKBONES, STRIDES  # needs torch, which the options do not

        conditional = classes > 1 if self.use_class_labels is None else self.use_class_labels
        grid = self.image_size // STRIDES[-1]
        fields = self.model_dump(include={"hidden_size", "depth", "num_heads", "mlp_ratio"})
        fields |= {"channels": sum(BACKBONES[self.backbone].channels), "height": grid, "width": grid}
        fields |= {"use_class_labels": conditional, "num_classes": classes if conditional else 1}
        return parse(VelocityConfig, fields, "training configuration")
