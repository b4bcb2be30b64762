"""Which frames a quantised graph takes its ranges from: good parts only."""

from typing import TYPE_CHECKING

from flowad_fast.export.formats import Ranges
from flowad_fast.export.frames import GoodParts, ParityFrames, parity_tiles, spread
from flowad_fast.export.verify import class_indices
from flowad_fast.stages.tiling import Tiler

if TYPE_CHECKING:
    from flowad_fast.model import FlowModel


def ranges_of(model: "FlowModel", given: ParityFrames, good: GoodParts | None, tiler: Tiler | None) -> Ranges:
    """What a quantised graph takes its ranges from: good parts, else the good ones of the frames for the check."""
    if good is not None:
        kept = spread(good)
        kept = kept if tiler is None else parity_tiles(kept, tiler, len(kept.frames))
        return Ranges(kept.frames, class_indices(model, kept), kept.source)
    y = class_indices(model, given)
    if given.labels is None:
        return Ranges(given.frames, y, f"{len(given.frames)} {given.source}, taken for good")
    keep = given.labels == 0
    return Ranges(given.frames[keep], None if y is None else y[keep], f"{keep.sum()} good of {given.source}")
