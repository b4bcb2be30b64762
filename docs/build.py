"""Builds the API pages, offline: `python docs/build.py [FOLDER]`, by default build/docs; `make docs` does that.

They hold the public names of `flowad_fast`, the engines, and the specification of the operators. The same sources give
the same pages.
"""

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path

import pdoc.render

import flowad_fast

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "flowad_fast",
    "flowad_fast.engines",
    "flowad_fast.stages.decision",
    "flowad_fast.stages.scorers",
    "flowad_fast.errors",
    "flowad_fast.kernels.reference",
)


def build(folder: Path) -> None:
    """Write the pages into `folder`, replacing what pages are there."""
    for name in flowad_fast.__all__:  # imported on first use otherwise, and so not there to be documented
        setattr(flowad_fast, name, getattr(flowad_fast, name))
    shutil.rmtree(folder, ignore_errors=True)
    pdoc.render.configure(docformat="google", footer_text=f"flowad-fast {flowad_fast.__version__}", search=False)
    # OpenVINO's engines are documented where it is installed.
    left_out = () if find_spec("openvino") else ("!flowad_fast.engines.openvino", "!flowad_fast.engines.openvino_int8")
    pdoc.pdoc(*MODULES, *left_out, output_directory=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "docs")
    folder = parser.parse_args().folder
    build(folder)
    print(f"wrote {folder / 'index.html'}")
