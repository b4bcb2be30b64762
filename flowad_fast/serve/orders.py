"""What an operator asks of a running server, beside the protocol: what runs, and another bundle for a model."""

import hmac
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from flowad_fast.config import Frozen, parse
from flowad_fast.errors import ConfigError, FlowADError
from flowad_fast.line.activation import Progress
from flowad_fast.line.web.guard import App, Message, Receive, Send
from flowad_fast.serve.pool import Pool, UnknownModelError
from flowad_fast.serve.pool_ray import RayPool

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

STATUS, UPDATE = "/flowad/status", "/flowad/update"
LARGEST = 16 * 1024
"""Bytes of an order."""


class Update(Frozen):
    """Body of an update."""

    model: str = Field(min_length=1, max_length=64)
    bundle: str = Field(min_length=1, max_length=4096)
    """Folder, beside the bundle that runs; a relative one lies there."""


class Orders:
    """An ASGI application around that of the protocol."""

    def __init__(self, app: App, pool: Pool, token: str | None) -> None:
        """Stand before `app`.

        Args:
            app: what answers everything else.
            pool: what is shown and changed.
            token: what whoever asks must have; None: anyone may look, nothing can be changed.
        """
        self._app, self._pool, self._token = app, pool, token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer."""
        methods = {STATUS: "GET", UPDATE: "POST"}
        if scope["type"] != "http" or scope["path"] not in methods:
            return await self._app(scope, receive, send)
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        request = Request(scope, receive)
        method, answer = methods[scope["path"]], self._status if scope["path"] == STATUS else self._update
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        response: Response
        if request.method != method:
            response = JSONResponse({"detail": f"expected {method}"}, 405)
        elif self._token is None and method != "GET":
            response = JSONResponse({"detail": "nothing can be changed: the server was started without a token"}, 403)
        elif self._token is not None and not hmac.compare_digest(given.encode(), self._token.encode()):
            response = JSONResponse({"detail": "wrong or missing token"}, 401, {"www-authenticate": "Bearer"})
        else:
            try:
                response = await answer(request)
            except UnknownModelError as error:
                response = JSONResponse({"detail": str(error)}, 404)
            except FlowADError as error:
                response = JSONResponse({"detail": str(error)}, 400 if isinstance(error, ConfigError) else 409)
        await response(scope, receive, send)

    async def _status(self, request: "Request") -> "Response":
        from starlette.responses import JSONResponse

        return JSONResponse({"models": await models(self._pool), "update": progress(self._pool)})

    async def _update(self, request: "Request") -> "Response":
        from starlette.responses import JSONResponse

        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > LARGEST:
            return JSONResponse({"detail": f"expected a body of at most {LARGEST} bytes, and its length"}, 413)
        try:
            data = await request.json()
        except (ValueError, RecursionError):
            raise ConfigError("expected a JSON object with model and bundle") from None
        order = parse(Update, data, "update")
        if not isinstance(self._pool, RayPool):
            raise ConfigError("a server without Ray does not change bundles; start it again with the other one")
        self._pool.update(order.model, Path(order.bundle))
        return JSONResponse({}, 202)


async def models(pool: Pool) -> list[dict[str, Any]]:
    """What is known of each model, as JSON values."""
    if isinstance(pool, RayPool):
        return await pool.status()
    found = []
    for card in await pool.models():
        trouble = await pool.ready(card.name)
        found.append({"model": card.name, "version": card.version, "engine": card.engine, "trouble": trouble})
    return found


def progress(pool: Pool) -> dict[str, Any]:
    """How the last change of a bundle goes, as JSON values."""
    now = pool.progress if isinstance(pool, RayPool) else Progress()
    return {key: value for key, value in asdict(now).items() if key in ("state", "bundle", "text")}
