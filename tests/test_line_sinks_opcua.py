"""The OPC UA sink against a server of asyncua."""

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from asyncua import ua
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.server.user_managers import UserManager
from asyncua.sync import Server, ThreadLoop
from line_servers import NOW, certificate, free_port, listening, record, until
from pydantic import ValidationError

from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.line.event import Alarm
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks.base import Secret
from flowad_fast.line.sinks.opcua import OpcUaSettings
from flowad_fast.stages.decision import Verdict

PASSWORD = "sesame, open"
NODES = {
    "part": ua.VariantType.String,
    "result": ua.VariantType.String,
    "score": ua.VariantType.Double,
    "threshold": ua.VariantType.Float,
    "reject": ua.VariantType.Boolean,
    "alarm": ua.VariantType.String,
    "passed": ua.VariantType.UInt16,
    "rejected": ua.VariantType.Int64,
    "no_results": ua.VariantType.SByte,
    "parts": ua.VariantType.UInt32,
}
FIRST = {
    ua.VariantType.String: "",
    ua.VariantType.Boolean: False,
    ua.VariantType.Double: 0.0,
    ua.VariantType.Float: 0.0,
}


class OnlyLine(UserManager):
    def get_user(self, iserver: object, username=None, password=None, certificate=None):  # noqa: ANN001, ANN201
        return User(role=UserRole.User) if (username, password) == ("line", PASSWORD) else None


class Plant:
    """A server with a node for each of NODES, one of a wrong type, and one that nobody may write."""

    def __init__(self, users: UserManager | None = None, secured: tuple[Path, Path] | None = None) -> None:
        self.port, self.users, self.secured = free_port(), users, secured
        self.url = f"opc.tcp://127.0.0.1:{self.port}/line"
        self.start()

    def start(self) -> None:
        self.loop = ThreadLoop(30)
        self.loop.start()
        self.server = Server(tloop=self.loop)
        if self.users is not None:
            self.server.aio_obj.iserver.set_user_manager(self.users)
        self.server.set_endpoint(self.url)
        if self.secured is not None:
            self.server.load_certificate(str(self.secured[0]))
            self.server.load_private_key(str(self.secured[1]))
            self.server.set_security_policy([ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt])
        line = self.server.nodes.objects.add_object(ua.NodeId("Line", 2), "Line")
        self.nodes = {}
        for name, kind in {**NODES, "closed": ua.VariantType.Int32, "code": ua.VariantType.Byte}.items():
            first = ua.Variant(FIRST.get(kind, 0), kind)
            self.nodes[name] = line.add_variable(ua.NodeId(f"Line.{name}", 2), name, first)
            if name != "closed":
                self.nodes[name].set_writable()
        self.server.start()
        until(lambda: listening(self.port))

    def stop(self) -> None:
        self.server.stop()
        self.loop.stop()

    def values(self) -> dict[str, object]:
        return {name: node.read_value() for name, node in self.nodes.items() if name in NODES}

    def settings(self, **more: object) -> OpcUaSettings:
        nodes = {name: f"ns=2;s=Line.{name}" for name in NODES}
        return OpcUaSettings.model_validate({"kind": "opcua", "url": self.url, "nodes": nodes, "timeout": 2, **more})


@pytest.fixture
def plant() -> Iterator[Plant]:
    one = Plant()
    yield one
    one.stop()


def test_nodes_have_the_last_outcome_and_the_counts_of_all(plant: Plant) -> None:
    sink = plant.settings().open()
    late = replace(record("c\udcff", NoResult.LATE), score=None, threshold=None)
    sink.publish([record("a"), record("b", Verdict.ANOMALOUS), late, Alarm("drift", NOW, "scores rise")])
    got = plant.values()
    assert math.isnan(got.pop("score")) and math.isnan(got.pop("threshold"))  # type: ignore[arg-type]
    assert got == {"part": "c\\udcff", "result": "late", "reject": True, "alarm": "drift: scores rise",
                   "passed": 1, "rejected": 2, "no_results": 1, "parts": 3}  # fmt: skip
    sink.publish([Alarm("drift", NOW, "t", over=True), record("d")])
    got = plant.values()
    assert (got["score"], got["threshold"], got["reject"], got["alarm"], got["parts"]) == (1.5, 2.0, False, "", 4)
    sink.close()


def test_counters_begin_again_where_a_nodes_type_ends_and_results_fit_numbers(plant: Plant) -> None:
    sink = plant.settings(nodes={"parts": "ns=2;s=Line.no_results", "result": "ns=2;s=Line.code"}).open()
    sink.publish([record(str(i), Verdict.INVALID) for i in range(130)])
    assert plant.values()["no_results"] == 2 and plant.nodes["code"].read_value() == 3
    sink.close()


def test_a_server_that_goes_and_comes_back_counts_each_part_once(plant: Plant) -> None:
    before = threading.active_count()
    sink = plant.settings().open()
    sink.publish([record("a")])
    plant.stop()
    for _ in range(2):
        with pytest.raises(DeliveryError, match="; check"):
            sink.publish([record("b"), record("c")])
    plant.start()
    sink.publish([record("b"), record("c")])
    assert (plant.values()["part"], plant.values()["parts"]) == ("c", 3)
    sink.close()
    until(lambda: threading.active_count() <= before)


def test_a_node_that_is_not_there_or_does_not_fit_is_named(plant: Plant) -> None:
    for name, node, message in (
        ("part", "ns=2;s=Nothing", "node 'ns=2;s=Nothing' for part cannot be read .*check its id"),
        ("part", "what is this", "node 'what is this' for part cannot be read"),
        ("part", "ns=2;s=Line.parts", "for part is UInt32, expected one of String; give another node"),
        ("parts", "ns=2;s=Line.score", "for parts is Double, expected one of SByte"),
    ):
        settings = plant.settings(nodes={name: node})
        with pytest.raises(DeliveryError, match=message):
            settings.check()
        with pytest.raises(DeliveryError, match=message):
            settings.open().publish([record("a")])
    closed = plant.settings(nodes={"parts": "ns=2;s=Line.closed"})
    with pytest.raises(DeliveryError, match="the node for parts may not be written; let this user do so"):
        closed.check()
    sink = closed.open()
    with pytest.raises(DeliveryError, match="refused parts .BadUserAccessDenied.; check the nodes"):
        sink.publish([record("a")])
    sink.close()


def test_check_writes_nothing(plant: Plant) -> None:
    before = plant.values()
    assert "has all 10 nodes; nothing was written" in plant.settings().check()
    assert plant.values() == before
    plant.stop()
    with pytest.raises(DeliveryError, match="cannot be reached .*check address and that the server runs"):
        plant.settings().check()
    plant.start()


def test_users_and_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    plant = Plant(OnlyLine())
    try:
        monkeypatch.setenv("LINE_PASSWORD", PASSWORD)
        settings = plant.settings(username="line", password=Secret(env="LINE_PASSWORD"))
        assert "nothing was written" in settings.check()
        monkeypatch.setenv("LINE_PASSWORD", "wrong-one")
        with pytest.raises(DeliveryError, match="cannot be reached") as caught:
            settings.check()
        assert "wrong-one" not in str(caught.value) + repr(settings)
        monkeypatch.delenv("LINE_PASSWORD")
        with pytest.raises(ConfigError, match="LINE_PASSWORD is not set"):
            settings.check()
    finally:
        plant.stop()


def test_encrypted_and_signed(tmp_path: Path) -> None:
    for name in ("server", "client"):
        (tmp_path / name).mkdir()
    server = certificate(tmp_path / "server", "urn:freeopcua:python:server")
    mine, key = certificate(tmp_path / "client", "urn:flowad-fast:line")
    plant = Plant(secured=server)
    try:
        security = {"certificate": mine, "key": key}
        sink = plant.settings(security=security).open()
        sink.publish([record("a")])
        assert plant.values()["part"] == "a"
        sink.close()
        with pytest.raises(DeliveryError, match="cannot be reached"):
            plant.settings().check()
        with pytest.raises(DeliveryError, match="cannot be reached .*none.pem"):
            plant.settings(security={**security, "certificate": tmp_path / "none.pem"}).check()
    finally:
        plant.stop()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"url": "http://a"}, "expected opc.tcp://"),
        ({"url": "opc.tcp://line:secret@host:4840"}, "expected an address without user and password"),
        ({"nodes": {}}, "at least 1 item"),
        ({"nodes": {"verdict": "i=1"}}, "'part', 'camera'"),
        ({"password": {"env": "A"}}, "a password without a username"),
    ],
)
def test_settings_that_cannot_work_are_refused(more: dict[str, object], message: str) -> None:
    base = {"kind": "opcua", "url": "opc.tcp://h:4840", "nodes": {"part": "i=1"}}
    with pytest.raises(ValidationError, match=message):
        OpcUaSettings.model_validate({**base, **more})
