"""The faults of the campaign: what each does to a line that runs, and within how long the line must be back.

Every limit is for a loaded computer: starting the engine takes seconds there, and a camera that was lost is read again
after pauses that double.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flowad_fast.benchmarks.runs.line_faulty import CLOCK, RAISE
from flowad_fast.benchmarks.runs.line_rig import (
    CALL,
    DRAIN,
    FROZEN,
    HALT,
    KILL,
    START,
    TERM,
    TORN,
    WHOLE,
    Rig,
    until,
)
from flowad_fast.benchmarks.runs.line_servers import Broker, Hook, fill, small_disk
from flowad_fast.errors import EngineUnavailableError

FAULTY = "flowad_fast.benchmarks.runs.line_faulty"
RATE = 8.0
"""Parts a second: about a third of what one core judges with the demo model."""
OVERLOAD = 60.0
"""Parts a second where the line is to be ended while parts wait."""
LASTS = 2.0
"""Seconds that a fault with a duration lasts."""
SERVED = 30.0
"""Seconds within which a sink that works again must have everything."""


@dataclass
class Stage:
    """What a fault needs beside the line: made before the line starts, closed after it has ended.

    Attributes:
        sinks: of the settings.
        served: names of what must have every outcome, and how to ask which parts it has.
        broker, hook: where the fault is about them.
        limited: the line's process may write no byte instead of a disk that is full.
        note: what is to be known of how it was done.
    """

    sinks: tuple[dict[str, object], ...] = ()
    served: dict[str, Callable[[], set[str]]] = field(default_factory=dict)
    broker: Broker | None = None
    hook: Hook | None = None
    limited: bool = False
    note: str = ""


@contextmanager
def plain(folder: Path) -> Iterator[Stage]:
    """Nothing."""
    yield Stage()


@contextmanager
def with_broker(folder: Path) -> Iterator[Stage]:
    """Mosquitto and a listener."""
    broker = Broker(folder / "broker")
    try:
        sink = {"kind": "mqtt", "host": "127.0.0.1", "port": broker.port, "timeout": 3}
        yield Stage((sink,), {"the broker's listener": lambda: set(broker.parts)}, broker=broker)
    finally:
        broker.close()


@contextmanager
def with_hook(folder: Path) -> Iterator[Stage]:
    """An address for a webhook."""
    hook = Hook()
    try:
        sink = {"kind": "webhook", "url": hook.url, "timeout": 5}
        yield Stage((sink,), {"the webhook's address": lambda: set(hook.parts)}, hook=hook)
    finally:
        hook.close()


@contextmanager
def with_small_disk(folder: Path) -> Iterator[Stage]:
    """Everything that the line writes is on a disk of 16 MB; a broker is not. Without one, a limit of the process."""
    (folder / "line" / "out").mkdir(parents=True)
    with ExitStack() as stack:
        limited, note = False, "a file system of 16 MB in memory was filled"
        try:
            stack.enter_context(small_disk(folder / "line" / "out"))
        except EngineUnavailableError as error:
            limited, note = True, f"{error}; so the line's process was limited to files of no bytes (RLIMIT_FSIZE)"
        stage = stack.enter_context(with_broker(folder))
        stage.limited, stage.note = limited, note
        yield stage


Problems = list[str]
Act = Callable[[Rig, Stage], Problems]


@dataclass(frozen=True)
class Fault:
    """One row of the campaign.

    Attributes:
        name: for `--faults`.
        title: for people.
        how: where and how it is caused.
        act: cause it and end it; what did not happen as it must, in words.
        limit: seconds until the line must be back.
        expected: results without a verdict that the fault must show at least once, otherwise it was none.
        module: the command that runs.
        stage: what it needs.
        sudden: whether the time until the line is back counts from the moment at which it is caused; otherwise from its
            end.
    """

    name: str
    title: str
    how: str
    act: Act
    limit: float
    expected: tuple[str, ...] = ()
    module: str = "flowad_fast.cli.line"
    stage: Callable[[Path], AbstractContextManager[Stage]] = plain
    sudden: bool = False


def unplugged(rig: Rig, stage: Stage) -> Problems:
    """The camera's folder is gone for a while."""
    rig.feed.pause()
    away = rig.incoming.with_name("unplugged")
    rig.incoming.rename(away)
    seen = until(lambda: not rig.ready(), LASTS + 1)
    time.sleep(LASTS)
    away.rename(rig.incoming)
    rig.feed.resume()
    return [] if seen else ["the line said ready while its camera was gone"]


def torn(rig: Rig, stage: Stage) -> Problems:
    """Half of a file is all that comes."""
    return _fed(rig, TORN)


def frozen(rig: Rig, stage: Stage) -> Problems:
    """The camera gives the same picture again and again."""
    return _fed(rig, FROZEN)


def broker_down(rig: Rig, stage: Stage) -> Problems:
    """The broker is killed and comes back."""
    assert stage.broker is not None
    stage.broker.kill()
    time.sleep(LASTS)
    problems = [] if rig.ready() else ["the line was not ready while only its broker was down"]
    stage.broker.start()
    return problems


def disk_full(rig: Rig, stage: Stage) -> Problems:
    """Not a byte can be written for a while."""
    assert stage.broker is not None
    before = len(stage.broker.parts)
    if stage.limited:
        rig.process.rlimit(psutil.RLIMIT_FSIZE, (0, -1))
    else:
        fill(rig.out / "filler")
    time.sleep(LASTS)
    problems = [] if rig.ready() else ["the line was not ready while only its disk was full"]
    if len(stage.broker.parts) - before < LASTS * rig.feed.rate / 4:
        problems.append(f"the broker got {len(stage.broker.parts) - before} outcomes while the disk was full")
    if stage.limited:
        rig.process.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
    else:
        (rig.out / "filler").unlink()
    return problems


def webhook_slow(rig: Rig, stage: Stage) -> Problems:
    """The address takes its time, and sometimes longer than the sink waits."""
    assert stage.hook is not None
    stage.hook.delay = 1.5
    time.sleep(LASTS)
    stage.hook.delay = 6.0  # beyond the sink's limit of 5 s
    time.sleep(LASTS)
    stage.hook.delay = 0.0
    return []


def hammered(rig: Rig, stage: Stage) -> Problems:
    """Eight clients ask the page without a pause."""
    end, answers = time.monotonic() + LASTS, dict[int, int]()

    def ask(path: str) -> None:
        while time.monotonic() < end:
            try:
                status = rig.ask("GET", path, timeout=5)[0]
            except OSError:
                status = 0
            answers[status] = answers.get(status, 0) + 1

    threads = [threading.Thread(target=ask, args=(path,)) for path in ("/", "/api/state", "/metrics", "/x") * 2]
    for thread in threads:
        thread.start()
    probes = []
    while time.monotonic() < end:
        probes.append(rig.ready())
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    asked = sum(answers.values())
    problems = [] if asked > 100 * LASTS else [f"only {asked} requests were made, so it was not hammered"]
    return problems + ([] if all(probes) else [f"{probes.count(False)} of {len(probes)} probes failed meanwhile"])


def hanging(rig: Rig, stage: Stage) -> Problems:
    """The detector's process stands still."""
    rig.child.send_signal(HALT)
    return _restarted(rig)


def killed(rig: Rig, stage: Stage) -> Problems:
    """The detector's process is gone."""
    rig.child.send_signal(KILL)
    return _restarted(rig)


def raising(rig: Rig, stage: Stage) -> Problems:
    """The detector raises in its process, until it is started again."""
    (rig.folder / RAISE).touch()
    found = _restarted(rig)
    (rig.folder / RAISE).unlink()
    return found


def clock_jumps(rig: Rig, stage: Stage) -> Problems:
    """The wall clock is set an hour forward, a day back, and right again."""
    for shift in (3600.0, -86400.0, 0.0):
        fresh = rig.folder / f"{CLOCK}.new"
        fresh.write_text(str(shift))
        fresh.replace(rig.folder / CLOCK)
        time.sleep(LASTS / 2)
    results = [row["result"] for row in rig.rows()]
    late = results.count("late")
    return [f"{late} of {len(results)} parts were late while only the wall clock jumped"] if late > 3 else []


def killed_line(rig: Rig, stage: Stage) -> Problems:
    """Kill -9 of the whole line under more load than it can judge; a service manager starts it again."""
    _overload(rig)
    child = rig.child
    rig.signal(KILL)
    rig.feed.pause()
    rig.feed.rate = RATE
    problems = [] if until(lambda: not child.is_running(), 5) else ["the detector's process outlived the line"]
    rig.start()
    rig.feed.resume()
    return problems


def terminated(rig: Rig, stage: Stage) -> Problems:
    """SIGTERM under more load than it can judge; it drains, and is started again."""
    _overload(rig)
    start = time.monotonic()
    code = rig.signal(TERM)
    took = time.monotonic() - start
    problems = [] if code == 0 else [f"it ended with exit code {code}: {rig.words()}"]
    if took > DRAIN + 2:
        problems.append(f"it took {took:.1f} s to end, the limit is {DRAIN:g} s")
    rig.feed.pause()
    rig.feed.rate = RATE
    rig.start()
    rig.feed.resume()
    until(lambda: rig.judged_since(start), CALL + START)  # what was left undone is named before that
    if left := sum("killed" in row["reason"] for row in rig.rows()):
        problems.append(f"{left} parts had no outcome when it ended, the next start had to name them")
    return problems


def altered(rig: Rig, stage: Stage) -> Problems:
    """A bundle with one byte changed is to be activated."""
    other = rig.work.bundle.parent / "altered"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(rig.work.bundle, other)
    manifest = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(manifest + "\n")  # another bundle by its hash, so that it is looked at
    largest = max((one for one in other.iterdir() if one.suffix != ".json"), key=lambda one: one.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    status, body = rig.ask("POST", "/api/activate", {"bundle": "altered"})
    if status != 202:
        return [f"the request was answered with {status}: {body.decode(errors='replace')}"]

    def state() -> str:
        return str(json.loads(rig.ask("GET", "/api/state")[1])["activation"]["state"])

    over = until(lambda: state() not in ("loading", "shadow"), 30)
    found = state()
    shutil.rmtree(other)
    return [] if over and found == "refused" else [f"the activation ended as {found}, expected refused"]


def _fed(rig: Rig, way: str) -> Problems:
    rig.feed.way = way
    time.sleep(LASTS)
    rig.feed.way = WHOLE
    return []


def _restarted(rig: Rig) -> Problems:
    """Wait until the line has noticed that its engine failed."""
    if until(lambda: "engine failed" in rig.alarms(), CALL + 3):
        return []
    return ["the line did not say that its engine had failed"]


def _overload(rig: Rig) -> None:
    rig.feed.rate = OVERLOAD
    time.sleep(LASTS)


FAULTS = (
    Fault("unplugged", "camera unplugged", "its folder is renamed away for 2 s and back", unplugged, 15),
    Fault("incomplete", "incomplete frames", "files are cut in half for 2 s", torn, 10, ("source lost",)),
    Fault("frozen", "frozen frames", "the same picture for 2 s", frozen, 10, ("invalid",)),
    Fault("broker", "broker down", "mosquitto is killed with SIGKILL, and started again after 2 s", broker_down, 10,
          stage=with_broker),
    Fault("disk", "disk full",
          "no byte of journal, spools, JSON lines and database can be written for 2 s", disk_full, 10,
          stage=with_small_disk),
    Fault("webhook", "slow webhook", "answers take 1.5 s, then longer than the sink waits, for 2 s each", webhook_slow,
          10, stage=with_hook),
    Fault("page", "page hammered", "eight clients without a pause for 2 s", hammered, 10),
    Fault("hanging", "engine hanging", "SIGSTOP of the detector's process", hanging, 30, ("engine failed",),
          sudden=True),
    Fault("killed", "engine killed", "SIGKILL of the detector's process", killed, 30, ("engine failed",), sudden=True),
    Fault("raising", "engine raising", "inside its process, through a detector that raises while a file is there",
          raising, 30, ("engine failed",), module=FAULTY, sudden=True),
    Fault("clock", "clock jumps", "inside the line, through its clock functions: an hour forward, a day back, and "
          "right again; the computer's own clock is left alone", clock_jumps, 10, module=FAULTY),
    Fault("kill-9", "kill -9 of the line", "under 60 parts a second, then started again as a service manager would",
          killed_line, 40),
    Fault("sigterm", "SIGTERM under load", "under 60 parts a second, then started again", terminated, 40),
    Fault("altered", "altered bundle activated", "one bit of its weights is changed; asked for through the page",
          altered, 10),
)  # fmt: skip
"""All of them, in the order in which they are run."""
