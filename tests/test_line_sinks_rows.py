"""Records and alarms survive JSON."""

import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest

from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks.rows import from_row, to_row
from flowad_fast.stages.decision import Verdict
from flowad_fast.stages.regions import Region

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, UTC)
REGION = Region((1, 2, 3, 4), 5.5, math.inf, ((1, 2), (3, 4)), "minor")


@pytest.mark.parametrize("result", [*Verdict, *NoResult])
def test_record_survives(result: Verdict | NoResult) -> None:
    frame = np.zeros((2, 2, 3), np.uint8)
    record = Record(
        "p\n<é\u2028", "c", result, "reject", NOW, 0.1, -math.inf, 2.0, "r", "b", {"a": 1.0}, (REGION,), frame
    )
    back = from_row(json.loads(json.dumps(to_row(record), allow_nan=False)))
    assert back == record and type(back.result) is type(result) and back.frame is None


def test_alarm_survives_and_foreign_row_is_refused() -> None:
    alarm = Alarm("drift", NOW, "text", True, {"p": math.inf})
    assert from_row(json.loads(json.dumps(to_row(alarm), allow_nan=False))) == alarm
    with pytest.raises(ValueError, match="got a row with the event 'else', expected 'record' or 'alarm'"):
        from_row({"event": "else"})


def test_every_problem_of_a_row_is_named() -> None:
    row = to_row(Record("p", "c", Verdict.GOOD, "pass", NOW, 0.1))
    del row["part"]
    with pytest.raises(ValueError, match=r"row of a record: part: Field required; .*got 'perhaps'.*unknown key 'more'"):
        from_row({**row, "result": "perhaps", "more": 1})


def test_numpy_and_half_characters_become_json() -> None:
    record = Record("\udcff\x00", "c", Verdict.GOOD, "pass", NOW, 0.1, np.float32("nan"), timings={"a": np.float64(2)})
    row = json.loads(json.dumps(to_row(record), allow_nan=False, ensure_ascii=False).encode())
    assert row["part"] == "\\udcff\x00" and row["score"] == "nan" and row["timings"] == {"a": 2}
    back = from_row(row)
    assert isinstance(back, Record) and back.score is not None and math.isnan(back.score)
    with pytest.raises(TypeError, match="got a object, expected text, numbers"):
        to_row(Alarm("a", NOW, "t", figures={"a": object()}))  # type: ignore[dict-item]
