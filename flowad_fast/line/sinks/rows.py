"""Records and alarms as JSON dictionaries and back, for every sink and for the spool; pictures are left out."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Any, Literal, TypeAlias

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict

from flowad_fast.config import parse
from flowad_fast.errors import ConfigError
from flowad_fast.line.event import Action, Alarm, Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.stages.decision import Verdict
from flowad_fast.stages.regions import Region

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
PICTURES = ("frame", "heat")
"""Fields of a record that no row has."""


def to_row(event: Record | Alarm) -> dict[str, Json]:
    """A dictionary that JSON can hold, with an `event` of "record" or "alarm" beside the event's own fields.

    Numbers that are not finite become "nan", "inf" and "-inf"; half characters (of file names that are no UTF-8)
    become an escape in text, so that every row is valid Unicode. Raises TypeError for what has no place in JSON.
    """
    row: dict[str, Json] = {"event": "alarm" if isinstance(event, Alarm) else "record"}
    return row | {key: _plain(value) for key, value in vars(event).items() if key not in PICTURES}


def digest(row: Mapping[str, Json]) -> str:
    """SHA-256 of a row, hexadecimal: tells whether an event was given before."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def text(value: str) -> str:
    """Valid Unicode: half characters become an escape in text, a backslash and their number."""
    return value.encode("utf-8", "backslashreplace").decode()


def _plain(value: object) -> Json:
    match value:
        case str():
            return text(value)
        case None | bool() | int():
            return value
        case float():
            return float(value) if math.isfinite(value) else str(float(value))
        case datetime():
            return value.isoformat()
        case Mapping():
            return {text(str(key)): _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case Region():
            return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        case np.generic():
            return _plain(value.item())
    raise TypeError(f"got a {type(value).__name__}, expected text, numbers, times, or lists and mappings of them")


class _RecordRow(BaseModel):
    model_config = ConfigDict(extra="forbid")
    event: Literal["record"]
    part: str
    camera: str
    result: Verdict | NoResult
    action: Action
    arrived: AwareDatetime
    seconds: float
    score: float | None
    threshold: float | None
    reason: str
    bundle: str
    timings: dict[str, float]
    regions: tuple[Region, ...]
    stamp: int | None = None


class _AlarmRow(BaseModel):
    model_config = ConfigDict(extra="forbid")
    event: Literal["alarm"]
    kind: str
    at: AwareDatetime
    text: str
    over: bool
    figures: dict[str, float]


def from_row(row: Mapping[str, Json]) -> Record | Alarm:
    """The event that `to_row` wrote, without its pictures; ConfigError, a ValueError, names all that is wrong."""
    match row.get("event"):
        case "record":
            return Record(**_fields(parse(_RecordRow, row, "row of a record")))
        case "alarm":
            return Alarm(**_fields(parse(_AlarmRow, row, "row of an alarm")))
        case other:
            raise ConfigError(f"got a row with the event {other!r}, expected 'record' or 'alarm'")


def _fields(row: BaseModel) -> dict[str, Any]:
    return {name: getattr(row, name) for name in type(row).model_fields if name != "event"}
