"""Worker processes: one fresh process per case, asked command by command."""

import contextlib
import multiprocessing
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from flowad_fast.benchmarks.measure.worker import Worker, WorkerError, serve

PRELOAD = ("flowad_fast.benchmarks.measure.worker", "flowad_fast.benchmarks.runs.gpu_check")
"""What the server imports once for all processes: the worker, and what a process would import again as its main."""
P = ParamSpec("P")
T = TypeVar("T")


class Process:
    """A worker process; `ask` sends one command to its worker, of some `kind`, and waits for the answer.

    It is forked from a server that has imported everything and computed nothing: as clean as a new interpreter,
    without paying seconds of imports per row. An answer may take `timeout` seconds, and none is waited for beyond
    `deadline`, a time of `time.monotonic`.
    """

    def __init__(self, log: Path, timeout: float, deadline: float = float("inf"), kind: type[Worker] = Worker) -> None:
        self.log, self.timeout, self.deadline = log, timeout, deadline
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, str(log), kind), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, do: Callable[Concatenate[Any, P], T], *arguments: P.args, **more: P.kwargs) -> T:
        """What the worker's method returns.

        Raises:
            WorkerError: it did not: not available, out of memory, failed, timeout, or the process crashed.
        """
        name = do.__name__
        try:
            self._pipe.send((name, arguments, more))
            allowed = max(min(self.timeout, self.deadline - time.monotonic()), 0.0)
            if not self._pipe.poll(allowed if allowed < threading.TIMEOUT_MAX else None):
                self._process.kill()
                self._process.join(10)
                raise WorkerError("timeout", f"{name} took longer than {allowed:.0f} s")
            answer: Any = self._pipe.recv()
        except (EOFError, OSError):
            raise self._crash(name) from None
        if isinstance(answer, WorkerError):
            raise answer
        return answer  # type: ignore[no-any-return]

    @property
    def alive(self) -> bool:
        """Whether it can still be asked."""
        return self._process.is_alive()

    def _crash(self, name: str) -> WorkerError:
        self._process.join()
        code = self._process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = self.log.read_text(errors="replace") if self.log.exists() else ""
        last = said.strip().splitlines()[-1:]
        return WorkerError("crashed", f"{how} during {name}{': ' + last[0][:300] if last else ''}")

    def close(self) -> None:
        """End the process, by force after some patience."""
        self._pipe.close()
        self._process.join(10)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def started(
    folder: Path, timeout: float, deadline: float = float("inf"), kind: type[Worker] = Worker
) -> Iterator[Process]:
    """A worker process that ends with the block; it logs into `folder`. See `Process`."""
    process = Process(folder / f"{uuid.uuid4().hex}.log", timeout, deadline, kind)
    try:
        yield process
    finally:
        process.close()
