"""Peak memory of this process: resident set on the CPU, allocator and driver figures on a GPU."""

import os
import resource
from pathlib import Path
from typing import Any

import psutil
import torch

from flowad_fast.benchmarks.measure import nvml

MB = 1e6
SPARE = 1 << 30
"""Memory that a CPU case must leave to the rest of the machine, in bytes."""


def limit_to_available() -> int:
    """Make allocations beyond the memory that is free now fail in this process, instead of ending another one.

    Returns:
        Bytes that this process may still allocate.
    """
    allowed = max(psutil.virtual_memory().available - SPARE, SPARE)
    used = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    return allowed


class PeakMemory:
    """The peak since it was made, above the level that it found."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Linux restarts the peak counter; elsewhere the figure would include loading, so it is not given.
        self.resettable = Path("/proc/self/clear_refs").exists()
        if self.resettable:
            Path("/proc/self/clear_refs").write_text("5")
        self.idle = psutil.Process().memory_info().rss
        if device.type == "cuda":
            # What loading has left in the allocator's cache is not the engine's.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.allocated = torch.cuda.memory_allocated(device)

    def read(self) -> dict[str, float | str | None]:
        """Megabytes (1e6 bytes): the process's resident set, and on a GPU the allocator's and the driver's figures."""
        peak = _status("VmHWM") if self.resettable else None
        figures: dict[str, float | str | None] = {
            "method": "VmHWM since the model was loaded" if self.resettable else "not measured: needs Linux's /proc",
            "idle": round(self.idle / MB, 1),
            "peak": None if peak is None else round(peak / MB, 1),
            "above_idle": None if peak is None else round(max(peak - self.idle, 0) / MB, 1),
        }
        if self.device.type == "cuda":
            used = nvml.process_memory(os.getpid())
            figures |= {
                "allocator_idle": round(self.allocated / MB, 1),
                "allocator_peak": round(torch.cuda.max_memory_allocated(self.device) / MB, 1),
                "allocator_reserved": round(torch.cuda.max_memory_reserved(self.device) / MB, 1),
                "nvml_process": None if used is None else round(used / MB, 1),
            }
        return figures


def footprint(memory: dict[str, Any]) -> float | None:
    """The figure that rows are compared by, MB: the allocator's peak on a GPU, else the resident peak above idle."""
    return memory["allocator_peak"] if "allocator_peak" in memory else memory["above_idle"]


def whole(memory: dict[str, Any]) -> float | None:
    """What a published figure would be compared with, MB, weights included: the allocator's peak or the process's."""
    return memory["allocator_peak"] if "allocator_peak" in memory else memory["peak"]


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")
