"""Whatever bytes come, both front ends answer with the protocol's errors of the client, and go on answering."""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

if not os.environ.get("CI"):
    pytest.importorskip("httpx")
    pytest.importorskip("tritonclient.grpc")
import grpc
import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from tests.serve_fake import Child, child

MOST = 64 << 20
"""Bytes by which the most memory of the server may grow over all requests, each of which has at most 1 MiB."""
ANSWERS = {200, 400, 401, 404, 405, 408, 413, 504}
CODES = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def server() -> Iterator[Child]:
    limits = {"bytes": 1 << 20, "json_bytes": 1 << 19, "seconds": 1, "pixels": 10_000}
    with child(classes=("nut", "screw"), limits=limits) as one:
        assert verdicts(one) == 2
        before = peak(one)
        yield one
        assert one.process.poll() is None and verdicts(one) == 2, "it still answers"
        assert peak(one) - before < MOST


def verdicts(server: Child) -> int:
    """How many answers both front ends give to a good request."""
    text, rest = valid()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    said = httpx.post(f"{server.http}/v2/models/part/infer", content=text + rest, headers=headers)
    message = service_pb2.ModelInferRequest(model_name="part", raw_input_contents=[rest[:12], rest[12:]])
    message.inputs.add(name="frames", datatype="UINT8", shape=[1, 2, 2, 3])
    message.inputs.add(name="classes", datatype="INT64", shape=[1, 1])
    with grpc.insecure_channel(server.grpc) as channel:
        code = call(channel, "ModelInfer", message.SerializeToString())
    return (said.status_code == 200 and b"good" in said.content) + (code == "OK")


def peak(server: Child) -> int:
    """Bytes of memory that the server has had at most; where the system does not say, those that it has."""
    status = Path(f"/proc/{server.process.pid}/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    return int(psutil.Process(server.process.pid).memory_info().rss)


@pytest.fixture(scope="module")
def http(server: Child) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def channel(server: Child) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as one:
        yield one


HUGE = st.sampled_from([-1, 0, 1, 2, 3, 8, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63)])
NAMES = st.sampled_from(["frames", "classes", "class_names", "map", "verdict", ""]) | st.text(max_size=20)
TYPES = st.sampled_from(["UINT8", "INT64", "BYTES", "FP32", "FP16", "BOOL"]) | st.text(max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=3)
)
DATA = st.lists(st.integers(0, 255), min_size=12, max_size=12) | st.lists(SCALARS, max_size=12) | VALUES
KEYS = st.sampled_from(
    ["part", "class", "deadline_ms", "timeout", "priority", "binary_data_output", "binary_data_size", "binary_data"]
) | st.text(max_size=10)
SHAPES = st.sampled_from([[1, 2, 2, 3], [1, 1], [1]]) | st.lists(HUGE, max_size=5)


def some(required: dict[str, st.SearchStrategy[Any]], optional: dict[str, st.SearchStrategy[Any]]) -> Any:
    return st.fixed_dictionaries(required, optional=optional)


PARAMETERS = st.dictionaries(KEYS, SCALARS | HUGE, max_size=3)
TENSOR = some(
    {"name": NAMES, "shape": SHAPES, "datatype": TYPES}, {"data": DATA, "parameters": PARAMETERS | VALUES, "x": VALUES}
)
REQUEST = some(
    {"inputs": st.lists(TENSOR, max_size=3) | VALUES},
    {"outputs": st.lists(some({"name": NAMES}, {"parameters": PARAMETERS}), max_size=3) | VALUES,
     "parameters": PARAMETERS | VALUES, "id": VALUES},
)  # fmt: skip


def valid(size: int = 12) -> tuple[bytes, bytes]:
    """A good request in binary: its JSON, and what follows."""
    inputs = [
        {"name": "frames", "shape": [1, 2, 2, 3], "datatype": "UINT8", "parameters": {"binary_data_size": size}},
        {"name": "classes", "shape": [1, 1], "datatype": "INT64", "parameters": {"binary_data_size": 8}},
    ]
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return text, bytes(12) + (1).to_bytes(8, "little")


def told(said: httpx.Response) -> None:
    assert said.status_code in ANSWERS, said.text
    if said.status_code != 200:
        assert set(said.json()) == {"error"} and "Traceback" not in said.text and len(said.text) < 1000


def post(http: httpx.Client, body: bytes, headers: dict[str, str] | None = None) -> None:
    told(http.post("/v2/models/part/infer", content=body, headers=headers))


@quick
@given(st.data())
def test_random_bodies(http: httpx.Client, data: st.DataObject) -> None:
    body = data.draw(st.binary(max_size=300))
    length = data.draw(st.none() | st.integers(-5, 400).map(str) | st.sampled_from(["9" * 30, "1e3", "٣", "-"]))
    encoding = data.draw(st.sampled_from([None, "gzip", "deflate", "identity", "br"]))
    headers = {"Inference-Header-Content-Length": length, "Content-Encoding": encoding}
    post(http, body, {key: value.encode() for key, value in headers.items() if value is not None})  # type: ignore[misc]


@quick
@given(REQUEST)
def test_requests_of_wrong_names_shapes_types_and_values(http: httpx.Client, request: dict[str, Any]) -> None:
    post(http, json.dumps(request).encode())


@quick
@given(st.data())
def test_good_requests_that_were_damaged(http: httpx.Client, data: st.DataObject) -> None:
    text, rest = valid(data.draw(HUGE | st.integers(0, 40)))
    body = bytearray(text + rest)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(body) - 1))
        end = at + data.draw(st.integers(0, 8))
        body[at:end] = data.draw(st.binary(max_size=8))
        if not body:
            break
    length = data.draw(st.sampled_from([len(text), len(body)]) | st.integers(0, len(body) + 3))
    post(http, bytes(body), {"Inference-Header-Content-Length": str(length)})


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 400_000,
        b'{"inputs":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"inputs":[{"name":"frames","shape":[1,2,2,3],"datatype":"UINT8","data":'
        + b"[" * 5000
        + b"]" * 5000
        + b"}]}",
        b'{"inputs":[{"name":"frames","shape":[1,2,2,3],"datatype":"UINT8","data":[' + b"9" * 300_000 + b"]}]}",
        b'{"inputs":[{"name":"frames","shape":[64,12,12,3],"datatype":"UINT8","data":["' + b"x" * 300_000 + b'"]}]}',
        b'{"inputs":[' + b"{}," * 100_000 + b"{}]}",
        b'{"id":"\\ud800","inputs":[{"name":"\\ud800","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}',
        b'{"parameters":{"' + b"k" * 300_000 + b'":1},"inputs":[]}',
        b'{"inputs":[{"name":"frames","shape":[1,2,2,3],"datatype":"UINT8","data":[NaN,1e999]}]}',
    ],
    ids=range(9),
)
def test_bodies_that_cost_others_dearly(http: httpx.Client, body: bytes) -> None:
    said = http.post("/v2/models/part/infer", content=body)
    told(said)
    assert said.status_code in (400, 413)


@settings(quick, max_examples=60)
@given(st.binary(max_size=300), st.sampled_from([b"", b"GET ", b"POST /v2/models/part/infer HTTP/1.1\r\nhost: x\r\n"]))
def test_random_bytes_on_the_line(server: Child, data: bytes, begin: bytes) -> None:
    host, _, port = server.http.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as one:
        one.sendall(begin + data)
        one.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := one.recv(4096):
            answer += piece
    assert not answer or re.match(rb"HTTP/1\.1 4\d\d ", answer), answer


@quick
@given(st.sampled_from(["/v2/models/", "/v2/", "/"]), st.text(max_size=30), st.sampled_from(["GET", "POST", "PUT"]))
def test_random_addresses(http: httpx.Client, base: str, rest: str, method: str) -> None:
    url = base + quote(rest, safe="/%?", errors="replace")
    said = http.request(method, url)
    assert said.status_code in ANSWERS | {307}, said.text


def call(channel: grpc.Channel, method: str, data: bytes) -> str:
    """The code of an answer to bytes."""
    ask = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
    try:
        ask(data, timeout=20)
    except grpc.RpcError as error:
        assert "Traceback" not in (error.details() or "")  # type: ignore[attr-defined]
        code: str = error.code().name  # type: ignore[attr-defined]
        return code
    return "OK"


METHODS = ("ModelInfer", "ModelReady", "ModelMetadata", "ModelConfig", "RepositoryIndex", "ServerMetadata", "Nothing")


@quick
@given(st.sampled_from(METHODS), st.binary(max_size=200))
def test_random_messages(channel: grpc.Channel, method: str, data: bytes) -> None:
    assert call(channel, method, data) in CODES


@quick
@given(st.data())
def test_messages_of_wrong_names_shapes_types_and_values(channel: grpc.Channel, data: st.DataObject) -> None:
    fits = st.integers(-(2**63), 2**63 - 1)
    message = service_pb2.ModelInferRequest(model_name="part", id=data.draw(st.text(max_size=5)))
    for _ in range(data.draw(st.integers(0, 3))):
        one = message.inputs.add(name=data.draw(NAMES), datatype=data.draw(TYPES))
        one.shape.extend(
            data.draw(st.sampled_from([[1, 2, 2, 3], [1, 1]]) | st.lists(HUGE.filter(lambda n: n < 2**63), max_size=5))
        )
        if data.draw(st.booleans()):
            one.contents.uint_contents.extend(data.draw(st.lists(st.integers(0, 2**32 - 1), max_size=12)))
        if data.draw(st.booleans()):
            one.contents.bytes_contents.extend(data.draw(st.lists(st.binary(max_size=5), max_size=3)))
    message.raw_input_contents.extend(
        data.draw(st.lists(st.sampled_from([bytes(12), bytes(8)]) | st.binary(max_size=20), max_size=3))
    )
    for name in data.draw(st.lists(NAMES, max_size=2)):
        message.outputs.add(name=name)
    for name in data.draw(st.lists(KEYS, max_size=3)):
        value = data.draw(st.none() | st.booleans() | fits | st.floats() | st.text(max_size=9))
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}.get(type(value))
        if field is None:
            message.parameters[name].SetInParent()
        else:
            setattr(message.parameters[name], field, value)
    packed = bytearray(message.SerializeToString())
    for _ in range(data.draw(st.integers(0, 2))):
        if packed:
            packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    assert call(channel, "ModelInfer", bytes(packed)) in CODES


def test_a_message_that_is_too_large(channel: grpc.Channel) -> None:
    assert call(channel, "ModelInfer", bytes(2 << 20)) == "RESOURCE_EXHAUSTED"
