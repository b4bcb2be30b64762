"""Image files through a detector: read ahead, judged in as few calls as possible, in order; one bad file stops nothing.

`scan` is the loop under inspection, evaluation and calibration. The rest is what `flowad-inspect` is made of.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from flowad_fast.data.images import read_frame
from flowad_fast.errors import ConfigError, FlowADError, FrameError

Frame = NDArray[np.uint8]
_Class = TypeVar("_Class")
_Detection = TypeVar("_Detection")


class FrameFiles(Sequence[Frame]):
    """Image files as a sequence of frames that are read when asked for, since a camera's parts fill memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Frame:  # type: ignore[override]
        return read_frame(self.paths[index])


@dataclass(frozen=True)
class Scanned(Generic[_Detection]):
    """A frame (H, W, 3) uint8 and the detection of the call that it was part of, as its frame number `place`."""

    frame: Frame
    detection: _Detection
    place: int


def scan(
    detector: Callable[[Frame, list[_Class] | None], _Detection],
    frames: Sequence[Frame],
    classes: Sequence[_Class] | None = None,
    batch: int = 8,
) -> Iterator[Scanned[_Detection] | FlowADError]:
    """What becomes of each frame, in order: its detection, or the error of a file or frame that has none.

    Each window of `batch` frames is judged in one call per frame size and class, while the next one is read.

    Args:
        detector: a `Detector`, or anything that is called like one.
        frames: arrays, or `FrameFiles`.
        classes: the class of each frame, as the detector takes it; None for an unconditional one.
        batch: frames per call, at most.
    """
    start = 0
    for window in read_ahead(frames, batch):
        found: dict[int, Scanned[_Detection] | FlowADError] = {}
        groups: dict[tuple[tuple[int, ...], _Class | None], dict[int, Frame]] = {}
        for i, frame in enumerate(window, start):
            if isinstance(frame, FrameError):
                found[i] = frame
            else:
                groups.setdefault((frame.shape, classes[i] if classes is not None else None), {})[i] = frame
        for group in groups.values():
            labels = None if classes is None else [classes[i] for i in group]
            try:
                detection = detector(np.stack(list(group.values())), labels)
            except (FrameError, ConfigError) as error:
                found |= dict.fromkeys(group, error)
            else:
                found |= {i: Scanned(frame, detection, place) for place, (i, frame) in enumerate(group.items())}
        yield from (found[i] for i in range(start, start + len(window)))
        start += len(window)


def read_ahead(frames: Sequence[Frame], window: int) -> Iterator[list[Frame | FrameError]]:
    """The frames, `window` at a time, each window read in threads while the caller is busy with the one before.

    In place of a frame that cannot be read stands its error.
    """
    with ThreadPoolExecutor(min(8, window), thread_name_prefix="flowad-read") as pool:
        reading = (pool.submit(_read, frames, i) for i in range(len(frames)))
        ahead = list(islice(reading, window))
        while ahead:
            ready, ahead = [future.result() for future in ahead], list(islice(reading, window))
            yield ready


def _read(frames: Sequence[Frame], index: int) -> Frame | FrameError:
    try:
        return frames[index]
    except FrameError as error:
        return error
    except OSError as error:
        return FrameError(str(error))
