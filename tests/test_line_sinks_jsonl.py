"""The sink of JSON lines: whole batches, rotation, what a crash and a full disk leave."""

import json
import os
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from line_servers import NOW, record

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.sinks.jsonl import JsonLines, JsonLinesSettings
from flowad_fast.line.sinks.rows import from_row

DAY = date(2026, 1, 2)


def parts(path: Path) -> list[str]:
    return [json.loads(line)["part"] for line in path.read_bytes().splitlines()]


def test_what_was_published_can_be_read_by_others_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    sink = JsonLinesSettings(kind="jsonl", path=path).open()
    assert not path.parent.exists()
    events: list[Record | Alarm] = [record('a\n\u2028"<é'), Alarm("drift", NOW, "t", False, {"p": float("-inf")})]
    sink.publish(events)
    sink.publish([record("b")])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [from_row(json.loads(line)) for line in lines[:-1]] == [*events, record("b")] and lines[-1] == ""
    sink.close()


def test_files_rotate_by_size_and_only_so_many_stay(tmp_path: Path) -> None:
    settings = JsonLinesSettings(kind="jsonl", path=tmp_path / "out.jsonl", largest=500, keep=3, daily=False)
    other = tmp_path / "out-notes.jsonl"
    other.touch()
    sink = settings.open()
    for number in range(20):
        sink.publish([record(str(number))])
        if number == 9:
            sink.close()
            sink = settings.open()
    full = sorted(tmp_path.glob("out-*-*.jsonl"))
    assert len(full) == 3 and all(0 < one.stat().st_size <= 500 for one in full)
    kept = [part for one in [*full, settings.path] for part in parts(one)]
    assert kept == [str(number) for number in range(20 - len(kept), 20)]
    assert other.exists()


def test_a_new_day_begins_a_new_file_also_after_a_restart(tmp_path: Path) -> None:
    settings = JsonLinesSettings(kind="jsonl", path=tmp_path / "out.jsonl")
    now = [DAY]
    sink = JsonLines(settings, lambda: now[0])
    sink.publish([record("a")])
    now[0] = date(2026, 1, 3)
    sink.publish([record("b")])
    sink.close()
    old = datetime(2026, 1, 3, 23, tzinfo=UTC).timestamp()
    os.utime(settings.path, (old, old))
    now[0] = date(2026, 1, 5)
    sink = JsonLines(settings, lambda: now[0])
    sink.publish([record("c")])
    assert parts(tmp_path / "out-20260102-000001.jsonl") == ["a"]
    assert parts(tmp_path / "out-20260103-000001.jsonl") == ["b"]
    assert parts(settings.path) == ["c"]


def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"event": "rec')
    JsonLinesSettings(kind="jsonl", path=path).open().publish([record("a")])
    torn, whole = path.read_bytes().splitlines()
    assert torn == b'{"event": "rec' and json.loads(whole)["part"] == "a"


def test_a_full_disk_leaves_no_half_batch_and_the_batch_can_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    sink = JsonLinesSettings(kind="jsonl", path=path).open()
    sink.publish([record("a")])
    real, calls = os.write, []

    def full(file: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(file, data[:100])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DeliveryError, match="No space left on device.*; free space on its disk"):
        sink.publish([record("b"), record("c")])
    monkeypatch.undo()
    assert parts(path) == ["a"]
    sink.publish([record("b"), record("c")])
    assert parts(path) == ["a", "b", "c"]


def test_check_says_what_would_fail(tmp_path: Path) -> None:
    settings = JsonLinesSettings(kind="jsonl", path=tmp_path / "out.jsonl")
    assert "can be written" in settings.check()
    sink = settings.open()
    sink.publish([record("a")])
    with pytest.raises(ConfigError, match="another line writes this file; give each line"):
        settings.check()
    sink.close()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot be written .*choose another path"):
        JsonLinesSettings(kind="jsonl", path=tmp_path / "folder.jsonl").check()
