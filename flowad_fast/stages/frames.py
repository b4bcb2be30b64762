"""Whether frames are what a detector accepts, and whether they can be judged; numpy only."""

import threading
from collections.abc import Iterable, Sequence

import numpy as np

from flowad_fast.errors import FrameError


def check_frames(frames: np.ndarray | Sequence[np.ndarray], size: tuple[int, int] | None = None) -> np.ndarray:
    """`frames` as a contiguous uint8 (B, H, W, 3) array, or a FrameError that says what was got and how to convert."""
    try:
        array = np.asarray(frames)
    except ValueError:
        raise FrameError("frames have different sizes; call the detector once per size") from None
    if array.ndim == 3 and array.shape[-1] == 3:
        array = array[None]
    if array.size == 0 and array.ndim in (1, 4) and array.shape[0] == 0:
        return np.zeros((0, *(size or (1, 1)), 3), np.uint8)
    if array.ndim != 4 or array.shape[-1] != 3:
        hint = ""
        if array.ndim in (3, 4) and array.shape[-1] == 4:
            hint = "; drop the alpha channel: frames[..., :3]"
        elif array.ndim == 4 and array.shape[1] == 3:
            hint = "; move channels last: frames.transpose(0, 2, 3, 1)"
        elif array.ndim in (2, 3) or array.shape[-1:] == (1,):
            hint = "; repeat grey frames: np.repeat(frames[..., None], 3, -1)"
        raise FrameError(f"expected uint8 frames (B, H, W, 3) in RGB order, got {array.dtype} {array.shape}{hint}")
    if array.dtype != np.uint8:
        shape = f"{array.dtype} {array.shape}"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FrameError(f"frames are {shape} and hold NaN or infinite values; expected uint8")
        raise FrameError(
            f"expected uint8 frames, got {shape}; scale them to 0..255 with the camera's own bit depth and convert, "
            "for 12-bit: (frames >> 4).astype(np.uint8)"
        )
    if size is not None and array.shape[1:3] != size:
        raise FrameError(f"the bundle takes {size[0]}x{size[1]} frames, got {array.shape[1]}x{array.shape[2]}")
    return array if array.flags.carray else np.require(array, requirements=["C", "W"])


def extremes(frames: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of each uint8 frame (H, W, 3): (B,) each.

    Of a frame of which a part is judged, that part is enough: its pixels (m, 3).
    """
    # Frame by frame: the second pass then finds the frame in the cache.
    found = [(frame.min(), frame.max()) for frame in frames]
    low, high = zip(*found, strict=True) if found else ((), ())
    return np.array(low, np.uint8), np.array(high, np.uint8)


def invalid_frames(frames: Iterable[np.ndarray]) -> list[str | None]:
    """Why each uint8 frame cannot be judged, or None: an empty camera, a saturated or uniform picture.

    The frames are those of `extremes`.
    """
    return doubts_of(*extremes(frames))


def doubts_of(low: np.ndarray, high: np.ndarray) -> list[str | None]:
    """As `invalid_frames`, from the frames' extremes (B,)."""
    return [_doubt(int(a), int(b)) for a, b in zip(low, high, strict=True)]


def _doubt(low: int, high: int) -> str | None:
    if high - low <= 2:
        kind = "black" if high <= 16 else "saturated" if low >= 250 else "uniform"
        return f"the frame is {kind} (all pixels between {low} and {high})"
    if high <= 16:
        return f"the frame is black (brightest pixel {high})"
    if low >= 240:
        return f"the frame is saturated (darkest pixel {low})"
    return None


class FrozenFrames:
    """What one camera showed last; safe from many threads, as far as its frames arrive in order."""

    def __init__(self, altered: bool = True) -> None:
        """Nothing was shown yet.

        Args:
            altered: whether frames may be altered after they were shown; otherwise the last one is held, not copied.
        """
        self._altered = altered
        self._previous: np.ndarray | None = None
        self._lock = threading.Lock()

    def doubts(self, frames: np.ndarray) -> list[str | None]:
        """Why each frame, in order, is no new picture, or None: it equals the one before pixel by pixel."""
        reasons: list[str | None] = []
        with self._lock:
            for frame in frames:
                same = self._same(frame)
                reasons.append(
                    "the frame is the same as the one before, pixel by pixel: a frozen camera" if same else None
                )
        return reasons

    def _same(self, frame: np.ndarray) -> bool:
        """Whether it equals the one before; then it is the one before."""
        last = self._previous
        if last is None or last.shape != frame.shape:
            self._previous = frame.copy() if self._altered else frame
            return False
        # Nearly all differ in the first row.
        if last[0].tobytes() == frame[0].tobytes() and np.array_equal(last, frame):
            return True
        if self._altered:
            last[...] = frame  # in memory that is used again
        else:
            self._previous = frame
        return False
