"""Bodies of HTTP: a JSON text, and after it the binary data of the tensors that have some."""

import json
import math
import zlib
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowad_fast.serve.pool import Answered
from flowad_fast.serve.protocol.asking import Output, Query, Scalar
from flowad_fast.serve.protocol.refusals import bad, too_large
from flowad_fast.serve.protocol.settings import RequestLimits
from flowad_fast.serve.protocol.tensors import Tensor, packed

SIZE = "binary_data_size"
Parameters = dict[Annotated[str, Field(max_length=256)], Scalar]


class _Message(BaseModel):
    """Fields that nobody here knows are left alone, as clients of other servers send some."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())


class _Input(_Message):
    name: str = Field(max_length=256)
    datatype: str = Field(max_length=16)
    shape: list[Annotated[int, Field(ge=0, le=2**31)]] = Field(max_length=8)
    parameters: Parameters = {}
    data: list[Any] | None = None


class _Output(_Message):
    name: str = Field(max_length=256)
    parameters: Parameters = {}


class _Request(_Message):
    id: str = ""
    parameters: Parameters = {}
    inputs: list[_Input] = Field(max_length=8)
    outputs: list[_Output] = Field(default=[], max_length=16)


@dataclass(frozen=True)
class HttpQuery(Query):
    """A request, and which outputs it wants in binary.

    Attributes:
        binary: names of outputs that are wanted one way or the other.
        binary_otherwise: the way of the others.
    """

    binary: tuple[tuple[str, bool], ...] = ()
    binary_otherwise: bool = False


def unpacked(body: bytearray, encoding: str, largest: int) -> bytearray:
    """A body of the content encoding gzip, deflate or none; RefusedError beyond `largest` bytes."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise bad(f"got the content encoding {encoding[:32]!r}, expected gzip, deflate or none")
    stream = zlib.decompressobj(wbits=47)  # of both
    try:
        data = stream.decompress(body, largest + 1)
    except zlib.error:
        raise bad(f"the body is no {encoding}") from None
    if len(data) > largest:
        raise too_large(f"the body has more than {largest} bytes unpacked")
    if not stream.eof or stream.unused_data:
        raise bad(f"the body is no whole {encoding}")
    return bytearray(data)


def header_length(text: str | None, body: int, limits: RequestLimits) -> int:
    """Bytes of the JSON text in a body of `body` bytes, from the header Inference-Header-Content-Length."""
    if text is None:
        length = body
    elif not (text.isascii() and text.isdecimal() and len(text) <= 12) or int(text) > body:
        raise bad(f"Inference-Header-Content-Length: got {text[:32]!r} in a body of {body} bytes")
    else:
        length = int(text)
    if length > limits.json_bytes:
        raise too_large(f"the JSON has {length} bytes, expected at most {limits.json_bytes}; send tensors in binary")
    return length


def read(body: bytearray, length: int) -> HttpQuery:
    """A request whose JSON has `length` bytes.

    Raises:
        RefusedError: no such JSON, or binary data of other lengths than it says.
    """
    try:
        found = _Request.model_validate_json(bytes(memoryview(body)[:length]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"][:4])) or "the request"
        raise bad(f"{place}: {first['msg']}") from None
    rest, at, tensors = memoryview(body), length, []
    for one in found.inputs:
        size = one.parameters.get(SIZE)
        _only(one.name, one.parameters, SIZE)
        data: list[Any] | memoryview
        if size is None:
            if one.data is None:
                raise bad(f"{one.name[:64]}: got neither data nor {SIZE}")
            data = one.data
        else:
            if one.data is not None or isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise bad(f"{one.name[:64]}: expected data, or {SIZE}, a number of bytes")
            if size > len(rest) - at:
                raise bad(f"{one.name[:64]}: {SIZE} is {size}, but {len(rest) - at} bytes are left in the body")
            data = rest[at : at + size]
            at += size
        tensors.append(Tensor(one.name, one.datatype, tuple(one.shape), data))
    if at != len(rest):
        raise bad(f"{len(rest) - at} bytes of the body belong to no input")
    wanted = []
    for output in found.outputs:
        _only(output.name, output.parameters, "binary_data")
        wanted.append((output.name, _truth(output.parameters, "binary_data")))
    return HttpQuery(
        found.id,
        tuple(tensors),
        tuple(name for name, _ in wanted),
        dict(found.parameters),
        tuple((name, way) for name, way in wanted if way is not None),
        bool(_truth(found.parameters, "binary_data_output")),
    )


def write(model: str, query: HttpQuery, answered: Answered, outputs: list[Output]) -> tuple[bytes, int | None]:
    """The body of an answer, and the bytes of its JSON where binary data follow."""
    ways, listed, binary = dict(query.binary), [], []
    for one in outputs:
        row: dict[str, Any] = {"name": one.name, "datatype": one.datatype, "shape": one.shape}
        if ways.get(one.name, query.binary_otherwise):
            data = packed(one.values) if isinstance(one.values, list) else one.values.astype("<f4").tobytes()
            binary.append(data)
            row["parameters"] = {SIZE: len(data)}
        else:
            row["data"] = _values(one)
        listed.append(row)
    head: dict[str, Any] = {"model_name": model, "model_version": answered.version}
    if query.id:
        head["id"] = query.id
    head |= {"parameters": {"engine": answered.engine}, "outputs": listed}
    text = json.dumps(head, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([text, *binary]), len(text) if binary else None


def _values(output: Output) -> list[Any]:
    """Values for JSON, which has no NaN: null there, which clients in Python read as NaN."""
    if isinstance(output.values, list):
        return [one.decode() for one in output.values]
    flat: list[Any] = output.values.ravel().tolist()
    return flat if np.isfinite(output.values).all() else [one if math.isfinite(one) else None for one in flat]


def _only(tensor: str, parameters: Parameters, known: str) -> None:
    """Refuse what is not done here, such as shared memory and classification."""
    for name in parameters:
        if name != known:
            raise bad(f"{tensor[:64]}: the parameter {name[:64]!r} is not supported; valid: {known}")


def _truth(parameters: Parameters, name: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(f"the parameter {name} must be true or false")
    return value
