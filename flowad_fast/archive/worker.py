"""What runs in an actor of Ray Data: groups of photos, one at a time, with a bundle that is loaded once.

An actor that dies is started again by Ray, and its group is judged again. A ledger outside remembers what was begun, so
that a photo which ends its actor every time is found and gets its row, instead of stopping the job for ever.
"""

import os
import pickle
import platform
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from flowad_fast.engines.cores import limit_process
from flowad_fast.errors import EngineUnavailableError, FlowADError

if TYPE_CHECKING:
    import pyarrow

DEATHS = 2
"""So often an actor may die with the same call, and then with the same single photo; another time is too many."""
LOST = "its worker died each time that it was judged (not enough memory for a photo of this size?); judge it alone"
_Item = TypeVar("_Item")
_Outcome = TypeVar("_Outcome")


class Task(ABC, Generic[_Item, _Outcome]):
    """What a worker does; it travels as a pickle before `open`, and stays in its process afterwards."""

    batch: int
    """Photos per call of the detector, at most; a group begins at a multiple of it in the order of all photos."""

    @abstractmethod
    def open(self) -> None:
        """Load what judging needs."""

    @abstractmethod
    def judge(self, items: Sequence[_Item]) -> list[_Outcome]:
        """What becomes of each of the items, which begin at a multiple of `batch`.

        Raises:
            FlowADError: the job cannot be done.
        """

    @abstractmethod
    def lost(self, item: _Item) -> _Outcome:
        """What becomes of an item that ends every process which judges it."""


class Ledger:
    """What was begun and did not end: an actor of its own, that outlives workers."""

    def __init__(self) -> None:
        self._begun: set[Hashable] = set()
        self._deaths: Counter[Hashable] = Counter()

    def begin(self, what: Hashable) -> int:
        """Begin something; how often it was begun before without an end."""
        if what in self._begun:
            self._deaths[what] += 1
        self._begun.add(what)
        return self._deaths[what]

    def end(self, what: Hashable) -> None:
        """It has ended well, or with an error."""
        self._begun.discard(what)


def packed(number: int, items: Sequence[Any]) -> bytes:
    """A group of items, compressed: paths are alike, and millions of them wait in Ray's object store."""
    return zlib.compress(pickle.dumps((number, items), pickle.HIGHEST_PROTOCOL), 1)


class Worker:
    """The class that Ray Data makes actors of.

    Args:
        task: what to do.
        ledger: the handle of a `Ledger`.
        threads: CPU threads of its engine.
        folder: where relative paths begin.
    """

    def __init__(self, task: Task[Any, Any], ledger: Any, threads: int, folder: str) -> None:
        self._task, self._ledger, self._threads, self._folder = task, ledger, threads, folder
        self._ready = False

    def __call__(self, batch: "pyarrow.Table") -> "pyarrow.Table":
        """A table of one `packed` group, to one of its pickled number and outcomes, or error."""
        import pyarrow as pa

        number, items = pickle.loads(zlib.decompress(batch.column("group")[0].as_py()))
        done: tuple[int, Any]
        try:
            self._start()
            done = number, self._judge(number, items)
        except FlowADError as error:
            done = number, error
        return pa.table({"done": pa.array([pickle.dumps(done, pickle.HIGHEST_PROTOCOL)], pa.large_binary())})

    def _start(self) -> None:
        import ray

        if self._ready:
            return
        me = "start", ray.get_runtime_context().get_actor_id()
        if self._begin(me) > DEATHS:
            raise EngineUnavailableError("a worker died each time that it loaded the model; give it more memory")
        limit_process(self._threads)
        try:
            os.chdir(self._folder)
        except OSError as error:
            raise FlowADError(
                f"{self._folder}: cannot be entered on {platform.node()} ({error.strerror}); every node needs the "
                "photos and the bundle at the same place"
            ) from None
        try:
            self._task.open()
        finally:
            self._end(me)
        self._ready = True

    def _judge(self, number: int, items: Sequence[Any]) -> list[Any]:
        """The outcomes of a group: at once, or in pieces if a worker has died with it."""
        size = self._task.batch
        if self._begin((number,)) == 0:
            done = self._task.judge(items)
        else:
            done = [one for at in range(0, len(items), size) for one in self._call(number, at, items[at : at + size])]
        self._end((number,))
        return done

    def _call(self, number: int, at: int, items: Sequence[Any]) -> list[Any]:
        if self._begin((number, at)) < DEATHS:
            done = self._task.judge(items)
        else:
            done = [self._alone(number, at + i, item) for i, item in enumerate(items)]
        self._end((number, at))
        return done

    def _alone(self, number: int, place: int, item: Any) -> Any:
        if self._begin((number, place, "alone")) >= DEATHS:
            return self._task.lost(item)
        (done,) = self._task.judge([item])
        self._end((number, place, "alone"))
        return done

    def _begin(self, what: Hashable) -> int:
        import ray

        deaths: int = ray.get(self._ledger.begin.remote(what))
        return deaths

    def _end(self, what: Hashable) -> None:
        import ray

        ray.get(self._ledger.end.remote(what))
