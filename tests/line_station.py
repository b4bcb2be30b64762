"""A line of a fake detector with everything around it, and what its page answers."""

import http.client
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowad_fast.line import IteratorSource, Line, Shot
from flowad_fast.line.activation import Activation
from flowad_fast.line.settings import LineSettings, MonitorSettings, WebSettings
from flowad_fast.line.sinks.base import Secret
from flowad_fast.line.watch import Watch
from flowad_fast.line.web.server import Server
from tests.line_servers import free_port

TOKEN = "a-token-of-the-test"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Page:
    """A line, watched, with its page; what `Station` puts together for a settings file."""

    def __init__(
        self,
        detector: Any,
        shots: Iterable[NDArray[np.uint8] | Shot],
        folder: Path,
        *,
        token: str | None = TOKEN,
        **web: Any,
    ) -> None:
        if token is not None:
            (folder / "token").write_text(token)
            web["token"] = Secret(file=folder / "token")
        self.web = WebSettings(port=free_port(), **web)
        self.line = Line(detector, {"cell": IteratorSource(shots)}, deadline=5, journal=folder / "journal")
        settings = LineSettings(
            bundle=folder / "bundles" / "one",
            sources={"cell": {"kind": "recorded", "folder": folder}},
            deadline=5,
            journal=folder / "journal",
            web=self.web,
        )
        watch = Watch(self.line, MonitorSettings(), folder / "usual.json")
        activation = Activation(self.line, settings, watch, lambda path: None)  # type: ignore[arg-type, return-value]
        station = SimpleNamespace(line=self.line, watch=watch, activation=activation, settings=settings, note="")
        self.watch, self.activation = watch, activation
        self.server = Server(self.web, station)  # type: ignore[arg-type]

    def __enter__(self) -> "Page":
        self.server.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.line.stop()
        self.line.close()
        self.activation.close()
        self.server.close()

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> Answer:
        one = http.client.HTTPConnection("127.0.0.1", self.web.port, timeout=10)
        try:
            one.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            answer = one.getresponse()
            return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())
        finally:
            one.close()
