"""Another bundle for a running line: real bundles in real child processes, over the page's addresses."""

import json
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flowad_fast.bundle import read, write_manifest
from flowad_fast.errors import BundleError, ConfigError, LineStoppedError
from flowad_fast.line import Alarm, Record
from flowad_fast.line.activation import FILE, Progress, RefusedError, active
from flowad_fast.line.settings import LineSettings, read_settings
from flowad_fast.line.station import Station
from flowad_fast.line.web.client import Client
from flowad_fast.stages.decision import Calibration, ClassCalibration
from tests.line_servers import free_port, until
from tests.models import exported
from tests.test_line_command import begin, command, rows

pytest.importorskip("fastapi")
pytestmark = pytest.mark.long
HIGH, LOW = 1e9, -1e9


def calibrated(folder: Path, threshold: float, classes: int = 0) -> Path:
    """A real bundle for ONNX Runtime in a folder of its own."""
    shutil.copytree(exported("onnx", classes)[1].path, folder)
    _, manifest = read(folder)
    names = manifest.model.classes.labels or ("",)
    limits = {name: ClassCalibration(threshold=threshold, parts=19) for name in names}
    write_manifest(folder, manifest.model_copy(update={"calibration": Calibration(alpha=0.05, classes=limits)}))
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that passes all, one that rejects all, and those that must never replace one."""
    folder = tmp_path_factory.mktemp("bundles")
    calibrated(folder / "passes", HIGH)
    calibrated(folder / "rejects", LOW)
    calibrated(folder / "again", HIGH * 2)
    calibrated(folder / "others", HIGH, classes=3)
    shutil.copytree(exported("onnx")[1].path, folder / "uncalibrated")
    shutil.copytree(folder / "rejects", folder / "altered")
    graph = next((folder / "altered").rglob("*.onnx"))
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    shutil.copytree(folder / "rejects", folder / "half")
    next((folder / "half").rglob("*.onnx")).unlink()
    (folder / "empty").mkdir()
    shutil.copytree(folder / "rejects", folder / "broken")
    (folder / "broken" / "manifest.json").write_text('{"schema_version": 1}')
    return folder


def settings_of(folder: Path, bundles: Path, **fields: object) -> LineSettings:
    (folder / "token").write_text("a-token-of-the-test")
    data = {
        "bundle": str(bundles / "passes"),
        "deadline": 5.0,
        "threads": 1,
        "sources": {"cell": {"kind": "recorded", "folder": str(folder / "parts"), "rate": 40, "rounds": None}},
        "sinks": [{"kind": "jsonl", "path": str(folder / "out.jsonl")}],
        "journal": str(folder / "journal"),
        "limits": {"drain": 3},
        "web": {"port": free_port(), "token": {"file": str(folder / "token")}},
    }
    (folder / "line.yaml").write_text(yaml.safe_dump(data | fields))
    return read_settings(folder / "line.yaml")


class Running:
    """A station that runs, what it told, and orders over the network."""

    def __init__(self, settings: LineSettings) -> None:
        self.station = Station(settings)
        self.events: list[Record | Alarm] = []
        self.station.line.listen(self.events.append)
        self.client = Client(settings)

    def __enter__(self) -> "Running":
        self.station.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.station.close()

    def activate(self, bundle: object, shadow: int = 0, allowed: float = 0.02) -> Progress:
        self.client.activate(str(bundle), shadow, allowed)
        return self.client.follow(lambda now: None, 0.05)

    def alarms(self, kind: str) -> list[Alarm]:
        return [one for one in self.events if isinstance(one, Alarm) and one.kind == kind]

    @property
    def records(self) -> list[Record]:
        return [one for one in self.events if isinstance(one, Record)]

    def more(self, count: int = 3) -> list[Record]:
        """Wait for parts that came after now."""
        before = len(self.records)
        until(lambda: len(self.records) >= before + count + 4, 20)
        return self.records[-count:]


def write_parts(folder: Path) -> Path:
    (folder / "parts").mkdir()
    for i in range(6):
        one = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(one).save(folder / "parts" / f"{i}.png")
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    return write_parts(tmp_path)


@pytest.fixture
def running(parts: Path, bundles: Path) -> Iterator[Running]:
    with Running(settings_of(parts, bundles)) as one:
        one.more()
        yield one


def test_activation_rollback_and_restart(running: Running, bundles: Path, parts: Path) -> None:
    old = running.station.line.scoring.bundle
    assert {one.result for one in running.more()} == {"good"}
    found = running.activate("rejects")
    assert found.state == "active" and "differs by" in found.text, "the same model must give the same map"
    after = running.more()
    assert {one.result for one in after} == {"anomalous"} and {one.bundle for one in after} != {old}
    told = running.alarms("bundle activated")[0]
    assert told.over and str(bundles / "rejects") in told.text and "asked for by 127.0.0.1" in told.text
    assert running.station.watch.report()["cell"].parts < len(running.records), "the monitor began anew"
    text = (parts / "out.jsonl").read_text()
    assert '"bundle activated"' in text, "in the sinks"

    running.client.rollback()
    running.client.follow(lambda now: None, 0.05)
    assert {one.bundle for one in running.more()} == {old}
    running.client.rollback()  # and forward again
    running.client.follow(lambda now: None, 0.05)
    assert {one.result for one in running.more()} == {"anomalous"}
    running.station.close()
    assert len({one.part for one in running.records}) == len(running.records) == running.station.line.health().arrived

    settings = running.station.settings
    with Running(settings) as again:
        assert {one.result for one in again.more()} == {"anomalous"}, "the activated bundle goes on"
        assert "was activated on" in again.station.note and str(bundles / "passes") in again.station.note
        again.client.rollback()  # from disk
        again.client.follow(lambda now: None, 0.05)
        assert {one.result for one in again.more()} == {"good"}
    assert active(settings).bundle == bundles / "passes"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bundle", "reason"),
    [
        ("altered", "the file was altered or damaged"),
        ("half", "missing, or not a plain file"),
        ("broken", "project_version"),
        ("empty", "no bundle"),
        ("nowhere", "no bundle"),
        ("uncalibrated", "has no calibration"),
        ("others", "judges nut, screw, nail, the running bundle judges one product"),
        ("passes", "the bundle that runs already"),
        ("../elsewhere", "only bundles in"),
        ("/", "only bundles in"),
    ],
)
def test_a_bundle_that_must_not_replaces_nothing(shared: Running, bundle: str, reason: str) -> None:
    before = shared.station.line.scoring
    with pytest.raises(RefusedError, match=reason) as caught:
        shared.activate(bundle)
    assert "\n" not in str(caught.value)
    assert shared.station.line.scoring is before and not (shared.station.settings.journal / FILE).exists()
    assert {one.result for one in shared.more()} == {"good"}
    if "only bundles" not in reason:
        until(lambda: any(reason in one.text for one in shared.alarms("activation refused")))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, bundles: Path) -> Iterator[Running]:
    """One line for all that changes nothing."""
    folder = tmp_path_factory.mktemp("shared")
    write_parts(folder)
    with Running(settings_of(folder, bundles)) as one:
        one.more()
        yield one


def test_shadow_compares_and_the_verdicts_stay_the_old_ones(running: Running) -> None:
    old = running.station.line.scoring.bundle
    with pytest.raises(RefusedError, match=r"10 of 10 parts in shadow were judged otherwise \(100.0%, allowed 2.0%\)"):
        running.activate("rejects", shadow=10)
    told = running.alarms("shadow disagrees")
    assert len(told) == 10 and all(one.over for one in told)
    figures = told[0].figures
    assert figures["threshold"] == HIGH and figures["other_threshold"] == LOW
    assert figures["score"] == pytest.approx(figures["other_score"], rel=1e-3)
    assert {(one.bundle, str(one.result)) for one in running.records} == {(old, "good")}
    found = running.activate("again", shadow=10)
    assert found.judged == 10 and found.disagreements == 0 and "0 of 10 parts in shadow" in found.text
    assert {one.bundle for one in running.more()} != {old}
    found = running.activate("rejects", shadow=5, allowed=1.0)
    assert found.disagreements == 5 and {one.result for one in running.more()} == {"anomalous"}


def test_one_at_a_time_and_shadow_can_be_cancelled(running: Running) -> None:
    running.client.activate("again", 100_000, 0.02)
    until(lambda: running.client.progress().judged > 0, 20)
    with pytest.raises(RefusedError, match="is being activated"):
        running.client.activate("rejects", 0, 0.02)
    running.client.cancel()
    with pytest.raises(RefusedError, match="cancelled in shadow after"):
        running.client.follow(lambda now: None, 0.05)
    running.client.activate("rejects", 0, 0.0)
    running.client.cancel()
    with pytest.raises(RefusedError, match="cancelled before the change"):
        running.client.follow(lambda now: None, 0.05)
    with pytest.raises(RefusedError, match="no way back"):
        running.client.rollback()
    assert {one.result for one in running.more()} == {"good"}


def test_an_engine_that_dies_in_shadow_or_fails_to_start_replaces_nothing(running: Running, bundles: Path) -> None:
    running.client.activate("again", 100_000, 0.02)
    until(lambda: running.client.progress().judged > 0, 20)
    children = multiprocessing.active_children()
    newest = max(children, key=lambda one: one.pid or 0)
    newest.kill()
    with pytest.raises(RefusedError, match="process has ended"):
        running.client.follow(lambda now: None, 0.05)
    assert {one.result for one in running.more()} == {"good"}
    assert not running.alarms("engine failed"), "the one that judges is untouched"


def test_the_same_model_with_another_map_is_refused(running: Running) -> None:
    line = running.station.line
    line.canary.maps[line.scoring.bundle] = line.canary.maps[line.scoring.bundle] * 1.5
    with pytest.raises(RefusedError, match="its map of the canary frame differs by .* its certificate allows"):
        running.activate("rejects")
    assert {one.result for one in running.more()} == {"good"}


def test_an_activation_that_cannot_be_noted_is_none(running: Running) -> None:
    (running.station.settings.journal / (FILE + ".part")).mkdir()  # as on a full disk
    with pytest.raises(RefusedError, match="cannot be noted"):
        running.activate("rejects")
    assert {one.result for one in running.more()} == {"good"}


def test_what_is_active_is_checked_and_an_edit_of_the_settings_counts(
    parts: Path, bundles: Path, tmp_path: Path
) -> None:
    settings = settings_of(parts, bundles)
    assert active(settings) is None
    with Running(settings) as one:
        copy = shutil.copytree(bundles / "rejects", bundles / "taken")
        one.activate("taken")
    found = active(settings)
    assert found is not None and found.bundle == copy and found.before.bundle == bundles / "passes"
    checked = command("check", parts / "line.yaml", "--json", cwd=parts)
    texts = {row["what"]: row["text"] for row in json.loads(checked.stdout)}
    assert f"{copy} ({found.hash}) was activated on" in texts["bundle"], checked.stdout
    assert "who has the token may activate bundles" in texts["web"]
    assert active(settings_of(parts, bundles, bundle=str(bundles / "again"))) is None, "an operator's edit counts"
    (copy / "manifest.json").write_text((bundles / "again" / "manifest.json").read_text())
    settings = settings_of(parts, bundles)
    with pytest.raises(BundleError, match="was activated as .* and is .* now; put it back, or delete"):
        Station(settings)
    shutil.rmtree(copy)
    with pytest.raises(BundleError, match="was activated and is gone"):
        active(settings)
    (settings.journal / FILE).write_text("{}")
    with pytest.raises(ConfigError, match="bundle"):
        active(settings)


def test_orders_need_a_token_and_a_line(parts: Path, bundles: Path) -> None:
    with pytest.raises(ConfigError, match=r"no web\.token"):
        Client(settings_of(parts, bundles, web={"port": free_port()}))
    with pytest.raises(LineStoppedError, match="no line answers"):
        Client(settings_of(parts, bundles)).activate("again", 0, 0.0)


def test_the_commands(parts: Path, bundles: Path) -> None:
    settings_of(parts, bundles)
    run = begin(parts / "line.yaml")
    until(lambda: len(rows(parts)) > 5, 30)
    done = command("activate", "line.yaml", bundles / "rejects", "--shadow", 5, "--allowed", 1, cwd=parts)
    assert done.returncode == 0 and "active: canary" in done.stdout and "5 of 5 parts" in done.stdout + done.stderr
    refused = command("activate", "line.yaml", bundles / "altered", cwd=parts)
    assert refused.returncode == 1 and refused.stderr.strip().splitlines()[-1].startswith("error: RefusedError:")
    back = command("rollback", "line.yaml", cwd=parts)
    assert back.returncode == 0, back.stderr
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=20)
    assert run.returncode == 0 and "page: http://127.0.0.1:" in err
    assert {row["result"] for row in rows(parts)} == {"good", "anomalous"}
    assert json.loads(out)["pending"] == 0
