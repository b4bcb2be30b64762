"""The scoring pipeline as ONNX; checked by ONNX's own checker and shape inference."""

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer

from flowad_fast.errors import ConfigError
from flowad_fast.export import onnx_fp8
from flowad_fast.export.formats import OPSET, Built, Request, versions_of
from flowad_fast.export.graph import Boundary, boundary

PACKAGES = ("torch", "onnx", "onnxscript")
"""What the graph depends on."""
INLINE_BYTES = 1_500_000_000
"""Weights above this go to one external file, since protobuf ends at 2 GB."""


def write(request: Request, folder: Path) -> Built:
    """Write `model.onnx`, and beside it `model.onnx.data` for weights that are too large for one file."""
    nodes = write_graph(request, folder / "model.onnx")
    files = sorted((path.name for path in folder.iterdir()), key=lambda name: (name != "model.onnx", name))
    return Built(tuple(files), versions_of(*PACKAGES), {"opset": request.opset, "nodes": nodes})


def write_graph(request: Request, path: Path, constant_location: bool = False) -> int:
    """Write the whole boundary to `path`; returns the number of nodes. See `write_boundary` and `boundary`.

    The backbone, the state and the statistics are float32 in every precision; fp16 and bf16 are those of the velocity
    field's products. fp8 is fp16 with its products quantised, for which the request has real frames.

    Raises:
        ConfigError: an opset or precision that the exporter does not write, or fp8 without frames.
    """
    opset = request.opset
    if request.precision != "fp8":
        return write_boundary(path, boundary(request, constant_location), opset)
    if request.frames is None:
        raise ConfigError("fp8 needs real frames, from which it takes the activations' ranges; give --data")
    if opset < onnx_fp8.OPSET:
        raise ConfigError(f"fp8 needs opset {onnx_fp8.OPSET} or later, got {opset}")
    graph = _graph(boundary(replace(request, precision="fp16"), constant_location), opset)
    _save(graph, path)
    chosen = onnx_fp8.products(graph, request.model.config.keep_bf16)
    onnx_fp8.quantise(graph, chosen, onnx_fp8.measure_ranges(path, chosen, *request.frames, request.location))
    passes.RemoveUnusedNodesPass()(graph)
    path.with_name(path.name + ".data").unlink(missing_ok=True)
    return _save(graph, path)


def write_boundary(path: Path, edge: Boundary, opset: int = OPSET, inline_bytes: int = INLINE_BYTES) -> int:
    """Write a boundary to `path`; returns the number of nodes.

    Weights above `inline_bytes` in sum lie in one file beside it, `path`.data, under a relative name.

    Raises:
        ConfigError: an opset that the exporter does not write.
    """
    return _save(_graph(edge, opset), path, inline_bytes)


def _graph(edge: Boundary, opset: int) -> onnx_ir.Model:
    if not 18 <= opset <= 25:
        raise ConfigError(f"opset {opset} is not supported; expected 18 to 25")
    # The exporter logs and warns about its own internals; what matters to the user is checked when it is saved.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            edge.trace(),
            dynamo=True,
            input_names=list(edge.inputs),
            output_names=list(edge.outputs),
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    _simplify(program.model)
    _name_axes(program.model, edge)
    return program.model


def _save(model: onnx_ir.Model, path: Path, inline_bytes: int = INLINE_BYTES) -> int:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > inline_bytes else None)
    # By path, so that models above 2 GB are checked too.
    onnx.checker.check_model(str(path), full_check=True)
    return len(model.graph)


def _simplify(model: onnx_ir.Model) -> None:
    """Inline, fold constants, drop what is unused: sequences become splits, which TensorRT's parser needs.

    The exporter's own optimisation does this too, and takes ten times as long over fusions that engines do themselves.
    """
    optimizer.inline(model)
    # Weights keep their names and their transposes, which engines fold themselves.
    optimizer.fold_constants(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    for one in (passes.RemoveUnusedNodesPass(), passes.RemoveUnusedFunctionsPass(), passes.RemoveUnusedOpsetsPass(),
                passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
                passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass(),
                passes.NameFixPass()):  # fmt: skip
        one(model)


def _name_axes(model: onnx_ir.Model, edge: Boundary) -> None:
    """Give dynamic axes the boundary's names instead of the tracer's symbols, wherever they stand alone."""
    names: dict[str, str] = {}
    for value, axes in zip(model.graph.inputs, [one for one in edge.dynamic_shapes if one is not None], strict=True):
        for axis, dim in axes.items():
            names[str(value.shape[axis].value)] = dim.__name__  # type: ignore[index, union-attr]
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value in names:
                value.shape[axis] = names[size.value]  # type: ignore[index]
