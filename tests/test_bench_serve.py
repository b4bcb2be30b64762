"""`flowad-bench serve`: its record is read again, and a short run of it on a real cluster finds no wrong verdict."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.line import Quantiles
from flowad_fast.benchmarks.record.record import read, write
from flowad_fast.benchmarks.record.serve import ServeRecord, ServeRow, ServeSetting, markdown
from tests.models import exported
from tests.serve_replicas import needs_ray

ROOT = Path(__file__).parents[1]


def row(name: str, replicas: int | None, fps: tuple[float, ...], wrong: int = 0) -> ServeRow:
    latency = Quantiles(p50=12.34, p99=None, n=50)
    results = {"answered": 50} | ({"late": 2} if replicas == 1 else {})
    return ServeRow(
        name=name, replicas=replicas, batch=None, fps=fps, latency=latency, results=results, wrong=wrong
    )  # fmt: skip


def record(wrong: int = 0) -> ServeRecord:
    setting = ServeSetting(
        bundle="b", frame_size=(256, 256), threads=1, largest_batch=4, concurrency=8, deadline_s=30, seconds=15,
        ray="2.60.0",
    )  # fmt: skip
    rows = (
        row("bare detector", None, (10.0, 11.0, 12.0)),
        row("1 replica", 1, (8.0, 9.0, 10.0)),
        row("2 replicas", 2, (16.0, 17.1, 21.0), wrong),
    )
    return ServeRecord(preset="b", environment=environment(moment()), note="quiet", setting=setting, cases=rows)


def test_records_are_read_again_and_say_what_a_second_replica_brings(tmp_path: Path) -> None:
    write(record(), tmp_path / "r.json")
    again = read(tmp_path / "r.json")
    assert again == record().but(environment=again.environment) and isinstance(again, ServeRecord) and again.passed
    text = markdown(again)
    assert "| 1 replica | 9.00 | 8.00–10.00 | 12.3 |  | 52 | 2 late | 0 |" in text
    assert "two replicas judge 1.90 times as many frames as one (turn by turn 1.90–2.10)" in text
    assert not record(wrong=1).passed


@pytest.mark.slow
def test_a_short_run_finds_no_wrong_verdict(tmp_path: Path) -> None:
    needs_ray()
    command = ["serve", "--bundle", exported("onnx")[1].path, "--seconds", "1", "--turns", "2", "--concurrency", "4",
               "--json", "--output", tmp_path / "r.json"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "flowad_fast.benchmarks.cli", *map(str, command)], capture_output=True, text=True,
        cwd=ROOT, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["cases"]
    assert [one["replicas"] for one in rows] == [None, None, 1, 2]
    assert all(len(one["fps"]) == 2 and min(one["fps"]) > 0 and one["wrong"] == 0 for one in rows)
    assert all(set(one["results"]) == {"answered"} for one in rows)
