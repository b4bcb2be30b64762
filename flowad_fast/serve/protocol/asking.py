"""A request of the protocol to what a pool is asked, and a pool's answer to tensors."""

import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowad_fast.errors import nearest
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve.pool import Answered, Asked, ModelCard, NoResultError
from flowad_fast.serve.protocol import describing
from flowad_fast.serve.protocol.refusals import bad, too_large
from flowad_fast.serve.protocol.settings import FrontSettings
from flowad_fast.serve.protocol.tensors import Tensor, numbers, texts

Scalar = bool | int | float | str
PARAMETERS = ("part", "class", "deadline_ms", "timeout", "priority", "binary_data_output")
"""Of a request. `priority` is Triton's and changes nothing; `binary_data_output` is HTTP's."""
LONGEST = 256
"""Characters of the id of a part or a request, and of a class."""


@dataclass(frozen=True)
class Query:
    """A request as it came, read and not yet compared with the model.

    Attributes:
        id: the client's, "" where it gave none; comes back.
        inputs: as declared.
        outputs: names that are asked for; () for all.
        parameters: of the request.
    """

    id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    parameters: dict[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """A tensor of an answer: numbers, or (B, 1) strings."""

    name: str
    datatype: str
    values: NDArray[np.float32] | list[bytes]

    @property
    def shape(self) -> list[int]:
        """Dimensions."""
        return [len(self.values), 1] if isinstance(self.values, list) else list(self.values.shape)


def asked(query: Query, card: ModelCard, settings: FrontSettings, arrived: float, left: float | None = None) -> Asked:
    """What a pool is asked.

    Args:
        query: the request.
        card: of its model.
        settings: limits and deadlines.
        arrived: when the request began to arrive, on the monotonic clock; its deadline counts from then.
        left: seconds that the client waits at most, where the transport says so.

    Raises:
        RefusedError: tensors, parameters or outputs that the model does not have, or that are beyond a limit.
        NoResultError: its time was over before it was here whole.
    """
    _known("parameter", query.parameters, PARAMETERS)
    _known("output", query.outputs, [one.name for one in describing.outputs(card)])
    given = {one.name: one for one in query.inputs}
    wanted = ["frames", *(("classes", "class_names") if card.classes.conditional else ())]
    _known("input", [one.name for one in query.inputs], wanted)
    if "frames" not in given:
        raise bad("the input frames is missing: UINT8 of shape [frames, height, width, 3]")
    if len(query.id) > LONGEST:
        raise bad(f"got an id of {len(query.id)} characters, expected at most {LONGEST}")
    seconds = min(_seconds(query.parameters, settings), math.inf if left is None else left)
    frames = _frames(given["frames"], card, settings)
    classes = _classes(query, given, card, len(frames))
    parts = _parts(query, len(frames))
    seconds -= time.monotonic() - arrived
    if seconds <= 0:
        raise NoResultError(NoResult.LATE, "its time was over before the request had arrived")
    return Asked(card.name, frames, classes, parts, seconds)


def answer(query: Query, answered: Answered) -> list[Output]:
    """The outputs that were asked for, or all, in the order of the metadata unless they were named."""
    batch = len(answered.maps)
    judged = answered.judgements
    found = {
        "map": Output("map", "FP32", answered.maps),
        "score": Output("score", "FP32", answered.raw_score.reshape(batch, -1)),
    }
    if len(judged) == batch:
        scores = np.array([[math.nan if one.score is None else one.score] for one in judged], np.float32)
        found |= {
            "verdict": Output("verdict", "BYTES", [one.verdict.value.encode() for one in judged]),
            "reason": Output("reason", "BYTES", [one.reason.encode() for one in judged]),
            "judged_score": Output("judged_score", "FP32", scores),
        }
    missing = [name for name in query.outputs if name not in found]
    if missing:  # the bundle was replaced by one without thresholds meanwhile
        raise bad(f"the model gave no {missing[0]}: it is not calibrated")
    return [found[name] for name in query.outputs or found]


def _known(what: str, given: Any, known: Any) -> None:
    names = list(given)
    for name in names:
        if name not in known:
            raise bad(f"unknown {what} {name[:LONGEST]!r}; {nearest(name[:LONGEST], known)}")
    if len(set(names)) != len(names):
        raise bad(f"an {what} is there twice")


def _frames(tensor: Tensor, card: ModelCard, settings: FrontSettings) -> NDArray[np.uint8]:
    shape, limits = tensor.shape, settings.limits
    if tensor.datatype != "UINT8" or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise bad(f"frames: got {tensor.datatype} of shape {list(shape)}, expected UINT8 [frames, height, width, 3]")
    most = min(limits.frames, card.largest_batch)
    if shape[0] > most:
        raise too_large(f"frames: got {shape[0]} frames in one request, expected at most {most}")
    if shape[1] * shape[2] > limits.pixels:
        raise too_large(
            f"frames: got {shape[1]} x {shape[2]} pixels, expected at most {limits.pixels} pixels per frame"
        )
    return numbers(tensor)


def _classes(query: Query, given: dict[str, Tensor], card: ModelCard, frames: int) -> tuple[str | int, ...] | None:
    ways = [name for name in given if name != "frames"] + ["class"] * ("class" in query.parameters)
    if not card.classes.conditional:
        if ways:
            raise bad("the model has no classes; omit the parameter class")
        return None
    if len(ways) != 1:
        got = " and ".join(ways) or "none of them"
        raise bad(f"got {got}, expected one of the inputs classes, class_names, and the parameter class")
    way = ways[0]
    if way == "class":
        label = query.parameters["class"]
        if isinstance(label, float) or isinstance(label, bool) or len(str(label)[: LONGEST + 1]) > LONGEST:
            raise bad("the parameter class must be a name or an index")
        return (card.classes.label(label) if isinstance(label, str) else label,) * frames
    tensor = given[way]
    if tensor.shape not in ((frames, 1), (frames,)):
        raise bad(f"{way}: got the shape {list(tensor.shape)}, expected [{frames}, 1]")
    if way == "class_names":
        return tuple(card.classes.label(one) for one in texts(tensor))
    if tensor.datatype != "INT64":
        raise bad(f"classes: got {tensor.datatype}, expected INT64")
    return tuple(int(one) for one in numbers(tensor).ravel())


def _parts(query: Query, frames: int) -> tuple[str, ...]:
    """Ids of the parts, separated by commas; without them the request's id, numbered where it has several frames."""
    if "part" not in query.parameters:
        name = query.id or uuid.uuid4().hex
        return (name,) if frames == 1 else tuple(f"{name}/{i}" for i in range(frames))
    text = query.parameters["part"]
    parts = tuple(one.strip() for one in text.split(",")) if isinstance(text, str) else ()
    if len(parts) != frames or not all(0 < len(one) <= LONGEST and one.isprintable() for one in parts):
        raise bad(f"the parameter part must be {frames} ids, separated by commas, of 1 to {LONGEST} characters each")
    return parts


def _seconds(parameters: dict[str, Scalar], settings: FrontSettings) -> float:
    """The tighter one of the deadlines that are given, or the default."""
    found = []
    for name, unit in (("deadline_ms", 1e-3), ("timeout", 1e-6)):
        value = parameters.get(name, 0 if name == "timeout" else None)
        if value is None or (name == "timeout" and value == 0):  # Triton's way to say nothing
            continue
        if isinstance(value, (bool, str)) or not 0 < value <= settings.largest_deadline / unit:
            most = f"{settings.largest_deadline / unit:g}"
            unit_name = "milliseconds" if name == "deadline_ms" else "microseconds"
            raise bad(f"the parameter {name} must be a number above 0 and at most {most}, in {unit_name}")
        found.append(value * unit)
    return min(found, default=settings.deadline)
