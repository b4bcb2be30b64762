"""What the line is told about a part: a verdict, or openly none and why."""

from dataclasses import dataclass, field
from enum import StrEnum

from flowad_fast.stages.decision import Verdict


class NoResult(StrEnum):
    """Why a part has no verdict. None of these is ever `good`."""

    LATE = "late"
    """Its deadline passed before a verdict was there."""
    QUEUE_FULL = "queue full"
    """More parts were waiting than the line may hold."""
    ENGINE_FAILED = "engine failed"
    """The detector raised, or did not answer within its limit."""
    SOURCE_LOST = "source lost"
    """The camera lost the part's frame, or delivered half of it."""
    SHUTTING_DOWN = "shutting down"
    """The line was stopped before the part's turn."""


@dataclass(frozen=True)
class Part:
    """One part in front of a camera.

    Attributes:
        id: what names it in records; unique within a run.
        camera: which camera saw it.
        arrived: when, seconds on a monotonic clock.
        deadline: when its outcome must be there, same clock.
    """

    id: str
    camera: str
    arrived: float
    deadline: float


@dataclass(frozen=True)
class Judgement:
    """What a detector said about one part."""

    verdict: Verdict
    score: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        part: which.
        result: the verdict, or why there is none.
        told: when it left the line, on the clock of the part: when its own and all earlier parts were decided.
        judgement: what the detector said; also beside `NoResult.LATE` where it said so too late, None otherwise.
        reason: in words, "" where `result` says it all.
    """

    part: Part
    result: Verdict | NoResult
    told: float
    judgement: Judgement | None = field(default=None)
    reason: str = ""

    @property
    def passes(self) -> bool:
        """Whether the detector said, in time, that the part is good."""
        return self.result is Verdict.GOOD

    @property
    def seconds(self) -> float:
        """From arrival until it was told."""
        return self.told - self.part.arrived
