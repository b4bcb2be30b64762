import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import tiny_model
from onnx import TensorProto, helper

import flowad_fast
from flowad_fast.errors import ConfigError
from flowad_fast.export import triton_server
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.formats import Request
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.decision import Aggregate
from flowad_fast.stages.scorers import Inversion

pytestmark = pytest.mark.timeout(300)
NUMPY = {"TYPE_UINT8": np.uint8, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


def random_frames(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """The server's own protobuf schema; from its file, since the package would import grpc."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or spec.origin is None:
        pytest.skip("needs tritonclient (pip install tritonclient), for the server's protobuf schema")
    path = Path(spec.origin).parent / "grpc" / "model_config_pb2.py"
    found = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def parse(schema: ModuleType, text: str):
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("triton") / "bundle"
    result = export_bundle(
        tiny_model(2), Inversion(), target, formats=("triton-server",), frames=random_frames(4), batch=(1, 4, 16),
        quiet=True,
    )  # fmt: skip
    assert result.ok, result.status
    return target


@pytest.mark.parametrize("aggregate", ["max", "diff+sum"])
def test_config_fits_the_graph(schema: ModuleType, conditional: Path, tmp_path: Path, aggregate: Aggregate) -> None:
    if aggregate == "max":
        repository = conditional / "triton-server"
    else:
        built = triton_server.write(Request(tiny_model(), Inversion(), aggregate), tmp_path)
        assert built.files == ("triton-server/flowad/1/model.onnx", "triton-server/flowad/config.pbtxt")
        repository = tmp_path / "triton-server"
    config = parse(schema, (repository / "flowad" / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(str(repository / "flowad" / "1" / "model.onnx"))
    assert config.backend == "onnxruntime" and config.name == ""
    kinds = {"tensor(uint8)": "TYPE_UINT8", "tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    for listed, nodes in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [one.name for one in listed] == [node.name for node in nodes]
        for one, node in zip(listed, nodes, strict=True):
            assert schema.DataType.Name(one.data_type) == kinds[node.type]
            got = list(one.reshape.shape) if one.HasField("reshape") else list(one.dims)
            assert got == [d if isinstance(d, int) else -1 for d in node.shape[1:]]
            assert len(one.dims) > 0
    assert [list(one.dims) for one in config.output] == [[64, 64], [1] if aggregate == "max" else [2]]


def test_warm_up_requests_run(schema: ModuleType, conditional: Path) -> None:
    folder = conditional / "triton-server" / "flowad"
    config = parse(schema, (folder / "config.pbtxt").read_text())
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
    reshaped = {one.name for one in config.input if one.HasField("reshape")}
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4]
    for warm in config.model_warmup:
        feed = {}
        for name, tensor in warm.inputs.items():
            dims = [] if name in reshaped else list(tensor.dims)
            feed[name] = np.zeros((warm.batch_size, *dims), NUMPY[schema.DataType.Name(tensor.data_type)])
        maps, scores = session.run(["map", "score"], feed)
        assert maps.shape == (warm.batch_size, 64, 64) and np.isfinite(scores).all()


def test_queue_is_bounded_and_rejects(schema: ModuleType, conditional: Path) -> None:
    config = parse(schema, (conditional / "triton-server" / "flowad" / "config.pbtxt").read_text())
    assert config.max_batch_size == 16
    batching = config.dynamic_batching
    assert list(batching.preferred_batch_size) == [4, 16]
    assert 0 < batching.max_queue_delay_microseconds < batching.default_queue_policy.default_timeout_microseconds
    assert batching.default_queue_policy.timeout_action == schema.ModelQueuePolicy.REJECT
    assert batching.default_queue_policy.max_queue_size == 64


def tensors(frames: list[int | str], kind: int = TensorProto.UINT8) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info("frames", kind, frames)]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"])]
    return helper.make_model(helper.make_graph([], "g", inputs, outputs))


def test_instances_follow_the_device_and_sizes_the_graph(schema: ModuleType) -> None:
    fixed = parse(schema, triton_server.config(tensors(["b", 300, 200, 3]), (300, 200), (2, 2, 2), "cuda:0"))
    assert [group.kind for group in fixed.instance_group] == [schema.ModelInstanceGroup.KIND_GPU]
    assert list(fixed.input[0].dims) == [300, 200, 3]
    assert list(fixed.dynamic_batching.preferred_batch_size) == [2]
    free = parse(schema, triton_server.config(tensors(["b", "h", "w", 3]), (300, 200), (1, 1, 8), "cpu"))
    assert [group.kind for group in free.instance_group] == [schema.ModelInstanceGroup.KIND_CPU]
    assert list(free.input[0].dims) == [-1, -1, 3]
    assert list(free.model_warmup[0].inputs["frames"].dims) == [300, 200, 3]


def test_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="frames: the server has no type for DOUBLE; expected uint8"):
        triton_server.config(tensors(["b", 8, 8, 3], TensorProto.DOUBLE), (8, 8), (1, 1, 1), "cpu")


def test_repository_is_a_checked_artefact(conditional: Path) -> None:
    detector = flowad_fast.load(conditional)
    assert detector.engine == "onnxruntime on cpu"
    frames = random_frames(3, 80, 50)
    with torch.no_grad():
        expected, _ = ScoringPipeline(tiny_model(2), Inversion())(torch.from_numpy(frames), torch.tensor([1, 0, 1]))
    got = detector(frames, ["screw", "nut", "screw"])
    torch.testing.assert_close(torch.from_numpy(got.map), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
