"""What clients are told of a model: the inputs and outputs that its Triton repository promises, and ours.

A repository that `flowad-export` writes for NVIDIA Triton (format `triton-server`) has the inputs `frames` and, for
conditional models, `classes`, and the outputs `map` and `score`. Here are the same, and verdicts beside them.
"""

from dataclasses import dataclass
from typing import Any

import flowad_fast
from flowad_fast.serve.pool import ModelCard

SERVER = "flowad-fast"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters")
"""Of the protocol, as its documents call them."""
_CONFIG_TYPES = {"UINT8": "TYPE_UINT8", "INT64": "TYPE_INT64", "FP32": "TYPE_FP32", "BYTES": "TYPE_STRING"}


@dataclass(frozen=True)
class Described:
    """A tensor: its name, datatype, and dimensions after that of the batch, -1 where they are free; () for a scalar."""

    name: str
    datatype: str
    dims: tuple[int, ...] = ()

    @property
    def shape(self) -> list[int]:
        """As clients see it: a scalar per frame is a column."""
        return [-1, *(self.dims or (1,))]

    def config(self) -> dict[str, Any]:
        """As in a config.pbtxt."""
        found: dict[str, Any] = {
            "name": self.name,
            "data_type": _CONFIG_TYPES[self.datatype],
            "dims": list(self.dims or (1,)),
        }
        return found if self.dims else found | {"reshape": {"shape": []}}


def inputs(card: ModelCard) -> list[Described]:
    """Of a model, without `class_names`, which may stand for `classes`."""
    found = [Described("frames", "UINT8", (*(card.frame_size or (-1, -1)), 3))]
    return [*found, Described("classes", "INT64")] if card.classes.conditional else found


def outputs(card: ModelCard) -> list[Described]:
    """Of a model: the graph's, then what a calibrated one says."""
    side = -1 if card.tiled else card.image_size
    found = [
        Described("map", "FP32", (side, side)),
        Described("score", "FP32", () if card.terms == 1 else (card.terms,)),
    ]
    if card.calibrated:
        found += [Described("verdict", "BYTES"), Described("reason", "BYTES"), Described("judged_score", "FP32")]
    return found


def server() -> dict[str, Any]:
    """Metadata of the server."""
    return {"name": SERVER, "version": flowad_fast.__version__, "extensions": list(EXTENSIONS)}


def metadata(card: ModelCard) -> dict[str, Any]:
    """Metadata of a model."""
    tensors = {"inputs": inputs(card), "outputs": outputs(card)}
    return {"name": card.name, "versions": [card.version], "platform": "flowad_fast_bundle"} | {
        key: [{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in value]
        for key, value in tensors.items()
    }


def configuration(card: ModelCard) -> dict[str, Any]:
    """Configuration of a model, in the fields of Triton's message `ModelConfig`."""
    return {
        "name": card.name,
        "platform": "flowad_fast_bundle",
        "backend": "flowad_fast",
        "max_batch_size": card.largest_batch,
        "input": [one.config() for one in inputs(card)],
        "output": [one.config() for one in outputs(card)],
    }
