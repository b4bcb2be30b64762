"""A sink's own thread and bounded queue: however slow or dead the sink, giving it an event takes no time."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

from flowad_fast.line.event import Alarm, Record, Sink

_log = logging.getLogger(__name__)


class Feeder:
    """Events to one sink, in order; asked again, with growing pauses, while the sink raises.

    Where more events wait than `capacity`, the oldest are dropped and counted in `missed`. They are kept in memory
    only; `spool.SpoolFeeder` keeps them on disk. All but the newest `pictures` wait without frame and map: a frame can
    have 15 MB. Safe from many threads.

    Attributes:
        name: of the sink, in alarms.
        delivered, missed, failures: events that the sink took, events that it never got, calls that raised.
        pictures_lost: records that lost frame and map while they waited.
        trouble: what the sink raised last, "" while it works.
    """

    def __init__(
        self,
        name: str,
        sink: Sink,
        tell: Callable[[Alarm], None],
        *,
        capacity: int = 1024,
        pictures: int = 64,
        batch: int = 64,
        pauses: tuple[float, float] = (0.1, 30.0),
    ) -> None:
        """Start the thread.

        Args:
            name: of the sink.
            sink: its methods are called from this thread only.
            tell: gets an alarm when the sink begins to fail and when it works again; called from this thread.
            capacity: events that wait, at most.
            pictures: those of them that wait with frame and map; the batch that is being delivered has as many beside
                them.
            batch: events in one call of the sink, at most.
            pauses: first and longest pause after a failure, seconds; each is twice the one before.
        """
        self.name, self._sink, self._tell = name, sink, tell
        self._capacity, self._pictures, self._batch, self._pauses = capacity, pictures, min(batch, pictures), pauses
        self.delivered = self.missed = self.failures = self.pictures_lost = 0
        self.trouble = ""
        self._queue: deque[Record | Alarm] = deque()
        self._held: list[Record | Alarm] = []
        self._until: float | None = None  # monotonic: when closing ends, None while open
        self._closed = False  # closing has ended: nothing is taken any more
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Events that the sink has not taken."""
        return len(self._queue) + len(self._held)

    def give(self, event: Record | Alarm) -> None:
        """Put an event into the queue; never waits for the sink. After `close` it counts as missed."""
        with self._change:
            if self._until is not None:
                self.missed += 1
                return
            if len(self._queue) >= self._capacity:
                self._queue.popleft()
                self.missed += 1
            self._queue.append(event)
            self._thin()
            self._change.notify()

    def close(self, limit: float) -> bool:
        """Deliver what waits, but give up after `limit` seconds, when the rest counts as missed.

        Returns whether the thread has ended; a sink that hangs in a call keeps its daemon thread.
        """
        with self._change:
            self._until = time.monotonic() + limit
            self._change.notify()
        self._thread.join(limit)
        with self._change:
            self._closed = True
            self._give_up()
        self._thread.join(0.2)
        return not self._thread.is_alive()

    def _run(self) -> None:
        pause = self._pauses[0]
        while self._next():
            try:
                self._sink.publish(list(self._held))
            except Exception as error:
                self._failed(error)
                with self._change:
                    end = time.monotonic() + pause
                    while (left := min(end, self._until or end) - time.monotonic()) > 0:
                        self._change.wait(left)
                pause = min(2 * pause, self._pauses[1])
            else:
                with self._change:
                    if not self._closed:  # otherwise `close` has given them up
                        self.delivered += len(self._held)
                        self._done()
                        self._held = []
                pause = self._pauses[0]
                self._works()
        try:
            self._sink.close()
        except Exception as error:
            _log.warning("sink %s: closing failed: %s", self.name, error)

    def _next(self) -> bool:
        """Wait until there is something to publish; False when the thread is to end."""
        with self._change:
            self._fill()
            while not self._held and self._until is None:
                self._change.wait()
                self._fill()
            if self._closed or self._until is not None and time.monotonic() >= self._until:
                return False
            return bool(self._held)

    def _fill(self) -> None:
        """Hold what is to be published next, where anything waits."""
        while self._queue and len(self._held) < self._batch:
            self._held.append(self._queue.popleft())

    def _thin(self) -> None:
        """One event more than before: take the picture of the newest that is too old to keep it."""
        if len(self._queue) > self._pictures:
            event = self._queue[-1 - self._pictures]
            if isinstance(event, Record) and event.frame is not None:
                self._queue[-1 - self._pictures] = event.without_pictures()
                self.pictures_lost += 1

    def _done(self) -> None:
        """What is held was delivered."""

    def _give_up(self) -> None:
        """Closing is over: count what is left."""
        self.missed += self.waiting
        self._queue.clear()
        self._held = []

    def _failed(self, error: Exception) -> None:
        first, self.trouble = not self.trouble, f"{type(error).__name__}: {error}"
        self.failures += 1
        if first:
            self._tell(Alarm("sink failed", datetime.now(UTC), f"sink {self.name}: {self.trouble}"))

    def _works(self) -> None:
        if self.trouble:
            self.trouble = ""
            self._tell(Alarm("sink failed", datetime.now(UTC), f"sink {self.name} works again", over=True))
