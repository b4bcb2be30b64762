"""Outcomes and alarms as HTTP POST requests, signed."""

import asyncio
import hashlib
import hmac
import json
import time
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from flowad_fast.errors import ConfigError, DeliveryError, require
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.sinks.base import Secret, SinkBase, Tls
from flowad_fast.line.sinks.rows import Json, digest, to_row

if TYPE_CHECKING:
    import httpx

SIGNATURE, TIMESTAMP = "X-Flowad-Signature", "X-Flowad-Timestamp"


class WebhookSettings(SinkBase):
    """An address that takes `{"events": [...]}`, each as in `rows.to_row` with an `id` beside.

    Every answer but 2xx means that nothing was taken, and all is sent again; the `id` tells what came before.
    """

    promises_delivery: ClassVar[bool] = True

    kind: Literal["webhook"]
    url: str
    """http or https, without a password."""
    events: Literal["all", "rejected", "alarms"] = "all"
    """All; parts that are not passed, and alarms; or alarms alone."""
    secret: Secret | None = None
    """Key of the signature, see `signature`; without it the receiver cannot tell who sends."""
    bearer: Secret | None = None
    """Token for the header Authorization."""
    tls: Tls | None = None
    timeout: float = Field(default=10, gt=0, le=600)
    """Seconds for a request from connecting to the answer, however slowly it comes."""

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected http://<host>/… or https://<host>/…")
        _ = parts.port  # raises ValueError
        if parts.username is not None:
            raise ValueError("expected an address without user and password; use secret or bearer")
        return url

    def open(self) -> "Webhook":
        """The sink."""
        require("line", "httpx", by="the sink webhook")
        return Webhook(self)

    def check(self) -> str:
        """That the address takes a request, signed as all are, with no events."""
        sink = self.open()
        try:
            sink.post([])
        finally:
            sink.close()
        return f"{sink.where} took a request without events"


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """What the header X-Flowad-Signature of an honest request holds, given its X-Flowad-Timestamp and body.

    `sha256=` and the HMAC-SHA256 of timestamp, a full stop and body, hexadecimal. A receiver compares it in constant
    time, and refuses timestamps (seconds since 1970) that are older than a few minutes.

    Example:
        >>> signature("key", "1767323045", b"{}")[:23]
        'sha256=1d533de0941004df'
    """
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class Webhook:
    """One request for each batch."""

    def __init__(self, settings: WebhookSettings) -> None:
        """Nothing is connected yet."""
        self._settings = settings
        parts = urlsplit(settings.url)
        self.where = f"{parts.scheme}://{parts.netloc}"  # paths of webhooks are often secrets themselves
        self._runner = asyncio.Runner()  # of coroutines, for only they can be stopped wherever a slow server is
        self._client: httpx.AsyncClient | None = None

    def publish(self, events: list[Record | Alarm]) -> None:
        """Send the events; DeliveryError or ConfigError on failure."""
        rows = [to_row(event) for event in events if self._wanted(event)]
        if rows:
            self.post([{**row, "id": digest(row)} for row in rows])

    def post(self, rows: list[dict[str, Json]]) -> None:
        """Send rows, also none; DeliveryError or ConfigError on failure."""
        import httpx

        try:
            status = self._runner.run(self._post(json.dumps({"events": rows}, allow_nan=False).encode()))
        except TimeoutError:
            raise DeliveryError(
                f"{self.where} did not answer within {self._settings.timeout} s; check the server, or raise the timeout"
            ) from None
        except (httpx.HTTPError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise DeliveryError(f"{self.where} cannot be reached ({reason}); check address and server") from None
        if not 200 <= status < 300:
            remedy = "give the address that it leads to" if 300 <= status < 400 else "check address, secret and server"
            raise DeliveryError(f"{self.where} answered {status}, expected 200 to 299; {remedy}")

    def close(self) -> None:
        """Let go of the connection."""
        if self._client is not None:
            self._runner.run(self._client.aclose())
            self._client = None
        self._runner.close()
        self._runner = asyncio.Runner()

    def _wanted(self, event: Record | Alarm) -> bool:
        wanted = self._settings.events
        return isinstance(event, Alarm) or wanted == "all" or wanted == "rejected" and event.action != "pass"

    async def _post(self, body: bytes) -> int:
        import httpx

        settings = self._settings
        if self._client is None:
            context = settings.tls.context() if settings.tls is not None else True
            self._client = httpx.AsyncClient(verify=context, timeout=None)
        headers = {"Content-Type": "application/json", TIMESTAMP: str(int(time.time()))}
        if settings.secret is not None:
            headers[SIGNATURE] = signature(settings.secret.read(), headers[TIMESTAMP], body)
        if settings.bearer is not None:
            if not ((token := settings.bearer.read()).isascii() and token.isprintable()):
                raise ConfigError(f"{self.where}: the bearer token has characters that no header holds; check it")
            headers["Authorization"] = f"Bearer {token}"
        async with (
            asyncio.timeout(settings.timeout),
            self._client.stream("POST", settings.url, content=body, headers=headers) as answer,
        ):
            return answer.status_code  # the answer's body, of whatever length, is not read
