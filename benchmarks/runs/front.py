"""How fast the front of `flowad-serve` is by itself: HTTP and gRPC before a pool that answers at once.

    python -m flowad_fast.benchmarks.runs.front --output benchmarks/results/front-cpu.json

The front and its pool are a process of their own, whose processor time is read: on a computer with few cores, clients
take part of what a front could use, but not of what it uses.
"""

import asyncio
import http.client
import json as jsons
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record import front as tables
from flowad_fast.benchmarks.record import record as records
from flowad_fast.benchmarks.record.front import FrontRecord, FrontRow, Way
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.runs.line_load import quantiles
from flowad_fast.benchmarks.runs.line_work import draw
from flowad_fast.cli import common
from flowad_fast.config import Classes
from flowad_fast.errors import EngineUnavailableError, require
from flowad_fast.line.outcome import Judgement
from flowad_fast.serve.pool import Answered, Asked, ModelCard
from flowad_fast.serve.protocol.front import Front
from flowad_fast.serve.protocol.over_http import JSON_LENGTH
from flowad_fast.serve.protocol.settings import FrontSettings
from flowad_fast.stages.decision import Verdict

WAYS: tuple[Way, ...] = ("HTTP, binary tensors", "gRPC", "HTTP, JSON")
TOGETHER = (1, 8)
"""Requests at a time."""
MODEL, VERSION = "part", "0" * 12
METHOD = "/inference.GRPCInferenceService/ModelInfer"
START_S = 60.0
Ask = Callable[[], int]
"""Sends one request; the bytes of its answer, 0 where that is not a right one."""


class AtOnce:
    """A pool whose only model says at once that all is good, with a map of the right size."""

    def __init__(self, side: int) -> None:
        self._card = ModelCard(MODEL, VERSION, "none", image_size=side, classes=Classes())
        maps = np.random.default_rng(0).random((1, side, side), np.float32)
        self._answer = Answered(maps, maps[:, 0, 0], (Judgement(Verdict.GOOD, 0.5),), VERSION, "none", (None,))

    async def models(self) -> Sequence[ModelCard]:
        """See `Pool`."""
        return [self._card]

    async def ready(self, model: str) -> str:
        """See `Pool`."""
        return ""

    async def ask(self, asked: Asked) -> Answered:
        """See `Pool`."""
        return self._answer

    async def close(self) -> None:
        """See `Pool`."""


def _serve(pipe: Connection, side: int) -> None:
    """The front's process: tells its addresses, answers until the other end of `pipe` closes."""

    async def run() -> None:
        front = Front(AtOnce(side), FrontSettings(http_port=0, grpc_port=0, deadline=30.0))
        await front.start()
        pipe.send((front.http, front.grpc))
        await asyncio.get_running_loop().run_in_executor(None, pipe.poll, None)
        await front.close()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    asyncio.run(run())


@contextmanager
def _front(side: int) -> Iterator[tuple[psutil.Process, str, str]]:
    """A front at free ports: its process, and its addresses of HTTP and gRPC."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, side), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise EngineUnavailableError(f"the front did not start within {START_S:g} s")
        try:
            http_at, grpc_at = ours.recv()
        except EOFError:
            raise EngineUnavailableError("the front ended before it answered; its error is above") from None
        yield psutil.Process(process.pid), http_at, grpc_at
    finally:
        ours.close()
        process.join(10)
        process.kill()


def http_body(frame: np.ndarray, binary: bool) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request for one frame (H, W, 3) uint8."""
    tensor: dict[str, Any] = {"name": "frames", "datatype": "UINT8", "shape": [1, *frame.shape]}
    head: dict[str, Any] = {"id": "1", "inputs": [tensor]}
    if not binary:
        tensor["data"] = frame.ravel().tolist()
        return jsons.dumps(head, separators=(",", ":")).encode(), {"Content-Type": "application/json"}
    tensor["parameters"], head["parameters"] = {"binary_data_size": frame.nbytes}, {"binary_data_output": True}
    text = jsons.dumps(head, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text))}
    return text + frame.tobytes(), headers


def grpc_body(frame: np.ndarray) -> bytes:
    """The message of a request for one frame (H, W, 3) uint8."""
    from tritonclient.grpc import service_pb2 as pb

    message = pb.ModelInferRequest(model_name=MODEL, id="1", raw_input_contents=[frame.tobytes()])
    message.inputs.add(name="frames", datatype="UINT8", shape=[1, *frame.shape])
    found: bytes = message.SerializeToString()
    return found


@contextmanager
def _over_http(address: str, body: bytes, headers: dict[str, str], least: int) -> Iterator[Ask]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)

    def ask() -> int:
        connection.request("POST", f"/v2/models/{MODEL}/infer", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        return len(content) if answer.status == 200 and len(content) >= least else 0

    try:
        yield ask
    finally:
        connection.close()


@contextmanager
def _over_grpc(address: str, body: bytes, least: int) -> Iterator[Ask]:
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(METHOD)

        def ask() -> int:
            try:
                content = call(body, timeout=60)
            except grpc.RpcError:
                return 0
            return len(content) if len(content) >= least else 0

        yield ask


@dataclass
class _Measured:
    """A way with so many requests at a time, and what came of it."""

    way: Way
    together: int
    body: bytes
    connect: Callable[[], Any]
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    sizes: set[int] = field(default_factory=set)
    failed: int = 0

    def turn(self, process: psutil.Process, seconds: float, keep: bool) -> None:
        """As many requests as go, from threads that begin together."""
        times: list[list[float]] = [[] for _ in range(self.together)]
        sizes: list[set[int]] = [set() for _ in range(self.together)]
        lost = [0] * self.together
        start, before = 0.0, process.cpu_times()

        def begin() -> None:
            nonlocal start, before
            start, before = time.monotonic(), process.cpu_times()

        meet = threading.Barrier(self.together, begin, START_S)

        def client(number: int) -> None:
            with self.connect() as ask:
                ask()
                meet.wait()
                while (now := time.monotonic()) < start + seconds:
                    size = ask()
                    times[number].append(1e3 * (time.monotonic() - now))
                    sizes[number].add(size)
                    lost[number] += not size

        with ThreadPoolExecutor(self.together) as threads:
            for done in [threads.submit(client, number) for number in range(self.together)]:
                done.result()
        took, after = time.monotonic() - start, process.cpu_times()
        if not keep:
            return
        count = sum(map(len, times))
        self.rates.append(round(count / took, 2))
        self.cpu.append(1e3 * (after.user + after.system - before.user - before.system) / count)
        self.ms += [one for part in times for one in part]
        self.sizes |= set().union(*sizes)
        self.failed += sum(lost)

    def row(self) -> FrontRow:
        return FrontRow(
            way=self.way, together=self.together, rates=tuple(self.rates), latency=quantiles(np.array(self.ms)),
            cpu_ms=round(float(np.median(self.cpu)), 4), request_bytes=len(self.body), answer_bytes=max(self.sizes),
            failed=self.failed,
        )  # fmt: skip


def run(side: int, seconds: float, turns: int, note: str, tell: Callable[[str], None]) -> FrontRecord:
    """All ways in rotation, requests of one frame of `side` pixels a side, whose maps are as large."""
    require("serve", "grpc", "tritonclient", by="the front's benchmark")
    before = moment()
    frame = draw(1, side, side, 0)[0]
    least = side * side * 4  # the map alone, in binary; in JSON it takes more
    with _front(side) as (process, http_at, grpc_at):
        ways: list[_Measured] = []
        for way in WAYS:
            if way == "gRPC":
                body = grpc_body(frame)
                connect: Callable[[], Any] = partial(_over_grpc, grpc_at, body, least)
            else:
                body, headers = http_body(frame, binary=way == WAYS[0])
                connect = partial(_over_http, http_at, body, headers, least)
            ways += [_Measured(way, together, body, connect) for together in TOGETHER]
        for one in ways:
            one.turn(process, min(1.0, seconds), keep=False)
        for turn in range(turns):
            for i in range(len(ways)):
                one = ways[(turn + i) % len(ways)]
                tell(f"turn {turn + 1} of {turns}: {one.way}, {one.together} at a time")
                one.turn(process, seconds, keep=True)
    return FrontRecord(
        preset=f"front, frames of {side}x{side}", environment=environment(before), note=note,
        roofs=Roofs(reason="not measured here"), frame_size=(side, side), map_side=side, seconds=seconds,
        cases=tuple(one.row() for one in ways),
    )  # fmt: skip


def front(
    side: Annotated[int, typer.Option(min=16, help="Side of frames and maps, pixels.")] = 256,
    seconds: Annotated[float, typer.Option(min=0.2, help="Of each turn.")] = 4.0,
    turns: Annotated[int, typer.Option(min=1, help="Of each way.")] = 5,
    note: Annotated[str, typer.Option(help="For the record: what else the computer did.")] = "",
    output: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The record as JSON on standard output.")] = False,
) -> None:
    """Requests per second, latency and processor time of the front alone, over HTTP and gRPC.

    Exit codes: 0 every request had its answer, 1 some had none.
    """
    with common.status("front") as tell:
        record = run(side, seconds, turns, note, tell)  # type: ignore[arg-type]
    if output is not None:
        records.write(record, output)
    if json:
        common.print_json(record.dump())
    else:
        for line in tables.markdown(record).splitlines():
            common.say(line)
    if any(row.failed for row in record.cases):
        raise typer.Exit(common.EXIT_ERROR)


main = common.command(front)

if __name__ == "__main__":
    main()
