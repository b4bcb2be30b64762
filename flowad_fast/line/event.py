"""What leaves the line: one record per part, and events about the line itself; what a sink is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from flowad_fast.line.outcome import NoResult
from flowad_fast.stages.decision import Verdict
from flowad_fast.stages.regions import Region

Action = Literal["pass", "reject", "stop"]
"""What the line does with a part."""


@dataclass(frozen=True)
class Record:
    """One part's outcome, as sinks get it.

    Attributes:
        part: what names it; unique within a run.
        camera: which camera saw it.
        result: the verdict, or why there is none.
        action: what the line does with the part.
        arrived: when, UTC.
        seconds: from arrival until it was told.
        score, threshold: of the detector, None without a verdict.
        reason: in words, "" where `result` says it all.
        bundle: hash of the bundle that judged, "" where none did.
        timings: seconds by stage: waiting, scoring, ordering.
        regions: where the defects are.
        frame, heat: the picture (H, W, 3) uint8 and the map (S, S), where there are any; only the picture store and the
            page look at them.
        stamp: the camera's own time, nanoseconds since whatever it counts from; None where it gives none.
    """

    part: str
    camera: str
    result: Verdict | NoResult
    action: Action
    arrived: datetime
    seconds: float
    score: float | None = None
    threshold: float | None = None
    reason: str = ""
    bundle: str = ""
    timings: Mapping[str, float] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    frame: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    heat: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    stamp: int | None = None

    def without_pictures(self) -> "Record":
        """The same outcome for those who keep many: frame and map stay with those who show or store them."""
        return replace(self, frame=None, heat=None)


@dataclass(frozen=True)
class Alarm:
    """Something about the line that a person should know.

    Attributes:
        kind: what, e.g. "drift", "camera lost", "engine restarted"; a sink's topic or column.
        at: when, UTC.
        text: one sentence with figures.
        over: False when it begins, True when it is over.
        figures: the numbers behind it.
    """

    kind: str
    at: datetime
    text: str
    over: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)


class Sink(Protocol):
    """Where records and alarms go.

    Both methods are called from the sink's own thread only, so they may block; what they raise is counted, told once
    as an alarm, and never reaches the line. A sink connects inside `publish` when it is not connected, raises when
    that fails, and is asked again later with the same events in order where it promises delivery.
    """

    def publish(self, events: "list[Record | Alarm]") -> None:
        """Deliver events, in order; raise if any of them was not delivered."""

    def close(self) -> None:
        """Let go of connections and files; called once, also after failures."""
