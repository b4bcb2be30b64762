"""Pixels of industrial cameras (PFNC names) as uint8 RGB."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from flowad_fast.errors import FrameError

PixelFormat = Literal[
    "Mono8", "Mono10", "Mono12", "Mono16", "BayerRG8", "BayerGR8", "BayerGB8", "BayerBG8", "RGB8"
]  # fmt: skip
FORMATS: tuple[PixelFormat, ...] = get_args(PixelFormat)


@dataclass(frozen=True)
class _Layout:
    """How a format lies in memory; `code` is its number in the GenICam Pixel Format Naming Convention 2.4."""

    code: int
    bits: int = 8
    channels: int = 1
    bayer: str = ""


_LAYOUTS: dict[PixelFormat, _Layout] = {
    "Mono8": _Layout(0x01080001),
    "Mono10": _Layout(0x01100003, bits=10),
    "Mono12": _Layout(0x01100005, bits=12),
    "Mono16": _Layout(0x01100007, bits=16),
    "BayerGR8": _Layout(0x01080008, bayer="GR"),
    "BayerRG8": _Layout(0x01080009, bayer="RG"),
    "BayerGB8": _Layout(0x0108000A, bayer="GB"),
    "BayerBG8": _Layout(0x0108000B, bayer="BG"),
    "RGB8": _Layout(0x02180014, channels=3),
}


def code(name: PixelFormat) -> int:
    """A format's number, as buffers carry it."""
    return _LAYOUTS[name].code


def refusal(name: str) -> str:
    """Why a format cannot be used, with the remedy; "" for those that can."""
    if name in FORMATS:
        return ""
    plain = name.removesuffix("Packed").removesuffix("p")
    why, instead = "", ", ".join(FORMATS)
    if plain != name:
        why = ", whose pixels are packed"
        instead = f"{plain}, or its 8 bits" if plain in FORMATS else instead
    return f"got the pixel format {name}{why}; choose one that the camera has of: {instead}"


def to_rgb(data: bytes, name: PixelFormat, height: int, width: int) -> NDArray[np.uint8]:
    """A camera's buffer as uint8 (H, W, 3) RGB, an array of its own.

    10, 12 and 16 bits lose their lowest ones; nothing is stretched, for a threshold belongs to a brightness. Bayer
    patterns are interpolated bilinearly; at the edges the picture is mirrored.

    Raises:
        FrameError: fewer bytes than the format needs, or values that it cannot have.
    """
    layout = _LAYOUTS[name]
    needed = height * width * layout.channels * (1 if layout.bits == 8 else 2)
    if len(data) < needed or not needed:
        raise FrameError(f"got {len(data)} bytes, expected {needed} for {name} of {height}x{width}; check the region")
    count = height * width * layout.channels
    if layout.bits == 8:
        flat = np.frombuffer(data, np.uint8, count)
    else:
        words = np.frombuffer(data, np.dtype("<u2"), count).astype(np.uint16)
        if (most := int(words.max())) >> layout.bits:
            raise FrameError(
                f"got a value of {most} in {name}, expected at most {(1 << layout.bits) - 1}; the camera aligns its "
                "bits otherwise: choose Mono16 or Mono8"
            )
        flat = (words >> (layout.bits - 8)).astype(np.uint8)
    if layout.channels == 3:
        return flat.reshape(height, width, 3).copy()
    grey = flat.reshape(height, width)
    return demosaic(grey, layout.bayer) if layout.bayer else np.repeat(grey[..., None], 3, axis=2)


def demosaic(raw: NDArray[np.uint8], pattern: str) -> NDArray[np.uint8]:
    """A Bayer mosaic (H, W) as RGB (H, W, 3): every missing colour is the mean of its two or four nearest.

    Args:
        raw: at least 2x2 pixels.
        pattern: colours of the first two pixels of the first row: RG, GR, GB or BG.
    """
    height, width = raw.shape
    if min(height, width) < 2:
        raise FrameError(f"got a Bayer frame of {height}x{width}, expected at least 2x2; check the region")
    padded = np.pad(raw, 1, mode="reflect").astype(np.uint16)  # mirrored around the edge pixel: colours stay in place
    rgb = np.empty((height, width, 3), np.uint8)
    # Row and column of the red pixel in each 2x2 cell; the blue one is opposite.
    red = {"RG": (0, 0), "GR": (0, 1), "GB": (1, 0), "BG": (1, 1)}[pattern]
    for y in (0, 1):
        for x in (0, 1):

            def at(dy: int, dx: int, y: int = y, x: int = x) -> NDArray[np.uint16]:
                top, left = 1 + y + dy, 1 + x + dx
                return padded[top : top + height - y : 2, left : left + width - x : 2]

            cell, own = rgb[y::2, x::2], raw[y::2, x::2]
            beside = (at(0, -1) + at(0, 1) + 1) >> 1
            above = (at(-1, 0) + at(1, 0) + 1) >> 1
            if (y == red[0]) != (x == red[1]):  # green: red and blue are beside and above, or the other way round
                cell[..., 1] = own
                cell[..., 0], cell[..., 2] = (beside, above) if y == red[0] else (above, beside)
                continue
            corners = (at(-1, -1) + at(-1, 1) + at(1, -1) + at(1, 1) + 2) >> 2
            cell[..., 1] = (at(0, -1) + at(0, 1) + at(-1, 0) + at(1, 0) + 2) >> 2
            is_red = (y, x) == red
            cell[..., 0], cell[..., 2] = (own, corners) if is_red else (corners, own)
    return rgb
