"""What a server asks, whoever computes: a request is answered whole, or refused with one of the line's reasons.

    front (protocol/)  ->  Pool  ->  LocalPool: detectors in this process      local.py
                                     RayPool:   replicas of a Ray cluster      pool_ray.py

A request that is late, refused or failed gets `NoResultError`, never an answer: no verdict can be taken from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flowad_fast.config import Classes
from flowad_fast.errors import FlowADError
from flowad_fast.line.outcome import Judgement, NoResult


class NoResultError(FlowADError, RuntimeError):
    """The parts of a request have no result.

    Attributes:
        result: why, of the line's reasons.
        reason: in words.
    """

    def __init__(self, result: NoResult, reason: str = "") -> None:
        super().__init__(f"no result: {result.value}" + (f": {reason}" if reason else ""))
        self.result, self.reason = result, reason

    def __reduce__(self) -> tuple[type["NoResultError"], tuple[NoResult, str]]:
        return type(self), (self.result, self.reason)


class UnknownModelError(FlowADError, LookupError):
    """The pool has no model of this name, or not this version of it."""


@dataclass(frozen=True)
class ModelCard:
    """What clients may know of a model before they ask it.

    Attributes:
        name: what requests call it.
        version: of the bundle that answers now: the first 12 hex digits of its manifest's SHA-256.
        engine: what runs.
        image_size: side S of the maps, pixels; for a bundle that cuts frames into tiles the maps have the frames' size.
        frame_size: height and width that frames must have, None for any.
        classes: the model's classes.
        terms: values of a raw score: 1, or 2 for an aggregate of two terms.
        largest_batch: frames of one request, at most.
        calibrated: whether answers have verdicts.
        tiled: whether frames are cut into tiles.
    """

    name: str
    version: str
    engine: str
    image_size: int
    classes: Classes
    frame_size: tuple[int, int] | None = None
    terms: int = 1
    largest_batch: int = 8
    calibrated: bool = True
    tiled: bool = False


@dataclass(frozen=True)
class Asked:
    """One request: frames of one size, judged together, with one deadline.

    Attributes:
        model: name of a model of the pool.
        frames: (B, H, W, 3) uint8 RGB.
        classes: the class of each frame; None for a model without classes.
        parts: an id per frame, which comes back in logs and traces.
        seconds: from the moment that it is handed to the pool until its answer must be there.
        version: of the bundle that must answer, "" for whichever is there now.
    """

    model: str
    frames: NDArray[np.uint8]
    classes: tuple[str | int, ...] | None
    parts: tuple[str, ...]
    seconds: float
    version: str = ""


@dataclass(frozen=True)
class Answered:
    """What the detector said about the parts of a request, in time.

    Attributes:
        maps: (B, S, S) float32.
        raw_score: (B,) or (B, terms) float32, before calibration.
        judgements: verdict, calibrated score and reason per part; empty where the model was not calibrated.
        version: of the bundle that answered.
        engine: what ran.
        invalid: why a frame cannot be judged, None where it can; also where the model was not calibrated.
    """

    maps: NDArray[np.float32]
    raw_score: NDArray[np.float32]
    judgements: tuple[Judgement, ...]
    version: str
    engine: str
    invalid: tuple[str | None, ...] = field(default=())


class Pool(Protocol):
    """Models by name. Everything is a coroutine and may be called from many tasks of one event loop."""

    async def models(self) -> Sequence[ModelCard]:
        """The models that can be asked, by name; one that is being loaded is not among them."""

    async def ready(self, model: str) -> str:
        """Empty when a canary frame has given the known score since the engine started, otherwise why not.

        Raises:
            UnknownModelError: see there.
        """

    async def ask(self, asked: Asked) -> Answered:
        """The answer to a request.

        Raises:
            NoResultError: it would be late, was refused, or the engine failed.
            UnknownModelError: see there.
            FrameError, ConfigError: frames or classes that the model does not take, before anything is computed.
        """

    async def close(self) -> None:
        """Refuse what waits (`NoResult.SHUTTING_DOWN`), finish what is being judged, free the engines."""
