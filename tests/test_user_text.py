"""What a user named is shown as it is, on one line, and never as markup; an output that breaks is one line, not 0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowad_fast.cli import common

PROGRAM = """
import typer
from flowad_fast.cli import common
def main(text: str, times: int = 1) -> None:
    for _ in range(times):
        common.say(text)
common.command(main)()
"""


def run(
    *arguments: str, stdout: int | None = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photos [lot7]", "photos [lot7]"),
        ("x[/y] [bold]", "x[/y] [bold]"),
        ("$HOME $$ %s %(a)s", "$HOME $$ %s %(a)s"),
        ("a\nb\tc\x1b[31m", r"a\nb\tc\x1b[31m"),
        ("cod\u202egpj.exe", r"cod\u202egpj.exe"),
        ("bottle \u05e9\u05dc\u05d5\u05dd ü 漢", "bottle \u05e9\u05dc\u05d5\u05dd ü 漢"),
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
    ],
)
def test_names_are_shown_as_they_are(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert common.visible(text) == shown and common.plain(text).plain == shown
    assert run(text, PYTHONIOENCODING="utf-8").stdout.decode() == shown + "\n"


def test_an_ascii_console_shows_escapes() -> None:
    assert run("ü · 漢", PYTHONIOENCODING="ascii").stdout == b"\\xfc \\xb7 \\u6f22\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run("text", stdout=full.fileno())
    assert done.returncode == 1 and done.stderr.decode().count("\n") == 1 and b"No space left" in done.stderr


def test_a_reader_that_went_away_is_one_line() -> None:
    read, write = os.pipe()
    os.close(read)
    done = run("text", "--times", "5000", stdout=write)
    os.close(write)
    assert done.returncode == 1 and done.stderr.decode().count("\n") == 1 and b"Broken pipe" in done.stderr


def test_a_closed_standard_output_is_refused_before_the_work() -> None:
    command = f"exec {sys.executable} -c '{PROGRAM}' text >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1 and b"standard output is closed" in done.stderr
