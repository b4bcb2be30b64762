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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowad_fast.engines import Engine, Judged
from flowad_fast.engines.attention import AttentionChoice, choose_attention
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.flight import Buffers, Outputs, Results, Slot, Streams
from flowad_fast.engines.memory import out_of_memory
from flowad_fast.engines.precision import arithmetic, check_precision
from flowad_fast.engines.products import ProductChoice, choose_products
from flowad_fast.engines.timing import no_collection
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.kernels import fused
from flowad_fast.kernels.launch import early_launches
from flowad_fast.pipeline import ScoringPipeline
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


class DirectStep:
    """One bucket: `replay` runs the pipeline from static inputs to static outputs, here by calling it."""

    needs_gpu = False

    def __init__(
        self, pipeline: ScoringPipeline, buffers: Buffers, streams: Streams, attention: AttentionChoice
    ) -> None:
        self.pipeline, self.buffers, self.attention = pipeline, buffers, attention

    def replay(self) -> None:
        """Fill the outputs."""
        with arithmetic(self.pipeline.precision, self.buffers.frames.device), self.attention.active():
            maps, scores = self.pipeline(self.buffers.frames, self.buffers.y)
        # Whether frame and map can be judged is found out where they are, not by passes over them on the host.
        low, high = torch.aminmax(self.buffers.frames.flatten(1), dim=1)
        self.buffers.out.fill(Outputs(maps, scores, low, high, maps.flatten(1).sum(1)))


class CudaGraphStep(DirectStep):
    """One bucket, captured: `replay` launches the graph on the current stream."""

    needs_gpu = True

    def __init__(
        self, pipeline: ScoringPipeline, buffers: Buffers, streams: Streams, attention: AttentionChoice
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


class EarlyCudaGraphStep(CudaGraphStep):
    """One bucket, captured with `early_launches`. What it gains is not measured yet, so it is to be asked for."""

    def __init__(
        self, pipeline: ScoringPipeline, buffers: Buffers, streams: Streams, attention: AttentionChoice
    ) -> None:
        if torch.cuda.get_device_capability(buffers.frames.device) < (9, 0):
            raise EngineUnavailableError("early launches need a GPU of compute capability 9.0; use CudaGraphStep")
        with early_launches():
            super().__init__(pipeline, buffers, streams, attention)


@dataclass(frozen=True)
class _Capture:
    """What exists for one frame size: one step per bucket, ascending, and the two slots."""

    steps: dict[int, DirectStep]
    slots: tuple[Slot, Slot]


class CudaGraphEngine(Engine):
    """Replays captured graphs; safe from many threads, which take turns (one set of static buffers exists).

    A frame size is captured when it is first seen, or ahead of time by `prepare`. A bucket for which memory does not
    suffice is left out with a warning; larger batches are then split to the buckets that exist.
    `attention` is the backend of the largest bucket, `attentions` that of each captured one: the fastest that is right,
    measured here unless a stored choice is given. With
    `measure_products` a bucket's matrix products are the fastest of the candidates in `products`, measured before its
    first capture; without, they are the library's. With the fused operators the backbone runs on them, too, where the
    precision allows it (`NUMBERS`).
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
        if pipeline.ops.__name__ == fused.__name__:
            self.pipeline = self.pipeline.with_fused_backbone()
        self._buckets = tuple(sorted(set(buckets)))
        self._stored = attention
        self.attention = self._choose_attention(self._buckets[-1])
        self.attentions = {self._buckets[-1]: self.attention}
        self.products: dict[int, list[ProductChoice]] | None = {} if measure_products else None
        self._step = step
        self._streams = Streams(self._device)
        self._captures: OrderedDict[tuple[int, int], _Capture] = OrderedDict()
        self._results = Results(self.pipeline, self._streams.cuda)
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
        found = self.judge(frames, y)
        return found.maps, found.raw

    def judge(self, frames: np.ndarray, y: np.ndarray | None) -> Judged:
        """See `Engine`."""
        with self._lock, self._running():
            return self._judge(frames, y)

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
                    found.append((static.out.maps.clone(), static.out.scores.clone()))
            maps, scores = zip(*found, strict=True)
            return torch.cat(maps), torch.cat(scores)

    def _judge(self, frames: np.ndarray, y: np.ndarray | None) -> Judged:
        capture = self._capture(*frames.shape[1:3])
        out, arrays = self._results.take(len(frames))
        pieces = cut(len(frames), tuple(capture.steps))
        for i, piece in enumerate(pieces):
            slot = capture.slots[i % 2]
            slot.wait()
            stop = piece.start + piece.take
            classes = None if y is None else y[piece.start : stop]
            room = out.rows(piece.start, stop)
            slot.submit(capture.steps[piece.bucket], frames[piece.start : stop], classes, room, len(pieces) == 1)
        for slot in capture.slots:
            slot.wait()
        maps, scores, low, high, total = arrays
        return Judged(maps, scores, low, high, np.isfinite(total))

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
        largest = max(steps)
        slots = [Slot(self.pipeline, largest, height, width, self._device, self._streams) for _ in range(2)]
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
        field, dtype = self.pipeline.velocity, NUMBERS[self.pipeline.precision].dtype
        return choose_attention(
            field.config, dtype, self._device, bucket, self._stored, quantised=field.quantises_attention
        )

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
