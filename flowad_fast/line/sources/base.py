"""What a source is, and what it hands to the line."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flowad_fast.config import Frozen


@dataclass(frozen=True)
class Shot:
    """One part that passed a camera.

    Attributes:
        frame: uint8 (H, W, 3) RGB, which belongs to the line from now on; None where it was lost or is not whole.
        name: what names it within its camera, e.g. a file; "" lets the line count.
        lost: why there is no frame, for a part that is known to have passed: a gap in frame ids, an incomplete buffer,
            a file that cannot be read.
        age: seconds since its trigger, which its deadline counts from.
        stamp: the camera's own time, nanoseconds since whatever it counts from; None where it gives none.
        counters: what the connection to the camera has counted since it was made, e.g. packets that were missing.
        begun: called once the line has it in its journal, so that it is never given again.
    """

    frame: NDArray[np.uint8] | None
    name: str = ""
    lost: str = ""
    age: float = 0.0
    stamp: int | None = None
    counters: Mapping[str, int] = field(default_factory=dict, compare=False)
    begun: Callable[[], None] | None = field(default=None, compare=False)


class EndOfSource(Exception):  # noqa: N818  # not an error: as StopIteration
    """Raised by `Source.read` when there will never be another part."""


class Source(Protocol):
    """One camera. Both methods are called from its own thread only.

    `read` connects where it is not connected. What it raises besides `EndOfSource` means that the connection is lost:
    the line tells an alarm once, and reads again after a pause that grows; the source has let go of what is broken.
    """

    def read(self, wait: float) -> Shot | None:
        """The next part; None where there is none within about `wait` seconds."""

    def close(self) -> None:
        """Let go of the camera; called once, also after failures."""


class SourceBase(Frozen, ABC):
    """Settings of one source. Subclasses have a `kind`, which tells them apart in a file."""

    class_name: str | None = Field(default=None, min_length=1)
    """The product that this camera sees, for bundles with several; None for bundles with one."""

    @abstractmethod
    def open(self, state: Path) -> Source:
        """The source; it connects when it is read. `state` is a file of its own for what it remembers over restarts."""

    @abstractmethod
    def check(self) -> str:
        """Connect, and say in one line what was found; FlowADError with the remedy where that fails."""
