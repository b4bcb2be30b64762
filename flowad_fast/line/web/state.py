"""What the page shows, as JSON values, and its pictures. Everything from outside stays text in a JSON string."""

import hashlib
import io
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from flowad_fast.line.health import Health
from flowad_fast.line.monitor import SECONDS, SourceReport
from flowad_fast.line.sinks.rows import Json, to_row
from flowad_fast.line.watch import Shown

if TYPE_CHECKING:
    from flowad_fast.line.station import Station

AGE = 0.25
"""Seconds for which a state is given again, however often it is asked for."""
HEAT = 255
_PICTURES = 64


def key(part: str) -> str:
    """What names a part in an address: nothing of its id, which comes from file names."""
    return hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:20]


class State:
    """Reads a station. Safe from many threads."""

    def __init__(self, station: "Station") -> None:
        """Nothing is read yet."""
        self._station = station
        self._lock = threading.Lock()
        self._known: dict[str, Json] = {}
        self._until = 0.0
        self._encoded: dict[tuple[str, str], bytes] = {}

    def health(self) -> Health:
        """See `Line.health`."""
        return self._station.line.health()

    def report(self) -> Mapping[str, SourceReport]:
        """See `Watch.report`."""
        return self._station.watch.report()

    def thresholds(self) -> Mapping[str, float]:
        """By product."""
        calibration = self._station.line.scoring.calibration
        return {} if calibration is None else {name: one.threshold for name, one in calibration.classes.items()}

    def __call__(self) -> dict[str, Json]:
        """What the page shows."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._known, self._until = self._read(), time.monotonic() + AGE
            return self._known

    def forget(self) -> None:
        """Something was changed: the next answer is a new one."""
        with self._lock:
            self._until = 0.0

    def picture(self, part: str, what: str) -> bytes | None:
        """The frame of a part as JPEG, or its heat as PNG: grey, 128 is the threshold; None where it is gone.

        Args:
            part: its `key`.
            what: `frame` or `heat`.
        """
        latest, rejected = self._station.watch.pictures()
        shown = next((one for one in (*latest.values(), *rejected) if key(one.record.part) == part), None)
        if shown is None or (what == "heat" and shown.heat is None):
            return None
        with self._lock:
            known = self._encoded.get((part, what))
        if known is None:
            known = _jpeg(shown) if what == "frame" else _heat(shown)
            with self._lock:
                self._encoded[part, what] = known
                while len(self._encoded) > _PICTURES:
                    del self._encoded[next(iter(self._encoded))]
        return known

    def _read(self) -> dict[str, Json]:
        station, health, report = self._station, self.health(), self.report()
        latest, rejected = station.watch.pictures()
        shown = {one.record.part for one in (*latest.values(), *rejected)}
        settings = station.settings
        calibration = station.line.scoring.calibration
        return {
            "now": datetime.now(UTC).isoformat(),
            "alive": health.alive,
            "ready": health.ready,
            "why": health.why,
            "engine": health.engine,
            "bundle": health.bundle,
            "note": station.note,
            "alpha": None if calibration is None else calibration.alpha,
            "deadline": settings.deadline,
            "arrived": health.arrived,
            "pending": health.pending,
            "waiting": health.waiting,
            "results": {**health.results},
            "actions": {**health.actions},
            "failures": health.failures,
            "sources": {**health.sources},
            "sinks": {name: asdict(one) for name, one in health.sinks.items() if not name.startswith("listener ")},
            "last": [_outcome(to_row(one), one.part in shown) for one in reversed(health.last)],
            "rejected": [_live(one) for one in reversed(rejected)],
            "live": {camera: _live(one) for camera, one in latest.items()},
            "alarms": [to_row(one) for one in reversed(health.alarms)],
            "monitor": {camera: _monitored(one) for camera, one in report.items()},
            "seconds": SECONDS,
            "activation": asdict(station.activation.progress),
            "token": settings.web is not None and settings.web.token is not None,
        }


def _outcome(row: dict[str, Json], shown: bool) -> dict[str, Json]:
    part = str(row["part"])
    kept = ("part", "camera", "result", "action", "arrived", "seconds", "score", "threshold", "reason", "bundle")
    return {name: row[name] for name in kept} | {"key": key(part), "shown": shown}


def _live(one: Shown) -> dict[str, Json]:
    row = to_row(one.record)
    return _outcome(row, True) | {"regions": row["regions"], "size": list(one.size), "heat": one.heat is not None}


def _monitored(one: SourceReport) -> dict[str, Json]:
    features: dict[str, Json] = {
        name: {"now": now, "usual": None if usual is None else usual.median}
        for name, (now, usual) in one.features.items()
        if math.isfinite(now)
    }
    points: list[Json] = [
        [it.at.isoformat(), it.parts, it.rejected, it.unjudged, *(it.score or (None, None)), it.latency]
        for it in one.points
    ]
    return {
        "parts": one.parts,
        "rejected": one.rejected,
        "unjudged": one.unjudged,
        "lost": one.lost,
        "usual": one.usual_rejects,
        "bound": one.rejects_bound,
        "scores": list(one.scores),
        "latency": list(one.latency),
        "features": features,
        "evidence": {**one.evidence},
        "learned": one.learned,
        "alarms": list(one.alarms),
        "points": points,
    }


def _jpeg(shown: Shown) -> bytes:
    out = io.BytesIO()
    Image.fromarray(shown.frame).save(out, "JPEG", quality=85)
    return out.getvalue()


def _heat(shown: Shown) -> bytes:
    """From the map's median, no heat, to its mirror at the threshold; where there is no threshold, to its maximum."""
    assert shown.heat is not None
    heat, threshold = shown.heat, shown.record.threshold
    low = float(np.median(heat))
    high = float(heat.max()) if threshold is None or threshold <= low else 2 * threshold - low
    scaled = np.clip((heat - low) / max(high - low, 1e-12), 0, 1)
    out = io.BytesIO()
    Image.fromarray(np.rint(HEAT * np.nan_to_num(scaled)).astype(np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()
