"""A detector that hangs on demand; replicas import it, so it needs no more than they do."""

import time

import numpy as np

from flowad_fast.detector import Detector, load
from flowad_fast.serve.replica import Start

POISON = 7
"""Every pixel of a frame at which the detector never returns."""


class Hanging:
    """A detector that never returns from a poisoned frame."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self.engine, self.classes, self.frame_size = detector.engine, detector.classes, detector.frame_size
        self.image_size, self.calibration = detector.image_size, detector.calibration

    def __call__(self, frames: np.ndarray, classes: object = None) -> object:
        while (frames == POISON).all(axis=(1, 2, 3)).any():
            time.sleep(0.1)
        return self._detector(frames, classes)  # type: ignore[arg-type]


def hanging(start: Start) -> Hanging:
    return Hanging(load(start.bundle, device="cpu", threads=1))
