"""Which of the CPU's instructions an int8 graph lives on: those that multiply and add bytes in one step."""

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NOTED = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
"""What a manifest says of a CPU, in the kernel's spelling."""
FAST = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
"""One of these is needed for int8 to be faster than float32."""


def cpu_flags(cpuinfo: Path | None = None) -> tuple[str, ...] | None:
    """Those of `NOTED` that this CPU has; None where the system does not tell (it is no Linux)."""
    try:
        lines = (cpuinfo or CPUINFO).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    told = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    return tuple(name for name in NOTED if name in set.intersection(*told)) if told else None


def cpu_name(cpuinfo: Path | None = None) -> str:
    """The CPU's name, or its architecture where the system has no name for it."""
    try:
        lines = (cpuinfo or CPUINFO).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def worth(flags: tuple[str, ...] | None) -> str:
    """In words, whether int8 pays on a CPU of these flags."""
    if flags is None:
        return "whether int8 pays is not known here: the system does not name the CPU's instructions"
    fast = [name for name in FAST if name in flags]
    if fast:
        return f"int8 may pay: the CPU has {', '.join(fast)}"
    return "int8 does not pay: the CPU has neither VNNI nor AMX; fp32 is as fast or faster"
