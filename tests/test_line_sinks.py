"""What all sinks share: one union of settings, libraries only when opened, dead servers as errors."""

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest
import yaml
from line_servers import free_port, program, record

from flowad_fast.config import Frozen, parse
from flowad_fast.errors import ConfigError, DeliveryError
from flowad_fast.line.event import Record
from flowad_fast.line.outcome import NoResult
from flowad_fast.line.sinks import SinkBase, SinkSettings
from flowad_fast.line.sinks.base import Secret, Tls, code
from flowad_fast.stages.decision import Verdict

ROOT = Path(__file__).parent.parent
KINDS = {one.model_fields["kind"].annotation.__args__[0]: one for one in get_args(get_args(SinkSettings)[0])}
LIBRARIES = {"database": "sqlalchemy", "modbus": "pymodbus", "mqtt": "paho", "opcua": "asyncua", "webhook": "httpx"}


class Settings(Frozen):
    sinks: tuple[SinkSettings, ...]


def minimal(kind: str, port: int, folder: Path) -> SinkBase:
    """Settings of a sink whose server is not there, or whose folder is a file."""
    (folder / "file").touch()
    given = {
        "jsonl": {"path": folder / "file" / "a.jsonl"},
        "database": {"url": f"postgresql://line@127.0.0.1:{port}/line"},
        "modbus": {"host": "127.0.0.1", "port": port, "coil": 0, "heartbeat": 1, "max_age": 60},
        "mqtt": {"host": "127.0.0.1", "port": port},
        "opcua": {"url": f"opc.tcp://127.0.0.1:{port}", "nodes": {"part": "i=1"}},
        "pictures": {"folder": folder / "file" / "a", "good": 1},
        "webhook": {"url": f"http://127.0.0.1:{port}"},
    }[kind]
    return parse(Settings, {"sinks": [{"kind": kind, **given}]}, "settings").sinks[0]


def test_the_documented_settings_are_valid_and_name_every_sink() -> None:
    page = (ROOT / "docs" / "sinks.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    settings = parse(Settings, yaml.safe_load(block), "docs/sinks.md")
    assert (
        {one.kind for one in settings.sinks}
        == set(KINDS)
        == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) - {"kind"}
    )


def test_every_file_of_a_sink_is_in_the_union(tmp_path: Path) -> None:
    folder = ROOT / "flowad_fast" / "line" / "sinks"
    assert {one.stem for one in folder.glob("*.py")} - {"__init__", "base", "rows"} == set(KINDS)
    assert minimal("mqtt", 1, tmp_path).label == "mqtt"
    assert parse(Settings, {"sinks": [{"kind": "jsonl", "path": "a", "name": "b"}]}, "s").sinks[0].label == "b"
    kept = {"jsonl", "database", "mqtt", "webhook"}
    assert {kind for kind, one in KINDS.items() if one.promises_delivery} == kept


@pytest.mark.parametrize(
    ("sink", "message"),
    [({"kind": "fax"}, "'jsonl', 'database'"), ({"path": "a"}, "kind"), ({"kind": "jsonl"}, "path: Field required")],
)
def test_settings_that_are_no_sinks_are_explained(sink: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Settings, {"sinks": [sink]}, "line.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_server_or_folder_is_an_error_every_time_and_closing_is_always_possible(
    kind: str, tmp_path: Path
) -> None:
    settings = minimal(kind, free_port(), tmp_path)
    sink = settings.open()
    part: Record = record("a")
    if kind == "modbus":
        part = record("a", arrived=datetime.now(UTC))
    for _ in range(2):
        with pytest.raises((DeliveryError, ConfigError), match=r"[;,] \w+") as caught:
            sink.publish([part])
        assert "\n" not in str(caught.value)
    sink.close()
    with pytest.raises((DeliveryError, ConfigError)):
        settings.check()
    settings.open().close()


@pytest.mark.parametrize(("kind", "library"), LIBRARIES.items())
def test_settings_need_no_library_and_opening_names_the_extra(kind: str, library: str, tmp_path: Path) -> None:
    settings = minimal(kind, 1, tmp_path)
    code = f"""
import sys
sys.modules.update(dict.fromkeys({tuple(LIBRARIES.values())!r}))
from flowad_fast.line.sinks.{kind} import {type(settings).__name__} as Settings
from flowad_fast.errors import MissingExtraError
settings = Settings.model_validate_json({settings.model_dump_json()!r})
for use in (settings.open, settings.check):
    try:
        use()
    except MissingExtraError as error:
        assert str(error) == 'the sink {kind} needs {library}: pip install "flowad-fast[line]"', error
    else:
        raise AssertionError("it went through")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_secret_is_read_from_one_place_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    path.write_text("  spaces stay \r\n")
    assert Secret(file=path).read() == "  spaces stay "
    monkeypatch.setenv("LINE_KEY", "from the environment")
    assert Secret(env="LINE_KEY").read() == "from the environment"
    for content, message in ((b"\n", "is empty"), (b"\xff", "cannot be read .no UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            Secret(file=path).read()
    with pytest.raises(ConfigError, match="cannot be read .No such file"):
        Secret(file=tmp_path / "none").read()
    for both in ({}, {"env": "A", "file": path}):
        with pytest.raises(ValueError, match="both or none of env and file"):
            Secret.model_validate(both)
    with pytest.raises(ValueError, match="one of certificate and key"):
        Tls(certificate=path)


def test_results_have_stable_numbers() -> None:
    assert [code(one) for one in (Verdict.GOOD, Verdict.ANOMALOUS, Verdict.INVALID)] == [1, 2, 3]
    assert {code(one) for one in NoResult} == {4}


def test_a_missing_server_program_is_skipped_by_name_and_a_failure_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs Debian's package a-package"):
        program("no-such-program", "a-package")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install a-package"):
        program("no-such-program", "a-package")
