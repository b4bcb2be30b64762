"""How a line is, for pages, probes and the last line of a command."""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.policy import Policy
from flowad_fast.line.scoring import Scoring

RECENT = 1000
"""Records that percentiles look back on."""
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the latency's histogram, seconds."""


@dataclass(frozen=True)
class SinkState:
    """Of one sink: events delivered, waiting and missed, calls that failed, and what it raised last.

    `pictures_lost`: records that lost frame and map while they waited.
    """

    delivered: int
    waiting: int
    missed: int
    failures: int
    trouble: str
    pictures_lost: int = 0


@dataclass(frozen=True)
class Health:
    """A line at one moment.

    Attributes:
        alive: its threads run, and no call of the detector is beyond its limit.
        ready: the canary frame gave its remembered score since the engine was last started, and parts are taken.
        why: why it is not alive or not ready, "" where it is both.
        engine, bundle: what judges.
        arrived, pending: parts that came, and those of them that have no outcome yet.
        results: parts by verdict or reason for none, since the start.
        cameras: the same by camera.
        actions: parts by what was done with them.
        failures: of the engine, since the start.
        latency: p50, p95, p99 and max, seconds from arrival until told, of the last records; empty before any.
        histogram: records by latency, one more than `BUCKETS`, and `total`, the sum of all latencies in seconds.
        waiting: parts that wait to be judged.
        sources: by camera, "" while it works, else its trouble.
        transport: by camera, what its connection has counted since it was made, such as missing packets.
        sinks: by name.
        last: the newest records, oldest first, without frame and map: 32 frames of a large camera are half a gigabyte.
        alarms: the newest alarms, oldest first.
    """

    alive: bool
    ready: bool
    why: str
    engine: str
    bundle: str
    arrived: int
    pending: int
    results: Mapping[str, int]
    actions: Mapping[str, int]
    failures: int
    latency: Mapping[str, float]
    sources: Mapping[str, str]
    sinks: Mapping[str, SinkState]
    last: tuple[Record, ...] = field(repr=False, default=())
    alarms: tuple[Alarm, ...] = field(repr=False, default=())
    cameras: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    histogram: tuple[int, ...] = field(repr=False, default=())
    total: float = 0.0
    waiting: int = 0
    transport: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


class Counts:
    """What a line counts. Its user holds a lock."""

    def __init__(self) -> None:
        self.arrived = self.failures = 0
        self.results: Counter[str] = Counter()
        self.actions: Counter[str] = Counter()
        self.last: deque[Record] = deque(maxlen=32)
        self.alarms: deque[Alarm] = deque(maxlen=64)
        self.cameras: dict[str, Counter[str]] = {}
        self.histogram, self.total = [0] * (len(BUCKETS) + 1), 0.0
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def add(self, record: Record) -> None:
        """A record was told."""
        self.results[record.result.value] += 1
        self.actions[record.action] += 1
        self.cameras.setdefault(record.camera, Counter())[record.result.value] += 1
        self.histogram[bisect_left(BUCKETS, record.seconds)] += 1
        self.total += record.seconds
        self.last.append(record.without_pictures())
        self._seconds.append(record.seconds)

    def latency(self) -> dict[str, float]:
        """See `Health.latency`."""
        if not self._seconds:
            return {}
        p50, p95, p99, most = np.percentile(self._seconds, (50, 95, 99, 100))
        return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(most)}

    def health(
        self,
        *,
        alive: bool,
        why: str,
        unready: str,
        scoring: Scoring,
        policy: Policy,
        sources: Mapping[str, str],
        transport: Mapping[str, Mapping[str, int]],
        sinks: Mapping[str, SinkState],
    ) -> Health:
        """What was counted, with what the line knows: `why` it is not alive, and why it is `unready`."""
        return Health(
            alive=alive,
            ready=alive and not unready,
            why=why or unready,
            engine=scoring.engine,
            bundle=scoring.bundle,
            arrived=self.arrived,
            pending=policy.pending,
            results=dict(self.results),
            actions=dict(self.actions),
            failures=self.failures,
            latency=self.latency(),
            sources=sources,
            sinks=sinks,
            last=tuple(self.last),
            alarms=tuple(self.alarms),
            cameras={camera: dict(one) for camera, one in self.cameras.items()},
            histogram=tuple(self.histogram),
            total=self.total,
            waiting=policy.waiting,
            transport=transport,
        )
