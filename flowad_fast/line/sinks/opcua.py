"""The last outcome, counters and a reject flag as nodes of an OPC UA server."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from flowad_fast.config import Frozen
from flowad_fast.errors import DeliveryError, FlowADError, require
from flowad_fast.line.event import Alarm, Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks.base import Secret, SinkBase, code
from flowad_fast.line.sinks.rows import text
from flowad_fast.stages.decision import Verdict

if TYPE_CHECKING:
    from asyncua.sync import Client, SyncNode, ThreadLoop
    from asyncua.ua import VariantType

_TEXT, _REAL, _COUNT, _FLAG = "String", "Float Double", "SByte Byte Int16 UInt16 Int32 UInt32 Int64 UInt64", "Boolean"
_TYPES = {
    "part": _TEXT, "camera": _TEXT, "result": f"{_TEXT} {_COUNT}", "action": _TEXT, "reason": _TEXT, "bundle": _TEXT,
    "score": _REAL, "threshold": _REAL, "seconds": _REAL, "reject": _FLAG, "alarm": _TEXT,
    "passed": _COUNT, "rejected": _COUNT, "no_results": _COUNT, "parts": _COUNT,
}  # fmt: skip
"""What can be written, in this order, and the types of nodes that can hold it."""
Name = Literal[
    "part", "camera", "result", "action", "reason", "bundle", "score", "threshold", "seconds", "reject", "alarm",
    "passed", "rejected", "no_results", "parts",
]  # fmt: skip


class Security(Frozen):
    """Signed or encrypted messages, with this client's certificate and key (PEM or DER files).

    The certificate's alternative names need the URI `urn:flowad-fast:line`, and the server has to trust it.
    """

    policy: Literal["Basic256Sha256", "Aes128Sha256RsaOaep", "Aes256Sha256RsaPss"] = "Basic256Sha256"
    mode: Literal["Sign", "SignAndEncrypt"] = "SignAndEncrypt"
    certificate: Path
    key: Path
    server_certificate: Path | None = None
    """None: the one that the server shows is trusted."""


class OpcUaSettings(SinkBase):
    """A server, and the node for each value that it is to have.

    Values are of the last outcome; `parts` is written last, so that a controller that sees it change finds everything
    else in place. A flag on the network is no gate: it may come late, see the sink modbus.
    """

    promises_delivery: ClassVar[bool] = False

    kind: Literal["opcua"]
    url: str
    """`opc.tcp://<host>:<port>/…`, without a password."""
    nodes: dict[Name, str] = Field(min_length=1)
    """Node ids like `ns=2;s=Line.Part`, which the server has and this client may write.

    part, camera, action, reason, bundle: text. result: text, or a number: 1 good, 2 anomalous, 3 invalid, 4 no result.
    score, threshold (NaN without a verdict), seconds: numbers. reject: whether the part is not passed. alarm: kind and
    text of the last alarm, empty when it is over. parts, passed, rejected, no_results: counters since the start of the
    line, which begin again at 0 where the node's type ends.
    """
    username: str | None = None
    password: Secret | None = None
    """Without `security` most servers take it in plain text only, readable by all on the network."""
    security: Security | None = None
    timeout: float = Field(default=4, gt=0, le=600)
    """Seconds until connecting, or an answer, is given up."""

    @field_validator("url")
    @classmethod
    def _opc(cls, url: str) -> str:
        scheme, _, rest = url.partition("://")
        if scheme != "opc.tcp" or not rest:
            raise ValueError("expected opc.tcp://<host>:<port>")
        if "@" in rest.partition("/")[0]:
            raise ValueError("expected an address without user and password; use username and password")
        return url

    @model_validator(mode="after")
    def _user(self) -> "OpcUaSettings":
        if self.password is not None and self.username is None:
            raise ValueError("got a password without a username, expected both")
        return self

    def open(self) -> "OpcUa":
        """The sink."""
        require("line", "asyncua", by="the sink opcua")
        return OpcUa(self)

    def check(self) -> str:
        """That the nodes are there, of a fitting type, and may be written; nothing is written."""
        sink = self.open()
        try:
            sink.connect()
            sink.check_access()
        finally:
            sink.close()
        return f"{self.url} has all {len(self.nodes)} nodes; nothing was written"


@dataclass(frozen=True)
class _Counters:
    parts: int = 0
    passed: int = 0
    rejected: int = 0
    no_results: int = 0

    def with_record(self, record: Record) -> "_Counters":
        passed = record.action == "pass"
        return replace(
            self,
            parts=self.parts + 1,
            passed=self.passed + passed,
            rejected=self.rejected + (not passed),
            no_results=self.no_results + isinstance(record.result, NoResult),
        )


class OpcUa:
    """Each batch is one request; of several outcomes the counters tell all, the other nodes the last."""

    def __init__(self, settings: OpcUaSettings) -> None:
        """Nothing is connected yet."""
        self._settings = settings
        self._client: Client | None = None
        self._loop: ThreadLoop
        self._nodes: dict[str, tuple[SyncNode, VariantType]] = {}
        self._counters = _Counters()

    def connect(self) -> None:
        """Connect, and ask for the nodes' types; DeliveryError or ConfigError on failure."""
        if self._client is not None:
            return
        from asyncua.sync import Client, ThreadLoop

        settings = self._settings
        # The client's limit is for every request, the loop's for all requests of connecting together.
        self._loop = ThreadLoop(4 * settings.timeout)
        self._loop.daemon = True  # a line that ends without closing its sinks must not hang
        self._loop.start()
        client = self._client = Client(settings.url, timeout=settings.timeout, tloop=self._loop)
        client.application_uri = "urn:flowad-fast:line"
        client.aio_obj.name = client.aio_obj.description = "flowad-line"
        with self._failures("cannot be reached", "check address and that the server runs"):
            if settings.username is not None:
                client.set_user(settings.username)
                client.set_password(settings.password.read() if settings.password is not None else "")
            if (security := settings.security) is not None:
                files = (security.certificate, security.key, security.server_certificate)
                names = ",".join(str(one) for one in files if one is not None)
                client.set_security_string(f"{security.policy},{security.mode},{names}")
            client.connect()
        self._nodes = {}
        for name in _TYPES:
            if name in settings.nodes:
                node_id = settings.nodes[name]
                with self._failures(f"the node {node_id!r} for {name} cannot be read", "check its id"):
                    node = client.get_node(node_id)
                    kind = node.read_data_type_as_variant_type()
                if kind.name not in _TYPES[name].split():
                    self.close()
                    raise DeliveryError(
                        f"{settings.url}: the node {node_id!r} for {name} is {kind.name}, expected one of "
                        f"{_TYPES[name].replace(' ', ', ')}; give another node"
                    )
                self._nodes[name] = node, kind

    def check_access(self) -> None:
        """That this user may write every node; DeliveryError where not."""
        from asyncua.ua import AccessLevel

        for name, (node, _) in self._nodes.items():
            with self._failures(f"the node for {name} cannot be read", "check its id"):
                may = AccessLevel.CurrentWrite in node.get_user_access_level()
            if not may:
                raise DeliveryError(
                    f"{self._settings.url}: the node for {name} may not be written; let this user do so"
                )

    def publish(self, events: list[Record | Alarm]) -> None:
        """Write what the events change; DeliveryError or ConfigError on failure, after which they count once."""
        counters, values = self._counters, dict[str, object]()
        for event in events:
            if isinstance(event, Alarm):
                values["alarm"] = "" if event.over else f"{event.kind}: {event.text}"
            else:
                counters = counters.with_record(event)
                values |= _values(event) | vars(counters)
        self.connect()
        assert self._client is not None
        names = [name for name in self._nodes if name in values]
        if names:
            written = [_variant(values[name], self._nodes[name][1]) for name in names]
            with self._failures("writing failed", "check that the server runs and this user may write"):
                results = self._client.write_values([self._nodes[name][0] for name in names], written, False)
            if bad := [f"{name} ({one.name})" for name, one in zip(names, results, strict=True) if not one.is_good()]:
                raise DeliveryError(
                    f"{self._settings.url} refused {', '.join(bad)}; check the nodes, and that this user may write them"
                )
        self._counters = counters

    def close(self) -> None:
        """Let go of the connection."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):  # it may be broken already, in many ways
                client.disconnect()
            with contextlib.suppress(Exception):
                self._loop.stop()

    @contextlib.contextmanager
    def _failures(self, what: str, remedy: str) -> Iterator[None]:
        """What the library raises as DeliveryError; the connection is let go."""
        from asyncua.ua import UaError

        try:
            yield
        except (UaError, OSError, RuntimeError, ValueError) as error:
            self.close()
            if isinstance(error, FlowADError):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DeliveryError(f"{self._settings.url}: {what} ({reason:.200}); {remedy}") from None


def _values(record: Record) -> dict[str, object]:
    return {
        **{name: getattr(record, name) for name in ("part", "camera", "result", "action", "reason", "bundle")},
        "score": math.nan if record.score is None else record.score,
        "threshold": math.nan if record.threshold is None else record.threshold,
        "seconds": record.seconds,
        "reject": record.action != "pass",
    }


def _variant(value: Any, kind: "VariantType") -> Any:
    """A value in the type of its node; counters begin again at 0 where the type ends."""
    from asyncua.ua import Variant

    if kind.name == "String":
        return Variant(text(str(value)), kind)
    if kind.name in _REAL.split():
        return Variant(float(value), kind)
    if kind.name == "Boolean":
        return Variant(bool(value), kind)
    number = code(value) if isinstance(value, Verdict | NoResult) else int(value)
    bits = 8 if kind.name.endswith("Byte") else int(kind.name.lstrip("UInt"))
    signed = kind.name == "SByte" or kind.name.startswith("Int")
    return Variant(number % 2 ** (bits - signed), kind)
