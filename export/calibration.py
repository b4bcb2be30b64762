"""Thresholds from good parts: checked before any work, fitted through a detector, stored in a bundle's manifest."""

import tempfile
from pathlib import Path

import numpy as np

from flowad_fast import bundle
from flowad_fast.bundle import Manifest
from flowad_fast.detector import Detector, load
from flowad_fast.errors import BundleError, FlowADError, FrameError
from flowad_fast.evaluation.inspection import scan
from flowad_fast.export.card import write_card
from flowad_fast.export.frames import GoodParts
from flowad_fast.stages.decision import Aggregate, Calibration, calibrate, require_parts
from flowad_fast.stages.frames import invalid_frames


def check_good(good: GoodParts, alpha: float, aggregate: Aggregate) -> None:
    """Refuse good parts before the work.

    Raises:
        CalibrationError: too few of a class for `alpha`.
        FrameError: a frame that cannot be read or judged.
    """
    require_parts(good.classes, alpha, aggregate)
    for frame, label in zip(good.frames, good.labels, strict=True):
        _refuse(invalid_frames(frame[None])[0], label)


def fit(detector: Detector, good: GoodParts, alpha: float) -> Calibration:
    """The calibration of a detector on good parts.

    Raises:
        CalibrationError: too few good parts, or scores that are not finite.
        FrameError: a frame that cannot be read or judged.
    """
    names = good.classes if any(good.classes) else None
    classes = None if names is None else [detector.classes.label(name) for name in names]
    raw = []
    for one, label in zip(scan(detector, good.frames, classes), good.labels, strict=True):
        if isinstance(one, FlowADError):
            raise one
        _refuse(one.detection.invalid[one.place], label)
        raw.append(one.detection.raw_score[one.place])
    return calibrate(np.stack(raw), alpha, names, good.labels)


def recalibrate(path: str | Path, good: GoodParts, alpha: float, device: str = "auto") -> Manifest:
    """Fit thresholds on good parts and store them in an existing bundle's manifest; engine files stay untouched.

    Raises:
        BundleError: no bundle, an altered one, or one that is being written or cannot be.
        CalibrationError: good parts that are too few.
        FrameError: a good part that cannot be read or judged.
    """
    bundle.read(path, verify=False)  # before anything is created beside a mistyped path
    try:
        with bundle.locked(path):
            folder, manifest = bundle.read(path, verify=False)  # `load` verifies
            with tempfile.TemporaryFile(dir=folder):  # refuses now what could not be written after the work
                pass
            check_good(good, alpha, manifest.aggregate)
            detector = load(path, device=device)
            manifest = manifest.model_copy(update={"calibration": fit(detector, good, alpha)})
            bundle.write_manifest(folder, manifest)
            write_card(folder, manifest)
    except OSError as error:
        if isinstance(error, FlowADError):
            raise
        raise BundleError(
            f"{path}: cannot be written ({error.strerror}), the bundle is as it was; copy it to a folder of yours"
        ) from None
    return manifest


def _refuse(reason: str | None, label: str) -> None:
    if reason is not None:
        raise FrameError(f"calibration frame {label}: {reason}; remove it")
