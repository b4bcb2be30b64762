"""The cudagraph engine: everything from uint8 frames to map and score as one captured CUDA graph a batch bucket.

A batch is cut into pieces of at most the largest bucket, each padded up to the next bucket; padding never shows in
results. All buckets replay on the same static input and output buffers and share one memory pool. Two slots of pinned
host and device buffers let the transfers of one piece run beside the computation of another.

`CudaGraphStep` is all that knows about graphs. With `DirectStep` in its place the same engine calls the pipeline
directly, on any device, which is how bucketing, padding and buffering are tested without a GPU.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowad_fast.engines import Engine
from flowad_fast.engines.attention import AttentionChoice, choose_attention
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.memory import out_of_memory
from flowad_fast.engines.precision import arithmetic, check_precision
from flowad_fast.engines.products import ProductChoice, choose_products
from flowad_fast.engines.timing import no_collection
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.aggregates import columns
from flowad_fast.stages.arithmetic import NUMBERS
from flowad_fast.stages.velocity import TabledDiT

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that are captured."""
FRAME_SIZES = 4
"""Captures are made for one frame size; those of this many sizes are kept, the least recently used goes first."""
WARM_UP = 2
"""Calls before a capture, in which libraries allocate workspaces and choose algorithms."""


@dataclass(frozen=True)
class Piece:
    """`take` frames from index `start` on, run in the bucket of `bucket` rows."""

    start: int
    take: int
    bucket: int


def cut(batch: int, buckets: tuple[int, ...]) -> list[Piece]:
    """A batch in pieces, each in the smallest bucket that holds it; `buckets` ascend."""
    pieces = []
    for start in range(0, batch, buckets[-1]):
        take = min(batch - start, buckets[-1])
        pieces.append(Piece(start, take, next(bucket for bucket in buckets if bucket >= take)))
    return pieces


@dataclass(frozen=True)
class Buffers:
    """Inputs and outputs of up to B frames: uint8 (B, H, W, 3), int64 (B,) or None, float32 (B, S, S) and (B, ...)."""

    frames: Tensor
    y: Tensor | None
    maps: Tensor
    scores: Tensor

    @classmethod
    def make(cls, pipeline: ScoringPipeline, batch: int, height: int, width: int, device: torch.device,
             pinned: bool = False) -> "Buffers":  # fmt: skip
        """Zeroed buffers; the score has one column per term where there are several."""
        size = pipeline.image.size

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device, pin_memory=pinned)

        return cls(
            zeros(batch, height, width, 3, dtype=torch.uint8),
            zeros(batch, dtype=torch.int64) if pipeline.conditional else None,
            zeros(batch, size, size),
            zeros(batch, *columns(pipeline.aggregate)),
        )

    def first(self, rows: int) -> "Buffers":
        """Views of the first rows."""
        return Buffers(
            self.frames[:rows], None if self.y is None else self.y[:rows], self.maps[:rows], self.scores[:rows]
        )


class DirectStep:
    """One bucket: `replay` runs the pipeline from static inputs to static outputs, here by calling it."""

    needs_gpu = False

    def __init__(
        self, pipeline: ScoringPipeline, buffers: Buffers, streams: "Streams", attention: AttentionChoice
    ) -> None:
        self.pipeline, self.buffers, self.attention = pipeline, buffers, attention

    def replay(self) -> None:
        """Fill the outputs."""
        with arithmetic(self.pipeline.precision, self.buffers.frames.device), self.attention.active():
            maps, scores = self.pipeline(self.buffers.frames, self.buffers.y)
        self.buffers.maps.copy_(maps)
        self.buffers.scores.copy_(scores)


class CudaGraphStep(DirectStep):
    """One bucket, captured: `replay` launches the graph on the current stream."""

    needs_gpu = True

    def __init__(
        self, pipeline: ScoringPipeline, buffers: Buffers, streams: "Streams", attention: AttentionChoice
    ) -> None:
        super().__init__(pipeline, buffers, streams, attention)
        for _ in range(WARM_UP):
            super().replay()
        torch.cuda.synchronize(buffers.frames.device)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU, hence the thread's own error mode.
        with (
            no_collection(),
            torch.cuda.graph(self.graph, pool=streams.pool, stream=streams.compute, capture_error_mode="thread_local"),
        ):
            super().replay()

    def replay(self) -> None:
        """Fill the outputs."""
        self.graph.replay()


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


class _Slot:
    """Host and device buffers of one piece in flight. It is collected before it is used again."""

    def __init__(self, host: Buffers, device: Buffers, streams: Streams) -> None:
        self.host, self.device, self.streams = host, device, streams
        self._done: torch.cuda.Event | None = None

    def submit(self, step: DirectStep, frames: np.ndarray, y: np.ndarray | None) -> None:
        """Queue upload, computation and download of a piece; `frames` has been read when this returns."""
        streams, rows = self.streams, len(frames)
        host, device, static = self.host.first(rows), self.device.first(rows), step.buffers.first(rows)
        host.frames.numpy()[:] = frames
        with streams.on(streams.upload):
            device.frames.copy_(host.frames, non_blocking=True)
            if host.y is not None and device.y is not None:
                host.y.numpy()[:] = y
                device.y.copy_(host.y, non_blocking=True)
        with streams.on(streams.compute, after=streams.event(streams.upload)):
            static.frames.copy_(device.frames)
            if static.y is not None and device.y is not None:
                static.y.copy_(device.y)
            step.replay()
            device.maps.copy_(static.maps)
            device.scores.copy_(static.scores)
        with streams.on(streams.download, after=streams.event(streams.compute)):
            host.maps.copy_(device.maps, non_blocking=True)
            host.scores.copy_(device.scores, non_blocking=True)
        self._done = streams.event(streams.download)

    def collect(self, maps: np.ndarray, scores: np.ndarray) -> None:
        """Wait for the piece and copy its results out."""
        self.wait()
        maps[:] = self.host.maps[: len(maps)].numpy()
        scores[:] = self.host.scores[: len(scores)].numpy()

    def wait(self) -> None:
        """Wait until nothing of the slot is in flight."""
        if self._done is not None:
            self._done.synchronize()


@dataclass(frozen=True)
class _Capture:
    """What exists for one frame size: a step a bucket, ascending, and the two slots."""

    steps: dict[int, DirectStep]
    slots: tuple[_Slot, _Slot]


class CudaGraphEngine(Engine):
    """Replays captured graphs; safe from many threads, which take turns (one set of static buffers exists).

    A frame size is captured when it is first seen, or ahead of time by `prepare`. A bucket for which memory does not
    suffice is left out with a warning; larger batches are then split to the buckets that exist.
    `attention` is the backend of the largest bucket, `attentions` that of each captured one: the fastest that is right,
    measured here unless a stored choice is given. With
    `measure_products` a bucket's matrix products are the fastest of the candidates in `products`, measured before its
    first capture; without, they are the library's.
    """

    name = "cudagraph"
    on_tensors = True

    def __init__(
        self,
        pipeline: ScoringPipeline,
        device: str = "auto",
        buckets: tuple[int, ...] = BUCKETS,
        step: type[DirectStep] = CudaGraphStep,
        attention: str | None = None,
        measure_products: bool = True,
    ) -> None:
        self._device = torch_device(device)
        if step.needs_gpu and self._device.type != "cuda":
            raise EngineUnavailableError(
                f"the cudagraph engine needs an NVIDIA GPU, the device is {self._device}; ask for engine='eager'"
            )
        check_precision(pipeline.precision, self._device)
        self.device = str(self._device)
        self.pipeline = pipeline.on(self._device)
        self._buckets = tuple(sorted(set(buckets)))
        self._stored = attention
        self.attention = self._choose_attention(self._buckets[-1])
        self.attentions = {self._buckets[-1]: self.attention}
        self.products: dict[int, list[ProductChoice]] | None = {} if measure_products else None
        self._step = step
        self._streams = Streams(self._device)
        self._captures: OrderedDict[tuple[int, int], _Capture] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def title(self) -> str:
        """See `Engine`, with precision and operators."""
        return super().title + self.pipeline.arithmetic

    @property
    def details(self) -> dict[str, Any]:
        """See `Detector.details`: by captured bucket what runs attention and the matrix products."""
        chosen = {
            bucket: {choice.part: {"chosen": choice.chosen, "us": choice.microseconds} for choice in choices}
            for bucket, choices in (self.products or {}).items()
        }
        attentions = {
            bucket: {"chosen": one.backend, "ms": one.milliseconds, "error": one.shown_errors}
            for bucket, one in sorted(self.attentions.items())
        }
        return {
            "attention": self.attention.backend,
            "attention_ms": self.attention.milliseconds,
            "attentions": attentions,
            "products": chosen,
        }

    def buckets(self, height: int, width: int) -> tuple[int, ...]:
        """The batch sizes, ascending, that frames of this size run in; captures them if need be."""
        self.prepare(height, width)
        return tuple(self._captures[height, width].steps)

    def prepare(self, height: int, width: int) -> None:
        """Capture all buckets for frames of this size, so that the first call does not have to."""
        with self._lock, self._running():
            self._capture(height, width)

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        with self._lock, self._running():
            return self._run(frames, y)

    def on_device(self, frames: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `run`, on tensors of the engine's device, in order with the caller's current stream."""
        with self._lock, self._running():
            capture = self._capture(*frames.shape[1:3])
            found = []
            with self._streams.in_order():
                for piece in cut(len(frames), tuple(capture.steps)):
                    step, rows = capture.steps[piece.bucket], slice(piece.start, piece.start + piece.take)
                    static = step.buffers.first(piece.take)
                    static.frames.copy_(frames[rows])
                    if static.y is not None and y is not None:
                        static.y.copy_(y[rows])
                    step.replay()
                    found.append((static.maps.clone(), static.scores.clone()))
            maps, scores = zip(*found, strict=True)
            return torch.cat(maps), torch.cat(scores)

    def _run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        capture = self._capture(*frames.shape[1:3])
        like = capture.slots[0].host
        maps = np.empty((len(frames), *like.maps.shape[1:]), np.float32)
        scores = np.empty((len(frames), *like.scores.shape[1:]), np.float32)
        pieces = cut(len(frames), tuple(capture.steps))
        for i, piece in enumerate(pieces):
            slot = capture.slots[i % 2]
            if i >= 2:
                _collect(slot, pieces[i - 2], maps, scores)
            rows = slice(piece.start, piece.start + piece.take)
            slot.submit(capture.steps[piece.bucket], frames[rows], None if y is None else y[rows])
        for i in range(max(0, len(pieces) - 2), len(pieces)):
            _collect(capture.slots[i % 2], pieces[i], maps, scores)
        return maps, scores

    def _capture(self, height: int, width: int) -> _Capture:
        key = (height, width)
        if key in self._captures:
            self._captures.move_to_end(key)
            return self._captures[key]
        while len(self._captures) >= FRAME_SIZES:
            self._captures.popitem(last=False)
        steps: dict[int, DirectStep] = {}
        static: Buffers | None = None
        # The largest first: the pool then has blocks that the smaller ones fit into.
        for bucket in reversed(self._buckets):
            step = self._make_step(static, bucket, height, width)
            if step is not None:
                static = static or step.buffers
                steps[bucket] = step
        if static is None:
            raise EngineUnavailableError(
                f"out of GPU memory capturing a single {height}x{width} frame; close other programs on the GPU, or ask "
                "for precision bf16 or fp8, fewer probes, or engine='eager'"
            )
        if len(steps) < len(self._buckets):
            warnings.warn(
                f"cudagraph: not enough GPU memory for {height}x{width} frames in batches of "
                f"{', '.join(str(bucket) for bucket in self._buckets if bucket not in steps)}; larger batches are "
                f"split to {max(steps)}",
                stacklevel=4,
            )
        cpu, largest = torch.device("cpu"), max(steps)
        slots = tuple(
            _Slot(
                Buffers.make(self.pipeline, largest, height, width, cpu, pinned=self._streams.cuda),
                Buffers.make(self.pipeline, largest, height, width, self._device),
                self._streams,
            )
            for _ in range(2)
        )
        if self._streams.cuda:
            # The buffers were filled on another stream than those that will use them.
            torch.cuda.synchronize(self._device)
        capture = _Capture(dict(sorted(steps.items())), (slots[0], slots[1]))
        self._captures[key] = capture
        return capture

    def _make_step(self, static: Buffers | None, bucket: int, height: int, width: int) -> DirectStep | None:
        """The step of a bucket, None when memory does not suffice."""
        try:
            if bucket not in self.attentions:
                self.attentions[bucket] = self._choose_attention(bucket)
            self._choose_products(bucket)
            with self._streams.on(self._streams.compute):
                buffers = static or Buffers.make(self.pipeline, bucket, height, width, self._device)
                return self._step(self.pipeline, buffers.first(bucket), self._streams, self.attentions[bucket])
        except RuntimeError as error:
            # An exhausted capture may end in another error than the one that ended it.
            if not out_of_memory(error):
                raise
        if self._streams.cuda:
            torch.cuda.empty_cache()
        return None

    def _choose_attention(self, bucket: int) -> AttentionChoice:
        config, dtype = self.pipeline.velocity.config, NUMBERS[self.pipeline.precision].dtype
        return choose_attention(config, dtype, self._device, bucket, self._stored)

    def _choose_products(self, bucket: int) -> None:
        if self.products is None or bucket in self.products:
            return
        field = self.pipeline.velocity
        assert isinstance(field, TabledDiT), "pipelines hold the inference form"
        with arithmetic(self.pipeline.precision, self._device):
            self.products[bucket] = choose_products(field, bucket * field.config.tokens)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.inference_mode():
            try:
                yield
            except BaseException:
                # Nothing of a failed call may still be in flight when the next one fills the slots.
                for capture in self._captures.values():
                    for slot in capture.slots:
                        slot.wait()
                raise


def _collect(slot: _Slot, piece: Piece, maps: np.ndarray, scores: np.ndarray) -> None:
    rows = slice(piece.start, piece.start + piece.take)
    slot.collect(maps[rows], scores[rows])
