"""One sample of a data set: a path, what it shows, and where its mask is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Sample:
    """An image file of a data set.

    `label` is 0 for a good part and 1 for a defective one; `mask` is None for good parts and for data sets without
    pixel labels (`has_masks` of the data set tells the two apart).
    """

    path: Path
    category: str
    split: Literal["train", "calibration", "test"]
    label: Literal[0, 1]
    defect: str = "good"
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """Samples of one or more categories, in a fixed order."""

    name: str
    samples: tuple[Sample, ...]
    has_masks: bool

    @property
    def categories(self) -> tuple[str, ...]:
        """Category names in order of first appearance."""
        return tuple(dict.fromkeys(sample.category for sample in self.samples))

    def select(self, split: str, category: str | None = None, label: int | None = None) -> tuple[Sample, ...]:
        """The samples of a split, optionally of one category and one label."""
        return tuple(
            s
            for s in self.samples
            if s.split == split and (category is None or s.category == category) and (label is None or s.label == label)
        )
