"""What a detector says of a batch of frames: maps, scores, verdicts, and where the defects are. Needs no torch."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flowad_fast.errors import CalibrationError, nearest
from flowad_fast.stages.decision import Calibration, ClassCalibration, combine
from flowad_fast.stages.decision import Verdict as Verdict
from flowad_fast.stages.regions import Region, RegionSettings, find_regions, marked


@dataclass(frozen=True)
class Detection:
    """The result for a batch of B frames.

    Example:
        >>> import numpy as np
        >>> from flowad_fast import Detection
        >>> from flowad_fast.stages.decision import Calibration
        >>> limits = Calibration.model_validate({"alpha": 0.05, "classes": {"": {"threshold": 1.5, "parts": 19}}})
        >>> maps, scores = np.zeros((3, 256, 256), np.float32), np.array([1.0, 2.0, 1.0], np.float32)
        >>> reasons = (None, None, "the frame is black")
        >>> detection = Detection(maps, scores, ("",) * 3, reasons, "eager on cpu", limits)
        >>> [str(verdict) for verdict in detection.verdict]
        ['good', 'anomalous', 'invalid']

    Attributes:
        map: (B, S, S) float32 anomaly map, higher is more anomalous; of frames that are cut into tiles (B, h, w), the
            size of the scaled frame.
        raw_score: the image scores as the graph gives them, (B,), or (B, n) for n > 1 terms.
        classes: class name of each frame, "" for unconditional models.
        invalid: why a frame cannot be judged, None for valid frames.
        engine: what ran, e.g. "onnxruntime on cpu", or "cudagraph on cuda:0 (bf16, fused)".
        frame_size: height and width of the frames, pixels; None: that of the map.
        judged: the cells (h, w) of the map that count; None: all. The others hold the lowest value of those, and are in
            no region.
    """

    map: np.ndarray
    raw_score: np.ndarray
    classes: tuple[str, ...]
    invalid: tuple[str | None, ...]
    engine: str
    calibration: Calibration | None = field(repr=False, default=None)
    frame_size: tuple[int, int] | None = None
    judged: np.ndarray | None = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.map)

    @cached_property
    def score(self) -> np.ndarray:
        """Image scores (B,) float32, higher is more anomalous.

        Raises:
            CalibrationError: the aggregate has several terms, whose ranges come from a calibration, and there is none.
        """
        if self.raw_score.ndim == 1:
            return self.raw_score
        scores = np.empty(len(self), np.float32)
        for i, name in enumerate(self.classes):
            ranges = self._of(name).ranges if self.calibration else None
            scores[i] = combine(self.raw_score[i : i + 1], ranges)[0]
        return scores

    @cached_property
    def verdict(self) -> tuple[Verdict, ...]:
        """For each frame: good, anomalous, or invalid.

        Raises:
            CalibrationError: the model has not been calibrated on good parts (of a frame's class).
        """
        return tuple(
            Verdict.INVALID if reason else Verdict.ANOMALOUS if score > self._of(name).threshold else Verdict.GOOD
            for score, name, reason in zip(self.score, self.classes, self.invalid, strict=True)
        )

    @cached_property
    def regions(self) -> tuple[tuple[Region, ...], ...]:
        """For each frame, where its map is above the pixel threshold, in pixels of the frame; highest peak first.

        They are searched for when first asked for. A frame of which `no_regions` says why has none.
        """
        return tuple(() if reason else find_regions(*self._limits(i)) for i, reason in enumerate(self.no_regions))

    @cached_property
    def no_regions(self) -> tuple[str | None, ...]:
        """For each frame, why regions cannot be told (invalid, no pixel threshold), or None: they were looked for."""
        return tuple(
            reason or self._no_threshold(name) for reason, name in zip(self.invalid, self.classes, strict=True)
        )

    def marked(self, index: int) -> np.ndarray:
        """The cells (S, S) of one frame's map that are in its regions, int32: 0 outside, one number per region."""
        if self.no_regions[index]:
            return np.zeros(self.map.shape[1:], np.int32)
        return marked(*self._limits(index))

    def _limits(self, index: int) -> tuple[np.ndarray, float, tuple[int, int], RegionSettings]:
        """The arguments of `find_regions` for a frame whose class has a pixel threshold."""
        assert self.calibration is not None
        pixels = self.calibration.classes[self.classes[index]].pixels
        assert pixels is not None
        rows, columns = self.map.shape[1:]
        return self.map[index], pixels.threshold, self.frame_size or (rows, columns), self.calibration.regions

    def _no_threshold(self, name: str) -> str | None:
        try:
            if self._of(name).pixels is not None:
                return None
        except CalibrationError as error:
            return str(error)
        return (
            "the bundle was calibrated without a pixel threshold, so there are no regions; calibrate it again: "
            "flowad-export calibrate BUNDLE GOOD_FOLDER"
        )

    def _of(self, name: str) -> ClassCalibration:
        if self.calibration is None:
            raise CalibrationError(
                "the model has no calibration, so there is no verdict (the score is available); "
                "calibrate on good parts: flowad-export calibrate BUNDLE GOOD_FOLDER"
            )
        if name not in self.calibration.classes:
            raise CalibrationError(f"class {name!r} was not calibrated; {nearest(name, self.calibration.classes)}")
        return self.calibration.classes[name]
