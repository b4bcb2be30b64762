"""The ONNX Runtime engine of the light runtime: its own reading of ONNX files held against the onnx package's."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from flowad_fast.bundle import Artefact
from flowad_fast.engines.onnx_file import DEEPEST, FIELDS, external_tensors
from flowad_fast.engines.onnxruntime import OnnxRuntimeEngine
from flowad_fast.errors import BundleError, EngineUnavailableError

MANY = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))


# Reading external data from the bytes

texts = st.text(max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> TensorProto:
    tensor = TensorProto(name=draw(texts), dims=draw(st.lists(st.integers(0, 2**40), max_size=3)), data_type=1)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        tensor.raw_data = draw(st.binary(max_size=300))
    elif kind == 1:
        tensor.float_data.extend(draw(st.lists(st.floats(width=32), max_size=4)))
    if kind != 1 or draw(st.booleans()):
        for key in draw(st.lists(st.sampled_from(["location", "offset", "length", "checksum", ""]), unique=True)):
            tensor.external_data.add(key=key, value=draw(texts))
    if draw(st.booleans()):
        tensor.data_location = draw(st.sampled_from([TensorProto.DEFAULT, TensorProto.EXTERNAL]))
    return tensor


@st.composite
def attributes(draw: st.DrawFn, depth: int) -> AttributeProto:
    one = AttributeProto(name=draw(texts), i=draw(st.integers(-(2**63), 2**63 - 1)), f=draw(st.floats(width=32)))
    one.tensors.extend(draw(st.lists(tensors(), max_size=2)))
    if draw(st.booleans()):
        one.t.CopyFrom(draw(tensors()))
    if draw(st.booleans()):
        one.sparse_tensor.CopyFrom(SparseTensorProto(values=draw(tensors()), indices=draw(tensors()), dims=[3]))
    if draw(st.booleans()):
        one.sparse_tensors.add(values=draw(tensors()))
    if depth and draw(st.booleans()):
        one.g.CopyFrom(draw(graphs(depth - 1)))
    if depth and draw(st.booleans()):
        one.graphs.append(draw(graphs(depth - 1)))
    return one


@st.composite
def nodes(draw: st.DrawFn, depth: int) -> NodeProto:
    kept = draw(st.lists(attributes(depth), max_size=2))
    return NodeProto(op_type="If", input=draw(st.lists(texts, max_size=2)), output=["o"], attribute=kept)


@st.composite
def graphs(draw: st.DrawFn, depth: int = 2) -> GraphProto:
    graph = GraphProto(name=draw(texts), doc_string=draw(texts))
    graph.node.extend(draw(st.lists(nodes(depth), max_size=2)))
    graph.initializer.extend(draw(st.lists(tensors(), max_size=2)))
    if draw(st.booleans()):
        graph.sparse_initializer.add(values=draw(tensors()), indices=draw(tensors()))
    return graph


@st.composite
def models(draw: st.DrawFn) -> ModelProto:
    model = ModelProto(ir_version=10, producer_name=draw(texts), graph=draw(graphs()))
    for _ in range(draw(st.integers(0, 2))):
        function = FunctionProto(name=draw(texts), attribute=["plain"])
        function.node.extend(draw(st.lists(nodes(1), max_size=1)))
        function.attribute_proto.extend(draw(st.lists(attributes(1), max_size=1)))
        model.functions.append(function)
    if draw(st.booleans()):
        model.training_info.add(initialization=draw(graphs(1)), algorithm=draw(graphs(0)))
    return model


def by_onnx(message: object) -> Iterator[tuple[str, dict[str, str]]]:
    """Every external tensor at any depth of a protobuf message, by reflection."""
    if isinstance(message, TensorProto):
        if message.data_location == TensorProto.EXTERNAL:
            yield _text(message.name), {_text(entry.key): _text(entry.value) for entry in message.external_data}
        return
    for descriptor, value in message.ListFields():  # type: ignore[attr-defined]
        if descriptor.message_type is not None:
            for one in value if descriptor.is_repeated else [value]:
                yield from by_onnx(one)


def _text(value: str | bytes) -> str:
    """Protobuf gives bytes for a damaged text that is no UTF-8."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def by_us(folder: Path, content: bytes) -> list[tuple[str, dict[str, str]]]:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return [(tensor.name, tensor.entries) for tensor in external_tensors(path)]


def as_sorted(found: Iterator[tuple[str, dict[str, str]]] | list[tuple[str, dict[str, str]]]) -> list[str]:
    return sorted(repr((name, sorted(entries.items()))) for name, entries in found)


@MANY
@given(models())
def test_external_tensors_are_those_that_the_onnx_package_finds(
    tmp_path_factory: pytest.TempPathFactory, model: ModelProto
) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert as_sorted(by_us(folder, model.SerializeToString())) == as_sorted(by_onnx(model))


def test_every_message_that_can_hold_a_tensor_is_walked() -> None:
    """Of the installed onnx.proto: a new field through which tensors can come is found here first."""
    names = {
        "model": "ModelProto", "training": "TrainingInfoProto", "function": "FunctionProto", "graph": "GraphProto",
        "node": "NodeProto", "attribute": "AttributeProto", "tensor": "TensorProto", "sparse": "SparseTensorProto",
    }  # fmt: skip
    ours = {name: key for key, name in names.items()}
    for key, fields in FIELDS.items():
        descriptor = getattr(onnx, names[key], None) or getattr(onnx.onnx_ml_pb2, names[key])
        found = {f.number: ours[f.message_type.name] for f in descriptor.DESCRIPTOR.fields
                 if f.message_type is not None and f.message_type.name in ours}  # fmt: skip
        assert found == fields, key


@MANY
@given(models(), st.data())
def test_damaged_files_are_read_or_refused_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, model: ModelProto, data: st.DataObject
) -> None:
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        act = data.draw(st.sampled_from(["set", "insert", "cut"]))
        if act == "set" and at < len(content):
            content[at] = data.draw(st.integers(0, 255))
        elif act == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del content[at:]
    try:
        found = by_us(tmp_path_factory.getbasetemp(), bytes(content))
    except BundleError:
        return
    theirs = ModelProto()
    try:
        theirs.ParseFromString(bytes(content))
    except Exception:  # theirs is stricter here; a session refuses it as well
        return
    missed = set(as_sorted(by_onnx(theirs))) - set(as_sorted(found))
    assert not missed, "what the onnx package takes as external must never be overlooked"


def nested(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on."""
    content = b""
    for _ in range(levels):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            content = tag + size(len(content)) + content
    return b"\x3a" + size(len(content)) + content


def size(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x3a", "a number is cut off"),
        (b"\x3a\xff\xff", "a number is cut off"),
        (b"\x08" + b"\xff" * 20, "a number is cut off"),
        (b"\x3a\x05abc", "it is cut off"),
        (b"\x3a" + size(2**63) + b"abc", "it is cut off"),
        (b"\x3d\x01\x02", "it is cut off"),
        (b"\x3b\x3c", "wire type 3"),
        (b"\x3f", "wire type 7"),
        (b"\x00\x00", "field number 0"),
        (b"\xba\x80\x80\x80\x10\x00", "field number"),
        (b"\x3a\x00\x3a\x00", "field 7 of a model is there twice"),
        (nested(DEEPEST), "nested more than"),
        (nested(3000), "nested more than"),
        (b"<!DOCTYPE html>", "wire type 4"),
    ],
)
def test_hostile_bytes_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(BundleError, match=f"model.onnx: not an ONNX file: .*{says}"):
        by_us(tmp_path, content)


def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_location=TensorProto.EXTERNAL)
    for value in ("/etc/passwd", "model.onnx.data"):
        tensor.external_data.add(key="location", value=value)
    model = ModelProto(graph=GraphProto(initializer=[tensor]))
    with pytest.raises(BundleError, match="'w' have two entries 'location'"):
        by_us(tmp_path, model.SerializeToString())


def test_no_file_and_a_file_of_more_than_two_gigabytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(BundleError, match="not an ONNX file"):
        list(external_tensors(path))
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: nothing is stored, and nothing may be read
    with pytest.raises(BundleError, match="larger than 2 GB"):
        list(external_tensors(path))


# The session

DOUBLING = """
import sys
sys.modules.update(dict.fromkeys(("torch", "onnx"), None))
from pathlib import Path
import numpy as np
from flowad_fast.bundle import Artefact
from flowad_fast.engines import backend
artefact = Artefact(engine="onnxruntime", files={"model.onnx": "0" * 64})
engine = backend("onnxruntime").engine().from_artefact(Path(sys.argv[1]), artefact, "auto", threads=1)
frames = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
maps, scores = engine.run(frames, None)
assert maps.dtype == scores.dtype == np.float32 and engine.title == "onnxruntime on cpu"
assert (scores == [11, 23]).all() and (maps == frames.max(3)).all()
"""


@pytest.fixture
def largest(tmp_path: Path) -> Path:
    """A graph of a detector's form: the map is each pixel's largest channel, the score the map's maximum."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["frames"], ["x"], to=TensorProto.FLOAT),
            onnx.helper.make_node("ReduceMax", ["x", "last"], ["map"], keepdims=0),
            onnx.helper.make_node("ReduceMax", ["map", "plane"], ["score"], keepdims=0),
        ],
        "largest",
        [value("frames", TensorProto.UINT8, ["b", "h", "w", 3])],
        [value("map", TensorProto.FLOAT, ["b", "h", "w"]), value("score", TensorProto.FLOAT, ["b"])],
        [onnx.numpy_helper.from_array(np.array([3]), "last"), onnx.numpy_helper.from_array(np.array([1, 2]), "plane")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    return path


def test_a_session_needs_neither_torch_nor_onnx(largest: Path) -> None:
    subprocess.run([sys.executable, "-c", DOUBLING, str(largest)], check=True, timeout=120)


def test_threads_are_the_sessions_and_checked(largest: Path) -> None:
    artefact = Artefact(engine="onnxruntime", files={"model.onnx": "0" * 64})
    engine = OnnxRuntimeEngine.from_artefact(largest, artefact, "cpu", threads=1)
    assert engine.session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(EngineUnavailableError, match="threads is 0; expected 1 or more"):
        OnnxRuntimeEngine(largest, "cpu", threads=0)
