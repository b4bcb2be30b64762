"""One heap for all threads of a line's process, by what the C library itself says."""

import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, threading
import numpy as np
from flowad_fast.line.heap import one_heap

if sys.argv[1] == "one":
    assert one_heap()
meet = threading.Barrier(4)

def work():
    libc = ctypes.CDLL(None)  # its calls leave Python's lock, so that threads meet in malloc
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    meet.wait()
    for _ in range(200):
        libc.free(libc.malloc(50_000))

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_threads_share_one_heap() -> None:
    found = {}
    for mode in ("one", "own"):
        done = subprocess.run([sys.executable, "-c", THREADS, mode], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found[mode] = done.stderr.count("Arena ")
    if not found["own"]:
        pytest.skip("this C library is not glibc: no malloc_stats")
    assert found["one"] == 1 < found["own"]
