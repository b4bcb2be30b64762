"""The machine and the versions that a result holds for."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import flowad_fast
from flowad_fast.benchmarks.measure import nvml
from flowad_fast.benchmarks.record.machine import Environment, Moment

PACKAGES = ("torch", "torchvision", "triton", "timm", "numpy", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx")


def environment(before: Moment, **more: Any) -> Environment:
    """Versions, commit, CPU, memory and GPU, and what went on `before` and now; `more` as `Environment` has it."""
    cuda = torch.cuda.is_available()
    return Environment(
        project=flowad_fast.__version__,
        commit=commit(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        gpu=torch.cuda.get_device_name() if cuda else None,
        gpu_count=torch.cuda.device_count() if cuda else 0,
        cuda=torch.version.cuda if cuda else None,
        compute_capability=torch.cuda.get_device_capability() if cuda else None,
        command=command(sys.argv[0], sys.argv[1:]),
        before=before,
        after=moment(),
        **more,
    )


def command(program: str, arguments: Sequence[str]) -> str:
    """The command line for a record; of absolute paths the last part only, since records are published."""
    path = Path(program)
    _, found, inside = path.as_posix().rpartition("/benchmarks/")
    module = ".".join(Path(inside if found else path.name).with_suffix("").parts).removesuffix(".__main__")
    name = f"python -m flowad_fast.benchmarks.{module}" if path.suffix == ".py" else "flowad-bench"
    return " ".join([name, *(Path(a).name if Path(a).is_absolute() else a for a in arguments)])


def moment() -> Moment:
    """What may disturb a measurement, now: load average, and the GPU's clocks, power and throttle reasons."""
    return Moment(load_average=tuple(round(v, 2) for v in os.getloadavg()), gpu=nvml.state())


def commit() -> str | None:
    """The checkout's commit, with `+` where files differ from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=folder, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
