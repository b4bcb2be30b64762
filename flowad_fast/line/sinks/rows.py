"""Records and alarms as JSON dictionaries and back, for every sink and for the spool; pictures are left out."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import TypeAlias

from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.stages.decision import Verdict
from flowad_fast.stages.regions import Region

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"


def to_row(event: Record | Alarm) -> dict[str, Json]:
    """A dictionary that JSON can hold; numbers that are not finite become "nan", "inf" and "-inf"."""
    if isinstance(event, Alarm):
        return {"event": "alarm", **_plain({**vars(event), "figures": dict(event.figures)})}
    fields = {key: value for key, value in vars(event).items() if key not in ("frame", "heat")}
    fields |= {"timings": dict(event.timings), "regions": [asdict(region) for region in event.regions]}
    return {"event": "record", **_plain(fields)}


def _plain(fields: Mapping[str, object]) -> dict[str, Json]:
    return {key: _value(value) for key, value in fields.items()}


def _value(value: object) -> Json:
    if isinstance(value, Mapping):
        return {str(key): _value(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_value(one) for one in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    number = float(value)  # type: ignore[arg-type]  # numpy scalars too
    return number if math.isfinite(number) else str(number)


def from_row(row: Mapping[str, Json]) -> Record | Alarm:
    """The event that `to_row` wrote, without its pictures; raises KeyError, TypeError or ValueError on another row."""
    one = {key: value for key, value in row.items() if key != "event"}
    fields: dict[str, object] = dict(one)
    if row["event"] == "alarm":
        fields |= {"at": datetime.fromisoformat(str(one["at"])), "figures": _numbers(one["figures"])}
        return Alarm(**fields)  # type: ignore[arg-type]
    if row["event"] != "record":
        raise ValueError(f"got a row of event {row['event']!r}, expected 'record' or 'alarm'")
    result = str(one["result"])
    fields |= {
        "result": NoResult(result) if result in set(NoResult) else Verdict(result),
        "arrived": datetime.fromisoformat(str(one["arrived"])),
        "timings": _numbers(one["timings"]),
        "regions": tuple(map(_region, one["regions"])),  # type: ignore[arg-type]
    }
    for key in ("seconds", "score", "threshold"):
        fields[key] = None if one[key] is None else float(one[key])  # type: ignore[arg-type]
    return Record(**fields)  # type: ignore[arg-type]


def _numbers(row: Json) -> dict[str, float]:
    return {key: float(value) for key, value in row.items()}  # type: ignore


def _region(row: dict[str, Json]) -> Region:
    contour = tuple((x, y) for x, y in row["contour"])  # type: ignore
    return Region(tuple(row["box"]), float(row["area"]), float(row["peak"]), contour, str(row["severity"]))  # type: ignore
