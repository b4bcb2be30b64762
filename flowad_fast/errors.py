"""The project's own exceptions. Each message says what was got, what was expected, and the remedy."""

import difflib
from collections.abc import Iterable


class FlowADError(Exception):
    """Base of every error that this project raises on purpose; a command prints it as one line."""


class ConfigError(FlowADError, ValueError):
    """A configuration is incomplete, contradictory, or has an unknown key."""


class CheckpointError(FlowADError, ValueError):
    """A weight file cannot be read, or does not hold the model that its configuration describes."""


class FrameError(FlowADError, ValueError):
    """A frame or an image file is not what a detector accepts."""


class BundleError(FlowADError, ValueError):
    """An exported bundle is missing, altered, or of another version."""


class ExportError(FlowADError, RuntimeError):
    """A format cannot be written for this model; the message names what was refused."""


class EngineUnavailableError(FlowADError, RuntimeError):
    """The engine that was asked for cannot run on this machine."""


class CalibrationError(FlowADError, ValueError):
    """Good parts are too few, or the model has no calibration for what is asked."""


class ParityError(FlowADError, RuntimeError):
    """An exported artefact does not compute what the reference computes."""


class OutputError(FlowADError, OSError):
    """What a command prints cannot be written: standard output is closed, or its disk is full."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown `name`: `` (did you mean 'x'?)`` where one is near, and all `valid` names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}valid: {', '.join(names)}"
