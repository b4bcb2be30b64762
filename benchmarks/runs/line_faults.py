"""The faults of the campaign: what each does to a line that runs, and within how long the line must be back.

Every limit is for a loaded computer: starting the engine takes seconds there, and a camera that was lost is read again
after pauses that double.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil

from flowad_fast.benchmarks.runs.line_camera import SILENCE
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
from flowad_fast.benchmarks.runs.line_servers import fill
from flowad_fast.benchmarks.runs.line_stages import (
    RATE,
    Stage,
    plain,
    with_broker,
    with_camera,
    with_hook,
    with_small_disk,
)
from flowad_fast.benchmarks.runs.line_work import Work

FAULTY = "flowad_fast.benchmarks.runs.line_faulty"
OVERLOAD = 60.0
"""Parts a second where the line is to be ended while parts wait."""
LASTS = 2.0
"""Seconds that a fault with a duration lasts."""
PERMILLE = 20
"""Packets that are lost in a thousand; a frame of 256x256 has some 140."""
SERVED = 30.0
"""Seconds within which a sink that works again must have everything."""

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
    stage: Callable[[Path, Work], AbstractContextManager[Stage]] = plain
    sudden: bool = False


def unplugged(rig: Rig, stage: Stage) -> Problems:
    """The camera's folder is gone for a while."""
    rig.files.pause()
    away = rig.incoming.with_name("unplugged")
    rig.incoming.rename(away)
    seen = until(lambda: not rig.ready(), LASTS + 1)
    time.sleep(LASTS)
    away.rename(rig.incoming)
    rig.files.resume()
    return [] if seen else ["the line said ready while its camera was gone"]


def torn(rig: Rig, stage: Stage) -> Problems:
    """Half of a file is all that comes."""
    return _fed(rig, TORN)


def frozen(rig: Rig, stage: Stage) -> Problems:
    """The camera gives the same picture again and again."""
    return _fed(rig, FROZEN)


def gige_unplugged(rig: Rig, stage: Stage) -> Problems:
    """The camera is killed, and starts again as if it had been switched on."""
    assert stage.camera is not None
    stage.camera.unplug()
    seen = until(lambda: not rig.ready(), SILENCE + 4)
    time.sleep(LASTS)
    stage.camera.plug_in()
    return [] if seen else ["the line said ready while its camera was gone"]


def gige_torn(rig: Rig, stage: Stage) -> Problems:
    """Packets are lost on the way."""
    assert stage.camera is not None
    stage.camera.lose(PERMILLE)
    time.sleep(LASTS)
    stage.camera.lose(0)
    return []


def gige_frozen(rig: Rig, stage: Stage) -> Problems:
    """The camera gives the same picture again and again."""
    assert stage.camera is not None
    stage.camera.hold()
    time.sleep(LASTS)
    stage.camera.go()
    return []


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
    rig.files.pause()
    rig.files.rate = RATE
    problems = [] if until(lambda: not child.is_running(), 5) else ["the detector's process outlived the line"]
    rig.start()
    rig.files.resume()
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
    rig.files.pause()
    rig.files.rate = RATE
    rig.start()
    rig.files.resume()
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
    rig.files.way = way
    time.sleep(LASTS)
    rig.files.way = WHOLE
    return []


def _restarted(rig: Rig) -> Problems:
    """Wait until the line has noticed that its engine failed."""
    if until(lambda: "engine failed" in rig.alarms(), CALL + 3):
        return []
    return ["the line did not say that its engine had failed"]


def _overload(rig: Rig) -> None:
    rig.files.rate = OVERLOAD
    time.sleep(LASTS)


FAULTS = (
    Fault("unplugged", "camera unplugged", "its folder is renamed away for 2 s and back", unplugged, 15),
    Fault("incomplete", "incomplete frames", "files are cut in half for 2 s", torn, 10, ("source lost",)),
    Fault("frozen", "frozen frames", "the same picture for 2 s", frozen, 10, ("invalid",)),
    Fault("gige-unplugged", "GigE camera unplugged", "the process of a GigE Vision camera in software is killed, and "
          "started again after the line has noticed and 2 s more", gige_unplugged, 40, ("source lost",),
          stage=with_camera),
    Fault("gige-incomplete", "GigE packets lost", f"{PERMILLE} of 1000 packets for 2 s", gige_torn, 10,
          ("source lost",), stage=with_camera),
    Fault("gige-frozen", "GigE frames frozen", "the same picture for 2 s", gige_frozen, 10, ("invalid",),
          stage=with_camera),
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
