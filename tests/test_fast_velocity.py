"""The inference form of the velocity field: precisions, operators, tangents, and what a precision costs."""

import weakref
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowad_fast.benchmarks.measure.cases import PRESETS
from flowad_fast.checkpoints.load import load_checkpoint
from flowad_fast.config import VelocityConfig
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import read_dataset
from flowad_fast.kernels import fused, reference
from flowad_fast.kernels.operators import short_attention
from flowad_fast.model import VelocityModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.reference_path import reference_map
from flowad_fast.shipped import PHOTOS
from flowad_fast.stages.arithmetic import Arithmetic
from flowad_fast.stages.integration import run_dual, to_tokens
from flowad_fast.stages.linear import Fp8Linear, Layer, Linear, PackedLinear, can_pack, make_linear, pack
from flowad_fast.stages.maps import DensityMap
from flowad_fast.stages.plan import Fused, Plan
from flowad_fast.stages.scorers import Density, Inversion, Mismatch, Reconstruction
from flowad_fast.stages.velocity import DiT, TabledDiT

TIMES = (1.0, 0.5)
TINY = {"channels": 6, "height": 4, "width": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def random_model(std: float = 0.15, **options: object) -> VelocityModel:
    torch.manual_seed(0)
    dit = DiT(VelocityConfig(**{**TINY, **options}))  # type: ignore[arg-type]
    for parameter in dit.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return VelocityModel(dit.config, dit)


def tokens(model: VelocityModel, batch: int = 3, seed: int = 1) -> Tensor:
    c = model.config
    return torch.randn(batch, c.height * c.width, c.channels, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.std())


@pytest.mark.parametrize("ops", [reference, fused])
@pytest.mark.parametrize("options", [{}, {"patch_size": 2}, {"use_class_labels": True, "num_classes": 3}])
def test_in_float32_it_equals_the_training_form(ops: ModuleType, options: dict[str, object]) -> None:
    model = random_model(**options)
    x = tokens(model)
    y = torch.tensor([2, 0, 1]) if model.config.use_class_labels else None
    field = TabledDiT(model.dit, TIMES, Arithmetic("fp32", ops))
    for step, t in enumerate(TIMES):
        expected = model.dit(x, torch.full((3,), t), y)
        assert relative(field(x, step, y), expected) < 2e-5


def test_float32_shares_the_weights_and_half_precision_halves_them() -> None:
    model = random_model()
    weight = model.dit.blocks[0].attn.qkv.weight
    assert model.at(TIMES).blocks[0].qkv.weight is weight
    assert model.at(TIMES, Arithmetic("bf16")).blocks[0].qkv.weight.nbytes * 2 == weight.nbytes
    assert model.at(TIMES, Arithmetic("bf16")) is model.at(TIMES, Arithmetic("bf16")) is not model.at(TIMES)


@pytest.mark.parametrize("ops", [reference, fused])
@pytest.mark.parametrize("tangents", [False, True])
def test_drift_grows_from_fp16_to_bf16_to_fp8_and_stays_bounded(ops: ModuleType, tangents: bool) -> None:
    model = random_model(channels=32, hidden_size=64, std=0.08)
    x, z = tokens(model), torch.sign(tokens(model, 2, 5))[:, None]

    def run(precision: str) -> Tensor:
        field = model.at(TIMES, Arithmetic(precision, ops))  # type: ignore[arg-type]
        out = field.dual(x, z, 0)[1] if tangents else field(x, 0)
        assert out.dtype == torch.float32
        return out

    expected = run("fp32")
    drift = [float((run(p) - expected).square().mean().sqrt() / expected.std()) for p in ("fp16", "bf16", "fp8")]
    assert all(a < b for a, b in pairwise(drift)), drift
    assert drift[0] < 2e-3 and drift[1] < 1.5e-2 and drift[2] < 1e-1, drift


def test_the_scaled_product_is_that_of_the_quantised_values() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 48) * torch.logspace(-3, 3, 32)[:, None], torch.randn(32)
    layer = Fp8Linear(weight, bias)
    x = torch.randn(2, 5, 48) * torch.logspace(-4, 4, 5)[:, None]
    q, scale = reference.quantise_rows(x)
    w = layer.weight.float() * layer.scale.T
    expected = (q.float() * scale) @ w.T + bias
    assert layer.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(layer(x), layer((q, scale)), rtol=0, atol=0)
    torch.testing.assert_close(layer(x).float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(layer.tangent(x).float(), expected - bias, rtol=1e-2, atol=1e-2)
    # A scale per row keeps rows of every size accurate: errors against the sizes of the row and of the weight's row.
    error = (layer.tangent(x).float() - x @ weight.T).abs() / (x.norm(dim=-1)[..., None] * weight.norm(dim=-1))
    assert error.max() < 0.03


@pytest.mark.parametrize("sign", [-1, 1])
def test_scales_known_beforehand_hold_the_largest_result_there_can_be(sign: int) -> None:
    """Weights and rows of one sign each, at their largest: the product is the bound itself, and no step above 448."""
    layer = Fp8Linear(torch.full((32, 64), 0.3), torch.full((32,), 2.0))
    layer.products = {3: Fused(16, 16)}
    x = sign * torch.tensor([1e-6, 1.0, 1e6])[:, None].expand(3, 64)
    q, scale = layer.gelu_tanh(x)
    assert layer.fuses_gelu(x) and q.float().isfinite().all()
    wanted = reference.gelu_tanh(x @ (layer.weight.float() * layer.scale.T).T + 2)
    assert ((q.float() * scale - wanted).abs() <= 2**-4 * 1.01 * wanted.abs() + 2**-10 * scale).all()
    if sign > 0:
        assert q.float().amax() == 448, "nothing of the range is lost where the bound is reached"


def test_loose_scales_cost_e4m3_nothing_until_values_leave_its_normal_range() -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    tight = x.abs().amax(-1, keepdim=True) / 448

    def error(loose: float) -> float:
        scale = tight * loose
        return float(((x / scale).to(torch.float8_e4m3fn).float() * scale - x).square().mean().sqrt() / x.std())

    errors = [error(loose) for loose in (1, 30, 100, 1000, 30000)]
    assert all(one < 1.1 * errors[0] for one in errors[:3]), errors
    assert errors[3] < 1.5 * errors[0] < errors[4], errors


@pytest.mark.parametrize("scorer", [Mismatch(), Inversion(steps=3)])
def test_epilogues_drift_no_further_than_passes_on_a_trained_model(scorer: Mismatch | Inversion) -> None:
    """The shipped model and real photos, where rows are not random: fp8 with scales known beforehand, and without."""
    model = load_checkpoint("cells")
    samples = read_dataset(PHOTOS["cells"], None).select("test", "mono")[::50][:6]
    frames = torch.from_numpy(np.stack([read_frame(sample.path) for sample in samples]))
    y = torch.zeros(len(frames), dtype=torch.long)
    pipeline = ScoringPipeline(model, scorer, how=Arithmetic("fp8", fused))
    field = pipeline.velocity
    assert isinstance(field, TabledDiT)
    with torch.inference_mode():
        expected = ScoringPipeline(model, scorer)(frames, y)[0]
        passes = pipeline(frames, y)[0]
        field.use(Plan({len(frames) * field.config.tokens: {"fc1": Fused(64, 128)}}))
        with short_attention(64):
            epilogues = pipeline(frames, y)[0]
    drift = [float((one - expected).square().mean().sqrt() / expected.std()) for one in (passes, epilogues)]
    assert drift[0] != drift[1] < 1.1 * drift[0] < 0.04, drift


def test_zero_rows_stay_zero_in_fp8() -> None:
    layer = Fp8Linear(torch.zeros(16, 16), None)
    assert torch.equal(layer(torch.zeros(3, 16)), torch.zeros(3, 16, dtype=torch.bfloat16))


def test_layers_are_kept_in_bf16_by_name_or_because_of_their_size() -> None:
    model = random_model(channels=16, hidden_size=32, keep_bf16=("blocks.1.fc*", "head"))
    field = model.at(TIMES, Arithmetic("fp8"))
    kinds = {name: type(layer) for name, layer in field.named_modules() if isinstance(layer, Layer)}
    assert {name for name, kind in kinds.items() if kind is Linear} == {"blocks.1.fc1", "blocks.1.fc2", "head"}
    assert len(kinds) == 10
    odd = make_linear("blocks.0.fc1", torch.randn(32, 24), None, "fp8", ())
    assert isinstance(odd, Linear) and odd.takes == torch.bfloat16


def autograd_shares(model: VelocityModel, scorer: Density, x1: Tensor, y: Tensor | None) -> Tensor:
    """dt z.(J^T z) of each probe and location, summed over the steps, by reverse mode through the training form."""
    probes, x = scorer.draw(model.config), to_tokens(x1)
    total = torch.zeros(len(probes), *x.shape[:2])
    for row in scorer.rows(model.config):
        for k, z in enumerate(probes):
            at = x.detach().requires_grad_()
            out = model.dit(at, torch.full((len(at),), row.t), y)
            (pulled,) = torch.autograd.grad((out * z).sum(), at)
            total[k] += row.b * (z * pulled).sum(-1) + (row.a - 1) * z.square().sum(-1)
        x = row.a * x + row.b * out.detach()
    return total


@pytest.mark.parametrize("ops", [reference, fused])
@pytest.mark.parametrize("options", [{}, {"patch_size": 2}, {"pred_type": "data"},
                                     {"use_class_labels": True, "num_classes": 2}])  # fmt: skip
def test_each_probes_total_equals_that_of_reverse_mode(ops: ModuleType, options: dict[str, object]) -> None:
    model = random_model(**options)
    scorer = Density(steps=3, probes=4)
    x1 = tokens(model, 2).transpose(1, 2).unflatten(2, (4, 4))
    y = torch.tensor([1, 0]) if model.config.use_class_labels else None
    rows = scorer.rows(model.config)
    field = model.at(tuple(row.t for row in rows), Arithmetic("fp32", ops))
    shares = run_dual(field, rows, to_tokens(x1), scorer.draw(model.config), y)[1]
    expected = autograd_shares(model, scorer, x1, y)
    torch.testing.assert_close(shares.sum(-1), expected.sum(-1), rtol=1e-4, atol=1e-4)
    # The share of a location is another estimate of the same trace, so it must not be the same number.
    assert (shares - expected).abs().max() > 0.01 * expected.std()


def exact_map(model: VelocityModel, scorer: Density, x1: Tensor) -> Tensor:
    """-log p1 at each location with the trace of the location's own block of the Jacobian, by autograd."""
    x = to_tokens(x1)
    trace = torch.zeros(x.shape[:2])
    for row in scorer.rows(model.config):
        for b in range(len(x)):
            jacobian = torch.autograd.functional.jacobian(
                lambda one, t=row.t: model.dit(one[None], torch.tensor([t]))[0], x[b]
            )
            trace[b] += row.b * torch.einsum("ncnc->n", jacobian)
        x = row.a * x + row.b * model.dit(x, torch.full((len(x),), row.t))
    log_p0 = -0.5 * (x.square() + np.log(2 * np.pi)).sum(-1)
    return -(log_p0 + trace).unflatten(1, tuple(x1.shape[2:]))


def test_exact_density_equals_the_trace_of_autograds_jacobian() -> None:
    model, scorer = random_model(), Density(steps=3, exact=True)
    x1 = tokens(model, 2).transpose(1, 2).unflatten(2, (4, 4))
    assert relative(scorer.map(model, x1), exact_map(model, scorer, x1)) < 1e-4


@pytest.mark.parametrize("exact", [False, True])
def test_memory_budgets_change_nothing_but_memory(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowad_fast.stages import maps

    model = random_model()
    x = tokens(model, 2)
    scorer = Density(steps=2, probes=7, exact=exact)
    whole = scorer.prepare(model)
    count = len(whole.probes)
    assert whole.plan(2, x.device) == (count, count)
    expected, error = whole(x), whole.with_error(x)[1]
    for most, together in ((1, 1), (3, -(-count // -(-count // 3))), (count, count)):
        for wide in (1, 2, count):
            part = scorer.prepare(model, Arithmetic(probe_bytes=whole.state_bytes * 2 * most))
            monkeypatch.setattr(maps, "WIDE_BYTES", whole.wide_bytes * 2 * wide)
            assert part.plan(2, x.device) == (together, -(-together // -(-together // min(wide, together))))
            assert relative(part(x), expected) < 1e-5
            assert torch.allclose(part.with_error(x)[1], error, atol=1e-4)


def test_probes_are_cut_into_parts_of_one_size_by_what_a_gpu_has_free(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Density(steps=2, probes=10).prepare(random_model())
    asked = []

    def free(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 8 * 8 * module.state_bytes * 2, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    gpu = torch.device("cuda", 0)
    assert module.plan(2, gpu)[0] == 5, "8 fit, so 10 go in two parts, of 5"
    assert module.plan(4, gpu)[0] == 4, "4 fit, so 10 go in three parts: 4, 4 and 2"
    assert module.plan(2, gpu)[0] == 5 and len(asked) == 2, "asked once for a batch, never while it is captured"


def test_the_primal_of_the_papers_model_runs_once_a_step_on_80_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """At batch 32 and K = 10, beside weights of 2.4 GB and as much again; on 40 GB in two chunks."""
    spec = PRESETS["paper"].spec
    assert spec is not None
    gpu, sizes = torch.device("cuda", 0), spec.velocity
    for free, chunk in ((75 * 2**30, 10), (36 * 2**30, 5)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        module = DensityMap(None, (), torch.ones(10, 1, 1, 1), sizes, False, None)  # type: ignore[arg-type]
        assert module.plan(32, gpu) == (10, chunk)


class LiveTangents(TorchDispatchMode):
    """The most tangents whose activations of one width were alive at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0
        self.seen: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, Tensor) and one.ndim == 4 and one.shape[-1] == self.width:
                self.seen[id(one)] = weakref.ref(one)
        alive = {one.untyped_storage()._cdata: len(one) for ref in self.seen.values() if (one := ref()) is not None}
        self.most = max(self.most, sum(alive.values()))
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_wide_activations_exist_for_a_chunk_of_tangents_at_a_time(precision: str) -> None:
    model = random_model(channels=16, hidden_size=32, mlp_ratio=3.0)
    field = model.at(TIMES, Arithmetic(precision))  # type: ignore[arg-type]
    x, z = tokens(model), torch.sign(tokens(model, 12, 5))[:, None]
    most = {}
    for count, chunk in ((4, 4), (12, 4), (12, 12)):
        with torch.no_grad(), LiveTangents(width=96) as live:  # that of the MLP and of q, k and v together
            field.dual(x, z[:count], 0, None, chunk)
        most[count, chunk] = live.most
    assert most[4, 4] == most[12, 4] == most[12, 12] / 3 > 0, most


def test_standard_errors_are_those_of_independent_draws() -> None:
    model = random_model(std=0.3)
    x1 = tokens(model, 2).transpose(1, 2).unflatten(2, (4, 4))
    maps = torch.stack([Density(steps=1, probes=4, seed=seed).map(model, x1) for seed in range(60)])
    _, error = Density(steps=1, probes=64, seed=99).map_with_error(model, x1)
    measured, predicted = maps.var(0).mean(), (error.square() * 64 / 4).mean()
    assert 0.7 < float(measured / predicted) < 1.4


@pytest.mark.parametrize(
    "scorer", [Inversion(), Reconstruction(steps=4), Reconstruction(steps=4, start="inversion"), Density(probes=500)]
)
def test_scorers_agree_with_the_reference_path(scorer: Inversion | Reconstruction | Density) -> None:
    model = random_model()
    x1 = tokens(model, 2).transpose(1, 2).unflatten(2, (4, 4))
    got, expected = scorer.map(model, x1), reference_map(model, scorer, x1)
    if isinstance(scorer, Density):  # other noise per location, the same total
        torch.testing.assert_close(got.sum((1, 2)), expected.sum((1, 2)), rtol=1e-4, atol=1e-3)
        # Two estimates with independent-looking noise differ by at most a few of their standard errors.
        error = scorer.map_with_error(model, x1)[1]
        assert ((got - expected).abs() / error).max() < 8
    else:
        assert relative(got, expected) < 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("scorer", [Inversion(), Density(probes=2)])
def test_half_precision_exports_as_plain_torch_operators(precision: str, scorer: Inversion | Density) -> None:
    model = random_model()
    module = scorer.prepare(model, Arithmetic(precision))  # type: ignore[arg-type]
    x = tokens(model, 2)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in", "_operator")) for name in called), called
    torch.testing.assert_close(program.module()(x[:1]), module(x[:1]), rtol=1e-2, atol=1e-2)


def test_keep_rules_change_what_a_scorer_computes() -> None:
    model = random_model(channels=16, hidden_size=64, std=0.1)
    x = tokens(model)
    kept = VelocityModel(model.config.model_copy(update={"keep_bf16": ("*",)}), model.dit)
    kept.dit.config = kept.config
    fp8, bf16 = (
        random_model(channels=16, hidden_size=64, std=0.1).at(TIMES, Arithmetic("fp8")),
        kept.at(TIMES, Arithmetic("fp8")),
    )
    expected = random_model(channels=16, hidden_size=64, std=0.1).at(TIMES)(x, 0)
    assert relative(bf16(x, 0), expected) < 0.5 * relative(fp8(x, 0), expected)


@pytest.mark.skipif(not can_pack(), reason="oneDNN's packed product exists on x86 CPUs only")
def test_packed_linears_compute_the_same_and_share_what_is_not_packed() -> None:
    model = random_model()
    x = tokens(model, 2)
    for scorer in (Inversion(), Density(probes=3)):
        plain = scorer.prepare(model)
        packed = pack(plain, keep=(reference,))
        kinds = {type(layer) for layer in packed.modules() if isinstance(layer, Layer)}
        assert kinds == {PackedLinear} and packed.field.table is plain.field.table  # type: ignore[attr-defined]
        assert not any(isinstance(layer, PackedLinear) for layer in plain.modules()), "the original stays"
        with torch.inference_mode():
            assert relative(packed(x), plain(x)) < 1e-5
