"""The page's server, in a thread of its own."""

import socket
import threading
from typing import TYPE_CHECKING

import uvicorn

from flowad_fast.errors import ConfigError
from flowad_fast.line.settings import WebSettings
from flowad_fast.line.sinks import base
from flowad_fast.line.web.app import make_app

if TYPE_CHECKING:
    from flowad_fast.line.station import Station

BACKLOG = 64
"""Connections that wait."""


def read_token(settings: WebSettings) -> str | None:
    """The token; ConfigError where it is missing or too short to be guessed by nobody."""
    return base.read_token(settings.token, "web.token")


def bind(settings: WebSettings) -> socket.socket:
    """A socket at the page's address; ConfigError where that is taken or not of this computer."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY where it is named
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((settings.host, settings.port))
        one.listen(BACKLOG)  # from here on nobody else gets it; whoever connects is answered once the line runs
    except OSError as error:
        one.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"{settings.address}: cannot be bound ({reason}); choose another web.port or host") from None
    return one


class Server:
    """Answers from `start` to `close`."""

    def __init__(self, settings: WebSettings, station: "Station") -> None:
        """Read the token and take the address, so that what is wrong shows before a line is started."""
        token = read_token(settings)
        self._socket = bind(settings)
        config = uvicorn.Config(
            make_app(station, settings, token),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            limit_concurrency=64,
            backlog=BACKLOG,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="page", daemon=True)

    def start(self) -> None:
        """Answer."""
        self._thread.start()

    def close(self) -> None:
        """Let running answers end, for a second at most."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join(3)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])
