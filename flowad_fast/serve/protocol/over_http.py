"""The protocol over HTTP: an ASGI application, which any server of such applications can run."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flowad_fast.serve.pool import Pool
from flowad_fast.serve.protocol import describing, messages
from flowad_fast.serve.protocol.desk import Desk
from flowad_fast.serve.protocol.refusals import (
    LONG,
    SLOW,
    UNAUTHORISED,
    RefusedError,
    authorised,
    bad,
    one_line,
    told,
    too_large,
)
from flowad_fast.serve.protocol.settings import FrontSettings, read_token

JSON_LENGTH = "Inference-Header-Content-Length"
Handler = Callable[[Request], Awaitable[Response]]


def application(pool: Pool, settings: FrontSettings) -> Starlette:
    """The application, for a server of your own; that one limits the headers and ends connections.

    Raises:
        ConfigError: the token cannot be read.
    """
    return application_of(Desk(pool, settings), read_token(settings))


def application_of(desk: Desk, token: str | None) -> Starlette:
    """The application in front of a desk; `token` is what clients must have, None: nothing."""
    routes = _Routes(desk, token)
    return Starlette(routes=routes.all(), exception_handlers={HTTPException: _http_error})


class _Routes:
    """One method per address."""

    def __init__(self, desk: Desk, token: str | None) -> None:
        self._desk, self._token = desk, token

    def all(self) -> list[Route]:
        """The addresses; probes are open, everything else needs the token."""
        rows: list[tuple[str, str, Handler, bool]] = [
            ("GET", "/v2/health/live", self.live, True),
            ("GET", "/v2/health/ready", self.ready, True),
            ("GET", "/v2", self.server, False),
            ("POST", "/v2/repository/index", self.index, False),
        ]
        for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            rows += [
                ("GET", base, self.metadata, False),
                ("GET", f"{base}/ready", self.model_ready, True),
                ("GET", f"{base}/config", self.configuration, False),
                ("POST", f"{base}/infer", self.infer, False),
            ]
        return [Route(path, self._guarded(call, probe), methods=[method]) for method, path, call, probe in rows]

    def _guarded(self, call: Handler, probe: bool) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                most = self._desk.settings.limits.header_bytes
                if sum(len(key) + len(value) for key, value in request.headers.raw) > most:
                    raise RefusedError(LONG, f"got headers of more than {most} bytes")
                if not probe and not authorised(request.headers.get("authorization"), self._token):
                    raise RefusedError(UNAUTHORISED, "wrong or missing token; send Authorization: Bearer TOKEN")
                return await call(request)
            except ClientDisconnect:
                return Response(status_code=400)  # nobody reads it
            except Exception as error:
                status, message = told(error)
                headers = {"www-authenticate": "Bearer"} if status is UNAUTHORISED else None
                return JSONResponse({"error": message}, status.http, headers)

        return answer

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return _readiness({}, await self._desk.trouble())

    async def model_ready(self, request: Request) -> Response:
        model, version = _named(request)
        return _readiness({"name": model}, await self._desk.model_trouble(model, version))

    async def server(self, request: Request) -> Response:
        return JSONResponse(describing.server())

    async def metadata(self, request: Request) -> Response:
        return JSONResponse(describing.metadata(await self._desk.card(*_named(request))))

    async def configuration(self, request: Request) -> Response:
        return JSONResponse(describing.configuration(await self._desk.card(*_named(request))))

    async def index(self, request: Request) -> Response:
        return JSONResponse(await index(self._desk))

    async def infer(self, request: Request) -> Response:
        arrived = time.monotonic()
        model, version = _named(request)
        limits = self._desk.settings.limits
        with self._desk.admitted():
            body = await self._body(request)
            encoding = request.headers.get("content-encoding", "").strip().lower()
            if encoding:
                body = await self._desk.apart(partial(messages.unpacked, body, encoding, limits.bytes))
            length = messages.header_length(request.headers.get(JSON_LENGTH), len(body), limits)
            read = partial(messages.read, body, length)
            said = await self._desk.answer(model, version, arrived, read)
            assert isinstance(said.query, messages.HttpQuery)
            write = partial(messages.write, model, said.query, said.answered, said.outputs)
            written, size = await self._desk.apart(write)
            said.check()
        if size is None:
            return Response(written, media_type="application/json")
        return Response(written, headers={JSON_LENGTH: str(size)}, media_type="application/octet-stream")

    async def _body(self, request: Request) -> bytearray:
        """The body; refused as soon as it is known to be too large, or when it does not come."""
        limits = self._desk.settings.limits
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdecimal() and len(declared) <= 18):
            raise bad("expected a number of bytes as Content-Length")
        body, most = bytearray(), limits.bytes
        try:
            async with asyncio.timeout(limits.seconds):
                if int(declared) <= most:
                    async for piece in request.stream():
                        if len(body) + len(piece) > most:
                            break
                        body += piece
                    else:
                        return body
        except TimeoutError:
            raise RefusedError(SLOW, f"the request did not arrive whole within {limits.seconds:g} s") from None
        raise too_large(f"got a body of more than {most} bytes, which is the most that is taken")


async def index(desk: Desk) -> list[dict[str, str]]:
    """Each model, with its state."""
    found = []
    for card in await desk.pool.models():
        why = await desk.pool.ready(card.name)
        state = "UNAVAILABLE" if why else "READY"
        found.append({"name": card.name, "version": card.version, "state": state, "reason": one_line(why)})
    return found


def _named(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _readiness(name: dict[str, Any], trouble: str) -> Response:
    if trouble:
        return JSONResponse(name | {"ready": False, "error": one_line(trouble)}, 503)
    return JSONResponse(name | {"ready": True})


async def _http_error(request: Request, error: Exception) -> Response:
    """What no address answers, as the protocol tells errors."""
    assert isinstance(error, HTTPException)
    message = {404: "no such address", 405: "another method is expected here"}.get(error.status_code, error.detail)
    return JSONResponse({"error": message}, error.status_code, error.headers)
