"""The engine registry, where precisions can run, and what is measured: probes, attention backends."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from flowad_fast.config import Backbone, ImageConfig, ModelConfig, Precision, VelocityConfig
from flowad_fast.detector import Detector, load
from flowad_fast.engines import ENGINES, attention, cudagraph
from flowad_fast.engines.attention import BACKENDS, choose_attention
from flowad_fast.engines.eager import EagerEngine
from flowad_fast.engines.precision import PRECISIONS, arithmetic, check_precision
from flowad_fast.engines.start import operators, start_from_model
from flowad_fast.errors import ConfigError, EngineUnavailableError
from flowad_fast.evaluation.probes import choose_probes
from flowad_fast.kernels import fused
from flowad_fast.kernels.account import H100, WIDTHS
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.arithmetic import NUMBERS, Arithmetic
from flowad_fast.stages.features import BACKBONES, FeatureExtractor, fold_batch_norms
from flowad_fast.stages.linear import can_pack
from flowad_fast.stages.scorers import Density, Inversion
from flowad_fast.stages.velocity import DiT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> FlowModel:
    torch.manual_seed(0)
    config = VelocityConfig(channels=192, height=4, width=4, hidden_size=32, depth=2, num_heads=2)
    dit = DiT(config)
    for parameter in dit.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    spec = ModelConfig(velocity=config, backbone="efficientnet-lite0", image=ImageConfig(size=64))
    return FlowModel(spec, dit, FeatureExtractor("efficientnet-lite0"))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (4, 64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_a_detector_runs_in_every_precision_on_the_cpu(
    model: FlowModel, frames: np.ndarray, precision: str, ops: str
) -> None:
    reference = Detector.from_model(model, Inversion(), device="cpu")(frames)
    got = Detector.from_model(model, Inversion(), device="cpu", precision=precision, ops=ops)(frames)  # type: ignore[arg-type]
    how = "" if (precision, ops) == ("fp32", "reference") else f" ({precision}, {ops})"
    assert got.map.dtype == np.float32 and got.engine == "eager on cpu" + how
    error = np.abs(got.map - reference.map).max() / reference.map.std()
    bounds = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "fp8": 4e-1}
    assert error < bounds[precision]
    if precision != "fp32":
        assert error > 1e-6, "the precision was not applied"


def test_tf32_is_refused_without_a_gpu(model: FlowModel) -> None:
    with pytest.raises(EngineUnavailableError, match="tf32 is a mode of NVIDIA GPUs, the device is cpu; ask for fp32"):
        Detector.from_model(model, Inversion(), device="cpu", precision="tf32")
    with pytest.raises(EngineUnavailableError, match="unknown precision 'bf61'; did you mean 'bf16'"):
        check_precision("bf61", CPU)


@pytest.mark.parametrize(("precision", "found", "fits"), [("fp8", (9, 0), True), ("fp8", (8, 6), False),
                                                          ("bf16", (7, 5), False), ("fp16", (7, 5), True)])  # fmt: skip
def test_a_gpu_that_is_too_old_for_a_precision_is_named(
    monkeypatch: pytest.MonkeyPatch, precision: str, found: tuple[int, int], fits: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    if fits:
        check_precision(precision, torch.device("cuda", 0))
    else:
        with pytest.raises(EngineUnavailableError, match=f"needs compute capability .* Some GPU with {found[0]}"):
            check_precision(precision, torch.device("cuda", 0))


def test_switches_of_float32_are_set_only_inside() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    for precision, mode in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")):
        with pytest.raises(KeyError), arithmetic(precision, torch.device("cuda", 0)):  # type: ignore[arg-type]
            assert (matmul.fp32_precision, conv.fp32_precision) == (mode, mode)
            # What reads torch's older interface, as Inductor's autotuning does, finds the same and does not raise.
            assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is (precision == "tf32")
            raise KeyError
        assert (matmul.fp32_precision, conv.fp32_precision) == before
    with arithmetic("fp32", CPU):
        assert (matmul.fp32_precision, conv.fp32_precision) == before


def test_every_registered_engine_can_be_started_somehow() -> None:
    for name, backend in ENGINES.items():
        assert backend.starts_from in ("model", "artefact") and backend.artefact, name
        assert backend.description
    assert set(PRECISIONS) == {"fp32", "tf32", "bf16", "fp16", "fp8"}


def test_every_precision_and_backbone_is_in_every_table() -> None:
    from flowad_fast.export.verify import TOLERANCES

    for table in (NUMBERS, WIDTHS, H100.flops):
        assert set(table) == set(get_args(Precision))
    assert set(TOLERANCES) == {*get_args(Precision), "int8"}, "what no engine computes in, but a graph may be made of"
    assert set(BACKBONES) == set(get_args(Backbone))


def test_engines_and_operators_that_do_not_exist_are_answered_with_the_nearest(model: FlowModel) -> None:
    with pytest.raises(EngineUnavailableError, match="unknown engine 'eagre'; did you mean 'eager'"):
        Detector.from_model(model, Inversion(), engine="eagre")
    with pytest.raises(EngineUnavailableError, match="unknown operators 'fusde'; did you mean 'fused'"):
        Detector.from_model(model, Inversion(), ops="fusde")
    assert operators("fused") is fused


def test_an_engine_of_exported_bundles_does_not_start_from_a_model(model: FlowModel) -> None:
    with pytest.raises(EngineUnavailableError, match="onnxruntime runs exported bundles only; export .* eager"):
        start_from_model("onnxruntime", ScoringPipeline(model, Inversion()), "cpu")


def test_an_engine_leaves_the_model_where_it_is(model: FlowModel) -> None:
    pipeline = ScoringPipeline(model, Inversion(), how=Arithmetic("bf16"))
    moved = pipeline.on(torch.device("meta"))
    assert moved.velocity.table.device.type == "meta"  # type: ignore[attr-defined]
    assert model.device == CPU and pipeline.velocity.table.device == CPU  # type: ignore[attr-defined]
    assert next(model.backbone.parameters()).device == CPU
    assert moved.ops is pipeline.ops and pipeline.on(CPU) is pipeline


def test_weights_of_a_bundle_run_in_a_chosen_precision(model: FlowModel, frames: np.ndarray, tmp_path: Path) -> None:
    from flowad_fast.export.exporter import export_bundle

    export_bundle(model, Inversion(), tmp_path / "bundle", formats=("eager",), frames=frames, quiet=True)
    exact, half = load(tmp_path / "bundle", device="cpu"), load(tmp_path / "bundle", device="cpu", precision="bf16")
    error = np.abs(exact(frames).map - half(frames).map).max() / exact(frames).map.std()
    assert 1e-6 < error < 1e-1
    with pytest.raises(EngineUnavailableError, match="nothing for the engine onnxruntime .it has: eager.; export"):
        load(tmp_path / "bundle", engine="onnxruntime")
    with pytest.raises(EngineUnavailableError, match="needs an NVIDIA GPU"):
        load(tmp_path / "bundle", engine="cudagraph", device="cpu")
    with pytest.raises(EngineUnavailableError, match="unknown engine"):
        load(tmp_path / "bundle", engine="egaer")


def test_the_number_of_probes_follows_the_measured_noise(model: FlowModel, frames: np.ndarray) -> None:
    scorer, choice = choose_probes(model, Density(steps=1, seed=3), frames, share=0.5, measure_with=16)
    noise = float(replace(scorer, probes=64).map_with_error(model, model.features(frames))[1].square().mean()) * 64
    assert choice.one_probe_noise == pytest.approx(noise**0.5, rel=0.15), "as another, larger draw says"
    assert choice.measured_share <= 0.5 and scorer == Density(steps=1, seed=3, probes=choice.probes)
    assert choice.standard_error == pytest.approx(choice.one_probe_noise / choice.probes**0.5)
    assert choice.measured_share == pytest.approx(choice.standard_error / choice.spread)
    # Just below what the choice reaches, it is no longer enough; far above, one probe is.
    more, _ = choose_probes(model, Density(steps=1, seed=3), frames, share=choice.measured_share * 0.99,
                            measure_with=16)  # fmt: skip
    one, _ = choose_probes(model, Density(steps=1), frames, share=1e6)
    assert more.probes > choice.probes and one.probes == 1
    record = choice.record()
    assert record["probes"] == choice.probes and record["frames"] == 4 and record["measured_with"] == 16


def test_probes_are_not_chosen_from_nothing(model: FlowModel, frames: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="needs good frames"):
        choose_probes(model, Density(), frames[:0])
    with pytest.raises(ConfigError, match="at least 2 probes"):
        choose_probes(model, Density(), frames, measure_with=1)
    with pytest.raises(ConfigError, match="no probes to choose"):
        choose_probes(model, Density(exact=True), frames)
    with pytest.raises(ConfigError, match="64 probes have a standard error of .* raise the share"):
        choose_probes(model, Density(steps=1), frames[:1], share=1e-6)


def test_the_attention_backend_is_reported_and_a_stored_choice_obeyed(model: FlowModel, frames: np.ndarray) -> None:
    own = choose_attention(model.config, torch.float32, CPU)
    assert own.backend in BACKENDS and not own.milliseconds, "the CPU runs what torch takes"
    stored = choose_attention(model.config, torch.float32, CPU, stored="math")
    assert stored.backend == "math" and stored.milliseconds["math"] > 0  # type: ignore[operator]
    pipeline = ScoringPipeline(model, Inversion())
    engine = EagerEngine(pipeline, "cpu", attention="math")
    assert engine.attention.backend == "math"
    np.testing.assert_allclose(
        engine.run(frames, None)[0], EagerEngine(pipeline, "cpu").run(frames, None)[0], rtol=1e-3
    )
    with pytest.raises(EngineUnavailableError, match="unknown attention backend 'flsh'; did you mean 'flash'"):
        choose_attention(model.config, torch.float32, CPU, stored="flsh")
    with pytest.raises(EngineUnavailableError, match="attention backend cudnn cannot run .* on cpu"):
        choose_attention(model.config, torch.float32, CPU, stored="cudnn")


FAKES = {
    "cudnn": (1.0, lambda exact: exact + 0.05 * exact.square().mean().sqrt()),
    "flash": (2.0, lambda exact: torch.full_like(exact, float("nan"))),
    "efficient": (3.0, lambda exact: exact + 0.01 * exact.square().mean().sqrt()),
    "math": (4.0, lambda exact: exact),
}
"""Backends by name: their time, and what they make of the right result: a little wrong, nothing, right enough."""


@pytest.fixture
def fake_backends(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], float]:
    """torch's attention replaced by `FAKES`; a clock that says the time of the backend that it is given."""
    true, ran = attention.attend, [""]

    def attend(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.dtype == torch.bfloat16:  # float32 is what they are compared with
            assert not q.is_contiguous() and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        ran[0] = name
        return FAKES[name][1](true("math", q, k, v))

    def clock(run: Callable[[], object]) -> float:
        run()
        return FAKES[ran[0]][0] * 1e3

    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "NAMES", tuple(attention.BACKENDS))
    return clock


def test_a_fast_but_wrong_attention_backend_is_refused(
    model: FlowModel, fake_backends: Callable[[Callable[[], object]], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(stored: str | None = None) -> attention.AttentionChoice:
        return choose_attention(model.config, torch.bfloat16, CPU, 2, stored, fake_backends)

    choice = choose()
    assert choice.backend == "efficient", "cudnn and flash are faster, and wrong"
    assert choice.milliseconds["cudnn"] < choice.milliseconds["efficient"] < choice.milliseconds["math"]  # type: ignore[operator]
    assert choice.errors["cudnn"] == pytest.approx(0.05, abs=0.01) and choice.errors["flash"] == float("inf")
    assert choice.shown_errors == choice.errors | {"flash": None}, "as JSON"
    assert choice.errors["math"] <= choice.errors["efficient"] <= attention.MOST_ERROR  # type: ignore[operator]
    with pytest.raises(EngineUnavailableError, match="cudnn has an error of 0.05.? .at most 0.02. for .* on cpu"):
        choose("cudnn")
    monkeypatch.setattr(attention, "MOST_ERROR", 0.1)
    assert choose().backend == "cudnn", "the limit alone has kept it out"


def test_short_attention_runs_where_it_was_chosen_and_only_there(
    model: FlowModel, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(attention.SHORT) == {"short16", "short32", "short64"}
    with pytest.raises(EngineUnavailableError, match="short16 cannot run"):
        choose_attention(model.config, torch.bfloat16, CPU, 2, "short16")
    used: list[int] = []
    true = fused.attention_short

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int) -> torch.Tensor:
        used.append(rows)
        return true(q, k, v, rows)

    monkeypatch.setattr(fused, "attention_short", spy)
    pipeline = ScoringPipeline(model, Inversion(), how=Arithmetic("bf16", fused))
    engine = cudagraph.CudaGraphEngine(pipeline, "cpu", (4,), cudagraph.DirectStep)
    expected = engine.run(frames, None)[0].copy()
    assert not used
    chosen = attention.AttentionChoice("short32", {"short32": 1.0}, {"short32": 0.0})
    monkeypatch.setattr(cudagraph, "choose_attention", lambda *_, **__: chosen)
    engine = cudagraph.CudaGraphEngine(pipeline, "cpu", (4,), cudagraph.DirectStep)
    got = engine.run(frames, None)[0]
    assert set(used) == {32} and len(used) == 3 * model.config.depth
    assert np.abs(got - expected).max() < 1e-2 * expected.std()
    used.clear()
    pipeline(torch.from_numpy(frames))
    assert not used


def test_short_attention_quantises_what_an_fp8_layer_takes(
    frames: np.ndarray, monkeypatch: pytest.MonkeyPatch, model: FlowModel
) -> None:
    used: list[tuple[int, ...]] = []
    true = fused.attention_short_fp8

    def spy(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = true(*args)
        used.append((args[-1], *found[0].shape))
        return found

    monkeypatch.setattr(fused, "attention_short_fp8", spy)
    pipeline = ScoringPipeline(model, Inversion(), how=Arithmetic("fp8", fused))
    assert pipeline.velocity.quantises_attention
    expected = ScoringPipeline(model, Inversion())(torch.from_numpy(frames))[0]
    drift = []
    for name in ("math", "short64"):
        chosen = attention.AttentionChoice(name, {name: 1.0}, {name: 0.0})
        monkeypatch.setattr(cudagraph, "choose_attention", lambda *_, _chosen=chosen, **__: _chosen)
        got = cudagraph.CudaGraphEngine(pipeline, "cpu", (4,), cudagraph.DirectStep).run(frames, None)[0]
        drift.append(float(np.square(got - expected.numpy()).mean() ** 0.5 / expected.numpy().std()))
        assert bool(used) == (name == "short64")
    config = model.config
    assert set(used) == {(64, 4, config.tokens, config.hidden_size)} and len(used) == 3 * config.depth
    assert drift[1] < 1.15 * drift[0]


def test_quantising_counts_where_the_next_layer_is_fp8(model: FlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised: list[tuple[int, ...]] = []
    monkeypatch.setattr(attention, "quantise_rows", lambda x: quantised.append(tuple(x.shape)))
    config = model.config
    for wanted in (False, True):
        quantised.clear()
        choose_attention(config, torch.bfloat16, CPU, 2, "math", lambda run: run() or 1.0, quantised=wanted)
        assert set(quantised) == ({(2, config.tokens, config.hidden_size)} if wanted else set())


def test_every_bucket_has_its_own_attention_backend(model: FlowModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(config: object, dtype: object, device: object, batch: int, stored: str | None, **_: object) -> object:
        return attention.AttentionChoice("math" if batch > 2 else "flash", {"math": 1.0}, {"math": 0.0})

    monkeypatch.setattr(cudagraph, "choose_attention", choose)
    used: list[tuple[int, str]] = []

    class Step(cudagraph.DirectStep):
        def replay(self) -> None:
            used.append((len(self.buffers.frames), self.attention.backend))
            self.buffers.out.maps.zero_(), self.buffers.out.scores.zero_()

    engine = cudagraph.CudaGraphEngine(ScoringPipeline(model, Inversion()), "cpu", (1, 2, 4), Step)
    engine.run(np.zeros((7, 64, 64, 3), np.uint8), None)
    assert engine.attention.backend == "math" and used == [(4, "math"), (4, "math")]
    engine.run(np.zeros((1, 64, 64, 3), np.uint8), None)
    assert used[-1] == (1, "flash")
    assert {size: one["chosen"] for size, one in engine.details["attentions"].items()} == {
        1: "flash", 2: "flash", 4: "math",
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16", "fp8"])
@pytest.mark.parametrize("ops", ["reference", "fused"])
@pytest.mark.parametrize("scorer", [Inversion(), Density(probes=2)])
def test_precisions_on_a_gpu(
    model: FlowModel, frames: np.ndarray, precision: str, ops: str, scorer: Inversion | Density
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    reference = Detector.from_model(model, scorer, device="cpu")(frames)
    got = Detector.from_model(model, scorer, device="cuda", precision=precision, ops=ops)(frames)  # type: ignore[arg-type]
    error = np.abs(got.map - reference.map).max() / reference.map.std()
    assert error < {"fp32": 1e-3, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1, "fp8": 4e-1}[precision]


@pytest.mark.gpu
def test_attention_is_measured_on_a_gpu(model: FlowModel) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    choice = choose_attention(model.config, torch.bfloat16, torch.device("cuda", 0))
    able = {name: ms for name, ms in choice.milliseconds.items() if ms is not None}
    right = {name: ms for name, ms in able.items() if choice.errors[name] <= attention.MOST_ERROR}  # type: ignore[operator]
    assert set(choice.milliseconds) == set(BACKENDS) and right[choice.backend] == min(right.values())


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-b4"])
def test_folded_batch_norms_compute_the_same_and_leave_the_original_as_it_was(name: Backbone) -> None:
    torch.manual_seed(1)
    extractor = FeatureExtractor(name)
    for norm in [one for one in extractor.modules() if isinstance(one, torch.nn.BatchNorm2d)]:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.1)
    before = {key: value.clone() for key, value in extractor.state_dict().items()}
    folded = copy.deepcopy(extractor, {id(one): one for one in (*extractor.parameters(), *extractor.buffers())})
    fold_batch_norms(folded.backbone)
    assert not any(isinstance(one, torch.nn.BatchNorm2d) for one in folded.modules())
    images = torch.randn(2, 3, 64, 64)
    expected = extractor(images)
    assert (folded(images) - expected).abs().max() < 1e-4 * expected.std()
    assert all(torch.equal(value, before[key]) for key, value in extractor.state_dict().items())


def test_the_eager_engine_folds_a_copy_on_the_cpu(model: FlowModel, frames: np.ndarray) -> None:
    if not can_pack():
        pytest.skip("folded beside packed linears, which this machine does not have")
    pipeline = ScoringPipeline(model, Inversion())
    engine = EagerEngine(pipeline, "cpu")
    norms = [sum(isinstance(one, torch.nn.BatchNorm2d) for one in p.modules()) for p in (pipeline, engine.pipeline)]
    assert norms[0] > 0 == norms[1]
    with torch.no_grad():
        maps, _ = pipeline(torch.from_numpy(frames))
    assert np.abs(engine.run(frames, None)[0] - maps.numpy()).max() < 1e-3 * float(maps.std())
