"""What the line knows of a part on its way, and the record that its outcome becomes."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from flowad_fast.detector import Detection
from flowad_fast.line.event import Action, Record
from flowad_fast.line.journal import Begun
from flowad_fast.line.outcome import NoResult, Outcome
from flowad_fast.stages.decision import Verdict


@dataclass(frozen=True)
class Judged:
    """A part's place in a detection: by which bundle, and when its batch was taken and answered (monotonic)."""

    detection: Detection
    index: int
    bundle: str
    taken: float
    answered: float


@dataclass
class Item:
    """A part on its way, beside what the policy knows of it."""

    camera: str
    arrived: datetime
    frame: NDArray[np.uint8] | None
    stamp: int | None = None
    judged: Judged | None = None


def make_record(outcome: Outcome, item: Item, on_no_result: Action) -> Record:
    """The record of an outcome."""
    result = outcome.result
    action: Action = "pass" if outcome.passes else "reject"
    if isinstance(result, NoResult):
        action = on_no_result
    part = outcome.part
    record = Record(
        part.id,
        part.camera,
        result,
        action,
        item.arrived,
        outcome.seconds,
        reason=outcome.reason,
        stamp=item.stamp,
        frame=item.frame,
    )
    if outcome.judgement is None or (judged := item.judged) is None:
        return record
    found, i = judged.detection, judged.index
    limits = found.calibration.classes.get(found.classes[i]) if found.calibration else None
    return replace(
        record,
        score=outcome.judgement.score,
        threshold=None if limits is None else limits.threshold,
        bundle=judged.bundle,
        timings={
            "waiting": judged.taken - part.arrived,
            "scoring": judged.answered - judged.taken,
            "ordering": outcome.told - judged.answered,
        },
        regions=found.regions[i] if result is Verdict.ANOMALOUS else (),
        heat=found.map[i],
    )


def lost_record(part: Begun, on_no_result: Action) -> Record:
    """The record of a part that an earlier run had in flight when it ended without a word."""
    action: Action = "pass" if on_no_result == "pass" else "reject"
    seconds = (datetime.now(UTC) - part.arrived).total_seconds()
    reason = "the line was killed, or its computer lost power, while this part was in flight"
    return Record(part.part, part.camera, NoResult.SHUTTING_DOWN, action, part.arrived, seconds, reason=reason)
