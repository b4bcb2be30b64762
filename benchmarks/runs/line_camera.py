"""A GigE Vision camera in software as the source of a rig, which counts its frames itself: the other way in.

Aravis' fake camera shows the pictures of the work, and writes down each frame as it makes it: frame id, picture, time.
What the line tells of a frame is found again by the id, which the camera and nobody else gives, within one life of the
camera's process; the time that it stamps on frames says which life a connection belongs to.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowad_fast.benchmarks.demo.cell_camera import GO, HOLD, LOSE, READY
from flowad_fast.benchmarks.runs.line_rig import FROZEN, LOST, WHOLE, Fed, name_of, until
from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.errors import EngineUnavailableError, LineStoppedError
from flowad_fast.line.sources.aravis import library

ADDRESS = "127.0.0.1"
SILENCE = 1.0
"""Seconds without a frame after which the line takes the camera for lost."""
IN_FLIGHT = 0.25
"""Seconds before the camera's end: frames that it made then may not have been sent."""


@dataclass(frozen=True)
class _Made:
    """A frame, as the camera wrote it down."""

    frame: int
    stamp: int
    picture: int
    held: bool
    at: float


class FrameCount:
    """What a camera wrote down, against what a line has told.

    Attributes:
        ends: when each life of the camera ended (monotonic); the last one may go on.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` has a log of each life."""
        self.folder, self.ends = folder, list[float]()

    def log(self) -> Path:
        """Of the life that begins now."""
        return self.folder / f"camera-{len(self.ends)}.jsonl"

    def given(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Fed]:
        """Every frame that the camera made, by the name that the line must tell it under.

        One more part stands for those that nobody could count while the camera was lost: the line must say so.
        """
        lives = self.lives()
        life_of = {made.stamp: life for life, frames in enumerate(lives) for made in frames.values()}
        given: dict[str, Fed] = {}
        told: dict[int, list[int]] = {}
        lived: dict[int, set[int]] = {}
        for row in rows:
            name = name_of(row)
            series, *numbers = (int(one) for one in name.split("."))
            if not numbers:
                given[name] = Fed(-1, LOST, 0.0)
                continue
            told.setdefault(series, []).append(numbers[-1])
            if row["stamp"] in life_of:
                lived.setdefault(series, set()).add(life_of[row["stamp"]])
        for series, ids in told.items():
            found = lived.get(series, set())
            if len(found) == 1:  # else its parts are not among those that were given, which the account says
                (life,) = found
                given |= self._connection(series, ids, lives[life], life)
        return given

    def _connection(self, series: int, told: list[int], made: Mapping[int, _Made], life: int) -> dict[str, Fed]:
        """The frames of one connection: from its first that was told, all but those that the camera's end cut off."""
        order = list(made)
        places = [order.index(one) for one in told if one in made]
        end = self.ends[life] if life < len(self.ends) else float("inf")
        given, rounds, before = dict[str, Fed](), 0, 0
        for place, frame in enumerate(order[min(places) :], min(places)):
            one = made[frame]
            if place > max(places) and one.at > end - IN_FLIGHT:
                break
            rounds, before = rounds + (frame < before), frame
            name = f"{series}.{rounds}.{frame}" if rounds else f"{series}.{frame}"
            given[name] = Fed(one.picture, FROZEN if one.held else WHOLE, one.at)
        return given

    def lives(self) -> list[dict[int, _Made]]:
        """Frames of each life of the camera by id, in order; none before the first was made."""
        found = []
        for path in sorted(self.folder.glob("camera-*.jsonl")):
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one may be half written
            frames = [_Made(**json.loads(line)) for line in lines]
            found.append({one.frame: one for one in frames})
        return found if any(found) else []


class CameraFeed:
    """See `line_rig.Feed`; parts come over the network instead of from a folder."""

    def __init__(self, work: Work, folder: Path, rate: float) -> None:
        """Start the camera, which sends nothing before it is connected.

        Raises:
            EngineUnavailableError: Aravis is missing, or another camera runs on this computer.
        """
        try:
            library()
        except ImportError as error:
            raise EngineUnavailableError(str(error)) from None
        self.rate, self._work, self._folder = rate, work, folder
        self._process: subprocess.Popen[str] | None = None
        self._count = FrameCount(folder)
        self.plug_in()

    def settings(self) -> dict[str, object]:
        """Of the source."""
        height, width = self._work.frame_size
        return {
            "kind": "gige", "camera": ADDRESS, "pixel_format": "RGB8", "region": [0, 0, width, height],
            "frame_rate": self.rate, "timeout": SILENCE,
        }  # fmt: skip

    # The camera

    def plug_in(self) -> None:
        """Start the camera."""
        command = [sys.executable, "-m", "flowad_fast.benchmarks.demo.cell_camera", str(self._work.pictures[0].parent)]
        with (self._folder / "camera.stderr").open("a+") as said:
            self._process = subprocess.Popen(
                [*command, "--log", str(self._count.log()), "--obey"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            )  # fmt: skip
            assert self._process.stdout is not None
            if self._process.stdout.readline().strip() != READY:
                self._process.wait(10)
                said.seek(0)
                raise EngineUnavailableError("no GigE Vision camera: " + " ".join(said.read().split()))

    def unplug(self) -> None:
        """Kill the camera: it says nothing more, as if its cable were pulled."""
        if self._process is not None:
            self._count.ends.append(time.monotonic())
            self._process.kill()
            self._process.wait()
            self._process = None

    def hold(self) -> None:
        """The same picture from now on."""
        self._order(HOLD)

    def go(self) -> None:
        """Other pictures again."""
        self._order(GO)

    def lose(self, permille: int) -> None:
        """So many packets in a thousand from now on."""
        self._order(f"{LOSE} {permille}")

    def _order(self, text: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()

    # What a rig asks of its feed

    def start(self) -> None:
        """The line has connected, and the camera sends."""
        if not until(self._count.lives, 20):
            raise LineStoppedError("the camera made no frame, so the line has not connected to it")

    def stop(self) -> None:
        """The camera's end is the end of its parts."""
        self.unplug()

    def given(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Fed]:
        """See `FrameCount.given`."""
        return self._count.given(rows)
