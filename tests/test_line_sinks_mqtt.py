"""The MQTT sink against a real mosquitto, which is killed in between."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from line_servers import NOW, certificate, free_port, listening, program, record, until
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion
from pydantic import ValidationError

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.line.event import Alarm
from flowad_fast.line.feeder import Feeder
from flowad_fast.line.sinks.base import Secret
from flowad_fast.line.sinks.mqtt import MqttSettings
from flowad_fast.line.sinks.rows import from_row

PASSWORD = "sesame, open"


class Broker:
    """Mosquitto in a folder of its own; subscriptions are on disk once `save` was called."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self.program = program("mosquitto", "mosquitto")
        self.port, self.folder = free_port(), folder
        folder.chmod(0o755)
        base = (
            f"listener {self.port} 127.0.0.1",
            "set_tcp_nodelay true",
            "persistence true",
            f"persistence_location {folder}/",
            "max_inflight_messages 0",
            "queue_qos0_messages true",
            "max_queued_messages 0",
            f"user {'root' if os.geteuid() == 0 else 'mosquitto'}",
        )
        (folder / "conf").write_text("\n".join([*base, *(lines or ("allow_anonymous true",))]) + "\n")
        self.start()

    def start(self) -> None:
        command = [self.program, "-c", self.folder / "conf"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(self.folder / "log").open("a"))
        until(lambda: listening(self.port))

    def save(self) -> None:
        (self.folder / "mosquitto.db").unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        until((self.folder / "mosquitto.db").exists)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def settings(self, **more: object) -> MqttSettings:
        given = {"kind": "mqtt", "host": "127.0.0.1", "port": self.port, "timeout": 5, **more}
        return MqttSettings.model_validate(given)


class Listener:
    """A subscriber whose session outlives the broker; `messages` has (topic, payload, retained).

    It acknowledges nothing (QoS 0): writing to a broker that was just killed would make it close the connection before
    it has read what the broker had delivered and acknowledged.
    """

    def __init__(self, broker: Broker, name: str = "listener", **login: str) -> None:
        self.messages: list[tuple[str, bytes, bool]] = []
        self._ready = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, name, clean_session=False)
        self._client.reconnect_delay_set(0.05, 0.1)  # type: ignore[arg-type]
        if login:
            self._client.username_pw_set(**login)
        self._client.on_connect = lambda client, *_: client.subscribe("#", qos=0)
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._got
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        assert self._ready.wait(10)

    def _got(self, client: Client, data: object, message: MQTTMessage) -> None:
        self.messages.append((message.topic, message.payload, message.retain))

    def parts(self) -> list[str]:
        return [json.loads(data)["part"] for topic, data, _ in list(self.messages) if topic.endswith("outcome")]

    def states(self) -> list[bytes]:
        return [data for topic, data, _ in list(self.messages) if topic == "flowad/state"]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    one = Broker(tmp_path)
    yield one
    one.kill()


@pytest.fixture
def listener(broker: Broker) -> Iterator[Listener]:
    one = Listener(broker)
    yield one
    one.close()


def test_events_arrive_under_their_topics_without_pictures(broker: Broker, listener: Listener) -> None:
    sink = broker.settings(topic="plant/{camera}/{result}").open()
    camera = replace(record("p\0é"), camera="a/+#\n$é", frame=np.zeros((4, 4, 3), np.uint8), score=float("-inf"))
    alarm = Alarm("camera lost", NOW, "t", figures={"n": 1.0})
    sink.publish([camera, alarm])
    until(lambda: len(listener.messages) == 3)
    state, outcome, told = listener.messages
    assert state == ("flowad/state", b"online", False)
    assert outcome[0] == "plant/a____$é/good" and from_row(json.loads(outcome[1])) == camera
    assert told[0] == "flowad/alarm/camera lost" and from_row(json.loads(told[1])) == alarm
    sink.close()
    later = Listener(broker, "later")
    until(lambda: len(later.messages) == 2)
    assert sorted((topic, retained) for topic, _, retained in later.messages) == [
        ("flowad/alarm/camera lost", True),
        ("flowad/state", True),
    ]
    assert later.states() == [b"offline"]
    later.close()


def test_a_broker_that_is_killed_in_the_middle_loses_nothing_and_order_is_kept(
    broker: Broker, listener: Listener
) -> None:
    broker.save()
    told: list[Alarm] = []
    feeder = Feeder("mqtt", broker.settings().open(), told.append, capacity=5000, batch=16, pauses=(0.05, 0.2))
    names = [f"{number:04d}" for number in range(3000)]
    for name in names:
        feeder.give(record(name))
    until(lambda: len(listener.parts()) > 500)
    broker.kill()
    so_far = len(listener.parts())
    until(lambda: feeder.failures > 0)
    broker.start()
    assert feeder.close(20)
    until(lambda: listener.parts()[-1:] == names[-1:])
    got = listener.parts()
    assert so_far < len(names), "the broker was killed too late to show anything"
    assert list(dict.fromkeys(got)) == names and len(got) <= len(names) + 16
    assert feeder.missed == 0 and [alarm.over for alarm in told] == [False, True]


def test_the_state_says_offline_when_the_line_is_killed(broker: Broker, listener: Listener) -> None:
    sink = broker.settings().open()
    sink.publish([record("a")])
    until(lambda: listener.states() == [b"online"])
    assert sink._connection is not None
    sink._connection.drop()
    until(lambda: listener.states() == [b"online", b"offline"])
    sink.publish([record("b")])
    until(lambda: listener.states() == [b"online", b"offline", b"online"])
    sink.close()
    until(lambda: listener.states()[3:] == [b"offline"])
    assert listener.parts() == ["a", "b"]


def test_a_broker_that_is_away_at_first_is_an_error_and_then_works(broker: Broker) -> None:
    sink = broker.settings().open()
    broker.kill()
    with pytest.raises(DeliveryError, match="cannot be reached .*check address and port"):
        sink.publish([record("a")])
    broker.start()
    listener = Listener(broker)
    sink.publish([record("a")])
    until(lambda: listener.parts() == ["a"])
    sink.close()
    listener.close()


def test_a_broker_that_takes_connections_and_says_nothing_is_given_up() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = MqttSettings(kind="mqtt", host="127.0.0.1", port=silent.getsockname()[1], timeout=0.3)
        with pytest.raises(DeliveryError, match="did not answer within 0.3 s"):
            settings.open().publish([record("a")])


def test_passwords_and_encryption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, key = certificate(tmp_path)
    program("mosquitto_passwd", "mosquitto")
    subprocess.run(["mosquitto_passwd", "-c", "-b", tmp_path / "users", "line", PASSWORD], check=True)
    broker = Broker(
        tmp_path,
        "allow_anonymous false",
        f"password_file {tmp_path}/users",
        f"certfile {authority}",
        f"keyfile {key}",
    )
    try:
        monkeypatch.setenv("LINE_PASSWORD", PASSWORD)
        right = {"username": "line", "password": Secret(env="LINE_PASSWORD"), "tls": {"authority": authority}}
        settings = broker.settings(**right)
        assert "lets this client in" in settings.check()
        sink = settings.open()
        sink.publish([record("a")])
        sink.close()
        assert PASSWORD not in repr(settings) + settings.model_dump_json()
        with pytest.raises(DeliveryError, match="cannot be reached .*CERTIFICATE_VERIFY_FAILED"):
            broker.settings(**right | {"tls": {}}).check()
        with pytest.raises(ConfigError, match="expected readable PEM files"):
            broker.settings(**right | {"tls": {"authority": tmp_path / "none.pem"}}).check()
        monkeypatch.setenv("LINE_PASSWORD", "wrong-one")
        with pytest.raises(DeliveryError, match="refused this client .*check username and password") as caught:
            settings.check()
        assert "wrong-one" not in str(caught.value)
    finally:
        broker.kill()


@pytest.mark.parametrize(
    ("field", "value"),
    [("topic", "a/#"), ("topic", "{part}"), ("topic", "{camera.x}"), ("topic", "a{"), ("alarm_topic", "{camera}"),
     ("state_topic", ""), ("state_topic", "{kind}")],
)  # fmt: skip
def test_topics_that_no_broker_takes_are_refused(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match=f"{field}\n.*expected a topic"):
        MqttSettings.model_validate({"kind": "mqtt", "host": "h", field: value})
