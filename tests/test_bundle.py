import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from flowad_fast import bundle, files
from flowad_fast.bundle import Artefact, Manifest, Parity
from flowad_fast.config import ModelConfig, VelocityConfig
from flowad_fast.errors import BundleError, ConfigError
from flowad_fast.files import sha256
from flowad_fast.stages.decision import Calibration, ClassCalibration
from flowad_fast.stages.scorers import SCORERS, Density

MODEL = ModelConfig(
    velocity=VelocityConfig(channels=192, height=4, width=4, hidden_size=16, depth=1, num_heads=2),
    backbone="efficientnet-lite0",
    image={"size": 64},  # type: ignore[arg-type]
)
PARITY = Parity(
    passed=True, frames=3, source="test", device="cpu", scale=1.0, max_error=1e-6, rms_error=1e-7, spearman=None,
    score_error=1e-6, tolerance=1e-3, rms_tolerance=1e-4,
)  # fmt: skip


def fill(folder: Path, content: bytes = b"engine") -> Manifest:
    """A bundle of one engine in a file and a companion in a sub-folder; nothing in it runs."""
    (folder / "sub").mkdir()
    (folder / "engine.bin").write_bytes(content)
    (folder / "sub" / "extra.bin").write_bytes(b"extra")
    files = {name: sha256(folder / name) for name in ("engine.bin", "sub/extra.bin")}
    manifest = Manifest(
        project_version="0",
        created=bundle.now(),
        source={},
        model=MODEL,
        scorer=Density(steps=2, probes=3, seed=4),
        artefacts={"onnx": Artefact(engine="onnxruntime", files=files, parity=PARITY)},
    )
    bundle.write_manifest(folder, manifest)
    return manifest


def make(target: Path, content: bytes = b"engine") -> Manifest:
    with bundle.writing(target) as aside:
        manifest = fill(aside, content)
        bundle.publish(aside, target)
    return manifest


def content(target: Path) -> bytes:
    folder, _ = bundle.read(target)
    return (folder / "engine.bin").read_bytes()


def edit(target: Path, **changes: Any) -> None:
    path = target / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


@pytest.mark.parametrize("kind", SCORERS)
def test_manifest_survives_json(kind: str) -> None:
    manifest = Manifest(
        project_version="1",
        created=bundle.now(),
        source={"sha256": "0"},
        model=MODEL,
        scorer=SCORERS[kind](),
        frame_size=(480, 640),
        artefacts={"onnx": Artefact(engine="onnxruntime", files={"a": "b"}, parity=PARITY)},
        calibration=Calibration(alpha=0.1, classes={"": ClassCalibration(threshold=1.5, parts=9)}),
    )
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = make(tmp_path / "b")
    assert bundle.read(tmp_path / "b") == (tmp_path / "b", manifest)
    assert names(tmp_path) == {"b"}


@pytest.mark.parametrize("file", ["engine.bin", "sub/extra.bin"])
def test_one_altered_byte_is_a_hash_mismatch(tmp_path: Path, file: str) -> None:
    make(tmp_path / "b")
    path = tmp_path / "b" / file
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"SHA-256 is .*the manifest says .*altered or damaged"):
        bundle.read(tmp_path / "b")


def test_a_missing_file(tmp_path: Path) -> None:
    make(tmp_path / "b")
    (tmp_path / "b" / "engine.bin").unlink()
    with pytest.raises(BundleError, match="engine.bin: missing, or not a plain file"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize("linked", ["engine.bin", "sub"])
def test_links_are_refused_even_to_the_same_content(tmp_path: Path, linked: str) -> None:
    make(tmp_path / "b")
    (tmp_path / "b" / linked).rename(tmp_path / "elsewhere")
    (tmp_path / "b" / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="missing, or not a plain file"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize(
    "name",
    ["../engine.bin", "sub/../engine.bin", "/etc/passwd", "", ".", "..", "sub//extra.bin", "sub\\x", "a\0b", ".x"],
)
def test_names_that_could_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path / "b")
    (tmp_path / "engine.bin").write_bytes(b"engine")
    edit(
        tmp_path / "b", artefacts={"onnx": {"engine": "onnxruntime", "files": {name: sha256(tmp_path / "engine.bin")}}}
    )
    with pytest.raises(BundleError, match="no plain file name"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version(tmp_path: Path, version: object) -> None:
    make(tmp_path / "b")
    edit(tmp_path / "b", schema_version=version)
    with pytest.raises(BundleError, match="this version reads 1; export the bundle again"):
        bundle.read(tmp_path / "b")


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    make(tmp_path / "b")
    edit(tmp_path / "b", agregate="max")
    with pytest.raises(ConfigError, match="unknown key 'agregate'; did you mean 'aggregate'"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "model": 3}', "[" * 9999]
)
def test_a_damaged_manifest_is_one_clear_error(tmp_path: Path, text: str) -> None:
    make(tmp_path / "b")
    (tmp_path / "b" / "manifest.json").write_text(text)
    with pytest.raises((BundleError, ConfigError), match="manifest"):
        bundle.read(tmp_path / "b")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle.*flowad-export make CHECKPOINT"):
        bundle.read(tmp_path)


def test_a_rejected_export_is_no_bundle(tmp_path: Path) -> None:
    with bundle.writing(tmp_path / "b") as aside:
        fill(aside)
        rejected = bundle.reject(aside, tmp_path / "b")
    assert rejected == tmp_path / "b.rejected"
    with pytest.raises(BundleError, match="a rejected export"):
        bundle.read(rejected)
    assert names(tmp_path) == {"b.rejected"}


def test_a_later_rejection_replaces_the_earlier_but_nothing_else(tmp_path: Path) -> None:
    for text in (b"first", b"second"):
        with bundle.writing(tmp_path / "b") as aside:
            fill(aside, text)
            bundle.reject(aside, tmp_path / "b")
    assert (tmp_path / "b.rejected" / "engine.bin").read_bytes() == b"second"
    (tmp_path / "c.rejected").mkdir()
    (tmp_path / "c.rejected" / "mine").touch()
    with bundle.writing(tmp_path / "c") as aside, pytest.raises(BundleError, match="no rejected export; move it away"):
        fill(aside)
        bundle.reject(aside, tmp_path / "c")
    assert names(tmp_path / "c.rejected") == {"mine"}


def test_what_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "file").touch()
    for target in ("photos", "file"):
        with (
            pytest.raises(BundleError, match="exists and is no bundle; choose another --output"),
            bundle.writing(tmp_path / target),
        ):
            pass
    assert names(tmp_path) == {"photos", "file"}


def test_an_error_while_writing_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "b", b"old")
    with pytest.raises(RuntimeError, match="boom"), bundle.writing(tmp_path / "b") as aside:
        fill(aside, b"new")
        raise RuntimeError("boom")
    assert content(tmp_path / "b") == b"old"
    assert names(tmp_path) == {"b"}


def test_a_full_disk_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "b", b"old")
    with (
        pytest.raises(BundleError, match="cannot be written.*No space left.*as it was"),
        bundle.writing(tmp_path / "b") as aside,
    ):
        fill(aside, b"new")
        raise OSError(28, "No space left on device")
    assert content(tmp_path / "b") == b"old"
    assert names(tmp_path) == {"b"}


def _hold(target: Path, ready: Any, done: Any) -> None:
    with bundle.writing(target):
        ready.set()
        done.wait(60)


def test_a_second_exporter_is_locked_out_until_the_first_ends(tmp_path: Path) -> None:
    make(tmp_path / "b", b"old")
    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "b", ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(BundleError, match="another export is writing"), bundle.writing(tmp_path / "b"):
        pass
    assert content(tmp_path / "b") == b"old"
    process.kill()  # even a killed holder lets go, and what it left is swept
    process.join()
    assert any(".new-" in name for name in names(tmp_path))
    make(tmp_path / "b", b"new")
    assert content(tmp_path / "b") == b"new"
    assert names(tmp_path) == {"b"}


def test_the_exchange_is_atomic_where_the_system_can(tmp_path: Path) -> None:
    if files._renameat2() is None:
        pytest.skip("this C library has no renameat2")
    make(tmp_path / "b", b"old")
    (tmp_path / "new").mkdir()
    fill(tmp_path / "new", b"new")
    bundle.exchange(tmp_path / "new", tmp_path / "b")
    assert content(tmp_path / "b") == b"new"
    assert content(tmp_path / "new") == b"old"  # a reader in the middle of it still finds every file


def test_without_it_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_renameat2", lambda: None)
    make(tmp_path / "b", b"old")
    make(tmp_path / "b", b"new")
    assert content(tmp_path / "b") == b"new"
    assert names(tmp_path) == {"b"}


def test_a_crash_between_the_two_renames_is_repaired_by_the_next_export(tmp_path: Path) -> None:
    make(tmp_path / "b", b"old")
    (tmp_path / ".b.new-999").mkdir()
    fill(tmp_path / ".b.new-999", b"half-way")
    (tmp_path / "b").rename(tmp_path / ".b.old-999")
    with pytest.raises(RuntimeError), bundle.writing(tmp_path / "b"):
        raise RuntimeError("this export fails too")
    assert content(tmp_path / "b") == b"old"
    assert names(tmp_path) == {"b"}


def test_a_crash_after_the_exchange_keeps_the_new_bundle(tmp_path: Path) -> None:
    make(tmp_path / "b", b"new")
    for kind in ("new", "old"):
        (tmp_path / f".b.{kind}-999").mkdir()
        fill(tmp_path / f".b.{kind}-999", b"old")
    with bundle.writing(tmp_path / "b"):
        pass
    assert content(tmp_path / "b") == b"new"
    assert names(tmp_path) == {"b"}


def test_only_this_targets_left_overs_are_swept(tmp_path: Path) -> None:
    others = {".b.new-1.new-2", ".bb.new-1", ".b.new-x", ".a[b].new-1", "b.new-1"}
    for name in others:
        (tmp_path / name).mkdir()
    make(tmp_path / "b")
    assert names(tmp_path) == others | {"b"}
    make(tmp_path / "a[b]")
    assert names(tmp_path) == others - {".a[b].new-1"} | {"b", "a[b]"}


def test_a_link_to_a_bundle_is_followed(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    make(tmp_path / "store" / "v1", b"old")
    (tmp_path / "current").symlink_to(tmp_path / "store" / "v1")
    make(tmp_path / "current", b"new")
    assert (tmp_path / "current").is_symlink()
    assert content(tmp_path / "store" / "v1") == b"new"


def test_the_target_may_be_the_working_directory_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    make(Path("."), b"new")
    assert content(tmp_path / "b") == b"new"


def test_replacing_the_manifest_survives_a_crash_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(tmp_path / "b")

    def crash(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(ConfigError, match="cannot be written.*No space left"):
        bundle.write_manifest(tmp_path / "b", manifest.model_copy(update={"aggregate": "sum"}))
    assert bundle.read(tmp_path / "b")[1] == manifest


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", '"nan"'])
def test_a_threshold_that_is_not_finite_is_refused(tmp_path: Path, number: str) -> None:
    """No score is greater than NaN: with such a threshold every part would be good."""
    make(tmp_path / "b")
    edit(tmp_path / "b", calibration={"alpha": 0.1, "classes": {"": {"threshold": "?", "parts": 9}}})
    path = tmp_path / "b" / "manifest.json"
    path.write_text(path.read_text().replace('"?"', number))
    with pytest.raises(ConfigError, match="calibration.classes..threshold: Input should be a finite number"):
        bundle.read(tmp_path / "b")
