"""Sinks that are slow, dead or hang: nobody waits for them, and every event is delivered or counted."""

import threading
import time
from datetime import UTC, datetime

from flowad_fast.line.event import Alarm
from flowad_fast.line.feeder import Feeder


def event(i):
    return Alarm(str(i), datetime.now(UTC), "")


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


def test_a_dead_sink_is_given_up_at_the_limit():
    store = Store(failing=10**9)
    feeder = Feeder("dead", store, lambda alarm: None, pauses=(0.001, 0.01))
    for i in range(20):
        feeder.give(event(i))
    assert feeder.close(0.1)
    assert (feeder.delivered, feeder.missed, store.got, store.closed) == (0, 20, [], 1)
