"""ONNX Runtime's plug-in providers: packages of their own, whose library is registered in a running ONNX Runtime."""

import importlib
import threading
from dataclasses import dataclass
from typing import Any

import onnxruntime

from flowad_fast.errors import EngineUnavailableError


@dataclass(frozen=True)
class Plugin:
    """A package with a provider.

    Attributes:
        provider: ONNX Runtime's name for it.
        module: the package's module, which has `get_library_path`.
        package: what installs it.
        needs: what a machine must have, in words.
    """

    provider: str
    module: str
    package: str
    needs: str


PLUGINS = {
    "nv-tensorrt-rtx": Plugin(
        "NvTensorRTRTXExecutionProvider",
        "onnxruntime_ep_nv_tensorrt_rtx",
        "onnxruntime-ep-nv-tensorrt-rtx",
        "an NVIDIA RTX GPU and its driver",
    ),
}
"""By kind of device, as `load(device=…)` spells it."""
_registered: set[str] = set()
_lock = threading.Lock()


def plugin_device(kind: str, index: str) -> Any:
    """ONNX Runtime's device of a plug-in's provider, after registering its library; `index` "" is the first.

    Raises:
        EngineUnavailableError: the package is missing, its library cannot be loaded, or it finds no such device.
    """
    plugin = PLUGINS[kind]
    try:
        module = importlib.import_module(plugin.module)
    except ImportError as error:
        raise EngineUnavailableError(
            f'device {kind!r} needs the package {plugin.package}: pip install "flowad-fast[{kind}]" ({_line(error)})'
        ) from None
    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise EngineUnavailableError(
            f"ONNX Runtime {onnxruntime.__version__} takes no plug-in providers, which device {kind!r} is; install "
            "onnxruntime 1.23 or later"
        )
    with _lock:
        if plugin.module not in _registered:  # a library can be registered once
            try:
                onnxruntime.register_execution_provider_library(plugin.module, module.get_library_path())
            except Exception as error:  # ONNX Runtime's own share no base but Exception
                raise EngineUnavailableError(
                    f"device {kind!r} needs {plugin.package}, which ONNX Runtime {onnxruntime.__version__} cannot load "
                    f"({_line(error)}); it runs on {plugin.needs}; otherwise ask for device='cpu'"
                ) from None
            _registered.add(plugin.module)
    found = [one for one in onnxruntime.get_ep_devices() if one.ep_name == plugin.provider]
    place = int(index or 0) if (index or "0").isdecimal() else -1
    if not 0 <= place < len(found):
        there = ", ".join(f"{kind}:{i}" for i in range(len(found))) or "none"
        wanted = f"{kind}:{index}" if index else kind
        raise EngineUnavailableError(
            f"{plugin.package} finds no device {wanted!r} on this machine (it finds: {there}); it runs on "
            f"{plugin.needs}; otherwise ask for device='cpu'"
        )
    return found[place]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
