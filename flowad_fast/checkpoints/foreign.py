"""Training checkpoints of other code bases, each a record of how it names things and what its YAML means.

A family is recognised by its contents. Nothing is guessed, and no key is dropped unless its record names it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowad_fast.checkpoints.defaults import read_defaults
from flowad_fast.checkpoints.reading import some
from flowad_fast.config import (
    CLASS_ORDERS,
    TRANSFORMS,
    ImageConfig,
    ModelConfig,
    VelocityConfig,
    grid_side,
    parse,
    read_mapping,
)
from flowad_fast.errors import CheckpointError, ConfigError, nearest
from flowad_fast.stages.features import BACKBONES, STRIDES

Weights = dict[str, Tensor]
"""A velocity field's tensors under their plain names, as `DiT.state_dict` has them."""
CLASS_TABLE = "y_embedder.embedding_table.weight"
INVAD_HEADS, INVAD_MLP_RATIO = 8, 4.0
"""Constants of InvAD's released code that its configuration files do not repeat."""


@dataclass(frozen=True)
class Settings:
    """A training configuration; what defines the model and is missing is an error that names `source`."""

    values: Mapping[str, Any]
    source: str

    def need(self, where: str) -> Any:
        """The value at a dotted path."""
        value: Any = self.values
        for part in where.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ConfigError(f"{self.source}: missing {where}; it defines the model and has no default")
            value = value[part]
        return value

    def number(self, where: str) -> Any:
        """The finite number at a dotted path."""
        value = self.need(where)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{self.source}: {where} must be a number, got {value!r}")
        return value

    def optional(self, where: str, default: Any) -> Any:
        """The value at a dotted path whose last part may be missing."""
        parent, _, name = where.rpartition(".")
        return self.need(parent).get(name, default)

    def one_of(self, where: str, valid: Mapping[str, Any]) -> str:
        """The name at a dotted path, which `valid` has."""
        name = self.need(where)
        if not isinstance(name, str) or name not in valid:
            raise ConfigError(f"{self.source}: {where} {name!r} is unknown; {nearest(str(name), valid)}")
        return name

    def expect(self, where: str, supported: Any) -> None:
        """Refuse another value at a dotted path than the one that is supported."""
        got = self.need(where)
        if got != supported:
            raise ConfigError(f"{self.source}: {where} is {got!r}, only {supported!r} is supported")


@dataclass(frozen=True)
class Family:
    """A foreign format.

    Attributes:
        name: in a model's provenance.
        described: what it looks like, for messages.
        inside: the entry of the file that holds the tensors; None where the file does.
        prefix: of the velocity field's tensors.
        copy: prefix of a second copy of all of them, which must be equal; None where there is none.
        ignored: prefixes of tensors that the model does not use, of the whole file and of the velocity field.
        spec: the model that a configuration and the weights describe.
    """

    name: str
    described: str
    inside: str | None
    prefix: str
    copy: str | None
    ignored: tuple[str, ...]
    spec: Callable[[Settings, Weights], ModelConfig]

    def tensors(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The entries that hold this family's tensors; None for a file of another family."""
        inside = state if self.inside is None else state.get(self.inside)
        return inside if isinstance(inside, Mapping) else None


def velocity_weights(state: Mapping[str, Any], source: str) -> tuple[Weights, Family]:
    """The velocity field's tensors in a foreign checkpoint, and its family.

    Raises:
        CheckpointError: no such checkpoint, keys that its family does not have, or two copies that differ.
    """
    found: Mapping[str, Any]
    family, found = next((one, inside) for one in FAMILIES if (inside := one.tensors(state)) is not None)
    bad = next((key for key, value in found.items() if not isinstance(value, Tensor)), None)
    if bad is not None:
        raise CheckpointError(f"{source}: expected tensors, got {type(found[bad]).__name__} under {bad!r}")
    tensors = {str(key).removeprefix("module."): value for key, value in found.items()}
    weights = {
        key.removeprefix(family.prefix): value for key, value in tensors.items() if key.startswith(family.prefix)
    }
    if not weights:
        kinds = " nor ".join(one.described for one in FAMILIES)
        raise CheckpointError(f"{source}: neither {kinds}; found {some(list(tensors))}")
    known = (family.prefix, *family.ignored, *((family.copy,) if family.copy else ()))
    unknown = [key for key in tensors if not key.startswith(known)]
    if unknown:
        raise CheckpointError(f"{source}: unexpected keys: {some(unknown)}")
    if family.copy is not None:
        copied = {key: key.removeprefix(family.copy) for key in tensors if key.startswith(family.copy)}
        differing = [key for key, plain in copied.items() if not _equal(tensors[key], weights.get(plain))]
        if differing:
            raise CheckpointError(
                f"{source}: the solver's copy of the network differs from the network: {some(differing)}"
            )
    return {key: value for key, value in weights.items() if not key.startswith(family.ignored)}, family


def foreign_spec(family: Family, config: str | Path, weights: Weights) -> ModelConfig:
    """The model that a family's configuration file and weights describe; `provenance` has how they evaluate it.

    Raises:
        ConfigError: the file cannot be read, lacks what defines the model, or asks for what is not supported.
    """
    values = read_mapping(Path(config))
    spec = family.spec(Settings(values, str(config)), weights)
    defaults = read_defaults(values, Path(config).name)
    kept = {} if defaults is None else {"evaluation": defaults.model_dump(exclude_none=True)}
    return spec.model_copy(update={"provenance": kept})


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and torch.equal(tensor, other)


def backbone_of(settings: Settings, key: str) -> tuple[str, ImageConfig]:
    """The backbone named under `key`, and how frames become its input."""
    if settings.need(key) == "pixel":
        raise ConfigError(
            f"{settings.source}: {key} 'pixel': flows on raw pixels are not supported, "
            f"only on features of a frozen backbone: {', '.join(BACKBONES)}"
        )
    name = settings.one_of(key, BACKBONES)
    parent = key.rpartition(".")[0]
    if BACKBONES[name].outblocks:
        settings.expect(f"{parent}.outblocks", list(BACKBONES[name].outblocks))
        settings.expect(f"{parent}.outstrides", list(STRIDES))
    mean, std = TRANSFORMS[settings.one_of("data.transform_type", TRANSFORMS)]
    image = {"size": settings.number("data.img_size"), "mean": mean, "std": std}
    return name, parse(ImageConfig, image, f"{settings.source}: data.img_size")


def _model(settings: Settings, weights: Weights, backbone_key: str, fields: dict[str, Any],
           names: tuple[str, ...] = ()) -> ModelConfig:  # fmt: skip
    """The model with these fields of its velocity field; the rest comes from the backbone and the class table."""
    backbone, image = backbone_of(settings, backbone_key)
    if CLASS_TABLE not in weights:
        raise CheckpointError(f"{settings.source}: the checkpoint lacks {CLASS_TABLE}")
    grid = grid_side(backbone, image.size)
    classes = weights[CLASS_TABLE].shape[0] - (fields["class_dropout_prob"] > 0)
    shape = {"channels": sum(BACKBONES[backbone].channels), "height": grid, "width": grid, "num_classes": classes}
    velocity = parse(VelocityConfig, shape | fields, settings.source)
    names = names if len(names) == velocity.num_classes else ()
    model = {"velocity": velocity.model_dump(), "backbone": backbone, "image": image.model_dump(), "class_names": names}
    return parse(ModelConfig, model, settings.source)


def _flowad(settings: Settings, weights: Weights) -> ModelConfig:
    settings.expect("model.backbone.normalization", None)
    settings.expect("model.model_name", "dit")
    settings.expect("flow_matching.solver.name", "euler")
    settings.expect("model.learn_sigma", False)
    settings.need("flow_matching.scheduler")
    pred_type = settings.optional("flow_matching.pred_type", "velocity")
    if pred_type not in ("velocity", "data", "noise"):
        raise ConfigError(f"{settings.source}: flow_matching.pred_type {pred_type!r}; valid: velocity, data, noise")
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob")
    conditional = settings.need("model.use_class_labels")
    fields = {key: settings.number(f"model.{key}") for key in sizes} | {
        "use_class_labels": conditional,
        "pred_type": pred_type,
        "t_scale": settings.optional("model.t_scale", 1.0),
        "step_grid": "short-last",
    }
    names = _class_names(settings) if conditional else ()
    return _model(settings, weights, "model.backbone.model_name", fields, names)


def _class_names(settings: Settings) -> tuple[str, ...]:
    """Class names of the data sets whose class order is known; otherwise empty, and classes are given as indices."""
    name = str(settings.need("data.dataset_name"))
    settings.need("data.category")
    return next((order for start, order in CLASS_ORDERS.items() if name.startswith(start)), ())


def _invad(settings: Settings, weights: Weights) -> ModelConfig:
    if settings.need("diffusion.learn_sigma"):
        raise ConfigError(f"{settings.source}: diffusion.learn_sigma true is not supported")
    fields = {
        "patch_size": settings.number("diffusion.patch_size"),
        "hidden_size": settings.number("diffusion.width"),
        "depth": settings.number("diffusion.depth"),
        "num_heads": settings.optional("diffusion.num_heads", INVAD_HEADS),
        "mlp_ratio": settings.optional("diffusion.mlp_ratio", INVAD_MLP_RATIO),
        "class_dropout_prob": settings.optional("diffusion.class_dropout_prob", 0.0),
        "t_scale": 1.0,
        "pred_type": "epsilon",
    }
    return _model(settings, weights, "backbone.model_type", fields)


FAMILIES = (
    Family(
        "flowad",
        "a FlowAD checkpoint (a 'model' dictionary with keys 'model.…')",
        inside="model",
        prefix="model.",
        copy="solver.velocity_model.",
        ignored=("x_embedder_linear.",),
        spec=_flowad,
    ),
    Family(
        "invad",
        "an InvAD one (keys 'net.…')",
        inside=None,
        prefix="net.",
        copy=None,
        ignored=("x_embedder_linear.", "cls_embed."),
        spec=_invad,
    ),
)
"""In the order in which a file is tried; the last one takes what no other has."""
