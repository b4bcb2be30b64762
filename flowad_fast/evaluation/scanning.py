"""Image files through a detector: read ahead, judged in as few calls as possible, in order; one bad file stops nothing.

`scan` is the loop under inspection, evaluation and calibration.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from flowad_fast.data.images import Stamp, frame_bytes, read_frame, read_stamped
from flowad_fast.errors import ConfigError, FlowADError, FrameError

WINDOW_BYTES = 64 << 20
"""Frames that are read, and judged, at a time take at most this much memory, unless a single one takes more."""

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


class StampedFiles(FrameFiles):
    """Image files that remember which content each had when it was read; None for what could not be."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__(paths)
        self.stamps: list[Stamp | None] = [None] * len(paths)

    def __getitem__(self, index: int) -> Frame:  # type: ignore[override]
        frame, self.stamps[index] = read_stamped(self.paths[index])
        if isinstance(frame, FrameError):
            raise frame
        return frame


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

    Each window of `batch` frames is judged in one call per frame size and class, while the next one is read; large
    frames make it shorter, see `WINDOW_BYTES`.

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
            given = list(group.values())
            try:
                detection = detector(given[0][None] if len(given) == 1 else np.stack(given), labels)
            except (FrameError, ConfigError) as error:
                found |= dict.fromkeys(group, error)
            else:
                found |= {i: Scanned(frame, detection, place) for place, (i, frame) in enumerate(group.items())}
        end = start + len(window)
        window.clear()
        groups.clear()
        yield from (found.pop(i) for i in range(start, end))
        start = end


def read_ahead(frames: Sequence[Frame], window: int, most: int = WINDOW_BYTES) -> Iterator[list[Frame | FrameError]]:
    """The frames, `window` at a time, each window read in threads while the caller is busy with the one before.

    A window ends before its frames take more than `most` bytes, which the headers of files tell in advance; it has one
    frame at least. It also ends at every multiple of `window`, so that what is judged together does not depend on where
    a part of a long sequence begins. In place of a frame that cannot be read stands its error.
    """
    with ThreadPoolExecutor(min(8, window), thread_name_prefix="flowad-read") as pool:
        sizes: deque[int] = deque()  # of the frames from `start` on
        start = 0

        def begin() -> list[Future[Frame | FrameError]]:
            nonlocal start
            # Headers are read here, not in the pool: it keeps as many threads, each with its heap, as frames need.
            sizes.extend(_bytes(frames, i) for i in range(start + len(sizes), min(start + window, len(frames))))
            reading: list[Future[Frame | FrameError]] = []
            total = 0
            while sizes and (not reading or total + sizes[0] <= most):
                total += sizes.popleft()
                reading.append(pool.submit(_read, frames, start))
                start += 1
                if start % window == 0:
                    break
            return reading

        ahead = begin()
        while ahead:
            ready, ahead = [future.result() for future in ahead], begin()
            yield ready


def _bytes(frames: Sequence[Frame], index: int) -> int:
    if isinstance(frames, FrameFiles):
        return frame_bytes(frames.paths[index])
    return frames[index].nbytes if isinstance(frames, np.ndarray) or type(frames) in (list, tuple) else 0


def _read(frames: Sequence[Frame], index: int) -> Frame | FrameError:
    try:
        return frames[index]
    except FrameError as error:
        return error
    except OSError as error:
        return FrameError(str(error))
