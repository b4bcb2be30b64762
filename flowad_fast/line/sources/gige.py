"""A GigE Vision camera: each frame that comes whole is a part, and each that is known to be missing is a lost one."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from flowad_fast.errors import ConfigError, FrameError
from flowad_fast.line.sources.aravis import Connection, Grab, Options, library
from flowad_fast.line.sources.base import Shot, SourceBase
from flowad_fast.line.sources.pixels import FORMATS, PixelFormat, code, refusal, to_rgb

_NO_ID = ("unknown", "cleared", "filling")
"""States of buffers that no frame has begun to fill: their id means nothing."""
_Size = Annotated[int, Field(ge=2)]


class GigeSettings(SourceBase):
    """A camera on the network, through Aravis. What is None stays as the camera is set."""

    kind: Literal["gige"]
    camera: str = Field(min_length=1)
    """Its address, or its name as Aravis lists it, such as Vendor-serial."""
    pixel_format: PixelFormat | None = None
    trigger: Literal["free", "software", "hardware"] = "free"
    """free: the camera's own rate; software: by the line, `frame_rate` times a second; hardware: by `line`."""
    line: str = Field(default="Line0", min_length=1)
    """Input of the camera that a hardware trigger comes in on."""
    frame_rate: float | None = Field(default=None, gt=0, le=100_000)
    """Frames a second. With a software trigger None means that only `GigeCamera.trigger` triggers."""
    exposure: float | None = Field(default=None, gt=0)
    """Microseconds; turns automatic exposure off."""
    gain: float | None = None
    """In the camera's unit, mostly dB; turns automatic gain off."""
    region: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], _Size, _Size] | None = None
    """x, y, width, height in pixels."""
    packet_size: int | None = Field(default=None, ge=220, le=16260)
    """Bytes; 9000 needs jumbo frames on the whole way."""
    packet_delay: int | None = Field(default=None, ge=0)
    """Nanoseconds between packets, where cameras share a link."""
    buffers: int = Field(default=8, ge=2, le=1000)
    """Frames that may wait in memory."""
    timeout: float = Field(default=5.0, gt=0, le=600)
    """Seconds without an expected frame after which the camera is lost; hardware triggers are not expected."""
    largest_gap: int = Field(default=256, ge=1, le=100_000)
    """Lost parts that one gap, or one loss of the camera, is told as at most; the last one names the rest."""

    @field_validator("pixel_format", mode="before")
    @classmethod
    def _usable(cls, name: object) -> object:
        if isinstance(name, str) and (reason := refusal(name)):
            raise ValueError(reason)
        return name

    @model_validator(mode="after")
    def _patient(self) -> "GigeSettings":
        if self.frame_rate is not None and self.timeout < 2 / self.frame_rate:
            raise ValueError(
                f"got a timeout of {self.timeout:g} s at {self.frame_rate:g} frames a second, expected at least "
                f"{2 / self.frame_rate:g}; a camera that is only slow would be lost"
            )
        return self

    def open(self, state: Path) -> "GigeCamera":
        """The source; it remembers nothing over restarts."""
        library()
        return GigeCamera(self)

    def check(self) -> str:
        """Connect, and take one frame, for which a hardware trigger is turned off."""
        free = self.model_copy(update={"trigger": "free", "frame_rate": None})
        camera = (free if self.trigger == "hardware" else self).open(Path())
        try:
            if self.trigger == "software" and self.frame_rate is None:
                camera.trigger()
            end = time.monotonic() + self.timeout + 1
            while (shot := camera.read(0.2)) is None or shot.frame is None:
                if shot is not None or time.monotonic() > end:
                    why = shot.lost if shot is not None else f"no frame within {self.timeout:g} s"
                    raise ConfigError(f"{self.camera}: {why}; check packet_size, the network and the trigger")
            return camera.text
        finally:
            camera.close()


class Connected(Protocol):
    """What the camera needs of a connection; see `aravis.Connection`."""

    lost: bool
    format: str
    text: str

    def grab(self, wait: float) -> Grab | None:
        """The next buffer."""

    def trigger(self) -> None:
        """One frame."""

    def counters(self) -> Mapping[str, int]:
        """Packets and frames."""

    def close(self) -> None:
        """Let go."""


class GigeCamera:
    """Frames of one camera. It is connected when it is read, and again after it was lost.

    When it is lost, the parts that it had been triggered for are told lost; without a software trigger nobody knows
    how many pass meanwhile, and one lost part stands for them.

    A part is named by its connection and its frame id, with a number of rounds between them once 16 bits went round.

    Attributes:
        text: model, serial number and format once it was connected.
    """

    def __init__(self, settings: GigeSettings, connect: Callable[[Options], Connected] = Connection) -> None:
        """Nothing is connected yet; `connect` makes a connection or raises."""
        self._settings, self._connect = settings, connect
        self._connection: Connected | None = None
        self._broken: Connected | None = None  # closed later, for that takes seconds while nobody answers
        self._pixels: PixelFormat = "Mono8"
        self._lock = threading.Lock()
        self._shots: deque[Shot] = deque()
        self._wanted: deque[float] = deque()  # when each trigger was asked for that the camera has not got yet
        self._fired: float | None = None  # when the one was asked for whose frame is awaited
        self._due = self._heard = 0.0
        self._last: int | None = None
        self._series = self._rounds = 0  # each frame id is unique within a series, and a round of it
        self._trouble = ""
        self.text = ""

    def trigger(self) -> None:
        """Ask for one frame now, from any thread. Each call becomes one part; its deadline counts from here.

        A trigger that comes while the frame of another is awaited is given when that has come.
        """
        with self._lock:
            if self._settings.trigger != "software":
                raise ConfigError(f"got a trigger for {self._settings.camera}, expected trigger: software")
            if len(self._wanted) >= self._settings.largest_gap:
                self._shots.append(Shot(None, lost=f"{len(self._wanted)} triggers wait for the camera"))
                return
            self._wanted.append(time.monotonic())
            self._fire()

    def read(self, wait: float) -> Shot | None:
        """The next part. OSError when the camera is lost, or cannot be connected."""
        if self._shots:
            return self._shots.popleft()
        if self._trouble:
            trouble, self._trouble = self._trouble, ""
            raise OSError(trouble)
        connection = self._connection or self._connected()
        wait = min(wait, self._pulse(wait))
        if (grab := connection.grab(wait)) is not None:
            self._heard = time.monotonic()
            self._took(grab, connection.counters())
        elif reason := self._silent(connection):
            self._lose(connection, reason)
        return self._shots.popleft() if self._shots else None

    def close(self) -> None:
        """Let go of the camera."""
        left, self._connection, self._broken = (self._connection, self._broken), None, None
        for connection in left:
            if connection is not None:
                connection.close()

    def _connected(self) -> Connected:
        self.close()
        one = self._settings
        triggers = {"free": None, "software": "Software", "hardware": one.line}
        connection = self._connect(
            Options(
                one.camera,
                one.pixel_format,
                triggers[one.trigger],
                one.frame_rate,
                one.exposure,
                one.gain,
                one.region,
                one.packet_size,
                one.packet_delay,
                one.buffers,
            )
        )
        found = next((name for name in FORMATS if name == connection.format), None)
        if found is None:
            connection.close()
            raise ConfigError(f"{one.camera}: {refusal(connection.format)}")
        with self._lock:
            self._pixels, self._last, self._fired = found, None, None
            self._series, self._rounds = self._series + 1, 0
            self._due = self._heard = time.monotonic()
            self.text = connection.text
            self._connection = connection
            self._fire()
        return connection

    # Triggers; one at a time, so that it is known which frame belongs to which

    def _pulse(self, wait: float) -> float:
        """Trigger by the settings' rate when that is due; how long to wait for a frame at most."""
        if self._settings.trigger != "software" or self._settings.frame_rate is None:
            return wait
        now = time.monotonic()
        with self._lock:
            if now >= self._due and not self._wanted and self._fired is None:
                self._due = max(self._due + 1 / self._settings.frame_rate, now)
                self._wanted.append(now)
                self._fire()
        return max(0.001, self._due - now)

    def _fire(self) -> None:
        """Give the camera the next trigger that waits; under the lock."""
        if self._connection is None or self._fired is not None or not self._wanted:
            return
        self._fired = self._wanted.popleft()
        try:
            self._connection.trigger()
        except OSError:
            self._connection.lost = True  # `read` tells its part lost

    def _age(self) -> float:
        """Seconds since the trigger of the frame that has come, or is missing; the next trigger may be given."""
        with self._lock:
            age = 0.0 if self._fired is None else time.monotonic() - self._fired
            self._fired = None
            self._fire()
        return age

    # Frames

    def _took(self, grab: Grab, counters: Mapping[str, int]) -> None:
        """What a buffer tells: the frames before it that are missing, and its own."""
        if grab.status in _NO_ID:
            self._shots.append(Shot(None, lost=f"buffer {grab.status}", age=self._age(), counters=counters))
            return
        if grab.status != "success" and self._last is not None and gap(self._last, grab.frame) is None:
            return  # a late packet of a frame that has been told; Aravis makes another buffer of it, which stays torn
        for name, lost in self._missing(grab.frame):
            self._shots.append(Shot(None, name, lost, age=self._age(), counters=counters))
        name = self._name(grab.frame)
        frame, lost_why = None, ""
        if grab.status != "success":
            lost_why = f"frame {grab.frame} is not whole ({grab.status})"
        elif grab.code != code(self._pixels):
            lost_why = f"frame {grab.frame} has the pixel format 0x{grab.code:08x}, expected {self._pixels}"
        else:
            try:
                frame = to_rgb(grab.data, self._pixels, grab.height, grab.width)
            except FrameError as error:
                lost_why = f"frame {grab.frame}: {error}"
        self._shots.append(Shot(frame, name, lost_why, self._age(), stamp=grab.stamp or None, counters=counters))

    def _missing(self, frame: int) -> list[tuple[str, str]]:
        """Names and reasons of the parts between the last frame and this one."""
        if self._last is None:
            return []
        count = gap(self._last, frame)
        if count is None:
            self._series, self._rounds = self._series + 1, 0
            self._last, before = None, self._last
            return [("", f"frame ids went from {before} to {frame}: the camera counts anew, frames may be lost")]
        told = min(count, self._settings.largest_gap)
        went = f"the ids went from {self._last} to {frame}"
        parts = [(self._name(one), f"no frame {one} came: {went}") for one in _after(self._last, told)]
        if count > told:
            parts[-1] = (parts[-1][0], f"{count - told + 1} frames from here on are missing: {went}")
        return parts

    def _name(self, frame: int) -> str:
        """What names a frame within its camera, whose ids go round and begin anew; `_last` is this one then."""
        self._rounds += self._last is not None and frame < self._last
        self._last = frame
        return f"{self._series}.{self._rounds}.{frame}" if self._rounds else f"{self._series}.{frame}"

    def _silent(self, connection: Connected) -> str:
        """Why the camera is lost, "" while nothing says so."""
        if connection.lost:
            return "the camera does not answer"
        if self._settings.trigger == "software":
            since = self._fired
        else:
            since = self._heard if self._settings.trigger == "free" else None
        if since is None or time.monotonic() - since < self._settings.timeout:
            return ""
        return f"no frame within {self._settings.timeout:g} s" + (
            " of its trigger" if self._settings.trigger == "software" else ""
        )

    def _lose(self, connection: Connected, reason: str) -> None:
        """Tell what is lost with the camera; the next read raises, the one after connects."""
        with self._lock:
            self._connection, self._broken = None, connection
            triggered = ([] if self._fired is None else [self._fired]) + list(self._wanted)
            self._wanted.clear()
            self._fired = None
        counters = connection.counters()
        if self._settings.trigger == "software":
            for when in triggered:
                self._shots.append(Shot(None, lost=reason, age=time.monotonic() - when, counters=counters))
        else:
            text = f"{reason}; how many parts pass until it is back is not known"
            self._shots.append(Shot(None, lost=text, counters=counters))
        self._trouble = f"{self._settings.camera}: {reason}; check cable and power, it is connected again by itself"


def gap(last: int, frame: int) -> int | None:
    """Frames missing between two ids; None where the second is not later: an old frame, or the camera counts anew.

    Ids of GigE Vision 1 have 16 bits, and 1 follows 65535 (0 means none, but some cameras count it).
    """
    if frame > last:
        count = frame - last - 1
        return count if count < 0x8000 or frame > 0xFFFF else None  # else an older one, from before a round
    if last > 0xFFFF:
        return None
    count = 0xFFFF - last + max(frame, 1) - 1
    return count if count < 0x8000 else None


def _after(last: int, count: int) -> list[int]:
    """The ids that follow one."""
    ids = range(last + 1, last + 1 + count)
    return [one if last > 0xFFFF or one <= 0xFFFF else one - 0xFFFF for one in ids]
