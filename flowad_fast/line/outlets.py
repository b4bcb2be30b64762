"""All sinks and listeners of a line, each behind its own thread."""

import logging
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowad_fast.line.event import Alarm, Record, Sink
from flowad_fast.line.feeder import Feeder
from flowad_fast.line.health import SinkState
from flowad_fast.line.spool import Spool, SpoolFeeder, kept_records

_log = logging.getLogger(__name__)
_LISTENER = "listener "
Listener = Callable[[Record | Alarm], None]


class Outlets:
    """Gives every event to every sink. Safe from many threads once it was opened."""

    def __init__(
        self, sinks: Mapping[str, Sink], promising: Container[str], folder: Path | None, budget: int, pictures: int
    ) -> None:
        """Nothing is started yet.

        Args:
            sinks: by name.
            promising: names of those for which what they missed is kept on disk.
            folder: where that is kept; None: nowhere.
            budget: bytes on disk for each.
            pictures: that wait for each, see `Feeder`.
        """
        self._sinks, self._promising, self._folder, self._budget = dict(sinks), promising, folder, budget
        self._pictures = pictures
        self._feeders: dict[str, Feeder] = {}
        self.listeners: list[Listener] = []

    def open(self, tell: Callable[[Alarm], None], lost: Sequence[Record] = ()) -> None:
        """Start the threads.

        Args:
            tell: gets the alarms about sinks.
            lost: records for parts that a killed run had in flight. Where the kill fell between writing a part's record
                to the spools and noting so, the spools have its outcome, and every sink gets that one.
        """
        feeders: dict[str, Feeder] = {}
        spooled: dict[str, Feeder] = {}
        kept: dict[str, dict[str, Record]] = {}
        for name, sink in self._sinks.items():
            if self._folder is None or name not in self._promising:
                feeders[name] = Feeder(name, sink, tell, pictures=self._pictures)
            else:
                spool = Spool(self._folder / name, self._budget)
                kept[name] = kept_records(spool, {record.part for record in lost}) if lost else {}
                spooled[name] = SpoolFeeder(name, sink, tell, spool)
        for number, listener in enumerate(self.listeners, 1):
            name = f"{_LISTENER}{number}"
            feeders[name] = Feeder(name, _Listening(listener), tell, pictures=self._pictures)
        self._feeders = feeders | spooled  # those without a spool first: a gate must not wait for a disk
        told = {part: record for one in kept.values() for part, record in one.items()}
        for record in lost:
            for name, feeder in self._feeders.items():
                if record.part not in kept.get(name, {}):
                    feeder.give(told.get(record.part, record))

    def give(self, event: Record | Alarm) -> None:
        """Give an event to all; waits for none."""
        for feeder in self._feeders.values():
            feeder.give(event)

    def states(self) -> dict[str, SinkState]:
        """By name."""
        return {
            name: SinkState(one.delivered, one.waiting, one.missed, one.failures, one.trouble, one.pictures_lost)
            for name, one in self._feeders.items()
        }

    def close(self, limit: float) -> None:
        """Let all deliver what waits, side by side, for at most `limit` seconds.

        Listeners come first, for a third of it at most: what they tell, the monitor's alarms, still reaches the sinks.
        """
        end = time.monotonic() + limit
        listening = [one for name, one in self._feeders.items() if name.startswith(_LISTENER)]
        _close(listening, limit / 3)
        others = [one for one in self._feeders.values() if one not in listening]
        _close(others, max(0.0, end - time.monotonic()))


def _close(feeders: Sequence[Feeder], limit: float) -> None:
    threads = [threading.Thread(target=one.close, args=(limit,), daemon=True) for one in feeders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit + 0.5)


@dataclass(frozen=True)
class _Listening:
    """A function as a sink."""

    listener: Listener

    def publish(self, events: list[Record | Alarm]) -> None:
        """Call it for each; what it raises is the listener's loss, for a second call would repeat the others."""
        for event in events:
            try:
                self.listener(event)
            except Exception:  # a stranger's code may raise anything, and the line goes on
                _log.exception("a listener of the line raised")

    def close(self) -> None:
        """Nothing is open."""
