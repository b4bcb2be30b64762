"""`flowad-line` with faults that nobody can cause from outside its process: `python -m … run settings.yaml`.

A file beside the settings says what is wrong now; while it is not there the command is the usual one.

- `clock`: seconds by which the wall clock has been set forward (or back). Everything in the line that asks for the date
  gets the shifted one. The monotonic clock cannot be set, here or anywhere.
- `raise`: the detector raises in its child.
"""

import importlib
import pkgutil
import sys
from datetime import datetime, tzinfo
from functools import partial
from pathlib import Path

import flowad_fast.line
from flowad_fast.cli import line as command
from flowad_fast.detector import Detection, Detector, load
from flowad_fast.line import runner, station
from flowad_fast.line.scoring import Frames, InProcess, Names, Start

CLOCK, RAISE = "clock", "raise"


class Raising:
    """A detector that raises while the file is there."""

    def __init__(self, detector: Detector, flag: Path) -> None:
        self._detector, self._flag = detector, flag
        self.engine, self.classes = detector.engine, detector.classes
        self.frame_size, self.image_size = detector.frame_size, detector.image_size

    def __call__(self, frames: Frames, classes: Names = None) -> Detection:
        """See `Call`."""
        if self._flag.exists():
            raise RuntimeError("a fault of the campaign: no memory left")
        return self._detector(frames, classes)


def make(start: Start) -> Raising:
    """In the child: the bundle's detector; the flag lies where the command was started."""
    return Raising(load(start.bundle, start.engine, start.device, threads=start.threads), Path(RAISE))


class _AnyDate(type):
    """Dates that others made are dates too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, datetime)


class Shifted(datetime, metaclass=_AnyDate):
    """`datetime` whose `now` is off by what the file says."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        """The time by a clock that somebody has set."""
        real = datetime.now(tz)
        try:
            return datetime.fromtimestamp(real.timestamp() + float(Path(CLOCK).read_text()), tz)
        except (OSError, ValueError):
            return real


def main() -> None:
    """Patch, then the usual command."""
    for found in pkgutil.walk_packages(flowad_fast.line.__path__, "flowad_fast.line."):
        module = importlib.import_module(found.name)
        if getattr(module, "datetime", None) is datetime:
            module.datetime = Shifted  # type: ignore[attr-defined]
    faulty = partial(InProcess, make=make)
    runner.InProcess = station.InProcess = faulty  # type: ignore[misc, assignment, attr-defined]
    command.main()


if __name__ == "__main__":
    sys.argv[0] = "flowad-line"
    main()
