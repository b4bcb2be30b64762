import ctypes
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from flowad_fast.bundle import Artefact
from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.config import Precision
from flowad_fast.detector import load
from flowad_fast.engines import ENGINES
from flowad_fast.engines import tensorrt as runtime
from flowad_fast.engines.tensorrt import FLAVOURS, Session, TensorRTEngine, check_fits
from flowad_fast.errors import BundleError, ConfigError, EngineUnavailableError, ExportError, FrameError
from flowad_fast.export import onnx_graph, tensorrt_engine
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.formats import BATCH, FORMATS, WORKSPACE_MIB, Request
from flowad_fast.export.tensorrt_engine import FRAME_SIDES, build
from flowad_fast.model import FlowModel
from flowad_fast.stages.scorers import Density, Inversion, Reconstruction, Scorer

RTX, TRT = FLAVOURS["tensorrt-rtx"], FLAVOURS["tensorrt"]
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(RTX.module) is None, reason="the tensorrt-rtx package is not installed"
)


@pytest.fixture(scope="module")
def demo() -> FlowModel:
    return load_checkpoint("demo")


# ---- building


@needs_rtx
def test_a_bundle_with_an_rtx_engine_says_what_was_not_measured(demo: FlowModel, tmp_path: Path) -> None:
    frames = np.random.RandomState(0).randint(0, 256, (2, 300, 300, 3), np.uint8)
    result = export_bundle(
        demo, Inversion(), tmp_path / "bundle", formats=("tensorrt-rtx",), frames=frames, batch=(1, 2, 4),
        device="cpu", quiet=True,
    )  # fmt: skip
    assert result.ok
    (made,) = result.manifest.artefacts.values()
    assert (
        made.engine == "tensorrt-rtx" and made.precision == "fp32" and list(made.files) == ["model.tensorrt-rtx.engine"]
    )
    assert made.parity is None and "tensorrt-rtx runs on NVIDIA GPUs only" in str(made.unmeasured)
    assert made.details["batch"] == "1:2:4" and "8.9" in made.details["capabilities"].split()
    with pytest.raises(EngineUnavailableError, match="tensorrt-rtx runs on NVIDIA GPUs only"):
        load(tmp_path / "bundle", engine="tensorrt-rtx", device="cpu")
    # The manifest guards the file: a byte that changed is found before the library sees it.
    engine = tmp_path / "bundle" / "model.tensorrt-rtx.engine"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    with pytest.raises(BundleError, match="SHA-256"):
        load(tmp_path / "bundle", engine="tensorrt-rtx")


@needs_rtx
@pytest.mark.long
@pytest.mark.parametrize(
    ("scorer", "batch"),
    [(Reconstruction(steps=4), (1, 4, 16)), (Density(steps=3), BATCH)],
    ids=("reconstruction", "density"),
)
def test_rtx_engines_are_built_from_the_other_scorers_of_the_demo(
    demo: FlowModel, scorer: Scorer, batch: tuple[int, int, int], tmp_path: Path
) -> None:
    import tensorrt_rtx

    built = FORMATS["tensorrt-rtx"].write(Request(demo, scorer, batch=batch), tmp_path)
    # Ten probes at batches to 64 do not fit what suffices for all else.
    assert (int(built.details["workspace_mib"]) > WORKSPACE_MIB[0]) == (scorer.kind == "density")
    assert built.files == ("model.tensorrt-rtx.engine",)
    assert built.versions == {"tensorrt_rtx": tensorrt_rtx.__version__}
    assert built.details["batch"] == ":".join(map(str, batch))
    assert {"8.6", "8.9", "12.0"} <= set(str(built.details["capabilities"]).split())
    # The engine holds the weights, once: unrolled steps do not repeat them.
    weights, engine = ((tmp_path / name).stat().st_size for name in ("model.onnx", built.files[0]))
    assert 0.9 * weights < engine < 2.5 * weights


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "capabilities"),
    [("fp16", ("8.0", "8.6", "8.9", "12.0", "12.1")), ("bf16", ("8.0", "8.6", "8.9", "12.0", "12.1")),
     ("fp8", ("8.9", "12.0", "12.1"))],
)  # fmt: skip
def test_rtx_builds_every_precision_for_the_gpus_that_have_it(
    demo: FlowModel, precision: Precision, capabilities: tuple[str, ...], tmp_path: Path
) -> None:
    graph = tmp_path / "model.onnx"
    frames = np.random.RandomState(0).randint(0, 256, (1, 256, 256, 3), np.uint8)
    request = Request(demo, Inversion(steps=1), "max", (256, 256), precision=precision, frames=(frames, None))
    onnx_graph.write_graph(request, graph)
    built = build(RTX, graph, tmp_path / "engine", batch=(1, 2, 4), precision=precision, workspace=512)
    assert built.capabilities == capabilities
    assert (tmp_path / "engine").stat().st_size > 100_000


def add_graph(path: Path, dims: tuple[int | str, ...] = ("batch", "height", "width", 3)) -> Path:
    """A small valid graph: frames as float plus one."""
    value = onnx.helper.make_tensor_value_info("frames", onnx.TensorProto.FLOAT, dims)
    out = onnx.helper.make_tensor_value_info("map", onnx.TensorProto.FLOAT, dims)
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    node = onnx.helper.make_node("Add", ["frames", "one"], ["map"], name="plus")
    graph = onnx.helper.make_graph([node], "g", [value], [out], [one])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    return path


@needs_rtx
def test_profiles_come_from_the_request_and_free_sides_have_bounds(tmp_path: Path) -> None:
    import tensorrt_rtx

    log = runtime.Log(tensorrt_rtx)
    builder = tensorrt_rtx.Builder(log.logger)
    network = builder.create_network(1)
    tensorrt_engine._parse(RTX, tensorrt_rtx, network, log, add_graph(tmp_path / "m.onnx"))
    profile = tensorrt_engine._profile(builder, network, (2, 5, 9))
    shapes = [tuple(shape) for shape in profile.get_shape("frames")]
    assert shapes == [(n, side, side, 3) for n, side in zip((2, 5, 9), FRAME_SIDES, strict=True)]


@needs_rtx
def test_an_operator_that_the_library_does_not_know_is_named_with_its_node(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.load(add_graph(path))
    model.graph.node[0].op_type, model.graph.node[0].name = "Frobnicate", "the_node"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"'the_node' \(operator Frobnicate\).*try another --opset"):
        build(RTX, path, tmp_path / "engine", batch=(1, 1, 1))
    assert not (tmp_path / "engine").exists()


@needs_rtx
def test_gpus_and_precisions_that_the_library_does_not_build_for_are_refused(tmp_path: Path) -> None:
    graph = add_graph(tmp_path / "model.onnx")
    for capability, precision in (("9.0", "fp32"), ("8.6", "fp8"), ("eight", "fp32")):
        with pytest.raises(ConfigError, match=rf"for compute capabilities .*8\.9, 12\.0.*; got {capability}"):
            build(RTX, graph, tmp_path / "e", batch=(1, 1, 1), precision=precision, capabilities=(capability,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="precision tf32 is not for tensorrt-rtx"):
        build(RTX, graph, tmp_path / "e", batch=(1, 1, 1), precision="tf32")


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for flavour in (TRT, RTX):
        monkeypatch.setitem(sys.modules, flavour.module, None)
        says = rf"{flavour.name} needs the Python module {flavour.module}: pip install .flowad-fast\[{flavour.name}\]"
        with pytest.raises(EngineUnavailableError, match=says):
            build(flavour, tmp_path / "m.onnx", tmp_path / "e", batch=(1, 1, 1))
        with pytest.raises(EngineUnavailableError, match=says):
            TensorRTEngine(tmp_path / "e", artefact(flavour.name))


# ---- a library in Python, with the API that both have: it computes through the addresses that it is given


class FakeContext:
    def __init__(self, engine: "FakeEngine") -> None:
        self.engine, self.shapes, self.addresses, self.streams = engine, {}, {}, []  # type: ignore[var-annotated]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = self.shapes["frames"][0]
        return {"map": (batch, 2, 2), "score": (batch,)}[name]

    def execute_async_v3(self, stream: int) -> bool:
        """Map: each frame's mean; score: its first byte plus its class."""
        if self.engine.fails:
            return False
        self.engine.calls.append((self.shapes["frames"], stream))
        frames = self._view("frames", self.shapes["frames"], ctypes.c_uint8)
        classes = self._view("classes", self.shapes["classes"], ctypes.c_int64)
        self._view("map", self.get_tensor_shape("map"), ctypes.c_float)[:] = frames.mean((1, 2, 3))[:, None, None]
        self._view("score", self.get_tensor_shape("score"), ctypes.c_float)[:] = frames[:, 0, 0, 0] + classes
        return True

    def _view(self, name: str, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        size = int(np.prod(shape))
        return np.ctypeslib.as_array((kind * size).from_address(self.addresses[name])).reshape(shape)


class FakeEngine:
    names = ("frames", "classes", "map", "score")
    num_io_tensors = 4

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], int]] = []
        self.contexts: list[FakeContext] = []
        self.fails = False

    def get_tensor_name(self, i: int) -> str:
        return self.names[i]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in ("frames", "classes") else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name={"frames": "UINT8", "classes": "INT64"}.get(name, "FLOAT"))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        return [(n, s, s, 3) if name == "frames" else (n,) for n, s in ((2, 4), (3, 8), (4, 16))]

    def create_execution_context(self) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


def fake_library(engine: FakeEngine | None) -> Any:
    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = "internal", "error", "warning"

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
            self.logger.log("warning", "not this")
            self.logger.log("error", "the  plan\nis torn")
            return engine

    return SimpleNamespace(
        __name__="tensorrt", __version__="11.2.0", ILogger=ILogger, Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out"),
    )  # fmt: skip


class FakeStream:
    cuda_stream = 77

    def __init__(self, device: Any = None) -> None:
        self.waits: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waits.append(other)


@pytest.fixture
def gpu_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's stream bookkeeping without a GPU; tensors stay on the CPU, so addresses are real."""
    outer = FakeStream()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: outer)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    yield


def session(tmp_path: Path, engine: FakeEngine) -> Session:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return Session(path, fake_library(engine), torch.device("cpu"))


def engine_around(session: Session) -> TensorRTEngine:
    """A `TensorRTEngine` past its checks of the machine, which other tests cover."""
    made = object.__new__(TensorRTEngine)
    made.name, made.device, made._device = "tensorrt", "cpu", torch.device("cpu")
    made.session, made._location = session, {}
    return made


def artefact(engine: str, **changes: Any) -> Artefact:
    values: dict[str, Any] = {
        "engine": engine,
        "files": {"model.engine": "0" * 64},
        "versions": {FLAVOURS[engine].module: "11.2.0"},
        "details": {"capabilities": "8.6 8.9"},
    }
    return Artefact(**(values | changes))


def batch(n: int, side: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (n, side, side, 3), np.uint8), random.randint(0, 5, n).astype(np.int64)


def check(engine: TensorRTEngine, frames: np.ndarray, y: np.ndarray) -> None:
    maps, scores = engine.run(frames, y)
    assert maps.shape == (len(frames), 2, 2) and maps.dtype == scores.dtype == np.float32
    assert maps[:, 0, 1] == pytest.approx(frames.mean((1, 2, 3)), rel=1e-5)
    assert np.array_equal(scores, frames[:, 0, 0, 0].astype(np.float32) + y)


@pytest.mark.parametrize(("n", "batches"), [(1, [2]), (2, [2]), (4, [4]), (9, [4, 4, 2])])
def test_batches_are_split_and_padded_to_the_profile(
    gpu_stand_in: None, tmp_path: Path, n: int, batches: list[int]
) -> None:
    fake = FakeEngine()
    check(engine_around(session(tmp_path, fake)), *batch(n))
    assert [shape[0] for shape, _ in fake.calls] == batches
    assert {stream for _, stream in fake.calls} == {FakeStream.cuda_stream}, "never the default stream"


def test_a_thread_has_its_own_context_and_results_stay_its_own(gpu_stand_in: None, tmp_path: Path) -> None:
    fake = FakeEngine()
    engine = engine_around(session(tmp_path, fake))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(20):
                check(engine, *batch(1 + i % 9, seed=seed * 100 + i))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(fake.contexts) == 4


def test_shapes_and_types_outside_the_profile_are_refused_before_anything_runs(
    gpu_stand_in: None, tmp_path: Path
) -> None:
    fake = FakeEngine()
    engine = engine_around(session(tmp_path, fake))
    for side in (3, 17):
        with pytest.raises(FrameError, match=rf"frames has shape \(2, {side}, {side}, 3\), the engine was built for"):
            engine.run(*batch(2, side))
    with pytest.raises(FrameError, match="inputs are frames, classes, got frames"):
        engine.run(batch(2)[0], None)
    with pytest.raises(FrameError, match="frames must be contiguous torch.uint8 on cpu, got torch.float32"):
        engine.session({"frames": torch.zeros(2, 8, 8, 3), "classes": torch.zeros(2, dtype=torch.int64)})
    assert not fake.calls


def test_failures_of_the_library_carry_its_last_error_message(gpu_stand_in: None, tmp_path: Path) -> None:
    fake = FakeEngine()
    engine = engine_around(session(tmp_path, fake))
    fake.fails = True
    with pytest.raises(BundleError, match="the engine failed: the plan is torn"):
        engine.run(*batch(2))
    with pytest.raises(BundleError, match=r"tensorrt 11.2.0 refuses the engine: the plan is torn"):
        Session(tmp_path / "model.engine", fake_library(None), torch.device("cpu"))


# ---- what is checked before an engine is parsed


def test_engines_of_another_version_or_gpu_are_refused_with_the_command_that_rebuilds_them() -> None:
    path = Path("model.engine")
    check_fits(path, TRT, "11.2.0", "11.2.0", "8.9", "8.6 8.9")
    with pytest.raises(
        EngineUnavailableError, match=r"built with tensorrt 11.2.0, this machine has 11.3.0.*"
    ) as caught:
        check_fits(path, TRT, "11.3.0", "11.2.0", "8.9", "8.9")
    assert "flowad-export make CHECKPOINT --format tensorrt" in str(caught.value)
    with pytest.raises(EngineUnavailableError, match=r"capability 8.6 or 8.9, this GPU has 9.0; build it again"):
        check_fits(path, RTX, "1.7", "1.7", "9.0", "8.6 8.9")
    with pytest.raises(EngineUnavailableError, match="capability unknown"):
        check_fits(path, RTX, "1.7", "1.7", "9.0", "")


def test_the_engine_checks_the_machine_before_it_reads_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Path("/nonexistent/model.engine")
    monkeypatch.setitem(sys.modules, "tensorrt", fake_library(FakeEngine()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailableError, match="runs on NVIDIA GPUs only; torch .* finds none here"):
        ENGINES["tensorrt"].engine()(absent, artefact("tensorrt"), "auto")  # type: ignore[call-arg]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    with pytest.raises(EngineUnavailableError, match="device cpu was asked for"):
        TensorRTEngine(absent, artefact("tensorrt"), "cpu")
    with pytest.raises(EngineUnavailableError, match="built with tensorrt 10.0, this machine has 11.2.0"):
        TensorRTEngine(absent, artefact("tensorrt", versions={"tensorrt": "10.0"}))
    with pytest.raises(EngineUnavailableError, match="built for compute capability 9.0, this GPU has 8.9"):
        TensorRTEngine(absent, artefact("tensorrt", details={"capabilities": "9.0"}))
    with pytest.raises(FileNotFoundError):
        TensorRTEngine(absent, artefact("tensorrt"))


# ---- building with TensorRT itself, whose builder needs a GPU: the library is a recorder


class FakeConfig:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def clear_flag(self, flag: str) -> None:
        self.log.append(("clear", flag))

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.log.append((pool, size))

    def add_optimization_profile(self, profile: Any) -> None:
        self.log.append(profile.shapes)

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.log.append(("timings", cache))
        return cache != b"of another GPU" and not ignore_mismatch

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"measured")


def fake_builder(log: list[Any]) -> Any:
    library = fake_library(None)
    frames = SimpleNamespace(name="frames", shape=(-1, 300, 200, 3))
    network = SimpleNamespace(num_inputs=1, num_layers=5, get_input=lambda i: frames)

    class Profile:
        shapes: tuple[Any, ...]

        def set_shape(self, name: str, *shapes: Any) -> None:
            self.shapes = (name, *shapes)

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.create_optimization_profile = Profile

        def create_network(self, flags: int) -> Any:
            log.append(("flags", flags))
            return network

        def create_builder_config(self) -> FakeConfig:
            return FakeConfig(log)

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            return b"plan"

    library.Builder = Builder
    library.OnnxParser = lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True)
    library.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)
    library.BuilderFlag, library.MemoryPoolType = SimpleNamespace(TF32="tf32"), SimpleNamespace(WORKSPACE="workspace")
    return library


def test_tensorrt_builds_on_and_for_its_gpu_strongly_typed_without_tf32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log: list[Any] = []
    monkeypatch.setitem(sys.modules, "tensorrt", fake_builder(log))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = {"batch": (1, 8, 64), "workspace": 3, "device": "cuda:0", "timing_cache": tmp_path / "cache"}
    with pytest.raises(EngineUnavailableError, match="tensorrt builds only on the GPU that the engine is for"):
        build(TRT, tmp_path / "m.onnx", tmp_path / "e", **arguments)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    with pytest.raises(EngineUnavailableError, match="builds on a GPU, the device is cpu; give --device cuda"):
        build(TRT, tmp_path / "m.onnx", tmp_path / "e", **(arguments | {"device": "cpu"}))  # type: ignore[arg-type]
    built = build(TRT, tmp_path / "m.onnx", tmp_path / "e", **arguments)  # type: ignore[arg-type]
    assert (tmp_path / "e").read_bytes() == b"plan"
    assert built.versions == {"tensorrt": "11.2.0"} and built.capabilities == ("9.0",) and built.timing_cache == "new"
    assert log == [
        ("flags", 1 << 3),
        ("clear", "tf32"),
        ("frames", (1, 300, 200, 3), (8, 300, 200, 3), (64, 300, 200, 3)),
        ("timings", b""),
        ("workspace", 3 * 2**20),
    ]
    (cache,) = (tmp_path / "cache").glob("*.timing")
    assert cache.read_bytes() == b"measured" and "11.2.0" in cache.name and "H100" in cache.name
    assert build(TRT, tmp_path / "m.onnx", tmp_path / "e", **arguments).timing_cache == "reused"  # type: ignore[arg-type]
    cache.write_bytes(b"of another GPU")
    assert build(TRT, tmp_path / "m.onnx", tmp_path / "e", **arguments).timing_cache == "new"  # type: ignore[arg-type]
    assert log[-3:-1] == [("timings", b"of another GPU"), ("timings", b"")]


def test_the_workspace_grows_to_what_the_engine_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log: list[Any] = []
    library = fake_builder(log)
    needed = 16384

    class Builder(library.Builder):  # type: ignore[misc, name-defined]
        def __init__(self, logger: Any) -> None:
            super().__init__(logger)
            self.logger = logger

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            if log[-1][1] >= needed * 2**20:
                return b"plan"
            self.logger.log(library.ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 1 bytes.)")
            return None

    library.Builder = Builder
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(tensorrt_engine, "_set_targets", lambda *_: ("8.9",))
    arguments = {"batch": (1, 8, 64)}
    assert build(RTX, tmp_path / "m.onnx", tmp_path / "e", **arguments).workspace == needed  # type: ignore[arg-type]
    assert [entry[1] // 2**20 for entry in log if entry[0] == "workspace"] == [4096, 8192, 16384]
    with pytest.raises(
        ExportError, match=r"more than 512 MiB .* at batch 64; try --workspace 1024, .*--batch 1:4:8.*pro"
    ):
        build(RTX, tmp_path / "m.onnx", tmp_path / "e", workspace=512, **arguments)  # type: ignore[arg-type]
    needed = 10**6
    with pytest.raises(ExportError, match="more than 65536 MiB"):
        build(RTX, tmp_path / "m.onnx", tmp_path / "e", **arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=lambda f: f.name)
def test_an_engine_agrees_with_eager_on_this_gpu(demo: FlowModel, flavour: runtime.Flavour, tmp_path: Path) -> None:
    from flowad_fast.pipeline import ScoringPipeline

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    if importlib.util.find_spec(flavour.module) is None:
        pytest.skip(f"the package of {flavour.module} is not installed")
    try:
        request = Request(demo, Inversion(), "max", (256, 256), batch=(1, 2, 4), device="cuda:0")
        built = FORMATS[flavour.name].write(request, tmp_path)
        made = artefact(flavour.name, versions=built.versions, details=built.details)
        engine = TensorRTEngine(tmp_path / built.files[0], made, "cuda:0")
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    frames = np.random.RandomState(0).randint(0, 256, (7, 256, 256, 3), np.uint8)
    with torch.inference_mode():
        expected = ScoringPipeline(demo, Inversion())(torch.from_numpy(frames))[0].numpy()
    maps, _ = engine.run(frames, None)
    assert np.abs(maps - expected).max() < 1e-3 * expected.std()
