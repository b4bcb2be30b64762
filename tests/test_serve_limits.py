"""Who may ask how much, and how a server ends."""

import asyncio
import os
import signal
import socket
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("CI"):
    pytest.importorskip("httpx")
    pytest.importorskip("tritonclient.grpc")
import httpx

from flowad_fast.detector import Detector
from flowad_fast.errors import ConfigError, FlowADError
from flowad_fast.line.sinks.base import Secret
from flowad_fast.serve.pool import Asked
from flowad_fast.serve.protocol.front import Front
from flowad_fast.serve.protocol.settings import FrontSettings, read_token
from tests.line_servers import until
from tests.models import tiny_frames
from tests.serve_fake import VERSION, FakePool, child
from tests.serve_front import (
    TOKEN,
    Client,
    Moody,
    Running,
    calibrated,
    failure,
    local,
    request_json,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tmp_path_factory.mktemp("protocol"))


def test_requests_beyond_a_limit_are_refused_before_they_cost_anything() -> None:
    limits = {"bytes": 4096, "json_bytes": 2048, "pixels": 600, "frames": 3, "header_bytes": 2048, "seconds": 0.5}
    with Running(FakePool(), limits=limits) as server:
        infer = f"{server.http}/v2/models/part/infer"

        def post(**options: Any) -> httpx.Response:
            return httpx.post(infer, timeout=20, **options)

        for said in (
            post(content=b"x" * 5000),
            post(content=iter([b"x" * 3000, b"x" * 3000])),
            post(content=b" " * 3000),
            post(content=zlib.compress(b" " * 10_000_000), headers={"Content-Encoding": "deflate"}),
        ):
            assert said.status_code == 413 and set(said.json()) == {"error"}, said.text
        for way in ("http", "grpc"):
            for frames, why in ((tiny_frames(4, 4, 4), "got 4 frames"), (tiny_frames(1, 25, 25), "25 x 25 pixels")):
                assert why in failure(Client(way, server), frames)
        assert "RESOURCE_EXHAUSTED" in failure(Client("grpc", server), tiny_frames(2, 40, 40))
        assert httpx.get(f"{server.http}/v2", headers={"x": "y" * 8000}).status_code == 431
        assert httpx.post(infer, content=b"{}", headers={"Content-Encoding": "br"}).status_code == 400
        assert slowly(server, b"POST /v2/models/part/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n1") == 408
        assert Client("http", server)(tiny_frames(1, 4, 4)).version == VERSION


def slowly(server: Running, data: bytes) -> int:
    """The status of a request that does not come to its end."""
    host, _, port = server.http.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as one:
        one.sendall(data)
        return int(one.recv(100).split()[1])


def test_a_body_may_be_larger_than_its_json_may() -> None:
    with Running(FakePool(), limits={"json_bytes": 2048}) as server:
        assert Client("http", server)(tiny_frames(2, 200, 200)).version == VERSION
        assert "413" in failure(Client("http-json", server), tiny_frames(2, 200, 200))


def test_too_many_requests_at_a_time_are_refused() -> None:
    go = threading.Event()

    async def wait(asked: Asked) -> None:
        while not go.is_set():
            await asyncio.sleep(0.01)

    pool = FakePool(do=wait)
    with Running(pool, limits={"requests": 1}, deadline=20) as server:
        first = threading.Thread(target=lambda: Client("grpc", server)(tiny_frames(1)))
        first.start()
        until(lambda: len(pool.asked) == 1)
        for way, status in (("http", "503"), ("grpc", "StatusCode.RESOURCE_EXHAUSTED")):
            said = failure(Client(way, server), tiny_frames(1))
            assert said == f"{status} no result: queue full: 1 requests are on their way"
        assert Client("grpc", server).client.is_server_live()
        go.set()
        first.join(10)
        assert Client("http", server)(tiny_frames(1)).version == VERSION


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    (tmp_path / "token").write_text(TOKEN + "\n")
    return Secret(file=tmp_path / "token")


def test_everything_but_probes_needs_the_token(secret: Secret) -> None:
    pool = FakePool()
    with Running(pool, token=secret.model_dump()) as server:
        for way, status in (("http", "401"), ("http-json", "401"), ("grpc", "StatusCode.UNAUTHENTICATED")):
            assert Client(way, server, TOKEN)(tiny_frames(1)).version == VERSION
            pool.asked.clear()
            for token in (None, "", TOKEN[:-1], "x" + TOKEN[1:], TOKEN + "x"):
                said = failure(Client(way, server, token), tiny_frames(1))
                header = "authorization" if way == "grpc" else "Authorization"
                assert said == f"{status} wrong or missing token; send {header}: Bearer TOKEN"
            one = Client(way, server).client
            assert one.is_server_live() and one.is_server_ready() and one.is_model_ready("part") and not pool.asked
            for call in (
                one.get_server_metadata, one.get_model_repository_index,
                lambda one=one: one.get_model_metadata("part"), lambda one=one: one.get_model_config("part"),
            ):  # fmt: skip
                assert status in failure(call)
        assert httpx.get(f"{server.http}/v2", headers={"Authorization": "Basic é".encode()}).status_code == 401


def test_nobody_else_is_let_in_by_accident(secret: Secret, tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::"):
        with pytest.raises(ValueError, match="without a token; add token"):
            FrontSettings(host=host)
        assert FrontSettings(host=host, token=secret) and FrontSettings(host=host, insecure=True)
    assert FrontSettings(host="::1") and FrontSettings(host="localhost")
    with pytest.raises(ValueError, match="two ports"):
        FrontSettings(http_port=8000, grpc_port=8000)
    with pytest.raises(ValueError, match="neither http_port nor grpc_port"):
        FrontSettings(http_port=None, grpc_port=None)
    with pytest.raises(ValueError, match="above largest_deadline"):
        FrontSettings(deadline=61)
    (tmp_path / "short").write_text("guess")
    with pytest.raises(ConfigError, match="front.token has 5 characters, expected at least 16"):
        read_token(FrontSettings(token=Secret(file=tmp_path / "short")))


def test_small_answers_do_not_wait_for_an_acknowledgement() -> None:
    """The shortest of some: with Nagle's algorithm each took 40 ms, whatever the machine."""
    with Running(FakePool(), grpc_port=None) as server, httpx.Client(base_url=server.http) as client:
        assert (
            min(client.post("/v2/models/part/infer", json=request_json()).elapsed.total_seconds() for _ in range(30))
            < 0.03
        )


def test_an_address_that_is_taken_is_told() -> None:
    async def start(**settings: Any) -> None:
        front = Front(FakePool(), FrontSettings(**settings))
        try:
            await front.start()
        finally:
            await front.close()

    with Running(FakePool()) as server:
        port = int(server.http.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}: cannot be bound .*; choose another http_port"):
            asyncio.run(start(http_port=port, grpc_port=None))
        port = int(server.grpc.rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port}: cannot be bound; choose another grpc_port"):
            asyncio.run(start(http_port=None, grpc_port=port))


def test_a_server_that_is_interrupted_while_it_starts_ends_at_once(bundle: Path) -> None:
    go = threading.Event()

    def slow(detector: Detector) -> Moody:
        found = Moody(detector, lambda: go.wait(20) and None)  # type: ignore[func-returns-value]
        found.armed = True
        return found

    async def start() -> None:
        async with asyncio.timeout(0.3):
            await local(bundle, slow).start()

    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(start())
    assert time.monotonic() - begin < 5
    go.set()


def test_a_bundle_that_does_not_start_is_told(bundle: Path) -> None:
    def broken(detector: Detector) -> Moody:
        def refuse() -> None:
            raise RuntimeError("no such device")

        found = Moody(detector, refuse)
        found.armed = True
        return found

    with pytest.raises(FlowADError, match="no such device"):
        asyncio.run(local(bundle, broken).start())


def test_sigterm_lets_answers_out_and_a_second_one_does_not_wait() -> None:
    with child(seconds=3.0, deadline=20) as server:
        answers: list[int] = []
        infer = f"{server.http}/v2/models/part/infer"
        asking = threading.Thread(target=lambda: answers.append(httpx.post(infer, json=request_json()).status_code))
        asking.start()
        time.sleep(1.5)
        server.process.send_signal(signal.SIGTERM)
        asking.join(10)
        assert answers == [200] and server.process.wait(10) == 0
    with child(seconds=30, deadline=20) as server:
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) in (0, -signal.SIGTERM)
