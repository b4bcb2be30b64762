"""What a command says to a running server."""

import http.client
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from flowad_fast.errors import ConfigError, EngineUnavailableError
from flowad_fast.line.activation import RefusedError
from flowad_fast.serve.orders import STATUS, UPDATE

MISSES = 5
"""Questions in a row without an answer, after which a server counts as gone."""


class Client:
    """Speaks to the server at an address, such as http://127.0.0.1:8000."""

    def __init__(self, server: str, token: str | None = None) -> None:
        """ConfigError where the address is none."""
        parts = urlsplit(server if "//" in server else f"http://{server}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{server}: expected an address such as http://127.0.0.1:8000")
        self._secure, self._host, self._port, self._token = parts.scheme == "https", host, port, token
        self._server = server

    def status(self) -> dict[str, Any]:
        """What runs: `models` and the last `update`."""
        return self._ask("GET", STATUS, None)

    def update(self, model: str, bundle: str, tell: Callable[[str], None], pause: float = 0.3) -> str:
        """Have a model judge with another bundle, and wait until it does; what was found.

        Raises:
            RefusedError: it does not replace the running one.
            EngineUnavailableError: no server answers.
        """
        self._ask("POST", UPDATE, {"model": model, "bundle": bundle})
        last, misses = "", 0
        while True:
            time.sleep(pause)
            try:
                now = self.status()["update"]
            except EngineUnavailableError:
                misses += 1
                if misses >= MISSES:
                    raise
                continue
            misses = 0
            if now["text"] != last:
                tell(last := now["text"])
            if now["state"] == "refused":
                raise RefusedError(now["text"])
            if now["state"] == "active":
                return str(now["text"])

    def _ask(self, method: str, path: str, body: dict[str, str] | None) -> dict[str, Any]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        one = kind(self._host, self._port, timeout=10)
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            one.request(method, path, None if body is None else json.dumps(body).encode(), headers)
            answer = one.getresponse()
            status, content = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineUnavailableError(
                f"{self._server}: no server answers ({error}); start one: flowad-serve BUNDLE"
            ) from None
        finally:
            one.close()
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"{self._server}: status {status} and no JSON object, expected flowad-serve there")
        if status >= 400:
            reason = str(found.get("detail", found.get("error", content.decode(errors="replace").strip())))
            raise RefusedError(reason) if status == 409 else ConfigError(f"{self._server}: {status}, {reason}")
        return found
