"""Checkpoint to bundle: write every format, hold each against the reference, then publish all of it or nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import flowad_fast
from flowad_fast import bundle
from flowad_fast.bundle import Artefact, Manifest
from flowad_fast.checkpoint import sha256
from flowad_fast.decision import Aggregate, Calibration, calibrate
from flowad_fast.detector import Detector, load, start_engine
from flowad_fast.errors import ConfigError, FrameError
from flowad_fast.export.card import model_card
from flowad_fast.export.formats import FORMATS, Request
from flowad_fast.export.onnx_graph import OPSET
from flowad_fast.export.verify import ParityFrames, compare, reference_outputs, run_in_batches
from flowad_fast.model import FlowModel, class_indices
from flowad_fast.scorers import Scorer

GoodParts = tuple[list[np.ndarray], list[str], list[str]]
"""Frames of good parts, the class of each ("" for unconditional models), and a label of each for messages."""


@dataclass(frozen=True)
class ExportResult:
    """What an export did: the folder that holds it, the manifest, and each format's status.

    `path` is the bundle, or the `.rejected` folder when an artefact failed its parity check.
    """

    path: Path
    manifest: Manifest
    status: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether every format passed."""
        return all(status == "ok" for status in self.status.values())


def export_bundle(
    model: FlowModel,
    scorer: Scorer,
    target: str | Path,
    *,
    formats: tuple[str, ...] = ("onnx", "eager"),
    aggregate: Aggregate = "max",
    frame_size: tuple[int, int] | None = None,
    frames: np.ndarray | ParityFrames,
    opset: int = OPSET,
    good: GoodParts | None = None,
    alpha: float = 0.01,
    quiet: bool = False,
    tell: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export `model` with `scorer` to a bundle folder, each artefact parity-checked against the fp32 reference.

    The bundle at `target` changes only when every format passed; a failing export is kept at `target`.rejected.

    Args:
        model: a trained model on the CPU.
        scorer: what the bundle computes; one bundle, one scorer.
        target: the bundle's folder.
        formats: names in `FORMATS`.
        aggregate: map to image score.
        frame_size: height and width of the frames; None accepts any size.
        frames: real frames for the parity check (three or more make the rank correlation meaningful).
        opset: of the ONNX graph.
        good: good parts (frames, classes, labels; see `frames.good_parts`); thresholds go into the manifest.
        alpha: accepted false-reject rate of the calibration.
        quiet: tell nothing.
        tell: receives one line of progress at a time; printed by default.
    """
    say = (lambda _: None) if quiet else (tell or print)
    given = frames if isinstance(frames, ParityFrames) else ParityFrames(frames, "frames given by the caller")
    y = _classes(model, given)
    request = Request(model, scorer, aggregate, frame_size, opset)
    if frame_size is not None and given.frames.shape[1:3] != frame_size:
        raise ConfigError(f"parity frames are {given.frames.shape[1:3]}, the bundle is for {frame_size}")
    with bundle.writing(target) as aside:
        say(f"reference: {len(given.frames)} frames, fp32")
        expected = reference_outputs(model, scorer, aggregate, given.frames, y)
        artefacts: dict[str, Artefact] = {}
        status: dict[str, str] = {}
        for name in formats:
            say(f"{name}: writing")
            built = FORMATS[name].write(request, aside)
            files = {file: sha256(aside / file) for file in built.files}
            artefacts[name] = Artefact(
                engine=FORMATS[name].engine,
                files=files,
                versions=built.versions,
                build_seconds=round(built.seconds, 2),
                details=dict(built.details),
            )
        manifest = Manifest(
            project_version=flowad_fast.__version__,
            created=bundle.now(),
            source=model.spec.provenance,
            model=model.spec,
            scorer=scorer,
            aggregate=aggregate,
            frame_size=frame_size,
            artefacts=artefacts,
        )
        for name, artefact in artefacts.items():
            say(f"{name}: checking against the reference")
            engine = start_engine(aside, manifest, artefact.engine, "cpu")
            got = run_in_batches(engine, given.frames, y)
            parity = compare(got, expected, given.source, artefact.precision, given.labels)
            artefacts[name] = artefact.model_copy(update={"parity": parity})
            status[name] = "ok" if parity.passed else "failed parity"
        manifest = manifest.model_copy(update={"artefacts": artefacts})
        if good is not None and all(s == "ok" for s in status.values()):
            say(f"calibration: {len(good[0])} good parts, alpha {alpha:g}")
            engine = start_engine(aside, manifest, next(iter(artefacts.values())).engine, "cpu")
            manifest = manifest.model_copy(
                update={"calibration": _calibration(Detector.from_manifest(engine, manifest), good, alpha)}
            )
        bundle.write_manifest(aside, manifest)
        (aside / "README.md").write_text(model_card(manifest), encoding="utf-8")
        if not all(s == "ok" for s in status.values()):
            return ExportResult(bundle.reject(aside, target), manifest, status)
        bundle.publish(aside, target)
    return ExportResult(Path(target), manifest, status)


def recalibrate(path: str | Path, good: GoodParts, alpha: float, device: str = "auto") -> Manifest:
    """Fit thresholds on good parts and store them in an existing bundle's manifest; engine files stay untouched."""
    with bundle.locked(Path(path)):
        folder, manifest = bundle.read(path)
        detector = load(path, device=device)
        manifest = manifest.model_copy(update={"calibration": _calibration(detector, good, alpha)})
        bundle.write_manifest(folder, manifest)
        (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
    return manifest


def check_bundle(path: str | Path, model: FlowModel | None, frames: ParityFrames | None) -> dict[str, str]:
    """Re-check a bundle: hashes always, parity where frames are given. Returns a status a format, raises on hashes."""
    folder, manifest = bundle.read(path)
    if frames is None:
        return {name: "hashes ok" for name in manifest.artefacts}
    if model is None:
        raise ConfigError("re-checking parity needs the model; the bundle holds it in the format eager")
    y = _classes(model, frames)
    expected = reference_outputs(model, manifest.scorer, manifest.aggregate, frames.frames, y)
    status = {}
    for name, artefact in manifest.artefacts.items():
        engine = start_engine(folder, manifest, artefact.engine, "cpu")
        parity = compare(run_in_batches(engine, frames.frames, y), expected, frames.source, artefact.precision)
        verdict = "ok" if parity.passed else "failed parity"
        status[name] = f"{verdict} (map error {parity.max_error:.1e}, tolerance {parity.tolerance:.0e})"
    return status


def _calibration(detector: Detector, good: GoodParts, alpha: float) -> Calibration:
    frames, classes, labels = good
    raw = []
    for frame, name, label in zip(frames, classes, labels, strict=True):
        detection = detector(frame, name or None)
        if detection.invalid[0]:
            raise FrameError(f"calibration frame {label}: {detection.invalid[0]}; remove it")
        raw.append(detection.raw_score)
    stacked = np.concatenate(raw) if raw else np.zeros(0, np.float32)
    return calibrate(stacked, alpha, classes if any(classes) else None, labels)


def _classes(model: FlowModel, given: ParityFrames) -> np.ndarray | None:
    classes: Any = given.classes
    if model.config.use_class_labels and classes is None:
        classes = [i % model.config.num_classes for i in range(len(given.frames))]
    y = class_indices(
        classes, len(given.frames), model.class_names, model.config.num_classes, model.config.use_class_labels
    )
    return None if y is None else y.numpy()
