"""Fixed masks: pictures of what is never judged, as a person draws them and as a bundle keeps them. Needs no torch."""

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowad_fast.bundle import Manifest, Mask, verify_file
from flowad_fast.errors import BundleError, ConfigError
from flowad_fast.files import replacing

_FORMATS = ("PNG", "BMP", "TIFF", "PPM")
"""Without losses: a JPEG has grey around its lines."""
_BROKEN = (OSError, SyntaxError, ValueError, EOFError)


def draw_mask(path: str | Path) -> NDArray[np.bool_]:
    """The mask in a picture of the frame's size, (H, W): True where it is not black, which is never judged.

    Raises:
        ConfigError: no such picture, one of a lossy format, or one that marks nothing or everything.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            found = np.asarray(image.convert("L")) > 0
    except _BROKEN as error:
        raise ConfigError(
            f"{path}: is no mask ({error}); expected a PNG, white where nothing is to be judged"
        ) from None
    if found.all() or not found.any():
        what = "everything" if found.all() else "nothing"
        raise ConfigError(f"{path}: marks {what}; draw what is never to be judged in white, the rest in black")
    return found


def read_mask(folder: Path, manifest: Manifest) -> NDArray[np.bool_] | None:
    """The fixed mask of a bundle, (H, W), True where nothing is judged; None without one. The hash is checked.

    Raises:
        BundleError: the file is missing, altered, no picture, or of another size than the frames.
    """
    if manifest.mask is None:
        return None
    path = verify_file(folder, manifest.mask.file, manifest.mask.sha256)
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = np.asarray(image.convert("L")) > 0
    except _BROKEN as error:
        raise BundleError(f"{path}: is no PNG ({error}); export the bundle again") from None
    if found.shape != manifest.frame_size:
        raise BundleError(f"{path}: is {found.shape}, the frames are {manifest.frame_size}; export the bundle again")
    return found


def write_mask(folder: Path, pixels: NDArray[np.bool_]) -> Mask:
    """Write a fixed mask (H, W) beside a bundle's files; returns what a manifest says of it."""
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "PNG")
    digest = hashlib.sha256(picture.getvalue()).hexdigest()
    name = f"mask-{digest[:12]}.png"
    with replacing(folder / name) as file:
        file.write(picture.getvalue())
    return Mask(file=name, sha256=digest)
