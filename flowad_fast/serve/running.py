"""What `flowad-serve run` runs: models on a Ray cluster or in this process, and the front that clients ask."""

import asyncio
import signal
from collections.abc import Callable

from flowad_fast.serve import cluster
from flowad_fast.serve.local import LocalPool
from flowad_fast.serve.orders import Orders
from flowad_fast.serve.pool_ray import RayPool
from flowad_fast.serve.protocol.front import run
from flowad_fast.serve.protocol.settings import FrontSettings, read_token
from flowad_fast.serve.replica import opened
from flowad_fast.serve.settings import ModelSettings, ServeLimits, ServeSettings


def run_ray(settings: ServeSettings, tell: Callable[[str], None]) -> None:
    """Join or start a cluster, deploy every model, and answer until SIGTERM or Ctrl-C; replicas end with the server.

    Raises:
        FlowADError: a bundle is not whole, replicas do not start, or an address is taken.
    """
    where = cluster.join(settings.ray)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there
    try:
        tell(f"Ray at {where}")
        apps = {}
        for name, model in settings.models.items():
            tell(f"{name}: replicas of {model.bundle} start")
            app = cluster.deploy(settings.ray.name, name, model, settings.limits)
            apps[name] = app
            tell(f"{name}: {app.card.version} on {app.card.engine}, {cluster.replicas(app).running} replicas")
        cluster.tidy(settings.ray.name, [app.name for app in apps.values()])
        pool = RayPool(settings.ray.name, apps, settings.limits)
        asyncio.run(run(pool, settings.front, tell, lambda app, token: Orders(app, pool, token)))
    finally:
        cluster.leave(settings.ray)


def run_local(settings: ServeSettings, tell: Callable[[str], None]) -> None:
    """Start every model in a process of its own on this computer, and answer until SIGTERM or Ctrl-C.

    Raises:
        FlowADError: a bundle is not whole, an engine does not start, or an address is taken.
    """
    pool = LocalPool.of(settings.models, settings.limits)

    async def answer() -> None:
        tell(f"starting {', '.join(settings.models)}")
        await pool.start()
        await run(pool, settings.front, tell, lambda app, token: Orders(app, pool, token))

    asyncio.run(answer())


def tried(name: str, model: ModelSettings, limits: ServeLimits) -> str:
    """Verify a model's bundle, start its engine here and judge the canary frame; what runs.

    Raises:
        FlowADError: what fails.
    """
    start, manifest = cluster.start_of(name, model, limits)
    found = opened(start)
    found.scoring.close()
    verdicts = "" if manifest.calibration is not None else "; not calibrated: answers have scores and no verdicts"
    return f"{start.version} runs on {found.scoring.engine}, its canary has a finite score{verdicts}"


def front_text(front: FrontSettings) -> str:
    """Where clients would ask, and who may.

    Raises:
        ConfigError: the token is missing or too short.
    """
    token = read_token(front)
    ports = [f"{name} {front.host}:{port}" for name, port in (("HTTP", front.http_port), ("gRPC", front.grpc_port))
             if port is not None]  # fmt: skip
    reach = "this computer" if front.local else "anyone on the network"
    who = "who has the token may ask and change bundles" if token else "may ask, nobody may change bundles"
    return f"{' and '.join(ports)}; {reach}{', ' if token else ' '}{who}"
