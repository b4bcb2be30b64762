"""What to train: the options of `flowad-train`, validated."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flowad_fast.config import Backbone, Frozen, ImageConfig, Roi, Target, Tiling, VelocityConfig, grid_side, parse
from flowad_fast.data.layouts import LAYOUTS
from flowad_fast.stages.scorers import Scorer

FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "horizontal": ((), (-1,)),
    "vertical": ((), (-2,)),
    "both": ((), (-1,), (-2,), (-2, -1)),
}
"""Flip variants of a setting, each as the image axes to reverse; the first is the image itself."""
_OF_TILES = ("scale", "roi", "mask")
_OF_THE_OBJECTIVE = ("predict", "loss", "t_sampling", "train_steps", "class_dropout")
"""Fields that describe what is learned from data, and so have no meaning with a teacher."""


class TrainConfig(Frozen):
    """What to train, on what, and how. `batch_size` is per step, over all processes together."""

    layout: str = Field(description=f"layout of the data set: {', '.join(LAYOUTS)}")
    root: Path | None = Field(None, description="folder of the data set; elpv can come from its package instead")
    lists: Path | None = Field(None, description="layout realiad: folder of the lists [DATA/realiad_jsons]")
    categories: tuple[str, ...] = Field((), description="category to train on, repeatable, in class order [all]")
    backbone: Backbone = Field("efficientnet-b4", description="frozen features")
    backbone_weights: Path | None = Field(None, description="weight file of the backbone")
    image_size: int = Field(256, gt=0, description="side of the resized image, pixels; 224 for dinov2")
    tiles: float | None = Field(
        None, ge=0, le=0.75, description="cut photos into tiles that overlap by so much [whole]"
    )
    scale: float = Field(1.0, gt=0, le=16, description="with tiles: resize photos by it first")
    roi: Roi | None = Field(None, description="with tiles: X,Y,W,H, the only part of the photo to look at, pixels")
    mask: Path | None = Field(None, description="with tiles: PNG of a photo's size, white where not to look")
    normalise_features: bool = Field(True, description="bring each channel to mean 0 and std 1 over the good parts")
    use_class_labels: bool | None = Field(None, description="condition on the category [with more than one]")
    hidden_size: int = Field(768, gt=0, description="width of the DiT")
    depth: int = Field(12, gt=0, description="blocks of the DiT")
    num_heads: int = Field(8, gt=0, description="attention heads")
    mlp_ratio: float = Field(4.0, gt=0, description="MLP width / hidden size")
    patch_size: int = Field(1, gt=0, description="side of a token, cells")
    t_scale: float = Field(1000.0, gt=0, description="what t is multiplied by before its embedding")
    class_dropout: float = Field(0.0, ge=0, lt=1, description="share of images whose class is withheld")
    predict: Target = Field("velocity", description="what the network predicts")
    loss: Target = Field("velocity", description="what the loss compares, after conversion")
    div_eps: float = Field(0.05, gt=0, description="smallest denominator of such a conversion")
    t_sampling: Literal["uniform", "logistic"] = Field("uniform", description="times of training, or sigmoid of normal")
    t_mu: float = Field(-0.8, description="mean of that normal distribution")
    t_sigma: float = Field(0.8, gt=0, description="its standard deviation")
    train_steps: int | None = Field(None, ge=2, description="train at so many equally spaced times only [all]")
    batch_size: int = Field(32, gt=0, description="images per step, over all processes")
    steps: int = Field(50_000, gt=0, description="optimiser steps")
    epochs: int | None = Field(None, gt=0, description="passes over the images, instead of steps")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the cosine")
    start_lr: float = Field(0.0, ge=0, description="learning rate at the start of the warm-up")
    warmup_steps: int = Field(500, ge=0, description="steps of linear warm-up")
    warmup_epochs: int | None = Field(None, ge=0, description="passes of warm-up, instead of warm-up steps")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights, the result; 0: none")
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: any")
    flips: Literal["none", "horizontal", "vertical", "both"] = Field("none", description="random flips of the image")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the DiT (bf16: autocast)")
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, batches, flips, times and noise")
    feature_cache: Path | None = Field(None, description="folder for features on disk, computed once for all flips")
    teacher: str | None = Field(None, description="checkpoint whose output a smaller field learns, or demo")
    scorer: Annotated[Scorer, Field(discriminator="kind")] | None = Field(
        None, description="with a teacher: the scorer whose evaluations are learned"
    )
    perturbed: float = Field(0.5, ge=0, le=1, description="with a teacher: share of parts with perturbed features")
    log_every: int = Field(50, gt=0, description="steps between lines of the log")
    save_every: int = Field(500, gt=0, description="steps between saved states")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of the weights in the result")

    @model_validator(mode="before")
    @classmethod
    def _size_of_the_backbone(cls, data: Any) -> Any:
        if isinstance(data, dict) and "image_size" not in data and str(data.get("backbone")).startswith("dinov2"):
            return data | {"image_size": 224}
        return data

    @model_validator(mode="before")
    @classmethod
    def _one_evaluation(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("teacher") is not None and data.get("scorer") is None:
            return data | {"scorer": {"kind": "mismatch"}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        counted = self.epochs is None and self.warmup_epochs is None
        if counted and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}; give fewer")
        for name in ("min_lr", "start_lr"):
            if getattr(self, name) > self.lr:
                raise ValueError(f"{name} {getattr(self, name)} must not exceed lr {self.lr}")
        if self.t_sampling == "logistic" and self.train_steps is not None:
            raise ValueError(f"train_steps {self.train_steps} are equally spaced; got t_sampling logistic; give one")
        if self.teacher is None and self.scorer is not None:
            raise ValueError("scorer says what a student learns; got no teacher, give one")
        if self.teacher is not None:
            self._check_student()
        if self.tiles is None:
            for name in _OF_TILES:
                if (got := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} {got} goes with tiles; give tiles too (0 for tiles that do not overlap)")
        _ = self.tiling
        grid_side(self.backbone, self.image_size)
        return self

    @property
    def tiling(self) -> Tiling | None:
        """How photos are cut into tiles; None: whole photos are looked at."""
        return None if self.tiles is None else Tiling(overlap=self.tiles, scale=self.scale, roi=self.roi)

    def _check_student(self) -> None:
        if self.tiles is not None:
            raise ValueError("a student learns from whole photos; got tiles, leave them out")
        if self.scorer is not None and self.scorer.kind == "density":
            raise ValueError(
                "scorer density needs the network's derivative, which a student does not learn; "
                "give mismatch, inversion or reconstruction"
            )
        for name in _OF_THE_OBJECTIVE:
            if getattr(self, name) != (default := type(self).model_fields[name].default):
                raise ValueError(
                    f"{name} {getattr(self, name)}: a teacher and its scorer set it; leave it at {default}"
                )

    def counted(self, images: int) -> "TrainConfig":
        """The configuration with steps and warm-up steps in place of epochs of so many images.

        Raises:
            ConfigError: not fewer warm-up steps than steps.
        """
        fields = self.model_dump()
        for name, epochs in (("steps", self.epochs), ("warmup_steps", self.warmup_epochs)):
            if epochs is not None:
                fields[name] = math.ceil(epochs * images / self.batch_size)
        return parse(TrainConfig, fields | {"epochs": None, "warmup_epochs": None}, f"training on {images} images")

    def image(self) -> ImageConfig:
        """How frames become the backbone's input."""
        return ImageConfig(size=self.image_size)

    def velocity(self, classes: int) -> VelocityConfig:
        """The velocity field for a data set of `classes` categories; ConfigError when the sizes do not fit."""
        from flowad_fast.stages.features import BACKBONES  # needs torch, which the options do not

        conditional = classes > 1 if self.use_class_labels is None else self.use_class_labels
        grid = grid_side(self.backbone, self.image_size)
        fields = self.model_dump(include={"hidden_size", "depth", "num_heads", "mlp_ratio", "patch_size", "t_scale"})
        fields |= {"channels": sum(BACKBONES[self.backbone].channels), "height": grid, "width": grid}
        fields |= {"use_class_labels": conditional, "num_classes": classes if conditional else 1}
        fields |= {"class_dropout_prob": self.class_dropout if conditional else 0.0, "pred_type": self.predict}
        return parse(VelocityConfig, fields, "training configuration")
