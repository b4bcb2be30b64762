"""Which parts a measurement rests on: good parts split into statistics and held-out ones, and labelled parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flowad_fast.data.images import find_images
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.samples import Sample
from flowad_fast.errors import ConfigError
from flowad_fast.files import digest, sha256
from flowad_fast.shipped import PHOTOS


@dataclass(frozen=True)
class Parts:
    """Image files with the class (of the model, "" for unconditional ones) and label (1 = defective) of each."""

    paths: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, places: Sequence[int]) -> "Parts":
        """Some of them, in the order given."""
        paths, classes, labels = self.paths, self.classes, self.labels
        return Parts(
            tuple(paths[i] for i in places), tuple(classes[i] for i in places), tuple(labels[i] for i in places)
        )

    def contents(self) -> tuple[str, ...]:
        """SHA-256 of each file."""
        return tuple(sha256(path) for path in self.paths)


def good_parts(source: str, class_names: Sequence[str]) -> Parts:
    """Good parts: a folder of images, for conditional models one of them per class, or a name of
    `shipped.PHOTOS`, which stands for their training split.

    Raises:
        ConfigError: no folder of one of the model's classes.
        FrameError: no images.
    """
    if source in PHOTOS:
        found = [(name, sample.path) for name, sample in _cells(source, "train", class_names)]
    else:
        found = [(name, path) for name, root in _of_classes(Path(source), class_names) for path in find_images(root)]
    return Parts(tuple(path for _, path in found), tuple(name for name, _ in found), (0,) * len(found))


def labelled_parts(source: str, class_names: Sequence[str]) -> Parts:
    """Good and defective parts: `good` beside folders of defects (for conditional models in one folder per class).

    Raises:
        ConfigError: good or defective parts are missing.
    """
    if source in PHOTOS:
        found = _cells(source, "test", class_names)
    else:
        roots = _of_classes(Path(source), class_names)
        found = [(name, sample) for name, root in roots for sample in read_dataset("folder", root).samples]
    for name in dict.fromkeys(name for name, _ in found):
        if len({sample.label for of, sample in found if of == name}) < 2:
            raise ConfigError(f"{source}: {name or 'the folder'} has no defective parts; expected some beside good")
    return Parts(
        tuple(sample.path for _, sample in found),
        tuple(name for name, _ in found),
        tuple(int(sample.label) for _, sample in found),
    )


def _cells(source: str, split: Literal["train", "test"], class_names: Sequence[str]) -> list[tuple[str, Sample]]:
    samples = read_dataset(PHOTOS[source], None).select(split)
    kinds = list(dict.fromkeys(sample.category for sample in samples))
    if set(kinds) - set(class_names) if class_names else len(kinds) > 1:
        has = ", ".join(class_names) or "none"
        raise ConfigError(f"{source}: cells of {', '.join(kinds)}, and the model's classes are: {has}")
    return [(sample.category if class_names else "", sample) for sample in samples]


def split(parts: Parts, limit: int, seed: int) -> tuple[Parts, Parts]:
    """Statistics and held-out parts: of each class a half each, at random, at most `limit` of each sort.

    Raises:
        ConfigError: fewer than four good parts of a class.
    """
    random = np.random.RandomState(seed)
    statistics: list[int] = []
    held: list[int] = []
    for name in dict.fromkeys(parts.classes):
        places = [i for i, of in enumerate(parts.classes) if of == name]
        if len(places) < 4:
            raise ConfigError(f"{len(places)} good parts of {name or 'the product'}, expected at least 4; give more")
        drawn = [places[i] for i in random.permutation(len(places))]
        half = len(drawn) // 2
        statistics.extend(sorted(drawn[:half][:limit]))
        held.extend(sorted(drawn[half:][:limit]))
    return parts.take(statistics), parts.take(held)


def contents_of(good: Parts, labelled: Parts | None) -> str:
    """One SHA-256 of everything that was given.

    Raises:
        ConfigError: a labelled part is one of the good parts, which would make the comparison worthless.
    """
    ours, theirs = good.contents(), labelled.contents() if labelled else ()
    both = set(ours) & set(theirs)
    if labelled and both:
        shared = labelled.paths[next(i for i, one in enumerate(theirs) if one in both)]
        raise ConfigError(f"{shared}: labelled parts must not be among the good parts, {len(both)} are; take them out")
    rows = [(c, n, v) for p, c_ in ((good, ours), (labelled, theirs)) if p
            for c, n, v in zip(c_, p.classes, p.labels, strict=True)]  # fmt: skip
    return digest(rows)


def _of_classes(root: Path, class_names: Sequence[str]) -> list[tuple[str, Path]]:
    if not class_names:
        return [("", root)]
    found = [(name, root / name) for name in class_names if (root / name).is_dir()]
    if not found:
        raise ConfigError(f"{root}: the model is conditional; expected one folder per class: {', '.join(class_names)}")
    return found
