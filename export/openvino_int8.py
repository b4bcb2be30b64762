"""int8 by post-training quantisation: the velocity field's products, calibrated on good parts, for OpenVINO.

What is quantised was chosen by the error of the map, demo checkpoint, all test frames (RMS relative to the reference
map's standard deviation, one evaluation / inversion): the field's products 0.007 / 0.006, the backbone's convolutions
0.17 / 0.29, and everything that NNCF takes by default 0.6 / 0.7, where the resizing of the frame and the arithmetic
after the field saturate. So only the field's products are, without those that the model itself keeps wide.
"""

import importlib
import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir

from flowad_fast.bundle import LOCATION, Artefact
from flowad_fast.engines import backend
from flowad_fast.engines.instructions import cpu_flags, cpu_name, worth
from flowad_fast.environment import without
from flowad_fast.errors import ConfigError, EngineUnavailableError, ExportError
from flowad_fast.export import onnx_fp8
from flowad_fast.export.formats import Built, Ranges, Request, versions_of
from flowad_fast.export.onnx_graph import PACKAGES, write_graph
from flowad_fast.export.verify import TOLERANCES

PRODUCTS = ("MatMul", "Convolution", "GroupConvolution")


def write(request: Request, folder: Path) -> Built:
    """Write the quantised graph with its weights, and the canary.

    Raises:
        EngineUnavailableError: OpenVINO or NNCF is not installed.
        ConfigError: no real frames to calibrate on.
        ExportError: the field has no product that can be quantised.
    """
    if request.ranges is None:
        raise ConfigError(
            "int8 needs real frames of good parts, from which it takes ranges; give --data or --calibrate"
        )
    backend("openvino-int8").engine()  # says what is missing
    nncf = _nncf()
    from flowad_fast.engines.openvino import openvino
    from flowad_fast.engines.openvino_int8 import CANARY, GRAPH

    path = folder / "model.onnx"
    write_graph(request, path)
    graph = onnx_ir.load(path)
    chosen = {str(one.node.name) for one in onnx_fp8.products(graph, request.model.config.keep_bf16)}
    if not chosen:
        raise ExportError("the velocity field has no product that can be quantised; use the format onnx")
    model = openvino.convert_model(path)  # as `read_model`, with transposes and normalisations folded into weights
    quantised = _quantised(nncf, model, chosen, request.ranges, request.location)
    openvino.save_model(quantised, folder / GRAPH, compress_to_fp16=False)
    for file in folder.glob("model.onnx*"):
        file.unlink()
    _write_canary(folder, request.ranges, request.location)
    flags = cpu_flags()
    details: dict[str, int | str] = {
        "products": len(chosen),
        "calibrated_on": request.ranges.source,
        "cpu": cpu_name(),
        "cpu_flags": "unknown" if flags is None else " ".join(flags),
        "note": f"on {cpu_name()}, where it was certified, {worth(flags)}",
    }
    files = (GRAPH, GRAPH.replace(".xml", ".bin"), CANARY)
    return Built(files, versions_of(*PACKAGES, "openvino", "nncf"), details)


def _nncf() -> ModuleType:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU, which nothing here needs
    try:
        with without("openvino_telemetry"):
            return importlib.import_module("nncf")
    except ModuleNotFoundError as error:
        raise EngineUnavailableError(
            f"quantising needs the package {error.name}, which is not installed: "
            'pip install "flowad-fast[openvino-int8]"'
        ) from None


def _quantised(nncf: ModuleType, model: Any, chosen: set[str], ranges: Ranges, location: np.ndarray | None) -> Any:
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    names = {name for port in model.inputs for name in port.get_names()}
    constant = {} if location is None or LOCATION not in names else {LOCATION: location}
    feeds = [_feed(ranges, i) | constant for i in range(len(ranges.frames))]
    kinds = {node.get_type_name() for node in model.get_ops()}
    others = [n.get_friendly_name() for n in model.get_ops() if n.get_type_name() in PRODUCTS]
    with redirect_stdout(io.StringIO()):  # its progress bar would be among the command's JSON
        return nncf.quantize(
            model,
            nncf.Dataset(feeds),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(feeds),
            ignored_scope=nncf.IgnoredScope(
                types=sorted(kinds - set(PRODUCTS)),
                names=[name for name in others if name not in chosen],
                validate=False,
            ),
            # Ranges are the extremes seen: means of them, the default, cut off what the map is made of.
            advanced_parameters=AdvancedQuantizationParameters(
                disable_bias_correction=True, activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
            ),
        )


def _feed(ranges: Ranges, i: int) -> dict[str, np.ndarray]:
    classes = {} if ranges.y is None else {"classes": ranges.y[i : i + 1]}
    return {"frames": ranges.frames[i : i + 1], **classes}


def _write_canary(folder: Path, ranges: Ranges, location: np.ndarray | None) -> None:
    """The first frame of those that the ranges are of, with the map and score that this CPU gives."""
    from flowad_fast.engines.openvino import OpenVinoEngine
    from flowad_fast.engines.openvino_int8 import CANARY, GRAPH

    engine = OpenVinoEngine(folder / GRAPH, Artefact(engine="openvino-int8", files={}, precision="int8"), "cpu")
    kept: dict[str, Any] = _feed(ranges, 0)
    if location is not None:
        engine.locate(location)
        kept[LOCATION] = location
    maps, scores = engine.run(kept["frames"], kept.get("classes"))
    limit = TOLERANCES["int8"]
    kept |= {"map": maps, "score": scores, "max": np.float64(limit.max), "rms": np.float64(limit.rms)}
    np.savez_compressed(folder / CANARY, **kept)
