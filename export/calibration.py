"""Thresholds from good parts: checked before any work, fitted through a detector, stored in a bundle's manifest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowad_fast import bundle
from flowad_fast.bundle import Manifest
from flowad_fast.config import parse
from flowad_fast.detector import Detector, load
from flowad_fast.errors import ConfigError, FlowADError, FrameError
from flowad_fast.evaluation.scanning import scan
from flowad_fast.export.card import write_card
from flowad_fast.export.frames import GoodParts
from flowad_fast.stages.decision import Aggregate, Calibration, calibrate, require_parts, with_regions
from flowad_fast.stages.frames import invalid_frames
from flowad_fast.stages.regions import RegionSettings, Severity


def check_good(good: GoodParts, alpha: float, aggregate: Aggregate) -> None:
    """Refuse good parts before the work.

    Raises:
        CalibrationError: too few of a class for `alpha`.
        FrameError: a frame that cannot be read or judged.
    """
    require_parts(good.classes, alpha, aggregate)
    for frame, label in zip(good.frames, good.labels, strict=True):
        _refuse(invalid_frames(frame[None])[0], label)


def fit(detector: Detector, good: GoodParts, alpha: float, regions: RegionSettings | None = None) -> Calibration:
    """The calibration of a detector on good parts: thresholds of scores, and of pixels for regions.

    Raises:
        CalibrationError: too few good parts, or scores that are not finite.
        FrameError: a frame that cannot be read or judged.
    """
    names = good.classes if any(good.classes) else None
    classes = None if names is None else [detector.classes.label(name) for name in names]
    raw, maxima = [], []
    for one, label in zip(scan(detector, good.frames, classes), good.labels, strict=True):
        if isinstance(one, FlowADError):
            raise one
        _refuse(one.detection.invalid[one.place], label)
        raw.append(one.detection.raw_score[one.place])
        maxima.append(one.detection.map[one.place].max())
    return with_regions(calibrate(np.stack(raw), alpha, names, good.labels), np.stack(maxima), names, regions)


def recalibrate(
    path: str | Path,
    good: GoodParts,
    alpha: float,
    device: str = "auto",
    min_area: float | None = None,
    severities: Sequence[Severity] | None = None,
) -> Manifest:
    """Fit thresholds on good parts and store them in an existing bundle's manifest; engine files stay untouched.

    What is None of the settings of regions stays as the bundle has it.

    Raises:
        BundleError: no bundle, an altered one, or one that is being written or cannot be.
        CalibrationError: good parts that are too few.
        FrameError: a good part that cannot be read or judged.
        ConfigError: settings of regions that cannot be.
    """
    bundle.read(path, verify=False)  # before anything is created beside a mistyped path
    with bundle.editing(path):
        folder, manifest = bundle.read(path, verify=False)  # `load` verifies
        check_good(good, alpha, manifest.aggregate)
        detector = load(path, device=device)
        settings = _settings(manifest, min_area, severities)
        manifest = manifest.model_copy(update={"calibration": fit(detector, good, alpha, settings)})
        bundle.write_manifest(folder, manifest)
        write_card(folder, manifest)
    return manifest


def parse_severity(text: str) -> Severity:
    """`NAME`, or `NAME:area=PIXELS,peak=VALUE` with one of the two or both.

    Raises:
        ConfigError: anything else.
    """
    refusal = ConfigError(f"severity {text!r}; expected NAME, or NAME:area=PIXELS,peak=VALUE with one or both")
    name, colon, rest = text.partition(":")
    limits: dict[str, float] = {}
    for part in rest.split(",") if colon else ():
        key, _, value = part.strip().partition("=")
        if key not in ("area", "peak") or key in limits:
            raise refusal
        try:
            limits[key] = float(value)
        except ValueError:
            raise refusal from None
    return parse(Severity, {"name": name.strip(), **limits}, f"severity {text!r}")


def _settings(manifest: Manifest, min_area: float | None, severities: Sequence[Severity] | None) -> RegionSettings:
    """The bundle's settings of regions with what is given in place of theirs."""
    before = manifest.calibration.regions if manifest.calibration else RegionSettings()
    given = {
        "min_area": before.min_area if min_area is None else min_area,
        "severities": before.severities if severities is None else tuple(severities),
    }
    return parse(RegionSettings, given, "settings of regions")


def _refuse(reason: str | None, label: str) -> None:
    if reason is not None:
        raise FrameError(f"calibration frame {label}: {reason}; remove it")
