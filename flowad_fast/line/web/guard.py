"""What stands before every answer: sizes, rates, hosts, headers."""

import time
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

LARGEST = 16 * 1024
"""Bytes of a request's body."""
RATE, BURST = 100.0, 200.0
"""Answers a second; more are refused, so that whoever hammers the page takes little from the line."""
PROBES = ("/healthz", "/readyz")
"""Always answered."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, hosts: Container[str] | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Stand before `app`.

        Args:
            app: what answers.
            hosts: names by which it may be asked for; None: any. A page bound to the loopback interface answers to no
                other name, so that no website can reach it through a name of its own (DNS rebinding).
            clock: seconds.
        """
        self._app, self._hosts, self._clock = app, hosts, clock
        self._left, self._at = BURST, clock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            return
        headers = {key.lower(): value for key, value in scope["headers"]}

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        if self._hosts is not None and _host(headers.get(b"host", b"").decode("latin-1")) not in self._hosts:
            return await _refuse(safe, 421, "this page answers on this computer only; set web.host for others")
        if scope["path"] not in PROBES and not self._take():
            return await _refuse(safe, 429, f"more than {RATE:g} requests a second")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > LARGEST or b"transfer-encoding" in headers:
            return await _refuse(safe, 413, f"expected a body of at most {LARGEST} bytes, and its length")
        await self._app(scope, receive, safe)

    def _take(self) -> bool:
        now = self._clock()
        self._left, self._at = min(BURST, self._left + RATE * (now - self._at)), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def _host(header: str) -> str:
    """A host without its port; IPv6 addresses without brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = (reason + "\n").encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
