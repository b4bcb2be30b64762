"""What a sink missed, on disk: in order, over restarts, within its budget."""

import errno
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.spool import Spool, SpoolFeeder


def lines(*numbers: int) -> list[bytes]:
    return [b"%d" % number for number in numbers]


def take(spool: Spool, count: int = 1000) -> list[bytes]:
    got: list[bytes] = []
    while found := spool.next(count):
        spool.taken(len(found))
        got += found
    return got


def test_in_order_over_restarts(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment=8)
    for line in lines(*range(20)):
        spool.put(line)
    assert spool.next(3) == spool.next(3) and spool.waiting == 20
    (spool.next(3), spool.taken(3))
    spool.close()
    again = Spool(tmp_path, 1 << 20, segment=8)
    assert again.waiting == 17
    again.put(b"20")
    assert take(again, 4) == lines(*range(3, 21)) and again.waiting == 0
    again.put(b"21")
    assert take(again) == [b"21"]
    again.close()
    assert take(Spool(tmp_path, 1 << 20)) == []


def test_files_that_were_taken_are_deleted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20, segment=8)
    for _ in range(50):
        for line in lines(*range(10)):
            spool.put(line)
        take(spool)
    assert len(list(tmp_path.glob("*.jsonl"))) <= 2


def test_the_oldest_go_beyond_the_budget_and_are_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 40, segment=8)
    for line in lines(*range(10, 60)):
        spool.put(line)
    assert spool.size <= 40
    left = take(spool)
    assert left == lines(*range(60 - len(left), 60)) and spool.dropped == 50 - len(left) > 30


@pytest.mark.parametrize("torn", [b'{"half', b""])
def test_a_torn_end_is_no_line(tmp_path: Path, torn: bytes) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.put(b"1")
    spool.close()
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes() + torn)
    again = Spool(tmp_path, 1 << 20)
    again.put(b"2")
    assert take(again) == lines(1, 2)


class Store:
    def __init__(self, failing: int = 0) -> None:
        self.failing, self.got = failing, list[str]()

    def publish(self, events: list[Record | Alarm]) -> None:
        if self.failing:
            self.failing -= 1
            raise ConnectionError("away")
        self.got += [one.kind for one in events if isinstance(one, Alarm)]

    def close(self) -> None:
        pass


def test_a_feeder_delivers_after_reconnecting_and_after_a_restart(tmp_path: Path) -> None:
    down, store = Store(failing=10**6), Store(failing=2)
    first = SpoolFeeder("db", down, lambda alarm: None, Spool(tmp_path, 1 << 20), pauses=(0.001, 0.002))
    for i in range(5):
        first.give(Alarm(str(i), datetime.now(UTC), ""))
    assert first.close(0.05) and first.missed == 0 and first.waiting == 5
    second = SpoolFeeder("db", store, lambda alarm: None, Spool(tmp_path, 1 << 20), batch=2, pauses=(0.001, 0.002))
    second.give(Alarm("5", datetime.now(UTC), ""))
    assert second.close(5)
    assert store.got == [str(i) for i in range(6)] and second.delivered == 6 and second.waiting == 0


def test_a_row_that_cannot_be_read_does_not_hold_up_the_others(tmp_path: Path) -> None:
    spool, store = Spool(tmp_path, 1 << 20), Store()
    spool.put(b'{"event": "of another version"}')
    feeder = SpoolFeeder("db", store, lambda alarm: None, spool)
    feeder.give(Alarm("1", datetime.now(UTC), ""))
    assert feeder.close(5) and store.got == ["1"] and feeder.missed == 1


class FullDisk:
    """Writing fails with ENOSPC while `full`; reading and deleting do not, as on a real one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.full = False
        write, write_text = os.write, Path.write_text

        def no_bytes(descriptor: int, data: bytes) -> int:
            self._check()
            return write(descriptor, data)

        def no_text(path: Path, text: str) -> int:
            self._check()
            return write_text(path, text)

        patch.setattr(os, "write", no_bytes)
        patch.setattr(Path, "write_text", no_text)

    def _check(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


class Gate(Store):
    """Waits, once, inside a delivery."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def publish(self, events: list[Record | Alarm]) -> None:
        self.inside.set()
        assert self.go_on.wait(10)
        super().publish(events)


def alarm(number: int) -> Alarm:
    return Alarm(str(number), datetime.now(UTC), "")


def test_a_full_disk_ends_no_delivery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was on its way when the disk became full cannot be noted as taken; what comes then waits in memory."""
    disk, store = FullDisk(monkeypatch), Gate()
    feeder = SpoolFeeder("db", store, lambda alarm: None, Spool(tmp_path, 1 << 20))
    feeder.give(alarm(0))
    assert store.inside.wait(5)
    disk.full = True
    feeder.give(alarm(1))
    feeder.give(alarm(2))
    store.go_on.set()
    end = time.monotonic() + 5
    while len(store.got) < 3:
        assert time.monotonic() < end, store.got
        time.sleep(0.005)
    disk.full = False
    feeder.give(alarm(3))
    assert feeder.close(5) and store.got == ["0", "1", "2", "3"]
    assert feeder.missed == 0 and feeder.waiting == 0 and feeder.delivered == 4
    again = Store()
    assert SpoolFeeder("db", again, lambda alarm: None, Spool(tmp_path, 1 << 20)).close(5) and again.got == []


@pytest.mark.parametrize("still_full", [False, True])
def test_what_waits_in_memory_goes_to_disk_at_the_end(
    still_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, down = FullDisk(monkeypatch), Store(failing=10**6)
    feeder = SpoolFeeder("db", down, lambda alarm: None, Spool(tmp_path, 1 << 20), capacity=3, pauses=(0.001, 0.002))
    feeder.give(alarm(0))
    disk.full = True
    for i in range(1, 6):
        feeder.give(alarm(i))
    assert feeder.missed == 2 and feeder.waiting == 4 and feeder.trouble, "the oldest in memory go"
    disk.full = still_full
    assert feeder.close(0.05)
    store = Store()
    assert SpoolFeeder("db", store, lambda alarm: None, Spool(tmp_path, 1 << 20)).close(5)
    assert store.got == (["0"] if still_full else ["0", "3", "4", "5"])
    assert feeder.missed == (5 if still_full else 2)
