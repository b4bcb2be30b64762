"""How a process that runs for months keeps its memory flat: pictures are lent by the system, all else has one heap."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
_PICTURE = 128 << 10
"""Bytes from which a block comes from the system and goes back to it at once."""
_NEVER = 1 << 30


def steady_heap() -> bool:
    """Let all threads that start from now on share one heap, without pictures; whether the C library can.

    Left to itself, glibc gives threads that meet in malloc a heap of their own, and from the first picture that is
    freed on it puts pictures among small objects, which keep their memory when they are gone: after every moment in
    which parts had to wait, a little more is taken for ever. So memory would creep for hours, at moments that the load
    decides. With these settings it is what small objects need, which is known after minutes, and the pictures of the
    parts that are there. The price is a page fault for every 4 KiB of a picture. The heap's lock is seldom contended,
    since nearly all allocations are made with Python's own lock held.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no such settings
    if mallopt is None:
        return False
    settings = {_ARENA_MAX: 1, _TRIM_THRESHOLD: _NEVER, _MMAP_THRESHOLD: _PICTURE}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
