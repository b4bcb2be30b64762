"""Another bundle for a running line: only when an operator says so, after checks, and with a way back.

The new bundle is loaded beside the running one in a process of its own, checked, optionally run in shadow (both judge,
the verdicts stay the old one's), and takes over between two parts. The one before keeps running for going back. What
is active is written beside the journal before it takes over, and a restart goes on with it.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Literal

import numpy as np
from pydantic import AwareDatetime

from flowad_fast import bundle as bundles
from flowad_fast.bundle import Manifest
from flowad_fast.config import Frozen, parse, read_mapping
from flowad_fast.errors import BundleError, ConfigError, FlowADError
from flowad_fast.files import replacing, sha256
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.runner import Line
from flowad_fast.line.scoring import InProcess
from flowad_fast.line.settings import LineSettings
from flowad_fast.line.watch import Watch
from flowad_fast.stages.decision import Verdict

_log = logging.getLogger(__name__)
FILE = "active.json"


class Kept(Frozen):
    """A bundle by folder and hash."""

    bundle: Path
    hash: str


class Active(Frozen):
    """What was activated: `configured` is the bundle of the settings then, `before` the way back."""

    bundle: Path
    hash: str
    since: AwareDatetime
    configured: Path
    before: Kept

    def text(self, configured: Path) -> str:
        """In one line, beside the bundle of the settings."""
        since = f"{self.since:%Y-%m-%d %H:%M} UTC"
        return (
            f"{self.bundle} ({self.hash}) was activated on {since} and judges in place of {configured}; "
            "back: flowad-line rollback"
        )


class RefusedError(FlowADError, RuntimeError):
    """A bundle does not replace the running one; the message says why."""


def active(settings: LineSettings) -> Active | None:
    """The bundle that was activated in place of that of the settings; None where none was.

    A settings file that names another bundle than at the activation was changed since by an operator, and counts.

    Raises:
        ConfigError: the file is damaged.
        BundleError: the activated bundle was altered or is gone.
    """
    path = settings.journal / FILE
    if not path.exists():
        return None
    found = parse(Active, read_mapping(path), str(path))
    if found.configured != settings.bundle.resolve():
        return None
    remedy = f"put it back, or delete {path} to run {settings.bundle}"
    if not bundles.is_bundle(found.bundle):
        raise BundleError(f"{found.bundle}: was activated and is gone; {remedy}")
    if (now := sha256(found.bundle / bundles.MANIFEST)[:12]) != found.hash:
        raise BundleError(f"{found.bundle}: was activated as {found.hash} and is {now} now; {remedy}")
    return found


@dataclass(frozen=True)
class Progress:
    """How far an activation is.

    Attributes:
        state: idle before the first.
        bundle: folder, as asked for.
        text: what was found, or why it was refused.
        judged, parts: in shadow, so far and of how many.
        disagreements: parts that the new bundle would have judged otherwise.
    """

    state: Literal["idle", "loading", "shadow", "active", "refused"] = "idle"
    bundle: str = ""
    text: str = ""
    judged: int = 0
    parts: int = 0
    disagreements: int = 0

    @property
    def busy(self) -> bool:
        """Whether it goes on."""
        return self.state in ("loading", "shadow")


@dataclass(frozen=True)
class _Running:
    scoring: InProcess
    kept: Kept


class Activation:
    """Changes the bundle of a line whose detector has a process of its own. Safe from many threads."""

    def __init__(self, line: Line, settings: LineSettings, watch: Watch, make: "Maker") -> None:
        """Before the line is started.

        Args:
            line: which; it runs `settings.bundle` or what `active` gives.
            settings: of the line.
            watch: is told when another bundle judges.
            make: how a bundle's detector is made, not started.
        """
        self._line, self._settings, self._watch, self._make = line, settings, watch, make
        allowed = settings.web.bundles if settings.web is not None else None
        self.folder = (allowed or settings.bundle.resolve().parent).resolve()
        self._lock = threading.Lock()
        self._progress = Progress()
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None
        self._parts: Queue[Record] | None = None
        self._before: _Running | None = None
        line.listen(self)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self._progress

    def candidates(self) -> list[str]:
        """Names of the bundles in the folder that may be activated."""
        try:
            return sorted(path.name for path in self.folder.iterdir() if bundles.is_bundle(path))
        except OSError:
            return []

    def activate(self, bundle: str, shadow: int = 0, allowed: float = 0.02, who: str = "") -> Progress:
        """Begin to activate a bundle; `progress` tells how it goes.

        Args:
            bundle: its folder; a relative one lies in `folder`.
            shadow: parts that both judge first; 0: none.
            allowed: share of those that may be judged otherwise.
            who: asked for it, for the record.

        Raises:
            RefusedError: another one goes on, or the folder is not one whose bundles may be activated.
        """
        path = (self.folder / bundle).resolve()
        if not path.is_relative_to(self.folder) or path == self.folder:
            raise RefusedError(f"{bundle}: only bundles in {self.folder} may be activated; copy it there")
        return self._begin(bundle, shadow, lambda: self._activate(path, "", shadow, allowed, who))

    def rollback(self, who: str = "") -> Progress:
        """Begin to go back to the bundle that judged before the last activation.

        Raises:
            RefusedError: another one goes on, or there is no way back.
        """
        kept = self._before.kept if self._before is not None else self._kept_before()
        if kept is None:
            raise RefusedError("no other bundle was activated, so there is no way back")
        return self._begin(str(kept.bundle), 0, lambda: self._activate(kept.bundle, kept.hash, 0, 0.0, who))

    def cancel(self) -> None:
        """End what goes on without a change, also in shadow; too late for what has changed."""
        self._cancelled.set()

    def close(self) -> None:
        """End what goes on, and the processes that do not judge."""
        self._cancelled.set()
        if self._thread is not None:
            self._thread.join(5)
        if self._before is not None:
            self._before.scoring.close()

    def __call__(self, event: Record | Alarm) -> None:
        """Hear of an event; in shadow, parts with a verdict are judged again, as many as the line leaves time for."""
        parts = self._parts
        if parts is not None and isinstance(event, Record) and event.frame is not None:
            if event.result in (Verdict.GOOD, Verdict.ANOMALOUS) and event.bundle == self._line.scoring.bundle:
                try:
                    parts.put_nowait(event)
                except Full:
                    pass

    def _begin(self, bundle: str, shadow: int, work: Callable[[], str]) -> Progress:
        with self._lock:
            if self._progress.busy:
                raise RefusedError(f"{self._progress.bundle} is being activated; wait for it, or cancel it")
            if not (health := self._line.health()).ready:
                raise RefusedError(f"the line is not ready ({health.why}); activate when it is")
            self._cancelled.clear()
            self._progress = Progress("loading", bundle, "is loaded and checked", parts=shadow)
            self._thread = threading.Thread(target=self._run, args=(work,), name="activation", daemon=True)
        self._thread.start()
        return self._progress

    def _run(self, work: Callable[[], str]) -> None:
        try:
            text = work()
            self._progress = replace(self._progress, state="active", text=text)
        except Exception as error:
            if not isinstance(error, FlowADError):
                _log.exception("an activation failed")
            reason = " ".join(str(error).split()) or type(error).__name__
            self._progress = replace(self._progress, state="refused", text=reason)
            text = f"{self._progress.bundle} does not replace the running bundle: {reason}"
            self._line.tell(Alarm("activation refused", datetime.now(UTC), text, over=True))

    def _activate(self, path: Path, expected: str, shadow: int, allowed: float, who: str) -> str:
        old = self._line.scoring
        if not isinstance(old, InProcess):
            raise RefusedError("the line runs an embedder's own detector; change it with Line.swap")
        back = self._before if self._before is not None and self._before.kept.hash == expected else None
        new = back.scoring if back is not None else self._make(path)
        kept = Kept(bundle=path, hash=new.bundle)
        done = False
        try:
            if expected and new.bundle != expected:
                raise RefusedError(f"{path} is {new.bundle} now and was {expected} when it judged; put it back")
            refuse_other_product(old, new, self._line)
            found = self._canary(old, new, started=back is not None)
            if shadow:
                found += "; " + self._shadow(new, shadow, allowed)
            if self._cancelled.is_set():
                raise RefusedError("cancelled before the change")
            before = Kept(bundle=old.path.resolve(), hash=old.bundle)
            self._write(
                Active(
                    bundle=path.resolve(),
                    hash=new.bundle,
                    since=datetime.now(UTC),
                    configured=self._settings.bundle.resolve(),
                    before=before,
                )
            )
            self._line.swap(new)
            done = True
        finally:
            if not done and back is None:
                new.close()
        if back is None and self._before is not None:
            self._before.scoring.close()
        self._before = _Running(old, before)
        self._watch.rebase()
        asked = f"; asked for by {who}" if who else ""
        text = f"{kept.bundle} ({kept.hash}) judges, before it {before.bundle} ({before.hash}): {found}{asked}"
        figures = {one: float(getattr(self._progress, one)) for one in ("judged", "disagreements")}
        self._line.tell(Alarm("bundle activated", datetime.now(UTC), text, over=True, figures=figures))
        return found

    def _canary(self, old: InProcess, new: InProcess, started: bool) -> str:
        """Start it, judge the canary, against the running bundle's map where that must be the same, and warm up."""
        limit, canary = self._settings.limits.start, self._line.canary
        try:
            if not started:
                new.start(limit)
            first = canary(new, limit)
        except FlowADError:
            if not started:
                raise
            new.start(limit)  # the way back: its process has died meanwhile
            first = canary(new, limit)
        once = canary.maps[new.bundle]
        canary.warm(new, self._line.largest_batch, limit)
        if not np.isfinite(once).all():
            raise RefusedError("its map of the canary frame is not finite")
        known = canary.maps.get(old.bundle)
        if known is None or not same_function(old.manifest, new.manifest):
            return f"canary: {first}"
        tolerance = max((_tolerance(one) for one in (old.manifest, new.manifest)), default=0.0)
        gap = float(np.abs(once - known).max() / max(float(known.std()), 1e-12))
        if gap > tolerance:
            raise RefusedError(
                f"it has the same model as the running bundle, but its map of the canary frame differs by {gap:.1e} of "
                f"its scale, its certificate allows {tolerance:.1e}; export it again"
            )
        return f"canary: {first}, its map differs by {gap:.1e} of its scale, certified {tolerance:.1e}"

    def _shadow(self, new: InProcess, parts: int, allowed: float) -> str:
        queue: Queue[Record] = Queue(4)  # frames may be large; what it cannot keep up with is left out
        self._progress = replace(self._progress, state="shadow", text="judges beside the running bundle")
        self._parts = queue
        judged = other = 0
        try:
            while judged < parts:
                if self._cancelled.is_set():
                    raise RefusedError(f"cancelled in shadow after {judged} of {parts} parts")
                try:
                    record = queue.get(timeout=0.1)
                except Empty:
                    continue
                if self._line.health().waiting:  # the line needs the computer more than a comparison does
                    continue
                assert record.frame is not None
                start = time.monotonic()
                found = new(record.frame[None], self._line.judge.names([record.camera]), self._settings.limits.call)
                self._cancelled.wait(time.monotonic() - start)  # and half of the time is its own
                judged += 1
                if found.verdict[0] is not record.result:
                    other += 1
                    self._disagree(record, str(found.verdict[0]), float(found.score[0]), new, found.invalid[0] or "")
                self._progress = replace(self._progress, judged=judged, disagreements=other)
        finally:
            self._parts = None
        share = other / judged
        if share > allowed:
            raise RefusedError(
                f"{other} of {judged} parts in shadow were judged otherwise ({share:.1%}, allowed {allowed:.1%}); see "
                "the events, then allow more or calibrate it again"
            )
        return f"{other} of {judged} parts in shadow were judged otherwise"

    def _disagree(self, record: Record, verdict: str, score: float, new: InProcess, reason: str) -> None:
        limits = self._watch.baselines(new.calibration).get(record.camera)
        figures = {"score": record.score, "threshold": record.threshold, "other_score": score}
        figures["other_threshold"] = limits.threshold if limits is not None else None
        text = f"part {record.part}: {record.result} by {record.bundle}, {verdict} by {new.bundle}"
        text += f" ({reason})" if reason else ""
        known = {key: float(value) for key, value in figures.items() if value is not None}
        self._line.tell(Alarm("shadow disagrees", datetime.now(UTC), text, over=True, figures=known))

    def _kept_before(self) -> Kept | None:
        try:
            found = active(self._settings)
        except FlowADError:
            return None
        return found.before if found is not None else None

    def _write(self, state: Active) -> None:
        try:
            with replacing(self._settings.journal / FILE) as file:
                file.write((state.model_dump_json(indent=2) + "\n").encode())
        except (ConfigError, OSError) as error:
            raise RefusedError(f"the activation cannot be noted, a restart would undo it: {error}") from None


Maker = Callable[[Path], InProcess]
"""How a bundle's detector is made, not started."""


def refuse_other_product(old: InProcess, new: InProcess, line: Line) -> None:
    """Refuse a bundle that judges something else, or frames of another size, or cannot judge.

    Raises:
        RefusedError: says what differs.
    """
    if new.bundle == old.bundle:
        raise RefusedError(f"it is the bundle that runs already ({new.bundle})")
    if new.classes != old.classes:
        a, b = (", ".join(one.labels) or "one product" for one in (new.classes, old.classes))
        raise RefusedError(f"it judges {a}, the running bundle judges {b}")
    for what, theirs, ours in (("frames", new.size, old.size), ("maps", new.image_size, old.image_size)):
        if theirs != ours:
            raise RefusedError(f"it has {what} of {theirs}, the running bundle of {ours}")
    if new.calibration is None:
        raise RefusedError("it has no calibration, so it gives no verdicts: flowad-export calibrate BUNDLE GOOD_FOLDER")
    for camera in line.cameras:
        name = str((line.judge.names([camera]) or [""])[0])
        if name not in new.calibration.classes:
            raise RefusedError(f"its calibration lacks {name!r}, which camera {camera} sees; calibrate it again")


def same_function(a: Manifest, b: Manifest) -> bool:
    """Whether two bundles must give the same map: model, source, scorer and location statistics are equal."""
    parts = ("model", "source", "scorer", "location")
    return all(getattr(a, one) == getattr(b, one) for one in parts)


def _tolerance(manifest: Manifest) -> float:
    """The largest error of a map that its artefacts' certificates allow, relative to the map's scale."""
    return max((one.parity.tolerance for one in manifest.artefacts.values() if one.parity is not None), default=1e-3)
