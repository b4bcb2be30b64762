"""What a line is measured with: a bundle, and pictures whose scores the bare detector has given before."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowad_fast.bundle import read, write_manifest
from flowad_fast.detector import load
from flowad_fast.errors import ConfigError
from flowad_fast.stages.decision import Calibration, ClassCalibration, PixelThreshold

PICTURES = 24
"""Different pictures; the same one comes again only after the others, for two in a row are a frozen camera."""


@dataclass(frozen=True)
class Work:
    """A bundle with a threshold that divides the pictures.

    Attributes:
        bundle: its folder; a copy, which may be altered.
        name: what records call it.
        pictures: files of the pictures, in order.
        frames: the same (N, H, W, 3) uint8.
        scores: of each, by the bare detector, one frame a call.
        threshold: above which a part is anomalous.
    """

    bundle: Path
    name: str
    pictures: tuple[Path, ...]
    frames: NDArray[np.uint8]
    scores: tuple[float, ...]
    threshold: float

    @property
    def anomalous(self) -> tuple[bool, ...]:
        """Of each picture, what the line must find."""
        return tuple(score > self.threshold for score in self.scores)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.frames.shape[1], self.frames.shape[2]


def prepare(folder: Path, bundle: Path | None, seed: int, tell: Callable[[str], None]) -> Work:
    """Copy (or export) a bundle into `folder`, draw the pictures, judge them with the bare detector, and set its limit.

    Args:
        folder: where everything is put.
        bundle: an exported bundle of one product for a CPU; None exports the demo model for ONNX Runtime.
        seed: of the pictures.
        tell: hears what is done.

    Raises:
        FlowADError: the bundle is broken, judges several products, or gives all pictures one score.
    """
    target = folder / "bundles" / "running"
    if bundle is None:
        tell("exporting the demo model")
        _export(target)
        name = "demo, onnxruntime"
    else:
        source, _ = read(bundle)
        shutil.copytree(source, target)
        name = bundle.name
    _, manifest = read(target)
    if manifest.model.classes.conditional:
        raise ConfigError(f"{bundle}: judges several products, expected a bundle of one")
    side = manifest.model.image.size
    frames = draw(PICTURES, *(manifest.frame_size or (side, side)), seed)
    tell("judging the pictures with the bare detector")
    detector = load(target, device="cpu", threads=1)
    found = [detector(frame[None]) for frame in frames]
    scores = tuple(float(one.raw_score[0]) for one in found)
    threshold = divide(scores)
    highest = [float(one.map.max()) for one, score in zip(found, scores, strict=True) if score <= threshold]
    pixels = PixelThreshold(threshold=max(highest), parts=len(highest))  # so that anomalous parts have regions
    limit = ClassCalibration(threshold=threshold, parts=len(scores), pixels=pixels)
    limits = Calibration(alpha=0.05, classes={"": limit})
    write_manifest(target, manifest.model_copy(update={"calibration": limits}))
    (folder / "pictures").mkdir()
    paths = tuple(folder / "pictures" / f"{i:02d}.png" for i in range(len(frames)))
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path, compress_level=1)
    return Work(target, name, paths, frames, scores, threshold)


def draw(count: int, height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Pictures (count, height, width, 3): a gradient with grain, every second one with a bright spot."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    frames = []
    for i in range(count):
        base = 60 + 80 * (x / width) + 40 * (y / height) + random.normal(0, 6, (height, width))
        if i % 2:
            at = random.uniform(0.2, 0.8, 2) * (height, width)
            base += 140 * np.exp(-((y - at[0]) ** 2 + (x - at[1]) ** 2) / (2 * (min(height, width) / 12) ** 2))
        frames.append(np.clip(base[..., None] + random.uniform(-20, 20, 3), 0, 255))
    return np.stack(frames).astype(np.uint8)


def divide(scores: tuple[float, ...]) -> float:
    """A threshold in the widest gap of the middle half of the scores, so that rounding changes no verdict."""
    ordered = np.sort(scores)
    low, high = len(ordered) // 4, len(ordered) - len(ordered) // 4
    gaps = np.diff(ordered[low:high])
    place = low + int(np.argmax(gaps))
    if gaps.max() <= 1e-3 * max(abs(float(ordered[place])), 1e-9):
        raise ConfigError("the bundle gives all pictures nearly one score, so no verdict could be checked; try another")
    return float(ordered[place] + ordered[place + 1]) / 2


def _export(target: Path) -> None:
    from flowad_fast.checkpoints.load import DEMO, load_checkpoint
    from flowad_fast.export.exporter import export_bundle
    from flowad_fast.stages.scorers import Inversion

    model = load_checkpoint(DEMO)
    side = model.spec.image.size
    export_bundle(
        model, Inversion(), target, formats=("onnx",), frames=draw(4, side, side, 0), device="cpu", quiet=True
    )
