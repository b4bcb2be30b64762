"""Imports point downwards only: kernels <- flowad_fast <- export <- benchmarks <- tests, and floor by floor."""

import ast
import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "flowad_fast", "export", "benchmarks", "tests")
FLOORS = (
    # What a runtime without torch is made of.
    ("errors", "environment", "moved", "shipped"),
    ("config", "files"),
    ("stages.schedule", "stages.aggregates", "stages.frames", "stages.regions", "stages.location", "stages.tiling"),
    ("stages.decision", "evaluation.overlay"),
    ("stages.scorers", "detection"),
    ("tuning.recipe",),
    ("bundle", "checkpoints.defaults"),
    ("engines", "engines.onnx_file", "engines.cores", "engines.instructions", "engines.plugins", "masks"),
    ("engines.start", "engines.onnxruntime", "engines.tiled"),
    ("detector",),
    ("line.outcome", "line.monitor_evidence", "line.heap"),
    ("line.policy", "line.event", "line.journal"),
    ("line.monitor_look", "line.feeder", "line.sinks.rows", "line.sinks.base"),
    (
        "line.sinks.jsonl",
        "line.sinks.database",
        "line.sinks.modbus",
        "line.sinks.mqtt",
        "line.sinks.opcua",
        "line.sinks.pictures",
        "line.sinks.webhook",
    ),
    ("line.sinks",),
    # What needs torch: the computation, and the engines that run it.
    ("stages.arithmetic", "stages.image", "stages.plan", "stages.score"),
    ("stages.features", "stages.linear"),
    ("stages.velocity", "stages.integration", "stages.fused_backbone"),
    ("model",),
    ("stages.maps",),
    ("reference_path", "pipeline"),
    ("engines.device", "engines.precision", "engines.memory", "engines.timing"),
    ("engines.attention", "engines.products", "engines.flight"),
    ("engines.eager", "engines.cudagraph", "engines.inductor", "engines.tensorrt"),
    # These need OpenVINO, not torch: `tests/test_openvino.py` runs them without.
    ("engines.openvino",),
    ("engines.openvino_int8",),
    ("checkpoints.reading",),
    ("checkpoints.fill", "checkpoints.foreign", "checkpoints.backbones"),
    ("checkpoints.own",),
    ("checkpoints.load",),
    # What reads data, judges and trains.
    ("data.samples", "data.walk"),
    ("data.images",),
    ("data.layouts",),
    ("line.sources.base", "line.sources.pixels", "line.sources.aravis", "line.scoring"),
    (
        "line.sources.folder",
        "line.sources.gige",
        "line.sources.iterator",
        "line.sources.recorded",
        "line.sources.video",
    ),
    ("line.sources",),
    ("line.settings", "line.acquisition"),
    ("line.canary", "line.records", "line.spool", "line.health", "line.monitor_source"),
    ("line.monitor",),
    ("line.outlets", "line.judging", "line.keeping"),
    ("line.runner",),
    ("line",),
    ("line.watch",),
    ("line.activation",),
    ("line.station", "line.web.state", "line.web.guard", "line.web.client"),
    ("line.web.metrics",),
    ("line.web.app",),
    ("line.web.server",),
    ("serve.pool",),
    ("serve.judging", "serve.protocol.settings"),
    ("serve.settings",),
    ("serve.local", "serve.protocol.refusals", "serve.protocol.describing"),
    ("serve.protocol.tensors",),
    ("serve.protocol.asking",),
    ("serve.protocol.desk", "serve.protocol.messages"),
    ("serve.protocol.over_http",),
    ("serve.protocol.over_grpc", "serve.protocol.front"),
    ("serve.replica",),
    ("serve.cluster",),
    ("serve.pool_ray",),
    ("serve.orders",),
    ("serve.client", "serve.running"),
    ("evaluation.certificate", "evaluation.metrics", "evaluation.probes", "evaluation.scanning"),
    ("evaluation.results", "evaluation.report", "evaluation.location"),
    ("evaluation.inspection", "evaluation.figures"),
    ("evaluation.evaluate",),
    ("archive.sources", "archive.store", "archive.worker"),
    ("archive.cluster",),
    ("archive.inspecting", "archive.evaluating"),
    ("tuning.defects", "tuning.grid", "tuning.judge", "tuning.parts", "tuning.work"),
    ("tuning.measure",),
    ("tuning.page",),
    ("training.config",),
    ("training.recipes", "training.objective", "training.batches"),
    ("training.students",),
    ("training.certify",),
    ("training.identity", "training.runtime"),
    ("training.learner",),
    ("training.loop",),
    ("cli.common", "cli.scorer_options"),
    ("cli.authors",),
    ("cli.inspect", "cli.eval", "cli.train", "cli.tune", "cli.line", "cli.serve"),
    ("cli.archive",),
)
"""Every module of the runtime; each imports, at its top, only those of earlier floors."""
LIGHT = (
    *(
        f"flowad_fast.{name}"
        for floor in itertools.takewhile(lambda it: "stages.arithmetic" not in it, FLOORS)
        for name in floor
    ),
    *(
        f"flowad_fast.{name}"
        for name in (
            "data.images",
            "data.samples",
            "data.layouts",
            "line.sources.folder",
            "line.sources.gige",
            "line.sources.recorded",
            "line.sources.video",
            "line.runner",
            "line.station",
            "line.web.client",
            "cli.line",
            "cli.serve",
            "evaluation.inspection",
            "evaluation.results",
            "evaluation.scanning",
            "training.config",
            "archive.inspecting",
            "cli.archive",
            "cli.common",
            "cli.scorer_options",
            "cli.inspect",
            "cli.eval",
            "cli.train",
            "cli.tune",
            "tuning.defects",
            "tuning.grid",
            "tuning.judge",
            "tuning.parts",
            "export.tune",
            "export.cli",
            "export.calibration",
            "export.location",
            "export.card",
            "export.frames",
            "export.formats",
            "export.verify",
            "benchmarks.cli",
        )  # fmt: skip
    ),
)
"""What imports with the base dependencies alone: the runtime, and every command up to where it needs more."""
EXTRAS = ("torch", "torchvision", "timm", "triton", "safetensors", "onnx", "onnxscript", "scipy", "sklearn",
          "matplotlib", "jinja2", "psutil", "accelerate",
          "sqlalchemy", "psycopg", "paho", "pymodbus", "asyncua", "httpx", "fastapi", "starlette", "uvicorn",
          "prometheus_client", "grpc", "tritonclient", "ray", "pyarrow")  # fmt: skip
"""Packages that the base installation does not have."""
POSIX = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")
"""Modules that Windows does not have."""


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


def runtime_modules() -> dict[str, Path]:
    """The modules under flowad_fast/, by dotted name without the package's; links to other layers are not followed."""
    base = ROOT / "flowad_fast"
    found = {}
    for path in sorted(base.rglob("*.py")):
        parts = path.relative_to(base).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and (parts[-1] != "__init__" or len(ast.parse(path.read_text(encoding="utf-8")).body) > 1):
            found[name] = path
    return found


def test_every_module_stands_on_a_floor() -> None:
    listed = [name for floor in FLOORS for name in floor]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(runtime_modules())


@pytest.mark.parametrize("name", [name for floor in FLOORS for name in floor])
def test_modules_import_lower_floors_only(name: str) -> None:
    height = {one: i for i, floor in enumerate(FLOORS) for one in floor}
    tree = ast.parse(runtime_modules()[name].read_text(encoding="utf-8"))
    top = "\n".join(ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))
    targets = {module.removeprefix("flowad_fast.") for module in imported(top) if module.startswith("flowad_fast.")}
    assert not {one for one in targets & set(height) if height[one] >= height[name]}


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


def blocking(modules: tuple[str, ...]) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}, None))\n"


def without(modules: tuple[str, ...], code: str) -> None:
    """Run code in a process in which these modules cannot be imported."""
    run = [sys.executable, "-c", blocking(modules) + code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_found_by_their_old_names() -> None:
    from flowad_fast.moved import MOVED

    for old, new in MOVED.items():
        with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
            sys.modules.pop(old, None)
            alias = importlib.import_module(old)
        module = importlib.import_module(new)
        names = [name for name in vars(module) if not name.startswith("_")]
        assert names and all(getattr(alias, name) is getattr(module, name) for name in names)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flowad_fast.nothing")


def test_the_package_imports_without_torch() -> None:
    without((), "import sys, flowad_fast; sys.exit(bool({'torch', 'numpy', 'pydantic'} & set(sys.modules)))")


@pytest.mark.parametrize("name", LIGHT)
def test_the_light_runtime_imports_without_the_extras(name: str) -> None:
    without(EXTRAS, f"import {name}")


NEEDS = """
import flowad_fast
from flowad_fast.errors import MissingExtraError
for call in (lambda: flowad_fast.load_checkpoint, lambda: flowad_fast.Detector.from_checkpoint("demo", None)):
    try:
        call()
    except MissingExtraError as error:
        assert str(error).endswith('pip install "flowad-fast[model]"'), error
    else:
        raise AssertionError("it went through")
"""
COMMAND = """
import typer
from flowad_fast.cli import common
def needs():
    import sklearn.metrics
sys.argv = ["flowad-thing"]
common.command(needs)()
"""


def test_what_needs_an_extra_says_which_in_one_line() -> None:
    without(EXTRAS, NEEDS)
    done = subprocess.run(
        [sys.executable, "-c", blocking(EXTRAS) + COMMAND], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == 'error: MissingExtraError: flowad-thing needs sklearn: pip install "flowad-fast[tools]"\n'


def test_the_runtimes_tests_pass_without_the_extras_and_what_windows_lacks() -> None:
    """filelock, which has its own code for Windows, is imported before; a real Windows is not at hand."""
    files = [f"tests/test_{name}.py" for name in ("bundle", "decision", "data")]
    aggregates = "not test_aggregates"  # torch computes those
    arguments = ["-q", "--noconftest", "-p", "no:cacheprovider", "-k", aggregates, *files]
    code = f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"
    before = "import filelock, PIL.Image\n"
    without((), before + blocking(POSIX + EXTRAS) + code)
