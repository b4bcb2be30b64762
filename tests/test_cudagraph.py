"""The cudagraph engine: bucketing, padding, buffering and splitting by direct calls on the CPU; graphs on a GPU."""

import threading
import warnings

import numpy as np
import pytest
import torch
from models import tiny_model

from flowad_fast.detector import Detector
from flowad_fast.engines import cudagraph
from flowad_fast.engines.cudagraph import CudaGraphEngine, CudaGraphStep, DirectStep, EarlyCudaGraphStep, cut
from flowad_fast.engines.eager import EagerEngine
from flowad_fast.engines.flight import KEPT, Buffers
from flowad_fast.engines.memory import BatchLimit
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.kernels import fused
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.arithmetic import Arithmetic
from flowad_fast.stages.scorers import Density, Inversion, Reconstruction

BUCKETS = (1, 2, 4)


def small_model(conditional: bool = False) -> FlowModel:
    return tiny_model(3 if conditional else 0, real_backbone=True, depth=2)


def frames(count: int, height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def pipeline() -> ScoringPipeline:
    return ScoringPipeline(small_model(), Inversion())


def close(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype == np.float32
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-4 * b.std() if b.std() else 2e-4 * np.abs(b).max())


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (1, [(0, 1, 1)]),
        (3, [(0, 3, 4)]),
        (4, [(0, 4, 4)]),
        (5, [(0, 4, 4), (4, 1, 1)]),
        (14, [(0, 4, 4), (4, 4, 4), (8, 4, 4), (12, 2, 2)]),
        (0, []),
    ],
)
def test_a_batch_is_cut_into_pieces_that_buckets_hold(batch: int, expected: list[tuple[int, int, int]]) -> None:
    assert [(p.start, p.take, p.bucket) for p in cut(batch, BUCKETS)] == expected


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9, 14])
def test_padding_splitting_and_buffering_leave_the_results_as_they_are(pipeline: ScoringPipeline, batch: int) -> None:
    engine = CudaGraphEngine(pipeline, "cpu", BUCKETS, DirectStep)
    # A full batch of other frames first: what it leaves in the padding and in both slots must not show.
    engine.run(frames(14, seed=9), None)
    close(engine.run(frames(batch), None), EagerEngine(pipeline, "cpu").run(frames(batch), None))


@pytest.mark.parametrize("conditional", [False, True])
def test_frames_on_the_device_give_what_frames_on_the_host_give(conditional: bool) -> None:
    engine = CudaGraphEngine(ScoringPipeline(small_model(conditional), Inversion()), "cpu", BUCKETS, DirectStep)
    y = np.array([2, 0, 1, 1, 2]) if conditional else None
    expected = engine.run(frames(5), y)
    classes = None if y is None else torch.from_numpy(y)
    maps, scores = engine.on_device(torch.from_numpy(frames(5)), classes)
    engine.on_device(torch.from_numpy(frames(4, seed=3)), None if classes is None else classes[:4])
    np.testing.assert_array_equal(maps.numpy(), expected[0])
    np.testing.assert_array_equal(scores.numpy(), expected[1])


def test_results_of_a_call_outlive_the_next_call(pipeline: ScoringPipeline) -> None:
    engine = CudaGraphEngine(pipeline, "cpu", BUCKETS, DirectStep)
    maps, scores = engine.run(frames(3), None)
    kept = maps.copy(), scores.copy()
    engine.run(frames(8, seed=5), None)
    np.testing.assert_array_equal(maps, kept[0])
    np.testing.assert_array_equal(scores, kept[1])


def test_results_that_nobody_holds_are_written_again(pipeline: ScoringPipeline) -> None:
    engine = CudaGraphEngine(pipeline, "cpu", BUCKETS, DirectStep)
    first = engine.run(frames(3), None)[0].__array_interface__["data"][0]
    again, _ = engine.run(frames(2), None)
    assert again.__array_interface__["data"][0] == first
    one = again[1]  # a view holds the whole
    del again
    kept = one.copy()
    assert engine.run(frames(3, seed=4), None)[0].__array_interface__["data"][0] != first
    np.testing.assert_array_equal(one, kept)
    held = [engine.run(frames(1, seed=i), None) for i in range(2 * KEPT)]
    for i, (maps, _) in enumerate(held):
        np.testing.assert_array_equal(maps, engine.run(frames(1, seed=i), None)[0])


@pytest.mark.parametrize("batch", [1, 9])
def test_what_a_verdict_needs_to_know_of_frames_comes_out_of_the_step(pipeline: ScoringPipeline, batch: int) -> None:
    engine = CudaGraphEngine(pipeline, "cpu", BUCKETS, DirectStep)
    shown = frames(batch)
    shown[-1] = 7
    got, expected = engine.judge(shown, None), EagerEngine(pipeline, "cpu").judge(shown, None)
    np.testing.assert_array_equal(got.low, expected.low)
    np.testing.assert_array_equal(got.high, expected.high)
    assert got.low[-1] == got.high[-1] == 7 and got.finite.all()
    detector = Detector(engine, small_model().spec)
    assert detector(shown).invalid[-1] == "the frame is black (all pixels between 7 and 7)"


def test_a_map_that_is_not_finite_is_found_in_the_step(pipeline: ScoringPipeline) -> None:
    class Broken(DirectStep):
        def replay(self) -> None:
            self.buffers.frames[1:2].fill_(0)
            super().replay()
            self.buffers.out.maps[1, 3, 5] = torch.nan
            self.buffers.out.total[:] = self.buffers.out.maps.sum((1, 2))

    engine = CudaGraphEngine(pipeline, "cpu", (4,), Broken)
    assert engine.judge(frames(3), None).finite.tolist() == [True, False, True]


@pytest.mark.parametrize("scorer", [Density(probes=2), Reconstruction(steps=2)])
def test_classes_are_a_static_input_of_conditional_models(scorer: Density | Reconstruction) -> None:
    pipeline = ScoringPipeline(small_model(conditional=True), scorer, "diff+sum")
    engine = CudaGraphEngine(pipeline, "cpu", BUCKETS, DirectStep)
    y = np.array([2, 0, 1, 1, 2])
    got = engine.run(frames(5), y)
    assert got[1].shape == (5, 2)
    close(got, EagerEngine(pipeline, "cpu").run(frames(5), y))
    other = engine.run(frames(5), np.array([0, 0, 0, 0, 0]))
    assert np.abs(other[0][0] - got[0][0]).max() > 1e-3 * got[0].std(), "the class must matter"


def test_captures_are_kept_for_a_bounded_number_of_frame_sizes(
    pipeline: ScoringPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudagraph, "FRAME_SIZES", 2)
    made: list[tuple[int, ...]] = []

    class Counting(DirectStep):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(tuple(self.buffers.frames.shape))

    engine = CudaGraphEngine(pipeline, "cpu", (1, 2), Counting)
    eager = EagerEngine(pipeline, "cpu")
    for height in (64, 80, 64, 96, 64, 80):
        close(engine.run(frames(2, height), None), eager.run(frames(2, height), None))
    sizes = [shape[1] for shape in made if shape[0] == 2]
    assert sizes == [64, 80, 96, 80], "64 stayed in use, 80 was dropped for 96 and made again"


def test_a_bucket_without_memory_is_left_out_with_a_warning(pipeline: ScoringPipeline) -> None:
    class Hungry(DirectStep):
        def __init__(self, pipeline: ScoringPipeline, buffers: Buffers, *rest: object) -> None:
            if len(buffers.frames) > 2:
                try:
                    raise torch.OutOfMemoryError("fake")
                finally:
                    raise RuntimeError("the capture was invalidated")  # noqa: B012 - what ending a capture may do
            super().__init__(pipeline, buffers, *rest)  # type: ignore[arg-type]

    engine = CudaGraphEngine(pipeline, "cpu", (1, 2, 4, 8), Hungry)
    with pytest.warns(UserWarning, match="not enough GPU memory for 64x64 frames in batches of 4, 8; .* split to 2"):
        got = engine.run(frames(5), None)
    close(got, EagerEngine(pipeline, "cpu").run(frames(5), None))
    assert engine.buckets(64, 64) == (1, 2)


def test_memory_for_no_bucket_is_an_error_and_other_errors_are_not_hidden(pipeline: ScoringPipeline) -> None:
    class Failing(DirectStep):
        error: BaseException = torch.OutOfMemoryError("fake")

        def __init__(self, *args: object) -> None:
            raise self.error

    with pytest.raises(EngineUnavailableError, match="out of GPU memory capturing a single 64x64 frame"):
        CudaGraphEngine(pipeline, "cpu", BUCKETS, Failing).run(frames(1), None)
    Failing.error = RuntimeError("an operator failed")
    with pytest.raises(RuntimeError, match="an operator failed"):
        CudaGraphEngine(pipeline, "cpu", BUCKETS, Failing).run(frames(1), None)


def test_many_threads_take_turns(pipeline: ScoringPipeline) -> None:
    engine = CudaGraphEngine(pipeline, "cpu", BUCKETS, DirectStep)
    expected = {seed: EagerEngine(pipeline, "cpu").run(frames(3, seed=seed), None) for seed in range(4)}
    failures: list[BaseException] = []

    def call(seed: int) -> None:
        try:
            for _ in range(3):
                close(engine.run(frames(3, seed=seed), None), expected[seed])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_without_a_gpu_the_engine_says_what_it_needs() -> None:
    with pytest.raises(EngineUnavailableError, match="needs an NVIDIA GPU, the device is cpu; ask for engine='eager'"):
        Detector.from_model(small_model(), Inversion(), engine="cudagraph", device="cpu")


class Memory:
    """An engine call that runs out of memory above `limit` frames."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.batches: list[int] = []

    def __call__(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        self.batches.append(len(frames))
        if len(frames) > self.limit:
            raise torch.OutOfMemoryError("fake")
        return frames[:, :, :, 0].astype(np.float32), (frames[:, 0, 0, 0] + (0 if y is None else y)).astype(np.float32)


def test_a_batch_that_does_not_fit_is_split_in_order_and_the_size_remembered() -> None:
    limit, memory = BatchLimit(), Memory(3)
    batch = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(2, 1)
    with pytest.warns(UserWarning, match="out of GPU memory at batch 10; batches are split to 5"):
        maps, scores = limit.run(memory, batch, np.arange(10))
    np.testing.assert_array_equal(scores, np.arange(10) * 2)
    np.testing.assert_array_equal(maps[:, 0, 0], np.arange(10))
    assert memory.batches == [10, 5, 2, 2, 2, 2, 2] and limit.largest == 2
    memory.batches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limit.run(memory, batch, None)
    assert memory.batches == [2] * 5, "no more failures"


def test_memory_for_not_even_one_frame_is_an_error() -> None:
    memory = Memory(0)
    with pytest.warns(UserWarning), pytest.raises(EngineUnavailableError, match="for a single frame"):
        BatchLimit().run(memory, np.zeros((8, 2, 2, 3), np.uint8), None)
    assert memory.batches == [8, 4, 2, 1], "bounded retries"


def test_the_eager_engine_splits_too(pipeline: ScoringPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EagerEngine(pipeline, "cpu")
    expected = engine.run(frames(5), None)
    forward = engine.pipeline.forward

    def limited(x: torch.Tensor, y: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if len(x) > 2:
            raise torch.OutOfMemoryError("fake")
        return forward(x, y)

    monkeypatch.setattr(engine.pipeline, "forward", limited)
    with pytest.warns(UserWarning, match="batches are split to 2"):
        close(engine.run(frames(5), None), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize("scorer", [Inversion(), Reconstruction(steps=2), Density(probes=3)])
def test_graphs_compute_what_the_eager_engine_computes(scorer: Inversion | Reconstruction | Density, ops: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = small_model(conditional=True)
    eager = Detector.from_model(model, scorer, device="cuda")
    graph = Detector.from_model(model, scorer, engine="cudagraph", device="cuda", ops=ops)
    for batch in (1, 3, 64, 100):
        classes = [i % 3 for i in range(batch)]
        a, b = graph(frames(batch), classes), eager(frames(batch), classes)
        np.testing.assert_allclose(a.map, b.map, atol=1e-3 * b.map.std())


@pytest.mark.gpu
def test_kernels_that_start_early_compute_the_same_bits() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    pipeline = ScoringPipeline(small_model(), Inversion(), how=Arithmetic("bf16", fused))
    steps = {step: CudaGraphEngine(pipeline, "cuda", (1, 4), step, measure_products=False) for step in STEPS}
    for batch in (1, 4):
        for _ in range(20):
            (a, _), (b, _) = (steps[step].run(frames(batch), None) for step in STEPS)
            np.testing.assert_array_equal(a, b)


def test_early_launches_need_the_gpu_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    engine = CudaGraphEngine(ScoringPipeline(small_model(), Inversion()), "cpu", (1,), EarlyDirect)
    with pytest.raises(EngineUnavailableError, match=r"compute capability 9\.0"):
        engine.run(frames(1), None)


class EarlyDirect(EarlyCudaGraphStep):
    """On any device, as far as it comes without a graph."""

    needs_gpu = False


STEPS = (CudaGraphStep, EarlyCudaGraphStep)


@pytest.mark.gpu
def test_one_graph_a_bucket_and_memory_stays_flat() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    engine = CudaGraphEngine(ScoringPipeline(small_model(), Inversion(), how=Arithmetic("bf16")), "cuda", BUCKETS)
    assert engine.buckets(64, 64) == BUCKETS
    assert all(isinstance(step, CudaGraphStep) for step in engine._captures[64, 64].steps.values())
    engine.run(frames(9), None)
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        engine.run(frames(9), None)
    assert torch.cuda.memory_allocated() == before
