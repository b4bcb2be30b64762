"""The line's journal: what was in flight is named after any end of the process."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from flowad_fast.line.journal import Journal

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)


def names(journal):
    return [part.part for part in journal.lost]


def test_what_was_begun_and_not_ended_is_lost_in_order(tmp_path):
    with Journal(tmp_path) as journal:
        assert journal.lost == ()
        for part in "abcd":
            journal.begin(part, "left", NOW)
        journal.end("b")
    with Journal(tmp_path) as journal:
        assert names(journal) == ["a", "c", "d"]
        assert (journal.lost[0].camera, journal.lost[0].arrived) == ("left", NOW)
        journal.end("a")
    with Journal(tmp_path) as journal:  # lost parts stay until somebody was told
        assert names(journal) == ["c", "d"]


def test_kill_9_leaves_the_parts_in_flight(tmp_path):
    script = f"""
import os, signal
from datetime import UTC, datetime
from flowad_fast.line.journal import Journal
journal = Journal({str(tmp_path)!r})
for i in range(100):
    journal.begin(str(i), "left", datetime.now(UTC))
    if i < 97: journal.end(str(i))
os.kill(os.getpid(), signal.SIGKILL)
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", script], env=env).returncode == -signal.SIGKILL
    with Journal(tmp_path) as journal:
        assert names(journal) == ["97", "98", "99"]


def test_the_file_stays_small_and_keeps_what_is_in_flight(tmp_path):
    with Journal(tmp_path, largest=1000) as journal:
        journal.begin("slow", "left", NOW)
        for i in range(500):
            journal.begin(str(i), "right", NOW)
            journal.end(str(i))
            assert journal.path.stat().st_size <= 1200
    with Journal(tmp_path) as journal:
        assert names(journal) == ["slow"]


def test_a_torn_line_hides_no_other_part(tmp_path):
    with Journal(tmp_path) as journal:
        journal.begin("a", "left", NOW)
    with journal.path.open("ab") as file:
        file.write(b'{"end": "a')
    with Journal(tmp_path) as journal:
        assert names(journal) == ["a"]


def test_an_append_that_a_full_disk_cuts_off_hides_no_later_part(tmp_path, monkeypatch):
    write = os.write
    with Journal(tmp_path) as journal:
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda file, data: write(file, data[:9]))
            with pytest.raises(OSError, match="free space"):
                journal.begin("a", "left", NOW)
        journal.begin("b", "left", NOW)
    with Journal(tmp_path) as journal:
        assert names(journal) == ["b"]


def test_one_line_a_folder_and_one_flight_a_part(tmp_path):
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError, match="another line runs"):
            Journal(tmp_path)
        journal.begin("a", "left", NOW)
        with pytest.raises(ValueError, match="in flight already"):
            journal.begin("a", "left", NOW)
        with pytest.raises(KeyError):
            journal.end("b")
    journal.close()
