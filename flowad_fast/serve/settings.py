"""One file says what a server answers: models with their replicas, limits, the Ray cluster."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from flowad_fast import bundle as bundles
from flowad_fast import config
from flowad_fast.config import Frozen
from flowad_fast.errors import BundleError, ConfigError
from flowad_fast.serve.protocol.settings import FrontSettings


class Range(Frozen):
    """Replicas that come and go with the requests in flight."""

    min: int = Field(default=1, ge=1, le=4096)
    max: int = Field(ge=1, le=4096)

    @model_validator(mode="after")
    def _order(self) -> "Range":
        if self.max < self.min:
            raise ValueError(f"got max {self.max} below min {self.min}")
        return self


class ModelSettings(Frozen):
    """A bundle and the replicas that judge with it."""

    bundle: Path
    """Its folder, at the same place on every machine of the cluster."""
    replicas: int | Range = Field(default=1)
    cpus: float = Field(default=1.0, gt=0, le=1024)
    """Share of a machine's cores that a replica reserves; its detector takes as many threads, at least one."""
    gpus: float = Field(default=0.0, ge=0, le=64)
    """GPUs that a replica reserves; 0.5: two share one."""
    engine: str = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the detector; null: as many as `cpus`."""
    largest_batch: int = Field(default=4, ge=1, le=1024)
    """Frames that are judged in one call, and in one request, at most."""
    wait: float = Field(default=0.002, ge=0, le=10)
    """Seconds that a replica with nothing to do waits for more frames, as far as deadlines allow."""
    queue: int = Field(default=64, ge=1, le=100_000)
    """Requests that may wait for a replica; one more is refused."""

    @field_validator("replicas")
    @classmethod
    def _some(cls, replicas: int | Range) -> int | Range:
        if isinstance(replicas, int) and not 1 <= replicas <= 4096:
            raise ValueError(f"got {replicas} replicas, expected 1 to 4096, or {{min: …, max: …}}")
        return replicas

    @property
    def ongoing(self) -> int:
        """Requests that a replica has at once: as many as it judges in one call, and as many that wait for it."""
        return max(2 * self.largest_batch, 4)


class ServeLimits(Frozen):
    """After how long the server gives up; seconds."""

    call: float = Field(default=10.0, gt=0, le=600)
    """One call of a detector; beyond it its requests have no result and the replica is replaced."""
    start: float = Field(default=120.0, gt=0, le=3600)
    """Starting a model's replicas, with the canary frame."""
    canary: float = Field(default=10.0, gt=0, le=3600)
    """Between two judgements of the canary frame."""
    drain: float = Field(default=8.0, gt=0, le=600)
    """From the wish to stop, or a change of bundles, until requests are given up; less than `front.drain`."""


class RaySettings(Frozen):
    """Which Ray cluster."""

    address: str | None = Field(default=None, min_length=1)
    """Of a running one, such as 10.0.0.5:6379, or auto; null: one on this computer that ends with the server."""
    name: str = Field(default="flowad", pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    """Of this server on the cluster: a server with the same name goes on with its replicas."""
    cpus: float | None = Field(default=None, gt=0, le=4096)
    """Cores of the cluster on this computer that replicas may reserve; null: all."""
    memory: int = Field(default=1 << 30, ge=100 << 20)
    """Bytes of shared memory of the cluster on this computer, for frames and maps on their way."""


class ServeSettings(Frozen):
    """A server. Paths are relative to the folder in which the command runs."""

    models: dict[str, ModelSettings] = Field(min_length=1)
    """By the name that requests call them."""
    front: FrontSettings = FrontSettings()
    """Where clients ask."""
    ray: RaySettings = RaySettings()
    limits: ServeLimits = ServeLimits()

    @field_validator("models")
    @classmethod
    def _names(cls, models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
        for name in models:
            if not 1 <= len(name) <= 64 or not all(c.isascii() and c.isalnum() or c in "-_" for c in name):
                raise ValueError(f"got the model name {name!r}, expected up to 64 letters, digits, - and _")
        return models

    @model_validator(mode="after")
    def _drains(self) -> "ServeSettings":
        if self.limits.drain >= self.front.drain:
            raise ValueError(
                f"got limits.drain {self.limits.drain:g} s, expected less than front.drain {self.front.drain:g} s: "
                "who is given up must still be told"
            )
        return self


def is_settings(path: Path) -> bool:
    """Whether a path of the command is a settings file and not a bundle."""
    return path.suffix in (".yaml", ".yml")


def from_bundles(paths: Iterable[Path]) -> dict[str, ModelSettings]:
    """Models of bundles, each named as its folder, with the defaults of everything.

    Raises:
        BundleError: no bundle there.
        ConfigError: two of one name.
    """
    found: dict[str, ModelSettings] = {}
    for path in paths:
        if not bundles.is_bundle(path):
            raise BundleError(f"{path}: no bundle: there is no {bundles.MANIFEST}; a settings file ends in .yaml")
        name = path.resolve().name
        if name in found:
            raise ConfigError(f"{path}: two bundles are named {name!r}; name models in a settings file")
        found[name] = ModelSettings(bundle=path)
    return found


def read_settings(path: str | Path) -> ServeSettings:
    """The settings in a YAML file; ConfigError where there are none, or fields are wrong."""
    return config.read_settings(ServeSettings, path, "flowad-serve")
