"""How a process that runs for months keeps its memory flat: pictures are lent by the system, all else has one heap."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
"""Of glibc's malloc.h."""
_PICTURE = 128 << 10
"""Bytes from which a block comes from the system and goes back to it at once."""


def steady_heap() -> bool:
    """Let all threads that start from now on share one heap, without pictures; whether the C library can.

    Left to itself, glibc gives threads that meet in malloc a heap of their own, and from the first picture that is
    freed on it puts pictures among small objects, which keep their memory when they are gone: after every moment in
    which parts had to wait, a little more is taken for ever. So memory would creep for hours, at moments that the load
    decides. With these settings pictures come from the system. The heap's free end is given back before it is large
    enough for one, for malloc fills what is free before it asks the system, and small objects would then lie behind
    pictures. The price is a page fault for every 4 KiB of a picture. The heap's lock is seldom contended, since nearly
    all allocations are made with Python's own lock held.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has no such settings
    if mallopt is None:
        return False
    settings = {_ARENA_MAX: 1, _MMAP_THRESHOLD: _PICTURE, _TRIM_THRESHOLD: _PICTURE, _TOP_PAD: _PICTURE // 2}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
