"""All that knows Ray: a cluster joined or started, and groups of photos through a pool of Ray Data's actors."""

import logging
import math
import os
import pickle
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from flowad_fast.archive.worker import Ledger, Task, Worker, packed
from flowad_fast.engines.cores import available_cores
from flowad_fast.errors import ConfigError, EngineUnavailableError, FlowADError, require

STORE_BYTES = 256 << 20
"""Ray's object store of a cluster on this computer; what goes through it are lists of paths, rows and maps."""
PATIENCE = 10.0
"""Seconds until a cluster's head has to answer."""
_QUIET = ("ray", "ray.data", "ray.data._internal", "ray.train")


@dataclass(frozen=True)
class Workers:
    """How photos are judged in parallel.

    Attributes:
        address: of a cluster; `local` starts one on this computer, which ends with the process.
        count: of workers; None for as many as there is room for.
        threads: cores that Ray reserves for each, and threads of its engine.
        gpus: that Ray reserves for each; a fraction shares a GPU.
    """

    address: str
    count: int | None = None
    threads: int = 1
    gpus: float = 0


@contextmanager
def connected(workers: Workers, by: str) -> Iterator[int]:
    """A connection to the cluster; yields how many workers there is room for. No process of ours stays behind.

    Raises:
        MissingExtraError: without Ray.
        EngineUnavailableError: nobody answers at the address.
        ConfigError: it is no address, or no node has the cores and GPUs that one worker needs.
    """
    require("ray", "ray", "pyarrow", by=by)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reports to its makers otherwise
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of this process; what matters comes as an exception
    import ray

    local = workers.address == "local"
    if not local and workers.address != "auto":
        _answers(workers.address)
    more: dict[str, Any] = {}
    if local:
        more = {
            "num_cpus": available_cores(), "object_store_memory": STORE_BYTES, "include_dashboard": False,
        }  # fmt: skip
    try:
        with _hushed():
            ray.init(address=workers.address, logging_level=logging.ERROR, log_to_driver=False, **more)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineUnavailableError(f"Ray at {workers.address}: {_line(error)}") from None
    try:
        with redirect_stdout(sys.stderr):  # Ray prints that a worker has died
            yield _room(workers)
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """Refuse an address where nobody listens, for which Ray would wait minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(
            f"--ray {address}: expected local, auto, or HOST:PORT of the cluster's head (its port is 6379)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise EngineUnavailableError(f"Ray at {address}: {error}; start it there with: ray start --head") from None


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on standard error from native code, which tells of its log level there; errors are exceptions."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _room(workers: Workers) -> int:
    """How many workers the cluster's nodes have room for."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {"CPU": workers.threads} | ({"GPU": workers.gpus} if workers.gpus else {})
    room = sum(min(math.floor(node.get(kind, 0) / need) for kind, need in needs.items()) for node in nodes)
    if room < 1:
        has = ", ".join(" and ".join(f"{node.get(kind, 0):g} {kind}" for kind in needs) for node in nodes)
        wants = " and ".join(f"{need:g} {kind}" for kind, need in needs.items())
        raise ConfigError(
            f"a worker needs {wants}, and no node has them (nodes: {has}); give --threads 1 or fewer GPUs"
        )
    return room if workers.count is None else workers.count


def groups_of(items: Sequence[Any], batch: int, workers: int, most: int) -> list[Sequence[Any]]:
    """Items in groups of whole calls, `most` calls at most, and several groups per worker where there are enough."""
    calls = max(1, min(most, math.ceil(len(items) / batch / (8 * workers))))
    return [items[at : at + calls * batch] for at in range(0, len(items), calls * batch)]


def run(
    task: Task[Any, Any], groups: Sequence[Sequence[Any]], workers: Workers, count: int, ordered: bool = False
) -> Iterator[tuple[int, list[Any]]]:
    """The outcomes of each group with its number, as they come or in order; each group comes once.

    Args:
        task: what workers do.
        groups: of items; each is one block of Ray Data's.
        workers: cores and GPUs of each.
        count: how many workers, at most.
        ordered: whether groups come in order.

    Raises:
        FlowADError: a worker's; or the cluster is gone.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not groups:
        return
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = ordered
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ledger = ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()
    blocks = ray.data.from_items(
        [{"group": packed(i, group)} for i, group in enumerate(groups)],
        override_num_blocks=len(groups),
    )
    judged = blocks.map_batches(
        Worker,
        batch_size=1,
        batch_format="pyarrow",
        # One group at an actor: with two, the second waits for a node that is gone while others have nothing to do.
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=count,
            initial_size=min(count, len(groups)),
            max_tasks_in_flight_per_actor=1,
        ),
        fn_constructor_args=(task, ledger, workers.threads, os.getcwd()),
        num_cpus=workers.threads,
        num_gpus=workers.gpus or None,
    )
    seen: set[int] = set()
    try:
        block: Any
        for block in judged.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for one in block.column("done"):
                number, done = pickle.loads(one.as_py())
                if isinstance(done, FlowADError):
                    raise done
                if number not in seen:
                    seen.add(number)
                    yield number, done
    except (ray.exceptions.RayError, ConnectionError) as error:
        raise FlowADError(f"Ray: {_line(error)}; finished rows are kept, run again") from None
    if len(seen) != len(groups):
        raise FlowADError(f"Ray gave {len(seen)} of {len(groups)} groups; finished rows are kept, run again")


def _line(text: object) -> str:
    """What matters of a message: the last error of a traceback, otherwise the first line."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith("Error") and ":" in line]
    return (errors or lines or [""])[-1 if errors else 0][:500]
