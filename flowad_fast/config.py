"""Frozen, validated descriptions of a model; JSON in, JSON out.

A missing defining field or an unknown key is an error, never a default: a wrong default would give plausible, wrong
scores.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from flowad_fast.errors import ConfigError, nearest

MVTEC_CLASSES = (
    "metal_nut", "tile", "screw", "zipper", "grid", "pill", "capsule", "transistor",
    "toothbrush", "cable", "carpet", "wood", "bottle", "leather", "hazelnut",
)  # fmt: skip
"""Class order (index y) of the published MVTec AD models; it is not alphabetical."""
VISA_CLASSES = (
    "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4",
    "pipe_fryum",
)  # fmt: skip
MPDD_CLASSES = ("bracket_black", "bracket_brown", "bracket_white", "connector", "metal_plate", "tubes")
REALIAD_CLASSES = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "phone_battery",
    "plastic_nut", "plastic_plug", "pcb", "porcelain_doll", "regulator", "rolled_strip_base", "sim_card_set", "switch",
    "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1", "u_block", "usb", "usb_adaptor", "vcpill",
    "wooden_beads", "woodstick", "zipper", "mounts", "tape",
)  # fmt: skip
CLASS_ORDERS = {"mvtec_ad": MVTEC_CLASSES, "visa": VISA_CLASSES, "mpdd": MPDD_CLASSES, "realiad": REALIAD_CLASSES}
"""Class order by what the `data.dataset_name` of the authors' configurations begins with."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRANSFORMS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "default": ((0.5,) * 3, (0.5,) * 3)}
"""`transform_type` of a training configuration: (mean, std) of its normalisation."""


Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]
Certified = Literal[Precision, "int8"]
"""What an artefact is certified in: a precision, or int8, which graphs have that a format quantises."""
"""Arithmetic of the velocity field's matrix products; state, statistics and accumulation are float32 in all of them.

What each is made of: `stages.arithmetic.NUMBERS`."""
Backbone = Literal["efficientnet-b4", "efficientnet-lite0", "dinov2-small", "dinov2-base"]
"""Frozen feature extractors, described in `stages.features.BACKBONES`."""
_GRIDS = {
    "efficientnet-b4": (16, 32),
    "efficientnet-lite0": (16, 32),
    "dinov2-small": (14, 14),
    "dinov2-base": (14, 14),
}
"""Of each backbone: pixels per cell of its grid, and what the image's side must be a multiple of."""
Target = Literal["velocity", "data", "noise"]
"""What a flow's network predicts, and what its loss compares."""
Weights = Literal["model", "ema"]
"""Which of a checkpoint's weights: those that were trained, or their running average."""


@dataclass(frozen=True)
class Classes:
    """The classes of a model: their names in index order (empty where they have none), and how many.

    An unconditional model has none: `conditional` is False.
    """

    names: tuple[str, ...] = ()
    count: int = 1
    conditional: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """What names each class for a person: the names, or the numbers; () for an unconditional model."""
        if not self.conditional:
            return ()
        return self.names or tuple(str(i) for i in range(self.count))

    @property
    def rows(self) -> int:
        """How many classes frames are told apart by; 1 for an unconditional model."""
        return self.count if self.conditional else 1

    def label(self, text: str) -> str | int:
        """A class that a person named, as `indices` takes it: a number where the model has no names."""
        return int(text) if not self.names and text.isdecimal() else text

    def indices(
        self, given: Sequence[str | int] | str | int | None, batch: int
    ) -> "np.ndarray[tuple[int], np.dtype[np.int64]] | None":
        """Names or indices as y (batch,) int64, None for an unconditional model; a single one stands for all.

        Raises:
            ConfigError: a class that the model does not have, classes for an unconditional model, or none for a
                conditional one; the message names the classes.
        """
        known = ", ".join(self.names) if self.names else f"0..{self.count - 1}"
        if not self.conditional:
            if given is not None:
                raise ConfigError("the model is unconditional but classes were given; omit them")
            return None
        if given is None:
            raise ConfigError(f"the model is conditional; give the class of each frame: {known}")
        wanted = [given] * batch if isinstance(given, (str, int)) else list(given)
        if len(wanted) == 1:
            wanted *= batch
        if len(wanted) != batch:
            raise ConfigError(f"{len(wanted)} classes for {batch} frames")
        found = np.empty(batch, np.int64)
        for i, one in enumerate(wanted):
            if isinstance(one, str):
                if one not in self.names:
                    raise ConfigError(f"class {one!r} is not in the model; {nearest(one, self.names)}")
                found[i] = self.names.index(one)
            elif 0 <= int(one) < self.count:
                found[i] = int(one)
            else:
                raise ConfigError(f"class index {one} is not in the model; expected 0..{self.count - 1}: {known}")
        return found

    def of(self, y: "np.ndarray | None", batch: int) -> tuple[str, ...]:
        """The label of each index in y (batch,); "" for an unconditional model."""
        return ("",) * batch if y is None else tuple(self.labels[int(i)] for i in y)


def grid_side(backbone: str, size: int) -> int:
    """Cells per side of a backbone's features of a size x size image.

    Raises:
        ConfigError: the backbone does not take that size.
    """
    stride, multiple = _GRIDS[backbone]
    if size % multiple:
        nearest_size = max(1, round(size / multiple)) * multiple
        raise ConfigError(
            f"image size {size} is not a multiple of {multiple}, which {backbone} needs; "
            f"take {nearest_size}, or {16 * stride} for a 16x16 grid"
        )
    return size // stride


class Frozen(BaseModel):
    """Base of all configurations: immutable, unknown keys and numbers that are not finite rejected.

    A NaN must not get in: no score is greater than a NaN threshold, so every part would be good.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class VelocityConfig(Frozen):
    """A DiT velocity field on (channels, height, width) feature maps.

    `num_classes` is the number of rows of the class embedding, less the dropout row that exists when
    `class_dropout_prob` > 0. `t_scale` multiplies t in [0, 1] before the sinusoid (1 for models that are fed integer
    timesteps). `pred_type` says what the network outputs: velocity, data X1, noise X0, or (diffusion models) epsilon.
    `step_grid` says where steps lie whose size does not divide the interval, see `schedule.flow`.
    `keep_bf16` names linear layers of the inference form that the precision fp8 leaves in bf16: patterns of embed,
    blocks.<i>.{qkv,proj,fc1,fc2} and head. Keep a layer when the drift of the whole model is too large without it.
    """

    # The upper limits are far from any model; beyond them a damaged file would ask for endless work.
    channels: int = Field(gt=0, le=65536)
    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    hidden_size: int = Field(gt=0, le=65536)
    depth: int = Field(gt=0, le=1024)
    num_heads: int = Field(gt=0, le=4096)
    mlp_ratio: float = Field(default=4.0, gt=0, le=256)
    patch_size: int = Field(default=1, gt=0, le=4096)
    num_classes: int = Field(default=1, gt=0, le=2**20)
    class_dropout_prob: float = Field(default=0.0, ge=0, lt=1)
    use_class_labels: bool = False
    t_scale: float = Field(default=1000.0, gt=0)
    pred_type: Literal["velocity", "data", "noise", "epsilon"] = "velocity"
    step_grid: Literal["equal", "short-last"] = "equal"
    keep_bf16: tuple[str, ...] = ("embed", "head")

    @model_validator(mode="after")
    def _consistent(self) -> "VelocityConfig":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.height % self.patch_size or self.width % self.patch_size:
            raise ValueError(f"grid {self.height}x{self.width} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def mlp_hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def tokens(self) -> int:
        """Number of tokens that the transformer sees: (height / p) * (width / p)."""
        return self.height * self.width // self.patch_size**2

    @property
    def embedding_rows(self) -> int:
        """Rows of the class-embedding table."""
        return self.num_classes + (self.class_dropout_prob > 0)


Positive = Annotated[float, Field(gt=0)]


class ImageConfig(Frozen):
    """How a frame becomes the backbone's input: resize to size x size, /255, subtract mean, divide by std."""

    size: int = Field(default=256, gt=0, le=65536)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD


def _roi(given: Any) -> Any:
    numbers = given.split(",") if isinstance(given, str) else given
    if (
        len(numbers) != 4
        or not all(str(number).strip().isdecimal() for number in numbers)
        or 0 in map(int, numbers[2:])
    ):
        raise ValueError("expected LEFT,TOP,WIDTH,HEIGHT in pixels of the frame, for example 100,0,1200,900")
    return tuple(map(int, numbers))


Roi = Annotated[tuple[int, int, int, int], BeforeValidator(_roi)]
"""Left, top, width and height in pixels; also as text, with commas."""


class Tiling(Frozen):
    """How a large frame is judged by a model of small images: cut into overlapping tiles of the model's size."""

    overlap: float = Field(default=0.25, ge=0, le=0.75)
    """The share of its side that a tile has in common with the next one, at least."""
    scale: float = Field(default=1.0, gt=0, le=16)
    """Frames are resized by it first."""
    roi: Roi | None = None
    """Region of interest: left, top, width and height in pixels of the original frame; nothing else is judged."""

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the scaled frame, which are those of its map."""
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


class Ranking(Frozen):
    """How one image score of a student orders parts, beside its teacher's on the same parts.

    `spearman` is the rank correlation of the two scores. With labelled parts, AUROC of each in [0, 1], the difference
    (student - teacher), and its 95 % interval over a paired bootstrap of the parts; None without labels.
    """

    spearman: float
    teacher_auroc: float | None = None
    student_auroc: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        line = f"rank correlation {self.spearman:.4f}"
        if self.difference is None:
            return line
        return (
            f"{line}, AUROC {self.student_auroc:.4f} (teacher {self.teacher_auroc:.4f}), "
            f"difference {self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"
        )


class StudentCertificate(Frozen):
    """A student measured against its teacher, fp32, with the scorer that it was trained for.

    `operations` is the student's share of the teacher's floating-point operations per evaluation, as `kernels.account`
    counts them. `others` are defective parts where `labelled`, else good ones perturbed in feature space.
    """

    parts: str
    labelled: bool
    good: int = Field(ge=0)
    others: int = Field(ge=0)
    operations: float = Field(gt=0)
    resamples: int = Field(ge=0)
    rankings: dict[str, Ranking]


class Student(Frozen):
    """What a velocity field that was regressed on another one is good for: the evaluations of one scorer.

    `teacher` is the SHA-256 of the teacher's file, `scorer` the scorer with its options as a manifest has them.
    """

    teacher: str
    scorer: dict[str, bool | int | float | str]
    certificate: StudentCertificate | None = None

    def lines(self) -> list[str]:
        """The record in words, for people."""
        one = self.certificate
        lines = [f"student of {self.teacher[:16]}…, for {self.scorer} alone"]
        if one is None:
            return [*lines, "certificate against the teacher: not measured"]
        kind = "defective" if one.labelled else "perturbed"
        lines += [
            f"certificate against the teacher, on {one.good} good and {one.others} {kind} parts ({one.parts}); "
            f"{one.operations:.1%} of its operations"
        ]
        return lines + [f"{name}: {ranking}" for name, ranking in one.rankings.items()]


class ModelConfig(Frozen):
    """A whole detector model: image, backbone, features and velocity field.

    `student` is None for a velocity field that was trained at all times, and so may be used with any scorer.
    `tiling` is how the frames were cut that it was trained on, None for whole frames.
    """

    schema_version: Literal[1] = 1
    velocity: VelocityConfig
    backbone: Backbone
    image: ImageConfig = ImageConfig()
    feature_normalisation: bool = False
    class_names: tuple[str, ...] = ()
    student: Student | None = None
    tiling: Tiling | None = None
    provenance: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        v = self.velocity
        if v.use_class_labels and self.class_names and len(self.class_names) != v.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {v.num_classes} classes")
        side = grid_side(self.backbone, self.image.size)
        if (v.height, v.width) != (side, side):
            raise ValueError(f"a {self.image.size}-pixel image gives a {side}² grid, not {v.height}x{v.width}")
        return self

    @property
    def classes(self) -> Classes:
        """The model's classes."""
        conditional = self.velocity.use_class_labels
        return Classes(self.class_names if conditional else (), self.velocity.num_classes, conditional)


_Model = TypeVar("_Model", bound=BaseModel)
_Made = TypeVar("_Made")


def parse(model: type[_Model], data: Any, source: str) -> _Model:
    """`data` validated as `model`; every problem in one ConfigError that names `source` and the nearest valid key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(model, e) for e in error.errors())) from None


def validated(make: Callable[..., _Made], options: dict[str, Any], source: str) -> _Made:
    """`make(**options)` for a pydantic dataclass; every problem in one ConfigError that names `source`."""
    try:
        return make(**options)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r:.80})" for e in error.errors())
        raise ConfigError(f"{source}: {'; '.join(problems)}") from None


def _explain(model: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {where!r}; {nearest(str(error['loc'][-1]), _fields_at(model, error['loc'][:-1]))}"
    got = "" if error["type"] == "missing" else f" (got {error['input']!r:.80})"
    return f"{where or model.__name__}: {error['msg']}{got}"


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def read_settings(kind: type[_Model], path: str | Path, command: str) -> _Model:
    """The settings in a YAML file, of which `command init` writes one.

    Raises:
        ConfigError: no such file, no YAML, or fields that are missing, unknown or wrong; each is named.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason}); write one: {command} init {path}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: no valid YAML ({' '.join(str(error).split())}); see {command} init") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: got {type(data).__name__}, expected fields with values; see {command} init")
    return parse(kind, data, str(path))


def loopback(host: str) -> bool:
    """Whether only this computer can reach what is bound to a host's name or address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; ConfigError when the file is missing, malformed, or holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a YAML or JSON file") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: malformed ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top level, got {type(data).__name__}")
    return data
