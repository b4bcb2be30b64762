"""What is measured: presets (a model and its default axes), and the cases that the axes span."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from flowad_fast import bundle
from flowad_fast.benchmarks.record.record import Row, Status
from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.config import MVTEC_CLASSES, ImageConfig, ModelConfig, Precision, VelocityConfig, Weights, validated
from flowad_fast.engines.device import torch_device
from flowad_fast.errors import ConfigError, nearest
from flowad_fast.kernels.account import VelocityShape
from flowad_fast.model import FlowModel
from flowad_fast.stages.aggregates import Aggregate
from flowad_fast.stages.features import BACKBONES, FeatureExtractor
from flowad_fast.stages.image import normalise
from flowad_fast.stages.scorers import SCORERS, Inversion, Scorer, options
from flowad_fast.stages.velocity import DiT, sizes

Mode = Literal["offline", "single-stream"]
IN_FLIGHT = 4
"""Batches per call of an engine that keeps two in flight: the first upload and the last download then count little."""
REFERENCE = "reference"


@dataclass(frozen=True)
class Preset:
    """A model and the axes that are measured unless others are asked for.

    `spec` None stands for the demo checkpoint; random presets have seeded, non-zero weights. `also` are scorers that
    are measured beside `scorers`, whose number of evaluations is the usual one.
    """

    description: str
    spec: ModelConfig | None
    scorers: tuple[str, ...] = tuple(SCORERS)
    engines: tuple[str, ...] = ("eager",)
    probes: tuple[int, ...] = (10,)
    parity_frames: int = 4
    also: tuple[Scorer, ...] = (Inversion(steps=2),)

    @property
    def velocity(self) -> VelocityConfig | None:
        """The model's velocity field, where it is known without loading the model."""
        return None if self.spec is None else self.spec.velocity


def spec_of(
    hidden: int, depth: int, heads: int, *, backbone: str = "efficientnet-b4", size: int = 256, invad: bool = False
) -> ModelConfig:
    """A model description; conditional on the MVTec classes as the paper's models are, InvAD's unconditional."""
    velocity = VelocityConfig(
        channels=sum(BACKBONES[backbone].channels),
        height=size // 16,
        width=size // 16,
        hidden_size=hidden,
        depth=depth,
        num_heads=heads,
        num_classes=len(MVTEC_CLASSES),
        use_class_labels=not invad,
        t_scale=1.0 if invad else 1000.0,
        pred_type="epsilon" if invad else "velocity",
    )
    names = () if invad else MVTEC_CLASSES
    return ModelConfig(velocity=velocity, backbone=backbone, image=ImageConfig(size=size), class_names=names)  # type: ignore[arg-type]


def shape_of(spec: ModelConfig) -> VelocityShape:
    """A model's sizes, as the account of bytes and operations has them."""
    return sizes(spec.velocity, spec.image.size)


PAPER = spec_of(2048, 16, 8)
PRESETS = {
    "demo": Preset("the shipped checkpoint: Lite0, DiT 256x4", None, engines=("eager", "onnxruntime")),
    "small": Preset("EfficientNet-B4, DiT 768x12x8, random weights", spec_of(768, 12, 8), probes=(10, 1, 2)),
    "medium": Preset("EfficientNet-B4, DiT 1280x16x8, random weights", spec_of(1280, 16, 8), probes=(10, 1, 2)),
    "paper": Preset(
        "EfficientNet-B4, DiT 2048x16x8, random weights", PAPER, probes=(10, 1, 2), parity_frames=2
    ),
    "invad": Preset(
        "InvAD: EfficientNet-B4, DiT 2048x16x8 predicting noise, random weights",
        spec_of(2048, 16, 8, invad=True),
        scorers=("inversion",),
        parity_frames=2,
        also=(),
    ),
    "tiny": Preset(
        "for trying the harness: Lite0 at 64 pixels, DiT 32x2, random weights",
        spec_of(32, 2, 2, backbone="efficientnet-lite0", size=64),
    ),
}  # fmt: skip


def axes_of(preset: str, quick: bool = False) -> Preset:
    """The default axes of a preset, bundle or checkpoint; `quick` keeps one engine and one number of probes."""
    axes = PRESETS.get(preset)
    if axes is None and is_bundle(preset):
        manifest = bundle.read(preset)[1]
        found = tuple(dict.fromkeys(a.engine for a in manifest.artefacts.values()))
        axes = Preset("a bundle", manifest.model, (manifest.scorer.kind,), found, also=())
    if axes is None and not Path(preset).is_file():
        raise ConfigError(f"{preset!r} is no preset, bundle or checkpoint; {nearest(preset, PRESETS)}")
    axes = axes or Preset("a checkpoint", None, also=())
    return replace(axes, engines=axes.engines[-1:], probes=axes.probes[:1], also=()) if quick else axes


@dataclass(frozen=True)
class Case:
    """One row: a model with a scorer on an engine. Everything that a fresh process needs to measure it.

    `products` and `early` concern the engine cudagraph: matrix products as `measured` to be fastest, or the
    `library`'s; whether kernels are started before the ones ahead of them have ended.
    """

    preset: str
    scorer: Scorer
    engine: str
    precision: Precision = "fp32"
    ops: str = "reference"
    products: str = "measured"
    early: bool = False
    batch: int = 1
    mode: Mode = "offline"
    device: str = "auto"
    frame_size: int | None = None
    parity_frames: int = 4
    config: str | None = None
    backbone_weights: str | None = None
    weights: Weights | None = None
    label: str = ""
    """Of a row beside one of another model that is like it in all else."""

    @property
    def name(self) -> str:
        """A short name, unique in a run."""
        probes = f"-K{self.probes}" if self.probes else ""
        kind = f"{self.scorer.kind}{probes}-s{self.scorer.count}"
        ops = "" if self.ops == "reference" else f"-{self.ops}"
        ops += "" if self.products == "measured" else f"-{self.products}"
        ops += "-early" if self.early else ""
        label = f"{self.label}/" if self.label else ""
        return f"{label}{kind}/{self.engine}{ops}/{self.precision}/b{self.batch}/{self.mode}"

    @property
    def pieces(self) -> int:
        """Batches per call: an engine that computes one while others move is given several when only speed counts."""
        return IN_FLIGHT if (self.engine, self.mode) == ("cudagraph", "offline") else 1

    @property
    def probes(self) -> int | None:
        """Probes of a scorer that has them: density."""
        return getattr(self.scorer, "probes", None)


def make_scorer(
    kind: str,
    *,
    evaluations: int | None = None,
    steps: int | None = None,
    probes: int | None = None,
    config: VelocityConfig | None = None,
) -> Scorer:
    """A scorer of a kind, its other options being the defaults.

    Args:
        kind: a name in `SCORERS`.
        evaluations: function evaluations per frame; None for the paper's 3, or of a scorer without steps its own.
        steps: steps per unit time.
        probes: for scorers that have probes.
        config: the model, of which only what it predicts matters; None for a flow-matching one.

    Raises:
        ConfigError: no such scorer, not for this model, or not with so many evaluations.
    """
    if kind not in SCORERS:
        raise ConfigError(f"unknown scorer {kind!r}; {nearest(kind, SCORERS)}")
    config = config or PAPER.velocity
    more = {} if probes is None or not has_probes(kind) else {"probes": probes}

    make: Callable[..., Scorer] = SCORERS[kind]

    counted = SCORERS[kind].counted_by

    def of(count: int | None) -> Scorer:
        given = {} if count is None else {counted: count}
        return validated(make, {**given, **more}, f"scorer {kind}")

    if counted != "steps":
        return of(evaluations)
    if steps is not None:
        return of(steps)
    wanted = evaluations or 3
    many = 1000
    scorer = of(round(wanted * many / of(many).evaluations(config)))
    if scorer.evaluations(config) != wanted:
        raise ConfigError(
            f"{scorer!r} makes {scorer.evaluations(config)} function evaluations, {wanted} were asked for; give --steps"
        )
    return scorer


def make_scorers(
    kinds: Sequence[str],
    *,
    evaluations: Sequence[int | None] = (None,),
    steps: Sequence[int] = (),
    probes: Sequence[int] = (10,),
    config: VelocityConfig | None = None,
) -> list[Scorer]:
    """Scorers along the axes; `steps` replace `evaluations`, and `probes` concern scorers that have them."""
    lengths: list[dict[str, Any]] = [{"steps": n} for n in steps] or [{"evaluations": n} for n in evaluations]
    return [
        make_scorer(kind, **length, probes=k, config=config)
        for kind in kinds
        for length in lengths
        for k in (probes if has_probes(kind) else (None,))
    ]


def has_probes(kind: str) -> bool:
    """Whether a kind of scorer has probes."""
    return kind in SCORERS and "probes" in options(kind)


def expand(
    preset: str, scorers: Sequence[Scorer], *, engines: Sequence[str], precisions: Sequence[str],
    batches: Sequence[int] = (1,), modes: Sequence[str] = ("offline",), **common: Any,
) -> list[Case]:  # fmt: skip
    """All cases of the axes; single-stream runs at batch 1 only. A bundle has a scorer of its own.

    Raises:
        ConfigError: an unknown mode or precision.
    """
    for what, given, valid in (("mode", modes, get_args(Mode)), ("precision", precisions, get_args(Precision))):
        for one in given:
            if one not in valid:
                raise ConfigError(f"unknown {what} {one!r}; {nearest(one, valid)}")
    if is_bundle(preset):
        scorers = [bundle.read(preset)[1].scorer]
    return [
        Case(preset, scorer, engine, precision, batch=batch, mode=mode, **common)  # type: ignore[arg-type]
        for mode in modes
        for scorer in scorers
        for batch in (batches if mode == "offline" else (1,))
        for engine in engines
        for precision in (precisions if engine != REFERENCE else ("fp32",))
    ]


def reference_of(case: Case) -> Case:
    """The reference path on the same work."""
    return replace(case, engine=REFERENCE, precision="fp32", ops="reference", products="measured", early=False)


def empty_row(case: Case, status: Status = "ok", reason: str | None = None) -> Row:
    """What is known of a row before it is measured."""
    return Row(
        name=case.name,
        preset=case.preset,
        mode=case.mode,
        scorer=case.scorer.kind,
        options=case.scorer,
        engine=case.engine,
        precision=case.precision,
        ops=case.ops,
        products=case.products if case.engine == "cudagraph" else None,
        early=case.early if case.engine == "cudagraph" else None,
        batch=case.batch,
        pieces=case.pieces,
        steps=case.scorer.count,
        probes=case.probes,
        status=status,
        reason=reason,
    )


def scored_as(case: "Case") -> tuple[Aggregate, np.ndarray | None]:
    """The image score of a case, and the location statistics of its bundle where it is one that has some."""
    if not is_bundle(case.preset):
        return "max", None
    folder, manifest = bundle.read(case.preset)
    return manifest.aggregate, None if manifest.location is None else bundle.location_table(folder, manifest)


def is_bundle(preset: str) -> bool:
    """Whether a preset names an exported bundle's folder."""
    return (Path(preset) / bundle.MANIFEST).is_file()


def load_model(case: Case) -> FlowModel:
    """The case's model: a preset's (made on the case's device), a bundle's eager artefact, or a checkpoint's."""
    preset = PRESETS.get(case.preset)
    if preset is not None and preset.spec is not None:
        return random_model(preset.spec, torch_device(case.device))
    if is_bundle(case.preset):
        folder, manifest = bundle.read(case.preset)
        eager = manifest.artefacts.get("eager")
        if eager is None:
            raise ConfigError(f"{folder}: comparing needs the model; export the bundle with the format eager as well")
        return load_checkpoint(folder / next(iter(eager.files)))
    return load_checkpoint(case.preset, case.config, case.backbone_weights, case.weights)


def random_model(spec: ModelConfig, device: torch.device, seed: int = 0) -> FlowModel:
    """A model with random, non-zero weights whose activations stay of order one.

    The backbone's batch norms take the statistics of pictures like those that are measured: with others, an untrained
    backbone's features grow by orders of magnitude and nothing of the velocity field is seen in a map. The modulations'
    biases are wide enough for every block to matter: otherwise a parity check would see only the first and last layer.
    """
    torch.manual_seed(seed)
    with device:
        dit = DiT(spec.velocity).to(device)
    for module in [*dit.blocks, dit.final_layer]:
        nn.init.normal_(module.adaLN_modulation[1].bias, std=0.3)  # type: ignore[union-attr, operator, index]
    with torch.no_grad():
        # A trained velocity is as large as features less noise.
        dit.final_layer.linear.weight.mul_(3)
    backbone = FeatureExtractor(spec.backbone, spec.feature_normalisation, spec.image.size)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    # On the CPU, in float32: a GPU's library may choose other algorithms where memory is short, and every process of a
    # run must make the same model.
    with torch.no_grad():
        backbone(normalise(torch.from_numpy(random_pictures(4, spec.image.size)), spec.image))
    backbone.eval()
    return FlowModel(spec, dit, backbone.to(device))


def make_frames(case: Case, count: int, image_size: int) -> tuple[np.ndarray, str]:
    """`count` frames uint8 (n, H, W, 3) and where they come from: the demo's real cells, or random pictures."""
    size = case.frame_size or image_size
    if case.preset == "demo" and case.frame_size is None:
        from flowad_fast.export.frames import parity_frames

        real = parity_frames(None, count + count % 2)
        return real.frames[:count], real.source
    return random_pictures(count, size), "random pictures"


def random_pictures(count: int, size: int) -> np.ndarray:
    """Pictures uint8 (n, size, size, 3) of smooth shapes and noise.

    Their contrast rises: scores that are all alike would leave a score error nothing to be relative to.
    """
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (count, 8, 8, 3))
    smooth = coarse.repeat(-(-size // 8), 1).repeat(-(-size // 8), 2)[:, :size, :size]
    contrast = np.linspace(0.7, 1, count)[:, None, None, None]
    pictures = 128 + contrast * (smooth - 128 + rng.uniform(-40, 40, smooth.shape))
    return pictures.clip(0, 255).astype(np.uint8)
