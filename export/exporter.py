"""Checkpoint to bundle: write every format, hold each against the reference, publish what passed, keep the rest aside.

A format that fails does not lose the others, and never takes a format away from a bundle that has it: then the old
bundle stays and the whole export is kept under its `.rejected` name.
"""

import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import flowad_fast
from flowad_fast import bundle
from flowad_fast.bundle import Artefact, Manifest
from flowad_fast.config import Precision, Tiling
from flowad_fast.detector import Detector
from flowad_fast.engines import backend
from flowad_fast.engines.start import start_engine
from flowad_fast.errors import CalibrationError, ConfigError, EngineUnavailableError, FlowADError
from flowad_fast.export.calibration import check_good, fit
from flowad_fast.export.card import write_card
from flowad_fast.export.formats import BATCH, FORMATS, OPSET, Request
from flowad_fast.export.frames import GoodParts, ParityFrames, parity_tiles
from flowad_fast.export.location import (
    StatisticsParts,
    check_parts,
    described,
    fit_location,
    in_words,
    refuse_overlap,
)
from flowad_fast.export.ranges import ranges_of
from flowad_fast.export.verify import (
    FAILED,
    NOT_AVAILABLE,
    Outcome,
    Reference,
    check_size,
    class_indices,
    one_line,
)
from flowad_fast.files import sha256
from flowad_fast.masks import read_mask, write_mask
from flowad_fast.stages.aggregates import check_blended, check_located
from flowad_fast.stages.decision import Aggregate, Calibration
from flowad_fast.stages.scorers import Scorer
from flowad_fast.stages.tiling import NO_LOCATION, Tiler
from flowad_fast.tuning.recipe import FollowedRecipe

if TYPE_CHECKING:
    from flowad_fast.model import FlowModel


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
    rejected: Path | None = None

    @property
    def status(self) -> dict[str, str]:
        """Each format's outcome in words."""
        return {name: str(outcome) for name, outcome in self.outcomes.items()}

    @property
    def ok(self) -> bool:
        """Whether every format that was asked for is in the bundle."""
        return self.published and all(outcome.ok for outcome in self.outcomes.values())


@dataclass
class Export:
    """An export under way, in a folder of its own beside the target.

    Attributes:
        request: what every format is asked to write.
        manifest: what is computed, without artefacts.
        reference: what every artefact is held against.
        device: where artefacts are checked and calibrated, as the user named it.
        folder: where formats are written; what is done lies in its sub-folders `passed` and `failing`.
        say: receives one line of progress at a time.
        mask: the fixed mask, None for none.
        outcomes: so far, by format.
    """

    request: Request
    manifest: Manifest
    reference: Reference
    device: str
    folder: Path
    say: Callable[[str], None]
    mask: np.ndarray | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.passed, self.failing = self.folder / ".passed", self.folder / ".failing"
        self.passed.mkdir()
        self.failing.mkdir()

    def write(self, name: str) -> None:
        """Write one format, check it, and move its files to `passed` or `failing`."""
        precision, precisions = self.request.precision, FORMATS[name].precisions
        if precision not in precisions:
            outcome = Outcome(NOT_AVAILABLE, f"{name} does {', '.join(precisions)}, not {precision}")
        elif self.manifest.tiling is not None and not FORMATS[name].tiles:
            outcome = Outcome(NOT_AVAILABLE, f"clients of {name} send whole frames, and nothing there cuts them")
        else:
            folder = self.folder / f".{name}"
            folder.mkdir()
            outcome = self._written(name, folder)
            if outcome.artefact is not None:
                _move(outcome.artefact, folder, self.passed if outcome.ok else self.failing)
            shutil.rmtree(folder)
        self.outcomes[name] = outcome
        self.say(f"{name}: {outcome}")

    def _written(self, name: str, folder: Path) -> Outcome:
        try:
            self.say(f"{name}: writing")
            start = time.perf_counter()
            built = FORMATS[name].write(self.request, folder)
            artefact = Artefact(
                engine=FORMATS[name].engine,
                files={file: sha256(folder / file) for file in built.files},
                precision=FORMATS[name].quantises or self.request.precision,
                versions=built.versions,
                build_seconds=round(time.perf_counter() - start, 2),
                details=dict(built.details),
            )
            self._beside(folder)
            self.say(f"{name}: checking against the reference")
            return self.reference.measure(name, artefact, folder, self.manifest, self.device)
        except EngineUnavailableError as error:
            return Outcome(NOT_AVAILABLE, one_line(error))
        except Exception as error:  # whatever an exporter's libraries raise must not lose the other formats
            (self.failing / f"{name}.error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            return Outcome(FAILED, one_line(error))

    def _beside(self, folder: Path) -> None:
        """Put the location statistics and the mask, where there are some, beside what is written."""
        if self.request.location is not None:
            bundle.write_location(folder, self.request.location)
        if self.mask is not None:
            write_mask(folder, self.mask)

    def conclude(self, target: str | Path, good: GoodParts | None, alpha: float) -> ExportResult:
        """Publish what passed at `target`, calibrated on good parts where there are some; keep the rest as rejected."""
        ok = {name: o.artefact for name, o in self.outcomes.items() if o.ok and o.artefact is not None}
        bad = {name: o.artefact for name, o in self.outcomes.items() if not o.ok and o.artefact is not None}
        publish = bool(ok) and not _formats_at(target) & {name for name, o in self.outcomes.items() if not o.ok}
        if not publish:  # what passed is kept with the rest
            for artefact in ok.values():
                _move(artefact, self.passed, self.failing)
            ok, bad = {}, ok | bad
        published = self.manifest.model_copy(update={"artefacts": ok})
        self._beside(self.passed)
        if publish and good is not None:
            self.say(f"calibration: {len(good)} good parts, alpha {alpha:g}")
            published = published.model_copy(update={"calibration": self._calibrated(published, good, alpha)})
        refused, kept = self.manifest.model_copy(update={"artefacts": bad}), None
        if any(self.failing.iterdir()):
            self._beside(self.failing)
            bundle.write_manifest(self.failing, refused)
            status = "\n".join(f"- {name}: {outcome}" for name, outcome in self.outcomes.items())
            write_card(self.failing, refused, f"# Rejected export\n\n{status}\n\n")
            kept = bundle.reject(self.failing, target)
        if not publish:
            return ExportResult(kept, refused, self.outcomes, False, kept)
        bundle.write_manifest(self.passed, published)
        write_card(self.passed, published)
        bundle.publish(self.passed, target)
        return ExportResult(Path(target), published, self.outcomes, True, kept)

    def _calibrated(self, manifest: Manifest, good: GoodParts, alpha: float) -> Calibration:
        """Thresholds by the first artefact that runs here."""
        for artefact in manifest.artefacts.values():
            if artefact.parity is not None:
                engine = start_engine(self.passed, manifest, artefact.engine, self.device, artefact)
                return fit(Detector.from_manifest(engine, manifest, mask=self.mask), good, alpha)
        raise CalibrationError(
            f"none of the formats {', '.join(manifest.artefacts)} runs on this machine, so nothing can be calibrated "
            "here; add the format onnx or eager, or calibrate the bundle later on the machine that runs it"
        )


def export_bundle(
    model: "FlowModel",
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
    workspace: int | None = None,
    good: GoodParts | None = None,
    alpha: float = 0.01,
    location: StatisticsParts | None = None,
    tiling: Tiling | None = None,
    mask: np.ndarray | None = None,
    probe_choice: dict[str, Any] | None = None,
    recipe: FollowedRecipe | None = None,
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
        workspace: memory that an engine builder may use, MiB; None for what the engine turns out to need.
        good: good parts (see `frames.good_parts`); thresholds go into the manifest.
        alpha: accepted false-reject rate of the calibration.
        location: good parts that location statistics are fitted on, see `location.split`; None for none.
        tiling: how frames are cut into tiles; None: the model looks at whole frames.
        mask: the pixels (H, W) bool of the frames that are never judged, with a tiling and a frame size.
        probe_choice: how the scorer's probes were chosen, for the manifest.
        recipe: what scorer and aggregate were chosen by, for the manifest.
        source: where the model comes from, for the manifest; its provenance by default.
        quiet: tell nothing.
        tell: receives one line of progress at a time; standard error by default.

    Raises:
        ConfigError: frames of another size, classes that the model does not have, or what tiles cannot have.
        CalibrationError: good parts that are too few; raised before anything is built.
        FrameError: a good part that cannot be read or judged; raised before anything is built.
        ParityError: the reference itself is not finite.
        BundleError: the target cannot be written.
    """
    from flowad_fast.engines.device import torch_device

    say = (lambda _: None) if quiet else (tell or _to_stderr)
    given = frames if isinstance(frames, ParityFrames) else ParityFrames(frames, "frames given by the caller")
    check_size(given, frame_size)
    size, tiler = frame_size, _tiler(model, tiling, mask, frame_size, aggregate, location is not None)
    if tiler is not None:
        given, size = parity_tiles(given, tiler), (tiler.size, tiler.size)
    seen = (given.frames, class_indices(model, given))
    built_for = str(torch_device(device))
    request = Request(model, scorer, aggregate, size, opset, precision, batch, built_for, workspace, seen)
    if good is not None:
        say(f"good parts: checking {len(good)} frames")
        check_good(good, alpha, aggregate)
    if any(FORMATS[name].quantises for name in formats if name in FORMATS):
        request = replace(request, ranges=ranges_of(model, given, good, tiler))
    statistics = None
    if location is not None:
        check_located(aggregate)
        check_parts(location.good)
        if good is not None:
            refuse_overlap(location.good, good)
        say(f"location statistics: {len(location.good)} good parts")
        statistics = fit_location(Detector.from_model(model, scorer, device="cpu"), location.good, model.spec)
        request = replace(request, location=statistics.table)
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
        recipe=recipe,
        tiling=tiling,
    )
    with bundle.writing(target) as folder:
        if mask is not None:
            said = write_mask(folder, mask)
            (folder / said.file).unlink()  # as with the statistics
            manifest = manifest.model_copy(update={"mask": said})
        if location is not None and statistics is not None:
            written = bundle.write_location(folder, statistics.table)
            (folder / written[0]).unlink()  # it goes beside what passes
            told = described(statistics, written, model.spec, location.source)
            manifest = manifest.model_copy(update={"location": told})
            for line in in_words(told):
                say(line)
        say(f"reference: {len(given.frames)} {'tiles' if tiling else 'frames'}, fp32")
        reference = Reference.of(model, scorer, aggregate, given, request.location)
        export = Export(request, manifest, reference, device, folder, say, mask)
        for name in formats:
            export.write(name)
        return export.conclude(target, good, alpha)


def check_bundle(
    path: str | Path, model: "FlowModel", frames: ParityFrames, device: str = "cpu", engine: str | None = None
) -> dict[str, Outcome]:
    """Check a bundle's hashes and its parity on `frames` again, on this machine.

    With an engine, by that one, and only of the artefacts that it reads; otherwise each by its format's own.

    Raises:
        BundleError: an altered bundle.
        EngineUnavailableError: no such engine, the bundle has nothing for it, or it cannot run here.
        ConfigError: frames of another size than the bundle's.
    """
    folder, manifest = bundle.read(path)
    check_size(frames, manifest.frame_size)
    if manifest.tiling is not None:
        image = manifest.model.image
        frames = parity_tiles(frames, Tiler(manifest.tiling, image.size, read_mask(folder, manifest), image.mean))
    table = None if manifest.location is None else bundle.location_table(folder, manifest)
    asked = manifest.artefacts
    if engine is not None:
        asked = {name: one for name, one in asked.items() if one.engine == backend(engine).artefact}
        if not asked:
            has = ", ".join(manifest.artefacts)
            raise EngineUnavailableError(f"{folder}: nothing for the engine {engine} (it has: {has}); export it again")
    reference = Reference.of(model, manifest.scorer, manifest.aggregate, frames, table)
    return {name: reference.measure(name, one, folder, manifest, device, engine) for name, one in asked.items()}


def _tiler(
    model: "FlowModel",
    tiling: Tiling | None,
    mask: np.ndarray | None,
    frame_size: tuple[int, int] | None,
    aggregate: Aggregate,
    located: bool,
) -> Tiler | None:
    """How frames are cut, after refusing what tiles cannot have.

    Raises:
        ConfigError: location statistics, an aggregate of cells, or a mask without the frames' size or a tiling.
        FrameError: frames of that size cannot be cut so.
    """
    if tiling is None:
        if mask is not None:
            raise ConfigError("a mask goes with tiles; give a tiling too")
        return None
    check_blended(aggregate)
    if located:
        raise ConfigError(NO_LOCATION)
    if mask is not None and frame_size is None:
        raise ConfigError(f"the mask is for frames of {mask.shape[0]}x{mask.shape[1]} pixels; give that frame size")
    tiler = Tiler(tiling, model.spec.image.size, mask, model.spec.image.mean)
    if frame_size is not None:
        tiler.grid(*frame_size)
    return tiler


def _move(artefact: Artefact, source: Path, target: Path) -> None:
    for file in artefact.files:
        assert not (target / file).exists(), f"two formats write {file}"
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).rename(target / file)


def _formats_at(target: str | Path) -> set[str]:
    """The formats of the bundle at `target`, none where there is no readable one."""
    try:
        return set(bundle.read(target, verify=False)[1].artefacts)
    except FlowADError:
        return set()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
