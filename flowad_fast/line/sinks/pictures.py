"""Pictures of parts in a folder that never grows beyond its budget."""

import contextlib
import hashlib
import io
import json
import logging
import re
import shutil
from datetime import UTC
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.evaluation.overlay import heat_range, overlay
from flowad_fast.files import make_folder
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.sinks.base import SinkBase
from flowad_fast.line.sinks.rows import to_row

_log = logging.getLogger(__name__)
_BLOCK = 4096
"""Files take whole blocks of a disk; that is what is counted."""
_STEM = re.compile(r"(\d{4})(\d\d)(\d\d)T\d{12}Z\.[\w-]+\.[\w-]+", re.ASCII)
_ENDINGS = (".png", ".jpg", ".overlay.jpg", ".heat.npy", ".json")
_LONGEST = 60
"""Characters of a camera's or part's name in a file name."""
Group = Literal["good", "rejected"]


class PicturesSettings(SinkBase):
    """A folder with `rejected/<day>/` and `good/<day>/`.

    One part is `<time>.<camera>.<part>` with `.png` or `.jpg` (the frame), `.overlay.jpg` (heat and contours over it),
    `.heat.npy` (the map as float32) and `.json` (see `rows.to_row`). Parts without a frame have no pictures.
    """

    promises_delivery: ClassVar[bool] = False

    kind: Literal["pictures"]
    folder: Path
    budget: int = Field(default=10 << 30, gt=0)
    """Bytes of all pictures together, in whole blocks of 4096. Where they would be more the oldest go: those of good
    parts first; for a good part no rejected one goes."""
    good: float = Field(default=0.01, ge=0, le=1)
    """Share of the parts that pass that is kept, chosen by a hash of their names; of the others all are."""
    format: Literal["png", "jpeg"] = "png"
    """Of frames: png is what the camera gave, jpeg (quality 92) is smaller."""
    heat: tuple[float, float] | None = None
    """Values of the map that have no colour and the most in overlays; None: by each map alone, so that overlays of
    different parts do not compare."""

    @field_validator("heat")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("expected the smaller value first")
        return value

    def open(self) -> "Pictures":
        """The sink."""
        return Pictures(self)

    def check(self) -> str:
        """That the folder can be written, and that its disk has room for the budget."""
        sink = self.open()
        try:
            sink.connect()
            probe = self.folder / "check.part"
            probe.write_bytes(b"")
            probe.unlink()
            free, used = shutil.disk_usage(self.folder).free, sink.used
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error}); choose another folder") from None
        finally:
            sink.close()
        if used + free < self.budget:
            raise ConfigError(
                f"{self.folder}: its disk has room for {used + free} bytes of pictures, the budget is {self.budget}; "
                "lower the budget, or free space"
            )
        return f"{self.folder} can be written and has {used} of {self.budget} bytes"


class Pictures:
    """All rejected parts and a sample of the good.

    Attributes:
        missed: parts whose pictures are larger than the room that may be made for them.
    """

    def __init__(self, settings: PicturesSettings) -> None:
        """Nothing is opened yet."""
        self._settings = settings
        self._lock = FileLock(settings.folder / "lock")
        self._parts: dict[Group, dict[str, int]] | None = None
        """Bytes of each part, oldest first."""
        self._bytes: dict[Group, int] = {"good": 0, "rejected": 0}
        self.missed = 0

    @property
    def used(self) -> int:
        """Bytes of all pictures, in whole blocks."""
        return sum(self._bytes.values())

    def connect(self) -> None:
        """Take stock of the folder, and remove what a killed process left unfinished; ConfigError or OSError."""
        if self._parts is not None:
            return
        make_folder(self._settings.folder)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"{self._settings.folder}: another line keeps its pictures here; give each line a folder of its own"
            ) from None
        self._parts, self._bytes = {"good": {}, "rejected": {}}, {"good": 0, "rejected": 0}
        for group in self._parts:
            for path in sorted((self._settings.folder / group).glob("*/*")):
                match = _STEM.match(path.name)
                if match is None or path.is_symlink() or not path.is_file():
                    continue
                ending = path.name[match.end() :]
                if ending.removesuffix(".part") in _ENDINGS and ending.endswith(".part"):
                    path.unlink()
                elif ending in _ENDINGS:
                    self._add(group, match[0], _blocks(path.stat().st_size))

    def publish(self, events: list[Record | Alarm]) -> None:
        """Store what is to be kept; DeliveryError or ConfigError on failure, which leaves no half part."""
        try:
            self.connect()
            for event in events:
                if isinstance(event, Record) and event.frame is not None:
                    self._store(event)
        except OSError as error:
            self.close()  # so that stock is taken anew
            raise DeliveryError(
                f"{self._settings.folder}: pictures cannot be written ({error.strerror}); free space on its disk, or "
                "lower the budget"
            ) from None

    def close(self) -> None:
        """Let go of the folder."""
        self._parts = None
        self._lock.release(force=True)

    def _store(self, record: Record) -> None:
        assert self._parts is not None
        group: Group = "good" if record.action == "pass" else "rejected"
        stem = file_stem(record)
        if stem in self._parts[group] or group == "good" and not _sampled(record, self._settings.good):
            return
        files = self._encode(record)
        need = sum(_blocks(len(data)) for data in files.values())
        if not self._make_room(need, group):
            self.missed += 1
            _log.warning("sink pictures: no room within the budget for the %s part %r", group, record.part)
            return
        written: list[Path] = []
        try:
            for ending, data in files.items():
                path = self._path(group, stem, ending)
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                written += [path, part]
                part.write_bytes(data)
                part.replace(path)
        except OSError:
            for path in written:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        self._add(group, stem, need)

    def _add(self, group: Group, stem: str, size: int) -> None:
        assert self._parts is not None
        self._parts[group][stem] = self._parts[group].get(stem, 0) + size
        self._bytes[group] += size

    def _make_room(self, need: int, group: Group) -> bool:
        """Remove the oldest until there is room; nothing is removed where that would not be enough."""
        assert self._parts is not None
        may_go: tuple[Group, ...] = ("good",) if group == "good" else ("good", "rejected")
        if need > self._settings.budget - self.used + sum(self._bytes[one] for one in may_go):
            return False
        for one in may_go:
            while self._parts[one] and self.used + need > self._settings.budget:
                self._remove(one, next(iter(self._parts[one])))
        return True

    def _remove(self, group: Group, stem: str) -> None:
        assert self._parts is not None
        folder = self._path(group, stem, "").parent
        for ending in _ENDINGS:
            self._path(group, stem, ending).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # of a day of which nothing is left
        self._bytes[group] -= self._parts[group].pop(stem)

    def _path(self, group: Group, stem: str, ending: str) -> Path:
        match = _STEM.match(stem)
        assert match
        return self._settings.folder / group / "-".join(match.groups()) / (stem + ending)

    def _encode(self, record: Record) -> dict[str, bytes]:
        """Endings of files and what is in them."""
        assert record.frame is not None
        files = {".json": json.dumps(to_row(record), allow_nan=False).encode()}
        if record.heat is not None:
            npy = io.BytesIO()
            np.save(npy, np.asarray(record.heat, np.float32))
            files[".heat.npy"] = npy.getvalue()
            if np.isfinite(record.heat).all():
                low, high = self._settings.heat or heat_range(record.heat)
                drawn = overlay(record.frame, record.heat, low, high, record.regions)
                files[".overlay.jpg"] = _jpeg(drawn, 85)
        if self._settings.format == "png":
            png = io.BytesIO()
            Image.fromarray(record.frame).save(png, "png", compress_level=1)
            return {**files, ".png": png.getvalue()}
        return {**files, ".jpg": _jpeg(record.frame, 92)}


def file_stem(record: Record) -> str:
    """Name of a part's files without ending: time (UTC), camera and part, which sorts by time.

    ASCII letters, digits, `_` and `-` stay; names with others, and long ones, get a hash, so that different names have
    different files.
    """
    return f"{record.arrived.astimezone(UTC):%Y%m%dT%H%M%S%f}Z.{_safe(record.camera)}.{_safe(record.part)}"


def _safe(name: str) -> str:
    plain = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)[:_LONGEST]
    return plain if plain == name and plain else f"{plain}_{_hash(name).hex()[:8]}"


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()


def _sampled(record: Record, share: float) -> bool:
    """Whether a good part is kept: always the same answer for one part."""
    return int.from_bytes(_hash(f"{record.camera}\0{record.part}\0{record.arrived.isoformat()}")[:8]) < share * 2**64


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _jpeg(picture: NDArray[np.uint8], quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=quality)
    return file.getvalue()
