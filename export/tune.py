"""The console script `flowad-tune`: `cli.tune` with every engine that it can time."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from flowad_fast.cli.tune import command, start_eager

if TYPE_CHECKING:
    from flowad_fast.engines import Engine
    from flowad_fast.model import FlowModel
    from flowad_fast.stages.scorers import Scorer


def start_onnxruntime(model: "FlowModel", scorer: "Scorer") -> "Engine":
    """ONNX Runtime on the CPU, on the graph that an export of this scorer would write."""
    from flowad_fast.engines.onnxruntime import OnnxRuntimeEngine
    from flowad_fast.errors import require
    from flowad_fast.export import onnx_graph
    from flowad_fast.export.formats import Request

    require("model", "onnx", "onnxscript", by="flowad-tune --engine onnxruntime")
    with TemporaryDirectory(prefix="flowad-tune-") as folder:
        onnx_graph.write(Request(model, scorer), Path(folder))
        return OnnxRuntimeEngine(Path(folder) / "model.onnx", "cpu")


main = command({"eager": start_eager, "onnxruntime": start_onnxruntime})

if __name__ == "__main__":
    main()
