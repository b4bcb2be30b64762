"""Image files, masks, and the readers of data set layouts, on tiny data sets made here."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from flowad_fast.data.images import find_images, read_frame, read_mask
from flowad_fast.data.layouts import LAYOUTS, elpv, read_dataset
from flowad_fast.errors import ConfigError, FrameError

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def save(path, array=PHOTO, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def save_mask(path):
    mask = np.zeros((6, 9), np.uint8)
    mask[1, 2] = 1
    return save(path, mask)


# Images


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_rgb_is_read_exactly(tmp_path, suffix):
    frame = read_frame(save(tmp_path / f"a.{suffix}"))
    assert frame.dtype == np.uint8 and frame.flags.c_contiguous and frame.flags.writeable
    np.testing.assert_array_equal(frame, PHOTO)


def test_bgr_reverses_channels(tmp_path):
    np.testing.assert_array_equal(read_frame(save(tmp_path / "a.png"), "bgr"), PHOTO[..., ::-1])


def test_unknown_channel_order(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'rgb'"):
        read_frame(save(tmp_path / "a.png"), "rbg")


def test_grey_is_replicated(tmp_path):
    frame = read_frame(save(tmp_path / "a.png", PHOTO[..., 0]))
    np.testing.assert_array_equal(frame, np.repeat(PHOTO[..., :1], 3, axis=2))


@pytest.mark.parametrize("channels", [2, 4])
def test_opaque_alpha_is_dropped(tmp_path, channels):
    array = np.concatenate([PHOTO[..., : channels - 1], np.full((6, 9, 1), 255, np.uint8)], axis=2)
    expected = PHOTO if channels == 4 else np.repeat(PHOTO[..., :1], 3, axis=2)
    np.testing.assert_array_equal(read_frame(save(tmp_path / "a.png", array)), expected)


@pytest.mark.parametrize("channels", [2, 4])
def test_see_through_is_refused(tmp_path, channels):
    array = np.concatenate([PHOTO[..., : channels - 1], np.full((6, 9, 1), 255, np.uint8)], axis=2)
    array[3, 3, -1] = 254
    path = save(tmp_path / "a.png", array)
    with pytest.raises(FrameError, match=r"a\.png.*alpha down to 254.*flatten"):
        read_frame(path)


def palette(path, **options):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(path, **options)
    return path


def test_palette_is_looked_up(tmp_path):
    frame = read_frame(palette(tmp_path / "a.png"))
    np.testing.assert_array_equal(frame[0], [[10, 20, 30], [200, 100, 50]])


def test_transparent_palette_entry_is_refused(tmp_path):
    with pytest.raises(FrameError, match="see-through"):
        read_frame(palette(tmp_path / "a.png", transparency=0))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    lossless = {"lossless": True} if suffix == "webp" else {}
    frame = read_frame(save(tmp_path / f"a.{suffix}", exif=exif, **lossless))
    assert frame.shape == (9, 6, 3)
    if suffix != "jpg":
        np.testing.assert_array_equal(frame, np.rot90(PHOTO, -1))


def rgb16_png(path):
    """A 1×1 PNG with 16 bits per channel, which Pillow can read but not write."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(6))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def refused_files():
    def pil(mode, suffix):
        return lambda path: Image.new(mode, (4, 4)).save(path.with_suffix(suffix)) or path.with_suffix(suffix)

    def text(content):
        return lambda path: path.write_bytes(content)

    def cut(path):
        save(path)
        path.write_bytes(path.read_bytes()[:-60])

    def pages(path):
        path = path.with_suffix(".tif")
        Image.new("L", (4, 4)).save(path, save_all=True, append_images=[Image.new("L", (4, 4))])
        return path

    def animated(path):
        path = path.with_suffix(".webp")
        Image.new("RGB", (4, 4)).save(path, save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
        return path

    return {
        "16-bit": (pil("I;16", ".png"), "mode I;16.*known range"),
        "16-bit colour": (rgb16_png, "16 bits per channel"),
        "32-bit": (pil("I", ".tif"), "mode I, expected 8-bit"),
        "float": (pil("F", ".tif"), "mode F, expected 8-bit"),
        "cmyk": (pil("CMYK", ".jpg"), "mode CMYK.*colour profile"),
        "bilevel": (pil("1", ".png"), "mode 1, expected 8-bit"),
        "pages": (pages, "found 2 pages.*split"),
        "animated": (animated, "found 2 pages.*split"),
        "empty": (text(b""), "0 bytes.*copy it again"),
        "truncated": (cut, "damaged image.*copy"),
        "lfs pointer": (
            text(b"version https://git-lfs.github.com/spec/v1\n"),
            "starting with b'version https://git-lfs",
        ),
        "html": (text(b"<!DOCTYPE html>"), "starting with b'<!DOCTYPE"),
        "missing": (lambda path: None, "no such file"),
    }


@pytest.mark.parametrize("name", refused_files())
def test_refused_file_is_named_with_a_remedy(tmp_path, name):
    make, message = refused_files()[name]
    made = make(tmp_path / "part.png")
    path = made if hasattr(made, "suffix") else tmp_path / "part.png"
    with pytest.raises(FrameError, match=f"(?s)part.*{message}"):
        read_frame(path)


@pytest.mark.parametrize("limit", [40, 20])  # 54 pixels: Pillow warns above the limit, and fails above twice the limit
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(FrameError, match=r"a\.png.*bomb"):
        read_frame(path)


def test_every_truncation_is_a_frame_error_or_the_whole_image(tmp_path):
    whole = save(tmp_path / "a.png").read_bytes()
    cut = tmp_path / "cut.png"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        try:
            frame = read_frame(cut)
        except FrameError:
            continue
        np.testing.assert_array_equal(frame, PHOTO)


def test_find_images_is_recursive_and_sorted(tmp_path):
    for name in ("b.PNG", "a/c.jpeg", "a/b.tiff", "z.webp"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == [
        "a/b.tiff",
        "a/c.jpeg",
        "b.PNG",
        "z.webp",
    ]


def test_find_images_errors(tmp_path):
    with pytest.raises(FrameError, match="no image files found"):
        find_images(tmp_path)
    with pytest.raises(FrameError, match="no such folder"):
        find_images(tmp_path / "nothing")


def test_mask_is_any_value_above_zero_by_nearest(tmp_path):
    values = np.array([[0, 1], [255, 0]], np.uint8)
    mask = read_mask(save(tmp_path / "m.png", values), 4)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, np.kron(values > 0, np.ones((2, 2), bool)))


def test_mask_in_colour_palette_or_with_alpha(tmp_path):
    colour = np.zeros((2, 2, 4), np.uint8)
    colour[..., 3] = 255
    colour[0, 1, 2] = 9
    assert read_mask(save(tmp_path / "rgba.png", colour), 2).tolist() == [[False, True], [False, False]]
    assert read_mask(palette(tmp_path / "p.png"), 2).tolist() == [[False, True], [True, False]]


def test_unreadable_mask(tmp_path):
    with pytest.raises(FrameError, match="no such file"):
        read_mask(tmp_path / "m.png", 4)


# Layouts


def counts(dataset):
    return {(s, label): len(dataset.select(s, label=label)) for s in ("train", "test") for label in (0, 1)}


@pytest.fixture
def mvtec(tmp_path):
    for category in ("bottle", "cable"):
        save(tmp_path / category / "train/good/000.png")
        save(tmp_path / category / "test/good/000.png")
        save(tmp_path / category / "test/broken/000.png")
        save_mask(tmp_path / category / "ground_truth/broken/000_mask.png")
    (tmp_path / "license.txt").write_text("")
    return tmp_path


def test_mvtec(mvtec):
    dataset = read_dataset("mvtec", mvtec)
    assert dataset.categories == ("bottle", "cable") and dataset.has_masks
    assert counts(dataset) == {("train", 0): 2, ("train", 1): 0, ("test", 0): 2, ("test", 1): 2}
    (sample,) = dataset.select("test", "cable", 1)
    assert sample.defect == "broken" and sample.mask == mvtec / "cable/ground_truth/broken/000_mask.png"
    assert read_mask(sample.mask, 18).any() and read_frame(sample.path).shape == (6, 9, 3)


def test_mvtec_errors(mvtec):
    with pytest.raises(ConfigError, match="give its parent"):
        read_dataset("mvtec", mvtec / "bottle")
    with pytest.raises(ConfigError, match="no <category>/train/good"):
        read_dataset("mvtec", mvtec / "bottle" / "test")
    (mvtec / "cable/ground_truth/broken/000_mask.png").unlink()
    with pytest.raises(ConfigError, match="000_mask.png is missing: the mask of .*cable"):
        read_dataset("mvtec", mvtec)


def test_mvtec_without_test_folder(mvtec):
    (mvtec / "bottle/test").rename(mvtec / "bottle/tset")
    with pytest.raises(ConfigError, match="bottle/test is missing"):
        read_dataset("mvtec", mvtec)


VISA_COLUMNS = ["object", "split", "label", "image", "mask"]


def write_visa(root, rows, columns=VISA_COLUMNS):
    (root / "split_csv").mkdir(exist_ok=True)
    with (root / "split_csv/1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture
def visa(tmp_path):
    images = "candle/Data/Images"
    for name in ("Normal/0.JPG", "Normal/1.JPG", "Anomaly/0.JPG"):
        save(tmp_path / images / name)
    save_mask(tmp_path / "candle/Data/Masks/Anomaly/0.png")
    rows = [
        ["candle", "train", "normal", f"{images}/Normal/0.JPG", ""],
        ["candle", "test", "normal", f"{images}/Normal/1.JPG", ""],
        ["candle", "test", "anomaly", f"{images}/Anomaly/0.JPG", "candle/Data/Masks/Anomaly/0.png"],
    ]
    write_visa(tmp_path, rows)
    return tmp_path, rows


def test_visa(visa):
    root, _ = visa
    dataset = read_dataset("visa", root)
    assert counts(dataset) == {("train", 0): 1, ("train", 1): 0, ("test", 0): 1, ("test", 1): 1} and dataset.has_masks
    (sample,) = dataset.select("test", label=1)
    assert sample.mask is not None and read_mask(sample.mask, 32).any()


def test_visa_errors(visa):
    root, rows = visa
    write_visa(root, [row[:4] for row in rows], VISA_COLUMNS[:4])
    with pytest.raises(ConfigError, match="no column mask, found object"):
        read_dataset("visa", root)
    write_visa(root, [[*rows[0][:2], "normla", *rows[0][3:]]])
    with pytest.raises(ConfigError, match="csv:2: label is 'normla'; did you mean 'normal'"):
        read_dataset("visa", root)
    write_visa(root, [rows[0][:3]])
    with pytest.raises(ConfigError, match="csv:2: too few fields"):
        read_dataset("visa", root)
    write_visa(root, [[*rows[2][:4], ""]])
    with pytest.raises(ConfigError, match="no mask for the defective"):
        read_dataset("visa", root)
    write_visa(root, rows)
    (root / rows[2][4]).unlink()
    with pytest.raises(ConfigError, match="0.png is missing: the mask"):
        read_dataset("visa", root)
    (root / "split_csv/1cls.csv").unlink()
    with pytest.raises(ConfigError, match="1cls.csv is missing"):
        read_dataset("visa", root)


@pytest.fixture
def realiad(tmp_path):
    good = {"category": "audiojack", "anomaly_class": "OK", "image_path": "OK/S1/a.jpg", "mask_path": None}
    bad = good | {"anomaly_class": "HS", "image_path": "NG/HS/b.jpg", "mask_path": "NG/HS/b.png"}
    save(tmp_path / "audiojack/OK/S1/a.jpg")
    save(tmp_path / "audiojack/NG/HS/b.jpg")
    save_mask(tmp_path / "audiojack/NG/HS/b.png")
    lists = {"meta": {"normal_class": "OK"}, "train": [good], "test": [good, bad]}
    (tmp_path / "realiad_jsons").mkdir()
    (tmp_path / "realiad_jsons/audiojack.json").write_text(json.dumps(lists))
    return tmp_path, lists


def test_realiad(realiad):
    root, _ = realiad
    dataset = read_dataset("realiad", root)
    assert counts(dataset) == {("train", 0): 1, ("train", 1): 0, ("test", 0): 1, ("test", 1): 1}
    (sample,) = dataset.select("test", "audiojack", 1)
    assert sample.defect == "HS" and sample.path.is_file() and sample.mask is not None


def test_realiad_errors(realiad):
    root, lists = realiad
    file = root / "realiad_jsons/audiojack.json"
    file.write_text(json.dumps({"train": []}))
    with pytest.raises(ConfigError, match="KeyError: 'test'.*get the original"):
        read_dataset("realiad", root)
    file.write_text("{")
    with pytest.raises(ConfigError, match="JSONDecodeError"):
        read_dataset("realiad", root)
    lists["test"][1]["mask_path"] = None
    file.write_text(json.dumps(lists))
    with pytest.raises(ConfigError, match="class HS without a mask_path"):
        read_dataset("realiad", root)
    lists["test"][1]["mask_path"] = "NG/HS/other.png"
    file.write_text(json.dumps(lists))
    with pytest.raises(ConfigError, match="other.png is missing: the mask"):
        read_dataset("realiad", root)
    file.unlink()
    with pytest.raises(ConfigError, match="no <category>.json found"):
        read_dataset("realiad", root)


def test_folder(tmp_path):
    root = tmp_path / "gear"
    for name in ("good/1.png", "good/0.png", "scratch/0.png", "dent/0.png"):
        save(root / name)
    dataset = read_dataset("folder", root)
    assert dataset.categories == ("gear",) and not dataset.has_masks
    assert [(s.defect, s.label, s.path.name) for s in dataset.samples] == [
        ("dent", 1, "0.png"),
        ("good", 0, "0.png"),
        ("good", 0, "1.png"),
        ("scratch", 1, "0.png"),
    ]


def test_folder_without_good(tmp_path):
    save(tmp_path / "ok/0.png")
    with pytest.raises(ConfigError, match="good is missing: test images of good parts"):
        read_dataset("folder", tmp_path)


def test_elpv_is_split_by_file_name():
    dataset = read_dataset("elpv", None)
    assert dataset.categories == ("mono",) and not dataset.has_masks
    # 588 good and 313 defective monocrystalline cells.
    assert counts(dataset) == {("train", 0): 413, ("train", 1): 0, ("test", 0): 116, ("test", 1): 313}
    assert len(dataset.select("calibration", label=0)) == 59 and len(dataset.samples) == 588 + 313
    good = sorted((s for s in dataset.samples if s.label == 0), key=lambda s: s.path.name)
    assert [s.split for s in good[:11]] == ["train"] * 7 + ["calibration", "test", "test", "train"]
    assert read_frame(dataset.samples[0].path).shape == (300, 300, 3)


def test_elpv_other_cell_type():
    dataset = elpv(cell_type="poly")
    assert dataset.categories == ("poly",) and len(dataset.samples) == 920 + 402
    with pytest.raises(ConfigError, match="cell_type is 'pol'; did you mean 'poly'"):
        elpv(cell_type="pol")


def test_elpv_from_a_folder(tmp_path):
    (tmp_path / "labels.csv").write_text("images/b.png 0.0 mono\nimages/a.png  1.0  mono\nimages/c.png 0.3333 mono\n")
    dataset = read_dataset("elpv", tmp_path)
    assert [(s.path.name, s.split, s.label) for s in dataset.samples] == [("b.png", "train", 0), ("a.png", "test", 1)]
    (tmp_path / "labels.csv").write_text("images/b.png,0.0,mono\n")
    with pytest.raises(ConfigError, match="labels.csv:1: found 'images/b.png,0.0,mono'"):
        read_dataset("elpv", tmp_path)
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(ConfigError, match="labels.csv is missing"):
        read_dataset("elpv", tmp_path)


def test_elpv_package_missing(monkeypatch):
    monkeypatch.setattr("flowad_fast.data.layouts.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "flowad-fast\[demo\]"'):
        read_dataset("elpv", None)


def test_unknown_layout():
    with pytest.raises(ConfigError, match="did you mean 'mvtec'"):
        read_dataset("mvtek", None)


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"elpv", "elpv-cells"}))
def test_root_is_needed(layout, tmp_path):
    with pytest.raises(ConfigError, match="needs a data folder"):
        read_dataset(layout, None)
    with pytest.raises(ConfigError, match="no such folder"):
        read_dataset(layout, tmp_path / "nothing")
