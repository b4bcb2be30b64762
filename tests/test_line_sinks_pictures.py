"""The store of pictures: what is kept, what goes first, and that it never outgrows its budget."""

import errno
import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from line_servers import NOW, record
from PIL import Image
from pydantic import ValidationError

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks.pictures import PicturesSettings, file_stem
from flowad_fast.line.sinks.rows import from_row
from flowad_fast.stages.decision import Verdict
from flowad_fast.stages.regions import Region

FRAME = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
HEAT = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
ONE = 3 * 4096 + 2 * 4096  # a part with FRAME as PNG: two blocks; overlay, map and row: one each


def seen(number: int, result: Verdict | NoResult = Verdict.ANOMALOUS) -> Record:
    return replace(record(f"p{number}", result, NOW + timedelta(seconds=number)), frame=FRAME, heat=HEAT)


def store(folder: Path, **more: object) -> PicturesSettings:
    return PicturesSettings.model_validate({"kind": "pictures", "folder": folder, "good": 1, **more})


def kept(folder: Path, group: str) -> list[str]:
    rows = sorted((folder / group).glob("*/*.json"))
    return [json.loads(row.read_text())["part"] for row in rows]


def size(folder: Path) -> int:
    """Bytes in whole blocks of all files but the lock."""
    return sum(
        -(-one.stat().st_size // 4096) * 4096 for one in folder.rglob("*") if one.is_file() and one.stat().st_size
    )


def test_frame_overlay_map_and_row_stand_beside_each_other(tmp_path: Path) -> None:
    sink = store(tmp_path, heat=(0.0, 1.0)).open()
    part = replace(seen(1), regions=(Region((0, 0, 30, 20), 600, 1, ((0, 0), (30, 0), (30, 20), (0, 20))),))
    sink.publish([Alarm("drift", NOW, "t"), part])
    folder = tmp_path / "rejected" / "2026-01-02"
    stem = "20260102T030406000006Z.c.p1"
    endings = {".png", ".overlay.jpg", ".heat.npy", ".json"}
    assert {one.name for one in folder.iterdir()} == {stem + ending for ending in endings}
    assert np.array_equal(np.asarray(Image.open(folder / f"{stem}.png")), FRAME)
    assert np.array_equal(np.load(folder / f"{stem}.heat.npy"), HEAT)
    assert from_row(json.loads((folder / f"{stem}.json").read_text())) == part
    drawn = np.asarray(Image.open(folder / f"{stem}.overlay.jpg"))
    assert drawn.shape == FRAME.shape and np.abs(drawn.astype(int) - FRAME).mean() > 20
    assert drawn[20, 5:25].mean() > 180  # the contour
    sink.close()


def test_jpeg_no_map_and_a_map_that_is_not_finite(tmp_path: Path) -> None:
    sink = store(tmp_path, format="jpeg").open()
    broken = HEAT.copy()
    broken[0, 0] = np.nan
    sink.publish([replace(seen(1), heat=None), replace(seen(2, Verdict.INVALID), heat=broken)])
    names = sorted("".join(one.suffixes[2:]) for one in tmp_path.glob("rejected/*/*"))
    assert names == [".heat.npy", ".jpg", ".jpg", ".json", ".json"]
    sink.close()


def test_all_rejected_and_the_same_sample_of_good_are_kept(tmp_path: Path) -> None:
    parts = [replace(seen(i, Verdict.GOOD), heat=None, frame=FRAME[:2, :2]) for i in range(400)]
    rejected = [seen(1000), seen(1001, NoResult.LATE), replace(seen(1002), frame=None)]
    samples = []
    for name in ("a", "b"):
        sink = store(tmp_path / name, good=0.1).open()
        sink.publish([*parts, *rejected])
        sink.publish([*parts, *rejected])
        assert kept(tmp_path / name, "rejected") == ["p1000", "p1001"]
        samples.append(kept(tmp_path / name, "good"))
        sink.close()
    assert samples[0] == samples[1] and 20 < len(samples[0]) < 65
    none = store(tmp_path / "c", good=0).open()
    none.publish(list(parts))
    assert kept(tmp_path / "c", "good") == []
    none.close()


def test_good_goes_before_rejected_and_the_oldest_first(tmp_path: Path) -> None:
    sink = store(tmp_path, budget=4 * ONE + 100).open()
    sink.publish([seen(0), seen(1, Verdict.GOOD), seen(2, Verdict.GOOD), seen(3)])
    assert sink.used == 4 * ONE == size(tmp_path)
    sink.publish([seen(4, Verdict.GOOD)])
    assert (kept(tmp_path, "rejected"), kept(tmp_path, "good")) == (["p0", "p3"], ["p2", "p4"])
    sink.publish([seen(5), seen(6)])
    assert (kept(tmp_path, "rejected"), kept(tmp_path, "good")) == (["p0", "p3", "p5", "p6"], [])
    sink.publish([seen(7, Verdict.GOOD)])
    assert kept(tmp_path, "good") == [] and sink.missed == 1
    sink.publish([seen(8)])
    assert kept(tmp_path, "rejected") == ["p3", "p5", "p6", "p8"]
    sink.close()


def test_the_budget_holds_over_restarts_and_a_smaller_one_takes_effect(tmp_path: Path) -> None:
    sink = store(tmp_path, budget=3 * ONE).open()
    sink.publish([seen(0), seen(1, Verdict.GOOD), seen(86400)])
    sink.close()
    left = tmp_path / "rejected" / "2026-01-02" / f"{file_stem(seen(0))}.png.part"
    left.write_bytes(bytes(100_000))
    mine = tmp_path / "rejected" / "2026-01-02" / "notes.txt"
    mine.write_text("a person's own")
    sink = store(tmp_path, budget=2 * ONE).open()
    sink.publish([seen(86401)])
    assert not left.exists() and mine.exists() and sink.used == 2 * ONE
    assert (kept(tmp_path, "rejected"), kept(tmp_path, "good")) == (["p86400", "p86401"], [])
    mine.unlink()
    sink.publish([seen(86402)])
    assert size(tmp_path) == 2 * ONE
    sink.close()


def test_a_part_larger_than_the_budget_removes_nothing(tmp_path: Path) -> None:
    sink = store(tmp_path, budget=2 * ONE).open()
    sink.publish([seen(0)])
    large = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    sink.publish([replace(seen(1), frame=large)])
    assert kept(tmp_path, "rejected") == ["p0"] and sink.missed == 1
    sink.close()


def test_the_budget_holds_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, sizes, real = 5 * ONE, [], Path.write_bytes

    def measured(path: Path, data: bytes) -> int:
        written = real(path, data)
        sizes.append(size(tmp_path))
        return written

    monkeypatch.setattr(Path, "write_bytes", measured)
    sink = store(tmp_path, budget=budget).open()
    numbers = np.random.default_rng(1)
    for i in range(60):
        side = int(numbers.integers(1, 90))
        frame = numbers.integers(0, 256, (side, side, 3), dtype=np.uint8)
        result = Verdict.GOOD if numbers.random() < 0.5 else Verdict.ANOMALOUS
        sink.publish([replace(seen(i, result), frame=frame)])
    assert 0.8 * budget < max(sizes) <= budget
    sink.close()


@pytest.mark.parametrize("at", [0, 3])
def test_a_full_disk_is_one_error_leaves_no_half_part_and_then_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    sink = store(tmp_path).open()
    sink.publish([seen(0)])
    before, calls, real = sorted(tmp_path.rglob("*")), [], Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) > at:
            real(path, data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DeliveryError, match="No space left on device.*; free space on its disk, or lower the budget"):
        sink.publish([seen(1), seen(2)])
    monkeypatch.undo()
    assert len(calls) == at + 1 and sorted(tmp_path.rglob("*")) == before
    sink.publish([seen(1), seen(2)])
    assert kept(tmp_path, "rejected") == ["p0", "p1", "p2"] and sink.used == 3 * ONE == size(tmp_path)
    sink.close()


def test_what_a_broken_disk_left_behind_is_counted_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = store(tmp_path).open()
    real = Path.write_bytes

    def broken(path: Path, *_: object, **__: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def half(path: Path, data: bytes) -> int:
        monkeypatch.setattr(Path, "unlink", broken)
        return real(path, data) if path.name.endswith(".json.part") else broken(path)

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(DeliveryError, match="Input/output error"):
        sink.publish([seen(1)])
    monkeypatch.undo()
    assert size(tmp_path) > 0
    sink.publish([seen(2)])
    assert sink.used == size(tmp_path) == ONE + 4096
    sink.close()


@given(st.text(max_size=80), st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_name_is_a_safe_file_name_and_different_names_differ(one: str, other: str) -> None:
    stems = [file_stem(record(name)) for name in (one, other)]
    assert all(stem.isascii() and len(stem) < 200 and Path(stem).name == stem for stem in stems)
    assert all(set(stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for stem in stems)
    assert (stems[0] == stems[1]) == (one == other)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", ".", "con", "a\0b", "\udcff", "x" * 500, "a.overlay", "é"])
def test_parts_with_odd_names_stay_within_the_folder_and_are_found_again(tmp_path: Path, name: str) -> None:
    sink = store(tmp_path / "store").open()
    sink.publish([replace(seen(0), part=name, camera=name)])
    sink.close()
    sink.publish([])
    assert sink.used == size(tmp_path / "store") > 0
    assert {one.name for one in tmp_path.iterdir()} == {"store"}
    sink.close()


def test_check_says_what_would_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "can be written and has 0 of 4096 bytes" in store(tmp_path / "a", budget=4096).check()
    sink = store(tmp_path / "a").open()
    sink.publish([seen(0)])
    with pytest.raises(ConfigError, match="another line keeps its pictures here"):
        store(tmp_path / "a").check()
    sink.close()
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ConfigError, match="its disk has room for .*lower the budget"):
        store(tmp_path / "a", budget=10 * free).check()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        store(tmp_path / "file" / "b").check()
    with pytest.raises(ValidationError, match="expected the smaller value first"):
        store(tmp_path, heat=(1, 1))
