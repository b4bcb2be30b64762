"""The server: HTTP and gRPC at their addresses, and an orderly end."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn

from flowad_fast.errors import ConfigError, require
from flowad_fast.line.web.guard import App
from flowad_fast.serve.pool import Pool
from flowad_fast.serve.protocol.desk import Desk
from flowad_fast.serve.protocol.over_http import application_of
from flowad_fast.serve.protocol.settings import FrontSettings, read_token

_log = logging.getLogger(__name__)
BACKLOG = 128
"""Connections that wait."""
LAST = 2
"""Seconds for writing the last answers."""
Around = Callable[[App, str | None], App]
"""Puts an application of its own around that of the protocol; it is given the token, None: there is none."""


class _Http(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Front:
    """Answers from `start` to `close`. In one event loop.

    Attributes:
        http: address of HTTP, such as http://127.0.0.1:8000; None without.
        grpc: address of gRPC, such as 127.0.0.1:8001; None without.
    """

    def __init__(self, pool: Pool, settings: FrontSettings, around: Around | None = None) -> None:
        """Read the token and take the address of HTTP, so that what is wrong shows before anything is started.

        Raises:
            ConfigError: the token cannot be read, or an address is taken or not of this computer.
            MissingExtraError: gRPC is wanted, and its packages are not installed.
        """
        if settings.grpc_port is not None:
            require("serve", "grpc", "tritonclient", by="gRPC")
        self._pool, self._settings, self._around = pool, settings, around
        self._token = read_token(settings)
        self._desk = Desk(pool, settings)
        self._socket = None if settings.http_port is None else _bind(settings.host, settings.http_port)
        self._http: _Http | None = None
        self._serving: asyncio.Task[None] | None = None
        self._grpc: Any = None
        self.http: str | None = None
        self.grpc: str | None = None

    async def start(self) -> None:
        """Answer; ConfigError where the address of gRPC is taken."""
        if self._settings.grpc_port is not None:
            await self._start_grpc(self._settings.grpc_port)
        if self._socket is not None:
            await self._start_http(self._socket)

    async def close(self) -> None:
        """Refuse what comes, answer what is being judged, and end; also the pool. Calling it again does nothing."""
        self._desk.closing = True
        try:
            async with asyncio.timeout(self._settings.drain):
                await self._pool.close()
        except TimeoutError:
            _log.warning("answers on their way were given up after %g s", self._settings.drain)
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await asyncio.wait([self._serving], timeout=2 * LAST)
        if self._grpc is not None:
            await self._grpc.stop(LAST)
        if self._socket is not None:
            self._socket.close()
        self._desk.close()

    async def _start_http(self, bound: socket.socket) -> None:
        app: App = application_of(self._desk, self._token)
        if self._around is not None:
            app = self._around(app, self._token)
        limits = self._settings.limits
        config = uvicorn.Config(
            app,
            http="h11",  # limits the headers
            h11_max_incomplete_event_size=limits.header_bytes,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            limit_concurrency=2 * limits.requests + BACKLOG,
            backlog=BACKLOG,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=LAST,
        )
        self._http = _Http(config)
        self._serving = asyncio.create_task(self._http.serve(sockets=[bound]))
        while not self._http.started and not self._serving.done():
            await asyncio.sleep(0.005)
        if self._serving.done():
            await self._serving
            raise ConfigError(f"HTTP ended at once at {self._settings.host}; the log says why")
        self.http = f"http://{_address(self._settings.host, bound.getsockname()[1])}"

    async def _start_grpc(self, port: int) -> None:
        from flowad_fast.serve.protocol.over_grpc import server_of

        self._grpc = server_of(self._desk, self._token)
        address = _address(self._settings.host, port)
        try:
            port = self._grpc.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(f"{address}: cannot be bound; choose another grpc_port or host") from None
        await self._grpc.start()
        self.grpc = _address(self._settings.host, port)


async def run(
    pool: Pool, settings: FrontSettings, tell: Callable[[str], None] = _log.info, around: Around | None = None
) -> None:
    """Answer until SIGTERM or Ctrl-C, then end in order, the pool too; a second signal ends at once.

    Args:
        pool: what computes.
        settings: where, to whom, how much.
        tell: is given the addresses, and that it ends.
        around: see `Around`.

    Raises:
        ConfigError, MissingExtraError: see `Front`.
    """
    stop = asyncio.Event()
    with _signals(asyncio.get_running_loop(), stop):
        try:
            front = Front(pool, settings, around)
        except BaseException:
            await pool.close()
            raise
        try:
            await front.start()
            tell(" and ".join(f"{kind} at {at}" for kind, at in (("HTTP", front.http), ("gRPC", front.grpc)) if at))
            await stop.wait()
            tell("stopping: what is being judged is answered")
        finally:
            await front.close()


def serve(pool: Pool, settings: FrontSettings, tell: Callable[[str], None] = _log.info) -> None:
    """As `run`, for a program without an event loop."""
    asyncio.run(run(pool, settings, tell))


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`, a second one does what it did before; nothing in other threads than the main."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        for one, old in before.items():
            signal.signal(one, old)
        loop.call_soon_threadsafe(stop.set)

    for one in (signal.SIGTERM, signal.SIGINT):
        before[one] = signal.signal(one, handle)
    try:
        yield
    finally:
        for one, old in before.items():
            signal.signal(one, old)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, since asyncio turns off Nagle's algorithm only where it is: each answer took 40 ms more.
    one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, port))
        one.listen(BACKLOG)
    except OSError as error:
        one.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"{_address(host, port)}: cannot be bound ({reason}); choose another http_port") from None
    return one


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
