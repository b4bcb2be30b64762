"""Makes a machine with a GPU and no package index ready for the check; what it lacks is said at once, before all else.

    python3 benchmarks/preflight.py [--wheels FOLDER] [--environment FOLDER]

A script of the standard library alone, since it runs where nothing of ours is installed; `make gpu-check` begins so.
It makes an environment beside the interpreter that runs it, whose packages that one sees: the image's torch stays where
it is, and nothing is installed into the system's Python, which may forbid it. Wheels come from a folder, the project as
an editable install. Exit codes: 0 ready, 3 something is missing, with a list and the command that fetches it.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "gpu"
EXIT_MISSING = 3
MANYLINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
"""Platforms of wheels, which pip takes as they are written."""


@dataclass(frozen=True)
class Need:
    """A distribution that importing or installing the check needs, its module, and the least version.

    `image` marks what belongs to the machine's image and its GPU: gigabytes that nobody carries as wheels.
    """

    name: str
    module: str
    least: str = "0"
    image: bool = False

    @property
    def asked(self) -> str:
        """As pip takes it."""
        return self.name if self.least == "0" else f"{self.name}>={self.least}"


NEEDS = (
    Need("pip", "pip"),
    Need("setuptools", "setuptools", "77"),
    Need("torch", "torch", "2.10", image=True),
    Need("triton", "triton", "3", image=True),
    Need("torchvision", "torchvision", "0.25", image=True),
    Need("timm", "timm", "1.0.15"),
    Need("numpy", "numpy", "2"),
    Need("pydantic", "pydantic", "2.8"),
    Need("pydantic-core", "pydantic_core"),
    Need("annotated-types", "annotated_types"),
    Need("typing-inspection", "typing_inspection"),
    Need("typing-extensions", "typing_extensions"),
    Need("typer", "typer", "0.15"),
    Need("rich", "rich", "13"),
    Need("pillow", "PIL"),
    Need("pyyaml", "yaml", "6"),
    Need("filelock", "filelock", "3.16"),
    Need("psutil", "psutil", "6"),
    Need("safetensors", "safetensors", "0.5"),
)
"""What importing the check takes, found by tracing it; with less than this nothing runs."""
WANTED = {
    "pytest": "the GPU tests are not run",
    "pytest-xdist": "the GPU tests run one after the other",
    "nvidia-ml-py": "the record has no clocks, power and throttle reasons of the GPU",
}
"""What the check does without, and what it then leaves out."""


def version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def reaches(found: str, least: str) -> bool:
    """Whether a version is at least another one, by its leading numbers."""
    have, want = ([int(number) for number in re.findall(r"\d+", text)[:3]] for text in (found, least))
    return have >= want


def lack(need: Need) -> str | None:
    """What is wrong with what is installed, None when it will do."""
    found = version(need.name)
    if found is None:
        return None if importlib.util.find_spec(need.module) and need.least == "0" else "is not installed"
    if not reaches(found, need.least):
        return f"is installed as {found}, {need.least} is needed"
    return (
        None
        if importlib.util.find_spec(need.module)
        else f"{found} is registered, its module {need.module} is not there"
    )


@dataclass(frozen=True)
class Wheel:
    """A wheel in a folder, by its file's name."""

    name: str
    version: str
    python: str
    abi: str
    system: str

    @classmethod
    def of(cls, path: Path) -> "Wheel":
        """Read the name."""
        name, found, *_, python, abi, system = path.stem.split("-")
        return cls(re.sub(r"[-_.]+", "-", name).lower(), found, python, abi, system)

    def fits(self) -> bool:
        """Whether this interpreter on this machine can install it."""
        minor = sys.version_info.minor
        stable = self.abi == "abi3" and any(int(one) <= minor for one in re.findall(r"cp3(\d+)", self.python))
        python = {"py3", f"cp3{minor}"} & set(self.python.split(".")) or stable
        return bool(python) and ("any" in self.system or platform.machine() in self.system)


def wheels_in(folder: Path) -> dict[str, Wheel]:
    """Wheels by distribution; of several of one, one that fits."""
    found = [Wheel.of(path) for path in sorted(folder.glob("*.whl"))]
    return {one.name: one for one in sorted(found, key=Wheel.fits)}


def missing(wheels: dict[str, Wheel]) -> tuple[dict[Need, str], list[Need]]:
    """What neither this Python has nor the wheels bring, with what is wrong, and what the wheels do bring."""
    absent, brought = {}, []
    for need in NEEDS:
        problem, wheel = lack(need), wheels.get(need.name)
        if problem is None:
            continue
        if wheel is None:
            absent[need] = problem
        elif not wheel.fits():
            tags = f"{wheel.python}-{wheel.abi}-{wheel.system}"
            absent[need] = f"{problem}; the wheel {wheel.version} is for {tags}, not for this machine"
        elif not reaches(wheel.version, need.least):
            absent[need] = f"{problem}; the wheel is {wheel.version}, {need.least} is needed"
        else:
            brought.append(need)
    return absent, brought


def message(absent: dict[Need, str], folder: Path | None) -> str:
    """All that is missing, and what to do about it."""
    python = f"Python {platform.python_version()} at {sys.executable}"
    lines = [f"{python} lacks {len(absent)} of the {len(NEEDS)} packages that the GPU check needs:"]
    lines += [f"  {need.asked}: {problem}" for need, problem in absent.items()]
    if any(need.image for need in absent):
        images = ", ".join(need.name for need in NEEDS if need.image)
        lines.append(f"{images} come with the machine's image: choose the interpreter that has them, with PYTHON=...")
    carried = [need.asked for need in absent if not need.image]
    if carried:
        target = "wheels" if folder is None else str(folder)
        systems = [f"--platform={one}_{platform.machine()}" for one in MANYLINUX]
        command = [
            "python3", "-m", "pip", "download", "--only-binary=:all:", "--implementation=cp",
            f"--python-version={sys.version_info.major}.{sys.version_info.minor}", *systems, "-d", target, *carried,
        ]  # fmt: skip
        lines += ["Fetch wheels where an index can be reached, bring the folder here, and name it:"]
        lines += [f"  {shlex.join(command)}", f"  make gpu-check WHEELS={target}"]
    return "\n".join(lines)


def make_environment(folder: Path) -> Path:
    """An environment in which this interpreter's packages are found after its own; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        text=True,
        capture_output=True,
    ).stdout.strip()
    # A virtual environment of a virtual environment would see the system's packages, not ours.
    seen = [os.path.abspath(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in seen]
    (Path(own) / "_packages_of_the_image.pth").write_text("".join(lines))
    return python


def install(python: Path, brought: list[Need], folder: Path | None) -> str | None:
    """Install the wheels and the project, without an index; what went wrong, None if nothing did."""
    offline = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check"]
    commands = [[*offline, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]]
    if brought:
        commands.insert(0, [*offline, "--find-links", str(folder), *(need.asked for need in brought)])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            return f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return None


def unimportable(python: Path) -> str | None:
    """Why the check cannot be imported there, None if it can."""
    code = "import flowad_fast.benchmarks.gpu_check"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor)
    return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1] if done.returncode else None


def main() -> int:
    """See the module; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a machine ready for the GPU check, without a package index.")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that are missing here")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where to make it [default: build/gpu]")
    given = parser.parse_args()
    folder = given.wheels.resolve() if given.wheels else None
    if folder is not None and not folder.is_dir():
        print(f"--wheels {given.wheels}: there is no such folder", file=sys.stderr)
        return EXIT_MISSING
    absent, brought = missing(wheels_in(folder) if folder else {})
    if absent:
        print(message(absent, given.wheels), file=sys.stderr)
        return EXIT_MISSING
    for name, lost in WANTED.items():
        if version(name) is None:
            print(f"note: {name} is not installed: {lost}", file=sys.stderr)
    python = make_environment(given.environment.resolve())
    problem = install(python, brought, folder)
    if problem is None:
        why = unimportable(python)
        problem = why and f"the check cannot be imported: {why}"
    if problem is not None:
        print(problem, file=sys.stderr)
        return EXIT_MISSING
    print(f"ready: {python}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
