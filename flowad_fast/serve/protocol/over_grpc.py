"""The protocol over gRPC: the service `inference.GRPCInferenceService`, with the messages of `tritonclient`.

Messages are parsed here and not by gRPC, which would answer bytes that are none with an error of the server.
"""

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from flowad_fast.serve.protocol import describing
from flowad_fast.serve.protocol.asking import Query, Scalar
from flowad_fast.serve.protocol.desk import Desk
from flowad_fast.serve.protocol.over_http import index
from flowad_fast.serve.protocol.refusals import UNAUTHORISED, RefusedError, authorised, bad, told, too_large
from flowad_fast.serve.protocol.settings import RequestLimits
from flowad_fast.serve.protocol.tensors import Tensor, packed

SERVICE = "inference.GRPCInferenceService"
PROBES = ("ServerLive", "ServerReady", "ModelReady")
"""Open without the token."""
SPARE = 64
"""Calls at a time beside those that are judged: probes, metadata, and refusals."""
CONTENTS = {"UINT8": "uint_contents", "INT64": "int64_contents", "BYTES": "bytes_contents"}
"""Where values lie that are not sent raw."""
Method = Callable[[Any, Any], Awaitable[Any]]


def server_of(desk: Desk, token: str | None) -> Any:
    """A `grpc.aio.Server` without an address; `token` is what clients must have, None: nothing."""
    limits = desk.settings.limits
    server = grpc.aio.server(
        interceptors=[_Guard(token)],
        maximum_concurrent_rpcs=limits.requests + SPARE,
        options=[
            ("grpc.max_receive_message_length", limits.bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", limits.header_bytes),
            ("grpc.so_reuseport", 0),  # two servers at one address would share its clients
        ],
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, _Methods(desk).all())])
    return server


class _Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands before every method."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        """The method, or one that refuses."""
        given = next((value for key, value in call.invocation_metadata or () if key == "authorization"), None)
        name = call.method.rpartition("/")[2]
        if name in PROBES or authorised(given if isinstance(given, str) else None, self._token):
            return await continuation(call)
        return grpc.stream_unary_rpc_method_handler(_deny)


async def _deny(messages: Any, context: Any) -> None:
    """As a call with a stream of messages, so that the one that is sent is not received."""
    await _refuse(context, RefusedError(UNAUTHORISED, "wrong or missing token; send authorization: Bearer TOKEN"))


async def _refuse(context: Any, error: Exception) -> NoReturn:
    status, message = told(error)
    await context.abort(grpc.StatusCode[status.grpc], message)
    raise AssertionError("abort raises")


class _Methods:
    """One method per call of the service."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def all(self) -> dict[str, Any]:
        """The handlers by name; a call that is not here is told that it is not implemented."""
        rows: dict[str, tuple[Any, Method]] = {
            "ServerLive": (pb.ServerLiveRequest, self.live),
            "ServerReady": (pb.ServerReadyRequest, self.ready),
            "ModelReady": (pb.ModelReadyRequest, self.model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self.server),
            "ModelMetadata": (pb.ModelMetadataRequest, self.metadata),
            "ModelConfig": (pb.ModelConfigRequest, self.configuration),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self.index),
            "ModelInfer": (pb.ModelInferRequest, self.infer),
        }
        return {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(kind, call), response_serializer=lambda message: message.SerializeToString()
            )
            for name, (kind, call) in rows.items()
        }

    def _guarded(self, kind: Any, call: Method) -> Method:
        async def answer(data: bytes, context: Any) -> Any:
            try:
                try:
                    message = kind.FromString(data)
                except DecodeError:
                    raise bad(f"expected a message {kind.DESCRIPTOR.full_name}") from None
                return await call(message, context)
            except Exception as error:
                await _refuse(context, error)

        return answer

    async def live(self, message: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def ready(self, message: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=not await self._desk.trouble())

    async def model_ready(self, message: Any, context: Any) -> Any:
        return pb.ModelReadyResponse(ready=not await self._desk.model_trouble(message.name, message.version))

    async def server(self, message: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(**describing.server())

    async def metadata(self, message: Any, context: Any) -> Any:
        card = await self._desk.card(message.name, message.version)
        return ParseDict(describing.metadata(card), pb.ModelMetadataResponse())

    async def configuration(self, message: Any, context: Any) -> Any:
        card = await self._desk.card(message.name, message.version)
        return ParseDict({"config": describing.configuration(card)}, pb.ModelConfigResponse())

    async def index(self, message: Any, context: Any) -> Any:
        rows = await index(self._desk)
        if message.ready:
            rows = [row for row in rows if row["state"] == "READY"]
        return ParseDict({"models": rows}, pb.RepositoryIndexResponse())

    async def infer(self, message: Any, context: Any) -> Any:
        arrived = time.monotonic()
        with self._desk.admitted():
            read = partial(read_message, message, self._desk.settings.limits)
            name, version = message.model_name, message.model_version
            said = await self._desk.answer(name, version, arrived, read, context.time_remaining())
            found = pb.ModelInferResponse(model_name=name, model_version=said.answered.version, id=said.query.id)
            found.parameters["engine"].string_param = said.answered.engine
            for one in said.outputs:
                found.outputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
                raw = packed(one.values) if isinstance(one.values, list) else one.values.astype("<f4").tobytes()
                found.raw_output_contents.append(raw)
            said.check()
            return found


def read_message(message: Any, limits: RequestLimits) -> Query:
    """A request from a `ModelInferRequest`; RefusedError where it is none that is answered here."""
    raw = list(message.raw_input_contents)
    if len(message.inputs) > 8 or len(message.outputs) > 16:
        raise bad("got more than 8 inputs or 16 outputs")
    if raw and len(raw) != len(message.inputs):
        raise bad(f"got {len(raw)} raw_input_contents for {len(message.inputs)} inputs, expected one each or none")
    inputs = []
    for place, one in enumerate(message.inputs):
        _none(one.name, one.parameters)
        if raw and one.HasField("contents"):
            raise bad(f"{one.name[:64]}: got contents beside raw_input_contents")
        data = raw[place] if raw else _contents(one, limits)
        inputs.append(Tensor(one.name, one.datatype, tuple(one.shape), data))
    for one in message.outputs:
        _none(one.name, one.parameters)
    parameters = {name: _scalar(name, value) for name, value in message.parameters.items()}
    return Query(message.id, tuple(inputs), tuple(one.name for one in message.outputs), parameters)


def _contents(tensor: Any, limits: RequestLimits) -> list[Any]:
    field = CONTENTS.get(tensor.datatype)
    if field is None:
        raise bad(f"{tensor.name[:64]}: got {tensor.datatype[:16]}, expected one of {', '.join(CONTENTS)}")
    values = getattr(tensor.contents, field)
    if len(values) > limits.json_bytes:
        raise too_large(f"{tensor.name[:64]}: got {len(values)} values one by one; send raw_input_contents")
    return list(values)


def _scalar(name: str, value: Any) -> Scalar:
    which = value.WhichOneof("parameter_choice")
    if which is None:
        raise bad(f"the parameter {name[:64]!r} has no value")
    found: Scalar = getattr(value, which)
    return found


def _none(tensor: str, parameters: Any) -> None:
    """Refuse what is not done here, such as shared memory and classification."""
    for name in parameters:
        raise bad(f"{tensor[:64]}: the parameter {name[:64]!r} is not supported")
