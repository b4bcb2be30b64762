"""Replicas on a real Ray cluster: every request has one outcome, whatever is killed and whichever bundle judges.

The cluster has two nodes, as processes of this machine; each has room for one replica of its own.
"""

import asyncio
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from line_servers import free_port

from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.line.activation import RefusedError
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve import cluster as clusters
from flowad_fast.serve.client import Client
from flowad_fast.serve.pool import Asked, NoResultError
from flowad_fast.serve.pool_ray import RayPool
from flowad_fast.serve.replica import Start
from flowad_fast.serve.settings import ModelSettings, RaySettings, ServeLimits
from tests.models import exported
from tests.serve_hanging import POISON, hanging
from tests.serve_replicas import Load, needs_ray, version, works

ROOT = Path(__file__).parents[1]
TOKEN = "a-token-of-the-test"
LIMITS = ServeLimits(call=3.0, start=60.0, canary=1.0, drain=10.0)


class Two:
    """A cluster of two nodes with room for one replica each, this process its driver, and a pool on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))  # replicas import `tests`
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.settings = RaySettings(address=self.cluster.address)
        self.node: Any = None
        self.grow()
        clusters.join(self.settings)

    def grow(self) -> None:
        self.node = self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    def model(self, bundle: Path, **more: Any) -> ModelSettings:
        return ModelSettings(bundle=bundle, **({"replicas": 2, "cpus": 0.4, "device": "cpu", "threads": 1} | more))

    def pool(self, bundle: Path, **more: Any) -> RayPool:
        app = clusters.deploy("flowad", "part", self.model(bundle, **more), LIMITS, change=hangs)
        clusters.tidy("flowad", [app.name])
        return RayPool("flowad", {"part": app}, LIMITS, hangs)

    def replicas(self, server: str = "flowad", count: int = 2) -> list[psutil.Process]:
        """Processes of a server's replicas on the two nodes; waits until they are so many."""
        end = time.monotonic() + 30
        while len(found := self._replicas(server)) != count:
            assert time.monotonic() < end, f"{found}, expected {count}"
            time.sleep(0.05)  # Ray writes what a process does into its name
        return found

    def _replicas(self, server: str) -> list[psutil.Process]:
        found = []
        for raylet in map(self.raylet, (self.cluster.head_node, self.node)):
            for one in raylet.children() if raylet.is_running() else ():
                with contextlib.suppress(psutil.Error):
                    if one.cmdline()[0].startswith(f"ray::ServeReplica:{server}."):
                        found.append(one)
        return found

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def running(self, pool: RayPool, count: int, limit: float = 60.0) -> None:
        """Wait until so many replicas judge."""
        (route,) = pool._routes.values()
        end = time.monotonic() + limit
        while (found := clusters.replicas(route.app)).running != count or len(self._replicas("flowad")) != count:
            assert time.monotonic() < end, f"{found}, expected {count} replicas within {limit:g} s"
            time.sleep(0.1)

    def close(self) -> None:
        try:
            clusters.leave(self.settings)
        finally:
            self.cluster.shutdown()


def hangs(start: Start) -> Start:
    return replace(start, make=hanging)


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    needs_ray()
    with pytest.MonkeyPatch.context() as monkeypatch:
        one = Two(monkeypatch)
        try:
            yield one
        finally:
            one.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, Path, Path]:
    return works(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def work(made: tuple[Work, Path, Path]) -> Work:
    return made[0]


@pytest.fixture
def pool(two: Two, work: Work) -> RayPool:
    """Two replicas, one on each node; those that ran before where they still do."""
    found = two.pool(work.bundle)
    two.running(found, 2)
    return found


def under_load(pool: RayPool, work: Work, event: Callable[[], Awaitable[object]], after: int = 20) -> Load:
    """Ask all the time, let something happen in between, and ask so often afterwards."""

    async def run() -> Load:
        load, done = Load(), []
        asking = asyncio.create_task(load.run(pool, work, lambda: bool(done) and len(load.begun) > done[0]))
        while len(load.outcomes) < 20:
            await asyncio.sleep(0.02)
        await event()
        done.append(len(load.begun) + after)
        await asking
        return load

    return asyncio.run(run())


async def in_thread(call: Callable[[], object]) -> None:
    await asyncio.to_thread(call)


def test_replicas_on_two_nodes_say_what_the_bare_detector_says(two: Two, pool: RayPool, work: Work) -> None:
    assert {one.ppid() for one in two.replicas()} == {two.raylet(n).pid for n in (two.cluster.head_node, two.node)}
    assert asyncio.run(pool.ready("part")) == ""
    (card,) = asyncio.run(pool.models())
    assert card.version == version(work.bundle) and card.calibrated and card.largest_batch == 4
    load = under_load(pool, work, lambda: asyncio.sleep(0), after=60)
    load.check(work)
    assert load.counts == {"answered": len(load.begun)}


def test_a_late_request_is_no_verdict(pool: RayPool, work: Work) -> None:
    with pytest.raises(NoResultError) as error:
        asyncio.run(pool.ask(Asked("part", work.frames[:1], None, ("1",), 0.0001)))
    assert error.value.result is NoResult.LATE


def test_more_requests_than_may_wait_are_refused_and_the_others_answered(pool: RayPool, work: Work) -> None:
    load, begun = Load(), itertools.count()
    asyncio.run(load.run(pool, work, lambda: next(begun) >= 200, clients=200, seconds=20.0))
    load.check(work)
    assert set(load.counts) == {"answered", "queue full"} and load.counts["answered"] >= 64, load.counts
    assert asyncio.run(pool.status())[0]["outcomes"] == load.counts


def test_a_killed_replica_costs_no_request(two: Two, pool: RayPool, work: Work) -> None:
    victim = two.replicas()[0]
    load = under_load(pool, work, lambda: in_thread(victim.kill), after=60)
    load.check(work)
    assert load.counts == {"answered": len(load.begun)}, "every request had time for the other replica"
    two.running(pool, 2)


def test_a_hanging_detector_is_replaced_and_its_request_has_no_result(two: Two, pool: RayPool, work: Work) -> None:
    before = {one.pid for one in two.replicas()}
    poison = Asked("part", np.full_like(work.frames[:1], POISON), None, ("poison",), 20.0)

    async def hang() -> None:
        with pytest.raises(NoResultError, match="did not answer within") as error:
            await pool.ask(poison)
        assert error.value.result is NoResult.ENGINE_FAILED

    load = under_load(pool, work, hang, after=40)
    load.check(work)
    # What was judged together with the poisoned frame, or waited behind it, shares its fate or is another's.
    assert load.counts["answered"] > 40 and set(load.counts) <= {"answered", "engine failed"}
    two.running(pool, 2)
    after = {one.pid for one in two.replicas()}
    assert len(after & before) == 1 and len(after) == 2


@pytest.mark.slow
def test_a_replica_that_stands_still_is_replaced(two: Two, pool: RayPool, work: Work) -> None:
    """As one does whose C code holds Python's lock: it neither answers nor says that it is ill."""
    victim = two.replicas()[0]
    load = under_load(pool, work, lambda: in_thread(victim.suspend), after=60)
    load.check(work)
    assert load.counts["answered"] > 60 and set(load.counts) <= {"answered", "late"}
    end = time.monotonic() + 60
    while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "Serve's health check must end it"
        time.sleep(0.2)
    two.running(pool, 2)


@pytest.mark.slow
def test_replicas_come_with_the_load(two: Two, work: Work) -> None:
    pool = two.pool(work.bundle, replicas={"min": 1, "max": 2}, largest_batch=1)
    assert clusters.replicas(pool._routes["part"].app).running == 1
    end = time.monotonic() + 90
    load = Load()

    def enough() -> bool:
        return clusters.replicas(pool._routes["part"].app).running == 2 or time.monotonic() > end

    asyncio.run(load.run(pool, work, enough, clients=16, seconds=20.0))
    load.check(work)
    assert time.monotonic() < end and load.counts == {"answered": len(load.begun)}


def updated(pool: RayPool, bundle: Path | str) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        pool.update("part", Path(bundle))
        while pool.progress.busy:
            await asyncio.sleep(0.05)

    return run


def test_another_bundle_takes_over_under_load_and_no_request_is_lost(
    two: Two, pool: RayPool, made: tuple[Work, Path, Path]
) -> None:
    work, stricter, _ = made
    load = under_load(pool, work, updated(pool, "stricter"), after=40)
    assert pool.progress.state == "active", pool.progress
    assert "its canary has passed, with a map that differs by" in pool.progress.text
    load.check(work, all_anomalous=version(stricter))
    assert load.counts == {"answered": len(load.begun)}
    versions = [one.version for _, one in sorted(load.answers(), key=lambda it: it[0])]
    assert versions[0] == version(work.bundle) and set(versions[-20:]) == {version(stricter)}
    assert len(clusters.applications("flowad")) == 1, "the old replicas have ended"
    (card,) = asyncio.run(pool.models())
    assert card.version == version(stricter)


def test_a_bundle_that_is_broken_or_another_product_replaces_nothing(
    two: Two, pool: RayPool, made: tuple[Work, Path, Path], tmp_path: Path
) -> None:
    work, _, broken = made
    other = work.bundle.parent / "other"
    shutil.copytree(exported("onnx", 3)[1].path, other)
    for bundle, reason in (
        (broken, "altered|SHA|hash"),
        (other, "it judges nut, screw, nail"),
        ("running", "the bundle that runs already"),
        ("missing", "no bundle"),
    ):
        load = under_load(pool, work, updated(pool, bundle), after=5)
        assert pool.progress.state == "refused" and re.search(reason, pool.progress.text), pool.progress
        load.check(work)
        assert load.counts == {"answered": len(load.begun)}
    with pytest.raises(RefusedError, match="only bundles in"):
        pool.update("part", tmp_path)
    assert clusters.applications("flowad") == [pool._routes["part"].app.name]


@pytest.mark.slow
def test_replicas_that_cannot_start_say_why_and_leave_nothing(two: Two, work: Work) -> None:
    limits = LIMITS.model_copy(update={"start": 4.0})
    with pytest.raises(EngineUnavailableError, match="each wants 50 CPUs that nothing else has reserved"):
        clusters.deploy("flowad", "big", two.model(work.bundle, cpus=50), limits)
    with pytest.raises(EngineUnavailableError, match="BundleError: .* expected 000000000000") as error:
        clusters.deploy(
            "flowad", "other", two.model(work.bundle), LIMITS, change=lambda start: replace(start, version="0" * 12)
        )
    assert "\n" not in str(error.value)
    assert not [name for name in clusters.applications("flowad") if not name.startswith("flowad.part.")]


def test_a_killed_node_costs_no_request(two: Two, pool: RayPool, work: Work) -> None:
    load = under_load(
        pool, work, lambda: in_thread(lambda: two.cluster.remove_node(two.node, allow_graceful=False)), after=60
    )
    load.check(work)
    # The node's death shows late: what was there may run out of time, but never into a verdict of nobody.
    assert load.counts["answered"] > 60 and set(load.counts) <= {"answered", "late", "engine failed"}
    two.grow()
    two.running(pool, 2)
    again = under_load(pool, work, lambda: asyncio.sleep(0))
    again.check(work)
    assert again.counts == {"answered": len(again.begun)}


class Front:
    """`flowad-serve` on the cluster, as a process of its own, and what its clients see."""

    def __init__(self, two: Two, bundle: Path, folder: Path) -> None:
        self.port, self.settings = free_port(), folder / "serve.yaml"
        (folder / "token").write_text(TOKEN)
        model = two.model(bundle).model_dump(mode="json", exclude_none=True)
        front = {"http_port": self.port, "grpc_port": None, "token": {"file": str(folder / "token")}}
        ray = {"address": two.cluster.address, "name": "front"}
        self.settings.write_text(json.dumps({"models": {"part": model}, "front": front, "ray": ray}))
        self.address, self.log = f"http://127.0.0.1:{self.port}", folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "flowad_fast.cli.serve", str(self.settings)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        end = time.monotonic() + 60
        while not self._ready():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            return httpx.get(self.address + "/v2/health/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    async def ask(self, client: httpx.AsyncClient, work: Work, number: int) -> str:
        """The verdict, the status of a refusal, or that the connection broke."""
        frame = work.frames[number % len(work.frames)]
        tensor = {"name": "frames", "shape": [1, *frame.shape], "datatype": "UINT8", "data": frame.ravel().tolist()}
        body = {"inputs": [tensor], "outputs": [{"name": "verdict"}], "parameters": {"deadline_ms": 10_000}}
        try:
            found = await client.post(
                self.address + "/v2/models/part/infer", json=body, headers={"authorization": f"Bearer {TOKEN}"}
            )
        except httpx.TransportError:
            return "no connection"
        return found.json()["outputs"][0]["data"][0] if found.status_code == 200 else str(found.status_code)

    async def load(self, work: Work, until: Callable[[], bool]) -> dict[int, str]:
        """Ask all the time; what became of each request."""
        found: dict[int, str] = {}
        numbers = itertools.count()

        async def ask(client: httpx.AsyncClient) -> None:
            while not until():
                number = next(numbers)
                found[number] = await self.ask(client, work, number)
                await asyncio.sleep(0.01)

        async with httpx.AsyncClient(timeout=30) as client:
            await asyncio.gather(*(ask(client) for _ in range(4)))
        return found


def test_a_killed_front_gives_no_verdict_and_its_replicas_are_found_again(
    two: Two, made: tuple[Work, Path, Path], tmp_path: Path
) -> None:
    work, stricter, _ = made
    clusters.tidy("flowad", [])
    front = Front(two, work.bundle, tmp_path)
    front.start()
    before = {one.pid for one in two.replicas("front")}

    async def killed() -> dict[int, str]:
        end = time.monotonic() + 3
        asking = asyncio.create_task(front.load(work, lambda: time.monotonic() > end))
        await asyncio.sleep(1.5)
        assert front.process is not None
        front.process.kill()
        return await asking

    found = asyncio.run(killed())
    right = {i: "anomalous" if work.anomalous[i % len(work.frames)] else "good" for i in found}
    assert {found[i] for i in found if found[i] != right[i]} == {"no connection"}
    assert sum(found[i] == right[i] for i in found) > 20
    front.start()
    assert {one.pid for one in two.replicas("front")} == before, "the replicas outlive the front"

    client = Client(front.address, TOKEN)
    assert "its canary has passed" in client.update("part", "stricter", lambda text: None)
    (row,) = client.status()["models"]
    assert row["version"] == version(stricter) and row["replicas"] == 2
    calls = itertools.count()
    found = asyncio.run(front.load(work, lambda: next(calls) > 30))
    assert set(found.values()) == {"anomalous"}

    assert front.process is not None
    front.process.terminate()
    assert front.process.wait(30) == 0, front.log.read_text()
    assert clusters.applications("front") == [] and two.replicas("front", 0) == []
