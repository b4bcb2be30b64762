"""The systemd unit and the container file: what tools can check of them here."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flowad_fast.line.settings import Limits

DEPLOY = Path(__file__).parent.parent / "deploy"
UNIT = DEPLOY / "flowad-line.service"


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text(encoding="utf-8"))
    return parser["Service"]


@pytest.fixture
def analyse(tmp_path: Path):
    """`systemd-analyze` with the unit, whose program is one that is there."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")

    def run(*arguments: str, change: tuple[str, str] = ("", "")) -> subprocess.CompletedProcess[str]:
        path = tmp_path / UNIT.name
        text = re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={shutil.which('true')}", UNIT.read_text(encoding="utf-8"))
        path.write_text(text.replace(*change) if change[0] else text, encoding="utf-8")
        return subprocess.run([program, *arguments, path], capture_output=True, text=True)

    return run


def test_systemd_accepts_the_unit_without_a_word(analyse) -> None:
    done = analyse("verify", "--man=no")
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    wrong = analyse("verify", "--man=no", change=("KillMode=mixed", "KillMood=mixed"))
    assert "KillMood" in wrong.stderr, "it finds what is wrong"


def test_the_unit_is_hardened_as_systemd_judges_it(analyse) -> None:
    done = analyse("security", "--offline=true", "--threshold=25", "--no-pager")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_stopping_has_more_time_than_the_line_takes_to_drain() -> None:
    service = unit()
    assert float(service["TimeoutStopSec"]) > Limits().drain + 5
    assert service["KillMode"] == "mixed", "the engine's process judges what waits until the line ends it"
    assert service["Type"] == "exec" and "WatchdogSec" not in service, "the line does not notify systemd"


def test_both_run_the_command_that_there_is() -> None:
    from typer.main import get_command

    from flowad_fast.cli.line import app

    run = get_command(app).commands["run"]  # type: ignore[attr-defined]
    words = unit()["ExecStart"].split()
    container = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    command = re.search(r"^CMD (\[.*\])$", container, re.M)
    assert command is not None
    assert words[1:] == re.findall(r'"([^"]+)"', command[1])
    run.make_context("run", words[2:])


def test_the_container_runs_as_nobody_in_particular_and_has_no_torch() -> None:
    container = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER 10001$", container, re.M)
    assert re.findall(r'"/src\[(\w+)\]"', container) == ["line"]


def test_the_container_gets_all_that_the_package_is_made_of() -> None:
    container = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (?!--)(.*) /src\S*$", container, re.M) for word in line.split()]
    root = DEPLOY.parent
    assert all((root / name).exists() for name in copied)
    linked = {
        path.resolve().relative_to(root).as_posix() for path in (root / "flowad_fast").iterdir() if path.is_symlink()
    }
    assert {"flowad_fast", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", *linked} == set(copied)
