"""The front's benchmark: its bodies are the protocol's, its record is read again, a short run has all answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if not os.environ.get("CI"):
    pytest.importorskip("tritonclient.grpc")
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.capacity import _front
from flowad_fast.benchmarks.record.front import FrontRecord, FrontRow, markdown
from flowad_fast.benchmarks.record.line import Quantiles
from flowad_fast.benchmarks.record.record import read, write

ROOT = Path(__file__).parents[1]


def row(together: int, cpu: float, failed: int = 0) -> FrontRow:
    return FrontRow(
        way="gRPC", together=together, rates=(100.0, 120.0, 110.0), latency=Quantiles(p50=9.0, p99=None, n=90),
        cpu_ms=cpu, request_bytes=200_000, answer_bytes=270_000, failed=failed,
    )  # fmt: skip


def test_records_are_read_again_and_say_what_a_front_carries(tmp_path: Path) -> None:
    assert "not measured yet" in _front(tmp_path, None)
    record = FrontRecord(preset="f", environment=environment(moment()), frame_size=(256, 256), map_side=256,
                         seconds=1.0, cases=(row(1, 3.0), row(8, 2.0)))  # fmt: skip
    write(record, tmp_path / "front-cpu.json")
    again = read(tmp_path / "front-cpu.json")
    assert isinstance(again, FrontRecord) and again == record.but(environment=again.environment)
    assert "| gRPC | 8 | 110 | 100–120 | 9.00 |  | 2.00 | 200 | 270 |" in markdown(again)
    assert "2.00 ms as gRPC" in _front(tmp_path, None) and "at most 500 frames/s" in _front(tmp_path, None)


def test_bodies_are_those_of_the_protocol() -> None:
    from flowad_fast.benchmarks.runs.front import JSON_LENGTH, grpc_body, http_body
    from flowad_fast.serve.protocol import messages
    from flowad_fast.serve.protocol.over_grpc import pb, read_message
    from flowad_fast.serve.protocol.settings import RequestLimits
    from flowad_fast.serve.protocol.tensors import numbers

    frame = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for binary in (True, False):
        body, headers = http_body(frame, binary)
        length = messages.header_length(headers.get(JSON_LENGTH), len(body), RequestLimits())
        query = messages.read(bytearray(body), length)
        assert (numbers(query.inputs[0]) == frame[None]).all() and query.binary_otherwise is binary
    query = read_message(pb.ModelInferRequest.FromString(grpc_body(frame)), RequestLimits())
    assert (numbers(query.inputs[0]) == frame[None]).all()


def test_a_short_run_has_an_answer_to_every_request(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flowad_fast.benchmarks.runs.front", "--side", "32", "--seconds", "0.2", "--turns", "1",
         "--json"], capture_output=True, text=True, cwd=ROOT, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["cases"]
    assert len(rows) == 6 and all(one["failed"] == 0 and one["latency"]["n"] > 0 for one in rows)
    assert all(one["cpu_ms"] > 0 and one["answer_bytes"] > 32 * 32 * 4 for one in rows)
