"""How much memory a process that runs for months keeps: one heap of the C library instead of one for each thread."""

import ctypes
import sys

_ARENA_MAX = -8
"""M_ARENA_MAX of glibc's malloc.h."""


def one_heap() -> bool:
    """Let all threads that start from now on share the process's heap; whether the C library can.

    glibc gives a thread a heap of its own as soon as it meets another thread in malloc. A line's threads pass frames
    and records on, so each of those heaps grows, at moments that the load decides, to what all threads together need,
    and is never given up: memory creeps for hours. With one heap it is where it will be after minutes. Its lock is
    seldom contended, since nearly all allocations are made with Python's own lock held.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no such settings, and one heap
    return mallopt is not None and mallopt(_ARENA_MAX, 1) == 1
