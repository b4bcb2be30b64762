"""Readers of the folder layouts of public data sets; each gives a `Dataset` of samples without opening an image."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.data.walk import find_photos, folders, is_data, is_photo
from flowad_fast.errors import ConfigError, nearest

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")


def mvtec(root: Path | None) -> Dataset:
    """MVTec AD and MPDD: `<cat>/train/good`, `<cat>/test/{good,<defect>}`, and masks of the defective test images.

    The mask of `test/<defect>/<stem>.*` is `ground_truth/<defect>/<stem>_mask.*` (or `<stem>.*`).

    Raises:
        ConfigError: a folder, an image or a mask is missing, or a mask has no image.
    """
    root = _existing_root(root, "mvtec")
    categories = [folder for folder in folders(root) if any((folder / one).is_dir() for one in ("train", "test"))]
    if not (root / "train" / "good").is_dir():
        for folder in categories:
            _existing(folder / "train" / "good", f"the good training images of {folder.name}")
    categories = [folder for folder in categories if (folder / "train" / "good").is_dir()]
    if not categories:
        hint = f"give its parent {root.parent}" if (root / "train" / "good").is_dir() else "is this the right root?"
        raise ConfigError(f"{root}: no <category>/train/good folder found, expected the layout of MVTec AD; {hint}")
    samples = []
    for folder in categories:
        category = folder.name
        samples += [Sample(path, category, "train", 0) for path in _images(folder / "train" / "good")]
        kinds = list(folders(_existing(folder / "test", "the test images")))
        if not kinds:
            raise ConfigError(f"{folder / 'test'}: no folder of test images, expected good and one per kind of defect")
        for kind in kinds:
            if kind.name == "good":
                samples += [Sample(path, category, "test", 0) for path in _images(kind)]
                continue
            masks = _Masks(folder / "ground_truth" / kind.name)
            samples += [Sample(path, category, "test", 1, kind.name, masks.of(path)) for path in _images(kind)]
            masks.refuse_left()
        for kind in folders(folder / "ground_truth") if (folder / "ground_truth").is_dir() else ():
            _existing(folder / "test" / kind.name, f"the images of the masks in {kind}")
    return Dataset("mvtec", tuple(samples), has_masks=True)


def visa(root: Path | None) -> Dataset:
    """VisA: the split of `split_csv/1cls.csv`, whose paths (`<cat>/Data/Images/…`) are relative to `root`.

    Raises:
        ConfigError: the table, one of its columns, or a mask is missing, or a value is not one of VisA's.
    """
    root = _existing_root(root, "visa")
    table = root / "split_csv" / "1cls.csv"
    samples = []
    for line, row in _table(table, ("object", "split", "label", "image", "mask")):
        split = _one_of(row["split"], ("train", "test"), f"{line}: split")
        defective = _one_of(row["label"], ("normal", "anomaly"), f"{line}: label") == "anomaly"
        for column in ("object", "image"):
            if not row[column]:
                raise ConfigError(f"{line}: its {column} is empty; get the original table")
        path = _listed(root, row["image"])
        if not defective:
            samples.append(Sample(path, row["object"], split, 0))
        elif not row["mask"]:
            raise ConfigError(f"{line}: no mask for the defective image {path}; get the original 1cls.csv")
        else:
            mask = _existing(_listed(root, row["mask"]), f"the mask of {path}")
            samples.append(Sample(path, row["object"], split, 1, "anomaly", mask))
    for category in dict.fromkeys(sample.category for sample in samples):
        for wanted in SPLITS:
            if not any(sample.split == wanted for sample in samples if sample.category == category):
                raise ConfigError(f"{table}: no row of the split {wanted} for {category!r}; get the original table")
    return Dataset("visa", tuple(samples), has_masks=True)


def realiad(root: Path | None, lists: Path | None = None) -> Dataset:
    """Real-IAD: `<cat>.json` with train and test lists, images and masks under `<cat>/`, or `<cat>/<cat>/`.

    `lists` is the folder of the lists; None takes `realiad_jsons` below `root`.

    Raises:
        ConfigError: a list, a field or the mask of a defective image is missing, or a split of a category is empty.
    """
    root = _existing_root(root, "realiad")
    folder = lists or root / "realiad_jsons"
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is missing: the lists of Real-IAD, <category>.json; name their folder with --lists"
        )
    files = sorted(path for path in folder.glob("*.json") if is_data(path.name))
    if not files:
        raise ConfigError(f"{folder}: no <category>.json found; unpack the lists of Real-IAD there")
    samples: list[Sample] = []
    for file in files:
        images = root / file.stem
        images = images / file.stem if (images / file.stem).is_dir() else images
        try:
            listed = json.loads(_text(file))
            for split, rows in [(split, listed[split]) for split in SPLITS]:
                if not rows:
                    raise ConfigError(f"{file}: its {split} list is empty; get the original file")
                samples += _realiad_samples(images, split, rows)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}: {type(error).__name__}: {error}; expected train and test lists of image_path, mask_path and "
                "anomaly_class; get the original file"
            ) from error
    return Dataset("realiad", tuple(samples), has_masks=True)


def _realiad_samples(folder: Path, split: Literal["train", "test"], rows: Iterable[dict[str, Any]]) -> list[Sample]:
    samples = []
    for row in rows:
        path = folder / row["image_path"]
        if row["anomaly_class"] == "OK":
            samples.append(Sample(path, folder.name, split, 0))
        elif row["mask_path"] is None:
            raise ConfigError(f"{path}: class {row['anomaly_class']} without a mask_path; get the original list")
        else:
            mask = _existing(folder / row["mask_path"], f"the mask of {path}")
            samples.append(Sample(path, folder.name, split, 1, row["anomaly_class"], mask))
    return samples


def folder(root: Path | None) -> Dataset:
    """Plain folders of test images: `<root>/good` and `<root>/<defect>`…; one category, no pixel labels.

    The category is the name of `root`; images in deeper folders belong to the folder directly below `root`.

    Raises:
        ConfigError: there is no folder `good`, a folder holds no image, or an image lies in none of the folders.
    """
    root = _existing_root(root, "folder").resolve()
    _existing(root / "good", "test images of good parts (others go into folders of any other name)")
    samples = []
    if stray := find_photos(root, deep=False).paths:
        raise ConfigError(
            f"{stray[0]}: lies in no folder (with {len(stray) - 1} others); expected images of good parts in good and "
            "defective ones in a folder of any other name; move it"
        )
    for kind in folders(root):
        label: Literal[0, 1] = 0 if kind.name == "good" else 1
        samples += [Sample(path, root.name, "test", label, kind.name) for path in _images(kind, deep=True)]
    return Dataset("folder", tuple(samples), has_masks=False)


def elpv(root: Path | None = None, cell_type: Literal["mono", "poly"] = "mono") -> Dataset:
    """Electroluminescence photos of solar cells of one type, which is the category; no pixel labels.

    `root` holds `labels.csv` and `images/`; None takes the installed package `elpv-dataset`. Of the good cells
    (defect probability 0), in order of file name, of each ten the first seven are for training, the eighth for
    calibration, and the last two for testing. All defective cells (probability 1) are test images; cells that the
    experts were unsure of are left out.

    Raises:
        ConfigError: the package or a folder is missing, or the table is damaged.
    """
    _one_of(cell_type, ("mono", "poly"), "elpv: cell_type")
    if root is None:
        # Found without importing it: the data are all that is needed.
        spec = find_spec("elpv_dataset")
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError('the package elpv-dataset is not installed; run: pip install "flowad-fast[demo]"')
        root = Path(spec.submodule_search_locations[0]) / "data"
    root = _existing_root(root, "elpv")
    table = _existing(root / "labels.csv", "the labels of ELPV")
    cells: dict[str, list[Path]] = {"good": [], "defective": []}
    for number, line in enumerate(_text(table).splitlines(), start=1):
        fields = line.split()
        if len(fields) != 3:
            raise ConfigError(
                f"{table}:{number}: found {line!r}, expected path, probability and type; install it again"
            )
        name, probability, kind = fields
        if kind == cell_type and probability in ("0.0", "1.0"):
            cells["good" if probability == "0.0" else "defective"].append(root / name)
    splits: tuple[Literal["train", "calibration", "test"], ...] = (*("train",) * 7, "calibration", "test", "test")
    samples = [Sample(path, cell_type, splits[i % 10], 0) for i, path in enumerate(sorted(cells["good"]))]
    samples += [Sample(path, cell_type, "test", 1, "defective") for path in sorted(cells["defective"])]
    return Dataset("elpv", tuple(samples), has_masks=False)


def elpv_cells(root: Path | None = None) -> Dataset:
    """As `elpv`, both types of cells: two categories, mono and poly."""
    mono, poly = elpv(root, "mono"), elpv(root, "poly")
    return Dataset("elpv-cells", mono.samples + poly.samples, has_masks=False)


LAYOUTS: dict[str, Callable[[Path | None], Dataset]] = {
    "mvtec": mvtec,
    "visa": visa,
    "realiad": realiad,
    "folder": folder,
    "elpv": elpv,
    "elpv-cells": elpv_cells,
}
"""Reader of each layout by name."""


def read_dataset(layout: str, root: Path | None, lists: Path | None = None) -> Dataset:
    """The data set at `root` in the named layout; `root` may be None for ELPV alone, `lists` is for `realiad` alone.

    Raises:
        ConfigError: the layout is unknown, files that it needs are missing, or there are no images.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; {nearest(layout, LAYOUTS)}")
    if lists is not None and layout != "realiad":
        raise ConfigError(f"layout {layout!r} has no folder of lists, got {lists}; leave --lists out")
    dataset = realiad(root, lists) if lists is not None else LAYOUTS[layout](root)
    if not dataset.samples:
        raise ConfigError(f"{root}: no images in the layout {layout!r}; check the data folder")
    return dataset


def _existing_root(root: Path | None, layout: str) -> Path:
    if root is None:
        raise ConfigError(f"layout {layout!r} needs a data folder, got none; give one (--data), or use layout 'elpv'")
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder, expected a data set in the layout {layout!r}; check the path")
    return root


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise ConfigError(f"{path} is missing: {what}; unpack the data set completely")
    return path


def _images(folder: Path, deep: bool = False) -> list[Path]:
    """The photos of a folder of which each counts.

    Raises:
        ConfigError: there is none, one lies deeper than it may, or a folder cannot be looked into.
    """
    found = find_photos(folder)
    if found.problems:
        raise ConfigError(f"{found.problems[0][0]}: {found.problems[0][1]}")
    if not found.paths:
        also = f" ({found.left_out()})" if found.others else ""
        raise ConfigError(f"{folder}: no images found{also}; fill the folder, or remove it")
    below = [path for path in found.paths if path.parent != folder]
    if below and not deep:
        raise ConfigError(f"{below[0]}: lies in a deeper folder than this layout has; move it to {folder}")
    return list(found.paths)


class _Masks:
    """The masks in a folder, by the image that each belongs to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = sorted(folder.iterdir()) if folder.is_dir() else []
        self._left = {path.stem.casefold(): path for path in names if is_data(path.name) and is_photo(path)}

    def of(self, image: Path) -> Path:
        """The mask of an image; no second image gets it.

        Raises:
            ConfigError: there is none.
        """
        for stem in (f"{image.stem}_mask", image.stem):
            if (found := self._left.pop(stem.casefold(), None)) is not None:
                return found
        raise ConfigError(
            f"{self.folder / image.stem}_mask.png is missing: the mask of {image}; expected <name>_mask.png or "
            f"<name>.png for each image of {image.parent}"
        )

    def refuse_left(self) -> None:
        """Refuse masks that no image has: an image was lost."""
        if self._left:
            mask = min(self._left.values())
            raise ConfigError(f"{mask}: a mask without an image ({len(self._left)} in all); unpack the data set again")


def _listed(root: Path, name: str) -> Path:
    """A path that a table names relative to `root`; tables made on Windows separate with backslashes."""
    path = root / name
    return path if "\\" not in name or path.exists() else root / name.replace("\\", "/")


def _text(path: Path) -> str:
    """A text file in UTF-8 or UTF-16 with their marks, or in Windows' western encoding where it is no UTF-8.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    encodings = ("utf-16",) if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252")
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise ConfigError(f"{path}: is no text in UTF-8, UTF-16 or Windows-1252; save it as UTF-8")


def _table(path: Path, columns: tuple[str, ...]) -> Iterable[tuple[str, dict[str, str]]]:
    """Each row of a CSV file with its place, after a check of the columns; separated by commas, semicolons or tabs."""
    text = _text(_existing(path, "the table of the split"))
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    names = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = names
    missing = [column for column in columns if column not in names]
    if missing:
        raise ConfigError(
            f"{path}: no column {', '.join(missing)}, found {', '.join(names)}, expected {', '.join(columns)}; "
            "get the original table"
        )
    try:
        for row in reader:
            if None in row.values():
                raise ConfigError(f"{path}:{reader.line_num}: too few fields; get the original table")
            yield f"{path}:{reader.line_num}", {key: value.strip() for key, value in row.items() if key in columns}
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: {error}; get the original table") from None


def _one_of(value: str, valid: tuple[str, ...], what: str) -> Any:
    """`value`, known to be one of `valid`."""
    if value not in valid:
        raise ConfigError(f"{what} is {value!r}; {nearest(value, valid)}")
    return value
