"""Checkpoint to bundle: write every format, hold each against the reference, publish what passed, keep the rest aside.

A format that fails does not lose the others, and never takes a format away from a bundle that has it: then the old
bundle stays and the whole export is kept under its `.rejected` name.
"""

import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import flowad_fast
from flowad_fast import bundle
from flowad_fast.bundle import Artefact, Manifest, Parity
from flowad_fast.config import Precision
from flowad_fast.detector import Detector, load
from flowad_fast.engines.device import torch_device
from flowad_fast.errors import CalibrationError, ConfigError, EngineUnavailableError, FlowADError, FrameError
from flowad_fast.export.card import model_card
from flowad_fast.export.formats import BATCH, FORMATS, WORKSPACE_MIB, Built, Request
from flowad_fast.export.frames import GoodParts
from flowad_fast.export.onnx_graph import OPSET
from flowad_fast.export.verify import ParityFrames, compare, reference_outputs, run_in_batches
from flowad_fast.files import sha256
from flowad_fast.model import FlowModel
from flowad_fast.stages.decision import Aggregate, Calibration, calibrate, require_parts
from flowad_fast.stages.frames import invalid_frames
from flowad_fast.stages.scorers import Scorer

Outputs = tuple[np.ndarray, np.ndarray]
CARD = "README.md"
OK, UNMEASURED = "ok", "ok, parity not measured"
FAILED_PARITY, NOT_AVAILABLE, FAILED = "failed parity", "not available", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of one format.

    Attributes:
        status: one of ok; ok, parity not measured; failed parity; not available; failed.
        reason: why it is not plainly ok, one line.
        artefact: what was written, with its parity; None when nothing was.
        bytes: size of its files.
    """

    status: str
    reason: str = ""
    artefact: Artefact | None = None
    bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the artefact may be published."""
        return self.status in (OK, UNMEASURED)

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status


@dataclass(frozen=True)
class ExportResult:
    """What an export did.

    Attributes:
        path: the bundle, or the `.rejected` folder when nothing was published, or None when nothing was kept at all.
        manifest: of the published bundle, or of what was rejected.
        outcomes: by format, in the order asked.
        published: whether the bundle at the target is this export's.
        rejected: where the failing artefacts are, None without any.
    """

    path: Path | None
    manifest: Manifest
    outcomes: dict[str, Outcome]
    published: bool
    rejected: Path | None = field(default=None)

    @property
    def status(self) -> dict[str, str]:
        """Each format's outcome in words."""
        return {name: str(outcome) for name, outcome in self.outcomes.items()}

    @property
    def ok(self) -> bool:
        """Whether every format that was asked for is in the bundle."""
        return self.published and all(outcome.ok for outcome in self.outcomes.values())


def export_bundle(
    model: FlowModel,
    scorer: Scorer,
    target: str | Path,
    *,
    formats: tuple[str, ...] = ("onnx", "eager"),
    aggregate: Aggregate = "max",
    precision: Precision = "fp32",
    frame_size: tuple[int, int] | None = None,
    frames: np.ndarray | ParityFrames,
    opset: int = OPSET,
    batch: tuple[int, int, int] = BATCH,
    device: str = "cpu",
    workspace: int = WORKSPACE_MIB,
    good: GoodParts | None = None,
    alpha: float = 0.01,
    probe_choice: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    quiet: bool = False,
    tell: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export `model` with `scorer` to a bundle folder, each artefact parity-checked against the fp32 reference.

    Formats that pass are published together; the bundle at `target` is replaced in one step. Failing artefacts are
    kept at `target`.rejected. If one of them is a format that the old bundle has, the old bundle stays as it was.

    Args:
        model: a trained model on the CPU.
        scorer: what the bundle computes; one bundle, one scorer.
        target: the bundle's folder.
        formats: names in `FORMATS`.
        aggregate: map to image score.
        precision: arithmetic of the velocity field.
        frame_size: height and width of the frames; None accepts any size.
        frames: real frames for the parity check (three or more make the rank correlation meaningful).
        opset: of the ONNX graph.
        batch: smallest, optimal and largest batch, for engines that are built for a range.
        device: what is built for and checked on: cpu, cuda, cuda:N, or auto: built for a GPU where there is one, and
            checked on what each engine prefers; the certificate says which.
        workspace: memory that an engine builder may use, MiB.
        good: good parts (see `frames.good_parts`); thresholds go into the manifest.
        alpha: accepted false-reject rate of the calibration.
        probe_choice: how the scorer's probes were chosen, for the manifest.
        source: where the model comes from, for the manifest; its provenance by default.
        quiet: tell nothing.
        tell: receives one line of progress at a time; standard error by default.

    Raises:
        ConfigError: frames of another size, or classes that the model does not have.
        CalibrationError: good parts that are too few; raised before anything is built.
        FrameError: a good part that cannot be read or judged; raised before anything is built.
        ParityError: the reference itself is not finite.
        BundleError: the target cannot be written.
    """
    say = (lambda _: None) if quiet else (tell or _to_stderr)
    given = frames if isinstance(frames, ParityFrames) else ParityFrames(frames, "frames given by the caller")
    y = _classes(model, given)
    built_for = str(torch_device(device))
    request = Request(
        model, scorer, aggregate, frame_size, opset, precision, batch, built_for, workspace, (given.frames, y)
    )
    _check_frame_size(given, frame_size)
    if good is not None:
        say(f"good parts: checking {len(good)} frames")
        _check_good(good, alpha, aggregate)
    manifest = Manifest(
        project_version=flowad_fast.__version__,
        created=bundle.now(),
        source=model.spec.provenance if source is None else source,
        model=model.spec,
        scorer=scorer,
        aggregate=aggregate,
        frame_size=frame_size,
        artefacts={},
        probe_choice=probe_choice,
    )
    with bundle.writing(target) as aside:
        say(f"reference: {len(given.frames)} frames, fp32")
        expected = reference_outputs(model, scorer, aggregate, given.frames, y)
        passed, failing = aside / ".passed", aside / ".failing"
        passed.mkdir()
        failing.mkdir()
        outcomes = {}
        for name in formats:
            outcomes[name] = _one_format(name, request, manifest, given, y, expected, device, aside, say)
            say(f"{name}: {outcomes[name]}")
        return _conclude(target, manifest, outcomes, passed, failing, good, alpha, device, say)


def recalibrate(path: str | Path, good: GoodParts, alpha: float, device: str = "auto") -> Manifest:
    """Fit thresholds on good parts and store them in an existing bundle's manifest; engine files stay untouched.

    Raises:
        BundleError: no bundle, an altered one, or one that is being written.
        CalibrationError: good parts that are too few.
        FrameError: a good part that cannot be read or judged.
    """
    bundle.read(path, verify=False)  # before anything is created beside a mistyped path
    with bundle.locked(path):
        folder, manifest = bundle.read(path, verify=False)  # `load` verifies
        _check_good(good, alpha, manifest.aggregate)
        detector = load(path, device=device)
        manifest = manifest.model_copy(update={"calibration": _calibration(detector, good, alpha)})
        bundle.write_manifest(folder, manifest)
        bundle.replace_text(folder / CARD, model_card(manifest))
    return manifest


def check_bundle(path: str | Path, model: FlowModel, frames: ParityFrames, device: str = "cpu") -> dict[str, Outcome]:
    """Check a bundle's hashes and its parity on `frames` again, on this machine.

    Raises:
        BundleError: an altered bundle.
        ConfigError: frames of another size than the bundle's.
    """
    folder, manifest = bundle.read(path)
    _check_frame_size(frames, manifest.frame_size)
    y = _classes(model, frames)
    expected = reference_outputs(model, manifest.scorer, manifest.aggregate, frames.frames, y)
    outcomes = {}
    for name, artefact in manifest.artefacts.items():
        only = manifest.model_copy(update={"artefacts": {name: artefact}})
        outcomes[name] = _measured(name, artefact, folder, only, frames, y, expected, device)
    return outcomes


def _one_format(
    name: str,
    request: Request,
    manifest: Manifest,
    frames: ParityFrames,
    y: np.ndarray | None,
    expected: Outputs,
    device: str,
    aside: Path,
    say: Callable[[str], None],
) -> Outcome:
    """Write one format, check it, and move its files to `.passed` or `.failing`."""
    precisions = FORMATS[name].precisions
    if request.precision not in precisions:
        return Outcome(NOT_AVAILABLE, f"{name} does {', '.join(precisions)}, not {request.precision}")
    folder = aside / f".{name}"
    folder.mkdir()
    try:
        say(f"{name}: writing")
        built = FORMATS[name].write(request, folder)
        artefact = _described(name, built, request.precision, folder)
        say(f"{name}: checking against the reference")
        only = manifest.model_copy(update={"artefacts": {name: artefact}})
        outcome = _measured(name, artefact, folder, only, frames, y, expected, device)
    except EngineUnavailableError as error:
        outcome = Outcome(NOT_AVAILABLE, _line(error))
    except Exception as error:  # whatever an exporter's libraries raise must not lose the other formats
        outcome = Outcome(FAILED, _line(error))
        (aside / ".failing" / f"{name}.error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    if outcome.artefact is not None:
        _move(outcome.artefact, folder, aside / (".passed" if outcome.ok else ".failing"))
    shutil.rmtree(folder)
    return outcome


def _described(name: str, built: Built, precision: Precision, folder: Path) -> Artefact:
    return Artefact(
        engine=FORMATS[name].engine,
        files={file: sha256(folder / file) for file in built.files},
        precision=precision,
        versions=built.versions,
        build_seconds=round(built.seconds, 2),
        details=dict(built.details),
    )


def _measured(
    name: str,
    artefact: Artefact,
    folder: Path,
    manifest: Manifest,
    frames: ParityFrames,
    y: np.ndarray | None,
    expected: Outputs,
    device: str,
) -> Outcome:
    """The outcome of an artefact that lies in `folder`, by running it; what cannot run here is openly unmeasured."""
    size = sum((folder / file).stat().st_size for file in artefact.files)
    try:
        engine = FORMATS[name].start(folder, manifest, artefact, device)
        got = run_in_batches(engine, frames.frames, y)
    except EngineUnavailableError as error:
        unmeasured = artefact.model_copy(update={"parity": None, "unmeasured": _line(error)})
        return Outcome(UNMEASURED, _line(error), unmeasured, size)
    parity = compare(got, expected, frames.source, artefact.precision, engine.device, frames.labels, manifest.aggregate)
    checked = artefact.model_copy(update={"parity": parity, "unmeasured": None})
    return Outcome(OK if parity.passed else FAILED_PARITY, "" if parity.passed else _excess(parity), checked, size)


def _excess(parity: Parity) -> str:
    return (
        f"map error {parity.max_error:.1e} (tolerance {parity.tolerance:.0e}), RMS {parity.rms_error:.1e} "
        f"({parity.rms_tolerance:.0e}), score error {parity.score_error:.1e}"
    )


def _move(artefact: Artefact, source: Path, target: Path) -> None:
    for file in artefact.files:
        assert not (target / file).exists(), f"two formats write {file}"
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).rename(target / file)


def _conclude(
    target: str | Path,
    manifest: Manifest,
    outcomes: dict[str, Outcome],
    passed: Path,
    failing: Path,
    good: GoodParts | None,
    alpha: float,
    device: str,
    say: Callable[[str], None],
) -> ExportResult:
    """Publish the folder `passed`, keep the folder `failing` as rejected."""
    ok = {name: o.artefact for name, o in outcomes.items() if o.ok and o.artefact is not None}
    bad = {name: o.artefact for name, o in outcomes.items() if not o.ok and o.artefact is not None}
    publish = bool(ok) and not _formats_at(target) & {name for name, o in outcomes.items() if not o.ok}
    if not publish:  # what passed is kept with the rest
        for artefact in ok.values():
            _move(artefact, passed, failing)
        ok, bad = {}, ok | bad
    published = manifest.model_copy(update={"artefacts": ok})
    if publish and good is not None:
        say(f"calibration: {len(good)} good parts, alpha {alpha:g}")
        published = published.model_copy(
            update={"calibration": _calibration(_detector(passed, published, device), good, alpha)}
        )
    kept = None
    if any(failing.iterdir()):
        refused = manifest.model_copy(update={"artefacts": bad})
        bundle.write_manifest(failing, refused)
        status = "\n".join(f"- {name}: {outcome}" for name, outcome in outcomes.items())
        bundle.replace_text(failing / CARD, f"# Rejected export\n\n{status}\n\n{model_card(refused)}")
        kept = bundle.reject(failing, target)
    if not publish:
        return ExportResult(kept, manifest.model_copy(update={"artefacts": bad}), outcomes, False, kept)
    bundle.write_manifest(passed, published)
    bundle.replace_text(passed / CARD, model_card(published))
    bundle.publish(passed, target)
    return ExportResult(Path(target), published, outcomes, True, kept)


def _formats_at(target: str | Path) -> set[str]:
    """The formats of the bundle at `target`, none where there is no readable one."""
    try:
        return set(bundle.read(target, verify=False)[1].artefacts)
    except FlowADError:
        return set()


def _detector(folder: Path, manifest: Manifest, device: str) -> Detector:
    """A detector on the first artefact that runs here, to calibrate with."""
    for name, artefact in manifest.artefacts.items():
        if artefact.parity is not None:
            return Detector.from_manifest(FORMATS[name].start(folder, manifest, artefact, device), manifest)
    raise CalibrationError(
        f"none of the formats {', '.join(manifest.artefacts)} runs on this machine, so nothing can be calibrated here; "
        "add the format onnx or eager, or calibrate the bundle later on the machine that runs it"
    )


def _check_good(good: GoodParts, alpha: float, aggregate: Aggregate) -> None:
    """Refuse good parts before the work: too few, or a frame that cannot be read or judged."""
    require_parts(good.classes, alpha, aggregate)
    for frame, label in zip(good.frames, good.labels, strict=True):
        if (reason := invalid_frames(frame[None])[0]) is not None:
            raise FrameError(f"calibration frame {label}: {reason}; remove it")


def _calibration(detector: Detector, good: GoodParts, alpha: float) -> Calibration:
    raw = []
    for frame, name, label in zip(good.frames, good.classes, good.labels, strict=True):
        detection = detector(frame, detector.classes.label(name) if name else None)
        if detection.invalid[0]:
            raise FrameError(f"calibration frame {label}: {detection.invalid[0]}; remove it")
        raw.append(detection.raw_score)
    return calibrate(np.concatenate(raw), alpha, good.classes if any(good.classes) else None, good.labels)


def _check_frame_size(frames: ParityFrames, size: tuple[int, int] | None) -> None:
    got = frames.frames.shape[1:3]
    if size is not None and got != size:
        raise ConfigError(
            f"the frames for the parity check are {got[0]}x{got[1]}, the bundle is for {size[0]}x{size[1]}; "
            "give frames of that size with --data"
        )


def _classes(model: FlowModel, given: ParityFrames) -> np.ndarray | None:
    classes: Any = given.classes
    if model.config.use_class_labels and classes is None:
        classes = [i % model.config.num_classes for i in range(len(given.frames))]
    return model.spec.classes.indices(classes, len(given.frames))


def _line(error: Exception) -> str:
    """An exception in one line, with its type where it is not one of the project's own."""
    text = " ".join(str(error).split())
    own = isinstance(error, FlowADError)
    return text if own else f"{type(error).__name__}: {text[:300]}"


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
