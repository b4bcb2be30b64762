"""Where a training's settings come from: a preset, a file (own or FlowAD's training YAML), the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowad_fast.config import parse, read_mapping
from flowad_fast.errors import ConfigError
from flowad_fast.training.config import TrainConfig

_PUBLISHED: dict[str, Any] = {
    "normalise_features": False, "batch_size": 8, "epochs": 300, "start_lr": 1e-6, "lr": 5e-5, "min_lr": 5e-6,
    "warmup_epochs": 40, "weight_decay": 0.0, "ema_decay": 0.0, "grad_clip": 1.0, "class_dropout": 0.1,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    f"flowad-{name}": {"hidden_size": width, "depth": depth, "num_heads": heads} | _PUBLISHED
    for name, width, depth, heads in (("b", 768, 12, 8), ("l", 1024, 24, 16), ("g", 2048, 16, 8), ("h", 1280, 32, 16))
}
"""The published sizes of FlowAD with the published recipe."""
_EITHER = (("steps", "epochs"), ("warmup_steps", "warmup_epochs"))
"""Fields that say the same thing: the one that is given later takes the place of the other."""
_NORMAL = {"t_mu": 0.0, "t_sigma": 1.0}
"""What FlowAD's code takes for logistic times where its YAML gives nothing."""
_LAYOUTS = {"mvtec_ad": "mvtec", "mpdd": "mvtec", "visa": "visa", "realiad": "realiad"}


@dataclass(frozen=True)
class Layer:
    """Settings and where they come from, for people."""

    origin: str
    values: Mapping[str, Any]


def settings(layers: Sequence[Layer]) -> tuple[TrainConfig, list[str]]:
    """The configuration, later layers first, and one line per layer that says what was taken from it.

    Raises:
        ConfigError: an unknown or contradicting setting.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        given = {name: value for name, value in layer.values.items() if value is not None}
        for pair in _EITHER:
            if len(both := [name for name in pair if name in given]) == 2:
                raise ConfigError(f"{layer.origin}: got {both[0]} and {both[1]}, expected one of them")
            for name in pair if both else ():
                merged.pop(name, None)
                origins.pop(name, None)
        merged |= given
        origins |= dict.fromkeys(given, layer.origin)
    config = parse(TrainConfig, merged, " and ".join(layer.origin for layer in layers if layer.values) or "options")
    lines = []
    for layer in layers:
        taken = [f"{name} {merged[name]}" for name, origin in origins.items() if origin == layer.origin]
        lines += [f"from {layer.origin}: {', '.join(taken)}"] if taken else []
    return config, lines


def from_file(path: Path) -> Layer:
    """The settings in a YAML or JSON file: a `TrainConfig`'s, or those of FlowAD's training YAML.

    Raises:
        ConfigError: the file cannot be read, or FlowAD's asks for what is not supported.
    """
    values = read_mapping(path)
    if isinstance(values.get("flow_matching"), Mapping):
        return Layer(f"{path} (FlowAD's)", flowad(values, str(path)))
    if isinstance(values.get("diffusion"), Mapping):
        raise ConfigError(f"{path}: InvAD's training YAML; flowad-train trains flows, give FlowAD's or its own options")
    return Layer(str(path), values)


def flowad(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """FlowAD's training YAML as fields of `TrainConfig`; a batch there is per GPU, here over all processes.

    Raises:
        ConfigError: a setting is missing, or its value is not supported.
    """
    from flowad_fast.checkpoints.foreign import Settings, backbone_of  # needs torch, which the options do not

    given = Settings(values, source)
    for where, supported in (
        ("opt.name", "adamw"), ("opt.wd_start", 0), ("opt.wd_end", 0), ("opt.fix_lr_thres", -1),
        ("flow_matching.scheduler.name", "affine_prob"), ("flow_matching.solver.name", "euler"),
        ("model.model_name", "dit"), ("model.learn_sigma", False), ("data.transform_type", "imagenet"),
    ):  # fmt: skip
        given.expect(where, supported)
    for where, plain in (("flow_matching.vf_type", "plain"), ("model.backbone.normalization", None)):
        if given.optional(where, plain) != plain:
            raise ConfigError(f"{source}: {where} is {given.optional(where, plain)!r}, only {plain!r} is supported")
    backbone, image = backbone_of(given, "model.backbone.model_name")
    dataset = str(given.need("data.dataset_name"))
    name = dataset.removesuffix("_all")
    if name not in _LAYOUTS:
        raise ConfigError(f"{source}: data.dataset_name {dataset!r}; valid: {', '.join(_LAYOUTS)}, each also with _all")
    flow = "flow_matching"
    sampling = given.optional(f"{flow}.scheduler.t_scheduler_train", "linear")
    if sampling not in ("linear", "logistic"):
        raise ConfigError(f"{source}: {flow}.scheduler.t_scheduler_train {sampling!r}; valid: linear, logistic")
    times = {"t_sampling": "uniform"}
    if sampling == "logistic":
        normal = {key: given.optional(f"{flow}.scheduler.{key}", value) for key, value in _NORMAL.items()}
        times = {"t_sampling": "logistic", **normal}
    train_steps = given.optional(f"{flow}.train_steps", -1)
    sizes = ("hidden_size", "depth", "num_heads", "mlp_ratio", "patch_size", "use_class_labels")
    return {
        "layout": _LAYOUTS[name],
        "root": given.need("data.data_root"),
        "lists": given.optional("data.meta_dir", None) if name == "realiad" else None,
        "categories": None if dataset.endswith("_all") else (given.need("data.category"),),
        "backbone": backbone,
        "image_size": image.size,
        "normalise_features": False,
        **{key: given.need(f"model.{key}") for key in sizes},
        "t_scale": given.optional("model.t_scale", 1.0),
        "class_dropout": given.need("model.class_dropout_prob"),
        "predict": given.optional(f"{flow}.pred_type", "velocity"),
        "loss": given.optional(f"{flow}.loss_type", "velocity"),
        "div_eps": given.optional(f"{flow}.div_eps", 0.05),
        **times,
        "train_steps": train_steps if train_steps > 0 else None,
        "batch_size": given.need("data.train_batch_size"),
        "epochs": given.need("opt.epochs"),
        "start_lr": given.need("opt.lr_start"),
        "lr": given.need("opt.lr_warmup"),
        "min_lr": given.need("opt.lr_end"),
        "warmup_epochs": given.need("opt.lr_warmup_epochs"),
        "weight_decay": 0.0,
        "ema_decay": 0.0,
        "grad_clip": max(0.0, given.number("opt.clip_grad")),
        "precision": "bf16" if given.need("opt.use_bfloat16") else "fp32",
        "seed": given.need("opt.global_seed"),
    }
