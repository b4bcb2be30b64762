"""What an evaluation is of, and what it found."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowad_fast.evaluation.metrics import RegionCounts
from flowad_fast.evaluation.scanning import Frame

MEAN_AD = "mean_ad"
"""Key of the mean of the seven metrics (mAD)."""
_SCHEMA = 1

Metrics = dict[str, float | None]


class Scored(Protocol):
    """What a detector returns for B frames: `map` (B, h, w) and `score` (B,), float32.

    Where it exists, `invalid` (B,) is also read: why a frame cannot be judged, or None.
    """

    @property
    def map(self) -> NDArray[np.float32]:
        """Anomaly maps (B, h, w), higher = more anomalous."""

    @property
    def score(self) -> NDArray[np.float32]:
        """Image scores (B,), higher = more anomalous."""


DetectorLike = Callable[[Frame, list[str] | None], Scored]
"""From uint8 frames (B, H, W, 3) and class names (None without classes) to their maps and scores, in their order.

Attributes that are read where they exist: `class_names`, empty for a detector without classes; `engine` and
`aggregate`, for the report. A FrameError makes error rows of the frames of the call.
"""


@dataclass(frozen=True)
class ImageRow:
    """One test image: its score, or the `error` that left it without one; `unmarked` says why it has no mask to use."""

    path: str
    category: str
    defect: str
    label: int
    score: float | None = None
    error: str | None = None
    unmarked: str | None = None


@dataclass(frozen=True)
class Report:
    """What an evaluation found; metrics are fractions in [0, 1], None where they cannot be computed.

    `metrics` has one entry per category and `mean` their mean, each with the seven `METRICS` and `mean_ad`. A metric is
    None in the mean when it is None in any category. `detector` says what ran (the engine), `image_score` how scores
    were made, `pixel_images` how many images of a category the pixel metrics cover, and `remarks` what a reader of the
    numbers must know. `regions` counts defects and regions of each category, where the detector has pixel
    thresholds; without masks, those on good parts alone.
    """

    dataset: str
    detector: str
    image_score: str
    metrics: dict[str, Metrics]
    mean: Metrics
    images: tuple[ImageRow, ...]
    pixel_images: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    regions: dict[str, RegionCounts] = field(default_factory=dict)
    schema: int = _SCHEMA

    @property
    def errors(self) -> tuple[ImageRow, ...]:
        """The images without a score; the metrics leave them out."""
        return tuple(row for row in self.images if row.error is not None)

    @property
    def unmarked(self) -> tuple[ImageRow, ...]:
        """The defective images whose mask marks nothing; the pixel metrics leave them out."""
        return tuple(row for row in self.images if row.unmarked is not None)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values; no NaN."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def class_names(detector: DetectorLike) -> tuple[str, ...]:
    """The classes of a detector, empty for one without."""
    return tuple(getattr(detector, "class_names", ()))
