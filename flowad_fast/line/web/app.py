"""What is answered at which address. Without the token nothing can be changed."""

import hmac
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated

from fastapi import Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import Field

from flowad_fast.config import Frozen
from flowad_fast.errors import FlowADError
from flowad_fast.line.activation import RefusedError
from flowad_fast.line.settings import WebSettings
from flowad_fast.line.web.guard import App, Guard
from flowad_fast.line.web.metrics import registry
from flowad_fast.line.web.state import State

if TYPE_CHECKING:
    from flowad_fast.line.station import Station

PAGES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
"""The page's files."""


class ActivateRequest(Frozen):
    """Body of POST /api/activate."""

    bundle: str = Field(min_length=1, max_length=4096)
    """Folder; a relative one lies in the folder whose bundles may be activated."""
    shadow: int = Field(default=0, ge=0, le=1_000_000)
    """Parts that both bundles judge first."""
    allowed: float = Field(default=0.02, ge=0, le=1)
    """Share of them that may be judged otherwise."""


def make_app(station: "Station", settings: WebSettings, token: str | None) -> App:
    """The application.

    Args:
        station: what is shown and changed.
        settings: of the page.
        token: what whoever changes something must have; None: nothing can be changed.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    state = State(station)
    metrics = registry(state)

    def authorised(request: Request) -> bool:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        return token is not None and hmac.compare_digest(given.encode(), token.encode())

    def operator(request: Request) -> str:
        if token is None:
            raise HTTPException(403, "nothing can be changed here: the settings have no web.token")
        if not authorised(request):
            raise HTTPException(401, "wrong or missing token", {"www-authenticate": "Bearer"})
        return request.client.host if request.client is not None else "an unknown address"

    def reader(request: Request) -> None:
        if settings.private and not authorised(request):
            raise HTTPException(401, "wrong or missing token", {"www-authenticate": "Bearer"})

    reading, changing = [Depends(reader)], Depends(operator)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        return JSONResponse({"detail": problems}, 422)

    def page(name: str, kind: str) -> Callable[[], Response]:
        content = files("flowad_fast.line.web").joinpath(name).read_bytes()
        return lambda: Response(content, media_type=kind)

    for path, (name, kind) in PAGES.items():
        app.add_api_route(path, page(name, kind), methods=["GET"])

    @app.get("/healthz")
    async def healthz() -> Response:
        health = state.health()
        return PlainTextResponse("alive\n" if health.alive else f"{health.why}\n", 200 if health.alive else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        health = state.health()
        return PlainTextResponse("ready\n" if health.ready else f"{health.why}\n", 200 if health.ready else 503)

    @app.get("/metrics", dependencies=reading)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.get("/api/state", dependencies=reading)
    async def api_state() -> Response:
        return JSONResponse(state())

    @app.get("/api/picture/{part}/{what}", dependencies=reading)
    def picture(part: str, what: str) -> Response:
        found = state.picture(part, what) if what in ("frame", "heat") else None
        if found is None:
            raise HTTPException(404, "no such picture, or no more")
        return Response(found, media_type="image/jpeg" if what == "frame" else "image/png")

    @app.get("/api/bundles")
    def candidates(who: Annotated[str, changing]) -> Response:
        activation = station.activation
        return JSONResponse({"folder": str(activation.folder), "bundles": activation.candidates()})

    @app.post("/api/activate")
    def activate(request: Annotated[ActivateRequest, Body()], who: Annotated[str, changing]) -> Response:
        return _begun(lambda: station.activation.activate(request.bundle, request.shadow, request.allowed, who), state)

    @app.post("/api/rollback")
    def rollback(who: Annotated[str, changing]) -> Response:
        return _begun(lambda: station.activation.rollback(who), state)

    @app.post("/api/cancel")
    def cancel(who: Annotated[str, changing]) -> Response:
        station.activation.cancel()
        return JSONResponse({}, 202)

    hosts = {"localhost", "127.0.0.1", "::1", settings.host} if settings.local else None
    return Guard(app, hosts)


def _begun(begin: Callable[[], object], state: State) -> Response:
    try:
        begin()
    except (RefusedError, FlowADError) as error:
        raise HTTPException(409, str(error)) from None
    state.forget()
    return JSONResponse({}, 202)
