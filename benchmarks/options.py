"""Options that several commands of `flowad-bench` share, and what they mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flowad_fast.cli import common
from flowad_fast.config import Weights
from flowad_fast.errors import ConfigError
from flowad_fast.stages.scorers import SCORERS

if TYPE_CHECKING:
    from flowad_fast.config import VelocityConfig
    from flowad_fast.stages.scorers import Scorer

KINDS = ", ".join(SCORERS)
STEPS = "Steps per unit time, as in every command. [default: as --evaluations says]"
EVALUATIONS = "Function evaluations per frame. [default: 3; of mismatch 1]"
Chosen = Annotated[Weights | None, typer.Option("--weights", help="A checkpoint's: trained or averaged [model].")]
Lists = Annotated[Path | None, typer.Option("--lists", help="Layout realiad: folder of lists [DATA/realiad_jsons].")]


def words(text: str) -> list[str]:
    """A comma-separated list, each word once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers, separated by commas; ConfigError for anything else."""
    found = words(text)
    if not found or not all(word.isdigit() and int(word) > 0 for word in found):
        raise ConfigError(f"{option} {text!r}: expected positive whole numbers, separated by commas")
    return [int(word) for word in found]


def scorers_along(
    kinds: Sequence[str], steps: str, evaluations: str, probes: Sequence[int], config: "VelocityConfig | None"
) -> "list[Scorer]":
    """Scorers along the axes that the options name."""
    from flowad_fast.benchmarks.measure.cases import make_scorers

    if steps and evaluations:
        raise ConfigError("--steps and --evaluations say the same in two ways; give one of them")
    return make_scorers(
        kinds,
        steps=numbers(steps, "--steps") if steps else (),
        evaluations=numbers(evaluations, "--evaluations") if evaluations else (None,),
        probes=probes,
        config=config,
    )


def probes_of(text: str, kinds: Sequence[str], default: Sequence[int]) -> Sequence[int]:
    """The option --probes, refused where no scorer has probes."""
    from flowad_fast.benchmarks.measure.cases import has_probes

    if text and not any(map(has_probes, kinds)):
        able = ", ".join(filter(has_probes, SCORERS))
        raise ConfigError(f"--probes {text}: an option of {able}, not of {', '.join(kinds)}; leave it out")
    return numbers(text, "--probes") if text else default


def check_weights(weights: Weights | None, preset: str) -> None:
    """Refuse a choice of weights where there are none to choose from."""
    from flowad_fast.benchmarks.measure.cases import PRESETS, is_bundle

    if weights is not None and (preset in PRESETS or is_bundle(preset)):
        raise ConfigError(f"--weights {weights}: an option of checkpoints, got {preset}; leave it out")


def console() -> Console:
    """A pipe has no width; a wide table is better there than a broken one."""
    return common.out if common.out.is_terminal else Console(width=180)
