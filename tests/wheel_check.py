"""Run by `make wheel-test` outside the checkout: the wheel imports, works, and installs nothing generic."""

import importlib
import importlib.util
import pkgutil
import sys
import zipfile
from pathlib import Path

site = Path.cwd() / "site"
(wheel,) = Path.cwd().glob("*.whl")

import flowad_fast  # noqa: E402

assert Path(flowad_fast.__file__).is_relative_to(site), f"imported {flowad_fast.__file__}, not the wheel in {site}"
assert "torch" not in sys.modules, "importing flowad_fast must not import torch"

names = zipfile.ZipFile(wheel).namelist()
tops = {name.split("/")[0] for name in names}
expected = {"flowad_fast", next(t for t in tops if t.endswith(".dist-info"))}
assert tops == expected, f"the wheel installs {tops - expected} besides flowad_fast"
for needed in ("flowad_fast/py.typed", "flowad_fast/assets/demo.safetensors", "flowad_fast/assets/demo.json"):
    assert needed in names, f"{needed} is not in the wheel"
for generic in ("kernels", "export", "benchmarks"):
    assert importlib.util.find_spec(generic) is None, f"{generic} is importable as a global name"

modules = [m.name for m in pkgutil.walk_packages(flowad_fast.__path__, "flowad_fast.")]
for name in modules:
    module = importlib.import_module(name)
    assert Path(module.__file__ or "").is_relative_to(site), f"{name} came from {module.__file__}"
assert {"flowad_fast.kernels.reference", "flowad_fast.export.cli", "flowad_fast.benchmarks.cli"} <= set(modules)

model = flowad_fast.load_checkpoint("demo")
assert model.config.channels == 192
print(f"wheel ok: {len(modules)} modules, {wheel.stat().st_size / 1e6:.1f} MB")
