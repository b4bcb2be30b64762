import resource
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from models import tiny_model

from flowad_fast.config import Precision
from flowad_fast.engines.onnx_file import check_external_data
from flowad_fast.engines.onnxruntime import HEAVY, OnnxRuntimeEngine
from flowad_fast.errors import BundleError, ConfigError, EngineUnavailableError, FrameError
from flowad_fast.export import onnx_fp8, onnx_graph
from flowad_fast.export.formats import Request
from flowad_fast.export.graph import boundary
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.scorers import Density, Inversion, Reconstruction, Scorer

SCORERS: tuple[Scorer, ...] = (Inversion(steps=2), Reconstruction(steps=4), Density(steps=2, probes=2))
# Largest map error relative to the map's standard deviation; ONNX Runtime's CPU kernels compute fp16 in float32.
BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "fp8": 2.5e-1}


def tiny(classes: int = 0) -> FlowModel:
    """Wide enough for fp8's multiples of 16."""
    return tiny_model(classes, real_backbone=True, depth=2, mlp_ratio=4)


def photos(count: int, height: int = 72, width: int = 80, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, height, width, 3), np.uint8)


def eager(
    model: FlowModel, scorer: Scorer, frames: np.ndarray, y: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        out = ScoringPipeline(model, scorer)(torch.from_numpy(frames), None if y is None else torch.from_numpy(y))
    return out[0].numpy(), out[1].numpy()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / expected.std())


@pytest.fixture(scope="module")
def inversion_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unconditional inversion graph with its weights outside, as those of large models are."""
    path = tmp_path_factory.mktemp("external") / "model.onnx"
    onnx_graph.write_boundary(path, boundary(Request(tiny(), SCORERS[0])), inline_bytes=0)
    return path


CASES: tuple[tuple[Scorer, Precision], ...] = (
    *((scorer, "fp32") for scorer in SCORERS), (SCORERS[2], "fp16"), (SCORERS[0], "fp8"),
)  # fmt: skip


@pytest.mark.parametrize(("scorer", "precision"), CASES, ids=lambda v: v if isinstance(v, str) else v.kind)
def test_scorers_and_precisions_agree_with_eager_at_any_batch_and_size(
    scorer: Scorer, precision: Precision, tmp_path: Path
) -> None:
    model = tiny(classes=3)
    y = np.array([2, 0, 1, 2, 0])
    path = tmp_path / "model.onnx"
    request = Request(model, scorer, precision=precision, frames=(photos(3, seed=9), y[:3]))
    nodes = onnx_graph.write_graph(request, path)
    graph = onnx.load(path).graph
    assert nodes == len(graph.node)
    if precision == "fp8":
        check_quantised(graph, model, scorer.steps)
    engine = OnnxRuntimeEngine(path, "cpu", threads=1)
    for frames in (photos(5), photos(1, 64, 64), photos(3, 130, 47)):
        expected = eager(model, scorer, frames, y[: len(frames)])
        maps, scores = engine.run(frames, y[: len(frames)])
        assert maps.dtype == scores.dtype == np.float32
        assert maps.shape == expected[0].shape and scores.shape == expected[1].shape
        assert error(maps, expected[0]) < BOUNDS[precision]
        assert scores == pytest.approx(maps.max((1, 2)))


def check_quantised(graph: onnx.GraphProto, model: FlowModel, steps: int) -> None:
    """Every product is quantised that the model does not keep, and each weight is stored once, whatever the steps."""
    assert model.config.keep_bf16 == ("embed", "head")
    count = Counter(node.op_type for node in graph.node)
    products = 4 * model.config.depth
    assert count["QuantizeLinear"] == steps * products
    assert len([t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN and t.dims]) == products
    left = [t.name for t in graph.initializer if t.name.startswith(onnx_fp8.FIELD) and t.name.endswith(".weight")]
    assert left == [f"{onnx_fp8.FIELD}{name}.weight" for name in model.config.keep_bf16]


def test_fp8_leaves_layers_alone_that_the_model_keeps(inversion_file: Path) -> None:
    graph, steps, depth = onnx_ir.load(inversion_file), SCORERS[0].steps, 2
    assert len(onnx_fp8.products(graph, ())) == steps * (4 * depth + 2)
    assert len(onnx_fp8.products(graph, ("head", "*.fc?"))) == steps * (2 * depth + 1)


def test_fp8_needs_frames_and_an_opset_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp8 needs real frames"):
        onnx_graph.write(Request(tiny(), SCORERS[0], precision="fp8"), tmp_path)
    with pytest.raises(ConfigError, match="fp8 needs opset 19"):
        onnx_graph.write(Request(tiny(), SCORERS[0], opset=18, precision="fp8", frames=(photos(1), None)), tmp_path)
    with pytest.raises(ConfigError, match="opset 17 is not supported; expected 18 to 25"):
        onnx_graph.write(Request(tiny(), SCORERS[0], opset=17), tmp_path)


def test_bf16_graphs_are_valid_and_refused_openly_by_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_graph.write(Request(tiny(), SCORERS[0], precision="bf16"), tmp_path)
    kinds = Counter(t.data_type for t in onnx.load(path).graph.initializer if t.name.endswith(".weight"))
    assert kinds[onnx.TensorProto.BFLOAT16] == 10
    with pytest.raises(EngineUnavailableError, match=r"cannot run model.onnx on cpu.*MatMul"):
        OnnxRuntimeEngine(path, "cpu")


def test_the_graph_has_named_axes_and_no_sequences_or_functions(inversion_file: Path) -> None:
    model = onnx.load(inversion_file, load_external_data=False)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*model.graph.input, *model.graph.output)}  # fmt: skip
    assert shapes == {"frames": ["batch", "height", "width", 3], "map": ["batch", 64, 64], "score": ["batch"]}
    assert not model.functions
    assert not [n.op_type for n in model.graph.node if "Sequence" in n.op_type]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", onnx_graph.OPSET)]


@pytest.mark.parametrize(("classes", "opset"), [(0, 18), (3, 25)])
def test_the_oldest_and_newest_opset_agree_with_eager(classes: int, opset: int, tmp_path: Path) -> None:
    model, path = tiny(classes), tmp_path / "model.onnx"
    onnx_graph.write(Request(model, SCORERS[0], opset=opset), tmp_path)
    assert [entry.version for entry in onnx.load(path).opset_import] == [opset]
    y = np.array([2, 0, 1]) if classes else None
    maps, _ = OnnxRuntimeEngine(path, "cpu").run(photos(3), y)
    assert error(maps, eager(model, SCORERS[0], photos(3), y)[0]) < 1e-4


def test_weights_outside_lie_in_one_file_beside_the_graph(inversion_file: Path) -> None:
    assert sorted(p.name for p in inversion_file.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    engine = OnnxRuntimeEngine(inversion_file, "cpu", files=("model.onnx", "model.onnx.data"))
    assert error(engine.run(photos(2), None)[0], eager(tiny(), SCORERS[0], photos(2))[0]) < 1e-4


def copy_with(source: Path, folder: Path, **entries: str) -> Path:
    """A copy of a graph whose first external tensor has other entries."""
    model = onnx.load(source, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes((source.parent / "model.onnx.data").read_bytes())
    return path


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "/etc/passwd"}, "expected the name of a file in the same folder"),
        ({"location": "../model.onnx.data"}, "expected the name of a file in the same folder"),
        ({"location": "sub/../model.onnx.data"}, "expected the name of a file in the same folder"),
        ({"location": "C:\\data"}, "expected the name of a file in the same folder"),
        ({"location": ".."}, "expected the name of a file in the same folder"),
        ({"location": ""}, "expected the name of a file in the same folder"),
        ({"location": "absent"}, "missing, or a link"),
        ({"location": "model.onnx"}, "which the manifest does not list"),
        ({"offset": "99999999999"}, "it is cut off"),
        ({"length": "99999999999"}, "it is cut off"),
        ({"offset": "-4"}, "is no offset or length"),
        ({"length": "many"}, "is no offset or length"),
    ],
)
def test_external_data_that_lead_elsewhere_are_refused_before_they_are_read(
    inversion_file: Path, tmp_path: Path, entries: dict[str, str], says: str
) -> None:
    path = copy_with(inversion_file, tmp_path, **entries)
    with pytest.raises(BundleError, match=says):
        OnnxRuntimeEngine(path, "cpu", files=("model.onnx.data",))


def test_linked_and_truncated_external_data_are_refused(inversion_file: Path, tmp_path: Path) -> None:
    path = copy_with(inversion_file, tmp_path)
    check_external_data(path)
    data = tmp_path / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="it is cut off"):
        check_external_data(path)
    data.unlink()
    (tmp_path / "real").write_bytes(whole)
    data.symlink_to(tmp_path / "real")
    with pytest.raises(BundleError, match="missing, or a link"):
        check_external_data(path)


def test_external_data_inside_subgraphs_and_constants_are_checked_too(tmp_path: Path) -> None:
    hidden = onnx.TensorProto(name="hidden", data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=1)
    hidden.external_data.add(key="location", value="/etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=hidden)
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    outer = onnx.helper.make_node("If", ["b"], ["o"], then_branch=branch, else_branch=branch)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(onnx.helper.make_graph([outer], "g", [], [])).SerializeToString())
    with pytest.raises(BundleError, match="hidden"):
        check_external_data(path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_onnx_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model.onnx"):
        OnnxRuntimeEngine(path, "cpu")


def test_providers_that_are_not_installed_are_named_never_replaced(inversion_file: Path) -> None:
    import onnxruntime

    for device in ("cuda", "cuda:1", "tensorrt", "openvino"):
        if f"{device.partition(':')[0]}ExecutionProvider".lower() in [
            p.lower() for p in onnxruntime.get_available_providers()
        ]:
            continue
        with pytest.raises(EngineUnavailableError, match=rf"no provider for device '{device}'.*CPUExecutionProvider"):
            OnnxRuntimeEngine(inversion_file, device)
    with pytest.raises(EngineUnavailableError, match="did you mean 'cuda'"):
        OnnxRuntimeEngine(inversion_file, "cudaa")


def test_expensive_operators_elsewhere_than_asked_are_an_error(
    inversion_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OnnxRuntimeEngine(inversion_file, "cpu")
    placed = [n.op_type for part in engine.session.get_provider_graph_assignment_info() for n in part.get_nodes()]
    assert any(op in HEAVY for op in placed), "the session reports where operators run"
    with pytest.raises(EngineUnavailableError, match=r"asked ONNX Runtime for CUDA.*on CPUExecutionProvider"):
        engine._check_placement("CUDAExecutionProvider", "cuda")


def test_bound_tensors_give_the_same_as_arrays_and_are_checked(inversion_file: Path) -> None:
    engine = OnnxRuntimeEngine(inversion_file, "cpu")
    frames = photos(3)
    maps, scores = engine.run(frames, None)
    bound = engine.run_bound({"frames": torch.from_numpy(frames)})
    assert np.array_equal(bound["map"].numpy(), maps) and np.array_equal(bound["score"].numpy(), scores)
    for bad in (torch.from_numpy(frames).float(), torch.from_numpy(frames)[:, :, ::2]):
        with pytest.raises(FrameError, match="frames must be contiguous torch.uint8 on cpu"):
            engine.run_bound({"frames": bad})
    with pytest.raises(FrameError, match="inputs are frames, got frames, classes"):
        engine.run_bound({"frames": torch.from_numpy(frames), "classes": torch.zeros(3, dtype=torch.int64)})


def test_one_engine_serves_many_threads(inversion_file: Path) -> None:
    engine = OnnxRuntimeEngine(inversion_file, "cpu", threads=1)
    batches = [photos(1 + i % 3, seed=i) for i in range(12)]
    expected = [engine.run(batch, None)[0] for batch in batches]
    got: dict[int, np.ndarray] = {}

    def work(start: int) -> None:
        for i in range(start, len(batches), 4):
            got[i] = engine.run(batches[i], None)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(got[i], expected[i]) for i in range(len(batches)))


PAPER_SCALE = """
import sys
import numpy as np, torch
from pathlib import Path
from flowad_fast.config import ModelConfig, VelocityConfig
from flowad_fast.export import onnx_graph
from flowad_fast.export.formats import Request
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.scorers import Inversion
from flowad_fast.stages.velocity import DiT

torch.manual_seed(0)
velocity = VelocityConfig(channels=272, height=16, width=16, hidden_size=2048, depth=16, num_heads=8)
spec = ModelConfig(velocity=velocity, backbone="efficientnet-b4", image={"size": 256})
with torch.no_grad():
    dit = DiT(velocity)
    for parameter in dit.parameters():
        parameter.normal_(std=0.02)
model = FlowModel(spec, dit, FeatureExtractor("efficientnet-b4"))
folder, scorer = Path(sys.argv[1]), Inversion(steps=3)
frames = np.random.RandomState(0).randint(0, 256, (1, 256, 256, 3), np.uint8)
with torch.inference_mode():
    np.save(folder / "expected.npy", ScoringPipeline(model, scorer)(torch.from_numpy(frames))[0].numpy())
np.save(folder / "frames.npy", frames)
print(onnx_graph.write(Request(model, scorer), folder).details["nodes"], "nodes")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_paper_scale_model_exports_within_memory_and_agrees(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PAPER_SCALE, str(tmp_path)], check=True, cwd=tmp_path)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    graph, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    print(f"peak memory of the export {peak / 2**30:.1f} GiB, {data.stat().st_size / 1e9:.2f} GB of weights")
    assert data.stat().st_size > 2**31 > 100 * graph.stat().st_size
    assert peak < 20 * 2**30
    onnx.checker.check_model(str(graph))
    engine = OnnxRuntimeEngine(graph, "cpu", files=("model.onnx", "model.onnx.data"))
    maps, _ = engine.run(np.load(tmp_path / "frames.npy"), None)
    found = error(maps, np.load(tmp_path / "expected.npy"))
    print(f"largest map error {found:.1e}")
    data.unlink()  # pytest would keep gigabytes for three runs
    assert found < 1e-3
