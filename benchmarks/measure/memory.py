"""Peak memory of this process: resident set on the CPU, allocator and driver figures on a GPU."""

import os
import resource
from pathlib import Path

import psutil
import torch

from flowad_fast.benchmarks.measure import nvml
from flowad_fast.benchmarks.record.record import Memory

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

    def read(self) -> Memory:
        """What the process has taken since."""
        peak = _status("VmHWM") if self.resettable else None
        found = Memory(
            method="VmHWM since the model was loaded" if self.resettable else "not measured: needs Linux's /proc",
            idle=round(self.idle / MB, 1),
            peak=None if peak is None else round(peak / MB, 1),
            above_idle=None if peak is None else round(max(peak - self.idle, 0) / MB, 1),
        )
        if self.device.type != "cuda":
            return found
        used = nvml.process_memory(os.getpid())
        return found.but(
            allocator_idle=round(self.allocated / MB, 1),
            allocator_peak=round(torch.cuda.max_memory_allocated(self.device) / MB, 1),
            allocator_reserved=round(torch.cuda.max_memory_reserved(self.device) / MB, 1),
            nvml_process=None if used is None else round(used / MB, 1),
        )


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")
