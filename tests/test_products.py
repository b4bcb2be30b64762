"""The choice between the library's matrix products and ours: by a clock of the tests, and measured on a GPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from flowad_fast.config import VelocityConfig
from flowad_fast.engines import products
from flowad_fast.engines.products import FUSED_TILES, MOST_ROWS, candidates, choose_products
from flowad_fast.kernels import fused, linear_split_k
from flowad_fast.kernels.operators import NARROW
from flowad_fast.stages.arithmetic import Arithmetic
from flowad_fast.stages.linear import Fp8Linear, Linear
from flowad_fast.stages.plan import Fused, Library, Plan, Split
from flowad_fast.stages.velocity import DiT, TabledDiT

PAPER_ROWS = 256
H100 = 132


def layer(width: int, inner: int, fp8: bool = False) -> Linear | Fp8Linear:
    weight = torch.zeros(width, inner, dtype=torch.bfloat16)
    return Fp8Linear(weight, None) if fp8 else Linear(weight, None, torch.bfloat16)


def field(precision: str, device: str = "cpu", **options: object) -> TabledDiT:
    torch.manual_seed(0)
    config = VelocityConfig(
        channels=32, height=16, width=16, hidden_size=256, depth=2, num_heads=2, **options  # type: ignore[arg-type]
    )  # fmt: skip
    dit = DiT(config).to(device)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(False), std=0.05)
    return TabledDiT(dit, (0.5,), Arithmetic(precision, fused))  # type: ignore[arg-type]


def ticking(times: list[float]) -> Callable[[Callable[[], object]], float]:
    """A clock that runs what it is given and then says the next of `times`, for ever."""

    def forever() -> Iterator[float]:
        while True:
            yield from times

    ticks = forever()

    def clock(run: Callable[[], object]) -> float:
        run()
        return next(ticks)

    return clock


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates of a GPU that is small enough for these models; without GELU, which has no epilogue on the CPU."""
    monkeypatch.setattr(products, "candidates", lambda one, rows, *_: candidates(one, rows, 16, gelu=False))


def test_candidates_fill_a_gpu_without_flooding_it() -> None:
    for width, inner in ((2048, 2048), (2048, 8192), (6144, 2048), (8192, 2048)):
        library, *splits = candidates(layer(width, inner), PAPER_ROWS, H100, gelu=False)
        assert library is Library.PLAIN and 2 <= len(splits) <= 10
        for split in splits:
            assert isinstance(split, Split)
            programs = PAPER_ROWS // split.rows * width // split.columns * split.parts
            assert H100 / 2 <= programs <= 2 * H100
    assert candidates(layer(2048, 8192), MOST_ROWS + 1, H100, gelu=False) == [Library.PLAIN]
    assert candidates(layer(8192, 2048), MOST_ROWS + 1, H100, gelu=True) == [Library.PLAIN, Library.GELU]
    narrow = candidates(layer(8192, 2048, fp8=True), PAPER_ROWS, H100, gelu=True)
    assert Library.GELU not in narrow and sum(isinstance(one, Fused) for one in narrow) == 2
    many = candidates(layer(8192, 2048, fp8=True), 32 * PAPER_ROWS, H100, gelu=True)
    assert many == [Library.PLAIN, *(Fused(*tile) for tile in FUSED_TILES[1:])], "also where a GPU is full"
    assert not any(isinstance(one, Fused) for one in candidates(layer(8192, 2048, fp8=True), 256, H100, gelu=False))
    float32 = Linear(torch.zeros(2048, 8192), None, torch.float32)
    assert candidates(float32, PAPER_ROWS, H100, gelu=True) == [Library.PLAIN]


@pytest.mark.usefixtures("small_gpu")
def test_the_fastest_is_kept_and_computes_the_same() -> None:
    own, library = field("bf16"), field("bf16")
    choices = choose_products(own, PAPER_ROWS, ticking([9.0, 5.0, 7.0]))
    assert {choice.part for choice in choices} <= {"qkv", "proj", "fc1", "fc2"} and choices
    first = choices[0]
    assert first.chosen == min(first.microseconds, key=lambda name: first.microseconds[name]) != Library.PLAIN.label
    assert own.plan.products[PAPER_ROWS]["qkv"].label == first.chosen
    assert all(block.qkv.products == own.plan.of("qkv") for block in own.blocks)
    x = torch.randn(1, PAPER_ROWS, 32)
    torch.testing.assert_close(own(x, 0), library(x, 0))


@pytest.mark.usefixtures("small_gpu")
def test_plans_for_other_numbers_of_rows_stay() -> None:
    own = field("bf16")
    choose_products(own, PAPER_ROWS, ticking([9.0, 5.0, 7.0]))
    first = own.plan
    choose_products(own, 2 * PAPER_ROWS, ticking([9.0, 5.0, 7.0]))
    assert own.plan.products[PAPER_ROWS] == first.products[PAPER_ROWS] and 2 * PAPER_ROWS in own.plan.products
    assert set(first.products) == {PAPER_ROWS}, "a plan is never changed"
    with pytest.raises(KeyError):  # a failing measurement leaves no candidate behind
        choose_products(own, PAPER_ROWS, lambda run: {}["fails"])
    assert own.plan.products[PAPER_ROWS] == {}


def test_nothing_is_chosen_where_there_is_no_choice() -> None:
    assert choose_products(field("bf16"), PAPER_ROWS) == [], "the CPU has the library only"
    assert choose_products(field("fp32"), PAPER_ROWS, ticking([1.0])) == []


@pytest.mark.usefixtures("small_gpu")
def test_parts_that_a_rule_splits_between_precisions_keep_the_library() -> None:
    own = field("fp8", keep_bf16=("blocks.0.qkv",))
    choices = choose_products(own, PAPER_ROWS, ticking([2.0, 1.0]))
    assert choices and "qkv" not in {choice.part for choice in choices}
    assert not own.plan.of("qkv") and not any(block.qkv.products for block in own.blocks)


def test_a_product_that_quantises_its_own_result_runs_where_it_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        products, "candidates", lambda one, rows, _, gelu: candidates(one, rows, 16, gelu and one.takes in NARROW)
    )
    own, passes, exact = field("fp8"), field("fp8"), field("fp32")
    used: list[tuple[int, int]] = []
    true = linear_split_k.linear_gelu_fp8
    monkeypatch.setattr(linear_split_k, "linear_gelu_fp8", lambda *args: used.append(args[-2:]) or true(*args))
    labels = {choice.part: choice.chosen for choice in choose_products(own, PAPER_ROWS, ticking([9.0, 5.0, 7.0]))}
    chosen = own.plan.products[PAPER_ROWS]["fc1"]
    assert isinstance(chosen, Fused) and labels["fc1"] == chosen.label
    used.clear()
    x, z = torch.randn(1, PAPER_ROWS, 32), torch.randn(2, 1, PAPER_ROWS, 32)
    found = own(x, 0)
    assert used == [tuple(chosen)] * 2, "once a block"
    expected, other = exact(x, 0), passes(x, 0)
    assert 0 < _rms(found, other) and _rms(found, expected) < 1.1 * _rms(other, expected)
    used.clear()
    torch.testing.assert_close(own.dual(x, z, 0), passes.dual(x, z, 0))
    assert not used, "tangents need what GELU was given"


@pytest.mark.usefixtures("small_gpu")
def test_candidates_that_a_gpu_has_no_room_for_are_left_out() -> None:
    own, calls = field("bf16"), [0]

    def clock(run: Callable[[], object]) -> float:
        run()
        calls[0] += 1
        if calls[0] == 2:
            raise OutOfResources(200_000, 101_376, "shared memory")
        return 9.0 - calls[0]

    with pytest.warns(UserWarning, match=r"qkv: split .* is left out: out of resource: shared memory, Required: 2000"):
        first, *_ = choose_products(own, PAPER_ROWS, clock)
    offered = [one.label for one in candidates(own.blocks[0].qkv, PAPER_ROWS, 16, gelu=False)]
    assert list(first.microseconds) == [offered[0], *offered[2:]] and first.chosen == offered[-1]


def test_layers_behind_gelu_that_take_other_rows_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "candidates", lambda one, rows, _, gelu: candidates(one, rows, 16, gelu))
    own = field("fp8", keep_bf16=("blocks.1.fc2",))
    labels = {choice.part: set(choice.microseconds) for choice in choose_products(own, PAPER_ROWS, ticking([1.0]))}
    assert labels["fc1"] and not any("GELU" in label for label in labels["fc1"])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_every_candidate_computes_the_same_on_a_gpu(precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    own = field(precision, "cuda")
    x = torch.randn(1, PAPER_ROWS, 32, device="cuda")
    expected = own(x, 0)
    tried = 0
    for part in ("qkv", "proj", "fc1", "fc2"):
        for one in candidates(own.blocks[0].layers[part], PAPER_ROWS, 16, gelu=part == "fc1"):
            own.use(Plan({PAPER_ROWS: {part: one}}))
            # Other scales round other values: as far apart as both are from float32.
            limit = 8e-2 if isinstance(one, Fused) else 2e-2 if precision == "fp8" else 5e-3
            assert _rms(own(x, 0), expected) < limit, (part, one)
            tried += 1
    assert tried > 8


@pytest.mark.gpu
def test_products_are_measured_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    own = field("bf16", "cuda")
    choices = choose_products(own, PAPER_ROWS)
    assert "fc1" in {choice.part for choice in choices}
    for choice in choices:
        assert Library.PLAIN.label in choice.microseconds
        assert choice.microseconds[choice.chosen] == min(choice.microseconds.values()) > 0


def _rms(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())
