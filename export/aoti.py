"""The scoring pipeline as an AOTInductor package (`.pt2`): machine code that runs without Python, from C++ as well."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowad_fast.engines.inductor import PORTABLE, cpp_compiler, target
from flowad_fast.engines.precision import arithmetic, check_precision
from flowad_fast.export.formats import Built, Request
from flowad_fast.export.graph import boundary


def write(request: Request, folder: Path) -> Built:
    """Compile `model.pt2` for the request's device; batch and (without a frame size) frame size stay free.

    The details are what the package depends on, see `engines.inductor.target`. The same, and what a C++ caller must
    know about the inputs, is in the package's own metadata.

    Raises:
        EngineUnavailableError: no C++ compiler, or a precision that the device does not have.
    """
    compiler = cpp_compiler()
    chosen, precision = torch.device(request.device), request.precision
    check_precision(precision, chosen)
    edge = boundary(request)
    edge = replace(
        edge,
        module=edge.module.on(chosen),
        example=tuple(None if one is None else one.to(chosen) for one in edge.example),
    )
    facts = target(chosen)
    size = "any" if request.frame_size is None else "x".join(map(str, request.frame_size))
    inputs = {"inputs": ",".join(edge.inputs), "frame_size": size, "classes": str(request.model.config.num_classes)}
    if request.location is not None:
        inputs["location"] = ",".join(map(str, request.location.shape))
    metadata = facts | inputs | {"precision": precision, "torch": torch.__version__}
    options: dict[str, Any] = {
        # Otherwise the thread count of this machine is compiled in.
        "cpp.dynamic_threads": True,
        # Precompiled headers would be kept for a compiler that is used once.
        "aot_inductor.precompile_headers": False,
        "aot_inductor.metadata": {f"flowad.{key}": value for key, value in metadata.items()},
    }
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as wrapper:
        if facts["cpu"] == PORTABLE:
            options |= _portable(compiler, Path(wrapper))
        with arithmetic(precision, chosen):
            path = str(folder / "model.pt2")
            torch._inductor.aoti_compile_and_package(edge.trace(), package_path=path, inductor_configs=options)
    return Built(("model.pt2",), {"torch": torch.__version__}, dict(facts))


def _portable(compiler: str, folder: Path) -> dict[str, Any]:
    """Options that compile for `PORTABLE`.

    Inductor always passes -march=native, which would tie the package to this very processor; the last -march wins.
    """
    wrapper = folder / Path(compiler).name
    wrapper.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -march={PORTABLE}\n', encoding="utf-8")
    wrapper.chmod(0o755)
    return {"cpp.cxx": (None, str(wrapper)), "cpp.simdlen": 256}
