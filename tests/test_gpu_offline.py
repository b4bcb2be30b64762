"""`make gpu-check` on a bare image: its own packages, no index, no network; wheels from a folder."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flowad_fast.benchmarks.record import record

ROOT = Path(__file__).parent.parent
CARRIED = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")
"""What the image of the GPU machine lacks."""
IMAGE = (
    "torch", "triton", "torchvision", "timm", "numpy", "setuptools", "pip", "typer", "rich", "pillow", "pyyaml",
    "filelock", "psutil", "safetensors", "nvidia-ml-py", "pytest", "pytest-xdist", "pytest-timeout", "onnx",
    "onnx-ir", "onnxscript",
)  # fmt: skip
"""What it has of that which the check and its tests use; what these need comes with them. It has no SciPy here, though
the real one does: the check must not need it."""
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        int(importlib.metadata.version("setuptools").split(".")[0]) < 77,
        reason="this environment's setuptools cannot install the project without an index; `make test` brings another",
    ),
]


def needed(name: str) -> Iterator[str]:
    """What a distribution requires here, by its metadata."""
    for text in importlib.metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def closure(names: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found and name not in CARRIED:
            found.add(name)
            waiting += needed(name)
    return found


def files_of(name: str) -> list[importlib.metadata.PackagePath]:
    """A distribution's files in its site-packages; scripts, which lie elsewhere, are left out."""
    files = importlib.metadata.files(name)
    assert files is not None, f"{name} has no list of files"
    return [one for one in files if one.parts[0] != ".." and "__pycache__" not in one.parts]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the packages of `IMAGE`, as links, and no others."""
    folder = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in closure(IMAGE):
        for file in files_of(name):
            target = site / file.parts[0]
            if not target.exists():
                target.symlink_to(Path(file.locate()).resolve().parents[len(file.parts) - 1] / file.parts[0])
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The carried packages as wheels, packed again from this environment: no index is asked."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in CARRIED:
        files = files_of(name)
        (info,) = {one.parts[0] for one in files if one.parts[0].endswith(".dist-info")}
        wheel = importlib.metadata.distribution(name).read_text("WHEEL") or ""
        tags = [re.split("-", tag) for tag in re.findall(r"^Tag: (\S+)$", wheel, re.MULTILINE)]
        python, abi = tags[0][:2]
        path = folder / f"{info.removesuffix('.dist-info')}-{python}-{abi}-{'.'.join(tag[2] for tag in tags)}.whl"
        with zipfile.ZipFile(path, "w") as packed:
            for file in files:
                if file.name not in ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json"):
                    packed.write(file.locate(), str(file))
            packed.writestr(f"{info}/RECORD", "".join(f"{one},,\n" for one in packed.namelist()))
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files without what was built from them: nothing may be installed into the real checkout."""
    folder = tmp_path_factory.mktemp("bare") / "project"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "golden"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    (folder / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
    return folder


def make(checkout: Path, python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make gpu-check` without network: an index that may not be asked, and a proxy that is not there."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "OPENBLAS_CORETYPE") if name in os.environ}
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["make", "gpu-check", f"PYTHON={python}", *arguments],
        cwd=checkout, env=kept | nowhere | offline, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_what_is_missing_is_listed_at_once_with_the_command_that_fetches_it(checkout: Path, image: Path) -> None:
    done = make(checkout, image)
    assert done.returncode != 0 and "Error 3" in done.stderr, "preflight's exit code 3"
    said = done.stderr
    assert f"lacks {len(CARRIED)} of the " in said and all(f"  {name}" in said for name in CARRIED), said
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert re.search(
        rf"pip download --only-binary=:all: .*--python-version={version} .*'pydantic>=2.8' pydantic-core", said
    )
    assert "make gpu-check WHEELS=wheels" in said and "Traceback" not in said
    assert not (checkout / "build").exists() and not done.stdout.strip().endswith("written"), "nothing was begun"


def test_wheels_that_do_not_fit_are_named(checkout: Path, image: Path, wheels: Path, tmp_path: Path) -> None:
    for path in wheels.glob("*.whl"):
        shutil.copy(path, tmp_path / path.name)
    (core,) = tmp_path.glob("pydantic_core-*")
    core.rename(tmp_path / "pydantic_core-2.0.0-cp27-cp27m-win32.whl")
    (old,) = tmp_path.glob("pydantic-*")
    old.rename(tmp_path / "pydantic-1.10.0-py3-none-any.whl")
    done = make(checkout, image, f"WHEELS={tmp_path}")
    assert "Error 3" in done.stderr and "lacks 2 of the" in done.stderr, done.stderr
    assert "the wheel 2.0.0 is for cp27-cp27m-win32, not for this machine" in done.stderr
    assert "the wheel is 1.10.0, 2.8 is needed" in done.stderr


def test_with_wheels_it_installs_runs_and_writes_its_record(
    checkout: Path, image: Path, wheels: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results"
    parts = "--only smoke --only 'GPU tests'"
    done = make(checkout, image, f"WHEELS={wheels}", f"OUTPUT={output}", f"ARGS=--dry-run {parts}")
    assert done.returncode == 0, done.stdout + done.stderr
    own = checkout / "build" / "gpu" / "bin" / "python"
    where = "import flowad_fast, pydantic, torch, sys; print(flowad_fast.__file__, pydantic.__file__, torch.__file__)"
    project, carried, torch = subprocess.run(
        [own, "-c", where], cwd="/", env={}, capture_output=True, text=True, check=True
    ).stdout.split()
    assert Path(project).is_relative_to(checkout), "an editable install of the checkout"
    assert Path(carried).is_relative_to(checkout / "build") and Path(torch).is_relative_to(image.parent.parent)
    saved = record.read(output / "gpu-check-dry-run.json")
    assert isinstance(saved, record.Record) and saved.parts is not None
    assert [(part.name, part.status) for part in saved.parts] == [("smoke", "ok"), ("GPU tests", "ok")]
    assert {row.precision for row in saved.cases} == {"bf16", "fp8"} and saved.roofs.gemm
    assert re.fullmatch(r"\d{3} tests can be imported", saved.parts[1].reason or "")
    assert all(row.status == "ok" and row.measured is not None for row in saved.cases)
    assert subprocess.run([own, "-c", "import scipy"], cwd="/", env={}, capture_output=True).returncode != 0
