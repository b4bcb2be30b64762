"""What a sink that promises delivery has not taken yet, on disk: in order, over restarts, within a budget."""

import json
import os
from collections import deque
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path

from flowad_fast.line.event import Alarm, Record, Sink
from flowad_fast.line.feeder import Feeder
from flowad_fast.line.sinks.rows import from_row, to_row


class Spool:
    """Lines in files that are numbered; a file is deleted once all of it was taken. Its user holds a lock.

    What was put is kept when the process is killed. A kill between delivery and `taken` gives lines once more.
    """

    def __init__(self, folder: Path, budget: int, segment: int | None = None) -> None:
        """Find what earlier runs have left.

        Args:
            folder: of this spool alone.
            budget: bytes on disk, at most; beyond it the oldest file goes.
            segment: bytes of a file.
        """
        self._folder, self._budget = folder, budget
        self._segment = segment or max(4096, min(1 << 20, budget // 8))
        folder.mkdir(parents=True, exist_ok=True)
        self._sizes = {int(path.stem): path.stat().st_size for path in folder.glob("*.jsonl") if path.stem.isdecimal()}
        self._place, self._fresh = folder / "taken", folder / "taken.new"
        self._paths: dict[int, Path] = {}
        self._first, self._offset = self._taken_until()
        for number in [one for one in self._sizes if one < self._first]:
            self._drop(number)
        self._last = max(self._sizes, default=self._first) + 1  # a new file: the end of the old one may be torn
        self._file = -1
        self._read: tuple[int, int] | None = None
        self.waiting = sum(self._lines(number) for number in self._sizes)
        self.dropped = 0

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self._sizes.values())

    def put(self, line: bytes) -> None:
        """Append a line, which has no line break; OSError on a full disk, when it is not in the spool."""
        data = line + b"\n"
        if self._file >= 0 and self._sizes[self._last] + len(data) > self._segment:
            os.close(self._file)
            self._file, self._last = -1, self._last + 1
        if self._file < 0:
            self._file = os.open(self._path(self._last), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._sizes[self._last] = 0
        try:
            written = os.write(self._file, data)
        except OSError:
            written = 0
        if written != len(data):
            os.ftruncate(self._file, self._sizes[self._last])
            raise OSError(f"{self._folder}: cannot be written; free space on its disk")
        self._sizes[self._last] += len(data)
        self.waiting += 1
        while self.size > self._budget and len(self._sizes) > 1:
            oldest = min(self._sizes)
            lost = self._lines(oldest)
            self.dropped += lost
            self.waiting -= lost
            self._drop(oldest)
            self._read = None  # what is being delivered may be part of it

    def next(self, count: int) -> list[bytes]:
        """The oldest lines, at most `count`, from one file; `taken` says that they need not be given again."""
        while self._sizes:
            number = min(self._sizes)
            start = self._offset if number == self._first else 0
            with self._path(number).open("rb") as file:
                file.seek(start)
                lines: list[bytes] = []
                while len(lines) < count and (line := file.readline()).endswith(b"\n"):
                    lines.append(line[:-1])
                    start += len(line)
            if lines:
                self._read = (number, start)
                return lines
            if number == self._last and self._file >= 0:
                return []
            self._drop(number)  # all of it was taken; a torn end is no line
        return []

    def taken(self, count: int) -> None:
        """The lines of the last `next` were delivered; where a full disk cannot note it, a restart gives them again."""
        if self._read is None:
            return  # they were dropped meanwhile, and are counted there
        self._first, self._offset = self._read
        self._read = None
        self.waiting -= count
        with suppress(OSError):  # the next one notes this one too
            self._fresh.write_text(f"{self._first} {self._offset}")
            os.replace(self._fresh, self._place)

    def all(self) -> Iterator[bytes]:
        """All lines that wait, oldest first; none of them is taken by that."""
        for number in sorted(self._sizes):
            with self._path(number).open("rb") as file:
                file.seek(self._offset if number == self._first else 0)
                yield from (line[:-1] for line in file if line.endswith(b"\n"))

    def close(self) -> None:
        """Close the file; what waits stays on disk."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _taken_until(self) -> tuple[int, int]:
        try:
            first, offset = self._place.read_text().split()
            return int(first), int(offset)
        except (OSError, ValueError):
            return min(self._sizes, default=1), 0

    def _path(self, number: int) -> Path:
        """Made once: every new `Path` puts its names into a table of the interpreter, which grows with them."""
        if number not in self._paths:
            self._paths[number] = self._folder / f"{number:09d}.jsonl"
        return self._paths[number]

    def _drop(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)
        del self._sizes[number], self._paths[number]

    def _lines(self, number: int) -> int:
        data = self._path(number).read_bytes()
        return data.count(b"\n", self._offset if number == self._first else 0)


def kept_records(spool: Spool, parts: Container[str]) -> dict[str, Record]:
    """The records of `parts` that wait in a spool."""
    found = {}
    for line in spool.all():
        try:
            event = from_row(json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(event, Record) and event.part in parts:
            found[event.part] = event
    return found


class SpoolFeeder(Feeder):
    """A feeder whose events wait on disk. `give` writes them before it returns, so that no kill loses them.

    While the disk is full they wait in memory, at most `capacity` of them, for a sink elsewhere must not go without.
    Pictures are not kept. `missed` counts what the budget, or more events than that, has cost.
    """

    def __init__(
        self,
        name: str,
        sink: Sink,
        tell: Callable[[Alarm], None],
        spool: Spool,
        *,
        capacity: int = 1024,
        batch: int = 64,
        pauses: tuple[float, float] = (0.1, 30.0),
    ) -> None:
        """Start the thread; what earlier runs left is delivered first."""
        self._spool, self._lines = spool, list[bytes]()
        self._unwritten: deque[bytes] = deque()  # later than all that is on disk
        self._from_disk = True  # where the lines that are held came from
        super().__init__(name, sink, tell, capacity=capacity, batch=batch, pauses=pauses)

    @property
    def waiting(self) -> int:
        """Events that the sink has not taken."""
        return self._spool.waiting + len(self._unwritten) + (0 if self._from_disk else len(self._lines))

    def give(self, event: Record | Alarm) -> None:
        """Write an event to disk; never waits for the sink."""
        line = json.dumps(to_row(event)).encode()
        with self._change:
            if self._closed:
                self.missed += 1
                return
            self._unwritten.append(line)
            self._write()
            self._change.notify()

    def _write(self) -> None:
        """Write what waits in memory to disk, in order, as far as that has room."""
        before = self._spool.dropped
        try:
            while self._unwritten:
                self._spool.put(self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            if len(self._unwritten) > self._capacity:
                self._unwritten.popleft()
                self.missed += 1
                self.trouble = self.trouble or str(error)
        self.missed += self._spool.dropped - before

    def _fill(self) -> None:
        while not self._held and (lines := self._next_lines()):
            self._lines = lines
            for line in lines:
                try:
                    self._held.append(from_row(json.loads(line)))
                except (ValueError, KeyError, TypeError):
                    self.missed += 1  # another version's, or a damaged disk's: it must not hold up the others
            if not self._held:
                self._done()

    def _next_lines(self) -> list[bytes]:
        lines = self._spool.next(self._batch)
        self._from_disk = bool(lines)
        while not self._from_disk and self._unwritten and len(lines) < self._batch:
            lines.append(self._unwritten.popleft())
        return lines

    def _done(self) -> None:
        if self._from_disk:
            self._spool.taken(len(self._lines))
        self._lines = []

    def _give_up(self) -> None:
        self._held = []
        if not self._from_disk:
            self._unwritten.extendleft(reversed(self._lines))
            self._lines = []
        self._write()
        self.missed += len(self._unwritten)  # the disk is still full; all the others stay on it
        self._unwritten.clear()
        self._spool.close()
