"""What comes with the project by name: two checkpoints and their photos, in every place that takes a name."""

import json

import pytest

from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.data.layouts import read_dataset
from flowad_fast.errors import CalibrationError, ConfigError
from flowad_fast.export.frames import good_parts, parity_frames, training_parts
from flowad_fast.shipped import PHOTOS, SHIPPED, weight_file
from flowad_fast.tuning import parts

KINDS = ("mono", "poly")


def test_two_checkpoints_of_at_most_14_megabytes_ship() -> None:
    demo, cells = load_checkpoint("demo"), load_checkpoint("cells")
    assert not demo.spec.classes.conditional
    assert cells.spec.classes.names == KINDS and cells.spec.classes.conditional
    assert all(path.stat().st_size < 14e6 for path in SHIPPED.values())
    for path in SHIPPED.values():
        text = path.with_suffix(".json").read_text(encoding="utf-8")
        assert json.loads(text)["provenance"]["data"]["name"] == "elpv" and "/home" not in text and "/work" not in text
    assert weight_file("cells") == SHIPPED["cells"] and weight_file("x.pth").name == "x.pth"


def test_their_photos_are_of_their_products() -> None:
    for name, layout in PHOTOS.items():
        assert read_dataset(layout, None).categories == load_checkpoint(name).spec.class_names or layout == "elpv"
    mono, both = read_dataset("elpv", None), read_dataset("elpv-cells", None)
    assert both.select("test", "mono") == mono.select("test")
    assert len(both.select("train", "poly")) == 644 and len(both.select("test", "poly")) == 586


def test_good_parts_know_their_class_and_splits_share_none() -> None:
    threshold, statistics = good_parts("cells", KINDS), training_parts("cells", KINDS)
    assert {name: threshold.classes.count(name) for name in KINDS} == {"mono": 59, "poly": 92}
    assert {name: statistics.classes.count(name) for name in KINDS} == {"mono": 413, "poly": 644}
    assert not set(threshold.labels) & set(statistics.labels)
    assert set(good_parts("demo").classes) == {""} and len(training_parts("demo")) == 413
    assert set(good_parts("demo", KINDS).classes) == {"mono"}
    with pytest.raises(CalibrationError, match="cells of mono, poly, and the model has no classes; give demo"):
        good_parts("cells")
    with pytest.raises(CalibrationError, match="the model's classes: screw"):
        good_parts("cells", ("screw",))


def test_parity_frames_have_some_of_every_product_and_kind() -> None:
    given = parity_frames("cells", 8)
    assert given.labels is not None and given.classes is not None
    assert {(int(label), name) for label, name in zip(given.labels, given.classes, strict=True)} == {
        (label, name) for label in (0, 1) for name in KINDS
    }
    assert parity_frames("demo", 4).classes is None and parity_frames(None, 4).source == parity_frames("demo", 4).source


def test_parts_to_tune_on() -> None:
    good, test = parts.good_parts("cells", KINDS), parts.labelled_parts("cells", KINDS)
    assert set(good.classes) == set(test.classes) == set(KINDS) and len(good) == 1057 and len(test) == 1015
    assert set(parts.good_parts("demo", ()).classes) == {""}
    with pytest.raises(ConfigError, match="the model's classes are: none"):
        parts.labelled_parts("cells", ())
