"""What `flowad-inspect` does with files: the result of each, and overlays on a scale that they share."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowad_fast.data.images import Stamp
from flowad_fast.errors import CalibrationError, ConfigError, FlowADError
from flowad_fast.evaluation.overlay import heat_range, overlay
from flowad_fast.evaluation.results import COLUMNS as COLUMNS
from flowad_fast.evaluation.results import FORMATS as FORMATS
from flowad_fast.evaluation.results import STATUSES as STATUSES
from flowad_fast.evaluation.results import Result, Status, lock, read_text, written
from flowad_fast.evaluation.results import ResultFile as ResultFile
from flowad_fast.evaluation.results import Row as Row
from flowad_fast.evaluation.results import bundle_identity as bundle_identity
from flowad_fast.evaluation.results import located as located
from flowad_fast.evaluation.scanning import WINDOW_BYTES as WINDOW_BYTES
from flowad_fast.evaluation.scanning import Frame as Frame
from flowad_fast.evaluation.scanning import FrameFiles as FrameFiles
from flowad_fast.evaluation.scanning import Scanned, StampedFiles, scan
from flowad_fast.evaluation.scanning import read_ahead as read_ahead
from flowad_fast.files import make_folder, replacing
from flowad_fast.stages.decision import Verdict

if TYPE_CHECKING:
    from flowad_fast.bundle import Manifest
    from flowad_fast.detector import Detection, Detector

SCALE = "scale.json"
"""Beside overlays: the map values that are drawn as no heat and as most heat, by class."""
_SCALE_FRAMES, _SCALE_VALUES = 16, 1 << 20
_LONGEST_NAME = 251
"""Bytes of a photo's name to which `.png` can be added."""


def inspect_files(
    detector: "Detector", paths: Sequence[Path], classes: Sequence[str] | None = None, batch: int = 8
) -> Iterator[Result]:
    """Each file's result, in the order of `paths`; a file that cannot be judged gives a row, never an exception.

    `classes` has the class of each file, for conditional bundles; an unknown one makes an error row.
    """
    names = classes or [""] * len(paths)
    labels = [detector.classes.label(name) for name in names] if any(names) else None
    files = StampedFiles(paths)
    for i, one in enumerate(scan(detector, files, labels, batch)):
        if isinstance(one, FlowADError):
            yield Result(paths[i], "error", class_name=names[i], reason=_one_line(one), stamp=files.stamps[i])
        else:
            yield _result(paths[i], names[i], one, files.stamps[i])


def _result(path: Path, name: str, one: Scanned["Detection"], found: Stamp | None) -> Result:
    detection, i = one.detection, one.place
    if reason := detection.invalid[i]:
        return Result(path, "invalid", None, name, reason, one.frame, stamp=found)
    status: Status = "uncalibrated"
    score, reason = None, ""
    try:
        score = float(detection.score[i])
        status = "anomalous" if detection.verdict[i] is Verdict.ANOMALOUS else "good"
    except CalibrationError as error:
        # Without a calibration an aggregate of several terms has no score either.
        reason = _one_line(error) if score is None else ""
    regions = None if detection.no_regions[i] else detection.regions[i]
    return Result(path, status, score, name, reason, one.frame, detection.map[i], found, regions, detection.judged)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def without_regions(detector: "Detector | Manifest") -> str | None:
    """Why results of a calibrated detector, or bundle, have no regions (of some classes), None where they have."""
    classes = detector.calibration.classes if detector.calibration else {}
    lacking = [name for name, one in classes.items() if one.pixels is None]
    of = f" of {', '.join(lacking)}" if any(lacking) else ""
    return f"the calibration{of} has no pixel threshold; calibrate again to have them" if lacking else None


def threshold(detector: "Detector", class_name: str = "") -> float | None:
    """The calibrated threshold as a value of the map: there is one where the image score is the map's maximum."""
    one = detector.calibration.classes.get(class_name) if detector.calibration else None
    return one.threshold if one and detector.aggregate == "max" else None


def heat_ranges(
    detector: "Detector", paths: Sequence[Path], classes: Sequence[str] | None = None
) -> dict[str, tuple[float, float]]:
    """The heat range of each class (see `overlay.heat_range`), from the maps of up to 16 files spread over `paths`.

    Classes of which no file can be scored are left out.
    """
    of_class: dict[str, list[Path]] = {}
    for path, name in zip(paths, classes or [""] * len(paths), strict=True):
        of_class.setdefault(name, []).append(path)
    ranges = {}
    for name, files in of_class.items():
        count = min(len(files), _SCALE_FRAMES)
        chosen = [files[i * len(files) // count] for i in range(count)]
        found = inspect_files(detector, chosen, [name] * count)
        values = [_typical(one) for one in found if one.map is not None]
        if values:
            ranges[name] = heat_range(np.concatenate(values), threshold(detector, name))
    return ranges


def _typical(one: Result) -> NDArray[np.float32]:
    """The judged values of a result's map; of a very large one an even share, and the highest."""
    assert one.map is not None
    values = one.map.ravel() if one.judged is None else one.map[one.judged]
    step = -(-len(values) // _SCALE_VALUES)
    return np.append(values[::step], values.max()) if step > 1 else values


class OverlayFolder(AbstractContextManager["OverlayFolder"]):
    """A folder for the overlays of one run at a time, which the constructor makes and locks.

    Raises:
        ConfigError: it cannot be written, another run has it, or it holds overlays of another bundle.
    """

    def __init__(self, folder: Path, bundle: str) -> None:
        self.folder, self.bundle = folder, bundle
        make_folder(folder)
        self._lock = lock(folder / ".lock", f"{folder}: another run is writing these overlays")
        try:
            self.ranges = _read_scale(folder / SCALE, bundle)
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def writer(self, detector: "Detector", root: Path, files: Mapping[Path, str]) -> Callable[[Result], None]:
        """A function that writes a result's overlay, as PNG, at the place that its file has below `root`.

        All overlays of a class share the scale that the folder has or, from `files` (with their classes), gets now.

        Raises:
            ConfigError: the scale, or later an overlay, cannot be written.
        """
        missing = [path for path, name in files.items() if name not in self.ranges]
        self._keep(heat_ranges(detector, missing, [files[path] for path in missing]))

        def write(result: Result) -> None:
            if result.frame is None or result.map is None:
                return
            if (name := result.class_name) not in self.ranges:  # none of the files that were tried could be scored
                self._keep({name: heat_range(_typical(result), threshold(detector, name))})
            place = self._place(result.path.relative_to(root))
            picture = io.BytesIO()
            heat = overlay(result.frame, result.map, *self.ranges[name], regions=result.regions or ())
            Image.fromarray(heat).save(picture, "PNG")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(picture.getbuffer())
            except OSError as error:
                with suppress(OSError):
                    place.unlink()
                raise ConfigError(
                    f"{place}: cannot be written ({error.strerror}); finished rows are kept, free space and run again"
                ) from None

        return write

    def _keep(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.ranges |= ranges
        scale = {"bundle": self.bundle, "ranges": {written(name): one for name, one in self.ranges.items()}}
        with replacing(self.folder / SCALE) as file:
            file.write(json.dumps(scale, indent=2).encode() + b"\n")

    def _place(self, path: Path) -> Path:
        name = os.fsencode(path.name)
        short = path.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()
        return self.folder / path.parent / f"{short}.png"


def _read_scale(path: Path, bundle: str) -> dict[str, tuple[float, float]]:
    if not os.path.exists(path):
        return {}
    try:
        scale = json.loads(path.read_text(encoding="utf-8"))
        ranges = {read_text(name): (float(low), float(high)) for name, (low, high) in scale["ranges"].items()}
        known = scale["bundle"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path}: is not the scale of overlays; remove it, or choose another --overlays") from None
    if known != bundle:
        raise ConfigError(
            f"{path.parent}: holds overlays of bundle {known}, this one is {bundle}; choose another --overlays"
        )
    return ranges
