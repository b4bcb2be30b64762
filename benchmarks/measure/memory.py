"""Peak memory of this process: resident set on the CPU, allocator and driver figures on a GPU."""

import os
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
    """The peak since it was made, or since `restart`, above the level that it found.

    `kept` are bytes on the GPU that belong to the process and not to what is measured: they are taken off.
    """

    def __init__(self, device: torch.device, kept: int = 0) -> None:
        self.device, self.kept = device, kept
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

    def restart(self) -> None:
        """Leave out what preparing took on a GPU: warm-up calls, and operands of products that were measured."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

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
        graphs = held_by_graphs(torch.cuda.memory_snapshot())
        less = f", less {self.kept / MB:.0f} MB that the process keeps for its next rows" if self.kept else ""
        return found.but(
            method=f"{found.method}; GPU: the allocator's since it was prepared, captured graphs included{less}",
            allocator_idle=round((self.allocated - self.kept) / MB, 1),
            allocator_peak=round((torch.cuda.max_memory_allocated(self.device) + graphs - self.kept) / MB, 1),
            allocator_reserved=round((torch.cuda.max_memory_reserved(self.device) - self.kept) / MB, 1),
            nvml_process=None if used is None else round((used - self.kept) / MB, 1),
        )


def held_by_graphs(segments: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of captured graphs' pools, in `torch.cuda.memory_snapshot`, that no tensor names any more.

    A graph writes its intermediate results there whenever it is replayed, unseen by the allocator's peak.
    """
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")
