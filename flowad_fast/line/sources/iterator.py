"""Parts from a Python iterator, for those who embed the line."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from flowad_fast.line.sources.base import EndOfSource, Shot


class IteratorSource:
    """Frames, or `Shot`s where more than the frame is known, in the order of an iterable.

    An iterator that raises has ended for the line after the error was told: Python's generators cannot go on.
    """

    def __init__(self, frames: Iterable[NDArray[np.uint8] | Shot]) -> None:
        """Nothing is asked for yet. An infinite iterable should block no longer than the line may take to stop."""
        self._frames: Iterator[NDArray[np.uint8] | Shot] = iter(frames)

    def read(self, wait: float) -> Shot:
        """The next frame."""
        try:
            one = next(self._frames)
        except StopIteration:
            raise EndOfSource from None
        return one if isinstance(one, Shot) else Shot(one)

    def close(self) -> None:
        """Close a generator."""
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()
