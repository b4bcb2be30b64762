"""fp8 in the graph: QuantizeLinear and DequantizeLinear (e4m3) around the velocity field's matrix products.

Weights are stored in e4m3 with one scale per output channel; activations get one fixed scale per product, from its
range on real frames, since engines fuse only scales that are constants. Scales have the dtype of what they scale.
"""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir

from flowad_fast.bundle import LOCATION
from flowad_fast.errors import ExportError
from flowad_fast.kernels.reference import FP8_MAX
from flowad_fast.stages.linear import FP8_MULTIPLE

OPSET = 19
"""First opset whose QuantizeLinear knows e4m3."""
HEADROOM = 2.0
"""Ranges are widened by this: a floating format loses no precision, and unseen frames do not saturate."""
SMALLEST_RANGE = 1e-3
"""Of an activation that is always zero; its scale must not vanish in fp16."""
FIELD = "scorer.field."
"""Prefix of the velocity field's weights in the exported graph."""


@dataclass(frozen=True)
class Product:
    """A matrix product of an activation with a constant weight (out, in), which the graph transposes first."""

    node: onnx_ir.Node
    activation: onnx_ir.Value
    weight: onnx_ir.Value
    constant: onnx_ir.TensorProtocol


def products(model: onnx_ir.Model, keep: tuple[str, ...]) -> list[Product]:
    """The field's products with a weight, except layers whose name matches a pattern of `keep`."""
    found = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
            continue
        transpose = node.inputs[1].producer()
        weight = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or not (weight.name or "").startswith(FIELD):
            continue
        name = str(weight.name).removeprefix(FIELD).removesuffix(".weight")
        whole = all(size % FP8_MULTIPLE == 0 for size in weight.const_value.shape.numpy())
        if whole and not any(fnmatch(name, pattern) for pattern in keep):
            found.append(Product(node, node.inputs[0], weight, weight.const_value))
    return found


def quantise(model: onnx_ir.Model, chosen: list[Product], ranges: list[float]) -> None:
    """Rewrite products in place, given the largest absolute activation of each."""
    graph = model.graph
    stored: dict[str, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
    for product, largest in zip(chosen, ranges, strict=True):
        name, weight = str(product.node.name), str(product.weight.name)
        if weight not in stored:
            stored[weight] = _stored(graph, weight, product.constant.numpy())
        dtype = product.constant.dtype.numpy()
        scale = _constant(graph, f"{name}.scale", np.array(largest * HEADROOM / FP8_MAX, dtype))
        zero = _constant(graph, f"{name}.zero", np.array(0, ml_dtypes.float8_e4m3fn))
        q = onnx_ir.node("QuantizeLinear", [product.activation, scale, zero], name=f"{name}.quantise")
        dq = onnx_ir.node("DequantizeLinear", [q.outputs[0], scale, zero], name=f"{name}.dequantise")
        wide = onnx_ir.node("DequantizeLinear", list(stored[weight]), {"axis": 1}, name=f"{name}.weight")
        graph.insert_before(product.node, [q, dq, wide])
        product.node.replace_input_with(0, dq.outputs[0])
        product.node.replace_input_with(1, wide.outputs[0])


def measure_ranges(
    path: Path, chosen: list[Product], frames: np.ndarray, y: np.ndarray | None, location: np.ndarray | None = None
) -> list[float]:
    """Largest absolute activation of each product over the frames, one at a time, by ONNX Runtime on the CPU.

    Args:
        path: the graph as written; its external data stay where they are.
        chosen: products of the graph.
        frames: uint8 (n, H, W, 3).
        y: class indices (n,) or None.
        location: location statistics, for a graph that takes them.

    Raises:
        ExportError: a range is not finite.
    """
    import onnxruntime

    proto = onnx.load(path, load_external_data=False)
    activations = [str(product.activation.name) for product in chosen]
    for name in sorted(set(activations)):
        proto.graph.node.add(op_type="Abs", input=[name], output=[f"{name}.abs"])
        proto.graph.node.add(
            op_type="ReduceMax", input=[f"{name}.abs"], output=[f"{name}.range"],
            attribute=[onnx.helper.make_attribute("keepdims", 0)],
        )  # fmt: skip
        proto.graph.output.add(name=f"{name}.range")
    probe = path.with_name(path.name + ".ranges")
    onnx.save(proto, probe)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
    inputs = {node.name for node in session.get_inputs()}
    largest = np.zeros(len(chosen))
    for i in range(len(frames)):
        feed = {"frames": frames[i : i + 1]} | ({} if y is None else {"classes": y[i : i + 1]})
        feed |= {} if location is None or LOCATION not in inputs else {LOCATION: location}
        got = session.run([f"{name}.range" for name in activations], feed)
        largest = np.maximum(largest, np.array(got, np.float64))
    probe.unlink()
    if not np.isfinite(largest).all():
        bad = [name for name, value in zip(activations, largest, strict=True) if not np.isfinite(value)]
        raise ExportError(
            f"activations {', '.join(bad[:3])} are not finite on the given frames; export in bf16 or fp32"
        )
    return [max(float(value), SMALLEST_RANGE) for value in largest]


def _stored(graph: onnx_ir.Graph, name: str, weight: np.ndarray) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """A weight (out, in) as e4m3 (in, out) and one scale per column."""
    wide = weight.astype(np.float32)
    scale = (np.abs(wide).max(1) / FP8_MAX).clip(1e-6).astype(weight.dtype)
    q = (wide / scale[:, None].astype(np.float32)).clip(-FP8_MAX, FP8_MAX).T.astype(ml_dtypes.float8_e4m3fn)
    return _constant(graph, f"{name}.e4m3", np.ascontiguousarray(q)), _constant(graph, f"{name}.scale", scale)


def _constant(graph: onnx_ir.Graph, name: str, array: np.ndarray) -> onnx_ir.Value:
    value = onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
