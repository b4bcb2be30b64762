"""How an export's frames are cut into tiles: as the checkpoint was trained, but for what the user gives."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flowad_fast.bundle import Manifest
from flowad_fast.config import Tiling, parse
from flowad_fast.errors import ConfigError
from flowad_fast.export.frames import GoodParts, ParityFrames, parity_tiles, parse_size
from flowad_fast.masks import draw_mask
from flowad_fast.stages.tiling import Tiler
from flowad_fast.stages.tiling import in_words as settings_in_words

if TYPE_CHECKING:
    from flowad_fast.model import FlowModel

NONE = "none"
"""In place of an overlap: whole frames, whatever the checkpoint was trained on."""
_PARTS = 8
"""Good parts whose tiles tell how many probes are enough."""


def chosen_tiling(
    model: "FlowModel", tiles: str | None, scale: float | None, roi: str | None, mask: Path | None
) -> tuple[Tiling | None, NDArray[np.bool_] | None]:
    """The tiling of an export, None for whole frames, and its mask (H, W), None for none.

    Args:
        model: its own tiling and mask are the defaults.
        tiles: overlap, or `none`.
        scale: what frames are resized by.
        roi: region of interest, LEFT,TOP,WIDTH,HEIGHT, or `none`.
        mask: a picture of what is never judged, or `none`.

    Raises:
        ConfigError: settings that cannot be, or that mean nothing without tiles.
    """
    own = model.spec.tiling
    others = [f"--{name}" for name, value in (("scale", scale), ("roi", roi), ("mask", mask)) if value is not None]
    if tiles == NONE or (tiles is None and own is None):
        if others:
            raise ConfigError(
                f"{', '.join(others)} without tiles; give --tiles OVERLAP too (0 for tiles that do not overlap; with a "
                "scale at which the region is as large as one tile there is one)"
            )
        return None, None
    given = {} if own is None else own.model_dump()
    given |= {} if tiles is None else {"overlap": tiles}
    given |= {} if scale is None else {"scale": scale}
    given |= {} if roi is None else {"roi": None if roi == NONE else roi}
    hidden = model.mask if mask is None else None if str(mask) == NONE else draw_mask(mask)
    return parse(Tiling, given, "tiles"), hidden


def frame_of(frame: str | None, tiling: Tiling | None, mask: NDArray[np.bool_] | None) -> tuple[int, int] | None:
    """The frame size that was given as `HxW` or `any`, or the mask's.

    Raises:
        ConfigError: tiles, and nothing says of which frames.
        FrameError: no size.
    """
    if frame is not None:
        return parse_size(frame)
    if mask is not None:
        return mask.shape[0], mask.shape[1]
    if tiling is not None:
        raise ConfigError(
            "tiles of which frames? give --frame HEIGHTxWIDTH, so that a frame of another size is invalid, or "
            "--frame any to take any that is as large as a tile"
        )
    return None


def tiles_for_probes(
    good: GoodParts | None, frames: ParityFrames, tiler: Tiler
) -> tuple[GoodParts | None, ParityFrames]:
    """A tile of each of some good parts, with its class, or of the parity frames that are not known to be defective."""
    if good is None:
        normal = frames.frames if frames.labels is None else frames.frames[frames.labels == 0]
        return None, parity_tiles(ParityFrames(normal, frames.source), tiler)
    index = sorted({i * len(good) // _PARTS for i in range(_PARTS)})
    tiles = []
    for place, i in enumerate(index):
        frame = good.frames[i]
        cut = tiler.grid(*frame.shape[:2]).cut(frame)
        tiles.append(cut[place * len(cut) // len(index)])
    return GoodParts(tiles, [good.classes[i] for i in index], [good.labels[i] for i in index]), frames


def in_words(manifest: Manifest, mask: NDArray[np.bool_] | None) -> list[str]:
    """What a manifest says of tiles, one line each; nothing for whole frames."""
    tiling, size = manifest.tiling, manifest.model.image.size
    if tiling is None:
        return []
    lines = [f"tiles: {settings_in_words(tiling)}"]
    if manifest.frame_size is None:
        lines.append(f"tiles: {size}x{size} pixels, of frames of any size that is as large as one")
    else:
        height, width = manifest.frame_size
        grid = Tiler(tiling, size, mask).grid(height, width)
        lines.append(f"tiles: {len(grid)} of {size}x{size} pixels per frame of {height}x{width} (height x width)")
    if mask is not None:
        lines.append(f"mask: {mask.mean():.1%} of the frame is never judged")
    return lines
