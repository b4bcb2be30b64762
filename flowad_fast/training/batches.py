"""What a training step sees: which images in which flip variants, and their features, computed or cached."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from flowad_fast.config import ImageConfig
from flowad_fast.data.images import frame_size, read_frame
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.errors import ConfigError, FrameError, nearest
from flowad_fast.files import digest, make_folder, replacing
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.stages.image import normalise
from flowad_fast.stages.tiling import Tiler
from flowad_fast.training.config import FLIPS, TrainConfig

Progress = Callable[[str, int, int, float | None], object]
"""Called as progress(stage, done, total, loss) with stage "features" (images) or "training" (steps)."""


def training_samples(config: TrainConfig, dataset: Dataset) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    """The categories in class order and their good training images.

    Raises:
        ConfigError: an unknown category, or one without good training images.
    """
    chosen = tuple(dict.fromkeys(config.categories or dataset.categories))
    samples: list[Sample] = []
    for category in chosen:
        if category not in dataset.categories:
            raise ConfigError(f"no category {category!r} in {dataset.name}; {nearest(category, dataset.categories)}")
        found = dataset.select("train", category, 0)
        if not found:
            raise ConfigError(f"category {category!r} of {dataset.name} has no good training images")
        samples += found
    if not samples:
        raise ConfigError(f"{dataset.name} has no images; check the data folder")
    return chosen, tuple(samples)


def training_images(paths: Sequence[Path], tiler: Tiler | None) -> tuple[tuple[int, int], ...]:
    """What is trained on: photo and tile of each image. Without tiles every photo is one, as tile 0.

    Raises:
        FrameError: a photo that cannot be read or cut.
    """
    if tiler is None:
        return tuple((photo, 0) for photo in range(len(paths)))
    images: list[tuple[int, int]] = []
    for photo, path in enumerate(paths):
        size = frame_size(path)
        try:
            images += [(photo, tile) for tile in range(len(tiler.grid(*size)))]
        except FrameError as error:
            raise FrameError(f"{path}: {error}") from None
    return tuple(images)


def draw_batch(config: TrainConfig, images: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Image indices and flip variants (batch_size,) of a step: every epoch is one permutation of all images."""
    epochs, places = np.divmod(np.arange(step * config.batch_size, (step + 1) * config.batch_size), images)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        order = np.random.RandomState(seed_of(config.seed, 1, int(epoch))).permutation(images)
        indices[epochs == epoch] = order[places[epochs == epoch]]
    variants = np.random.RandomState(seed_of(config.seed, 2, step)).randint(0, len(FLIPS[config.flips]), len(indices))
    return indices, variants


def seed_of(*numbers: int) -> int:
    """A 32-bit seed that mixes all numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class FeatureSource(Protocol):
    """Raw (not normalised) features of training images, in a part for a reading thread and a part for the device."""

    images: int

    def load(self, indices: np.ndarray, variants: np.ndarray) -> Tensor:
        """What the features of these images (B,) in these flip variants (B,) need, on the CPU; any thread."""

    def finish(self, loaded: Tensor) -> Tensor:
        """Features (B, h*w, C) float32 on the device, from what `load` gave."""


class DirectFeatures:
    """Features computed from the image files whenever they are asked for.

    With a `tiler` the images are the tiles of photos; a photo is decoded once for all of its tiles in a batch.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        paths: Sequence[Path],
        config: TrainConfig,
        image: ImageConfig | None = None,
        tiler: Tiler | None = None,
    ) -> None:
        self.extractor, self.paths, self.tiler = extractor, paths, tiler
        self.places = training_images(paths, tiler)
        self.images = len(self.places)
        self.image, self.variants = image or config.image(), FLIPS[config.flips]
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="flowad-read")
        self._last: tuple[int, np.ndarray] | None = None
        """A photo and its tiles: a cache of features asks for one photo after the other."""

    def read(self, photo: int, tiles: Sequence[int]) -> Tensor:
        """The backbone's input (k, 3, size, size) for k tiles of one photo."""
        last = self._last
        if last is None or last[0] != photo:
            frame = read_frame(self.paths[photo])
            images = frame[None] if self.tiler is None else self.tiler.grid(*frame.shape[:2]).cut(frame)
            last = (photo, images)
            if self.tiler is not None:
                self._last = last
        each = sorted(set(tiles))
        return normalise(torch.from_numpy(last[1][each]), self.image)[[each.index(tile) for tile in tiles]]

    def load(self, indices: np.ndarray, variants: np.ndarray) -> Tensor:
        """Images (B, 3, size, size), flipped."""
        wanted: dict[int, list[int]] = {}
        for row, index in enumerate(indices.tolist()):
            wanted.setdefault(self.places[index][0], []).append(row)
        tiles = [[self.places[indices[row]][1] for row in rows] for rows in wanted.values()]
        found: dict[int, Tensor] = {}
        for rows, images in zip(wanted.values(), self.pool.map(self.read, wanted, tiles), strict=True):
            found |= dict(zip(rows, images, strict=True))
        return torch.stack([found[row].flip(self.variants[v]) for row, v in enumerate(variants.tolist())])

    @torch.no_grad()
    def finish(self, loaded: Tensor) -> Tensor:
        """Features of the images."""
        return self.extractor(loaded.to(self.extractor.mean.device))


class CachedFeatures:
    """Features (images, variants, h*w, C) float32 read from a memory-mapped file."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        self.array, self.device, self.images = array, device, len(array)

    def load(self, indices: np.ndarray, variants: np.ndarray) -> Tensor:
        """Features from disk."""
        return torch.from_numpy(self.array[indices, variants])

    def finish(self, loaded: Tensor) -> Tensor:
        """Features on the device."""
        return loaded.to(self.device)


def cached_features(
    direct: DirectFeatures, folder: Path, backbone_sha256: str, progress: Progress | None = None
) -> CachedFeatures:
    """The features of all images and flip variants as a file in `folder`, computed if it is not there yet.

    Its name is a hash of the photos (path, size, time of change), the backbone's weights, the image configuration and
    the tiles.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in direct.paths]
    cut = [] if direct.tiler is None else [direct.tiler.identity]
    key = digest([files, backbone_sha256, direct.image.model_dump(mode="json"), direct.variants, *cut])
    make_folder(folder)
    path = folder / f"features-{key[:20]}.npy"
    # Processes of one training, and other trainings, wait here for the one that computes.
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            with replacing(path) as file:
                _write_features(direct, folder, file, progress)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ConfigError(f"{path}: a damaged feature cache ({error}); delete it") from None
    return CachedFeatures(array, direct.extractor.mean.device)


def require_writable(folder: Path) -> None:
    """Make a folder, and refuse one in which no file can be made.

    Raises:
        ConfigError: it cannot be made, or nothing can be written there.
    """
    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error}); choose another folder") from None


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: {free / 2**30:.1f} GiB are free, the feature cache takes {needed / 2**30:.1f}; free space, "
            "choose another folder, use fewer flips, or leave the feature cache out"
        )


def _write_features(direct: DirectFeatures, folder: Path, file: BinaryIO, progress: Progress | None) -> None:
    for start in range(0, direct.images, 8):
        rows = np.arange(start, min(start + 8, direct.images))
        images = direct.load(rows, np.zeros_like(rows))
        block = torch.stack([direct.finish(images.flip(axes)) for axes in direct.variants], 1).cpu().numpy()
        if start == 0:
            _require_space(folder, direct.images * block[0].nbytes)
            shape = (direct.images, *block.shape[1:])
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        # Written in order rather than through a memory map: a full disk is then an error, not a bus error.
        file.write(block.astype("<f4").tobytes())
        if progress is not None:
            progress("features", int(rows[-1]) + 1, direct.images, None)


def feature_statistics(source: FeatureSource) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) float32 of each channel, over all images (not flipped) and locations."""
    total = square = torch.zeros(())
    count = 0
    for start in range(0, source.images, 8):
        rows = np.arange(start, min(start + 8, source.images))
        x = source.finish(source.load(rows, np.zeros_like(rows))).double().flatten(0, 1)
        total, square, count = total.to(x.device) + x.sum(0), square.to(x.device) + x.square().sum(0), count + len(x)
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    # A channel that never varies on good parts would magnify its first change without bound.
    return mean.float(), std.clamp_min(1e-4 * float(std.max())).float()
