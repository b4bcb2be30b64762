"""The OpenVINO engine beyond the contract: devices, precision, threads, modes, shapes; nothing silent, nothing sent."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import exported, tiny_frames, tiny_model
from PIL import Image
from typer.testing import CliRunner

import flowad_fast
from flowad_fast.engines.start import start_engine
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.export import cli
from flowad_fast.export.exporter import export_bundle
from flowad_fast.stages.scorers import Mismatch

if find_spec("openvino") is None:  # which reports its import unless the engine imports it
    pytest.skip('needs openvino: pip install "flowad-fast[openvino]"', allow_module_level=True)

from flowad_fast.engines import openvino as ours  # noqa: E402
from flowad_fast.engines.openvino import OpenVinoEngine, nodes, resolve  # noqa: E402

openvino = ours.openvino
ROOT = Path(__file__).parent.parent
FRAMES, Y = tiny_frames(5, seed=1), np.array([0, 1, 1, 0, 1])


@pytest.fixture(scope="module")
def folder() -> Path:
    path = exported("onnx", 2)[1].path
    assert path is not None
    return path


def started(folder: Path, device: str = "cpu", **options: Any) -> OpenVinoEngine:
    engine = flowad_fast.load(folder, engine="openvino", device=device, **options).running()
    assert isinstance(engine, OpenVinoEngine)
    return engine


def test_float32_is_float32_also_where_the_processor_has_bfloat16(folder: Path) -> None:
    engine = started(folder)
    assert engine.title == "openvino on cpu (f32, latency)"
    assert engine.details["execution_devices"] == ["cpu"] and engine.details["precision"] == "f32"
    assert engine.details["nodes"]["f32"] > 20 and not set(engine.details["nodes"]) & {"bf16", "f16"}
    assert engine.details["device"]
    heavy = {kind for kind, _ in nodes(engine._graph(None))} & set(ours.HEAVY)
    assert heavy, "the check of products sees some"


def test_a_graph_that_would_be_computed_in_bfloat16_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    options = OpenVinoEngine._options
    monkeypatch.setattr(OpenVinoEngine, "_options", lambda self: options(self) | {"INFERENCE_PRECISION_HINT": "bf16"})
    with pytest.raises(EngineUnavailableError, match=r"asked OpenVINO for f32 on CPU, it would compute .* in bf16"):
        started(folder)


def test_a_graph_that_would_run_elsewhere_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = started(folder)

    class Elsewhere:
        def get_property(self, name: str) -> list[str]:
            return ["GPU.0", "CPU"]

    with pytest.raises(EngineUnavailableError, match="asked OpenVINO for CPU, it would run on GPU.0, CPU"):
        engine._check(Elsewhere())


@pytest.mark.parametrize(
    ("device", "available", "wanted"),
    [
        ("auto", ["CPU"], "AUTO"),
        ("cpu", ["CPU"], "CPU"),
        ("gpu", ["CPU", "GPU"], "GPU"),
        ("gpu:0", ["CPU", "GPU"], "GPU"),
        ("gpu", ["CPU", "GPU.0", "GPU.1"], "GPU.0"),
        ("gpu:1", ["CPU", "GPU.0", "GPU.1"], "GPU.1"),
        ("npu", ["CPU", "NPU"], "NPU"),
    ],
)
def test_devices_are_spelled_as_everywhere(device: str, available: list[str], wanted: str) -> None:
    assert resolve(device, available) == wanted


@pytest.mark.parametrize(
    ("device", "available", "said"),
    [
        ("gpu", ["CPU"], r"finds no device 'gpu' on this machine \(it finds: cpu\)"),
        ("gpu:2", ["CPU", "GPU.0", "GPU.1"], r"'gpu:2' on this machine \(it finds: cpu, gpu:0, gpu:1\)"),
        ("npu", [], r"\(it finds: none\)"),
        ("cuda", ["CPU"], r"no device 'cuda'; .*\(on this machine: cpu\)"),
    ],
)
def test_a_device_that_is_not_there_is_one_line_naming_those_that_are(
    device: str, available: list[str], said: str
) -> None:
    with pytest.raises(EngineUnavailableError, match=said) as error:
        resolve(device, available)
    assert len(str(error.value).splitlines()) == 1


def test_auto_is_asked_among_several_devices_and_the_graph_compiled_where_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started(folder, "auto").title == "openvino on cpu (f32, latency)"
    asked: list[tuple[str, dict[str, Any]]] = []
    real = openvino.Core()

    class Chosen:
        def get_property(self, name: str) -> list[str]:
            return ["CPU"]

    class Core:
        available_devices = ("CPU", "GPU.0", "NPU")

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Any:
            asked.append((device, options))
            return Chosen() if device.startswith("AUTO") else real.compile_model(model, device, options)

    monkeypatch.setattr(ours.openvino, "Core", Core)
    assert started(folder, "auto").device == "cpu"
    assert [device for device, _ in asked] == ["AUTO:CPU,GPU.0", "CPU"]  # the NPU has no float32
    assert asked[0][1]["ENABLE_STARTUP_FALLBACK"] is False and asked[0][1]["ENABLE_RUNTIME_FALLBACK"] is False


def test_a_device_without_float32_takes_no_float32_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours.ARITHMETIC, "CPU", "f16")
    with pytest.raises(EngineUnavailableError, match="computes in f16 and the graph was exported in fp32; export it"):
        started(folder)


def test_devices_of_fixed_shapes_get_a_graph_for_each_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = started(folder).run(FRAMES, Y)
    monkeypatch.setattr(ours, "STATIC", ("CPU",))
    engine = started(folder)
    assert engine._compiled == {} and "nodes" not in engine.details
    engine.prepare(FRAMES.shape[1], FRAMES.shape[2])
    (size,) = engine._compiled
    assert size == FRAMES.shape[1:3] and not engine._compiled[size].inputs[0].partial_shape.is_dynamic
    for got, one in zip(engine.run(FRAMES, Y), expected, strict=True):
        np.testing.assert_allclose(got, one, atol=1e-3 * one.std(), rtol=1e-5)
    assert len(engine.run(tiny_frames(2, 72, 80), Y[:2])[0]) == 2 == len(engine._compiled)


def test_threads_and_streams_are_those_that_were_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowad_fast.engines import cores

    assert started(folder, threads=1).details["threads"] == 1
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "available_cores", lambda: 2)
    assert started(folder).details["threads"] == 2
    many = started(folder, mode="throughput")
    assert many.title == "openvino on cpu (f32, throughput)" and many.details["streams"] >= 1
    assert many.details["threads"] == 2
    with pytest.raises(EngineUnavailableError, match="threads is 0; expected 1 or more"):
        started(folder, threads=0)


@pytest.mark.parametrize("streams", [1, 2, 3, 7])
def test_throughput_shares_a_batch_out_and_keeps_its_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    expected = started(folder).run(FRAMES, Y)
    monkeypatch.setattr(OpenVinoEngine, "_streams", lambda self, graph: streams)
    for got, one in zip(started(folder, mode="throughput").run(FRAMES, Y), expected, strict=True):
        np.testing.assert_allclose(got, one, atol=1e-3 * one.std(), rtol=1e-5)


def test_a_mode_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="no mode 'fast'"):
        started(folder, mode="fast")
    with pytest.raises(EngineUnavailableError, match="the engine onnxruntime has no mode 'throughput'; leave it out"):
        flowad_fast.load(folder, engine="onnxruntime", device="cpu", mode="throughput")


def test_inspection_takes_a_mode(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowad_fast.cli.inspect import main

    photos, rows = tmp_path / "photos", tmp_path / "rows.jsonl"
    photos.mkdir()
    for i, frame in enumerate(tiny_frames(3)):
        Image.fromarray(frame).save(photos / f"{i}.png")
    given = [str(folder), str(photos), "--class", "nut", "--output", str(rows), "--format", "jsonl"]
    options = ["--engine", "openvino", "--device", "cpu", "--mode", "throughput"]
    monkeypatch.setattr(sys, "argv", ["flowad-inspect", *given, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    engines = {json.loads(line)["engine"] for line in rows.read_text().splitlines()}
    assert len(engines) == 1 and "throughput" in engines.pop()
    options = ["--restart", "--engine", "onnxruntime", "--mode", "throughput"]
    monkeypatch.setattr(sys, "argv", ["flowad-inspect", *given, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "onnxruntime has no mode 'throughput'" in capsys.readouterr().err


def test_location_statistics_are_taken(tmp_path: Path) -> None:
    from flowad_fast.export.frames import GoodParts
    from flowad_fast.export.location import StatisticsParts

    good = GoodParts(tiny_frames(24, seed=5), [""] * 24, [f"{i}.png" for i in range(24)])
    result = export_bundle(
        tiny_model(), Mismatch(), tmp_path / "b", formats=("onnx",), frames=tiny_frames(4), quiet=True,
        location=StatisticsParts(good, "noise"),
    )  # fmt: skip
    assert result.published and result.path is not None
    both = [start_engine(result.path, result.manifest, name, "cpu") for name in ("openvino", "onnxruntime")]
    (maps, scores), (expected, scores_expected) = (one.run(FRAMES, None) for one in both)
    np.testing.assert_allclose(maps, expected, atol=1e-3 * expected.std())
    np.testing.assert_allclose(scores, scores_expected, rtol=1e-3)


def test_a_graph_that_it_cannot_read_or_whose_data_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto

    from flowad_fast.bundle import Artefact
    from flowad_fast.errors import BundleError

    path, artefact = tmp_path / "model.onnx", Artefact(engine="onnxruntime", files={"model.onnx": "0" * 64})
    tensor = TensorProto(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString())
    with pytest.raises(BundleError, match="external data of 'w' is at '/etc/passwd'"):
        OpenVinoEngine(path, artefact, "cpu")
    path.write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    with pytest.raises(BundleError, match="OpenVINO refuses the graph"):
        OpenVinoEngine(path, artefact, "cpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_gets_one_error_at_once(folder: Path) -> None:
    detector = flowad_fast.load(folder, engine="openvino", device="cpu")
    detector(FRAMES, list(map(int, Y)))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            detector(FRAMES, list(map(int, Y)))
        except EngineUnavailableError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert "a fork of it, where its engine cannot run; load the bundle in the child" in said.read()
    os.waitpid(child, 0)


LIGHT = """
import sys
sys.modules.update(dict.fromkeys(("torch", "onnx", "timm"), None))
import numpy as np, flowad_fast
assert "openvino" not in sys.modules
import flowad_fast.engines.start
assert "openvino" not in sys.modules, "it is imported when it is used"
detector = flowad_fast.load(sys.argv[1], engine="openvino", threads=1)
frames = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
assert np.isfinite(detector(frames, [0, 1, 1]).score).all()
print(detector.engine)
"""


def test_it_needs_neither_torch_nor_onnx_and_says_nothing(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(folder)], capture_output=True, text=True, timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "openvino on cpu (f32, latency)\n", "")


@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_nothing_leaves_the_machine(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "calls"
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=connect,sendto", "-o", str(trace), sys.executable, "-c",
         LIGHT + "import time; time.sleep(3)", str(folder)],
        capture_output=True, text=True, timeout=300,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "AF_INET" not in trace.read_text()
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [trace]


@pytest.mark.long
def test_verify_measures_parity_on_it(tmp_path: Path) -> None:
    result = export_bundle(
        tiny_model(real_backbone=True), Mismatch(), tmp_path / "b", formats=("onnx", "eager"), frames=tiny_frames(4),
        quiet=True,
    )  # fmt: skip
    assert result.ok
    asked = ["verify", str(tmp_path / "b"), "--engine", "openvino", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)["formats"].values()
    parity = one["artefact"]["parity"]
    assert parity["passed"] and parity["device"] == "openvino on cpu (f32, latency)" and parity["max_error"] < 1e-3
    there = openvino.Core().available_devices
    if not any(name.startswith("GPU") for name in there):
        done = CliRunner().invoke(cli.app, [*asked[:5], "gpu"])
        assert isinstance(done.exception, EngineUnavailableError) and "finds no device 'gpu'" in str(done.exception)
