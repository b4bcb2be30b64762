"""Anomaly maps drawn over their frames."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flowad_fast.stages.regions import Region

_COLOURS = np.frombuffer(
    bytes.fromhex(
        "30123b 4143a7 4771e9 3e9bfe 22c5e2 1ae4b6 46f884 88ff4eb9f635 e1dd37 faba39 fd8d27 f05b12 d63506 af1801 7a0403"
    ),
    np.uint8,
).reshape(-1, 3)
"""Dark blue over green to dark red at even distances (the map known as turbo), linear between them."""
_OPACITY = 0.65
"""Share of the heat colour where the heat is greatest; the part stays recognisable below it."""
_STRIP = 1 << 18
"""Pixels that are drawn at once."""
_LINE = 1 / 400
"""Width of a contour's line, of the frame's shorter side."""


def heat_range(maps: NDArray[np.float32], threshold: float | None = None) -> tuple[float, float]:
    """`vmin` and `vmax` for overlays that are to be compared, from the values of typical maps of one model and class.

    No heat at the median. With the threshold of a map's maximum, the colour's middle is the threshold, so that heat
    means the same on good and bad parts; without one, most heat is the largest value among the given maps.
    """
    low = float(np.median(maps))
    high = float(maps.max()) if threshold is None else 2 * threshold - low
    return (low, high) if high > low else (low, low + 1)  # constant maps: nothing to show


_Value = TypeVar("_Value", bound=np.generic)


def resized(map: NDArray[_Value], size: tuple[int, int], nearest: bool = False) -> NDArray[_Value]:
    """A map (h, w) at another height and width, bilinear, or by nearest neighbour: numbers and yes or no."""
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    image = Image.fromarray(map.astype(np.float32)).resize(size[::-1], method)
    return np.asarray(image).astype(map.dtype)


def overlay(
    frame: NDArray[np.uint8], map: NDArray[np.float32], vmin: float, vmax: float, regions: Sequence[Region] = ()
) -> NDArray[np.uint8]:
    """The RGB frame (H, W, 3) uint8 with the map (h, w) as heat: none at `vmin` and below, most at `vmax` and above.

    Images that are to be compared need the same `vmin` and `vmax`. The map is resized bilinearly to the frame.
    The contours of `regions` are drawn white on black.

    Raises:
        ValueError: `vmax` is not above `vmin`.
    """
    if not vmax > vmin:
        raise ValueError(f"got vmin {vmin} and vmax {vmax}, expected vmax > vmin; a constant map has nothing to show")
    height, width, _ = frame.shape
    large = resized(np.asarray(map, np.float32), (height, width))
    places = np.linspace(0, 1, len(_COLOURS))
    drawn = np.empty_like(frame)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):  # in strips: a float64 copy of a large frame is eight times its size
        strip = slice(top, top + rows)
        heat = np.clip((large[strip] - vmin) / (vmax - vmin), 0, 1)
        colour = np.stack([np.interp(heat, places, channel) for channel in _COLOURS.T], axis=-1)
        opacity = _OPACITY * heat[..., None]
        drawn[strip] = np.rint(frame[strip] * (1 - opacity) + colour * opacity)
    return contours(drawn, regions) if regions else drawn


def contours(frame: NDArray[np.uint8], regions: Sequence[Region]) -> NDArray[np.uint8]:
    """The RGB frame (H, W, 3) uint8 with the regions' contours as white lines on black ones."""
    height, width, _ = frame.shape
    image = Image.fromarray(frame)
    draw = ImageDraw.Draw(image)
    line = max(1, round(_LINE * min(height, width)))
    for colour, thickness in (("black", 3 * line), ("white", line)):
        for region in regions:
            # Contours run between pixels; the one at the frame's end has no pixel behind it.
            corners = [(min(x, width - 1), min(y, height - 1)) for x, y in region.contour]
            draw.line([*corners, *corners[:1]], fill=colour, width=thickness)
    return np.array(image)
