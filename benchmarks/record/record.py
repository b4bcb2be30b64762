"""Records on disk: read with their schema checked, and compared with the noise in mind."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowad_fast.benchmarks.measure.memory import footprint
from flowad_fast.benchmarks.record.clock import interval
from flowad_fast.config import read_mapping
from flowad_fast.errors import ConfigError

SCHEMA = 1
FLOOR = 0.03
"""Relative change below which two runs count as equal even when their intervals are narrower."""

Verdict = Literal["faster", "slower", "no difference", "not comparable"]


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A record of this schema.

    Raises:
        ConfigError: not a record, or one of another schema.
    """
    record = read_mapping(path)
    if record.get("schema") != SCHEMA or not isinstance(record.get("cases"), list):
        raise ConfigError(
            f"{path}: expected a flowad-bench record of schema {SCHEMA}, got schema {record.get('schema')!r}; "
            "measure again with this version"
        )
    return record


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row that both records have: change of speed with a verdict, and change of memory.

    On one GPU, times are compared. On a CPU, where two runs never have the machine to themselves in the same way,
    ratios to the reference path are, since both sides of a pair met the same noise. `change` is new speed over old; a
    verdict needs the intervals of both runs to exclude 1, and a change above both runs' own spread.

    Raises:
        ConfigError: a record without speeds.
    """
    for record in (old, new):
        if record["kind"] == "drift":
            raise ConfigError("a record of drift has no speeds to compare; give records of flowad-bench or its ladder")
    theirs = {(row["preset"], row["name"]): row for row in old["cases"]}
    same_gpu = _same_gpu(old, new)
    return [
        {"name": row["name"], **_change(before, row, same_gpu)}
        for row in new["cases"]
        if (before := theirs.get((row["preset"], row["name"]))) and (same_gpu or row["engine"] != "reference")
    ]


def _same_gpu(old: dict[str, Any], new: dict[str, Any]) -> bool:
    gpu = old["environment"]["gpu"]
    return gpu is not None and gpu == new["environment"]["gpu"]


def _change(old: dict[str, Any], new: dict[str, Any], same_gpu: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"basis": None, "change": None, "low": None, "high": None, "memory": None}
    if old["status"] != "ok" or new["status"] != "ok":
        return result | {"verdict": "not comparable", "reason": f"{old['status']} before, {new['status']} now"}
    before, now = footprint(old["memory_mb"]), footprint(new["memory_mb"])
    if before and now:
        result["memory"] = round(now / before, 4)
    a, b = old["ratio_to_reference"], new["ratio_to_reference"]
    if same_gpu:
        result["basis"] = "latency"
        first, low1, high1 = interval(old["latency_ms"]["raw"])
        second, low2, high2 = interval(new["latency_ms"]["raw"])
        change, low, high = first / second, low1 / high2, high1 / low2
        noise = float(np.hypot(old["stability"]["spread"], new["stability"]["spread"])) / 2
    elif a and b and a["pairs"] and b["pairs"]:
        result["basis"] = "ratio to the reference path"
        change, low, high = b["speed"] / a["speed"], b["low"] / a["high"], b["high"] / a["low"]
        noise = 0.0
    else:
        return result | {
            "verdict": "not comparable",
            "reason": "not the same GPU in both records, and no ratio to the reference path in the same run",
        }
    clear = (low > 1 or high < 1) and abs(change - 1) > max(FLOOR, noise)
    verdict: Verdict = "no difference" if not clear else "faster" if change > 1 else "slower"
    return result | {
        "change": round(change, 4), "low": round(low, 4), "high": round(high, 4), "verdict": verdict, "reason": None,
    }  # fmt: skip
