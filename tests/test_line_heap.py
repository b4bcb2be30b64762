"""One heap for all threads of a line's process, which it keeps: by what the C library and the system say."""

import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, threading
import numpy as np
from flowad_fast.line.heap import keep_heap

if sys.argv[1] == "one":
    assert keep_heap()
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


FRAMES = """
import resource, sys
import numpy as np
from flowad_fast.line.heap import keep_heap

if sys.argv[1] == "one":
    assert keep_heap()
frame, heat, faults = np.zeros((256, 256, 3), np.uint8), np.zeros((256, 256), np.float32), []
for _ in range(60):
    both = frame.copy(), heat.copy()
    del both
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[9])
"""


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")


def run(script: str, mode: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, with one heap that is kept, or left to itself."""
    done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_threads_share_one_heap() -> None:
    one, own = (run(THREADS, mode).stderr.count("Arena ") for mode in ("one", "own"))
    if not own:
        pytest.skip("this C library is not glibc: no malloc_stats")
    assert one == 1 < own


def test_frames_take_the_memory_of_those_before() -> None:
    one, own = (int(run(FRAMES, mode).stdout) for mode in ("one", "own"))
    if own < 500:
        pytest.skip("this C library keeps memory by itself")
    assert one < 100
