"""How a process that runs for months keeps its memory: what parts took once stays for the parts to come."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
_LARGEST = 32 << 20
"""Bytes of a block that comes from the heap, not from the system; the most that glibc takes here."""
_NEVER = 1 << 30


def keep_heap() -> bool:
    """Let all threads that start from now on share one heap that is never given back; whether the C library can.

    Left to itself, glibc gives threads that meet in malloc a heap of their own, and returns what is free at the end of
    a heap to the system, to ask for it again with the next frame. The one lets memory creep for hours, at moments that
    the load decides; the other costs a page fault for every 4 KiB of every frame and map. With one heap that stays,
    memory is after minutes where it will be after hours: at what the most parts at a time took, which `capacity`
    bounds. The heap's lock is seldom contended, since nearly all allocations are made with Python's own lock held.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no such settings
    if mallopt is None:
        return False
    settings = {_ARENA_MAX: 1, _TRIM_THRESHOLD: _NEVER, _MMAP_THRESHOLD: _LARGEST}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
