"""A frame whose score is known, which tells an engine that works from one that only answers."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowad_fast.data.images import read_frame
from flowad_fast.detection import Detection
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.files import replacing
from flowad_fast.line.scoring import Scoring
from flowad_fast.line.settings import Canary


def pattern(height: int, width: int) -> NDArray[np.uint8]:
    """A frame (height, width, 3) with edges, gradients and colours, the same on every machine."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    return np.stack([(3 * x + y) % 256, (x * y // 7) % 256, 255 * ((x // 8 + y // 8) % 2)], -1).astype(np.uint8)


class CanaryCheck:
    """Compares the canary's score with the remembered one; the first score of a bundle is remembered.

    Attributes:
        maps: the last map of the frame, by hash of the bundle.
    """

    def __init__(self, settings: Canary, memory: Path | None, verdicts: bool = True) -> None:
        """Read the frame.

        Args:
            settings: which frame, how near.
            memory: file of the remembered scores; None: they are forgotten with this object.
            verdicts: whether a model without thresholds, which can judge nothing, is refused.
        """
        self._settings, self._memory, self._verdicts = settings, memory, verdicts
        self._image = None if settings.image is None else read_frame(settings.image)
        self._scores = _read(memory)
        self.maps: dict[str, NDArray[np.float32]] = {}

    def __call__(self, scoring: Scoring, limit: float) -> str:
        """Judge the canary; what was found, in words.

        Raises:
            EngineUnavailableError: the score is not finite, or not the remembered one.
            CalibrationError: the model was not calibrated, and verdicts are asked for.
            FrameError, HangError, EngineLostError: see `Scoring`.
        """
        frame, found = self._frame(scoring), self._judge(scoring, 1, limit)
        if self._verdicts:
            _ = found.verdict  # needs the thresholds
        score = np.atleast_1d(found.raw_score[0]).astype(float)
        if not np.isfinite(score).all():
            raise EngineUnavailableError(f"the canary frame's score is {score.tolist()}, expected finite numbers")
        self.maps[scoring.bundle] = found.map[0]
        key = f"{scoring.bundle or id(scoring)} {hashlib.sha256(frame.tobytes()).hexdigest()[:12]}"
        known = self._scores.get(key)
        if known is None or len(known) != len(score):
            self._scores[key] = score.tolist()
            self._write()
            return f"its score {score.tolist()} is remembered"
        gap = float(np.max(np.abs(score - known) / np.maximum(1, np.abs(known))))
        if gap > self._settings.tolerance:
            where = f"; delete {self._memory} if the change is intended" if self._memory else ""
            raise EngineUnavailableError(
                f"the canary frame's score is {score.tolist()}, expected {known} within {self._settings.tolerance:g}: "
                f"{scoring.engine} does not compute what it did{where}"
            )
        return f"its score is within {gap:.1e} of the remembered one"

    def warm(self, scoring: Scoring, largest: int, limit: float) -> dict[int, float]:
        """Judge copies of the canary in batches up to `largest`; seconds of the second call of each size.

        What an engine allocates, compiles or captures for a batch size is there before the first part needs it.

        Raises:
            FrameError, HangError, EngineLostError: see `Scoring`.
        """
        sizes = sorted({size for size in (1, 2, 4, 8, 16, 32, 64) if size < largest} | {largest})
        found = {}
        for size in sizes:
            self._judge(scoring, size, limit)
            start = time.monotonic()
            self._judge(scoring, size, limit)
            found[size] = time.monotonic() - start
        return found

    def _frame(self, scoring: Scoring) -> NDArray[np.uint8]:
        side = scoring.image_size
        return pattern(*(scoring.size or (side, side))) if self._image is None else self._image

    def _judge(self, scoring: Scoring, count: int, limit: float) -> Detection:
        names = ((scoring.classes.names or (0,))[0],) * count if scoring.classes.conditional else None
        return scoring(np.repeat(self._frame(scoring)[None], count, 0), names, limit)

    def _write(self) -> None:
        if self._memory is not None:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._memory) as file:
                file.write(json.dumps(self._scores).encode())


def _read(memory: Path | None) -> dict[str, list[float]]:
    if memory is None or not memory.exists():
        return {}
    try:
        found = json.loads(memory.read_bytes())
        return {str(key): [float(one) for one in value] for key, value in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise EngineUnavailableError(f"{memory}: no remembered scores in it; delete it") from None
