"""What `flowad-line run` runs: a line, its monitor, the change of bundles, and the page."""

import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from flowad_fast.errors import require
from flowad_fast.line.activation import Activation, active
from flowad_fast.line.runner import Line
from flowad_fast.line.scoring import InProcess, Start
from flowad_fast.line.settings import LineSettings
from flowad_fast.line.watch import Watch

if TYPE_CHECKING:
    from flowad_fast.line.web.server import Server

_log = logging.getLogger(__name__)


class Station:
    """A line with everything that its settings name.

    Example:
        with Station(read_settings("line.yaml")) as station:
            station.line.wait()

    Attributes:
        line, watch, activation: its parts.
        note: what is to be known about the bundle, "" where it is that of the settings.
    """

    def __init__(self, settings: LineSettings) -> None:
        """Put it together; nothing is started yet.

        Raises:
            FlowADError: a bundle, token or library is missing or was altered.
        """
        self.settings, self.note = settings, ""
        if settings.web is not None:
            require("line", "fastapi", "uvicorn", "prometheus_client", by="the page (web: in the settings)")
        if (found := active(settings)) is not None:
            self.note = found.text(settings.bundle)
            running = settings.model_copy(update={"bundle": found.bundle})
        else:
            running = settings
        self.line = Line.from_settings(running)
        self.watch = Watch(self.line, settings.monitor, settings.journal / "usual.json")
        self.activation = Activation(self.line, settings, self.watch, self._make)
        self._server: Server | None = None

    def start(self) -> None:
        """Start the line, then the page.

        Raises:
            FlowADError: the line does not start, or the page's address is taken.
        """
        if self.settings.web is not None:
            from flowad_fast.line.web.server import Server

            self._server = Server(self.settings.web, self)  # first: a missing token or taken port costs no start
        try:
            self.line.start()
        except BaseException:
            if self._server is not None:
                self._server.close()
            raise
        if self._server is not None:
            self._server.start()

    def close(self) -> None:
        """Stop the line within its limit, then the rest."""
        self.activation.cancel()
        self.line.close()
        self.activation.close()
        self.line.scoring.close()  # that of an activation which came in at the end
        self.watch.save()
        if self._server is not None:
            self._server.close()

    def __enter__(self) -> "Station":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _make(self, bundle: Path) -> InProcess:
        settings = self.settings
        return InProcess(Start(bundle, settings.engine, settings.device, settings.threads))
