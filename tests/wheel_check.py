"""Run by `make wheel-test` outside the checkout, and by `make release` in it.

full     every extra is installed: the wheel and the sdist hold what they should, and every module imports
light    the base dependencies alone: a bundle that `full` has exported gives the same verdicts, without torch
ready    the changelog has a section for this version
release  what to type to publish what lies in dist/
"""

import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np

HERE = Path.cwd()
BUNDLE, PARTS, EXPECTED = HERE / "bundle", HERE / "parts", HERE / "expected.npz"
LIMIT = 300e6
"""Bytes of an environment with the base dependencies."""
ABSENT = ("torch", "torchvision", "timm", "onnx", "scipy", "sklearn", "matplotlib")


def check_files() -> None:
    """The wheel installs nothing but the package, without generated results; the sdist holds what the wheel does."""
    (wheel,), (sdist,) = HERE.glob("*.whl"), HERE.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"flowad_fast", next(t for t in tops if t.endswith(".dist-info"))}, f"the wheel installs {tops}"
    for needed in ("py.typed", "assets/demo.safetensors", "assets/demo.json", "kernels/reference.py", "export/cli.py"):
        assert f"flowad_fast/{needed}" in names, f"{needed} is not in the wheel"
    assert [name for name in names if name.endswith(".j2")], "the report's template is not in the wheel"
    unwanted = [name for name in names if "/results/" in name or "/tests/" in name]
    assert not unwanted, f"the wheel holds {unwanted}"
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    lacking = {name for name in names if name.startswith("flowad_fast/")} - sources
    assert not lacking, f"the sdist lacks {sorted(lacking)}"
    assert {"pyproject.toml", "README.md", "LICENSE"} <= sources
    assert not [name for name in sources if "/results/" in name]
    print(f"files ok: wheel {wheel.stat().st_size / 1e6:.1f} MB, sdist {sdist.stat().st_size / 1e6:.1f} MB")


def check_modules() -> None:
    """Every module imports, from the wheel; no folder of the checkout is importable under its own name."""
    import flowad_fast

    site = HERE / "site"
    assert Path(flowad_fast.__file__).is_relative_to(site), f"imported {flowad_fast.__file__}, not the wheel in {site}"
    assert "torch" not in sys.modules, "importing flowad_fast must not import torch"
    for generic in ("kernels", "export", "benchmarks"):
        assert importlib.util.find_spec(generic) is None, f"{generic} is importable as a global name"
    modules = [m.name for m in pkgutil.walk_packages(flowad_fast.__path__, "flowad_fast.")]
    for name in modules:
        module = importlib.import_module(name)
        assert Path(module.__file__ or "").is_relative_to(site), f"{name} came from {module.__file__}"
    assert {"flowad_fast.kernels.reference", "flowad_fast.export.cli", "flowad_fast.benchmarks.cli"} <= set(modules)
    assert flowad_fast.load_checkpoint("demo").config.channels == 192
    print(f"modules ok: {len(modules)}")


def parts() -> np.ndarray:
    """Frames (20, 96, 96, 3): smooth gradients plus noise, and a black one."""
    random = np.random.RandomState(3)
    ramp = np.linspace(30, 200, 96)
    frames = ramp[None, :, None, None] + random.uniform(-20, 20, (20, 1, 96, 3)) + random.normal(0, 4, (20, 96, 96, 3))
    frames[-1] = 0
    return frames.clip(0, 255).astype(np.uint8)


def export_and_judge() -> None:
    """A calibrated ONNX bundle of the demo model, a folder of parts, and what this environment says of them."""
    from PIL import Image

    import flowad_fast

    good, few = HERE / "good", HERE / "few"
    for folder in (good, few, PARTS):
        folder.mkdir(exist_ok=True)
    for i, frame in enumerate(parts()):
        Image.fromarray(frame).save(PARTS / f"{i:02}.png")
        for folder, count in ((good, 9), (few, 3)):
            if i < count:
                Image.fromarray(frame).save(folder / f"{i:02}.png")
    command = ["make", "demo", "--scorer", "inversion", "--steps", "2", "--format", "onnx", "--output", str(BUNDLE)]
    command += ["--calibrate", str(good), "--alpha", "0.1", "--data", str(few)]
    subprocess.run([sys.executable, "-m", "flowad_fast.export.cli", *command], check=True, stdout=subprocess.DEVNULL)
    detection = flowad_fast.load(BUNDLE, device="cpu")(parts())
    np.savez(EXPECTED, score=detection.score, map=detection.map, verdict=np.array(detection.verdict, str))
    print(f"bundle ok: {', '.join(sorted(set(map(str, detection.verdict))))}")


def check_verdicts() -> None:
    """The light environment loads the bundle and says what the full one said."""
    import flowad_fast

    present = [name for name in ABSENT if importlib.util.find_spec(name)]
    assert not present, f"the light environment has {present}"
    assert not Path(flowad_fast.__file__).is_relative_to(HERE), f"imported {flowad_fast.__file__}"
    detection = flowad_fast.load(BUNDLE)(parts())
    foreign = sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)
    print(f"imported by load and a call: {', '.join(name for name in foreign if not name.startswith('_'))}")
    expected = np.load(EXPECTED)
    assert [str(verdict) for verdict in detection.verdict] == expected["verdict"].tolist()
    for name in ("score", "map"):
        got = getattr(detection, name)
        error = np.abs(got - expected[name]).max() / np.abs(expected[name]).max()
        assert error <= 1e-6, f"{name} differs by {error:.1e}"
    print(f"verdicts ok: {detection.engine}")


def check_commands() -> None:
    """`flowad-inspect` and what one does with a bundle work; what needs torch says in one line what to install."""
    bin = Path(sys.executable).parent

    def run(*command: str, code: int = 0) -> str:
        done = subprocess.run([bin / command[0], *command[1:]], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    results = HERE / "inspection.jsonl"
    run("flowad-inspect", str(BUNDLE), str(PARTS), "--format", "jsonl", "--output", str(results), "--restart")
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [row["status"] for row in rows] == np.load(EXPECTED)["verdict"].tolist()
    before = (BUNDLE / "manifest.json").read_text(encoding="utf-8")
    for command in ("show", "verify"):
        run("flowad-export", command, str(BUNDLE))
    run("flowad-export", "calibrate", str(BUNDLE), str(HERE / "good"), "--alpha", "0.1")
    assert json.loads(before) == json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    for command, extra in (
        (("flowad-export", "make", "demo", "--output", str(HERE / "never")), "model"),
        (("flowad-train", "--layout", "folder", "--data", str(PARTS), "--output", str(HERE / "never")), "train"),
    ):
        said = run(*command, code=1)
        assert f'pip install "flowad-fast[{extra}]"' in said and said.count("\n") == 1, said
    print("commands ok")


def check_size() -> None:
    """The whole environment, pip included."""
    size = sum(path.lstat().st_size for path in Path(sys.prefix).rglob("*") if path.is_file() and not path.is_symlink())
    assert size <= LIMIT, f"the light environment takes {size / 1e6:.0f} MB, more than {LIMIT / 1e6:.0f}"
    print(f"size ok: {size / 1e6:.0f} MB")


def newest() -> tuple[str, str]:
    """The version, and the section of the changelog about it; ends with a message where that is not written."""
    version = importlib.import_module("flowad_fast").__version__
    title, _, text = (HERE / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1].partition("\n")
    if version not in title or "nreleased" in title:
        sys.exit(f"CHANGELOG.md: the first section is {title!r}; name it {version} with the date, and commit that")
    return version, text.strip()


def tag_text() -> None:
    """The commands that publish dist/, with the newest section of the changelog as the tag's text."""
    version, text = newest()
    print(f"git tag -a v{version} -F - <<'END'\nflowad-fast {version}\n\n{text}\nEND")
    print(f"git push origin v{version}")
    print("twine upload " + " ".join(str(path) for path in sorted((HERE / "dist").iterdir())))


PARTS_OF = {
    "full": (check_files, check_modules, export_and_judge),
    "light": (check_verdicts, check_commands, check_size),
    "ready": (newest,),
    "release": (tag_text,),
}

if __name__ == "__main__":
    for part in PARTS_OF[sys.argv[1]]:
        part()
