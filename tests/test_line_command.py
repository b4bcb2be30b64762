"""`flowad-line` as a process, with a real bundle: SIGTERM under load, kill -9, check, replay."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flowad_fast.bundle import read, write_manifest
from flowad_fast.line.settings import read_settings
from flowad_fast.stages.decision import Calibration, ClassCalibration
from tests.models import exported, tiny_frames

COMMAND = [sys.executable, "-m", "flowad_fast.cli.line"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle for ONNX Runtime, with a threshold that every part is below."""
    folder = tmp_path_factory.mktemp("line") / "bundle"
    shutil.copytree(exported("onnx")[1].path, folder)
    _, manifest = read(folder)
    limits = Calibration(alpha=0.05, classes={"": ClassCalibration(threshold=1e9, parts=19)})
    write_manifest(folder, manifest.model_copy(update={"calibration": limits}))
    return folder


@pytest.fixture
def line(bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes parts and a settings file, with fields changed."""
    (tmp_path / "parts").mkdir()
    for i, frame in enumerate(tiny_frames(6)):
        Image.fromarray(frame).save(tmp_path / "parts" / f"{i}.png")

    def write(**fields: object) -> Path:
        settings = {
            "bundle": str(bundle),
            "deadline": 2.0,
            "threads": 1,
            "sources": {"cell": {"kind": "recorded", "folder": "parts", "rate": 50}},
            "sinks": [{"kind": "jsonl", "path": "out.jsonl"}],
            "limits": {"drain": 3},
        }
        (tmp_path / "line.yaml").write_text(yaml.safe_dump(settings | fields))
        return tmp_path / "line.yaml"

    return write


def command(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=60)


def begin(settings: Path) -> "subprocess.Popen[str]":
    run = [*COMMAND, "run", str(settings), "--json"]
    return subprocess.Popen(
        run, cwd=settings.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def rows(folder: Path) -> list[dict[str, object]]:
    path = folder / "out.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if row["event"] == "record"]


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_init_check_run_replay(line: Callable[..., Path], tmp_path: Path) -> None:
    settings = line()
    checked = command("check", settings, "--json", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert [row["what"] for row in json.loads(checked.stdout)] == ["bundle", "source cell", "sink jsonl", "journal"]
    done = command("run", settings, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["arrived"] == 6 and summary["results"] == {"good": 6} and summary["ready"] is False
    assert [str(row["part"]).split("/")[-1] for row in rows(tmp_path)] == [f"{i}.png" for i in range(6)]
    again = command("replay", "out.jsonl", "parts", "--settings", settings, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == {"compared": 6, "same": 6, "no_verdict": 0, "no_picture": 0, "changes": []}
    altered = (tmp_path / "out.jsonl").read_text().replace('"good"', '"anomalous"', 1)
    (tmp_path / "other.jsonl").write_text(altered)
    differs = command("replay", "other.jsonl", "parts", "--settings", settings, cwd=tmp_path)
    assert differs.returncode == 1 and "0.png: anomalous" in differs.stdout and "5 same" in differs.stdout


def test_sigterm_under_load_gives_every_part_its_outcome(line: Callable[..., Path], tmp_path: Path) -> None:
    source = {"kind": "recorded", "folder": "parts", "rate": 300, "rounds": None}
    run = begin(line(sources={"left": source, "right": source}))
    until(lambda: len(rows(tmp_path)) > 50)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=10)
    assert run.returncode == 0, err
    summary = json.loads(out)
    assert summary["pending"] == 0 and summary["sinks"]["jsonl"]["missed"] == 0
    assert len(rows(tmp_path)) == summary["arrived"] == sum(summary["results"].values()) > 50


def test_kill_9_loses_only_parts_that_the_next_start_names(line: Callable[..., Path], tmp_path: Path) -> None:
    # Faster than it can judge, so that parts wait when it is killed.
    source = {"kind": "recorded", "folder": "parts", "rate": 5000, "rounds": None}
    run = begin(line(sources={"cell": source}, deadline=5.0, capacity=200, largest_batch=1))
    until(lambda: len(rows(tmp_path)) > 20)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate(timeout=10)
    begun: set[str] = set()
    for text in (tmp_path / "line-journal" / "parts.jsonl").read_text().splitlines():
        entry = json.loads(text)
        begun |= {entry["part"]} if "part" in entry else set()
        begun -= {entry["end"]} if "end" in entry else set()
    assert begun, "the load was too low for this test"
    before = {str(row["part"]) for row in rows(tmp_path)}
    again = command("run", line(sources={"cell": source | {"rate": 50, "rounds": 1}}), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    after = [row for row in rows(tmp_path) if row["part"] not in before]
    named = [row for row in after if row["result"] == "shutting down"]
    kept = {str(row["part"]) for row in after} - {str(row["part"]) for row in named}
    assert {str(row["part"]) for row in named} == begun - before - kept, "named, but for those whose record was kept"
    assert all("killed" in str(row["reason"]) and row["action"] == "reject" for row in named)
    old = {part.split("/")[1] for part in begun}
    parts = [str(row["part"]) for row in rows(tmp_path)]
    numbers = sorted(_number(part) for part in parts if part.split("/")[1] in old)
    assert set(numbers) == set(range(max(numbers) + 1)), "no part of the killed run is without a record"
    outcomes = {(row["part"], row["result"]) for row in rows(tmp_path)}
    assert len(outcomes) == len(set(parts)), "a record may be delivered twice, but there is one outcome"


def _number(part: str) -> int:
    """Which part of its run: 3.png#2 is the fourth of the second round of six."""
    name, _, turn = part.split("/")[-1].partition("#")
    return 6 * (int(turn or 1) - 1) + int(name.removesuffix(".png"))


def test_check_names_what_fails(line: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = line(
        bundle=str(tmp_path / "nothing"),
        sources={"cell": {"kind": "folder", "folder": "missing"}},
        sinks=[{"kind": "jsonl", "path": "file/out.jsonl"}],
    )
    done = command("check", settings, cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [one[:6] for one in lines] == ["FAILED", "FAILED", "FAILED", "ok    "]
    assert "missing: cannot be listed" in lines[1] and "make it" in lines[1]


def test_init_writes_settings_that_are_valid(tmp_path: Path) -> None:
    assert command("init", cwd=tmp_path).returncode == 0
    settings = read_settings(tmp_path / "line.yaml")
    assert settings.bundle == Path("bundles/part") and settings.sources["camera1"].kind == "folder"
    again = command("init", cwd=tmp_path)
    assert again.returncode == 1 and "--force" in again.stderr
