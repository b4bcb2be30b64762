"""The webhook sink against servers that are slow, failing, or not there."""

import contextlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from line_servers import NOW, free_port, record, until
from pydantic import ValidationError

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.line.event import Alarm
from flowad_fast.line.feeder import Feeder
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks.base import Secret
from flowad_fast.line.sinks.rows import from_row
from flowad_fast.line.sinks.webhook import WebhookSettings, signature
from flowad_fast.stages.decision import Verdict

KEY = "sesame, open"


class Receiver(ThreadingHTTPServer):
    """Notes every request; answers with `statuses` in turn, then 200, each after `delay` seconds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.delay = 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def settings(self, **more: object) -> WebhookSettings:
        url = f"http://127.0.0.1:{self.server_port}/hidden-path"
        return WebhookSettings.model_validate({"kind": "webhook", "url": url, "timeout": 5, **more})

    def events(self) -> list[dict[str, object]]:
        return [event for _, body in self.requests for event in json.loads(body)["events"]]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(({key.lower(): value for key, value in self.headers.items()}, body))
        time.sleep(self.server.delay)
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("Content-Length", "0")
        with contextlib.suppress(OSError):  # who was kept waiting is gone
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.shutdown()
    one.server_close()


def test_a_signed_batch_can_be_checked_and_read_by_the_receiver(receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    settings = receiver.settings(secret=Secret(file=tmp_path / "key"), bearer=Secret(file=tmp_path / "key"))
    sink = settings.open()
    events = [record("a\0é\u2028", arrived=datetime.now(UTC)), Alarm("drift", NOW, "t", figures={"p": float("inf")})]
    sink.publish([*events])
    ((headers, body),) = receiver.requests
    expected = hmac.new(KEY.encode(), headers["x-flowad-timestamp"].encode() + b"." + body, "sha256").hexdigest()
    assert headers["x-flowad-signature"] == f"sha256={expected}" == signature(KEY, headers["x-flowad-timestamp"], body)
    assert abs(int(headers["x-flowad-timestamp"]) - time.time()) < 60
    assert headers["authorization"] == f"Bearer {KEY}" and headers["content-type"] == "application/json"
    rows = json.loads(body)["events"]
    ids = [row.pop("id") for row in rows]
    assert [from_row(row) for row in rows] == events and len(set(ids)) == 2
    assert KEY not in repr(settings) and KEY.encode() not in body
    sink.publish([*events])
    assert [row["id"] for row in receiver.events()][2:] == ids, "what is given again has the same ids"
    sink.close()


@pytest.mark.parametrize(
    ("wanted", "expected"), [("all", ["good", "late", "drift"]), ("rejected", ["late", "drift"]), ("alarms", ["drift"])]
)
def test_only_what_is_wanted_is_sent(receiver: Receiver, wanted: str, expected: list[str]) -> None:
    sink = receiver.settings(events=wanted).open()
    sink.publish([record("a"), record("b", NoResult.LATE), Alarm("drift", NOW, "t")])
    sink.publish([record("c")])
    sink.close()
    assert [row.get("result", row.get("kind")) for row in receiver.events()][: len(expected)] == expected
    assert len(receiver.requests) == (2 if wanted == "all" else 1)


@pytest.mark.parametrize(
    ("status", "message"),
    [(500, "answered 500, expected 200 to 299; check"), (401, "answered 401"), (302, "address that it leads to")],
)
def test_what_a_failing_server_did_not_take_is_an_error_and_no_secret_is_in_it(
    receiver: Receiver, status: int, message: str
) -> None:
    receiver.statuses = [status]
    sink = receiver.settings().open()
    with pytest.raises(DeliveryError, match=message) as caught:
        sink.publish([record("a")])
    assert "hidden-path" not in str(caught.value)
    sink.publish([record("a")])
    assert len(receiver.requests) == 2
    sink.close()


def test_a_slow_server_is_given_up_and_does_not_hold_back_the_next_request(receiver: Receiver) -> None:
    sink = receiver.settings(timeout=0.3).open()
    receiver.delay = 3.0
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="did not answer within 0.3 s"):
        sink.publish([record("a")])
    assert time.monotonic() - started < 2.5
    receiver.delay = 0
    sink.publish([record("a")])
    sink.close()


def test_a_server_that_answers_byte_by_byte_is_given_up_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                try:
                    for byte in b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000:
                        connection.send(bytes([byte]))
                        time.sleep(0.05)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        sink = WebhookSettings(kind="webhook", url=url, timeout=0.4).open()
        started = time.monotonic()
        with pytest.raises(DeliveryError, match="did not answer within 0.4 s"):
            sink.publish([record("a")])
        assert time.monotonic() - started < 2
        sink.close()
        thread.join(10)


def test_through_the_feeder_nothing_is_lost_and_order_is_kept_while_the_server_fails(receiver: Receiver) -> None:
    receiver.statuses = [500, 503, 200, 404, 200, 500]
    told: list[Alarm] = []
    feeder = Feeder("webhook", receiver.settings().open(), told.append, batch=10, pauses=(0.01, 0.02))
    names = [str(number) for number in range(100)]
    for name in names:
        feeder.give(record(name))
    until(lambda: feeder.delivered == 100)
    assert feeder.close(10) and feeder.failures == 4 and feeder.missed == 0
    assert list(dict.fromkeys(str(row["part"]) for row in receiver.events())) == names


def test_pictures_are_never_sent(receiver: Receiver) -> None:
    sink = receiver.settings().open()
    sink.publish([replace(record("a", Verdict.ANOMALOUS), frame=np.zeros((500, 500, 3), np.uint8))])
    assert len(receiver.requests[0][1]) < 1000 and "frame" not in receiver.events()[0]
    sink.close()


def test_check_sends_no_events_and_says_what_would_fail(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "took a request without events" in receiver.settings().check()
    assert receiver.events() == [] and len(receiver.requests) == 1
    receiver.statuses = [403]
    with pytest.raises(DeliveryError, match="answered 403"):
        receiver.settings().check()
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        receiver.settings(secret=Secret(env="NO_SUCH_KEY")).check()
    monkeypatch.setenv("A_KEY", "two\nlines")
    with pytest.raises(ConfigError, match="characters that no header holds") as caught:
        receiver.settings(bearer=Secret(env="A_KEY")).check()
    assert "two" not in str(caught.value)
    with pytest.raises(DeliveryError, match="cannot be reached .*check address and server"):
        WebhookSettings(kind="webhook", url=f"http://127.0.0.1:{free_port()}/").check()


@pytest.mark.parametrize("url", ["ftp://a/b", "http://", "a", "https://line:secret@host/", "http://a:99999"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="expected (http|an address without user and password)|out of range"):
        WebhookSettings(kind="webhook", url=url)
