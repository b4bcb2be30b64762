"""A Ray cluster with replicas of bundles: joined or started, one Serve application per bundle, watched, removed.

A bundle has an application of its own, so that another one is whole, checked and asked beside it before it takes over,
and that one which fails takes nothing away. Its name says which bundle and settings it runs: a server that was killed
finds its replicas again and goes on with them. Everything here blocks; call it from a thread.
"""

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from flowad_fast import bundle as bundles
from flowad_fast.bundle import Manifest
from flowad_fast.errors import EngineUnavailableError, require
from flowad_fast.files import sha256
from flowad_fast.serve.pool import ModelCard
from flowad_fast.serve.replica import Replica, Start
from flowad_fast.serve.settings import ModelSettings, RaySettings, ServeLimits

OWN = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray reports to its makers otherwise
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # named after where it is the rule: listens on this computer alone
    "RAY_AUTH_MODE": "token",  # replicas listen for each other on every address; whoever has no token is refused
}
"""Environment of a cluster on this computer; Ray reads it when it is imported."""
DEPLOYMENT = "detector"
PAUSE = 0.1
"""Seconds between two looks at what starts or ends."""
HEALTH = 2.0
"""Seconds between Serve's questions whether a replica is well."""


@dataclass(frozen=True)
class Application:
    """A bundle's replicas on a cluster.

    Attributes:
        name: of the Serve application.
        model: what was asked for.
        manifest: of the bundle.
        card: what clients may know.
        handle: Serve's `DeploymentHandle`.
    """

    name: str
    model: ModelSettings
    manifest: Manifest
    card: ModelCard
    handle: Any


@dataclass(frozen=True)
class Replicas:
    """How many run, of how many; `trouble` in words where Serve sees some."""

    running: int
    wanted: int
    trouble: str = ""


def join(settings: RaySettings) -> str:
    """Connect this process to the cluster, or start one on this computer that ends with it; where that is.

    Raises:
        MissingExtraError: without Ray.
        EngineUnavailableError: nobody answers at the address.
    """
    require("ray", "ray", by="flowad-serve")
    own = settings.address is None
    os.environ.update(OWN if own else {"RAY_USAGE_STATS_ENABLED": "0"})
    if own:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray leaves one in the home
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of every request that is refused
    more: dict[str, Any] = {}
    if own:
        more = {"num_cpus": settings.cpus, "object_store_memory": settings.memory, "include_dashboard": False}
    try:
        found: Any = ray.init(
            address="local" if own else settings.address,
            namespace=settings.name,
            logging_level=logging.WARNING,
            log_to_driver=False,
            **more,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineUnavailableError(f"Ray at {settings.address or 'this computer'}: {_line(error)}") from None
    # Clients speak to the front, never to Serve's own proxies.
    serve.start(proxy_location="Disabled", logging_config=_logging())
    return str(found.address_info["address"])


def leave(settings: RaySettings) -> None:
    """End this server's replicas; the cluster too where it was started for it."""
    import ray

    if not ray.is_initialized():
        return
    try:
        for name in applications(settings.name):
            remove(name)
    finally:
        ray.shutdown()


def start_of(name: str, model: ModelSettings, limits: ServeLimits) -> tuple[Start, Manifest]:
    """How a model's replicas start, and its manifest, after the bundle was verified.

    Raises:
        BundleError, ConfigError: see `bundle.read`.
    """
    folder, manifest = bundles.read(model.bundle)
    start = Start(
        name=name,
        bundle=str(folder.resolve()),
        version=sha256(folder / bundles.MANIFEST)[:12],
        engine=model.engine,
        device=model.device,
        threads=model.threads or max(1, int(model.cpus)),
        largest_batch=model.largest_batch,
        wait=model.wait,
        first=limits.start,
        call=limits.call,
        canary=limits.canary,
    )
    return start, manifest


def deploy(
    server: str,
    name: str,
    model: ModelSettings,
    limits: ServeLimits,
    tell: Callable[[str], None] = lambda text: None,
    change: Callable[[Start], Start] = lambda start: start,
) -> Application:
    """Start a model's replicas, or find those that run with the same bundle and settings; they have passed the canary.

    Args:
        server: name of this server on the cluster.
        name: of the model.
        model: bundle and replicas.
        limits: of the server.
        tell: hears what is waited for.
        change: of how replicas start, for tests.

    Raises:
        BundleError, ConfigError: the bundle is not whole.
        EngineUnavailableError: replicas do not start within the limit, or fail; nothing of them is left.
    """
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    start, manifest = start_of(name, model, limits)
    start = change(start)
    app = app_name(server, start, model)
    if _state(app)[0] != "RUNNING":
        deployment = serve.deployment(name=DEPLOYMENT, **_options(model, limits))(Replica)
        serve.run_many(
            [serve.RunTarget(deployment.bind(start), name=app, route_prefix=None, logging_config=_logging())],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    try:
        _wait(app, name, model, limits.start, tell)
        handle = serve.get_app_handle(app)
        card: ModelCard = handle.card.remote().result(timeout_s=limits.start)
    except BaseException as error:
        serve.delete(app)
        if isinstance(error, (RayError, RayServeException, TimeoutError)):
            raise EngineUnavailableError(f"{name}: a replica that had started is gone: {_line(error)}") from None
        raise
    return Application(app, model, manifest, replace(card, name=name), handle)


def app_name(server: str, start: Start, model: ModelSettings) -> str:
    """Of the application that runs this bundle in this way."""
    plain = asdict(start) | {"make": getattr(start.make, "__qualname__", None)}
    text = json.dumps([plain, model.model_dump(mode="json", exclude={"bundle"})], sort_keys=True)
    return f"{server}.{start.name}.{start.version}.{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def applications(server: str) -> list[str]:
    """Names of a server's applications on the cluster."""
    from ray import serve

    return [name for name in serve.status().applications if name.startswith(f"{server}.")]


def tidy(server: str, keep: Collection[str]) -> None:
    """End applications of a server that it has no use for, such as those of another bundle before it was killed."""
    for name in applications(server):
        if name not in keep:
            remove(name)


def remove(app: str) -> None:
    """End an application's replicas when they have answered what they have."""
    from ray import serve

    serve.delete(app)


def replicas(app: Application) -> Replicas:
    """How an application's replicas are."""
    from ray import serve

    found = serve.status().applications.get(app.name)
    one = None if found is None else found.deployments.get(DEPLOYMENT)
    wanted = app.model.replicas if isinstance(app.model.replicas, int) else app.model.replicas.min
    if found is None or one is None:
        return Replicas(0, wanted, "the cluster has lost it")
    states = {str(getattr(state, "value", state)): count for state, count in one.replica_states.items()}
    running = states.get("RUNNING", 0)
    missing = sum(count for state, count in states.items() if state in ("STARTING", "UPDATING", "RECOVERING"))
    return Replicas(running, max(wanted, running + missing), _line(one.message) if running < wanted else "")


def _options(model: ModelSettings, limits: ServeLimits) -> dict[str, Any]:
    count: dict[str, Any]
    if isinstance(model.replicas, int):
        count = {"num_replicas": model.replicas}
    else:
        # A replica that has a full call in work and nothing waiting is busy enough.
        scaling = {"min_replicas": model.replicas.min, "max_replicas": model.replicas.max}
        count = {"autoscaling_config": {**scaling, "target_ongoing_requests": model.largest_batch}}
    return {
        **count,
        "ray_actor_options": {"num_cpus": model.cpus, "num_gpus": model.gpus},
        "max_ongoing_requests": model.ongoing,
        "max_queued_requests": model.queue,
        "health_check_period_s": HEALTH,
        "health_check_timeout_s": 2 * limits.call + HEALTH,  # one that judges a batch, then the canary, is well
        "graceful_shutdown_wait_loop_s": PAUSE,
        "graceful_shutdown_timeout_s": limits.drain,
        "max_constructor_retry_count": 2,
    }


def _logging() -> dict[str, Any]:
    return {"log_level": "WARNING", "enable_access_log": False}


def _state(app: str) -> tuple[str, str]:
    """What Serve says of an application: its state, "" where there is none, and why."""
    from ray import serve

    found = serve.status().applications.get(app)
    if found is None:
        return "", ""
    messages = [found.message, *(one.message for one in found.deployments.values())]
    return str(getattr(found.status, "value", found.status)), "\n".join(filter(None, messages))


def _wait(app: str, name: str, model: ModelSettings, limit: float, tell: Callable[[str], None]) -> None:
    end = time.monotonic() + limit
    while True:
        state, message = _state(app)
        if state == "RUNNING":
            return
        if state == "DEPLOY_FAILED":
            raise EngineUnavailableError(f"{name}: replicas of {model.bundle} do not start: {_line(message)}")
        if time.monotonic() > end:
            wants = f"{model.cpus:g} CPUs" + (f" and {model.gpus:g} GPUs" if model.gpus else "")
            raise EngineUnavailableError(
                f"{name}: replicas of {model.bundle} have not started within {limit:g} s; each wants {wants} that "
                f"nothing else has reserved: {_line(message) or 'Serve does not say more'}"
            )
        tell(f"{name}: {state.lower() or 'waiting'}")
        time.sleep(PAUSE)


def _line(text: object) -> str:
    """What matters of a message: the last error of a traceback, otherwise the first line."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith("Error") and ":" in line]
    return (errors or lines or [""])[-1 if errors else 0][:500]
