"""Tensors of the protocol: what a client declares is compared with what it sent before anything is allocated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowad_fast.serve.protocol.refusals import bad

DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("<u1"), "INT64": np.dtype("<i8")}
"""Numbers of the inputs that models here have, as they lie in binary data."""
BYTES = "BYTES"
"""Strings: in binary data each after its length in 4 bytes, little-endian."""


@dataclass(frozen=True)
class Tensor:
    """One input as it came.

    Attributes:
        name: as the client calls it.
        datatype: of the protocol, such as UINT8.
        shape: as declared, not yet compared with anything.
        data: binary, or values one by one, nested or flat.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | Sequence[Any]


def numbers(tensor: Tensor) -> NDArray[Any]:
    """The values in the declared shape; RefusedError where they are of another type, or not as many."""
    if tensor.datatype not in DTYPES:
        raise bad(f"{tensor.name}: got the datatype {tensor.datatype}, expected one of {', '.join(DTYPES)}")
    dtype, count = DTYPES[tensor.datatype], math.prod(tensor.shape)
    if isinstance(tensor.data, (bytes, memoryview)):
        if len(tensor.data) != count * dtype.itemsize:
            raise bad(
                f"{tensor.name}: got {len(tensor.data)} bytes, expected {count * dtype.itemsize} for "
                f"{tensor.datatype} of shape {list(tensor.shape)}"
            )
        return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
    values = _flat(tensor)
    if not set(map(type, values)) <= {int}:
        raise bad(f"{tensor.name}: got values that are no {tensor.datatype}")
    span = np.iinfo(dtype)
    if values and not span.min <= min(values) <= max(values) <= span.max:
        raise bad(f"{tensor.name}: got values beyond {tensor.datatype}, {span.min} to {span.max}")
    return np.array(values, dtype).reshape(tensor.shape)


def texts(tensor: Tensor) -> list[str]:
    """The strings of a BYTES tensor; RefusedError where they are none, not UTF-8, or not as many as declared."""
    if tensor.datatype != BYTES:
        raise bad(f"{tensor.name}: got the datatype {tensor.datatype}, expected {BYTES}")
    if isinstance(tensor.data, (bytes, memoryview)):
        values: list[Any] = _split(tensor, bytes(tensor.data))
    else:
        values = _flat(tensor)
    if not set(map(type, values)) <= {str, bytes}:
        raise bad(f"{tensor.name}: got values that are no strings")
    try:
        return [one.decode() if isinstance(one, bytes) else one for one in values]
    except UnicodeDecodeError:
        raise bad(f"{tensor.name}: got bytes that are no UTF-8") from None


def packed(values: Sequence[bytes]) -> bytes:
    """Strings as binary data."""
    return b"".join(len(one).to_bytes(4, "little") + one for one in values)


def _flat(tensor: Tensor) -> list[Any]:
    """Values in row-major order, as many as declared, from lists nested as the shape says, or a flat one."""
    values: list[Any] = list(tensor.data)
    for _ in range(len(tensor.shape) - 1):
        if not values or not isinstance(values[0], list):
            break
        if not all(isinstance(one, list) and len(one) == len(values[0]) for one in values):
            raise bad(f"{tensor.name}: got lists of different lengths")
        values = list(chain.from_iterable(values))
    if len(values) != math.prod(tensor.shape):
        raise bad(f"{tensor.name}: got {len(values)} values, expected {math.prod(tensor.shape)}: {list(tensor.shape)}")
    return values


def _split(tensor: Tensor, data: bytes) -> list[bytes]:
    found: list[bytes] = []
    at, count = 0, math.prod(tensor.shape)
    while at + 4 <= len(data) and len(found) < count:
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            break
        found.append(data[at + 4 : end])
        at = end
    if at != len(data) or len(found) != count:
        raise bad(f"{tensor.name}: expected {count} strings, each after its length in 4 bytes, and nothing else")
    return found
