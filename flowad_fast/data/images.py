"""Image files as frames. What a file holds is either converted in a declared way or refused, never guessed."""

import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from flowad_fast.data.walk import SUFFIXES, Photos, find_photos
from flowad_fast.errors import ConfigError, FrameError, nearest
from flowad_fast.files import sha256

# Others are left to nobody: some of Pillow's readers (EPS) start external programs.
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "JPEG2000", "PCX", "SGI", "AVIF")
_MODES = ("L", "RGB", "P", "RGBA", "LA", "PA")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, KeyError, IndexError, TypeError, OverflowError)
"""What Pillow's readers raise on damaged files."""
_MP_ENTRIES = 0xB002
"""Tag of the list of pictures in the index of an MPO file."""
_DEEP = re.compile(r"\b(?!BGR)[A-Za-z]+;16")
"""A raw mode of 16 bits per channel; `BGR;16` is 5+6+5 bits of a BMP."""


@dataclass(frozen=True)
class Stamp:
    """Which content a file has: size in bytes, time of change, and the first 16 hex digits of its SHA-256."""

    size: int
    mtime_ns: int
    sha256: str


def stamp(path: Path) -> Stamp | None:
    """The content of a file; None where there is no plain file that can be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            return None
        return Stamp(status.st_size, status.st_mtime_ns, sha256(path)[:16])
    except (OSError, ValueError):
        return None


def read_stamped(path: Path) -> tuple[NDArray[np.uint8] | FrameError, Stamp | None]:
    """The frame at `path`, or why there is none, and the content that this is true of (None: it could not be read)."""
    before, found = _version(path), stamp(path)
    frame: NDArray[np.uint8] | FrameError
    try:
        frame = read_frame(path)
    except FrameError as error:
        frame = error
    if _version(path) != before:
        return FrameError(f"{path}: changed while it was read; run again when it is complete"), None
    return frame, found


def _version(path: Path) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def frame_bytes(path: Path) -> int:
    """How much memory the frame at `path` takes, as its header says; 0 where none can be read."""
    try:
        if not path.is_file():
            return 0
        with Image.open(path, formats=_FORMATS) as image:
            return 3 * image.width * image.height
    except (*_BROKEN, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return 0


def frame_size(path: Path) -> tuple[int, int]:
    """Height and width of the frame that `read_frame` gives of a file, from its header.

    Raises:
        FrameError: no header can be read.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except (*_BROKEN, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FrameError(f"{path}: cannot be read ({error}); expected a photo") from None


def read_frame(path: str | Path, channels: Literal["rgb", "bgr"] = "rgb") -> NDArray[np.uint8]:
    """The image file at `path` as a frame (H, W, 3), uint8, with its channels in the order `channels`.

    Declared conversions: 8-bit grey is replicated to three channels, a palette is looked up, an alpha channel that is
    opaque everywhere is dropped, and an EXIF orientation is applied.

    Raises:
        FrameError: the file is missing, empty, damaged, not an image, larger than Pillow's decompression-bomb limit,
            or holds several pages, 16-bit, floating-point, 1-bit, CMYK or see-through pixels.
        ConfigError: `channels` is neither "rgb" nor "bgr".
    """
    if channels not in ("rgb", "bgr"):
        raise ConfigError(f"unknown channel order {channels!r}; {nearest(channels, ('rgb', 'bgr'))}")
    path = Path(path)
    image, deep = _load(path)
    if deep or image.mode not in _MODES:
        raise FrameError(
            f"{path}: found pixels of mode {image.mode}{' with 16 bits per channel' if deep else ''}, expected 8-bit "
            "grey or RGB; convert the file first, by a known range (12- or 16-bit cameras) or colour profile (CMYK)"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest, _ = image.getchannel("A").getextrema()
        if lowest != 255:
            raise FrameError(
                f"{path}: found see-through pixels (alpha down to {lowest}), expected an opaque image; "
                "flatten it onto its true background first"
            )
    frame = np.array(image.convert("RGB"))
    return frame if channels == "rgb" else np.ascontiguousarray(frame[..., ::-1])


def find_images(folder: str | Path) -> list[Path]:
    """All image files under `folder`, at any depth, sorted by path; see `walk.find_photos`.

    Raises:
        FrameError: the folder is missing, holds no photo, or a folder in it cannot be looked into.
    """
    photos = find_photos(Path(folder))
    if photos.problems:
        place, reason = photos.problems[0]
        raise FrameError(f"{place}: {reason}")
    if not photos.paths:
        raise no_images(folder, photos)
    return list(photos.paths)


def no_images(folder: str | Path, photos: Photos) -> FrameError:
    """The error of a folder in which no photo was found."""
    also = f"; {photos.left_out()}" if photos.others else ""
    return FrameError(f"{folder}: no image files found; expected names ending in {' '.join(SUFFIXES)}{also}")


def read_mask(
    path: str | Path, size: int | tuple[int, int], frame_shape: tuple[int, ...] | None = None
) -> NDArray[np.bool_]:
    """The defect mask at `path`, resized by nearest neighbour; any value above 0 is defect.

    For palette files the index counts, not its colour; an alpha channel is ignored.

    Args:
        path: the mask's file.
        size: side of the result, or its height and width.
        frame_shape: (H, W, ...) of the frame that it belongs to; the mask must have its sides' proportion, to a pixel.

    Raises:
        FrameError: the file cannot be read, or does not fit the frame.
    """
    image, _ = _load(Path(path))
    if frame_shape is not None:
        (height, width), (h, w) = frame_shape[:2], image.size[::-1]
        if abs(h * width - w * height) > max(width, height, w, h):
            raise FrameError(
                f"{path}: the mask is {w}x{h} pixels, its image {width}x{height} (upright, as its EXIF orientation "
                "says); draw the mask on the upright image"
            )
    rows, columns = (size, size) if isinstance(size, int) else size
    values = np.asarray(image.resize((columns, rows), Image.Resampling.NEAREST))
    if values.ndim == 3:
        colours = len([band for band in image.getbands() if band not in "Aa"])
        return np.asarray(values[..., :colours].any(-1), np.bool_)
    return values > 0


def _load(path: Path) -> tuple[Image.Image, bool]:
    """The decoded, upright, single-page image at `path`, and whether its colours had 16 bits; or a FrameError."""
    try:
        if not path.is_file():
            leads = " (a link that leads nowhere)" if path.is_symlink() else ""
            raise FrameError(f"{path}: no such file{leads}; check the path")
        if path.stat().st_size == 0:
            raise FrameError(f"{path}: found an empty file (0 bytes), expected an image; copy it again")
        path.open("rb").close()
    except OSError as error:
        raise FrameError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from None
    try:
        opened = Image.open(path, formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        with path.open("rb") as file:
            start = file.read(24)
        raise FrameError(
            f"{path}: found a file starting with {start!r}, expected a {', '.join(_FORMATS)} image; "
            "convert or download it again"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FrameError(f"{path}: {error}; expected a camera frame, crop or shrink it") from error
    except _BROKEN as error:
        raise FrameError(f"{path}: found a damaged image ({error}); copy or export it again") from error
    with opened:
        limit = Image.MAX_IMAGE_PIXELS
        # Between the limit and twice the limit Pillow only warns; turning warnings into errors is not thread-safe.
        if limit is not None and opened.width * opened.height > limit:
            raise FrameError(
                f"{path}: found {opened.width}×{opened.height} pixels, expected at most {limit} (decompression bomb?); "
                "crop or shrink it"
            )
        # Pillow reads 16-bit colour as 8-bit RGB without a word; only the raw mode tells, and loading discards it.
        deep = any(_DEEP.search(repr(tile)) for tile in opened.tile)
        try:
            pages = 1 if _only_previews(opened) else getattr(opened, "n_frames", 1)
            if pages == 1:
                image = ImageOps.exif_transpose(opened)
        except _BROKEN as error:
            raise FrameError(f"{path}: found a damaged image ({error}); copy or export it again") from error
        if pages != 1:
            how = "ImageMagick: magick FILE part.png" if opened.format != "MPO" else "exiftool -b -MPImage2 FILE"
            raise FrameError(
                f"{path}: found {pages} pages ({opened.format}), expected one image; split it into single files ({how})"
            )
        return image, deep


def _only_previews(image: Image.Image) -> bool:
    """Whether a JPEG with several pictures (MPO) holds one photo, the others being its previews or gain maps."""
    if image.format != "MPO":
        return False
    entries = getattr(image, "mpinfo", {}).get(_MP_ENTRIES, [])
    kinds = [str(entry["Attribute"]["MPType"]) for entry in entries[1:]]
    return not any(kind.startswith(("Multi-Frame", "Baseline")) for kind in kinds)
