"""Requests through one detector: those with frames of one size together, each with its own part of the answer."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from flowad_fast.bundle import Manifest
from flowad_fast.config import Classes
from flowad_fast.detection import Detection
from flowad_fast.errors import CalibrationError, ConfigError, FrameError
from flowad_fast.line.outcome import Judgement
from flowad_fast.line.scoring import Scoring
from flowad_fast.serve.pool import Answered, Asked, ModelCard
from flowad_fast.stages.aggregates import terms
from flowad_fast.stages.decision import Verdict
from flowad_fast.stages.frames import check_frames

Names = tuple[str | int, ...] | None


def card_of(name: str, version: str, manifest: Manifest, engine: str, largest_batch: int) -> ModelCard:
    """What clients may know of a bundle that runs."""
    return ModelCard(
        name,
        version,
        engine,
        image_size=manifest.model.image.size,
        classes=manifest.model.classes,
        frame_size=manifest.frame_size,
        terms=terms(manifest.aggregate),
        largest_batch=largest_batch,
        calibrated=manifest.calibration is not None,
        tiled=manifest.tiling is not None,
    )


def checked(asked: Asked, card: ModelCard) -> Asked:
    """The request with its frames contiguous, when the model takes it.

    Raises:
        FrameError: no frames, too many, or not uint8 RGB of the model's size.
        ConfigError: a class that the model does not have, or not one per frame.
    """
    frames = check_frames(asked.frames, None if card.tiled else card.frame_size)
    if not 1 <= len(frames) <= card.largest_batch:
        raise FrameError(f"got {len(frames)} frames in one request, expected 1 to {card.largest_batch}")
    check_classes(card.classes, asked.classes, len(frames))
    return Asked(asked.model, frames, asked.classes, asked.parts, asked.seconds, asked.version)


def check_classes(classes: Classes, given: Names, frames: int) -> None:
    """Refuse classes that the model does not have; ConfigError."""
    if given is not None and len(given) != frames:
        raise ConfigError(f"got {len(given)} classes for {frames} frames, expected one per frame")
    classes.indices(given, frames)


def judge(scoring: Scoring, requests: Sequence[tuple[NDArray[np.uint8], Names]], limit: float) -> list[Answered]:
    """The answers to requests of frames (B, H, W, 3) of one size that were checked, in one call of the detector.

    Raises:
        HangError, EngineLostError, FrameError: see `Scoring`.
    """
    one = len(requests) == 1
    frames = requests[0][0] if one else np.concatenate([frames for frames, _ in requests])
    conditional = scoring.classes.conditional
    names = [name for _, given in requests for name in given or ()] if conditional else None
    found = scoring(frames, names, limit)
    answers, begin = [], 0
    for given, _ in requests:
        part = slice(begin, begin + len(given))
        begin = part.stop
        own = replace(
            found,
            map=found.map[part],
            raw_score=found.raw_score[part],
            classes=found.classes[part],
            invalid=found.invalid[part],
        )
        answers.append(
            Answered(own.map, own.raw_score, _judgements(own), scoring.bundle, found.engine, invalid=own.invalid)
        )
    return answers


def _judgements(found: Detection) -> tuple[Judgement, ...]:
    """A judgement per frame; none of a model without thresholds, invalid where a class has none."""
    if found.calibration is None:
        return ()
    try:
        return tuple(
            Judgement(verdict, float(score), reason or "")
            for verdict, score, reason in zip(found.verdict, found.score, found.invalid, strict=True)
        )
    except CalibrationError as error:
        return (Judgement(Verdict.INVALID, None, str(error)),) * len(found)
