"""How many CPU threads an engine takes: what was asked for, otherwise what this process may use.

Libraries start as many threads as the machine has cores. In a container that may use fewer, the surplus only waits:
the kernel stops all of them once their common share is used up.
"""

import math
import os
import sys
from pathlib import Path

from flowad_fast.errors import EngineUnavailableError

ROOT = Path("/")
"""Where /proc and /sys are."""


def available_cores(root: Path | None = None) -> int:
    """Cores that this process may use: those it may run on, and no more than its control groups' CPU quota, rounded up.

    Args:
        root: where `proc` and `sys` are, `ROOT` by default.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root or ROOT))]))


def limit(threads: int | None, variables: tuple[str, ...] = ("OMP_NUM_THREADS",)) -> int | None:
    """The number of threads for an engine, None where its library's own choice is right.

    Args:
        threads: what the caller asked for, None for nothing.
        variables: of the environment; the first that holds a number counts where the caller asked for nothing.

    Returns:
        What was asked for, else the variable's, else the available cores where they are fewer than the machine has.

    Raises:
        EngineUnavailableError: `threads` is no positive number.
    """
    if threads is not None:
        if threads < 1:
            raise EngineUnavailableError(f"threads is {threads}; expected 1 or more, or None for all available cores")
        return threads
    for name in variables:
        first = os.environ.get(name, "").split(",")[0].strip()  # OpenMP allows a list, by depth of nesting
        if first.isdecimal() and int(first):
            return int(first)
    cores = available_cores()
    return cores if cores < (os.cpu_count() or 1) else None


def bind_torch(threads: int | None) -> None:
    """Hold torch, OpenMP included, to a number of threads; each thread that uses torch calls it.

    The number belongs to the process, and is changed only where it differs. Without one that was asked for, torch's
    own is lowered to what is available, never raised.
    """
    import torch

    wanted = limit(threads)
    now = torch.get_num_threads()
    if wanted is not None and (wanted < now if threads is None else wanted != now):
        torch.set_num_threads(wanted)


def limit_process(threads: int | None) -> int | None:
    """Make `threads` what engines that are started without a number take; for commands, before torch is imported."""
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.pop("ORT_INTRA_OP_NUM_THREADS", None)
        if "torch" in sys.modules:
            bind_torch(threads)
    return threads


def _quotas(root: Path) -> list[float]:
    """The CPU quotas, in cores, of this process's control groups and of all groups above them."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "-", "")
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        for mount in ("cgroup", "cgroup/unified") if not controllers else (f"cgroup/{controllers}", "cgroup/cpu"):
            top = root / "sys/fs" / mount
            inner = [part for part in path.split("/") if part not in ("", "..")]
            # A container may see the host's path here while its own group is the top of the mount.
            for depth in range(len(inner), -1, -1):
                quota = _quota(top.joinpath(*inner[:depth]), version=1 if controllers else 2)
                if quota is not None:
                    found.append(quota)
    return found


def _quota(group: Path, version: int) -> float | None:
    if version == 2:
        numbers = _text(group / "cpu.max").split()
    else:
        numbers = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(numbers) != 2 or not all(n.isdecimal() and int(n) for n in numbers):  # "max", -1: no quota
        return None
    return int(numbers[0]) / int(numbers[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
