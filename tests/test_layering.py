"""Imports point downwards only: kernels <- flowad_fast <- export <- benchmarks <- tests, and stages in order."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "flowad_fast", "export", "benchmarks", "tests")
STAGES = (
    "errors", "config", "image", "features", "velocity", "schedule", "integration", "model", "scorers", "decision",
    "pipeline", "engines", "detector",
)  # fmt: skip
"""Modules of the runtime, each of which imports only those before it (`model` holds the field that is integrated)."""


def imported(source: str) -> Iterator[str]:
    """Every module that a source file imports, at any depth of nesting; relative imports as `.`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def layer(module: str) -> str | None:
    """The layer that a module belongs to; None for other people's."""
    parts = module.split(".")
    if parts[0] == "tests" or parts[0] in LAYERS and parts[0] != "flowad_fast":
        return parts[0]
    if parts[0] != "flowad_fast":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "flowad_fast"


def upward(own: str, source: str) -> list[str]:
    """Imports of a file in layer `own` that point upwards, or are not absolute."""
    bad = []
    for module in imported(source):
        target = layer(module)
        if module.startswith(".") or module.split(".")[0] in ("kernels", "export", "benchmarks"):
            bad.append(module)
        elif target is not None and LAYERS.index(target) > LAYERS.index(own):
            bad.append(module)
    return bad


def files() -> list[tuple[str, Path]]:
    return [(name, path) for name in LAYERS[:-1] for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize(("own", "path"), files(), ids=lambda v: v if isinstance(v, str) else v.stem)
def test_no_upward_import(own: str, path: Path) -> None:
    assert upward(own, path.read_text(encoding="utf-8")) == []


def test_kernels_are_a_leaf() -> None:
    allowed = {"torch", "triton", "flowad_fast"} | sys.stdlib_module_names
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        others = {m.split(".")[0] for m in imported(path.read_text(encoding="utf-8"))} - allowed
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_earlier_stages_only(stage: str) -> None:
    paths = sorted((ROOT / "flowad_fast" / stage).glob("*.py")) or [ROOT / "flowad_fast" / f"{stage}.py"]
    later = STAGES[STAGES.index(stage) + 1 :]
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = "\n".join(ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))
        found = {m.split(".")[1] for m in imported(top) if m.startswith("flowad_fast.")}
        assert not found & set(later), f"{path.name} imports {found & set(later)}"


@pytest.mark.parametrize(
    ("own", "source"),
    [
        ("kernels", "from flowad_fast.config import VelocityConfig"),
        ("flowad_fast", "def f():\n    from flowad_fast.export import exporter"),
        ("export", "import flowad_fast.benchmarks.cli"),
        ("flowad_fast", "import kernels"),
        ("export", "from . import graph"),
    ],
)
def test_the_check_finds_upward_imports(own: str, source: str) -> None:
    assert upward(own, source)
    assert not upward("flowad_fast", "from flowad_fast.kernels import reference")


def test_the_package_imports_without_torch() -> None:
    import subprocess

    code = "import sys, flowad_fast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
