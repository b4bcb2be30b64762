"""Where an ONNX file keeps its external data, read from the bytes: no onnx package, and nothing that they describe.

An ONNX file is one protobuf message. `external_tensors` walks to every tensor that it can hold and steps over the rest,
so that a graph is checked before a library that would follow its paths parses it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flowad_fast.errors import BundleError

FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Of onnx.proto: the fields through which a message holds tensors, by number, and the message that each is."""
SINGLE = {("model", 7), ("training", 1), ("training", 2), ("attribute", 5), ("attribute", 6), ("attribute", 22),
          ("sparse", 1), ("sparse", 2)}  # fmt: skip
"""Those that are there once at most; protobuf would merge repeated ones, which no writer makes."""
NAME, EXTERNAL_DATA, DATA_LOCATION, KEY, VALUE = 8, 13, 14, 1, 2
"""Fields of a tensor, and of one of its entries of external data."""
EXTERNAL = 1
VARINT, BYTES = 0, 2
FIXED = {1: 8, 5: 4}
"""Wire types, and the bytes of those of a fixed width."""
DEEPEST = 100
"""Levels of messages in messages, protobuf's own limit."""


@dataclass
class ExternalTensor:
    """A tensor whose data lie outside the graph, and the file's words for where."""

    name: str = ""
    entries: dict[str, str] = field(default_factory=dict)


def external_tensors(path: Path) -> Iterator[ExternalTensor]:
    """Every tensor of an ONNX file with external data, wherever the graph, its functions or subgraphs hold it.

    Raises:
        BundleError: the file cannot be read, or is not what a writer of ONNX files makes.
    """
    try:
        if path.stat().st_size >= 2**31:
            raise ValueError("it is larger than 2 GB, which no ONNX graph is")
        yield from _walk("model", memoryview(path.read_bytes()), 1)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: not an ONNX file: {error}; export the bundle again") from None


def check_external_data(path: Path, files: Collection[str] | None = None) -> None:
    """Refuse a graph whose external data is not a plain file beside it that holds all that the graph takes from it.

    Args:
        path: the ONNX file; only the graph is read.
        files: names that are acceptable; None for any.

    Raises:
        BundleError: no ONNX file, an absolute path, `..`, a sub-folder, a link, an unlisted file, or past the end.
    """
    for tensor in external_tensors(path):
        location, where = tensor.entries.get("location", ""), f"{path}: external data of {tensor.name!r}"
        if not location or location in (".", "..") or any(c in location for c in "/\\:\0"):
            raise BundleError(f"{where} is at {location!r}; expected the name of a file in the same folder")
        data = path.parent / location
        if data.is_symlink() or not data.is_file():
            raise BundleError(f"{where}: {data} is missing, or a link; export the bundle again")
        if files is not None and location not in files:
            raise BundleError(f"{where} is in {location!r}, which the manifest does not list; export the bundle again")
        offset, length = (_count(tensor.entries.get(key, "0"), where) for key in ("offset", "length"))
        size = data.stat().st_size
        if offset + length > size or (offset and offset >= size):
            raise BundleError(f"{where}: bytes {offset} to {offset + length} of a file of {size} bytes; it is cut off")


def _count(text: str, where: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise BundleError(f"{where}: {text!r} is no offset or length")
    return int(text)


def _walk(kind: str, data: memoryview, depth: int) -> Iterator[ExternalTensor]:
    if depth > DEEPEST:
        raise ValueError(f"messages are nested more than {DEEPEST} deep")
    if kind == "tensor":
        yield from _external(data)
        return
    inside, seen = FIELDS[kind], set()
    for number, value in _fields(data):
        if number in inside and isinstance(value, memoryview):
            if number in seen and (kind, number) in SINGLE:
                raise ValueError(f"field {number} of a {kind} is there twice")
            seen.add(number)
            yield from _walk(inside[number], value, depth + 1)


def _external(data: memoryview) -> Iterator[ExternalTensor]:
    found, outside = ExternalTensor(), False
    for number, value in _fields(data):
        if number == DATA_LOCATION and isinstance(value, int):
            outside |= value & 0xFFFFFFFF == EXTERNAL
        elif number == NAME and isinstance(value, memoryview):
            found.name = _text(value)
        elif number == EXTERNAL_DATA and isinstance(value, memoryview):
            pair = {n: v for n, v in _fields(value) if n in (KEY, VALUE) and isinstance(v, memoryview)}
            key = _text(pair.get(KEY, value[:0]))
            if key in found.entries:
                raise ValueError(f"external data of {found.name!r} have two entries {key!r}")
            found.entries[key] = _text(pair.get(VALUE, value[:0]))
    if outside:
        yield found


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "surrogateescape")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Each field of a message: its number, and a number or the bytes of a string or message."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise ValueError(f"field number {number}")
        value: int | memoryview = 0
        if wire == VARINT:
            value, at = _varint(data, at)
        elif wire == BYTES or wire in FIXED:
            size, at = _varint(data, at) if wire == BYTES else (FIXED[wire], at)
            if size > end - at:
                raise ValueError("it is cut off")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {wire}")
        yield number, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits per byte, and where the next thing begins."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("a number is cut off")
