"""Thresholds from good parts: checked before any work, fitted through a detector, stored in a bundle's manifest."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flowad_fast import bundle
from flowad_fast.bundle import CONSTANT_LOCATION, Manifest
from flowad_fast.config import parse
from flowad_fast.detector import Detector, load
from flowad_fast.engines.start import choose_engine, start_engine
from flowad_fast.errors import CalibrationError, ConfigError, FlowADError, FrameError
from flowad_fast.evaluation.scanning import scan
from flowad_fast.export.card import write_card
from flowad_fast.export.frames import GoodParts
from flowad_fast.export.location import StatisticsParts, check_parts, described, fit_location, refuse_overlap, split
from flowad_fast.stages.decision import Aggregate, Calibration, calibrate, require_parts, with_regions
from flowad_fast.stages.frames import invalid_frames
from flowad_fast.stages.location import identity
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
    location: StatisticsParts | None = None,
) -> Manifest:
    """Fit thresholds on good parts and store them in an existing bundle's manifest; engine files stay untouched.

    A bundle with location statistics has them fitted anew too: on the parts of `location`, or on half of the good
    parts, the threshold then on the others. What is None of the settings of regions stays as the bundle has it.

    Raises:
        BundleError: no bundle, an altered one, or one that is being written or cannot be.
        CalibrationError: good parts that are too few.
        FrameError: a good part that cannot be read or judged.
        ConfigError: settings of regions that cannot be.
    """
    bundle.read(path, verify=False)  # before anything is created beside a mistyped path
    with bundle.editing(path):
        folder, manifest = bundle.read(path, verify=False)  # `load` verifies
        settings = _settings(manifest, min_area, severities)
        if manifest.location is None:
            if location is not None:
                raise CalibrationError(
                    f"{folder}: the bundle was exported without location statistics; export it with --location"
                )
            check_good(good, alpha, manifest.aggregate)
            detector = load(path, device=device)
            manifest = manifest.model_copy(update={"calibration": fit(detector, good, alpha, settings)})
            bundle.write_manifest(folder, manifest)
        else:
            manifest = _relocate(folder, good, alpha, device, settings, location)
        write_card(folder, manifest)
    return manifest


def _relocate(
    folder: Path,
    good: GoodParts,
    alpha: float,
    device: str,
    settings: RegionSettings,
    location: StatisticsParts | None,
) -> Manifest:
    """Fit location statistics and thresholds; the manifest takes both in one step, the old table goes afterwards."""
    _, manifest = bundle.read(folder)
    before = manifest.location
    assert before is not None
    fixed = [name for name, one in manifest.artefacts.items() if CONSTANT_LOCATION in one.details]
    if fixed:
        raise CalibrationError(
            f"{folder}: the format {fixed[0]} holds the location statistics as constants, which would differ from new "
            "ones; export the bundle again with --location"
        )
    if location is None:
        location, good = split(good, alpha, manifest.aggregate)
    else:
        refuse_overlap(location.good, good)
    check_good(good, alpha, manifest.aggregate)
    check_parts(location.good)
    velocity = manifest.model.velocity
    neutral = identity(manifest.model.classes.rows, velocity.height, velocity.width)
    name = choose_engine({one.engine for one in manifest.artefacts.values()}, device)
    plain = Detector.from_manifest(start_engine(folder, manifest, name, device, location=neutral), manifest)
    statistics = fit_location(plain, location.good, manifest.model)
    plain.close()
    written = bundle.write_location(folder, statistics.table)
    try:
        told = described(statistics, written, manifest.model, location.source)
        manifest = manifest.model_copy(update={"location": told})
        detector = Detector.from_manifest(start_engine(folder, manifest, name, device), manifest)
        manifest = manifest.model_copy(update={"calibration": fit(detector, good, alpha, settings)})
        bundle.write_manifest(folder, manifest)
    except BaseException:
        if written[0] != before.file:
            (folder / written[0]).unlink(missing_ok=True)
        raise
    if written[0] != before.file:
        (folder / before.file).unlink(missing_ok=True)
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
