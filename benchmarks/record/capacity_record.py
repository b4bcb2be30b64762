"""What `runs/capacity.py` measured for the section on capacity, typed."""

from typing import Literal

from flowad_fast.benchmarks.record.machine import Part
from flowad_fast.benchmarks.record.record import Header


class Encoded(Part):
    """A form in which frames are sent: bytes of a frame, and ms that one thread takes to decode it.

    `decode_ms` is the median over the photos, None where it was not measured.
    """

    form: str
    photos: int
    mean_bytes: float
    least_bytes: int
    most_bytes: int
    decode_ms: float | None = None


class Simulated(Part):
    """A pool that was simulated with the line's own policy, beside what the model says.

    Attributes:
        replicas: that judge one part at a time each.
        service_s: seconds of one part.
        deadline_s: seconds that a part may take in all.
        rate: parts per second, all lines together.
        cameras: that they come from, which take turns.
        arrivals: at random (Poisson), or each line at its own beat, begun at a random moment.
        parts: how many came.
        missed: share of the parts without a verdict in time.
        model: the same as the model says, for parts at random.
    """

    replicas: int
    service_s: float
    deadline_s: float
    rate: float
    cameras: int
    arrivals: Literal["at random", "in beats"]
    parts: int
    missed: float
    model: float


class CapacityRecord(Header):
    """Forms of frames, and a model of pools held against the policy."""

    kind: Literal["capacity"] = "capacity"
    dataset: str
    frame_size: tuple[int, int]
    seed: int
    cases: tuple[Encoded, ...]
    simulated: tuple[Simulated, ...]
