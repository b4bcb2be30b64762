"""How long a call takes on a GPU: captured and replayed, as the engine's own graph will run it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Clock = Callable[[Callable[[], object]], float]
"""Microseconds of a call."""
REPEATS = 10
_WARM_UP = 2


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside: in a capture it could free another graph or a tensor, which CUDA forbids there."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def graph_clock(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median microseconds of a call, captured and replayed: launches cost there what they cost in the engine's graph.

    What `run` reads may have been made on the caller's current stream.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    stream.synchronize()
    # Other threads may go on using the GPU, hence the thread's own error mode.
    with no_collection(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    times: list[float] = []
    with torch.cuda.stream(stream):
        for _ in range(repeats + _WARM_UP):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times[_WARM_UP:])[repeats // 2]
