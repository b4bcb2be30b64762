"""Which good parts an export uses for what: location statistics, the threshold, the number of probes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowad_fast.cli import common
from flowad_fast.errors import ConfigError
from flowad_fast.export.frames import GoodParts, good_parts, training_parts
from flowad_fast.export.location import StatisticsParts, split
from flowad_fast.export.verify import ParityFrames
from flowad_fast.shipped import PHOTOS
from flowad_fast.stages.decision import Aggregate
from flowad_fast.stages.scorers import Density

if TYPE_CHECKING:
    from flowad_fast.evaluation.probes import ProbeChoice
    from flowad_fast.model import FlowModel

PROBE_FRAMES = 8
"""Good parts on which --probes auto measures."""


def parts_for_location(
    folder: str | None, good: GoodParts | None, labels: Sequence[str], alpha: float, aggregate: Aggregate
) -> tuple[StatisticsParts, GoodParts | None]:
    """The good parts for location statistics, and those that are left for the threshold."""
    if folder is not None:
        return given_parts(folder, labels), good
    if good is None:
        raise ConfigError(
            "--location needs good parts: give --calibrate GOOD_FOLDER, of which it takes half, or --location-parts"
        )
    return split(good, alpha, aggregate)


def given_parts(folder: str, labels: Sequence[str]) -> StatisticsParts:
    """The parts of a folder, or the training parts that come with a checkpoint, for location statistics."""
    parts = training_parts(folder, labels) if folder in PHOTOS else good_parts(folder, labels)
    for line in parts.left_out:
        common.note(line)
    where = f"the training cells of {folder}" if folder in PHOTOS else f"the folder {Path(folder).name}"
    return StatisticsParts(parts, f"{len(parts)} good parts of {where}")


def chosen_probes(
    model: "FlowModel", scorer: Density, good: GoodParts | None, frames: ParityFrames
) -> "tuple[Density, ProbeChoice]":
    """The scorer with the number of probes that some of the good parts ask for.

    They come from --calibrate, otherwise from the frames of the parity check that are not known to be defective.
    """
    from flowad_fast.evaluation.probes import choose_probes

    if good is not None:
        index = (
            [i * len(good) // PROBE_FRAMES for i in range(PROBE_FRAMES)]
            if len(good) > PROBE_FRAMES
            else range(len(good))
        )
        pairs = [(good.frames[i], good.classes[i]) for i in index]
        same = [(frame, name) for frame, name in pairs if frame.shape == pairs[0][0].shape]
        names = [model.spec.classes.label(name) for _, name in same if name]
        return choose_probes(model, scorer, np.stack([frame for frame, _ in same]), names or None)
    normal = frames.frames if frames.labels is None else frames.frames[frames.labels == 0]
    count = model.config.num_classes
    names = [i % count for i in range(len(normal[:PROBE_FRAMES]))]
    return choose_probes(model, scorer, normal[:PROBE_FRAMES], names if model.config.use_class_labels else None)
