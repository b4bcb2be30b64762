"""anomalib's models as peers: what each is built of, and how it is called.

Backbones of PaDiM, PatchCore and CFLOW-AD are this project's EfficientNet-Lite0, with the same weights, so that what
differs is the method. The weights of other backbones have to be downloaded; without that they stay random, and say
nothing but how long a frame takes.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowad_fast.benchmarks.record.peers import Training, Weights
from flowad_fast.benchmarks.runs import peers_training as training
from flowad_fast.benchmarks.runs.peers_backbone import TIMM_NAME, WHOLE, fill, proof, without_download
from flowad_fast.benchmarks.runs.peers_training import Budget, Parts
from flowad_fast.config import ImageConfig
from flowad_fast.errors import ConfigError, EngineUnavailableError, nearest
from flowad_fast.files import digest, replacing
from flowad_fast.stages.image import normalise

PLAIN = {"pre_processor": False, "post_processor": False, "evaluator": False, "visualizer": False}
"""Of anomalib's modules: frames are prepared here, and metrics are the same code for everyone."""


@dataclass(frozen=True)
class Peer:
    """One method.

    Attributes:
        name: of the row.
        backbone: in words.
        weights: what its backbone has here.
        make: anomalib's module without training; takes whether downloads are allowed.
        train: trains the module on parts within a budget, and says what was reached.
        options: what differs from the library's defaults, and what decides its time.
        size: side that frames are resized to.
        crop: side of the middle that is kept of that.
        scaled: whether inputs are normalised as ImageNet's are; else they stay in 0 to 1.
    """

    name: str
    backbone: str
    weights: Weights
    make: Callable[[bool], Any]
    train: Callable[[Any, Parts, Budget], Training]
    options: str
    size: int = 256
    crop: int | None = None
    scaled: bool = True

    def prepared(self, frames: Tensor) -> Tensor:
        """Frames (n, H, W, 3) uint8 as the model's input (n, 3, s, s) float32."""
        config = ImageConfig(size=self.size)
        if not self.scaled:
            config = ImageConfig(size=self.size, mean=(0, 0, 0), std=(1, 1, 1))
        x = normalise(frames, config)
        if self.crop is not None:
            edge = (self.size - self.crop) // 2
            x = x[:, :, edge : edge + self.crop, edge : edge + self.crop].contiguous()
        return x

    def proved(self, module: Any) -> str:
        """That a backbone with shipped weights has them; see `proof`. Empty where the features are not the Lite0's."""
        extractors = [m for m in module.modules() if type(m).__name__ == "TimmFeatureExtractor"]
        return proof(self.name, extractors[0]) if self.weights == "shipped" and extractors else ""

    def built(self, download: bool) -> Any:
        """anomalib's module, untrained.

        Raises:
            EngineUnavailableError: anomalib lacks it, or its weights cannot be downloaded.
        """
        torch.manual_seed(0)
        try:
            with nullcontext() if download else without_download():
                return self.make(download)
        except ImportError as error:
            raise EngineUnavailableError(f"{self.name}: {error}; pip install 'anomalib>=2.5'") from None
        except (OSError, RuntimeError) as error:
            if not download:
                raise
            reason = " ".join(str(error).split())[:120]
            raise EngineUnavailableError(
                f"{self.name}: its weights cannot be downloaded ({reason}); leave out --download"
            ) from None


def _padim(download: bool) -> Any:
    from anomalib.models import Padim

    layers = ["blocks.1", "blocks.2", "blocks.4"]
    module = Padim(
        backbone=TIMM_NAME, layers=layers, pre_trained=False, n_features=100, **PLAIN
    )  # fmt: skip
    fill(module.model.feature_extractor.feature_extractor)
    return module


def _patchcore(download: bool) -> Any:
    from anomalib.models import Patchcore

    layers = ["blocks.2", "blocks.4"]
    module = Patchcore(backbone=TIMM_NAME, layers=layers, pre_trained=False, **PLAIN)
    fill(module.model.feature_extractor.feature_extractor)
    return module


def _cflow(download: bool) -> Any:
    from anomalib.models import Cflow

    layers = ["blocks.2", "blocks.4", "blocks.6"]
    module = Cflow(backbone=TIMM_NAME, layers=layers, pre_trained=False, **PLAIN)
    fill(module.model.encoder.feature_extractor, WHOLE)
    module.model.fiber_batch_size = training.FIBRES
    return module


def _efficient_ad(download: bool) -> Any:
    from anomalib.models import EfficientAd

    module = EfficientAd(**PLAIN)
    if download:
        module.prepare_pretrained_model()
    return module


def _own(name: str) -> Callable[[bool], Any]:
    """A module of anomalib as the library configures it."""

    def make(download: bool) -> Any:
        import anomalib.models

        kind = getattr(anomalib.models, name, None)
        if kind is None:
            raise ImportError(f"this version of anomalib has no {name}")
        return kind(**PLAIN)

    return make


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "PaDiM", "EfficientNet-Lite0", "shipped", _padim, training.padim,
            "stages of stride 4, 8 and 16, 100 of 176 channels",
        ),
        Peer(
            "PatchCore", "EfficientNet-Lite0", "shipped", _patchcore, training.patchcore,
            "stages of stride 8 and 16, coreset of 10 %",
        ),
        Peer(
            "CFLOW-AD", "EfficientNet-Lite0", "shipped", _cflow, training.cflow,
            "stages of stride 8, 16 and 32, eight coupling blocks; fibres decoded 4096 at a time, which is faster than "
            "the library's 64 and changes nothing else",
        ),
        Peer(
            "EfficientAD-S", "its own PDN, distilled from EfficientNet-Lite0", "shipped", _efficient_ad,
            training.efficient_ad,
            "the published teacher and ImageNette are not at hand: its PDN learnt the Lite0's features in half of the "
            "budget, and random pictures stand in for ImageNet's in the penalty",
            scaled=False,
        ),
        Peer(
            "SuperSimpleNet", "Wide ResNet-50", "random", _own("Supersimplenet"), training.super_simple_net,
            "the library's defaults",
        ),
        Peer(
            "Dinomaly", "DINOv2 ViT-B/14 with registers", "random", _own("Dinomaly"), training.dinomaly,
            "the library's defaults: the middle 392 of 448 pixels", size=448, crop=392,
        ),
        Peer(
            "INP-Former", "DINOv2 ViT-B/14 with registers", "random", _own("InpFormer"), training.inp_former,
            "the library's defaults: the middle 392 of 448 pixels", size=448, crop=392,
        ),
    )
}  # fmt: skip
"""By name, in the order of the table."""


def chosen(names: Sequence[str], download: bool) -> list[Peer]:
    """Peers by name; with downloads allowed every backbone has weights of its own, and EfficientAD its teacher.

    Raises:
        ConfigError: no such peer.
    """
    found = []
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"unknown peer {name!r}; {nearest(name, PEERS)}")
        peer = PEERS[name]
        if download and peer.weights == "random":
            peer = replace(peer, weights="own")
        if download and name == "EfficientAD-S":
            peer = replace(
                peer, backbone="its own PDN", weights="own", train=training.efficient_ad_published,
                options="the published teacher and ImageNette's pictures",
            )  # fmt: skip
        found.append(peer)
    return found


def identity(peer: Peer, product: str, budget: Budget, versions: dict[str, str | None]) -> str:
    """Names what was trained in a cache: another method, version, budget or thread count is another training."""
    what = [peer.name, peer.backbone, peer.weights, peer.options, product, budget.seconds, budget.threads, versions]
    return f"{peer.name}-{product}-{digest(what)[:12]}"


def scores_of(peer: Peer, model: nn.Module, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (n, ..., h, w) and scores (n,) of frames (n, H, W, 3) uint8.

    CFLOW-AD's forward goes back to training when it ends, which changes nothing for it.
    """
    with torch.inference_mode():
        found = model(peer.prepared(frames))
    return found.anomaly_map, found.pred_score.reshape(-1)


def keep(model: nn.Module, path: Path) -> None:
    """Write a trained model's tensors, whole or not at all."""
    with replacing(path) as file:
        torch.save(model.state_dict(), file)


def restore(model: nn.Module, path: Path) -> None:
    """Fill a model as `keep` wrote it; nothing in the file is executed.

    Raises:
        ConfigError: another model's.
    """
    try:
        model.load_state_dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{path}: not what this version trained ({reason}); remove it to train again") from None
