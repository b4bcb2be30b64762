"""The project's own format: a `.safetensors` with the weights, and beside it a JSON that describes the model."""

import json
from pathlib import Path

import safetensors.torch
import torch

from flowad_fast.checkpoints.backbones import backbone_loader
from flowad_fast.checkpoints.fill import filled
from flowad_fast.checkpoints.reading import read_safetensors
from flowad_fast.config import ModelConfig, parse, read_mapping
from flowad_fast.errors import ConfigError
from flowad_fast.files import replacing
from flowad_fast.model import FlowModel

_MASK = "tiling.mask"
"""(H, W) uint8: the pixels of training frames that were never looked at."""


def load_own(path: Path, backbone_weights: str | Path | None) -> FlowModel:
    """The model in `path` and its JSON; see `load_checkpoint`."""
    spec = parse(ModelConfig, read_mapping(path.with_suffix(".json")), str(path.with_suffix(".json")))
    tensors = read_safetensors(path)
    stats = {key: tensors.pop(f"features.{key}", None) for key in ("mean", "std")}
    mask = tensors.pop(_MASK, None)
    own = {key.removeprefix("backbone."): tensors.pop(key) for key in list(tensors) if key.startswith("backbone.")}
    dit = filled(spec.velocity, {key.removeprefix("velocity."): value for key, value in tensors.items()}, str(path))
    backbone = backbone_loader(spec, backbone_weights, stats, str(path), own)
    return FlowModel(spec, dit, backbone, None if mask is None else mask.bool().numpy())


def save_checkpoint(
    model: FlowModel, path: str | Path, dtype: torch.dtype = torch.float32, include_backbone: bool = False
) -> None:
    """Write the project's own format: `path` (.safetensors) and its JSON beside it, both written whole or not at all.

    The backbone is stored by name, with its feature statistics; `include_backbone` stores its weights too (float32),
    so that the file stands alone.

    Raises:
        ConfigError: another suffix, or the disk refuses.

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
    if model.mask is not None:
        tensors[_MASK] = torch.from_numpy(model.mask).to(torch.uint8)
    if include_backbone:
        tensors |= {f"backbone.{key}": value.cpu() for key, value in model.backbone.backbone.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, data in (
        (path, safetensors.torch.save(tensors)),
        (path.with_suffix(".json"), json.dumps(model.spec.model_dump(mode="json"), indent=2).encode() + b"\n"),
    ):
        with replacing(target) as file:
            file.write(data)
