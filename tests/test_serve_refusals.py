"""What the server refuses: no result in time, bad requests. All are named, none is a verdict."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not os.environ.get("CI"):
    pytest.importorskip("httpx")
    pytest.importorskip("tritonclient.grpc")
import httpx
from tritonclient.utils import InferenceServerException

from flowad_fast.config import Classes
from flowad_fast.detector import Detector
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve.local import LocalPool
from flowad_fast.serve.pool import Asked, NoResultError
from flowad_fast.serve.settings import ServeLimits
from tests.line_servers import until
from tests.models import tiny_frames
from tests.serve_fake import CARD, FakePool
from tests.serve_front import (
    FRAMES,
    WAYS,
    Answer,
    Client,
    Moody,
    Running,
    calibrated,
    failure,
    indices,
    local,
    request_json,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tmp_path_factory.mktemp("protocol"))


# No results

STATUSES = {
    NoResult.LATE: ("504", "DEADLINE_EXCEEDED"),
    NoResult.QUEUE_FULL: ("503", "RESOURCE_EXHAUSTED"),
    NoResult.ENGINE_FAILED: ("503", "UNAVAILABLE"),
    NoResult.SOURCE_LOST: ("503", "UNAVAILABLE"),
    NoResult.SHUTTING_DOWN: ("503", "UNAVAILABLE"),
}


@pytest.mark.parametrize("result", NoResult)
def test_no_result_has_a_status_and_a_name_and_no_verdict(result: NoResult, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flowad_fast")

    async def none(asked: Asked) -> None:
        raise NoResultError(result, "for a test")

    http, grpc = STATUSES[result]
    with Running(FakePool(do=none)) as server:
        for way in WAYS:
            with pytest.raises(InferenceServerException, match=f"no result: {result.value}: for a test") as told:
                Client(way, server)(tiny_frames(1), parameters={"part": f"by {way}"})
            assert f"part, parts by {way}: no result: {result.value}: for a test" in caplog.text
            assert told.value.status() == (f"StatusCode.{grpc}" if way == "grpc" else http)
        said = httpx.post(f"{server.http}/v2/models/part/infer", json=request_json())
        assert said.json() == {"error": f"no result: {result.value}: for a test"}


def moody(bundle: Path, before: Callable[[], None], **options: Any) -> tuple[LocalPool, list[Moody]]:
    made: list[Moody] = []

    def around(detector: Detector) -> Moody:
        made.append(Moody(detector, before))
        return made[0]

    return local(bundle, around, **options), made


@pytest.mark.parametrize("way", WAYS)
def test_what_is_late_is_told_so_in_time_and_the_next_is_answered(bundle: Path, way: str) -> None:
    pause = [1.0]
    pool, made = moody(bundle, lambda: time.sleep(pause[0]))
    with Running(pool, deadline=20) as server:
        made[0].armed = True
        ask = Client(way, server)
        for options in ({"parameters": {"deadline_ms": 100}}, {"timeout": 100_000}):
            begin = time.monotonic()
            assert "no result: late" in failure(ask, FRAMES, indices(), **options)
            assert time.monotonic() - begin < 0.9
        pause[0] = 0.0
        assert ask(FRAMES, indices(), parameters={"deadline_ms": 10_000}).outputs["verdict"].shape == (4, 1)


def test_a_full_queue_refuses_one_more_and_disturbs_no_other(bundle: Path) -> None:
    go, going = threading.Event(), threading.Event()
    pool, made = moody(bundle, lambda: (going.set(), go.wait(20)) and None, queue=1)  # type: ignore[func-returns-value]
    with Running(pool, deadline=20) as server:
        made[0].armed = True
        answers: list[Answer] = []
        asking = [threading.Thread(target=lambda: answers.append(Client("grpc", server)(FRAMES, indices())))]
        asking[0].start()
        assert going.wait(10)
        asking.append(threading.Thread(target=lambda: answers.append(Client("http", server)(FRAMES, indices()))))
        asking[1].start()
        worker = pool._workers["part"]
        until(lambda: len(worker._waiting) == 1)
        assert "no result: queue full" in failure(Client("http", server), FRAMES, indices())
        go.set()
        for one in asking:
            one.join(20)
        assert len(answers) == 2


def test_who_ends_answers_what_is_being_judged_and_refuses_what_waits(bundle: Path) -> None:
    go, going = threading.Event(), threading.Event()
    pool, made = moody(bundle, lambda: (going.set(), go.wait(20)) and None)  # type: ignore[func-returns-value]
    told: dict[str, Any] = {}

    def ask(name: str, server: Running, way: str) -> None:
        try:
            told[name] = Client(way, server)(FRAMES, indices())
        except InferenceServerException as error:
            told[name] = error.message()

    with Running(pool, deadline=20) as server:
        made[0].armed = True
        first = threading.Thread(target=ask, args=("judged", server, "http"))
        first.start()
        assert going.wait(10)
        second = threading.Thread(target=ask, args=("waiting", server, "grpc"))
        second.start()
        until(lambda: len(pool._workers["part"]._waiting) == 1)
        server.stop()
        second.join(10)
        assert told["waiting"] == "no result: shutting down"
        assert httpx.get(f"{server.http}/v2/health/ready").status_code == 503
        assert "no result: shutting down" in failure(Client("http", server), FRAMES, indices())
        go.set()
        first.join(10)
        assert isinstance(told["judged"], Answer)


def test_an_engine_that_fails_is_started_again(bundle: Path) -> None:
    trouble = [RuntimeError("CUDA error")]

    def before() -> None:
        if trouble:
            raise trouble.pop()

    pool, made = moody(bundle, before)
    with Running(pool, deadline=20) as server:
        made[0].armed = True
        ask = Client("http", server)
        assert "503 no result: engine failed: the detector raised RuntimeError: CUDA error" == failure(
            ask, FRAMES, indices()
        )
        until(lambda: Client("grpc", server).client.is_server_ready())
        assert ask(FRAMES, indices()).outputs["verdict"].shape == (4, 1)


def test_an_engine_that_hangs_is_given_up_and_one_that_computes_something_else_is_not_ready(bundle: Path) -> None:
    hang = threading.Event()
    pool, made = moody(bundle, lambda: hang.is_set() and time.sleep(3), limits=ServeLimits(call=1.0, canary=0.2))  # type: ignore[arg-type,return-value]
    with Running(pool, deadline=20) as server:
        made[0].armed = True
        ask = Client("http", server)
        hang.set()
        assert "no result: engine failed: the detector did not answer within 1 s" in failure(ask, FRAMES, indices())
        hang.clear()
        until(lambda: Client("http", server).client.is_server_ready())
        real = made[0]._detector
        made[0]._detector = lambda frames, classes: real(255 - frames, classes)  # type: ignore[assignment]
        until(
            lambda: (
                "does not compute what it did" in httpx.get(f"{server.http}/v2/health/ready").json().get("error", "")
            )
        )
        assert "no result: engine failed" in failure(ask, FRAMES, indices())
        made[0]._detector = real
        until(lambda: Client("http", server).client.is_server_ready())
        assert ask(FRAMES, indices()).outputs["verdict"].shape == (4, 1)


def test_what_nobody_expected_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def burst(asked: Asked) -> None:
        raise RuntimeError("/secret/path")

    with Running(FakePool(do=burst)) as server:
        for way, status in (("http", "500"), ("grpc", "StatusCode.INTERNAL")):
            said = failure(Client(way, server), tiny_frames(1))
            assert said == f"{status} no result: the server failed; its log says how"
    assert "/secret/path" in caplog.text


# Requests


def test_what_a_request_says_reaches_the_pool() -> None:
    pool = FakePool()
    with Running(pool, deadline=3) as server:
        for way in WAYS:
            ask = Client(way, server)
            pool.asked.clear()
            ask(tiny_frames(2), parameters={"part": "A 1, A 2", "deadline_ms": 1500})
            ask(tiny_frames(2), request_id="r")
            ask(tiny_frames(1), timeout=700_000, priority=1)
            first, second, third = pool.asked
            assert first.parts == ("A 1", "A 2") and 1.0 < first.seconds <= 1.5
            assert second.parts == ("r/0", "r/1") and 2.5 < second.seconds <= 3
            assert len(third.parts) == 1 and 0.3 < third.seconds <= 0.7
            assert first.classes is None and first.version == "" and first.frames.dtype == np.uint8
        assert Client("grpc", server)(tiny_frames(1), client_timeout=0.5) and pool.asked[-1].seconds <= 0.51


BAD: list[tuple[dict[str, Any], str]] = [
    ({"inputs": []}, "the input frames is missing"),
    ({"inputs": {}}, "inputs: Input should be a valid"),
    (request_json(parameters={"deadlin_ms": 5}), "unknown parameter 'deadlin_ms'; did you mean 'deadline_ms'?"),
    (request_json(parameters={"deadline_ms": -1}), "deadline_ms must be a number above 0 and at most 60000"),
    (request_json(parameters={"deadline_ms": 10**30}), "deadline_ms must be a number above 0"),
    (request_json(parameters={"timeout": "5"}), "timeout must be a number above 0"),
    (request_json(parameters={"class": "nut"}), "the model has no classes"),
    (request_json(parameters={"part": "a,b"}), "part must be 1 ids"),
    (request_json(outputs=[{"name": "mapp"}]), "unknown output 'mapp'; did you mean 'map'?"),
    (request_json(outputs=[{"name": "map"}, {"name": "map"}]), "an output is there twice"),
    (request_json(outputs=[{"name": "map", "parameters": {"classification": 3}}]), "'classification' is not supported"),
]


@pytest.mark.parametrize(("body", "why"), BAD, ids=[why for _, why in BAD])
def test_bad_requests_say_what_was_expected(body: dict[str, Any], why: str) -> None:
    with Running(FakePool(), grpc_port=None) as server:
        said = httpx.post(f"{server.http}/v2/models/part/infer", json=body)
        assert said.status_code == 400 and why in said.json()["error"]


TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"shape": [1, 2, 2, 4]}, "expected UINT8 [frames, height, width, 3]"),
    ({"shape": [1, 0, 2, 3]}, "expected UINT8 [frames, height, width, 3]"),
    ({"shape": [1, 2, 2, -3]}, "inputs.0.shape.3"),
    ({"shape": [1, 3, 2, 3]}, "got 12 values, expected 18"),
    ({"datatype": "FP32"}, "expected UINT8"),
    ({"data": [0.5] * 12}, "values that are no UINT8"),
    ({"data": [True] * 12}, "values that are no UINT8"),
    ({"data": [256] * 12}, "values beyond UINT8"),
    ({"data": ["x" * 9] * 12}, "values that are no UINT8"),
    ({"data": [[[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0]]]]}, "lists of different lengths"),
    ({"data": None}, "neither data nor binary_data_size"),
    ({"data": None, "parameters": {"binary_data_size": 12}}, "but 0 bytes are left"),
    ({"data": None, "parameters": {"binary_data_size": True}}, "expected data, or binary_data_size"),
    ({"data": None, "parameters": {"shared_memory_region": "x"}}, "'shared_memory_region' is not supported"),
    ({"name": "frame"}, "unknown input 'frame'; did you mean 'frames'?"),
    ({"parameters": {"a": {}}}, "inputs.0.parameters.a"),
]


def test_bad_tensors_say_what_was_expected() -> None:
    with Running(FakePool(), grpc_port=None) as server:
        for change, why in TENSORS:
            body = request_json()
            body["inputs"][0] |= change
            said = httpx.post(f"{server.http}/v2/models/part/infer", json=body)
            assert said.status_code == 400 and why in said.json()["error"], (change, said.text)


def test_bad_classes_say_what_was_expected() -> None:
    card = replace(CARD, classes=Classes(("nut", "screw"), 2, True))

    async def check(asked: Asked) -> None:
        card.classes.indices(asked.classes, len(asked.frames))

    with Running(FakePool(card, check)) as server:
        for way in WAYS:
            ask, frames = Client(way, server), tiny_frames(2)
            cases: list[tuple[dict[str, Any], str]] = [
                ({}, "got none of them, expected one of the inputs classes, class_names"),
                ({"names": ("nut", "nut"), "parameters": {"class": "nut"}}, "class_names and class, expected one"),
                ({"classes": np.zeros((1, 1), np.int64)}, "classes: got the shape [1, 1], expected [2, 1]"),
                ({"classes": np.full((2, 1), 2)}, "class index 2 is not in the model"),
                ({"names": ("nut", "nail")}, "class 'nail' is not in the model"),
                ({"parameters": {"class": "crew"}}, "did you mean 'screw'?"),
            ]
            for options, why in cases:
                said = failure(ask, frames, **options)
                assert why in said and ("INVALID_ARGUMENT" if way == "grpc" else "400") in said, said
