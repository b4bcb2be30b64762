"""Records: what a run measured, typed, and their JSON on disk.

The JSON of a row is flat and its keys stay, so that records of different versions can be compared; `Row` nests what
belongs together. Measuring makes new rows and changes none.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from flowad_fast import bundle
from flowad_fast.benchmarks.record.limits import BackboneTime, Roofs
from flowad_fast.benchmarks.record.machine import Environment, Part
from flowad_fast.config import Precision, parse, read_mapping
from flowad_fast.errors import ConfigError
from flowad_fast.files import make_folder, replacing
from flowad_fast.kernels.account import VelocityShape
from flowad_fast.stages.aggregates import Aggregate
from flowad_fast.stages.scorers import Scorer

if TYPE_CHECKING:
    from flowad_fast.benchmarks.record.capacity_record import CapacityRecord
    from flowad_fast.benchmarks.record.front import FrontRecord
    from flowad_fast.benchmarks.record.line import LineRecord
    from flowad_fast.benchmarks.record.peers import PeersRecord
    from flowad_fast.benchmarks.record.serve import ServeRecord

SCHEMA = 1
Status = Literal[
    "ok", "not available", "out of memory", "failed", "timeout", "crashed", "failed parity", "not checked", "skipped"
]


class Latency(Part):
    """Milliseconds per call: percentiles (None where n does not support one), n, and the raw samples."""

    p50: float
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    n: int
    raw: tuple[float, ...]


class Stability(Part):
    """Interquartile range and drift (second half against first) as shares of the median, and what follows."""

    spread: float
    drift: float
    verdict: Literal["stable", "noisy", "too few samples"]


class Memory(Part):
    """Megabytes (1e6 bytes): the process's resident set, and on a GPU the allocator's and the driver's figures."""

    method: str = ""
    idle: float
    peak: float | None
    above_idle: float | None
    allocator_idle: float | None = None
    allocator_peak: float | None = None
    allocator_reserved: float | None = None
    nvml_process: float | None = None

    @property
    def footprint(self) -> float | None:
        """The figure that rows are compared by: the allocator's peak on a GPU, else the resident peak above idle."""
        return self.above_idle if self.allocator_peak is None else self.allocator_peak

    @property
    def whole(self) -> float | None:
        """What a published figure would be compared with, weights included: the allocator's peak or the process's."""
        return self.peak if self.allocator_peak is None else self.allocator_peak


class Ratio(Part):
    """Times as fast as the reference path, median of the pairs with its 95 % interval, and times as little memory."""

    speed: float
    low: float
    high: float
    pairs: int
    memory: float | None = None


class Parity(bundle.Parity):
    """A row against the fp32 reference, with the rank correlation of the maps' locations."""

    map_spearman: float | None = None


class DensityError(Part):
    """How far K probes can be trusted: the standard error per location, and the rank correlation with ten others."""

    standard_error: float
    spread: float
    share_of_spread: float
    spearman_with_10: float | None


class Roof(Part):
    """The model's own products alone, and their share of the row's time."""

    gemm_ms: float
    share: float


class Prediction(Part):
    """What the account of bytes and operations predicts from the roofs of the same run."""

    ms: float
    measured_over_predicted: float
    gflop: float
    gb: float


class Measured(Part):
    """What a row has that ran: frames per second over the whole time, and how long and how much."""

    fps: float
    latency_ms: Latency
    device_time_ms: Latency | None = None
    stability: Stability
    memory_mb: Memory


class Row(Part):
    """One case: what was asked for, what ran, and what came of it; see `benchmarks/README.md`."""

    name: str
    preset: str
    mode: Literal["offline", "single-stream"] = "offline"
    scorer: str
    options: Annotated[Scorer, Field(discriminator="kind")] | None = None
    engine: str
    ran: str | None = None
    details: dict[str, Any] | None = None
    precision: Precision = "fp32"
    ops: str = "reference"
    products: str | None = None
    early: bool | None = None
    batch: int
    pieces: int = 1
    """Batches that a call held, of whose time each has its share: where an engine computes one while others move."""
    steps: int | None = None
    nfe: int | None = None
    probes: int | None = None
    shape: VelocityShape | None = None
    frames: str | None = None
    frame_size: tuple[int, int] | None = None
    status: Status
    reason: str | None = None
    note: str | None = None
    parity: Parity | None = None
    density: DensityError | None = None
    measured: Measured | None = None
    """Its fields stand beside the row's in the JSON."""
    ratio_to_reference: Ratio | None = None
    load_s: float | None = None
    export_s: float | None = None
    start_s: float | None = None
    compile_s: float | None = None
    first_call_s: float | None = None
    roof: Roof | None = None
    prediction: Prediction | None = None
    rung: int | None = None
    rung_name: str | None = None
    method: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "measured" in data:
            return data
        data = {key: value for key, value in data.items() if (key, value) != ("line", None)}  # of a mode that was
        if "note" in (data.get("parity") or {}):  # the reference path said there that it is the reference
            data["parity"] = None
        given = {key: data.pop(key) for key in Measured.model_fields if key in data}
        return data if given.get("latency_ms") is None else data | {"measured": given}

    @model_serializer(mode="wrap")
    def _json(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = handler(self)
        return data | (data.pop("measured") or dict.fromkeys(Measured.model_fields))

    def without_speed(self, status: Status, reason: str) -> "Row":
        """The row as one that failed."""
        return self.but(status=status, reason=reason, measured=None, ratio_to_reference=None)


class CheckPart(Part):
    """One part of a check of a GPU: `output` is what tests said, `backbone` what a smoke measured beside its rows."""

    name: str
    seconds: float
    status: Status
    reason: str | None = None
    output: tuple[str, ...] | None = None
    backbone: tuple[BackboneTime, ...] | None = None


class Header(Part):
    """What every record has."""

    model_config = ConfigDict(populate_by_name=True)

    version: Literal[1] = Field(default=1, alias="schema")
    kind: str
    preset: str
    environment: Environment
    roofs: Roofs = Roofs()

    def dump(self) -> dict[str, Any]:
        """The record as JSON values."""
        return self.model_dump(mode="json", by_alias=True)


class Pair(Part):
    """Two rows of a record that took turns with each other: `fast` is `ratio.speed` times as fast as `slow`.

    `ratio` is None where one of the two has no speed, with the reason why; its memory is of `Memory.whole`. `goal` is
    the speed that is asked for.
    """

    fast: str
    slow: str
    what: str
    goal: float | None = None
    ratio: Ratio | None = None
    reason: str | None = None


class Record(Header):
    """Rows with speeds, of a run of cases or of several of them."""

    kind: Literal["bench", "ladder", "peers", "gpu-check", "fewer"] = "bench"
    title: str | None = None
    cases: tuple[Row, ...]
    parts: tuple[CheckPart, ...] | None = None


class FewerRecord(Record):
    """Rows that took turns with each other."""

    kind: Literal["fewer"] = "fewer"
    pairs: tuple[Pair, ...]


class Interval(Part):
    """A change of AUROC, in points of 100, with its 95 % interval."""

    points: float
    low: float
    high: float


class Drift(Part):
    """What a precision changed, see `runs.drift.compared`."""

    auroc: float
    auroc_change: Interval
    score_spearman: float
    score_error: float
    map_rms: float
    map_error: float
    maps: int


class DriftRow(Drift):
    """A scorer in a precision beside the same scorer in fp32, on labelled photos."""

    name: str
    scorer: str
    precision: Precision
    ops: str
    options: Annotated[Scorer, Field(discriminator="kind")]
    engine: str
    status: Literal["ok"] = "ok"
    photos: int
    defective: int


class DriftRecord(Header):
    """Rows without speeds."""

    kind: Literal["drift"] = "drift"
    dataset: str
    cases: tuple[DriftRow, ...]


class EvaluationsRow(Part):
    """Image AUROC of a scorer with so many evaluations; of several seeds' draws the mean, and each.

    `low` and `high` are the 95 % bootstrap interval over the photos, `change` is against three evaluations of
    inversion without location statistics and with the same aggregate.
    """

    name: str
    scorer: str
    options: Annotated[Scorer, Field(discriminator="kind")]
    evaluations: int
    located: bool
    aggregate: Aggregate
    auroc: float
    low: float
    high: float
    seeds: tuple[int, ...] = ()
    by_seed: tuple[float, ...] = ()
    change: Interval | None = None


class EvaluationsRecord(Header):
    """Accuracy by number of evaluations, without speeds; `good` parts gave the location statistics.

    `unmeasured` says why rows with location statistics are missing.
    """

    kind: Literal["evaluations"] = "evaluations"
    dataset: str
    category: str
    photos: int
    defective: int
    good: int
    unmeasured: str | None = None
    cases: tuple[EvaluationsRow, ...]


Speedless = DriftRecord | EvaluationsRecord


def write(record: Header, path: Path) -> None:
    """Write a record aside and rename it; a figure that is not finite becomes null."""
    make_folder(path.parent)
    with replacing(path) as file:
        file.write((json.dumps(finite(record.dump()), allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """JSON values with null for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def read(path: Path) -> "Record | Speedless | LineRecord | ServeRecord | FrontRecord | PeersRecord | CapacityRecord":
    """A record of this schema.

    Raises:
        ConfigError: not a record, one of another schema, or one with an unknown or impossible field.
    """
    data = read_mapping(path)
    if data.get("schema") != SCHEMA or not isinstance(data.get("cases"), list):
        raise ConfigError(
            f"{path}: expected a flowad-bench record of schema {SCHEMA}, got schema {data.get('schema')!r}; "
            "measure again with this version"
        )
    # These build on this module.
    from flowad_fast.benchmarks.record.capacity_record import CapacityRecord
    from flowad_fast.benchmarks.record.front import FrontRecord
    from flowad_fast.benchmarks.record.line import LineRecord
    from flowad_fast.benchmarks.record.peers import PeersRecord
    from flowad_fast.benchmarks.record.serve import ServeRecord

    kinds: dict[
        str, type[Record | Speedless | LineRecord | ServeRecord | FrontRecord | PeersRecord | CapacityRecord]
    ] = {
        "drift": DriftRecord,
        "evaluations": EvaluationsRecord,
        "fewer": FewerRecord,
        "line": LineRecord,
        "serve": ServeRecord,
        "front": FrontRecord,
        "peers-photos": PeersRecord,
        "capacity": CapacityRecord,
    }
    kind = kinds.get(str(data.get("kind")), Record)
    return parse(kind, data, str(path))
