"""What every layout in `LAYOUTS` promises. A new entry needs one small tree in `TREES`, and no new test.

The images in the trees are empty files: a reader opens none of them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flowad_fast.data.layouts import LAYOUTS, read_dataset
from flowad_fast.data.samples import Dataset
from flowad_fast.errors import ConfigError


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def _mvtec(root: Path) -> None:
    for part in ("nut", "bolt"):
        _touch(root / part, "train/good/1.png", "train/good/0.png", "test/good/0.png", "test/dent/0.png")
        _touch(root / part, "ground_truth/dent/0_mask.png")


def _visa(root: Path) -> None:
    rows = ["object,split,label,image,mask"]
    for split, label, number in (("train", "normal", 0), ("test", "normal", 1), ("test", "anomaly", 2)):
        image, mask = f"pcb/Data/Images/{number}.JPG", f"pcb/Data/Masks/{number}.png" if label == "anomaly" else ""
        _touch(root, image, *([mask] if mask else []))
        rows.append(f"pcb,{split},{label},{image},{mask}")
    _touch(root, "split_csv/1cls.csv")
    (root / "split_csv/1cls.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _realiad(root: Path) -> None:
    def row(name: str, kind: str) -> dict[str, str | None]:
        _touch(root / "tape", name, *([] if kind == "OK" else [f"{name}.mask.png"]))
        return {"image_path": name, "anomaly_class": kind, "mask_path": None if kind == "OK" else f"{name}.mask.png"}

    lists = {"train": [row("0.jpg", "OK")], "test": [row("1.jpg", "OK"), row("2.jpg", "HS")]}
    _touch(root, "realiad_jsons/tape.json")
    (root / "realiad_jsons/tape.json").write_text(json.dumps(lists), encoding="utf-8")


def _folder(root: Path) -> None:
    _touch(root, "good/1.png", "good/0.png", "scratch/0.bmp", "notes.txt", "good/readme.md")


def _elpv(root: Path) -> None:
    names = [f"images/cell{i:04}.png" for i in range(12)]
    _touch(root, *names)
    lines = [f"{name} {float(i > 9)} mono" for i, name in enumerate(names)]
    others = [f"images/other{i:04}.png" for i in range(12)]
    _touch(root, *others)
    lines += [f"{name} {float(i > 9)} poly" for i, name in enumerate(others)]
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


TREES: dict[str, Callable[[Path], None]] = {
    "mvtec": _mvtec,
    "visa": _visa,
    "realiad": _realiad,
    "folder": _folder,
    "elpv": _elpv,
    "elpv-cells": _elpv,
}
every = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture
def dataset(tmp_path: Path, name: str) -> Dataset:
    assert name in TREES, f"add a small tree of the layout {name} to TREES"
    TREES[name](tmp_path)
    return read_dataset(name, tmp_path)


@every
def test_it_describes_itself(name: str) -> None:
    assert LAYOUTS[name].__doc__


@every
def test_samples_are_of_the_right_kind_and_exist(dataset: Dataset, name: str) -> None:
    assert dataset.name == name and dataset.samples and dataset.categories
    assert len({sample.path for sample in dataset.samples}) == len(dataset.samples)
    for sample in dataset.samples:
        assert sample.path.is_file() and sample.category in dataset.categories
        assert sample.split in ("train", "calibration", "test")
        assert (sample.label == 0) == (sample.defect == "good")
        assert sample.split == "test" or sample.label == 0, "nothing is learned or calibrated on a defect"


@every
def test_there_are_good_and_defective_test_images(dataset: Dataset) -> None:
    for label in (0, 1):
        assert dataset.select("test", label=label)
    assert sum(len(dataset.select(split)) for split in ("train", "calibration", "test")) == len(dataset.samples)


@every
def test_defects_have_masks_where_the_layout_has_any(dataset: Dataset) -> None:
    for sample in dataset.samples:
        assert (sample.mask is not None) == (dataset.has_masks and sample.label == 1)
        assert sample.mask is None or sample.mask.is_file()


@every
def test_the_order_is_fixed(dataset: Dataset, name: str, tmp_path: Path) -> None:
    assert read_dataset(name, tmp_path) == dataset


@every
def test_what_is_not_there_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="nowhere"):
        read_dataset(name, missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="empty"):
        read_dataset(name, empty)


@every
def test_a_missing_mask_is_an_error_that_names_it(dataset: Dataset, name: str, tmp_path: Path) -> None:
    for sample in dataset.samples:
        if sample.mask is not None:
            sample.mask.unlink()
            with pytest.raises(ConfigError, match=sample.mask.name):
                read_dataset(name, tmp_path)
            sample.mask.touch()


@every
def test_no_root_is_a_package_of_its_own_or_an_error(name: str) -> None:
    try:
        found = read_dataset(name, None)
    except ConfigError as error:
        assert "data folder" in str(error) or "not installed" in str(error)
    else:
        assert found.samples and all(sample.path.is_file() for sample in found.samples[:3])
