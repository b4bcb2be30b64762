"""Reading trained models: FlowAD and InvAD training checkpoints, and the project's own safetensors + JSON.

own.py        the project's own format, read and written       foreign.py   other code bases' formats, as records
reading.py    weight files as tensors, safely                  fill.py      tensors into a velocity field
backbones.py  where the backbone's weights come from
"""

from pathlib import Path

from flowad_fast.checkpoints.backbones import backbone_loader
from flowad_fast.checkpoints.fill import filled
from flowad_fast.checkpoints.foreign import CLASS_TABLE, foreign_spec, velocity_weights
from flowad_fast.checkpoints.own import load_own, save_checkpoint
from flowad_fast.checkpoints.reading import read_network, some
from flowad_fast.config import VelocityConfig, Weights
from flowad_fast.errors import CheckpointError, ConfigError
from flowad_fast.files import sha256
from flowad_fast.model import FlowModel, VelocityModel
from flowad_fast.shipped import SHIPPED, weight_file

__all__ = ["DEMO", "backbone_loader", "load_checkpoint", "load_velocity", "save_checkpoint"]

DEMO = SHIPPED["demo"]
"""See `shipped`."""


def load_checkpoint(
    path: str | Path,
    config: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    weights: Weights | None = None,
) -> FlowModel:
    """A trained model from disk, fp32, on the CPU.

    Args:
        path: a FlowAD or InvAD `.pth`, the project's own `.safetensors` (its JSON lies beside it), or a name of
            `shipped.SHIPPED`.
        config: the training or evaluation YAML of a `.pth`.
        backbone_weights: the backbone's weight file, in EfficientNet-PyTorch's or timm's naming. Without it, a B4
            or DINOv2 backbone takes timm's pretrained weights; a Lite0 backbone takes its package's.
        weights: `ema` for the averaged weights of a `.pth` that has them, in it or beside it; `model` for the trained
            ones. Without it the trained ones, with a warning where there are both.

    Raises:
        CheckpointError: the file is not a checkpoint, or does not match the configuration.
        ConfigError: the configuration is missing, incomplete or contradictory.

    Example:
        >>> from flowad_fast import load_checkpoint
        >>> model = load_checkpoint("demo")
        >>> model.config.hidden_size, model.config.depth, model.spec.backbone
        (256, 4, 'efficientnet-lite0')
    """
    path = weight_file(path)
    if path.suffix == ".safetensors":
        if config is not None:
            raise ConfigError(f"{path}: a safetensors checkpoint has its own JSON beside it; omit config")
        if weights is not None:
            raise ConfigError(f"{path}: a safetensors checkpoint has one set of weights, got weights {weights!r}; omit")
        return load_own(path, backbone_weights)
    network = read_network(path, weights)
    if config is None:
        raise ConfigError(f"{path}: a .pth checkpoint needs its training configuration; give config=FILE.yaml")
    path = network.path
    tensors, family = velocity_weights(network.state, str(path))
    if CLASS_TABLE not in tensors:
        raise CheckpointError(
            f"{path}: lacks {CLASS_TABLE}, which every {family.name} network has; found {some(list(tensors))}. "
            "Save the whole network: torch.save({'model': net.state_dict()}, FILE)"
        )
    provenance = {"source": path.name, "sha256": sha256(path), "format": family.name}
    provenance |= {"weights": network.chosen} if network.chosen else {}
    spec = foreign_spec(family, config, tensors)
    spec = spec.model_copy(update={"provenance": provenance | spec.provenance})
    dit = filled(spec.velocity, tensors, f"{path} with {config}")
    return FlowModel(spec, dit, backbone_loader(spec, backbone_weights, {}, str(path)))


def load_velocity(path: str | Path, config: VelocityConfig) -> VelocityModel:
    """A bare velocity field of any input size from a FlowAD or InvAD `.pth`, described by `config`.

    Raises:
        CheckpointError: the file is not a checkpoint, or does not match `config`.
    """
    weights, _ = velocity_weights(read_network(Path(path)).state, str(path))
    if CLASS_TABLE in weights and not config.use_class_labels:  # unused by the model, whatever its size
        rows = weights[CLASS_TABLE].shape[0]
        config = config.model_copy(update={"num_classes": rows - (config.class_dropout_prob > 0)})
    return VelocityModel(config, filled(config, weights, str(path)))
