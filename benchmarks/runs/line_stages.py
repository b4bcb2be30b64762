"""What faults of the campaign need beside a line: servers, a disk, a camera; made before it starts, closed after it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flowad_fast.benchmarks.runs.line_camera import CameraFeed
from flowad_fast.benchmarks.runs.line_servers import Broker, Hook, small_disk
from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.errors import EngineUnavailableError

RATE = 8.0
"""Parts a second: about a third of what one core judges with the demo model."""


@dataclass
class Stage:
    """What a fault needs beside the line: made before the line starts, closed after it has ended.

    Attributes:
        sinks: of the settings.
        served: names of what must have every outcome, and how to ask which parts it has.
        broker, hook: where the fault is about them.
        camera: what the parts come from; None: files.
        limited: the line's process may write no byte instead of a disk that is full.
        note: what is to be known of how it was done.
    """

    sinks: tuple[dict[str, object], ...] = ()
    served: dict[str, Callable[[], set[str]]] = field(default_factory=dict)
    broker: Broker | None = None
    hook: Hook | None = None
    camera: CameraFeed | None = None
    limited: bool = False
    note: str = ""


@contextmanager
def plain(folder: Path, work: Work) -> Iterator[Stage]:
    """Nothing."""
    yield Stage()


@contextmanager
def with_broker(folder: Path, work: Work) -> Iterator[Stage]:
    """Mosquitto and a listener."""
    broker = Broker(folder / "broker")
    try:
        sink = {"kind": "mqtt", "host": "127.0.0.1", "port": broker.port, "timeout": 3}
        yield Stage((sink,), {"the broker's listener": lambda: set(broker.parts)}, broker=broker)
    finally:
        broker.close()


@contextmanager
def with_hook(folder: Path, work: Work) -> Iterator[Stage]:
    """An address for a webhook."""
    hook = Hook()
    try:
        sink = {"kind": "webhook", "url": hook.url, "timeout": 5}
        yield Stage((sink,), {"the webhook's address": lambda: set(hook.parts)}, hook=hook)
    finally:
        hook.close()


@contextmanager
def with_small_disk(folder: Path, work: Work) -> Iterator[Stage]:
    """Everything that the line writes is on a disk of 16 MB; a broker is not. Without one, a limit of the process."""
    (folder / "line" / "out").mkdir(parents=True)
    with ExitStack() as stack:
        limited, note = False, "a file system of 16 MB in memory was filled"
        try:
            stack.enter_context(small_disk(folder / "line" / "out"))
        except EngineUnavailableError as error:
            limited, note = True, f"{error}; so the line's process was limited to files of no bytes (RLIMIT_FSIZE)"
        stage = stack.enter_context(with_broker(folder, work))
        stage.limited, stage.note = limited, note
        yield stage


@contextmanager
def with_camera(folder: Path, work: Work) -> Iterator[Stage]:
    """A GigE Vision camera in software, instead of a folder that files are put into."""
    camera = CameraFeed(work, folder, RATE)
    try:
        yield Stage(camera=camera)
    finally:
        camera.stop()
