"""fp8 in the graph: QuantizeLinear and DequantizeLinear (e4m3) around the velocity field's matrix products.

Weights are stored in e4m3 with one scale an output channel; activations get one fixed scale a product, from its range
on real frames, since engines fuse only scales that are constants. Scales have the dtype of what they scale.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir

from flowad_fast.errors import ExportError
from flowad_fast.kernels.reference import FP8_MAX
from flowad_fast.linear import FP8_MULTIPLE

OPSET = 19
"""First opset whose QuantizeLinear knows e4m3."""
HEADROOM = 2.0
"""Ranges are widened by this: a floating format loses no precision, and unseen frames do not saturate."""
FIELD = "scorer.field."
"""Prefix of the velocity field's weights in the exported graph."""


def quantise(model: onnx_ir.Model, ranges: dict[str, float]) -> None:
    """Rewrite, in place, the matrix products that `ranges` names (node name to largest absolute input)."""
    graph = model.graph
    weights: dict[str, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
    for node in products(model, ()):
        if node.name not in ranges:
            continue
        x, weight = node.inputs[0], node.inputs[1].producer().inputs[0]  # type: ignore[union-attr]
        assert x is not None and weight is not None and node.name and weight.name, "products() gives whole nodes"
        dtype = weight.dtype.numpy()  # type: ignore[union-attr]
        if weight.name not in weights:
            weights[weight.name] = _stored(graph, weight.name, weight.const_value.numpy())  # type: ignore[union-attr]
        scale = _constant(graph, f"{node.name}.scale", np.array(ranges[node.name] * HEADROOM / FP8_MAX, dtype))
        zero = _constant(graph, f"{node.name}.zero", np.array(0, ml_dtypes.float8_e4m3fn))
        q = onnx_ir.node("QuantizeLinear", [x, scale, zero], name=f"{node.name}.quantise")
        dq = onnx_ir.node("DequantizeLinear", [q.outputs[0], scale, zero], name=f"{node.name}.dequantise")
        wq = onnx_ir.node(
            "DequantizeLinear",
            list(weights[weight.name]),
            {"axis": 1},
            name=f"{node.name}.weight",
        )
        graph.insert_before(node, [q, dq, wq])
        node.replace_input_with(0, dq.outputs[0])
        node.replace_input_with(1, wq.outputs[0])


def products(model: onnx_ir.Model, keep: tuple[str, ...]) -> Iterator[onnx_ir.Node]:
    """The field's products with a constant weight, except layers whose name matches a pattern of `keep`."""
    for node in list(model.graph):
        transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
        if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
            continue
        weight = transpose.inputs[0]
        name = (weight.name or "").removeprefix(FIELD).removesuffix(".weight")
        if weight.const_value is None or not (weight.name or "").startswith(FIELD):
            continue
        if any(size % FP8_MULTIPLE for size in weight.const_value.shape.numpy()):
            continue
        if not any(fnmatch(name, pattern) for pattern in keep):
            yield node


def measure_ranges(path: Path, nodes: list[onnx_ir.Node], frames: np.ndarray, y: np.ndarray | None) -> dict[str, float]:
    """Largest absolute input of each product over the frames, one at a time, by ONNX Runtime on the CPU.

    Args:
        path: the graph as written; its external data stay where they are.
        nodes: products of the graph.
        frames: uint8 (n, H, W, 3).
        y: class indices (n,) or None.

    Raises:
        ExportError: a range is not finite.
    """
    import onnxruntime

    proto = onnx.load(path, load_external_data=False)
    names = {node.name: node.inputs[0].name for node in nodes}  # type: ignore[union-attr]
    for activation in sorted(set(names.values())):  # type: ignore[type-var]
        proto.graph.node.add(op_type="Abs", input=[activation], output=[f"{activation}.abs"])
        proto.graph.node.add(
            op_type="ReduceMax", input=[f"{activation}.abs"], output=[f"{activation}.range"],
            attribute=[onnx.helper.make_attribute("keepdims", 0)],
        )  # fmt: skip
        proto.graph.output.add(name=f"{activation}.range")
    probe = path.with_name(path.name + ".ranges")
    onnx.save(proto, probe)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
    wanted = [f"{activation}.range" for activation in names.values()]
    worst = np.zeros(len(wanted))
    for i in range(len(frames)):
        feed = {"frames": frames[i : i + 1]} | ({} if y is None else {"classes": y[i : i + 1]})
        worst = np.maximum(worst, np.array(session.run(wanted, feed), np.float64))
    probe.unlink()
    if not np.isfinite(worst).all():
        bad = [name for name, value in zip(names, worst, strict=True) if not np.isfinite(value)]
        raise ExportError(f"activations of {', '.join(map(str, bad[:3]))} are not finite on the given frames")
    return {str(name): float(max(value, 1e-3)) for name, value in zip(names, worst, strict=True)}


def _stored(graph: onnx_ir.Graph, name: str, weight: np.ndarray) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """A weight (out, in) as e4m3 (in, out) and one scale a column."""
    wide = weight.astype(np.float32)
    scale = (np.abs(wide).max(1) / FP8_MAX).clip(1e-6).astype(weight.dtype)
    q = (wide / scale[:, None].astype(np.float32)).clip(-FP8_MAX, FP8_MAX).T.astype(ml_dtypes.float8_e4m3fn)
    return _constant(graph, f"{name}.e4m3", np.ascontiguousarray(q)), _constant(graph, f"{name}.scale", scale)


def _constant(graph: onnx_ir.Graph, name: str, array: np.ndarray) -> onnx_ir.Value:
    value = onnx_ir.val(name, const_value=onnx_ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
