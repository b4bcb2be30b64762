"""The page's addresses: probes, metrics, state; and what is refused."""

import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowad_fast.errors import ConfigError
from flowad_fast.line import Shot
from flowad_fast.line.settings import WebSettings
from flowad_fast.line.sinks.base import Secret
from tests.line_servers import until
from tests.line_station import TOKEN, Page
from tests.test_detector import FakeEngine, calibration, fake
from tests.test_line_runner import frame

pytest.importorskip("fastapi")


def gated(*shots: np.ndarray | Shot) -> tuple[Iterator[np.ndarray | Shot], threading.Event]:
    """Shots at once, and a source that ends when it is let go."""
    go = threading.Event()

    def give() -> Iterator[np.ndarray | Shot]:
        yield from shots
        go.wait(20)

    return give(), go


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    """A good part, an anomalous one, and one without a frame."""
    shots, go = gated(frame(5), Shot(frame(150), "<b>150</b>"), Shot(None, "half", "incomplete buffer"))
    with Page(fake(calibration(100.0)), shots, tmp_path) as one:
        one.line.start()
        until(lambda: sum(one.line.health().results.values()) == 3)
        until(lambda: one.watch.report()["cell"].parts == 3)
        yield one
        go.set()


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_probes_say_how_the_line_is(tmp_path: Path) -> None:
    shots, go = gated(frame(5))
    with Page(fake(calibration(100.0)), shots, tmp_path) as page:
        before = page.ask("/readyz")
        assert before.status == 503 and before.body == b"the line was not started\n"
        page.line.start()
        assert page.ask("/healthz").body == b"alive\n"
        until(lambda: page.ask("/readyz").status == 200)
        page.line.stop()
        assert (after := page.ask("/readyz")).status == 503 and after.body == b"the line is stopping\n"
        assert page.ask("/healthz").status == 200, "it drains"
        go.set()
        page.line.close()
        assert page.ask("/healthz").status == 503


def test_a_line_whose_engine_failed_or_whose_cameras_are_gone_is_not_ready(tmp_path: Path) -> None:
    class Gone:
        def read(self, wait: float) -> Shot:
            raise OSError("unplugged")

        def close(self) -> None:
            pass

    with Page(fake(calibration(100.0)), [], tmp_path) as page:
        page.line._sources["cell"] = Gone()
        page.line.start()
        until(lambda: page.ask("/readyz").body == b"no camera gives parts\n")
        page.line._ready = "the canary frame's score is 3, expected 2"
        assert page.ask("/readyz").body == b"the canary frame's score is 3, expected 2\n"


def test_metrics_count_what_the_line_counts(page: Page) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    answer = page.ask("/metrics")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/plain")
    samples = {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(answer.body.decode())
        for one in family.samples
    }
    results = {"good": 1, "anomalous": 1, "source lost": 1}
    for result, count in results.items():
        assert samples["flowad_line_parts_total", ("camera", "cell"), ("result", result)] == count
    assert samples["flowad_line_latency_seconds_count",] == 3
    assert samples["flowad_line_latency_seconds_bucket", ("le", "+Inf")] == 3
    assert samples["flowad_line_threshold", ("product", "")] == 100
    assert samples["flowad_line_ready",] == 1 and samples["flowad_line_queue",] == 0
    assert samples["flowad_line_bundle_info", ("bundle", ""), ("engine", "fake on cpu")] == 1
    assert samples["flowad_line_alarm", ("camera", "cell"), ("kind", "line drifts")] == 0
    assert samples["flowad_line_camera_up", ("camera", "cell")] == 1
    assert ("flowad_line_engine_failures_total",) in samples
    assert page.ask("/metrics").status == 200, "a registry of its own, which can be read again"


def test_the_state_has_what_the_page_shows(page: Page) -> None:
    state = page.ask("/api/state").json
    assert state["ready"] and state["results"] == {"good": 1, "anomalous": 1, "source lost": 1}
    assert [one["result"] for one in state["last"]] == ["source lost", "anomalous", "good"], "newest first"
    assert state["rejected"][0]["part"].endswith("/<b>150</b>"), "text, for the page to show as text"
    assert state["monitor"]["cell"]["points"][0][1:4] == [3, 1, 1] and state["token"] is True
    assert TOKEN not in page.ask("/api/state").body.decode()
    live = state["live"]["cell"]
    assert live["size"] == [64, 64] and live["key"] == state["rejected"][0]["key"]


def test_pictures_are_asked_for_by_key_never_by_name(page: Page) -> None:
    key = page.ask("/api/state").json["live"]["cell"]["key"]
    shown = page.ask(f"/api/picture/{key}/frame")
    assert shown.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(shown.body)).size == (64, 64)
    heat = Image.open(io.BytesIO(page.ask(f"/api/picture/{key}/heat").body))
    assert heat.mode == "L" and heat.size == (64, 64)
    for path in (f"/api/picture/{key}/other", "/api/picture/0/frame", "/api/picture/..%2f..%2fetc/frame", "/page.py"):
        assert page.ask(path).status == 404, path


def test_every_answer_has_the_headers(page: Page) -> None:
    for path in ("/", "/page.js", "/page.css", "/healthz", "/metrics", "/api/state", "/nothing", "/api/bundles"):
        answer = page.ask(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["x-frame-options"] == "DENY"
        assert not any(one.startswith("access-control") for one in answer.headers)
        assert "server" not in answer.headers


CHANGES = [("POST", "/api/activate"), ("POST", "/api/rollback"), ("POST", "/api/cancel"), ("GET", "/api/bundles")]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_nothing_changes_without_the_token(page: Page, method: str, path: str) -> None:
    body, json = (b'{"bundle": "x"}', "application/json") if method == "POST" else (None, "text/plain")
    for headers in ({}, bearer("wrong"), bearer(TOKEN[:-1]), bearer(TOKEN + "x"), {"Cookie": f"token={TOKEN}"}):
        assert page.ask(path, method, body, **headers).status == 401
    assert page.ask(path, method, body, **bearer(), Content_Type=json).status in (200, 202, 409)


def test_without_a_token_the_page_only_shows(tmp_path: Path) -> None:
    with Page(fake(calibration(100.0)), [], tmp_path, token=None) as page:
        assert page.ask("/api/state").json["token"] is False
        for method, path in CHANGES:
            assert page.ask(path, method, b"{}", **bearer()).status == 403


def test_a_private_page_is_read_with_the_token_only(tmp_path: Path) -> None:
    with Page(fake(calibration(100.0)), [], tmp_path, private=True) as page:
        for path in ("/api/state", "/metrics", "/api/picture/0/frame"):
            assert page.ask(path).status == 401 and page.ask(path, **bearer()).status in (200, 404)
        assert page.ask("/").status == 200 and page.ask("/readyz").status == 503


def test_refused_bodies_and_hosts(page: Page) -> None:
    large = b'{"bundle": "' + b"x" * 20_000 + b'"}'
    assert page.ask("/api/activate", "POST", large, **bearer()).status == 413
    chunked = b"POST /api/activate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    with socket.create_connection(("127.0.0.1", page.web.port)) as one:
        one.sendall(chunked)
        assert one.recv(100).startswith(b"HTTP/1.1 413")
    assert page.ask("/", Host="line.example").status == 421, "a website must not reach it by a name of its own"
    assert page.ask("/", Host=f"localhost:{page.web.port}").status == 200
    for body in (b"", b"{", b"[]", b'{"bundle": "x", "shadow": -1}', b'{"bundle": "x", "other": 1}'):
        answer = page.ask("/api/activate", "POST", body, **bearer(), Content_Type="application/json")
        assert answer.status == 422 and "body" in answer.json["detail"]


def test_a_hammered_page_refuses_and_the_probes_answer(page: Page) -> None:
    stop, statuses = threading.Event(), []

    def hammer() -> None:
        while not stop.is_set():
            statuses.append(page.ask("/page.css").status)

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: 429 in statuses)
    assert page.ask("/readyz").status == 200 and page.ask("/healthz").status == 200
    stop.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    time.sleep(0.1)
    assert page.ask("/page.css").status == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "0.0.0.0"}, "without a token"),
        ({"host": "192.168.1.5"}, "insecure: true"),
        ({"host": "line.plant"}, "without a token"),
        ({"private": True}, "private without a token"),
        ({"certificate": "a.pem"}, "one of certificate and key"),
        ({"token": {"file": "a", "env": "b"}}, "env and file"),
        ({"token": "in-clear-text"}, "Secret"),
        ({"port": 0}, "port"),
    ],
)
def test_settings_that_would_be_open_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WebSettings.model_validate(fields)


def test_addresses_of_this_computer_need_no_token() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert WebSettings(host=host).local
    assert not WebSettings(host="0.0.0.0", insecure=True).local
    assert WebSettings(host="0.0.0.0", token=Secret(env="X")).address == "http://127.0.0.1:8600"


def test_a_short_token_or_a_taken_port_starts_no_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at least 16"):
        Page(fake(calibration(100.0)), [], tmp_path, token="short")
    with Page(fake(calibration(100.0)), [], tmp_path) as page, pytest.raises(ConfigError, match="cannot be bound"):
        from flowad_fast.line.web.server import bind

        bind(page.web)


def test_the_page_of_a_line_whose_call_hangs_answers(tmp_path: Path) -> None:
    held = threading.Event()

    class Hangs(FakeEngine):
        def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
            if frames[0, 0, 0, 0] == 7:
                held.wait(20)
            return super().run(frames, y)

    shots, go = gated(frame(7))
    with Page(fake(calibration(100.0), Hangs()), shots, tmp_path) as page:
        page.line.start()
        until(lambda: page.line.health().pending == 1)
        start = time.monotonic()
        assert page.ask("/api/state").json["pending"] == 1 and time.monotonic() - start < 2
        held.set()
        go.set()
