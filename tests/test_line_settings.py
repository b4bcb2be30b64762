"""A settings file is right as a whole, or every problem is named."""

from pathlib import Path

import pytest

from flowad_fast.errors import ConfigError
from flowad_fast.line.settings import read_settings

GOOD = """
bundle: bundles/cells
deadline: 0.5
sources:
  left: {kind: folder, folder: in}
  right: {kind: recorded, folder: parts, rate: 20, rounds: null}
sinks:
  - {kind: jsonl, path: out.jsonl}
"""


def written(folder: Path, text: str) -> Path:
    (folder / "line.yaml").write_text(text)
    return folder / "line.yaml"


def test_defaults_are_the_careful_ones(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, GOOD))
    assert settings.on_no_result == "reject" and settings.sources["right"].kind == "recorded"
    assert settings.sinks[0].promises_delivery and settings.limits.restarts == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("deadline: 0.5", ""), ["deadline", "required"]),
        (("deadline: 0.5", "deadline: 0"), ["deadline", "greater than 0"]),
        (("deadline: 0.5", "deadline: 0.5\ncapacty: 3"), ["capacty", "did you mean 'capacity'"]),
        (("rate: 20", "rate: -1"), ["sources.right.recorded.rate", "greater than 0", "-1"]),
        (("kind: folder", "kind: camera"), ["sources.left", "'folder', 'gige', 'recorded', 'video'"]),
        (("left:", "../left:"), ["'../left'", "letters, digits"]),
        (("sinks:", "sinks:\n  - {kind: jsonl, path: b}"), ["two sinks named 'jsonl'", "name of its own"]),
        ((GOOD, "- a list"), ["expected fields"]),
        ((GOOD, "a: [1"), ["YAML"]),
    ],
)
def test_every_problem_is_named(tmp_path: Path, change: tuple[str, str], expected: list[str]) -> None:
    path = written(tmp_path, GOOD.replace(*change))
    with pytest.raises(ConfigError) as caught:
        read_settings(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert all(one in message for one in expected), message


def test_a_missing_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flowad-line init"):
        read_settings(tmp_path / "none.yaml")
