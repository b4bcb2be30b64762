"""Folders and tables as people really have them: links, companions, other encodings; nothing is passed over unsaid."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowad_fast.data.images import find_images, read_frame, read_mask
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.walk import find_photos, is_data, is_photo
from flowad_fast.errors import ConfigError, FrameError

PHOTO = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray = PHOTO, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def mvtec(root: Path) -> Path:
    for name in ("train/good/0", "test/good/0", "test/dent/0", "ground_truth/dent/0_mask"):
        save(root / "part" / f"{name}.png")
    return root


# Folders


def test_a_linked_folder_is_entered_once(tmp_path: Path) -> None:
    save(tmp_path / "photos/lot1/a.png")
    save(tmp_path / "disk/lot2/b.png")
    for name in ("lot2", "lot3"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "disk/lot2")
    (tmp_path / "photos/lot1/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "disk/lot2/up").symlink_to(tmp_path)
    found = find_photos(tmp_path / "photos")
    assert sorted(path.name for path in found.paths) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "name",
    [".ipynb_checkpoints/a.png", "@eaDir/a.png", "__MACOSX/a.png", "._a.png", ".hidden.png", "$RECYCLE.BIN/a.png"],
)
def test_what_other_programs_leave_is_no_data(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / name)
    assert find_images(tmp_path) == [tmp_path / "a.png"]


def test_files_that_are_no_photos_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    for name in ("b.txt", "c.TXT", "d"):
        (tmp_path / name).write_text("x")
    assert find_photos(tmp_path).left_out() == "3 files with other suffixes left out (.txt, no suffix)"


def test_links_that_lead_nowhere_are_photos_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    with pytest.raises(FrameError, match="no such file"):
        read_frame(tmp_path / "a.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    (problem,) = find_photos(tmp_path).problems
    assert problem[0].name == "closed" and "permissions" in problem[1]


def test_a_folder_that_cannot_be_looked_into_stops_a_plain_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "closed/b.png")
    real = Path.iterdir

    def refuse(path: Path) -> object:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert find_photos(tmp_path).problems == (
        (tmp_path / "closed", "the folder cannot be looked into (Permission denied); check its permissions"),
    )
    with pytest.raises(FrameError, match="closed.*Permission denied"):
        find_images(tmp_path)


NAMES = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from([".png", ".PGM", ".txt", "", ".heic"])), max_size=8))
def test_every_file_of_a_tree_is_a_photo_or_counted_or_no_data(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("tree")
    place = root
    for name, suffix in entries:
        (place / (name + suffix)).exists() or (place / (name + suffix)).touch()
        place = place / ("d" + name)
        place.mkdir(exist_ok=True)
    found = find_photos(root)
    data = [p for p in root.rglob("*") if p.is_file() and all(is_data(part) for part in p.relative_to(root).parts)]
    assert set(found.paths) == {p for p in data if is_photo(p)}
    assert found.others.total() == len(data) - len(found.paths)


# Files


@pytest.mark.parametrize(
    ("name", "format"), [("a.jfif", "JPEG"), ("a.pgm", "PPM"), ("a.jp2", "JPEG2000"), ("a.gif", "GIF")]
)
def test_other_suffixes_and_formats_are_read(tmp_path: Path, name: str, format: str) -> None:
    save(tmp_path / name, PHOTO[..., 0], format=format)
    assert find_images(tmp_path) == [tmp_path / name] and read_frame(tmp_path / name).shape == (6, 9, 3)


def test_a_jpeg_with_a_preview_is_read_and_one_with_two_photos_is_not(tmp_path: Path) -> None:
    big = np.kron(PHOTO, np.ones((8, 8, 1), np.uint8))
    photo = Image.fromarray(big)
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photo.resize((36, 24))])
    assert read_frame(tmp_path / "a.jpg").shape == big.shape
    data = (tmp_path / "a.jpg").read_bytes()
    start = data.index(b"\xff\xd8", 2)  # of the second picture, so the size of the first, which its entry holds
    second = data.index((0x030000).to_bytes(4, "little") + start.to_bytes(4, "little")) + 16
    (tmp_path / "b.jpg").write_bytes(data[:second] + (0x020002).to_bytes(4, "little") + data[second + 4 :])
    with pytest.raises(FrameError, match=r"2 pages \(MPO\).*exiftool"):
        read_frame(tmp_path / "b.jpg")


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    mask = save(tmp_path / "m.png", np.ones((90, 160), np.uint8))
    assert read_mask(mask, 8, (45, 80, 3)).all() and read_mask(mask, 8, (1079, 1919, 3)).all()
    with pytest.raises(FrameError, match="160x90.*90x160.*EXIF"):
        read_mask(mask, 8, (160, 90, 3))


# Data sets


def test_companions_do_not_break_a_data_set(tmp_path: Path) -> None:
    root = mvtec(tmp_path)
    for name in (
        "test/dent/._0.png",
        "train/good/._0.png",
        "ground_truth/dent/._0_mask.png",
        "test/.ipynb_checkpoints/0.png",
    ):
        place = root / "part" / name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"\0\5\26\7")
    assert len(read_dataset("mvtec", root).samples) == 3


@pytest.mark.parametrize("mask", ["0_mask.png", "0_mask.PNG", "0.png", "0_mask.bmp"])
def test_masks_may_have_other_names(tmp_path: Path, mask: str) -> None:
    root = mvtec(tmp_path)
    (root / "part/ground_truth/dent/0_mask.png").unlink()
    save(root / "part/ground_truth/dent" / mask)
    (dent,) = [sample for sample in read_dataset("mvtec", root).samples if sample.label]
    assert dent.mask is not None and dent.mask.name == mask


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("test/dent/0.png", "test/dent: no images found"),
        ("train/good/0.png", "train/good: no images found"),
        ("ground_truth/dent/0_mask.png", "0_mask.png is missing.*expected <name>_mask.png or <name>.png"),
    ],
)
def test_what_is_missing_from_a_data_set_is_named(tmp_path: Path, lost: str, message: str) -> None:
    (mvtec(tmp_path) / "part" / lost).unlink()
    with pytest.raises(ConfigError, match=message):
        read_dataset("mvtec", tmp_path)


def test_masks_without_an_image_and_classes_without_training_images_are_errors(tmp_path: Path) -> None:
    save(mvtec(tmp_path) / "part/ground_truth/dent/1_mask.png")
    with pytest.raises(ConfigError, match="1_mask.png: a mask without an image"):
        read_dataset("mvtec", tmp_path)
    (tmp_path / "part/ground_truth/dent/1_mask.png").rename(tmp_path / "part/ground_truth/dent/.1.png")
    save(tmp_path / "part/ground_truth/scratch/0_mask.png")
    with pytest.raises(ConfigError, match="test/scratch is missing: the images of the masks"):
        read_dataset("mvtec", tmp_path)
    (tmp_path / "part/ground_truth/scratch").rename(tmp_path / ".scratch")
    save(tmp_path / "other/test/good/0.png")
    with pytest.raises(ConfigError, match="other/train/good is missing"):
        read_dataset("mvtec", tmp_path)


def test_plain_folders_lose_no_photo(tmp_path: Path) -> None:
    save(tmp_path / "good/0.png")
    save(tmp_path / "dent/deep/1.png")
    assert [sample.defect for sample in read_dataset("folder", tmp_path).samples] == ["dent", "good"]
    save(tmp_path / "stray.png")
    with pytest.raises(ConfigError, match="stray.png: lies in no folder"):
        read_dataset("folder", tmp_path)


TABLE = (
    "object,split,label,image,mask\nc,train,normal,c/N/0.png,\nc,test,normal,c/N/ü.png,\n"
    "c,test,anomaly,c/A/0.png,c/M/0.png\n"
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_tables_saved_by_spreadsheets_are_read(tmp_path: Path, encoding: str, separator: str, slash: str) -> None:
    for name in ("N/0", "N/ü", "A/0", "M/0"):
        save(tmp_path / f"c/{name}.png")
    table = tmp_path / "split_csv/1cls.csv"
    table.parent.mkdir()
    text = TABLE.replace("/", slash).replace(",", separator).replace("\n", "\r\n")
    table.write_bytes(text.encode(encoding))
    samples = read_dataset("visa", tmp_path).samples
    assert [sample.label for sample in samples] == [0, 0, 1] and all(sample.path.is_file() for sample in samples)
    rows = [line.split(",") for line in TABLE.splitlines()]
    table.write_text("\n".join(",".join(reversed(row)) for row in rows), encoding="utf-8")
    assert read_dataset("visa", tmp_path).samples == samples


def test_a_table_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv/1cls.csv").write_bytes(b"PK\3\4\0\0\0\x81")
    with pytest.raises(ConfigError, match="no text in UTF-8, UTF-16 or Windows-1252"):
        read_dataset("visa", tmp_path)
