"""The artefact: one folder with one manifest. Exporters write it, engines read it, nothing else is shared.

A bundle is written in a folder beside its target and exchanged with it at the end, so a crash at any moment leaves the
old one as it was. Every file is listed with its SHA-256 and is verified before anything parses it.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
from pydantic import Field, model_validator

from flowad_fast.config import Certified, Frozen, ModelConfig, Tiling, parse, read_mapping
from flowad_fast.errors import BundleError
from flowad_fast.files import exchange as exchange
from flowad_fast.files import replacing, sha256, sync, sync_tree
from flowad_fast.stages.decision import Aggregate, Calibration
from flowad_fast.stages.scorers import Scorer
from flowad_fast.tuning.recipe import FollowedRecipe

MANIFEST, REJECTED, LOCK = "manifest.json", "rejected.json", ".lock"
ARTEFACT_FILE = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*/)*[A-Za-z0-9][A-Za-z0-9._-]*")
"""A plain relative path: no empty, hidden, `.` or `..` component, so nothing outside the folder can be named."""

LOCATION = "location"
"""The input of an exported graph that takes location statistics."""
CONSTANT_LOCATION = "constant_location"
"""Detail of an artefact whose graph holds the location statistics, which cannot be fitted anew without an export."""
EngineName = Literal["eager", "onnxruntime", "openvino-int8", "tensorrt", "tensorrt-rtx", "inductor"]


class Parity(Frozen):
    """One artefact against the fp32 reference on the same frames; errors are relative to the reference map's scale.

    `scale` is the standard deviation of the reference map, `score_error` the largest error of a raw score relative to
    the standard deviation of the reference scores. The verdict holds the maximum and RMS map errors against
    `tolerance` and `rms_tolerance`.
    """

    passed: bool
    frames: int = Field(gt=0)
    source: str
    device: str
    scale: float
    max_error: float
    rms_error: float
    spearman: float | None
    score_error: float
    tolerance: float
    rms_tolerance: float
    auroc_difference: float | None = None


class Artefact(Frozen):
    """One engine file (and its companions) of a bundle."""

    engine: EngineName
    files: dict[str, str]
    """File name to SHA-256; the first is the one that the engine opens."""
    precision: Certified = "fp32"
    versions: dict[str, str] = {}
    build_seconds: float | None = None
    parity: Parity | None = None
    unmeasured: str | None = None
    """Why `parity` is missing: what the machine that exported this lacks to run it."""
    details: dict[str, Any] = {}


class Location(Frozen):
    """Location statistics of a bundle, see `stages.location`; engines are given them, so they can be fitted anew.

    `file` holds the table (classes, 2, h, w), float32, little-endian. By class name: how many good parts they rest on,
    and how far a cell's own mean and std are believed. `source` says which parts those were.
    """

    file: str
    sha256: str
    parts: dict[str, int]
    mean_weight: dict[str, float]
    std_weight: dict[str, float]
    source: str


class Mask(Frozen):
    """The fixed mask of a bundle: a PNG of the frame's size, white where nothing is ever judged."""

    file: str
    sha256: str


class Manifest(Frozen):
    """Everything that a production line must know about a bundle, and nothing that it must guess."""

    schema_version: Literal[1] = 1
    project_version: str
    created: str
    source: dict[str, Any]
    model: ModelConfig
    scorer: Scorer = Field(discriminator="kind")
    aggregate: Aggregate = "max"
    frame_size: tuple[int, int] | None = None
    """Height and width of the frames, None when any size is accepted (and resized, or tiled, as in training)."""
    artefacts: dict[str, Artefact]
    calibration: Calibration | None = None
    location: Location | None = None
    probe_choice: dict[str, Any] | None = None
    """How the number of density probes was chosen, when it was chosen by measured error."""
    recipe: FollowedRecipe | None = None
    """What scorer and aggregate were chosen by, with its evidence; None where no recipe was given."""
    tiling: Tiling | None = None
    """How frames are cut into tiles, which the artefacts then take in place of frames; None: they take whole frames."""
    mask: Mask | None = None

    @model_validator(mode="after")
    def _masked_tiles(self) -> "Manifest":
        if self.mask is not None and (self.tiling is None or self.frame_size is None):
            raise ValueError("a mask goes with a tiling and a frame_size; got one of them alone")
        return self

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the map of frames of this size."""
        size = self.model.image.size
        return (size, size) if self.tiling is None else self.tiling.map_size(height, width)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_bundle(path: str | Path) -> bool:
    """Whether `path` is a folder with a manifest; nothing is checked."""
    return (Path(path) / MANIFEST).is_file()


def read(path: str | Path, verify: bool = True) -> tuple[Path, Manifest]:
    """The manifest of the bundle at `path`, after checking the listed files' names, kinds and hashes.

    Raises:
        BundleError: no bundle there, a manifest of another version, or a file that is missing, a link, or altered.
        ConfigError: a manifest that is no JSON or has an unknown, missing or impossible field.
    """
    folder = Path(path)
    if not is_bundle(folder):
        rejected = (folder / REJECTED).is_file()
        what = "a rejected export, see its README.md" if rejected else f"no bundle: there is no {MANIFEST}"
        raise BundleError(f"{folder}: {what}; make one with flowad-export make CHECKPOINT")
    data = read_mapping(folder / MANIFEST)
    if data.get("schema_version") != 1:
        raise BundleError(
            f"{folder}: manifest schema {data.get('schema_version')!r}, this version reads 1; export the bundle again"
        )
    manifest = parse(Manifest, data, str(folder / MANIFEST))
    for artefact in manifest.artefacts.values():
        for name, expected in artefact.files.items():
            if verify:
                verify_file(folder, name, expected)
    for beside in (manifest.location, manifest.mask):
        if beside is not None and verify:
            verify_file(folder, beside.file, beside.sha256)
    return folder, manifest


def location_table(folder: Path, manifest: Manifest) -> np.ndarray:
    """The location statistics of a bundle that has some, (classes, 2, h, w) float32; the hash is checked.

    Raises:
        BundleError: the file is missing, altered, or of another size.
    """
    assert manifest.location is not None
    path = verify_file(folder, manifest.location.file, manifest.location.sha256)
    velocity = manifest.model.velocity
    shape = (manifest.model.classes.rows, 2, velocity.height, velocity.width)
    table = np.fromfile(path, "<f4")
    if table.size != np.prod(shape) or not np.isfinite(table).all():
        raise BundleError(f"{path}: {table.size} numbers, expected {np.prod(shape)}, all finite; calibrate it again")
    return table.astype(np.float32).reshape(shape)


def write_location(folder: Path, table: np.ndarray) -> tuple[str, str]:
    """Write a table of location statistics beside those that are there; returns its file's name and SHA-256."""
    data = np.ascontiguousarray(table, "<f4").tobytes()
    digest = hashlib.sha256(data).hexdigest()
    name = f"{LOCATION}-{digest[:12]}.f32"
    with replacing(folder / name) as file:
        file.write(data)
    return name, digest


def verify_file(folder: Path, name: str, expected: str) -> Path:
    """The path of a bundle's file, after checking that it is a plain file inside the folder with this SHA-256.

    Raises:
        BundleError: a name that leads out of the folder, a file that is missing or a link, or another hash.
    """
    if not ARTEFACT_FILE.fullmatch(name):
        raise BundleError(f"{folder}: the manifest names {name!r}, which is no plain file name")
    path = folder / name
    links = [part for part in (path, *path.parents[: name.count("/")]) if part.is_symlink()]
    if links or not path.is_file():
        raise BundleError(f"{path}: missing, or not a plain file; export the bundle again")
    got = sha256(path)
    if got != expected:
        raise BundleError(
            f"{path}: SHA-256 is {got[:16]}…, the manifest says {expected[:16]}…: the file was altered or damaged; "
            "copy or export the bundle again"
        )
    return path


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace the manifest, so that a crash at any moment leaves the old or the new one."""
    with replacing(folder / MANIFEST) as file:
        file.write((manifest.model_dump_json(indent=2) + "\n").encode())


@contextmanager
def locked(target: str | Path) -> Iterator[Path]:
    """Exclude other writers of the bundle at `target`; yields its real path, links followed.

    The lock belongs to the process and goes with it, however it ends; its empty file stays.

    Raises:
        BundleError: another process is writing it now, or the folder that it lies in cannot be written.
    """
    target = Path(target).resolve()
    lock = _acquire(target, target.parent / f".{target.name}.lock")
    try:
        yield target
    finally:
        lock.release()


@contextmanager
def editing(target: str | Path) -> Iterator[Path]:
    """As `locked`, for a change of the existing bundle's manifest, after checking that the bundle can be written.

    A bundle that is a mount point lies in a folder that its user cannot write; its lock is then inside it.

    Raises:
        BundleError: another process is writing it now, or it cannot be written.
    """
    target = Path(target).resolve()
    try:
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise _read_only(target, error) from None
    beside = target.parent / f".{target.name}.lock"
    inside = not os.access(target.parent, os.W_OK) and not os.access(beside, os.W_OK)
    lock = _acquire(target, target / LOCK if inside else beside)
    try:
        yield target
    finally:
        lock.release()


def _acquire(target: Path, path: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BundleError(f"{target}: another export is writing this bundle; wait for it or choose --output") from None
    except OSError as error:
        raise _read_only(target, error) from None
    return lock


def _read_only(target: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{target}: cannot be written ({error.strerror}); copy the bundle to a folder of yours, and use the copy"
    )


@contextmanager
def writing(target: str | Path) -> Iterator[Path]:
    """A fresh folder beside `target`, under a lock; `publish` makes it the bundle, otherwise it vanishes at the end.

    What killed exports left behind is put right first.

    Raises:
        BundleError: another export is writing the same bundle, `target` exists and is no bundle, or the disk refuses.
    """
    check_target(target)
    try:
        with locked(target) as real:
            _recover(real)
            aside = real.parent / f".{real.name}.new-{os.getpid()}"
            aside.mkdir()
            try:
                yield aside
            finally:
                if aside.exists():
                    shutil.rmtree(aside)
    except OSError as error:
        raise BundleError(f"{target}: cannot be written ({error}); what was there is as it was") from error


def check_target(target: str | Path) -> None:
    """Refuse to write where something lies that is no bundle.

    Raises:
        BundleError: `target` exists and is neither a bundle nor an empty folder.
    """
    target = Path(target)
    if target.exists() and not is_bundle(target) and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"{target}: exists and is no bundle; choose another --output")


def publish(aside: Path, target: str | Path) -> None:
    """Make the finished folder `aside` the bundle at `target`, in one step that a crash cannot halve."""
    target = Path(target).resolve()
    sync_tree(aside)
    exchange(aside, target)
    sync(target.parent)


def rejected_path(target: str | Path) -> Path:
    """Where the artefacts of an export to `target` go that did not pass."""
    target = Path(target)
    return target.with_name(target.name + ".rejected")


def reject(folder: Path, target: str | Path) -> Path:
    """Keep the failing artefacts in `folder` under a `.rejected` name, without touching the bundle at `target`.

    Raises:
        BundleError: something else than a rejected export lies there.
    """
    rejected = rejected_path(target)
    if rejected.exists():
        if not (rejected / REJECTED).is_file():
            raise BundleError(f"{rejected}: exists and is no rejected export; move it away")
        shutil.rmtree(rejected)
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).rename(folder / REJECTED)
    folder.rename(rejected)
    return rejected


def _recover(target: Path) -> None:
    """Sweep what killed exports of `target` left, and restore a bundle that was moved away and not yet replaced."""
    left = {
        kind: [p for p in target.parent.iterdir() if re.fullmatch(rf"\.{re.escape(target.name)}\.{kind}-\d+", p.name)]
        for kind in ("old", "new")
    }
    if left["old"] and not target.exists():
        left["old"].pop().rename(target)
    for folder in left["old"] + left["new"]:
        shutil.rmtree(folder)
