"""Location statistics of a detector, from frames of good parts."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowad_fast.config import ModelConfig
from flowad_fast.detector import Detector
from flowad_fast.errors import ConfigError, FlowADError, FrameError
from flowad_fast.evaluation.scanning import scan
from flowad_fast.stages.location import LocationStatistics, cells
from flowad_fast.stages.tiling import NO_LOCATION


def measure_location(
    detector: Detector,
    frames: Sequence[NDArray[np.uint8]],
    classes: Sequence[str] | None,
    labels: Sequence[str],
    spec: ModelConfig,
) -> LocationStatistics:
    """Statistics of the cells of good parts' maps, by a detector whose own statistics change nothing.

    Args:
        detector: on any engine; the cells are taken from its enlarged maps.
        frames: good parts (H, W, 3) uint8, read one at a time.
        classes: the class name of each, None for unconditional models.
        labels: what to call each in messages.
        spec: the model's.

    Raises:
        FrameError: a good part that cannot be read or judged.
        CalibrationError: a map that is not finite.
        ConfigError: a class that the model does not have, or a detector that cuts frames into tiles.
    """
    if detector.tiler is not None:
        raise ConfigError(NO_LOCATION)
    height, width = spec.velocity.height, spec.velocity.width
    given = [spec.classes.label(name) for name in classes] if classes is not None else None
    maps = []
    for one, label in zip(scan(detector, frames, given), labels, strict=True):
        if isinstance(one, FlowADError):
            raise one
        if reason := one.detection.invalid[one.place]:
            raise FrameError(f"frame {label} for the location statistics: {reason}; remove it")
        maps.append(cells(one.detection.map[one.place][None], height, width)[0])
    stack = np.stack(maps) if maps else np.zeros((0, height, width), np.float32)
    index = None if given is None else spec.classes.indices(given, len(maps))
    return LocationStatistics.fit(stack, index, spec.classes.rows)
