"""Readers of the folder layouts of public data sets; each gives a `Dataset` of samples without opening an image."""

import csv
import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from flowad_fast.data.images import SUFFIXES
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.errors import ConfigError, nearest


def mvtec(root: Path | None) -> Dataset:
    """MVTec AD and MPDD: `<cat>/train/good`, `<cat>/test/{good,<defect>}`, and masks of the defective test images.

    The mask of `test/<defect>/<stem>.*` is `ground_truth/<defect>/<stem>_mask.png`.

    Raises:
        ConfigError: a folder or the mask of a defective image is missing.
    """
    root = _existing_root(root, "mvtec")
    categories = [folder for folder in _folders(root) if (folder / "train" / "good").is_dir()]
    if not categories:
        hint = f"give its parent {root.parent}" if (root / "train" / "good").is_dir() else "is this the right root?"
        raise ConfigError(f"{root}: no <category>/train/good folder found, expected the layout of MVTec AD; {hint}")
    samples = []
    for folder in categories:
        category = folder.name
        samples += [Sample(path, category, "train", 0) for path in _images(folder / "train" / "good")]
        for kind in _folders(_existing(folder / "test", "the test images")):
            for path in _images(kind):
                if kind.name == "good":
                    samples.append(Sample(path, category, "test", 0))
                else:
                    mask = folder / "ground_truth" / kind.name / f"{path.stem}_mask.png"
                    samples.append(Sample(path, category, "test", 1, kind.name, _existing(mask, f"the mask of {path}")))
    return Dataset("mvtec", tuple(samples), has_masks=True)


def visa(root: Path | None) -> Dataset:
    """VisA: the split of `split_csv/1cls.csv`, whose paths (`<cat>/Data/Images/…`) are relative to `root`.

    Raises:
        ConfigError: the table, one of its columns, or a mask is missing, or a value is not one of VisA's.
    """
    root = _existing_root(root, "visa")
    samples = []
    for line, row in _table(root / "split_csv" / "1cls.csv", ("object", "split", "label", "image", "mask")):
        split = _one_of(row["split"], ("train", "test"), f"{line}: split")
        defective = _one_of(row["label"], ("normal", "anomaly"), f"{line}: label") == "anomaly"
        path = root / row["image"]
        if not defective:
            samples.append(Sample(path, row["object"], split, 0))
        elif not row["mask"]:
            raise ConfigError(f"{line}: no mask for the defective image {path}; get the original 1cls.csv")
        else:
            mask = _existing(root / row["mask"], f"the mask of {path}")
            samples.append(Sample(path, row["object"], split, 1, "anomaly", mask))
    return Dataset("visa", tuple(samples), has_masks=True)


def realiad(root: Path | None) -> Dataset:
    """Real-IAD: `realiad_jsons/<cat>.json` with train and test lists, images and masks under `<cat>/`.

    Raises:
        ConfigError: a list, a field or the mask of a defective image is missing.
    """
    root = _existing_root(root, "realiad")
    files = sorted(_existing(root / "realiad_jsons", "the lists of Real-IAD").glob("*.json"))
    if not files:
        raise ConfigError(f"{root / 'realiad_jsons'}: no <category>.json found; unpack the lists of Real-IAD there")
    samples: list[Sample] = []
    for file in files:
        try:
            lists = json.loads(file.read_text(encoding="utf-8"))
            samples += _realiad_samples(root / file.stem, "train", lists["train"])
            samples += _realiad_samples(root / file.stem, "test", lists["test"])
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

    The category is the name of `root`; images in deeper folders are not read.

    Raises:
        ConfigError: there is no folder `good`.
    """
    root = _existing_root(root, "folder").resolve()
    _existing(root / "good", "test images of good parts (others go into folders of any other name)")
    samples = []
    for kind in _folders(root):
        label: Literal[0, 1] = 0 if kind.name == "good" else 1
        samples += [Sample(path, root.name, "test", label, kind.name) for path in _images(kind)]
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
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
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


LAYOUTS: dict[str, Callable[[Path | None], Dataset]] = {
    "mvtec": mvtec,
    "visa": visa,
    "realiad": realiad,
    "folder": folder,
    "elpv": elpv,
}
"""Reader of each layout by name."""


def read_dataset(layout: str, root: Path | None) -> Dataset:
    """The data set at `root` in the named layout; `root` may be None for `elpv` alone.

    Raises:
        ConfigError: the layout is unknown, or files that it needs are missing.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; {nearest(layout, LAYOUTS)}")
    return LAYOUTS[layout](root)


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


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _table(path: Path, columns: tuple[str, ...]) -> Iterable[tuple[str, dict[str, str]]]:
    """Each row of a CSV file with its place, after a check of the columns."""
    with _existing(path, "the table of the split").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(
                f"{path}: no column {', '.join(missing)}, found {', '.join(reader.fieldnames or ())}, "
                f"expected {', '.join(columns)}; get the original table"
            )
        for row in reader:
            if None in row.values():
                raise ConfigError(f"{path}:{reader.line_num}: too few fields; get the original table")
            yield f"{path}:{reader.line_num}", row


def _one_of(value: str, valid: tuple[str, ...], what: str) -> Any:
    """`value`, known to be one of `valid`."""
    if value not in valid:
        raise ConfigError(f"{what} is {value!r}; {nearest(value, valid)}")
    return value
