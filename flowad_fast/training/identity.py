"""What determines a training's result: a saved state is only gone on with where all of that is the same."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from pydantic_core import PydanticUndefined

from flowad_fast.data.samples import Sample
from flowad_fast.files import digest
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.training.config import TrainConfig

_WHERE_AND_WHEN = {
    "root", "lists", "feature_cache", "backbone_weights", "teacher", "mask", "log_every", "save_every", "dtype",
}  # fmt: skip
"""Fields that say where data lie and when files are written, and so may differ between a run and its resumption."""


class Identity(TypedDict):
    """Everything that determines a training's result, without machine paths."""

    config: dict[str, object]
    data: dict[str, str | int]
    backbone_sha256: str
    processes: int
    teacher_sha256: NotRequired[str]
    mask_sha256: NotRequired[str]


def identity_of(
    config: TrainConfig, name: str, samples: Sequence[Sample], extractor: FeatureExtractor, processes: int
) -> Identity:
    """The identity of a training with `samples` of the data set `name`."""
    base = Path(os.path.commonpath([sample.path.parent for sample in samples]))
    files = [(s.path.relative_to(base).as_posix(), s.category, s.path.stat().st_size) for s in samples]
    weights = hashlib.sha256()
    for tensor in extractor.backbone.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    return {
        "config": config.model_dump(mode="json", exclude=_WHERE_AND_WHEN),
        "data": {"name": name, "images": len(files), "sha256": digest(files)},
        "backbone_sha256": weights.hexdigest(),
        "processes": processes,
    }


def defaults() -> dict[str, object]:
    """The options' defaults as they are in an identity; None for what must be given."""
    fields = {name: field.get_default() for name, field in TrainConfig.model_fields.items()}
    known = {name: None if value is PydanticUndefined else value for name, value in fields.items()}
    return {name: value for name, value in known.items() if name not in _WHERE_AND_WHEN}


def differences(old: Identity, new: Identity) -> str:
    """The entries that differ, as `name: old -> new`."""
    flat: list[dict[str, object]] = [{**one, **one["config"], "config": None} for one in (old, new)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name}: {flat[0].get(name)} -> {flat[1].get(name)}" for name in names)
