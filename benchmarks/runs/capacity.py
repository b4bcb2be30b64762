"""What the section on capacity needs: bytes of frames, what decoding takes, and its model held against the policy.

    python -m flowad_fast.benchmarks.runs.capacity --output benchmarks/results/capacity-cpu.json

Bytes and the simulation do not depend on the machine; `--no-timing` leaves out what does.
"""

import heapq
import io
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record import capacity, report
from flowad_fast.benchmarks.record import record as records
from flowad_fast.benchmarks.record.capacity_record import CapacityRecord, Encoded, Simulated
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.runs.evaluations import evenly
from flowad_fast.cli import common
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.errors import ConfigError
from flowad_fast.line.outcome import Judgement, Outcome, Part
from flowad_fast.line.policy import Batch, Pace, Policy
from flowad_fast.shipped import PHOTOS
from flowad_fast.stages.decision import Verdict

QUALITY = 90
DECODES = 5
"""Times that each photo is decoded; the fastest counts."""
SEED = 0
Frame = NDArray[np.uint8]
Arrivals = Iterator[tuple[float, int]]


def encoded(frames: Sequence[Frame], timing: bool) -> tuple[Encoded, ...]:
    """Bytes of frames (H, W, 3) uint8 in each form that they can be sent in; grey where all channels are equal."""
    grey = all((frame == frame[..., :1]).all() for frame in frames)
    pixels = [np.ascontiguousarray(frame[..., 0]) if grey else frame for frame in frames]
    kind = "grey" if grey else "RGB"
    found = [_form("raw RGB", [frame.tobytes() for frame in frames], None)]
    if grey:
        found.append(_form("raw grey", [one.tobytes() for one in pixels], None))
    for name, options in ((f"PNG, {kind}", _PNG), (f"JPEG {QUALITY}, {kind}", _JPEG)):
        sent = [_written(one, options) for one in pixels]
        found.append(_form(name, sent, _decoding(sent) if timing else None))
    return tuple(found)


_PNG: dict[str, object] = {"format": "PNG"}
_JPEG: dict[str, object] = {"format": "JPEG", "quality": QUALITY}


def _written(pixels: Frame, options: dict[str, object]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)  # type: ignore[arg-type]
    return file.getvalue()


def _form(name: str, sent: Sequence[bytes], decode_ms: float | None) -> Encoded:
    sizes = [len(one) for one in sent]
    return Encoded(
        form=name, photos=len(sizes), mean_bytes=round(sum(sizes) / len(sizes), 1), least_bytes=min(sizes),
        most_bytes=max(sizes), decode_ms=decode_ms,
    )  # fmt: skip


def _decoding(sent: Sequence[bytes]) -> float:
    """Median over photos of the fastest decoding to RGB, in ms."""
    fastest = []
    for data in sent:
        times = []
        for _ in range(DECODES):
            start = time.perf_counter()
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            times.append((time.perf_counter() - start) * 1e3)
        fastest.append(min(times))
    return round(float(np.median(fastest)), 4)


def at_random(rate: float, cameras: int, seed: int) -> Arrivals:
    """Times and cameras of parts that come at random, `rate` per second in all."""
    draw, now = random.Random(seed), 0.0
    while True:
        now += draw.expovariate(rate)
        yield now, draw.randrange(cameras)


def in_beats(rate: float, cameras: int, seed: int) -> Arrivals:
    """The same of lines that each have a beat of their own, all as fast, begun at random; begun anew now and then.

    Who comes beside whom stays as it is while lines run, so one beginning alone says little.
    """
    draw, beat, start = random.Random(seed), cameras / rate, 0.0
    while True:
        offsets = sorted((draw.uniform(0, beat), camera) for camera in range(cameras))
        for turn in range(20):
            for offset, camera in offsets:
                yield start + turn * beat + offset, camera
        start += 22 * beat  # the pool is empty in between


def simulate(replicas: int, service: float, deadline: float, arrivals: Arrivals, parts: int) -> NDArray[np.float64]:
    """Seconds from arrival to outcome of each part, (parts,), inf without a verdict in time, by the line's own policy.

    It serves a pool on a simulated clock.

    Args:
        replicas: that judge one part at a time each.
        service: seconds that each part takes.
        deadline: seconds from arrival that a part may take.
        arrivals: times, not decreasing, and cameras.
        parts: how many come.
    """
    policy = Policy(capacity=1_000_000, largest_batch=1, pace=Pace({1: service}))
    judging: list[tuple[float, int, Batch]] = []
    seconds: list[float] = []

    def count(outcomes: Sequence[Outcome]) -> None:
        seconds.extend(one.seconds if one.passes else math.inf for one in outcomes)

    def start(now: float) -> None:
        while len(judging) < replicas and (batch := policy.take(now)) is not None:
            heapq.heappush(judging, (now + service, batch.number, batch))

    def until(limit: float) -> None:
        while judging and judging[0][0] <= limit:
            now, _, batch = heapq.heappop(judging)
            count(policy.finish(batch, (Judgement(Verdict.GOOD),), now))
            start(now)

    for number in range(parts):
        now, camera = next(arrivals)
        until(now)
        count(policy.arrive(Part(str(number), str(camera), now, now + deadline), now))
        start(now)
    until(math.inf)
    count(policy.expire(math.inf))
    assert len(seconds) == parts, "every part has exactly one outcome"
    return np.array(seconds)


def simulated(service: float, parts: int, tell: Callable[[str], None]) -> Iterator[Simulated]:
    """Pools at the rate that the model allows: from one camera, from as many as there are lines, and in beats."""
    kinds: tuple[tuple[Literal["at random", "in beats"], Callable[[float, int, int], Arrivals], bool, float], ...] = (
        ("at random", at_random, False, 1.0), ("at random", at_random, True, 1.0), ("at random", at_random, True, 0.9),
        ("in beats", in_beats, True, 1.0),
    )  # fmt: skip
    for replicas, deadline in ((1, 0.1), (1, 0.2), (4, 0.1), (4, 0.2)):
        allowed = capacity.most(replicas, service, deadline)
        for name, make, many, share in kinds:
            rate = round(allowed * share, 2)
            cameras = max(2, round(rate)) if many else 1
            tell(f"{replicas} replicas, deadline {deadline:g} s, {rate:g} parts/s {name} of {cameras} cameras")
            seconds = simulate(replicas, service, deadline, make(rate, cameras, SEED), parts)
            yield Simulated(
                replicas=replicas, service_s=service, deadline_s=deadline, rate=rate, cameras=cameras, arrivals=name,
                parts=parts, missed=round(float(np.isinf(seconds).mean()), 6),
                model=round(capacity.late(replicas, service, rate, deadline - service), 6),
            )  # fmt: skip


def measure(
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    photos: Annotated[int, typer.Option(min=1, help="Photos of the demo's cells.")] = 200,
    parts: Annotated[int, typer.Option(min=1000, help="Parts of each simulated pool.")] = 100_000,
    timing: Annotated[bool, typer.Option(help="Also time decoding; wants a quiet machine.")] = True,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Bytes and decoding of frames, and the capacity's model against the line's policy."""
    before = moment()
    line = capacity.measured_line(report.RESULTS)
    if line is None:
        raise ConfigError(
            f"{report.RESULTS / capacity.LINE}.json has no time of a part through the line; measure it first: "
            "flowad-bench line --part rate,added"
        )
    dataset = read_dataset(PHOTOS["cells"], None)
    frames = [read_frame(sample.path) for sample in evenly(dataset.samples, photos)]
    with common.status("capacity") as tell:
        tell("encoding")
        forms = encoded(frames, timing)
        pools = tuple(simulated(round(line.ms / 1e3, 5), parts, tell))
    height, width = frames[0].shape[:2]
    found = CapacityRecord(
        preset="capacity", environment=environment(before), roofs=Roofs(reason="not measured here"),
        dataset=dataset.name, frame_size=(height, width), seed=SEED, cases=forms, simulated=pools,
    )  # fmt: skip
    if output is not None:
        records.write(found, output)
    if json:
        common.print_json(found.dump())
        return
    for one in forms:
        decode = "decoding not measured" if one.decode_ms is None else f"decoded in {one.decode_ms:.2f} ms"
        common.say(f"{one.form}: {one.mean_bytes:.0f} bytes, {decode}")
    for pool in pools:
        common.say(
            f"{pool.replicas} replicas, deadline {pool.deadline_s:g} s, {pool.rate:g} parts/s {pool.arrivals}: late "
            f"{pool.missed:.3%}, by the model {pool.model:.3%}"
        )


main = common.command(measure)

if __name__ == "__main__":
    main()
