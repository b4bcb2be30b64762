"""Outcomes and alarms as MQTT messages, at least once and in order."""

import json
import socket
import string
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from flowad_fast.errors import DeliveryError, require
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.sinks.base import Secret, SinkBase, Tls
from flowad_fast.line.sinks.rows import text, to_row

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessageInfo

_REMEDY = "check address and port, and that the broker runs"


class MqttSettings(SinkBase):
    """A broker and the topics of this line.

    A message holds an event as one JSON object (see `rows.to_row`), no pictures. Outcomes are not retained; alarms
    are, so that who comes later sees the last of each kind.
    """

    promises_delivery: ClassVar[bool] = True

    kind: Literal["mqtt"]
    host: str = Field(min_length=1)
    port: int = Field(default=1883, ge=1, le=65535)
    """8883 is usual with `tls`."""
    client_id: str = ""
    """Two clients with one id throw each other out; empty: the broker gives one."""
    username: str | None = None
    password: Secret | None = None
    tls: Tls | None = None
    topic: str = "flowad/{camera}/outcome"
    """Of outcomes; may name {camera}, {result} and {action}. What they stand for cannot add levels or wildcards."""
    alarm_topic: str = "flowad/alarm/{kind}"
    """Of alarms; may name {kind}."""
    state_topic: str = "flowad/state"
    """Retained: `online` while the line is connected, `offline` after that, also when it was killed."""
    keepalive: int = Field(default=15, ge=1, le=3600)
    """Seconds; the broker says offline after one and a half times as long without a sign of life."""
    timeout: float = Field(default=10, gt=0, le=600)
    """Seconds until connecting, or the broker's acknowledgement, is given up."""

    @field_validator("topic", "alarm_topic", "state_topic")
    @classmethod
    def _topic(cls, value: str, info: Any) -> str:
        known = {"topic": {"camera", "result", "action"}, "alarm_topic": {"kind"}, "state_topic": set()}[
            info.field_name
        ]
        try:
            used = {name for _, name, *_ in string.Formatter().parse(value) if name is not None}
            filled = value.format(**dict.fromkeys(known, "x"))
        except (ValueError, KeyError, IndexError, AttributeError):
            raise ValueError(f"expected a topic with no names in braces but {sorted(known) or 'none'}") from None
        if used - known or not filled or any(one in filled for one in "+#\0"):
            raise ValueError("expected a topic without the wildcards + and #")
        return value

    @model_validator(mode="after")
    def _user(self) -> "MqttSettings":
        if self.password is not None and self.username is None:
            raise ValueError("got a password without a username, expected both")
        return self

    def open(self) -> "Mqtt":
        """The sink."""
        require("line", "paho", by="the sink mqtt")
        return Mqtt(self)

    def check(self) -> str:
        """That the broker lets this client in; its state is not touched, and whether it may publish is not known."""
        require("line", "paho", by="the sink mqtt")
        connection = _Connection(self, visible=False)
        connection.close()
        return f"{self.host}:{self.port} lets this client in; whether it may publish shows with the first message"


class _Connection:
    """One client of paho, with its own thread; it comes back by itself while nothing is published."""

    def __init__(self, settings: MqttSettings, visible: bool = True) -> None:
        """Connect; DeliveryError or ConfigError on failure. Only a visible one sets the state."""
        from paho.mqtt.client import Client, MQTTv311
        from paho.mqtt.enums import CallbackAPIVersion

        self._settings, self._visible = settings, visible
        self._where = f"{settings.host}:{settings.port}"
        suffix = "" if visible or not settings.client_id else "-check"
        self._client: Client = Client(CallbackAPIVersion.VERSION2, settings.client_id + suffix, protocol=MQTTv311)
        self._client.connect_timeout = settings.timeout
        self._client.max_inflight_messages_set(0)  # no limit: a batch is on its way as a whole
        if settings.username is not None:
            self._client.username_pw_set(settings.username, settings.password.read() if settings.password else None)
        if settings.tls is not None:
            self._client.tls_set_context(settings.tls.context())
        if visible:
            self._client.will_set(settings.state_topic, "offline", qos=1, retain=True)
        self._answered, self._refusal = threading.Event(), ""
        self._client.on_connect = self._connected
        self._client.on_socket_open = _hurry
        self._dropped = False
        try:
            self._client.connect(settings.host, settings.port, settings.keepalive)
        except (OSError, ValueError) as error:
            raise DeliveryError(f"{self._where} cannot be reached ({error}); {_REMEDY}") from None
        self._client.loop_start()
        if not self._answered.wait(settings.timeout):
            self.drop()
            raise DeliveryError(f"{self._where} did not answer within {settings.timeout} s; {_REMEDY}")
        if self._refusal:
            self.drop()
            raise DeliveryError(f"{self._where} refused this client ({self._refusal}); check username and password")

    def _connected(self, client: "Client", data: object, flags: object, reason: Any, properties: object) -> None:
        self._refusal = str(reason) if reason.is_failure else ""
        if not self._refusal and self._visible:
            client.publish(self._settings.state_topic, "online", qos=1, retain=True)
        self._answered.set()

    @property
    def alive(self) -> bool:
        return not self._dropped and self._client.is_connected()

    def send(self, messages: list[tuple[str, bytes, bool]]) -> int:
        """Publish (topic, payload, retained) in order; how many of the first the broker has acknowledged in time."""
        end = time.monotonic() + self._settings.timeout
        under_way = [self._client.publish(topic, data, qos=1, retain=keep) for topic, data, keep in messages]
        return next((i for i, one in enumerate(under_way) if not self._acknowledged(one, end)), len(messages))

    def _acknowledged(self, message: "MQTTMessageInfo", end: float) -> bool:
        while True:
            try:
                message.wait_for_publish(min(0.1, max(0, end - time.monotonic())))
                if message.is_published():
                    return True
            except (RuntimeError, ValueError):  # paho's words for: not connected, or too many wait
                return False
            if not self.alive or time.monotonic() >= end:
                return False

    def drop(self) -> None:
        """End without a word, as when the cable breaks; nothing that waits is sent any more."""
        self._dropped = True
        self._client.loop_stop()
        if (connection := self._client.socket()) is not None:
            connection.close()

    def close(self) -> None:
        """Say that the line is offline, and disconnect."""
        if self._visible and self.alive:
            self.send([(self._settings.state_topic, b"offline", True)])
        self._client.disconnect()
        self._client.loop_stop()


def _hurry(client: "Client", data: object, connection: Any) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a batch waits for a delayed acknowledgement


class Mqtt:
    """Events to a broker. One whose acknowledgement was lost is sent again, so that it may arrive twice."""

    def __init__(self, settings: MqttSettings) -> None:
        """Nothing is connected yet."""
        self._settings = settings
        self._connection: _Connection | None = None
        self._acknowledged: list[Record | Alarm] = []
        """The first events of a batch that failed, which are not sent again."""

    def publish(self, events: list[Record | Alarm]) -> None:
        """Send the events and wait until the broker has them; DeliveryError or ConfigError on failure."""
        known = 0
        # Only what both have can be the same: a batch is longer than what was acknowledged of it.
        for one, other in zip(events, self._acknowledged, strict=False):
            if one != other:
                break
            known += 1
        self._acknowledged = events[:known]
        if self._connection is None or not self._connection.alive:
            self._drop()
            self._connection = _Connection(self._settings)
        done = self._connection.send([self._message(event) for event in events[known:]])
        if known + done < len(events):
            self._acknowledged = events[: known + done]
            self._drop()
            raise DeliveryError(
                f"{self._settings.host}:{self._settings.port} did not acknowledge {len(events) - known - done} of "
                f"{len(events)} messages; {_REMEDY}"
            )
        self._acknowledged = []

    def close(self) -> None:
        """Say that the line is offline, and disconnect."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    def _message(self, event: Record | Alarm) -> tuple[str, bytes, bool]:
        data = json.dumps(to_row(event), allow_nan=False).encode()
        if isinstance(event, Alarm):
            return self._settings.alarm_topic.format(kind=_level(event.kind)), data, True
        names = {"camera": event.camera, "result": str(event.result), "action": event.action}
        return self._settings.topic.format(**{key: _level(name) for key, name in names.items()}), data, False


def _level(name: str) -> str:
    """A name as one level of a topic: what has a meaning in topics, and what cannot be printed, becomes _."""
    plain = "".join(one if one.isprintable() and one not in "/+#" else "_" for one in text(name))[:200]
    return plain if plain.strip("$") else "_"
