"""The documentation holds: examples run, links lead somewhere, and what is named exists."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_frames

import flowad_fast
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.frames import GoodParts
from flowad_fast.stages.scorers import Inversion

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CELLS = Path("demo-output") / "bundles" / "cells-recipe"
"""Where `make demo` leaves the bundle that README's snippets load."""
DEMO = Path("bundles") / "demo-inversion"
"""The bundle of examples in docstrings, which `flowad-export make demo` writes."""
MODULES = sorted({getattr(flowad_fast, name).__module__ for name in flowad_fast.__all__})
"""Where the public names are."""
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|toml|txt|cff|yaml|sh))`")
"""What looks like a file of this project in a page: a path with a folder, or a name with one of its suffixes."""
MADE = re.compile(r"(?:demo-output|build|dist)/.*|.*NEW\.py|manifest\.json|README\.md")
"""Of those, what commands write, and what stands for a file to be written."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make demo` and `flowad-export make demo` leave it, in the format that is written at once."""
    folder = tmp_path_factory.mktemp("demo")
    frames = tiny_frames(2, 256, 256)
    for checkpoint, target, classes in (("demo", DEMO, ("",)), ("cells", CELLS, ("mono", "poly"))):
        names = [name for name in classes for _ in range(19)]
        photos = list(tiny_frames(len(names), 256, 256, seed=3))
        result = export_bundle(
            flowad_fast.load_checkpoint(checkpoint), Inversion(), folder / target, formats=("eager",), frames=frames,
            good=GoodParts(photos, names, [f"{i}.png" for i in range(len(names))]), alpha=0.05, quiet=True,
        )  # fmt: skip
        assert result.ok
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str, demo: Path) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs={"bundle": demo / DEMO})
    assert not failed


@pytest.mark.parametrize("name", ["Density", "Detection", "Detector", "Inversion", "Mismatch", "Reconstruction",
                                  "integrate", "load", "load_checkpoint", "save_checkpoint"])  # fmt: skip
def test_public_names_have_an_example(name: str) -> None:
    assert ">>>" in (inspect.getdoc(getattr(flowad_fast, name)) or "")


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("snippet", snippets(), ids=lambda text: text.splitlines()[0][:40])
def test_snippets_of_the_readme_run_after_the_demo(demo: Path, snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    missing = [link for link in LINK.findall(text) if "://" not in link and not (page.parent / link).exists()]
    for name in NAMED.findall(text):
        if not any((base / name).exists() for base in (ROOT, page.parent, ROOT / "flowad_fast", ROOT / "docs")):
            missing.append(name)
    assert not [name for name in missing if not MADE.fullmatch(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"`(?:PYTHON=\S+ )?make ([a-z-]+)", page.read_text(encoding="utf-8")))
    assert not named - targets


@pytest.mark.long
def test_api_pages_are_built_offline_and_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="pdoc is not installed; it comes with the extra dev")
    code = "import build, pathlib, sys; [build.build(pathlib.Path(folder)) for folder in sys.argv[1:]]"
    folders = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, "-c", code, *folders], check=True, cwd=ROOT / "docs", timeout=300)
    pages = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")} for folder in folders]
    assert pages[0] == pages[1]
    text = pages[0][Path("flowad_fast.html")].decode()
    assert all(f'id="{name}"' in text for name in flowad_fast.__all__)
    assert str(ROOT) not in text and not re.search(r"<(?:script|link)[^>]+https?://", text)
