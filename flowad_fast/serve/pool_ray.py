"""Replicas of a Ray cluster as a `Pool`: one outcome per request, whatever dies, and bundles that change under load."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flowad_fast.bundle import Manifest
from flowad_fast.errors import FlowADError, nearest
from flowad_fast.line.activation import Progress, RefusedError, same_function
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve import cluster
from flowad_fast.serve.cluster import Application, Replicas
from flowad_fast.serve.judging import checked
from flowad_fast.serve.pool import Answered, Asked, ModelCard, NoResultError, UnknownModelError
from flowad_fast.serve.replica import Refused, Reply, Request, Start
from flowad_fast.serve.settings import ServeLimits
from flowad_fast.stages.aggregates import terms

_log = logging.getLogger(__name__)
TRIES = 6
"""Replicas that are asked about one request, at most, as far as its time allows."""
FIRST_PAUSE = 0.02
"""Seconds before the second try; doubled before each further one."""
FRESH = 1.0
"""Seconds for which what Serve said about replicas counts."""


@dataclass
class Route:
    """Where requests of a model go, how many are on their way, and what became of the others.

    Attributes:
        app: replicas.
        going: requests without an outcome.
        outcomes: counts: answered, and by the reason of no result.
        retries: requests that were given to one more replica.
    """

    app: Application
    going: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    retries: int = 0


class RayPool:
    """See `Pool`. All of it runs in one event loop; calls that block are given to threads."""

    def __init__(
        self,
        server: str,
        apps: Mapping[str, Application],
        limits: ServeLimits,
        change: Callable[[Start], Start] = lambda start: start,
    ) -> None:
        """Serve applications that run.

        Args:
            server: name of this server on the cluster.
            apps: by name of the model.
            limits: of the server.
            change: of how replicas start, for tests.
        """
        self._server, self._limits, self._change = server, limits, change
        self._routes = {name: Route(app) for name, app in apps.items()}
        self._closed = False
        self._asking: set[asyncio.Task[Any]] = set()
        self._given_up: set[asyncio.Task[Any]] = set()
        self._seen: dict[str, tuple[float, Replicas]] = {}
        self._update: asyncio.Task[None] | None = None
        self.progress = Progress()

    async def models(self) -> Sequence[ModelCard]:
        """See `Pool`."""
        return [route.app.card for _, route in sorted(self._routes.items())]

    async def ready(self, model: str) -> str:
        """See `Pool`. Serve counts a replica as running when its canary has passed, and as long as it does."""
        if self._closed:
            return "the server is shutting down"
        found = await self._replicas(self._route(model))
        return "" if found.running else found.trouble or "no replica runs"

    async def ask(self, asked: Asked) -> Answered:
        """See `Pool`. A request whose replica dies is given to another one, as often as its time allows."""
        end = time.monotonic() + asked.seconds
        route = self._route(asked.model, asked.version)
        asked = checked(asked, route.app.card)
        if self._closed:
            raise self._told(route, NoResult.SHUTTING_DOWN)
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        route.going += 1
        try:
            answer = await self._answer(route, asked, end)
            route.outcomes["answered"] += 1
            return answer
        except NoResultError as error:
            _log.info("%s, parts %s: %s", asked.model, ", ".join(asked.parts), error)
            raise
        except asyncio.CancelledError:
            if task not in self._given_up:
                raise
            task.uncancel()
            raise self._told(route, NoResult.SHUTTING_DOWN) from None
        finally:
            route.going -= 1
            self._asking.discard(task)

    async def close(self) -> None:
        """See `Pool`; replicas are ended by `cluster.leave`."""
        self._closed = True
        if self._update is not None:
            self._update.cancel()
            await asyncio.gather(self._update, return_exceptions=True)
        end = time.monotonic() + self._limits.drain
        while self._asking and time.monotonic() < end:
            await asyncio.sleep(cluster.PAUSE)
        self._given_up = set(self._asking)
        for task in self._given_up:
            task.cancel()

    async def status(self) -> list[dict[str, Any]]:
        """What is known of each model, as JSON values."""
        return [
            {
                "model": name,
                "version": route.app.card.version,
                "bundle": str(route.app.model.bundle),
                "engine": route.app.card.engine,
                "replicas": (found := await self._replicas(route)).running,
                "wanted": found.wanted,
                "trouble": found.trouble,
                "going": route.going,
                "outcomes": dict(route.outcomes),
                "retries": route.retries,
            }
            for name, route in sorted(self._routes.items())
        ]

    def update(self, model: str, bundle: Path) -> None:
        """Begin to judge with another bundle; `progress` tells how it goes.

        Raises:
            UnknownModelError: see there.
            RefusedError: another update goes on, or the bundle does not lie beside the one that runs.
        """
        route = self._route(model)
        if self._closed:
            raise RefusedError("the server is shutting down")
        if self.progress.busy:
            raise RefusedError(f"{self.progress.bundle} is being loaded; wait for it")
        folder = route.app.model.bundle.resolve().parent
        path = (folder / bundle).resolve()
        if path.parent != folder:
            raise RefusedError(
                f"{bundle}: only bundles in {folder} may replace {route.app.model.bundle}; copy it there"
            )
        self.progress = Progress("loading", str(path), "is verified")
        self._update = asyncio.create_task(self._updated(model, route, path))

    async def _updated(self, name: str, old: Route, path: Path) -> None:
        try:
            text = await self._replace(name, old, path)
            self.progress = Progress("active", str(path), text)
        except FlowADError as error:
            self.progress = Progress("refused", str(path), " ".join(str(error).split()))
        except asyncio.CancelledError:
            self.progress = Progress("refused", str(path), "the server was told to end before it judged")
            raise
        except Exception as error:
            _log.exception("an update failed in a way that nobody expected")
            self.progress = Progress("refused", str(path), f"{type(error).__name__}: {' '.join(str(error).split())}")

    async def _replace(self, name: str, old: Route, path: Path) -> str:
        model = old.app.model.model_copy(update={"bundle": path})
        start, manifest = await asyncio.to_thread(cluster.start_of, name, model, self._limits)
        refuse_other_product(old.app, manifest, start.version)
        self.progress = Progress("loading", str(path), "its replicas start")
        app = await asyncio.to_thread(
            cluster.deploy, self._server, name, model, self._limits, lambda text: None, self._change
        )
        try:
            found = await self._compared(old.app, app)
        except BaseException:
            await asyncio.to_thread(cluster.remove, app.name)
            raise
        self._routes[name] = Route(app)  # from here on every request is the new one's
        self._seen.pop(name, None)
        self.progress = Progress("loading", str(path), f"it judges; {old.going} requests are still the old one's")
        end = time.monotonic() + self._limits.drain
        while old.going and time.monotonic() < end:
            await asyncio.sleep(cluster.PAUSE)
        await asyncio.to_thread(cluster.remove, old.app.name)
        self._routes[name].outcomes.update(old.outcomes)
        self._routes[name].retries += old.retries
        return (
            f"{path.name} ({app.card.version}) judges, before it {old.app.model.bundle.name} "
            f"({old.app.card.version}): {found}; a restart begins with the bundle of the settings"
        )

    async def _compared(self, old: Application, new: Application) -> str:
        """The canary frame's maps where both must give the same one: model, source, scorer and location are equal."""
        if not same_function(old.manifest, new.manifest):
            return "its canary has passed"
        try:
            async with asyncio.timeout(self._limits.call):
                before, after = await asyncio.gather(old.handle.canary_map.remote(), new.handle.canary_map.remote())
        except Exception as error:
            raise RefusedError(f"the canary frame could not be compared: {type(error).__name__}: {error}") from None
        tolerance = max(
            (one.parity.tolerance for app in (old, new) for one in app.manifest.artefacts.values() if one.parity),
            default=1e-3,
        )
        gap = float(np.abs(after - before).max() / max(float(before.std()), 1e-12))
        if not gap <= tolerance:
            raise RefusedError(
                f"it has the same model as the running bundle, but its map of the canary frame differs by {gap:.1e} of "
                f"its scale, its certificate allows {tolerance:.1e}; export it again"
            )
        return f"its canary has passed, with a map that differs by {gap:.1e} of its scale, certified {tolerance:.1e}"

    async def _answer(self, route: Route, asked: Asked, end: float) -> Answered:
        refused = Refused(NoResult.ENGINE_FAILED)
        for attempt in range(TRIES):
            if attempt:
                route.retries += 1
                await asyncio.sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), max(0.0, end - time.monotonic())))
            if (left := end - time.monotonic()) <= 0:
                raise self._told(route, NoResult.LATE, refused.reason)
            app = route.app if asked.version else self._routes[asked.model].app  # another bundle may judge by now
            reply = await self._tried(app.handle, Request(asked.frames, asked.classes, left), left)
            if isinstance(reply, Answered):
                if time.monotonic() > end:
                    raise self._told(route, NoResult.LATE, "its answer came too late")
                return reply
            refused = reply
            if not refused.again:
                break
        raise self._told(route, refused.result, refused.reason)

    async def _tried(self, handle: Any, request: Request, left: float) -> Reply:
        """A replica's reply within so many seconds, or what became of it."""
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import BackPressureError, RayServeException

        response = handle.ask.remote(request)
        try:
            async with asyncio.timeout(left):
                reply: Reply = await response
                return reply
        except BackPressureError as error:
            return Refused(NoResult.QUEUE_FULL, f"{error.args[0]} requests were waiting")
        except TimeoutError:
            response.cancel()
            return Refused(NoResult.LATE, "no replica has answered in time")
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:  # the replica's own code: another one would raise the same
            return Refused(NoResult.ENGINE_FAILED, f"{type(error.cause).__name__}: {error.cause}")
        except (RayError, RayServeException) as error:  # a replica, its node, or what it had answered, is gone
            return Refused(NoResult.ENGINE_FAILED, f"its replica is gone ({type(error).__name__})", again=True)

    async def _replicas(self, route: Route) -> Replicas:
        name, now = route.app.card.name, time.monotonic()
        if name in self._seen and now - self._seen[name][0] < FRESH:
            return self._seen[name][1]
        try:
            found = await asyncio.to_thread(cluster.replicas, route.app)
        except Exception as error:  # whatever Ray raises while its head is gone
            found = Replicas(0, 0, f"the cluster does not answer ({type(error).__name__})")
        self._seen[name] = now, found
        return found

    def _route(self, model: str, version: str = "") -> Route:
        if model not in self._routes:
            raise UnknownModelError(f"no model {model!r}; {nearest(model, self._routes)}")
        route = self._routes[model]
        if version and version != route.app.card.version:
            raise UnknownModelError(f"model {model!r} is of version {route.app.card.version}, not {version}")
        return route

    def _told(self, route: Route, result: NoResult, reason: str = "") -> NoResultError:
        route.outcomes[result.value] += 1
        return NoResultError(result, reason)


def refuse_other_product(old: Application, new: Manifest, version: str) -> None:
    """Refuse a bundle that judges something else than the running one, or answers in other shapes.

    Raises:
        RefusedError: says what differs.
    """
    if version == old.card.version:
        raise RefusedError(f"it is the bundle that runs already ({version})")
    was, now = old.manifest, new
    if now.model.classes != was.model.classes:
        a, b = (", ".join(one.model.classes.labels) or "one product" for one in (now, was))
        raise RefusedError(f"it judges {a}, the running bundle judges {b}")
    for what, theirs, ours in (
        ("frames", now.frame_size, was.frame_size),
        ("maps", now.model.image.size, was.model.image.size),
        ("tiles", now.tiling, was.tiling),
        ("raw scores", f"{terms(now.aggregate)} terms", f"{terms(was.aggregate)} terms"),
    ):
        if theirs != ours:
            raise RefusedError(f"it has {what} of {theirs}, the running bundle of {ours}")
    if was.calibration is not None and now.calibration is None:
        raise RefusedError("it has no calibration, so it gives no verdicts: flowad-export calibrate BUNDLE GOOD_FOLDER")
    if was.calibration is not None and now.calibration is not None:
        if missing := sorted(set(was.calibration.classes) - set(now.calibration.classes)):
            raise RefusedError(f"its calibration lacks {', '.join(map(repr, missing))}; calibrate it again")
