"""One file says what a line is: cameras, bundle, deadlines, limits, sinks."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from flowad_fast import config
from flowad_fast.config import Frozen, loopback
from flowad_fast.line.sinks import SinkSettings
from flowad_fast.line.sinks.base import Secret
from flowad_fast.line.sources import SourceSettings


class Limits(Frozen):
    """After how long, or how often, the line gives up; seconds."""

    call: float = Field(default=2.0, gt=0, le=600)
    """One call of the detector; beyond it its parts have no result and the engine is started again."""
    start: float = Field(default=120.0, gt=0, le=3600)
    """Starting the engine, with the canary frame."""
    restarts: int = Field(default=3, ge=0)
    """Failures of the engine within `window` that are survived; one more stops the line."""
    window: float = Field(default=600.0, gt=0)
    drain: float = Field(default=10.0, gt=0, le=600)
    """From the wish to stop until the end: parts that wait are judged and sinks are served, as far as that allows."""


class Canary(Frozen):
    """A frame whose score is known: an engine that gives another one is not ready."""

    image: Path | None = None
    """A picture of a part; null: a generated pattern."""
    tolerance: float = Field(default=1e-3, gt=0)
    """How far its score may be from the remembered one, as a share of that (or absolute where that is below 1)."""


class MonitorSettings(Frozen):
    """When the line says that something has changed; per camera."""

    false_alarms: float = Field(default=0.01, gt=0, lt=1)
    """At most this share of lines that are as they were has any alarm of the monitor within `horizon` parts."""
    horizon: int = Field(default=100_000, ge=100)
    reference: int = Field(default=500, ge=50, le=100_000)
    """Parts after a bundle's first start that say what is usual; calibration alone says how many are rejected."""
    rejects: float | None = Field(default=None, gt=0, lt=1)
    """Share of parts that is rejected as a rule, defective ones included; null: alpha of the calibration."""
    no_results: float = Field(default=0.001, gt=0, lt=1)
    """Share of parts without a verdict that is usual."""
    margin: float = Field(default=0.1, ge=0, lt=0.5)
    """By how much the share of parts above the usual median may differ from a half, for lamps and batches vary."""


class WebSettings(Frozen):
    """The page and the addresses for probes. Without a token it only shows."""

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8600, ge=1, le=65535)
    token: Secret | None = None
    """At least 16 characters, in a file or an environment variable; who has it may activate bundles."""
    private: bool = False
    """Whether reading the page's data and the metrics needs the token too; probes never do."""
    certificate: Path | None = None
    """PEM, with `key`: encrypted. Without it a token beyond this computer can be read on the way."""
    key: Path | None = None
    insecure: bool = False
    """Whether anyone on the network may look, without any token."""
    bundles: Path | None = None
    """Folder whose bundles may be activated; null: the one that `bundle` lies in."""

    @model_validator(mode="after")
    def _safe(self) -> "WebSettings":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("got one of certificate and key, expected both or none")
        if self.private and self.token is None:
            raise ValueError("got private without a token; name a token's file or environment variable")
        if not self.local and self.token is None and not self.insecure:
            raise ValueError(
                f"got the host {self.host!r}, which others can reach, without a token; "
                "add token: {file: …}, or write insecure: true"
            )
        return self

    @property
    def local(self) -> bool:
        """Whether only this computer can reach it."""
        return loopback(self.host)

    @property
    def address(self) -> str:
        """Where to look, on this computer where that is possible."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"


class LineSettings(Frozen):
    """A line. Paths are relative to the folder in which the command runs."""

    bundle: Path
    sources: dict[str, SourceSettings] = Field(min_length=1)
    """By the name of the camera."""
    deadline: float = Field(gt=0, le=3600)
    """Seconds from a part's trigger until its outcome must be there."""
    on_no_result: Literal["reject", "pass", "stop"] = "reject"
    """What becomes of a part without a verdict. What is anomalous or invalid is always rejected."""
    capacity: int = Field(default=64, ge=1, le=100_000)
    """Parts that may wait; as many pictures wait for each sink that keeps none on disk."""
    largest_batch: int = Field(default=4, ge=1, le=1024)
    """Parts that are judged in one call, as far as their deadlines allow."""
    engine: str = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    sinks: tuple[SinkSettings, ...] = ()
    journal: Path = Path("line-journal")
    """Folder of this line alone: parts in flight, what sinks have missed, the canary's score."""
    spool: int = Field(default=256 << 20, gt=0)
    """Bytes that each sink which promises delivery may keep on disk while it does not work."""
    limits: Limits = Limits()
    canary: Canary = Canary()
    monitor: MonitorSettings = MonitorSettings()
    web: WebSettings | None = None
    """null: no page, and no activation while it runs."""

    @field_validator("sources")
    @classmethod
    def _names(cls, sources: dict[str, SourceSettings]) -> dict[str, SourceSettings]:
        for name in sources:
            if not name or len(name) > 64 or not all(c.isalnum() or c in "-_." for c in name) or name[0] == ".":
                raise ValueError(f"got the camera name {name!r}, expected up to 64 letters, digits, - _ and .")
        return sources

    @field_validator("sinks")
    @classmethod
    def _unique(cls, sinks: tuple[SinkSettings, ...]) -> tuple[SinkSettings, ...]:
        names = sink_names(sinks)
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"got two sinks named {name!r}; give each a name of its own")
        return sinks


def sink_names(sinks: Iterable[SinkSettings]) -> list[str]:
    """What each sink is called in alarms: its name, or its kind."""
    return [one.name or one.kind for one in sinks]


def read_settings(path: str | Path) -> LineSettings:
    """The settings in a YAML file; ConfigError where there are none, or fields are wrong."""
    return config.read_settings(LineSettings, path, "flowad-line")
