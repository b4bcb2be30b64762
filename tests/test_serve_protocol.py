"""Clients of the Open Inference Protocol against our server: what they are told, and what it is compared with."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

if not os.environ.get("CI"):
    pytest.importorskip("httpx")
    pytest.importorskip("tritonclient.grpc")
import httpx
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from flowad_fast.detector import Detection, load
from flowad_fast.serve.local import LocalPool
from flowad_fast.serve.pool import Asked
from flowad_fast.serve.settings import ModelSettings, ServeLimits
from tests.models import PARTS, exported, tiny_frames
from tests.serve_fake import CARD, FakePool, good
from tests.serve_front import (
    ALL,
    FRAMES,
    KINDS,
    WAYS,
    Client,
    Running,
    calibrated,
    failure,
    indices,
    local,
    opened,
    request_json,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tmp_path_factory.mktemp("protocol"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with Running(local(bundle, largest_batch=64), deadline=30) as one:
        yield one


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Detection:
    return load(bundle)(FRAMES, KINDS)


@pytest.fixture(params=WAYS)
def client(server: Running, request: pytest.FixtureRequest) -> Client:
    return Client(request.param, server)


# Answers


def test_answers_are_the_detectors_to_the_last_bit(client: Client, expected: Detection) -> None:
    got = client(FRAMES, indices(), request_id="shift 7")
    assert tuple(got.outputs) == ALL and got.id == "shift 7"
    assert got.outputs["map"].dtype == got.outputs["score"].dtype == np.float32
    assert np.array_equal(got.outputs["map"], expected.map)
    assert np.array_equal(got.outputs["score"], expected.raw_score[:, None])
    assert np.array_equal(got.outputs["judged_score"], expected.score[:, None])
    verdicts = [text(one) for one in got.outputs["verdict"].ravel()]
    assert verdicts == [one.value for one in expected.verdict] and set(verdicts) == {"good", "anomalous", "invalid"}
    assert [text(one) for one in got.outputs["reason"].ravel()] == [one or "" for one in expected.invalid]


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def test_classes_come_as_indices_names_or_one_name_for_all(client: Client) -> None:
    kinds = (PARTS[1],) * len(FRAMES)
    ways = [
        client(FRAMES, indices(kinds)),
        client(FRAMES, names=kinds),
        client(FRAMES, parameters={"class": PARTS[1]}),
        client(FRAMES, parameters={"class": 1}),
    ]
    assert all(np.array_equal(one.outputs["map"], ways[0].outputs["map"]) for one in ways)
    assert not np.array_equal(client(FRAMES, indices()).outputs["map"], ways[0].outputs["map"])


def test_every_one_of_many_clients_gets_its_own_answer(server: Running, bundle: Path) -> None:
    detector = load(bundle)

    def ask(number: int) -> bool:
        one, frames = Client(WAYS[number % 3], server), tiny_frames(2, 60, 50 + number, seed=number)
        kinds = (PARTS[number % 3], PARTS[0])
        same = np.array_equal(one(frames, indices(kinds)).outputs["map"], detector(frames, kinds).map)
        return same and one(frames, indices(kinds), request_id=str(number)).id == str(number)

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(18)))


def test_outputs_that_are_named_come_in_that_order(client: Client) -> None:
    got = client(FRAMES[:1], indices(KINDS[:1]), outputs=("verdict", "score"))
    assert list(got.outputs) == ["verdict", "score"] and got.outputs["verdict"].shape == (1, 1)


def test_a_version_may_be_asked_for(client: Client, server: Running) -> None:
    version = asyncio.run(server.pool.models())[0].version
    for same in (version, "1"):  # 1 is what the repository for Triton calls its only version
        assert client(FRAMES, indices(), model_version=same).version == version
    with pytest.raises(InferenceServerException, match=f"no version '2' of part; {version} answers now"):
        client(FRAMES, indices(), model_version="2")


def test_the_repository_for_triton_promises_the_same(bundle: Path, server: Running, expected: Detection) -> None:
    """Its config.pbtxt, in the server's own message, against metadata and configuration; and its graph's answers."""
    folder = bundle / "triton-server" / "flowad"
    promised = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    over_http, over_grpc = Client("http", server).client, Client("grpc", server).client
    configs = [
        over_grpc.get_model_config("part").config,
        text_format.Parse(as_text(over_http.get_model_config("part")), model_config_pb2.ModelConfig()),
    ]
    for config in configs:
        assert list(config.input) == list(promised.input)
        assert list(config.output)[: len(promised.output)] == list(promised.output)
        assert [one.name for one in config.output[len(promised.output) :]] == list(ALL[2:])
        assert config.max_batch_size == promised.max_batch_size
    found = over_http.get_model_metadata("part")
    said = over_grpc.get_model_metadata("part")
    for key in ("inputs", "outputs"):
        rows = [(one.name, one.datatype, list(one.shape)) for one in getattr(said, key)]
        assert rows == [(one["name"], one["datatype"], one["shape"]) for one in found[key]]
        listed = list(promised.input if key == "inputs" else promised.output)
        names = [model_config_pb2.DataType.Name(one.data_type).removeprefix("TYPE_") for one in listed]
        assert rows[: len(listed)] == [
            (one.name, datatype, [-1, *one.dims]) for one, datatype in zip(listed, names, strict=True)
        ]
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
    golden = session.run(["map", "score"], {"frames": FRAMES, "classes": indices()[:, 0]})
    np.testing.assert_allclose(expected.map, golden[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(expected.raw_score, golden[1], rtol=1e-5, atol=1e-5)


def as_text(config: dict[str, Any]) -> str:
    from google.protobuf.json_format import ParseDict

    return text_format.MessageToString(ParseDict(config, model_config_pb2.ModelConfig()))


def test_plain_json_is_enough(server: Running, expected: Detection) -> None:
    """As a client of KServe sends it; values nested or flat."""
    for data in (FRAMES.tolist(), FRAMES.ravel().tolist()):
        frames = {"name": "frames", "shape": list(FRAMES.shape), "datatype": "UINT8", "data": data}
        classes = {"name": "class_names", "shape": [4, 1], "datatype": "BYTES", "data": list(KINDS)}
        body = {"id": "a", "inputs": [frames, classes], "model_name": "part"}
        said = httpx.post(f"{server.http}/v2/models/part/infer", json=body, timeout=60)
        assert said.status_code == 200 and said.headers["content-type"] == "application/json"
        found = {one["name"]: one for one in said.json()["outputs"]}
        assert said.json()["parameters"] == {"engine": expected.engine}
        assert np.array_equal(np.array(found["map"]["data"], np.float32).reshape(expected.map.shape), expected.map)
        assert found["verdict"] == {
            "name": "verdict", "datatype": "BYTES", "shape": [4, 1], "data": [str(one) for one in expected.verdict]
        }  # fmt: skip


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_bodies_may_be_packed(server: Running, expected: Detection, packing: str) -> None:
    client = Client("http", server)
    inputs = [client.tensor("frames", FRAMES, "UINT8"), client.tensor("classes", indices(), "INT64")]
    found = client.client.infer("part", inputs, request_compression_algorithm=packing)
    assert np.array_equal(found.as_numpy("map"), expected.map)


def test_values_that_json_cannot_hold_are_null() -> None:
    def lost(asked: Asked) -> Any:
        return replace(good(1), maps=np.full((1, 8, 8), np.nan, np.float32))

    async def do(asked: Asked) -> Any:
        return lost(asked)

    with Running(FakePool(do=do)) as server:
        plain = httpx.post(f"{server.http}/v2/models/part/infer", json=request_json())
        assert plain.status_code == 200 and plain.json()["outputs"][0]["data"] == [None] * 64
        for way in WAYS:
            assert np.isnan(Client(way, server)(tiny_frames(1, 4, 4)).outputs["map"]).all()


def test_a_child_process_judges_the_same(bundle: Path, expected: Detection) -> None:
    pool = LocalPool.of({"part": ModelSettings(bundle=bundle)}, ServeLimits())
    with Running(pool, deadline=30) as server:
        got = Client("grpc", server)(FRAMES, indices())
        assert np.array_equal(got.outputs["map"], expected.map)
        assert np.array_equal(got.outputs["score"], expected.raw_score[:, None])


def test_a_model_without_thresholds_has_scores_and_no_verdicts(bundle: Path, expected: Detection) -> None:
    plain = exported("triton-server", len(PARTS))[1].path
    with Running(LocalPool({"part": opened(bundle), "plain": opened(plain)}), deadline=30) as server:
        listed = httpx.get(f"{server.http}/v2/models/plain").json()["outputs"]
        assert [one["name"] for one in listed] == ["map", "score"]
        for way in ("http", "grpc"):
            ask = Client(way, server)
            got = ask(FRAMES, indices(), model="plain")
            assert list(got.outputs) == ["map", "score"] and np.array_equal(got.outputs["map"], expected.map)
            assert tuple(ask(FRAMES, indices()).outputs) == ALL, "the other model has some"
            said = failure(ask, FRAMES, indices(), model="plain", outputs=("verdict",))
            assert "unknown output 'verdict'; valid: map, score" in said


def test_scores_of_two_terms_and_maps_of_tiles_are_described_as_they_come() -> None:
    async def two(asked: Asked) -> Any:
        return replace(good(2), maps=np.zeros((2, 20, 30), np.float32), raw_score=np.ones((2, 2), np.float32))

    card = replace(CARD, terms=2, tiled=True, calibrated=False, frame_size=(40, 60))
    with Running(FakePool(card, two)) as server:
        found = httpx.get(f"{server.http}/v2/models/part").json()
        shapes = {one["name"]: one["shape"] for one in (*found["inputs"], *found["outputs"])}
        assert shapes == {"frames": [-1, 40, 60, 3], "map": [-1, -1, -1], "score": [-1, 2]}
        got = Client("grpc", server)(tiny_frames(2, 40, 60), outputs=("map", "score")).outputs
        assert got["map"].shape == (2, 20, 30) and got["score"].shape == (2, 2)


# What is known before, and readiness


def test_clients_find_their_way(server: Running) -> None:
    for way in ("http", "grpc"):
        one = Client(way, server).client
        assert one.is_server_live() and one.is_server_ready() and one.is_model_ready("part")
    version = asyncio.run(server.pool.models())[0].version
    row = {"name": "part", "version": version, "state": "READY", "reason": ""}
    assert Client("http", server).client.get_model_repository_index() == [row]
    index = Client("grpc", server).client.get_model_repository_index().models
    assert [(one.name, one.version, one.state) for one in index] == [("part", version, "READY")]
    assert Client("http", server).client.get_server_metadata()["name"] == "flowad-fast"
    assert "binary_tensor_data" in Client("grpc", server).client.get_server_metadata().extensions


def test_what_is_not_ready_says_why() -> None:
    pool = FakePool()
    pool.trouble = "the canary frame's score\nis another one"
    with Running(pool) as server:
        for path in ("/v2/health/ready", "/v2/models/part/ready"):
            said = httpx.get(server.http + path)
            assert said.status_code == 503 and "the canary frame's score is another one" in said.json()["error"]
        assert httpx.get(f"{server.http}/v2/health/live").status_code == 200
        one = Client("grpc", server).client
        assert one.is_server_live() and not one.is_server_ready() and not one.is_model_ready("part")
        assert httpx.post(f"{server.http}/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"


def test_unknown_addresses_and_models_are_told_as_the_protocol_does(server: Running) -> None:
    for path, status in (
        ("/v2/models/prat", 404), ("/v2/models/prat/ready", 404), ("/v2/models/part/versions/2", 404), ("/v3", 404),
        ("/v2/models/part/infer", 405),
    ):  # fmt: skip
        said = httpx.get(server.http + path)
        assert said.status_code == status and set(said.json()) == {"error"}
    assert "did you mean 'part'?" in httpx.get(f"{server.http}/v2/models/prat").json()["error"]
    for way in WAYS:
        with pytest.raises(InferenceServerException, match="no model 'prat'") as told:
            Client(way, server)(FRAMES, indices(), model="prat")
        assert told.value.status() == ("StatusCode.NOT_FOUND" if way == "grpc" else "404")
    with pytest.raises(InferenceServerException) as told:
        Client("grpc", server).client.get_inference_statistics()
    assert told.value.status() == "StatusCode.UNIMPLEMENTED"


# The manual


@pytest.mark.parametrize("language", ["python", "sh"])
def test_the_manuals_examples_run(server: Running, language: str) -> None:
    page = (Path(__file__).parent.parent / "docs" / "serving-protocol.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", page, re.S)
    assert len(blocks) == 1
    code = blocks[0].replace("127.0.0.1:8000", server.http.removeprefix("http://"))
    if language == "sh" and shutil.which("curl") is None:
        pytest.skip("needs curl")
    command = [sys.executable, "-c", code] if language == "python" else ["sh", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"good|anomalous|invalid", done.stdout) and "error" not in done.stdout, done.stdout
