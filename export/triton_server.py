"""A model repository for NVIDIA Triton Inference Server: the ONNX graph, and a config.pbtxt that is derived from it.

    tritonserver --model-repository BUNDLE/triton-server

Clients send `frames` (uint8, B x H x W x 3) and, for conditional models, `classes` (int64, B x 1), and get `map` and
the raw `score`; thresholds are in the bundle's manifest. Location statistics are constants of the graph here, since
clients should not have to send them. Frames of one request have one size.
"""

from pathlib import Path

import onnx

from flowad_fast.bundle import CONSTANT_LOCATION
from flowad_fast.errors import ConfigError
from flowad_fast.export.formats import Built, Request, versions_of
from flowad_fast.export.onnx_graph import PACKAGES, write_graph

REPOSITORY, MODEL = "triton-server", "flowad"
QUEUE_DELAY_US = 2_000
"""How long the server may wait for a batch to fill."""
TIMEOUT_US = 1_000_000
"""Requests that have waited longer are rejected; a client may ask for another limit."""
BATCHES_QUEUED = 4
"""Full batches that may wait; further requests are rejected at once."""

_TYPES: dict[int, str] = {
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
}


def write(request: Request, folder: Path) -> Built:
    """Write the repository below `folder`, the graph first of its files.

    The server forms batches of the request's sizes, runs one instance on every GPU when it is for one, and warms up
    with frames of the request's size, otherwise of the model's.
    """
    version = folder / REPOSITORY / MODEL / "1"
    version.mkdir(parents=True)
    graph = version / "model.onnx"
    write_graph(request, graph, constant_location=True)
    size = request.frame_size or (request.model.spec.image.size,) * 2
    text = config(onnx.load(str(graph), load_external_data=False), size, request.batch, request.device)
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    files = sorted(path for path in (folder / REPOSITORY).rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in sorted(files, key=lambda path: path != graph))
    details: dict[str, int | str] = {"opset": request.opset}
    if request.location is not None:
        details[CONSTANT_LOCATION] = 1
    return Built(tuple(names), versions_of(*PACKAGES), details)


def config(graph: onnx.ModelProto, size: tuple[int, int], batch: tuple[int, int, int], device: str) -> str:
    """The config.pbtxt of an ONNX graph whose inputs and outputs all start with the batch dimension.

    Args:
        graph: what it describes.
        size: height and width of the warm-up frames.
        batch: smallest, usual and largest batch.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: an element type that the server does not know.
    """
    _, usual, largest = batch
    preferred = ", ".join(str(n) for n in sorted({usual, largest}))
    kind = "KIND_GPU" if device.startswith("cuda") else "KIND_CPU"
    inputs = [_tensor(value) for value in graph.graph.input]
    outputs = [_tensor(value) for value in graph.graph.output]
    free = iter(size)
    warm = "\n".join(
        f'    inputs {{ key: "{name}" value {{ data_type: {dtype} '
        f"dims: [ {', '.join(str(d if d >= 0 else next(free)) for d in dims or [1])} ] zero_data: true }} }}"
        for name, dtype, dims in inputs
    )
    return f"""# The server calls the model by its folder's name.
backend: "onnxruntime"
max_batch_size: {largest}
{_section("input", inputs)}
{_section("output", outputs)}
dynamic_batching {{
  preferred_batch_size: [ {preferred} ]
  max_queue_delay_microseconds: {QUEUE_DELAY_US}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {TIMEOUT_US}
    allow_timeout_override: true
    max_queue_size: {BATCHES_QUEUED * largest}
  }}
}}
instance_group [ {{ count: 1 kind: {kind} }} ]
model_warmup [
{_warmups(warm, sorted({1, usual}))}
]
"""


def _warmups(inputs: str, batches: list[int]) -> str:
    return ",\n".join(f'  {{\n    name: "batch of {n}"\n    batch_size: {n}\n{inputs}\n  }}' for n in batches)


def _section(name: str, tensors: list[tuple[str, str, list[int]]]) -> str:
    lines = []
    for tensor, dtype, dims in tensors:
        # The server wants at least one dimension after the batch; `reshape` takes it away again.
        shape = ", ".join(map(str, dims)) if dims else "1"
        reshape = "" if dims else " reshape { shape: [ ] }"
        lines.append(f'  {{ name: "{tensor}" data_type: {dtype} dims: [ {shape} ]{reshape} }}')
    return f"{name} [\n" + ",\n".join(lines) + "\n]"


def _tensor(value: onnx.ValueInfoProto) -> tuple[str, str, list[int]]:
    """Name, type and dimensions after the batch, -1 where they are free."""
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        got = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise ConfigError(f"{value.name}: the server has no type for {got}; expected uint8, int64, fp16 or fp32")
    dims = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim[1:]]
    return value.name, _TYPES[kind.elem_type], dims
