"""What is in flight between host and GPU: streams, static and pinned buffers, and pieces of a batch on their way."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.aggregates import columns

KEPT = 4
"""Sets of result buffers that are kept for a frame size; callers that hold more get memory of their own."""


@dataclass(frozen=True)
class Outputs:
    """Results of up to B frames.

    Maps (B, S, S) and raw scores (B, ...) float32, the smallest and largest value of each frame (B,) uint8, and the sum
    of each map (B,) float32, which is finite where the map is.
    """

    maps: Tensor
    scores: Tensor
    low: Tensor
    high: Tensor
    total: Tensor

    @classmethod
    def make(cls, pipeline: ScoringPipeline, batch: int, device: torch.device, pinned: bool = False) -> "Outputs":
        """Zeroed; the score has one column per term where there are several."""
        size = pipeline.image.size

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=pinned)

        byte = torch.uint8
        return cls(
            zeros(batch, size, size),
            zeros(batch, *columns(pipeline.aggregate)),
            zeros(batch, dtype=byte),
            zeros(batch, dtype=byte),
            zeros(batch),
        )

    def rows(self, start: int, stop: int) -> "Outputs":
        """Views of some rows."""
        return Outputs(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def fill(self, other: "Outputs") -> None:
        """Queue a copy of all of another's values on the current stream."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name), non_blocking=True)


@dataclass(frozen=True)
class Buffers:
    """Inputs of up to B frames, uint8 (B, H, W, 3) and int64 (B,) or None, and their results."""

    frames: Tensor
    y: Tensor | None
    out: Outputs

    @classmethod
    def make(cls, pipeline: ScoringPipeline, batch: int, height: int, width: int, device: torch.device) -> "Buffers":
        """Zeroed buffers."""
        frames, y = inputs(pipeline, batch, height, width, device)
        return cls(frames, y, Outputs.make(pipeline, batch, device))

    def first(self, rows: int) -> "Buffers":
        """Views of the first rows."""
        return Buffers(self.frames[:rows], None if self.y is None else self.y[:rows], self.out.rows(0, rows))


def inputs(pipeline: ScoringPipeline, batch: int, height: int, width: int, device: torch.device,
           pinned: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Zeroed room for frames and, of conditional models, classes."""
    frames = torch.zeros(batch, height, width, 3, dtype=torch.uint8, device=device, pin_memory=pinned)
    if not pipeline.conditional:
        return frames, None
    return frames, torch.zeros(batch, dtype=torch.int64, device=device, pin_memory=pinned)


class Streams:
    """The engine's streams and graph memory pool; on the CPU all of them are absent and everything runs in order."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.compute, self.upload, self.download = (torch.cuda.Stream(device) if self.cuda else None for _ in range(3))
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def on(
        self, stream: "torch.cuda.Stream | None", after: "torch.cuda.Event | None" = None
    ) -> AbstractContextManager[object]:
        """Make `stream` current, after an event of another one."""
        if stream is None:
            return nullcontext()
        if after is not None:
            stream.wait_event(after)
        return torch.cuda.stream(stream)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """The compute stream, after what the caller's current stream holds; that one then waits for it."""
        if self.compute is None:
            yield
            return
        callers = torch.cuda.current_stream(self.compute.device)
        self.compute.wait_stream(callers)
        with torch.cuda.stream(self.compute):
            yield
        callers.wait_stream(self.compute)

    def event(self, stream: "torch.cuda.Stream | None") -> "torch.cuda.Event | None":
        """An event that marks the present end of `stream`."""
        return None if stream is None else stream.record_event()


class Step(Protocol):
    """One captured batch size: `replay` runs from static inputs to static outputs on the current stream."""

    buffers: Buffers

    def replay(self) -> None:
        """Fill the outputs."""


class Slot:
    """Pinned and device buffers of one piece in flight; `wait` before it is used again."""

    def __init__(self, pipeline: ScoringPipeline, batch: int, height: int, width: int, device: torch.device,
                 streams: Streams) -> None:  # fmt: skip
        self.streams = streams
        self.frames, self.y = inputs(pipeline, batch, height, width, torch.device("cpu"), pinned=streams.cuda)
        self.device = Buffers.make(pipeline, batch, height, width, device)
        self._done: torch.cuda.Event | None = None

    def submit(self, step: Step, frames: np.ndarray, y: np.ndarray | None, out: Outputs, alone: bool) -> None:
        """Queue upload, computation and download of a piece; `frames` has been read when this returns.

        Args:
            step: of the piece's bucket.
            frames: uint8 (B, H, W, 3).
            y: classes (B,) or None.
            out: room for the results on the host, valid after `wait`.
            alone: there is no other piece that could run beside the transfers: they go straight to and from the static
                buffers, on one stream.
        """
        streams, rows = self.streams, len(frames)
        device, static = self.device.first(rows), step.buffers.first(rows)
        pinned = self.frames[:rows], None if self.y is None else self.y[:rows]
        pinned[0].numpy()[:] = frames
        if pinned[1] is not None:
            pinned[1].numpy()[:] = y
        if alone:
            with streams.on(streams.compute):
                _copy(static, *pinned)
                step.replay()
                out.fill(static.out)
            self._done = streams.event(streams.compute)
            return
        with streams.on(streams.upload):
            _copy(device, *pinned)
        with streams.on(streams.compute, after=streams.event(streams.upload)):
            _copy(static, device.frames, device.y)
            step.replay()
            device.out.fill(static.out)
        with streams.on(streams.download, after=streams.event(streams.compute)):
            out.fill(device.out)
        self._done = streams.event(streams.download)

    def wait(self) -> None:
        """Wait until nothing of the slot is in flight."""
        if self._done is not None:
            self._done.synchronize()


def _copy(target: Buffers, frames: Tensor, y: Tensor | None) -> None:
    """Queue a copy of inputs on the current stream."""
    target.frames.copy_(frames, non_blocking=True)
    if target.y is not None and y is not None:
        target.y.copy_(y, non_blocking=True)


class Results:
    """Room for results on the host, pinned where there is a GPU, used again once nobody holds an array of it.

    A fresh array of a batch's maps costs more in page faults than the transfer that fills it. Whether somebody holds
    one is what CPython's reference counts say; arrays that are views of it count, too.
    """

    def __init__(self, pipeline: ScoringPipeline, pinned: bool) -> None:
        self._pipeline, self._pinned = pipeline, pinned
        self._kept: list[tuple[Outputs, list[np.ndarray]]] = []

    def take(self, rows: int) -> tuple[Outputs, list[np.ndarray]]:
        """Room for so many rows: as tensors to fill, and as arrays in the order of `Outputs` to give away."""
        for out, arrays in self._kept:
            if len(out.maps) >= rows and all(sys.getrefcount(arrays[i]) <= _UNHELD for i in range(len(arrays))):
                return out.rows(0, rows), [array[:rows] for array in arrays]
        out = Outputs.make(self._pipeline, rows, torch.device("cpu"), self._pinned)
        arrays = [tensor.numpy() for tensor in _tensors(out)]
        if len(self._kept) == KEPT:
            self._kept.pop(0)
        self._kept.append((out, arrays))
        return out, [array[:] for array in arrays]


def _tensors(out: Outputs) -> list[Tensor]:
    return [getattr(out, field.name) for field in fields(out)]


def _unheld() -> int:
    """What `sys.getrefcount` says of a list's element that nobody else holds."""
    alone = [np.empty(0)]
    return sys.getrefcount(alone[0])


_UNHELD = _unheld()
