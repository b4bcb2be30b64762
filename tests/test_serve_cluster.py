"""Replicas on a real Ray cluster: every request has one outcome, whatever is killed and whichever bundle judges.

The cluster has two nodes, as processes of this machine; each has room for one replica of its own.
"""

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.line.activation import RefusedError
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve import cluster as clusters
from flowad_fast.serve.pool import Asked, NoResultError
from flowad_fast.serve.pool_ray import RayPool
from flowad_fast.serve.replica import Start
from flowad_fast.serve.settings import ModelSettings, RaySettings, ServeLimits
from tests.models import exported
from tests.serve_hanging import POISON, hanging
from tests.serve_replicas import Load, needs_ray, version, works

ROOT = Path(__file__).parents[1]
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

    def replicas(self) -> list[psutil.Process]:
        """Processes of the replicas that run on the two nodes."""
        found = []
        for raylet in map(self.raylet, (self.cluster.head_node, self.node)):
            for one in raylet.children() if raylet.is_running() else ():
                with contextlib.suppress(psutil.Error):
                    if one.cmdline()[0].startswith("ray::ServeReplica:flowad."):
                        found.append(one)
        return found

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def running(self, pool: RayPool, count: int, limit: float = 60.0) -> None:
        """Wait until so many replicas judge."""
        (route,) = pool._routes.values()
        end = time.monotonic() + limit
        while (found := clusters.replicas(route.app)).running != count or len(self.replicas()) != count:
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


def test_a_killed_replica_costs_no_request(two: Two, pool: RayPool, work: Work) -> None:
    load = under_load(pool, work, lambda: in_thread(two.replicas()[0].kill), after=60)
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
