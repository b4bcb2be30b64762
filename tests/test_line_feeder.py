"""Sinks that are slow, dead or hang: nobody waits for them, and every event is delivered or counted."""

import threading
import time
from datetime import UTC, datetime

import numpy as np

from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.feeder import Feeder
from flowad_fast.stages.decision import Verdict


def event(i):
    return Alarm(str(i), datetime.now(UTC), "")


def record(i, **picture):
    return Record(str(i), "a", Verdict.GOOD, "pass", datetime.now(UTC), 0.1, **picture)


class Store:
    def __init__(self, failing=0):
        self.failing, self.got, self.closed, self.gate = failing, [], 0, threading.Event()
        self.gate.set()

    def publish(self, events):
        self.gate.wait()
        if self.failing:
            self.failing -= 1
            raise ConnectionError("broker away")
        self.got += [int(one.kind) for one in events]

    def close(self):
        self.closed += 1


def test_delivers_in_order_and_again_after_failures_told_once():
    store, told = Store(failing=3), []
    feeder = Feeder("mqtt", store, told.append, batch=7, pauses=(0.001, 0.004))
    for i in range(100):
        feeder.give(event(i))
    assert feeder.close(10)
    assert store.got == list(range(100)) and store.closed == 1
    assert (feeder.delivered, feeder.missed, feeder.failures, feeder.trouble) == (100, 0, 3, "")
    assert [(alarm.kind, alarm.over) for alarm in told] == [("sink failed", False), ("sink failed", True)]
    assert "broker away" in told[0].text


def test_a_hanging_sink_delays_nobody_and_all_events_are_accounted_for():
    store = Store()
    store.gate.clear()
    feeder = Feeder("slow", store, print, capacity=10, batch=5)
    start = time.monotonic()
    for i in range(1000):
        feeder.give(event(i))
    assert time.monotonic() - start < 1
    assert not feeder.close(0.05)
    feeder.give(event(1000))
    assert feeder.delivered == 0 and feeder.missed == 1001
    store.gate.set()


def test_only_the_newest_that_wait_keep_their_pictures():
    """A dead sink must not cost the memory of a thousand frames; what it is owed beside them it still gets."""
    store, got = Store(), []
    store.gate.clear()
    store.publish = lambda events: (store.gate.wait(), got.extend(events))
    feeder = Feeder("pictures", store, print, capacity=30, pictures=8, batch=4)
    picture = {"frame": np.zeros((4, 4, 3), np.uint8), "heat": np.zeros((2, 2), np.float32)}
    feeder.give(record(0, **picture))
    while feeder._queue:  # the thread holds the first
        time.sleep(1e-3)
    for i in range(1, 21):
        feeder.give(record(i, **picture) if i % 3 else event(i))
    assert sum(one.frame is not None for one in feeder._queue if isinstance(one, Record)) == 6
    store.gate.set()
    assert feeder.close(10) and feeder.missed == 0
    kept = [one.frame is not None for one in got if isinstance(one, Record)]
    assert len(got) == 21 and kept == [True] + [False] * 8 + [True] * 6
    assert all((one.frame is None) == (one.heat is None) for one in got if isinstance(one, Record))
    assert feeder.pictures_lost == 8


def test_a_dead_sink_is_given_up_at_the_limit():
    store = Store(failing=10**9)
    feeder = Feeder("dead", store, lambda alarm: None, pauses=(0.001, 0.01))
    for i in range(20):
        feeder.give(event(i))
    assert feeder.close(0.1)
    assert (feeder.delivered, feeder.missed, store.got, store.closed) == (0, 20, [], 1)
