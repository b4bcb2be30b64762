"""What a command says to a line that runs on this computer, through its page's addresses."""

import http.client
import json
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from flowad_fast.errors import ConfigError, LineStoppedError
from flowad_fast.line.activation import Progress, RefusedError
from flowad_fast.line.settings import LineSettings
from flowad_fast.line.sinks.rows import Json


class Client:
    """Speaks to the line of a settings file."""

    def __init__(self, settings: LineSettings) -> None:
        """Read the token; ConfigError where the settings have no page or token, so that nothing can be changed."""
        if settings.web is None or settings.web.token is None:
            raise ConfigError(
                "the settings have no web.token, so a running line takes no orders; add web: {token: {file: …}} and "
                "start the line again"
            )
        self._web, self._token = settings.web, settings.web.token.read()

    def activate(self, bundle: str, shadow: int, allowed: float) -> None:
        """See `Activation.activate`."""
        self._ask("POST", "/api/activate", {"bundle": bundle, "shadow": shadow, "allowed": allowed})

    def rollback(self) -> None:
        """See `Activation.rollback`."""
        self._ask("POST", "/api/rollback", {})

    def cancel(self) -> None:
        """See `Activation.cancel`."""
        self._ask("POST", "/api/cancel", {})

    def progress(self) -> Progress:
        """How far the activation is."""
        state = self._ask("GET", "/api/state", None)
        found = state["activation"]
        assert isinstance(found, dict)
        return Progress(**found)  # type: ignore[arg-type]

    def follow(self, tell: Callable[[Progress], None], pause: float = 0.3) -> Progress:
        """Wait until the activation is over; `tell` hears of every change. RefusedError where it was refused."""
        last = Progress()
        while True:
            time.sleep(pause)
            if (now := self.progress()) != last:
                tell(now)
            last = now
            if now.state == "refused":
                raise RefusedError(now.text)
            if not now.busy:
                return now

    def _ask(self, method: str, path: str, body: dict[str, Json] | None) -> dict[str, Json]:
        parts = urlsplit(self._web.address)
        host, port = parts.hostname or "", parts.port or 80
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        one: http.client.HTTPConnection
        if self._web.certificate is None:
            one = http.client.HTTPConnection(host, port, timeout=10)
        else:
            context = ssl.create_default_context(cafile=self._web.certificate)
            one = http.client.HTTPSConnection(host, port, timeout=10, context=context)
        try:
            one.request(method, path, data, headers)
            answer = one.getresponse()
            status, content = answer.status, answer.read()
        except OSError as error:
            raise LineStoppedError(
                f"{self._web.address}: no line answers ({error}); start it: flowad-line run"
            ) from None
        finally:
            one.close()
        found = _object(content)
        if status >= 400:
            reason = str(found.get("detail", content.decode(errors="replace").strip()))
            raise RefusedError(reason) if status == 409 else ConfigError(f"{self._web.address}: {status}, {reason}")
        return found


def _object(content: bytes) -> dict[str, Json]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
