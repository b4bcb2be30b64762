"""ONNX Runtime's plug-in providers: refused in one line where they cannot run, and taken where they can."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from models import exported

import flowad_fast
from flowad_fast.engines import onnxruntime as ours
from flowad_fast.engines import plugins
from flowad_fast.engines.plugins import PLUGINS, plugin_device
from flowad_fast.environment import has_gpu_driver
from flowad_fast.errors import EngineUnavailableError

RTX = PLUGINS["nv-tensorrt-rtx"]


@pytest.fixture(scope="module")
def graph() -> Path:
    path = exported("onnx", 2)[1].path
    assert path is not None
    return path


class Runtime:
    """Stands for the module onnxruntime, with a plug-in that has devices once it is registered."""

    __version__ = "1.32.0"

    def __init__(self, devices: int = 0, failure: Exception | None = None) -> None:
        self.devices, self.failure, self.registered = devices, failure, list[tuple[str, str]]()

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if self.failure is not None:
            raise self.failure
        self.registered.append((name, path))

    def get_ep_devices(self) -> list[Any]:
        own = [SimpleNamespace(ep_name=RTX.provider, number=i) for i in range(self.devices if self.registered else 0)]
        return [SimpleNamespace(ep_name="CPUExecutionProvider"), *own]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in's package as if it were installed, and nothing registered yet."""
    module = ModuleType(RTX.module)
    module.get_library_path = lambda: "/somewhere/librtx.so"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, RTX.module, module)
    monkeypatch.setattr(plugins, "_registered", set())


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    monkeypatch.setitem(sys.modules, RTX.module, None)
    with pytest.raises(
        EngineUnavailableError, match=r'onnxruntime-ep-nv-tensorrt-rtx: pip install "flowad-fast\[nv-tensorrt-rtx\]"'
    ) as error:
        flowad_fast.load(graph, device="nv-tensorrt-rtx")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(find_spec(RTX.module) is None, reason=f"needs {RTX.package}")
@pytest.mark.skipif(has_gpu_driver(), reason="there is a GPU here, which the provider may run on")
def test_a_machine_without_a_gpu_is_refused_by_the_real_library(graph: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="runs on an NVIDIA RTX GPU and its driver") as error:
        flowad_fast.load(graph, device="nv-tensorrt-rtx")
    assert "\n" not in str(error.value) and "ask for device='cpu'" in str(error.value)


def test_the_library_is_registered_once_and_the_device_chosen_by_number(
    monkeypatch: pytest.MonkeyPatch, package: None
) -> None:
    runtime = Runtime(devices=2)
    monkeypatch.setattr(plugins, "onnxruntime", runtime)
    assert [plugin_device("nv-tensorrt-rtx", index).number for index in ("", "0", "1")] == [0, 0, 1]
    assert runtime.registered == [(RTX.module, "/somewhere/librtx.so")]
    for index in ("2", "-1", "x"):
        with pytest.raises(EngineUnavailableError, match=r"it finds: nv-tensorrt-rtx:0, nv-tensorrt-rtx:1\)"):
            plugin_device("nv-tensorrt-rtx", index)


def test_a_library_without_a_device_or_that_does_not_load_is_refused(
    monkeypatch: pytest.MonkeyPatch, package: None
) -> None:
    monkeypatch.setattr(plugins, "onnxruntime", Runtime())
    with pytest.raises(EngineUnavailableError, match=r"it finds: none\); it runs on an NVIDIA RTX GPU"):
        plugin_device("nv-tensorrt-rtx", "")
    monkeypatch.setattr(plugins, "_registered", set())
    monkeypatch.setattr(plugins, "onnxruntime", Runtime(failure=RuntimeError("libcuda.so.1:\nnot found")))
    with pytest.raises(EngineUnavailableError, match=r"cannot load \(libcuda.so.1: not found\)"):
        plugin_device("nv-tensorrt-rtx", "")
    monkeypatch.setattr(plugins, "onnxruntime", SimpleNamespace(__version__="1.22.0"))
    with pytest.raises(EngineUnavailableError, match="1.22.0 takes no plug-in providers"):
        plugin_device("nv-tensorrt-rtx", "")


@pytest.mark.parametrize("runs_on", [RTX.provider, "CPUExecutionProvider"])
def test_the_session_is_made_for_that_device_and_its_placement_checked(
    monkeypatch: pytest.MonkeyPatch, graph: Path, runs_on: str
) -> None:
    """With a stand-in for the GPU's provider: what is asked of ONNX Runtime, and that nothing may fall back."""
    asked: list[Any] = []

    class Options(ours.onnxruntime.SessionOptions):  # type: ignore[misc, name-defined]
        def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
            asked.append((devices, options))

    class Session(ours.onnxruntime.InferenceSession):  # type: ignore[misc, name-defined]
        def __init__(self, path: str, options: Any, providers: Any) -> None:
            asked.append(providers)
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [RTX.provider, "CPUExecutionProvider"]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            node = SimpleNamespace(op_type="MatMul")
            return [SimpleNamespace(ep_name=runs_on, get_nodes=lambda: [node])]

    monkeypatch.setattr(ours, "plugin_device", lambda kind, index: (kind, index))
    monkeypatch.setattr(ours.onnxruntime, "SessionOptions", Options)
    monkeypatch.setattr(ours.onnxruntime, "InferenceSession", Session)
    if runs_on != RTX.provider:
        with pytest.raises(EngineUnavailableError, match="it would run MatMul on CPUExecutionProvider"):
            flowad_fast.load(graph, device="nv-tensorrt-rtx:1")
        return
    detector = flowad_fast.load(graph, device="nv-tensorrt-rtx:1")
    assert detector.engine == "onnxruntime on nv-tensorrt-rtx:1"
    assert asked == [([("nv-tensorrt-rtx", "1")], {}), None]


def test_an_unknown_device_offers_the_plugins_too(graph: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="did you mean 'nv-tensorrt-rtx'"):
        flowad_fast.load(graph, engine="onnxruntime", device="nv-tensorrt")
