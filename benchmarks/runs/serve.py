"""`flowad-bench serve`: a bare detector, one replica and two replicas of a Ray cluster, in turn on one machine."""

import asyncio
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.serve import ServeRecord, ServeRow, ServeSetting
from flowad_fast.benchmarks.runs.line_load import quantiles
from flowad_fast.benchmarks.runs.line_work import Work, prepare
from flowad_fast.detector import Detector, load
from flowad_fast.errors import require
from flowad_fast.serve import cluster
from flowad_fast.serve.pool import Asked, NoResultError
from flowad_fast.serve.pool_ray import RayPool
from flowad_fast.serve.settings import ModelSettings, RaySettings, ServeLimits
from flowad_fast.stages.decision import Verdict

REPLICAS = (1, 2)
WARM = 2.0
"""Seconds of load on each way before the first turn."""
SERVER = "flowad-bench"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        bundle: exported, of one product; None: the demo model.
        seed: of the pictures.
        threads: of each detector.
        batch: frames of one call, at most.
        concurrency: requests on their way at any time.
        deadline: seconds that a request has.
        seconds: of each turn.
        turns: of each way.
        note: for the record, e.g. what else the computer did.
    """

    bundle: Path | None
    seed: int
    threads: int
    batch: int
    concurrency: int
    deadline: float
    seconds: float
    turns: int
    note: str


@dataclass
class _Way:
    """A way of judging, and what came of it so far."""

    name: str
    replicas: int | None
    batch: int | None
    fps: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    results: Counter[str] = field(default_factory=Counter)
    wrong: int = 0

    def row(self) -> ServeRow:
        return ServeRow(
            name=self.name, replicas=self.replicas, batch=self.batch, fps=tuple(self.fps), wrong=self.wrong,
            latency=quantiles(np.array(self.ms)), results=dict(self.results),
        )  # fmt: skip


def run(plan: Plan, tell: Callable[[str], None], keep: Callable[[ServeRecord], None]) -> ServeRecord:
    """All ways in rotation; `keep` gets the record after each turn of all."""
    require("ray", "ray", by="flowad-bench serve")
    before = moment()
    folder = Path(tempfile.mkdtemp(prefix="flowad-serve-"))
    # What may be reserved, not what there is: two replicas share the cores where these are few.
    settings = RaySettings(name=SERVER, cpus=float(sum(REPLICAS) * plan.threads))
    try:
        work = prepare(folder, plan.bundle, plan.seed, tell)
        setting = ServeSetting(
            bundle=work.name, frame_size=work.frame_size, threads=plan.threads, largest_batch=plan.batch,
            concurrency=plan.concurrency, deadline_s=plan.deadline, seconds=plan.seconds, ray=version("ray"),
        )  # fmt: skip
        tell("starting Ray")
        cluster.join(settings)
        apps = {}
        for count in REPLICAS:
            model = ModelSettings(
                bundle=work.bundle, replicas=count, cpus=plan.threads, threads=plan.threads, largest_batch=plan.batch,
                device="cpu", queue=max(64, plan.concurrency),
            )  # fmt: skip
            apps[_model(count)] = cluster.deploy(SERVER, _model(count), model, ServeLimits(call=60.0), tell)
        pool = RayPool(SERVER, apps, ServeLimits(call=60.0))
        detector = load(work.bundle, device="cpu", threads=plan.threads)
        ways = [_Way("bare detector, 1 frame a call", None, 1)]
        if plan.batch > 1:
            ways.append(_Way(f"bare detector, {plan.batch} frames a call", None, plan.batch))
        ways += [_Way(f"{count} replica" + "s" * (count > 1), count, None) for count in REPLICAS]

        async def turns() -> None:
            for way in ways:
                await _turn(_Way(way.name, way.replicas, way.batch), work, plan, pool, detector, WARM)
            for turn in range(plan.turns):
                for i in range(len(ways)):
                    way = ways[(turn + i) % len(ways)]
                    tell(f"turn {turn + 1} of {plan.turns}: {way.name}")
                    await _turn(way, work, plan, pool, detector, plan.seconds)
                keep(_record(work, setting, plan, ways, environment(before)))
            await pool.close()

        asyncio.run(turns())
        return _record(work, setting, plan, ways, environment(before))
    finally:
        cluster.leave(settings)
        shutil.rmtree(folder)


def _record(work: Work, setting: ServeSetting, plan: Plan, ways: list[_Way], where: object) -> ServeRecord:
    rows = tuple(way.row() for way in ways)
    return ServeRecord.model_validate(
        {"preset": work.name, "environment": where, "note": plan.note, "setting": setting, "cases": rows}
    )


async def _turn(way: _Way, work: Work, plan: Plan, pool: RayPool, detector: Detector, seconds: float) -> None:
    """Load for so many seconds; what was begun by then is finished and counts."""
    start = time.monotonic()
    end, judged, place = start + seconds, 0, 0

    def check(i: int, verdict: Verdict) -> None:
        way.wrong += verdict is not (Verdict.ANOMALOUS if work.anomalous[i] else Verdict.GOOD)

    if way.batch is not None:
        while time.monotonic() < end:
            chosen = [(place + i) % len(work.frames) for i in range(way.batch)]
            place += way.batch
            begin = time.monotonic()
            found = detector(work.frames[chosen])
            way.ms.append(1e3 * (time.monotonic() - begin))
            way.results["answered"] += way.batch
            judged += way.batch
            for i, verdict in zip(chosen, found.verdict, strict=True):
                check(i, verdict)
    else:
        assert way.replicas is not None
        model = _model(way.replicas)

        async def client() -> None:
            nonlocal judged, place
            while time.monotonic() < end:
                i = place = (place + 1) % len(work.frames)
                asked = Asked(model, work.frames[i : i + 1], None, (f"{i}",), plan.deadline)
                begin = time.monotonic()
                try:
                    found = await pool.ask(asked)
                except NoResultError as error:
                    way.results[error.result.value] += 1
                    continue
                way.ms.append(1e3 * (time.monotonic() - begin))
                way.results["answered"] += 1
                judged += 1
                check(i, found.judgements[0].verdict)

        await asyncio.gather(*(client() for _ in range(plan.concurrency)))
    way.fps.append(judged / (time.monotonic() - start))


def _model(replicas: int) -> str:
    return f"replicas-{replicas}"
