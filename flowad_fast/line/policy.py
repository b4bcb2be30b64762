"""Which parts are judged when, and what each is told: the line's promises in one class without threads or clocks.

Every call is given the time. The promises, for any order of calls:

- Every part that arrived has exactly one outcome, and the outcomes of a camera come in the order of its parts.
- A verdict is told by the part's deadline or not at all: a late one is `NoResult.LATE`, also when it was good.
- At most `capacity` parts wait; one more is told `NoResult.QUEUE_FULL` at once and disturbs no other.
- Cameras take turns, so that a fast one does not starve a slow one.
- A batch is as large as the deadlines of its parts allow, judged by how long batches of each size have taken.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flowad_fast.line.outcome import Judgement, NoResult, Outcome, Part
from flowad_fast.stages.decision import Verdict


class Pace:
    """How long batches take, learned from those that were judged: a slow maximum per size, interpolated between."""

    FADE = 0.98
    """Per batch of a size, what is left of an old maximum: a hiccup is forgotten after some hundred batches."""

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        """Start with measured seconds by batch size, such as those of a warm-up."""
        self._seconds: dict[int, float] = dict(seconds or {})

    def learn(self, size: int, seconds: float) -> None:
        """A batch of `size` parts took this long."""
        self._seconds[size] = max(seconds, self._seconds.get(size, 0.0) * self.FADE)

    def __call__(self, size: int) -> float:
        """Seconds that a batch of `size` parts is expected to take; 0 before anything is known."""
        if size in self._seconds:
            return self._seconds[size]
        below = max((known for known in self._seconds if known < size), default=None)
        above = min((known for known in self._seconds if known > size), default=None)
        if below is None:
            return 0.0 if above is None else self._seconds[above]
        if above is None:
            return self._seconds[below] * size / below
        share = (size - below) / (above - below)
        return self._seconds[below] * (1 - share) + self._seconds[above] * share


@dataclass(frozen=True)
class Batch:
    """Parts that are judged together."""

    number: int
    parts: tuple[Part, ...]
    taken: float


@dataclass
class _Entry:
    """A part on its way: waiting, being judged (`batch`), or decided and held until its turn."""

    part: Part
    batch: int | None = None
    outcome: Outcome | None = field(default=None)


class Policy:
    """Parts in, outcomes out; see the module. Not safe from many threads: its user holds a lock."""

    def __init__(self, capacity: int = 64, largest_batch: int = 8, pace: Pace | None = None) -> None:
        """Set the limits.

        Args:
            capacity: parts that may wait, all cameras together.
            largest_batch: parts that are judged together, at most.
            pace: how long batches take.
        """
        if capacity < 1 or largest_batch < 1:
            raise ValueError(f"capacity {capacity} and largest_batch {largest_batch} must be at least 1")
        self.capacity, self.largest_batch, self.pace = capacity, largest_batch, pace or Pace()
        self.closed = False
        self._lanes: dict[str, deque[_Entry]] = {}
        self._turns: deque[str] = deque()
        self._judging: dict[int, Batch] = {}
        self._number = 0

    @property
    def waiting(self) -> int:
        """Parts that wait to be judged."""
        return sum(entry.batch is None and entry.outcome is None for lane in self._lanes.values() for entry in lane)

    @property
    def pending(self) -> int:
        """Parts without an outcome that was told."""
        return sum(map(len, self._lanes.values()))

    def arrive(self, part: Part, now: float) -> list[Outcome]:
        """A part has arrived; the outcomes that are due now."""
        full = self.waiting >= self.capacity
        if part.camera not in self._lanes:
            self._lanes[part.camera] = deque()
            self._turns.append(part.camera)
        entry = _Entry(part)
        self._lanes[part.camera].append(entry)
        if self.closed:
            self._decide(entry, NoResult.SHUTTING_DOWN, now)
        elif full:
            self._decide(entry, NoResult.QUEUE_FULL, now, reason=f"{self.capacity} parts were waiting")
        return self.expire(now)

    def lose(self, part: Part, now: float, reason: str) -> list[Outcome]:
        """A part is known to have passed, but its frame is lost or not whole; the outcomes that are due now."""
        if part.camera not in self._lanes:
            self._lanes[part.camera] = deque()
            self._turns.append(part.camera)
        entry = _Entry(part)
        self._lanes[part.camera].append(entry)
        self._decide(entry, NoResult.SOURCE_LOST, now, reason=reason)
        return self.expire(now)

    def take(self, now: float) -> Batch | None:
        """The parts to judge now, None when none wait that can still be in time.

        The next part of each camera in turn, as many as can be judged together by the earliest of their deadlines. A
        part that comes too late even alone is left to expire, unless nothing else waits: the pace may be wrong.
        """
        chosen: list[_Entry] = []
        hopeless: _Entry | None = None
        places = {camera: self._next(camera) for camera in self._turns}
        while len(chosen) < self.largest_batch and any(places.values()):
            for _ in range(len(self._turns)):
                camera = self._turns[0]
                self._turns.rotate(-1)
                if not (queue := places[camera]):
                    continue
                entry = queue[0]
                if entry.part.deadline <= now or now + self.pace(1) > entry.part.deadline:
                    if entry.part.deadline > now and hopeless is None:
                        hopeless = entry
                    queue.popleft()
                    continue
                earliest = min(one.part.deadline for one in (*chosen, entry))
                if now + self.pace(len(chosen) + 1) > earliest:
                    queue.clear()  # of this camera nothing more fits into this batch
                    continue
                chosen.append(queue.popleft())
                break
        if not chosen and hopeless is not None:
            chosen = [hopeless]
        if not chosen:
            return None
        self._number += 1
        for entry in chosen:
            entry.batch = self._number
        batch = Batch(self._number, tuple(entry.part for entry in chosen), now)
        self._judging[batch.number] = batch
        return batch

    def finish(self, batch: Batch, judgements: tuple[Judgement, ...], now: float) -> list[Outcome]:
        """A batch was judged, one judgement per part; the outcomes that are due now."""
        if len(judgements) != len(batch.parts):
            return self.fail(batch, f"the detector gave {len(judgements)} results for {len(batch.parts)} parts", now)
        self.pace.learn(len(batch.parts), now - batch.taken)
        for part, judgement in zip(batch.parts, judgements, strict=True):
            if (entry := self._entry(part, batch)) is not None:
                in_time = now <= part.deadline
                self._decide(entry, judgement.verdict if in_time else NoResult.LATE, now, judgement, judgement.reason)
        self._judging.pop(batch.number, None)
        return self.expire(now)

    def fail(self, batch: Batch, reason: str, now: float) -> list[Outcome]:
        """The detector could not judge a batch, or exceeded its limit; the outcomes that are due now."""
        for part in batch.parts:
            if (entry := self._entry(part, batch)) is not None:
                self._decide(entry, NoResult.ENGINE_FAILED, now, reason=reason)
        self._judging.pop(batch.number, None)
        return self.expire(now)

    def expire(self, now: float) -> list[Outcome]:
        """Tell the parts whose deadline has passed that they have no result; the outcomes that are due now."""
        told: list[Outcome] = []
        for lane in self._lanes.values():
            for entry in lane:
                if entry.part.deadline < now and (entry.outcome is None or _verdict_held(entry.outcome)):
                    judgement = entry.outcome.judgement if entry.outcome else None
                    entry.outcome = Outcome(entry.part, NoResult.LATE, now, judgement)
            while lane and (outcome := lane[0].outcome) is not None:
                told.append(replace(outcome, told=now))
                lane.popleft()
        return told

    def next_deadline(self) -> float | None:
        """When `expire` has something to tell if nothing else happens; None when no part is pending."""
        return min((entry.part.deadline for lane in self._lanes.values() for entry in lane), default=None)

    def close(self, now: float) -> list[Outcome]:
        """Take no more parts: what waits is told so, what is being judged may finish; the outcomes that are due now."""
        self.closed = True
        for lane in self._lanes.values():
            for entry in lane:
                if entry.batch is None and entry.outcome is None:
                    self._decide(entry, NoResult.SHUTTING_DOWN, now)
        return self.expire(now)

    def _next(self, camera: str) -> deque[_Entry]:
        return deque(entry for entry in self._lanes[camera] if entry.batch is None and entry.outcome is None)

    def _entry(self, part: Part, batch: Batch) -> _Entry | None:
        """The part's entry while it is still to be decided by this batch."""
        if batch.number not in self._judging:
            return None
        lane = self._lanes[part.camera]
        return next((e for e in lane if e.part is part and e.batch == batch.number and e.outcome is None), None)

    def _decide(
        self,
        entry: _Entry,
        result: Verdict | NoResult,
        now: float,
        judgement: Judgement | None = None,
        reason: str = "",
    ) -> None:
        entry.outcome = Outcome(entry.part, result, now, judgement, reason)  # `expire` says when it is told


def _verdict_held(outcome: Outcome) -> bool:
    """A verdict that waits behind an undecided part of its camera, and so is not told yet."""
    return isinstance(outcome.result, Verdict)
