"""What every record says of the machine that it was made on, typed."""

import math
from typing import Any, Self

from pydantic import ConfigDict, model_validator

from flowad_fast.config import Frozen


class Part(Frozen):
    """A part of a record. A figure that is not finite is null in its JSON: it must not cost the others."""

    model_config = ConfigDict(allow_inf_nan=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_finite(cls, data: Any) -> Any:
        """What `record.write` wrote as null is not a number again, where a number must stand."""
        if not isinstance(data, dict):
            return data
        numbers = (name for name, field in cls.model_fields.items() if field.annotation is float)
        return data | {name: math.nan for name in numbers if name in data and data[name] is None}

    def but(self, **changes: Any) -> Self:
        """The same with other values."""
        return self.model_copy(update=changes)


class Gpu(Part):
    """What the driver says about a GPU at a moment."""

    name: str | None
    driver: str | None
    power_w: float | None
    power_cap_w: float | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    throttle_reasons: tuple[str, ...] | None


class Moment(Part):
    """What may disturb a measurement."""

    load_average: tuple[float, ...]
    gpu: Gpu | None


class Environment(Part):
    """The machine and the versions that a record holds for, and what was going on before and after."""

    project: str
    commit: str | None
    python: str
    packages: dict[str, str | None]
    platform: str
    cpu: str
    cpu_capability: str
    cores: int | None
    threads: int
    memory_gb: float
    gpu: str | None
    gpu_count: int
    cuda: str | None
    compute_capability: tuple[int, int] | None
    command: str
    before: Moment
    after: Moment
    seconds: float | None = None
    anomalib: str | None = None
