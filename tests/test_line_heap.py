"""One heap for all threads of a line's process, and pictures apart: by what the C library and the system say."""

import subprocess
import sys

import pytest

THREADS = """
import ctypes, sys, threading
import numpy as np
from flowad_fast.line.heap import steady_heap

if sys.argv[1] == "one":
    assert steady_heap()
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
import sys
import numpy as np
import psutil
from flowad_fast.line.heap import steady_heap

if sys.argv[1] == "one":
    assert steady_heap()

def taken():
    return psutil.Process().memory_info().rss

np.ones((256, 256, 3), np.uint8)  # the first that is freed; from here on glibc's own limit is above it
before = taken()
frames, small = [], []
for _ in range(40):
    frames.append(np.ones((256, 256, 3), np.uint8))
    small.append(bytes(2000))
waiting = taken()
frames.clear()
print(waiting - before, taken() - before)
"""

HOLES = """
import random, sys
import numpy as np
import psutil
from flowad_fast.line.heap import steady_heap

if sys.argv[1] == "one":
    assert steady_heap()
draw, kept = random.Random(0), [None] * 24

def turn(i):
    frames = [np.ones((256, 256, 3), np.uint8) for _ in range(30 if i % 50 == 0 else draw.choice((1, 1, 2, 4)))]
    small = [bytes(draw.randint(2000, 60_000)) for _ in range(draw.randint(1, 60))]
    if draw.random() < 0.5:
        kept[i % 24] = frames[0].copy()

def taken():
    return min(psutil.Process().memory_info().rss for _ in map(turn, range(20)))

[taken() for _ in range(20)]
first = [taken() for _ in range(20)]
last = [taken() for _ in range(130)][-20:]
print(min(last) - min(first))
"""


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")


def run(script: str, mode: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, with a steady heap, or left to itself."""
    done = subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_threads_share_one_heap() -> None:
    one, own = (run(THREADS, mode).stderr.count("Arena ") for mode in ("one", "own"))
    if not own:
        pytest.skip("this C library is not glibc: no malloc_stats")
    assert one == 1 < own


def test_pictures_that_stay_while_small_things_come_and_go_make_no_heap_grow() -> None:
    """The end of the heap is never large enough for a picture, which small things would then lie behind."""
    assert int(run(HOLES, "one").stdout) < 5e5


def test_the_memory_of_frames_that_had_to_wait_goes_back() -> None:
    one, own = ([int(size) for size in run(FRAMES, mode).stdout.split()] for mode in ("one", "own"))
    if own[1] < 4e6:
        pytest.skip("this C library gives it back by itself")
    assert one[0] > 6e6, "40 frames of 196,608 bytes"
    assert one[1] < 5e5
