"""Accuracy of peers and of ours: what is trained, judged and kept, method by method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flowad_fast import bundle
from flowad_fast.benchmarks.demo import judging
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.record.machine import Moment, Part
from flowad_fast.benchmarks.record.peers import Accuracy, PeerRow, PeersRecord, Training
from flowad_fast.benchmarks.runs import peers_models
from flowad_fast.benchmarks.runs.evaluations import Draws, Kept, evenly
from flowad_fast.benchmarks.runs.peers_models import Peer
from flowad_fast.benchmarks.runs.peers_training import Budget, Parts
from flowad_fast.data.images import read_frame
from flowad_fast.data.samples import Dataset, Sample
from flowad_fast.detector import load
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.evaluation.metrics import image_metrics
from flowad_fast.files import digest, make_folder, replacing, sha256
from flowad_fast.shipped import weight_file
from flowad_fast.stages.scorers import Inversion, Mismatch

CHUNK = 32
"""Photos whose scores are kept together."""
CALL = 4
"""Photos per call when peers judge; the time per frame is measured with one."""
FRAMES = 8
"""Photos that a frame's time is measured on, of the first product."""
Floats = NDArray[np.float32]
Tell = Callable[[str], None]


@dataclass
class Run:
    """What one run needs everywhere, and the rows that it has so far."""

    dataset: Dataset
    products: tuple[str, ...]
    budget_s: float
    threads: int
    device: str
    download: bool
    cache: Path
    tell: Tell
    before: Moment = field(default_factory=moment)
    rows: dict[str, PeerRow] = field(default_factory=dict)
    anchor: str = ""

    def tests(self, product: str) -> tuple[Sample, ...]:
        """A product's test photos."""
        return self.dataset.select("test", product)

    def shown(self) -> tuple[Sample, ...]:
        """The photos that a frame's time is measured on."""
        return evenly(self.tests(self.products[0]), FRAMES)

    def record(self) -> PeersRecord:
        """The rows so far, ours first."""
        height, width = read_frame(self.shown()[0].path).shape[:2]
        rows = tuple(sorted(self.rows.values(), key=lambda row: not row.ours))
        return PeersRecord(
            preset=", ".join(row.name for row in self.rows.values() if row.ours) or "peers alone",
            environment=environment(self.before, anomalib=anomalib()).but(threads=self.threads),
            roofs=Roofs(reason="not measured here"), dataset=self.dataset.name, products=self.products,
            budget_s=self.budget_s, threads=self.threads, frames=f"{FRAMES} test photos of {self.products[0]}",
            frame_size=(height, width), anchor=self.anchor, cases=rows,
        )  # fmt: skip


def our_methods() -> tuple[judging.Method, ...]:
    """One evaluation, three, and the demo's recipe; all with location statistics and the image score `top`."""
    recipe = judging.methods()[0]
    return (
        judging.Method("ours, one evaluation", Mismatch(), "top", located=True),
        judging.Method("ours, three evaluations", Inversion(steps=3), "top", located=True),
        judging.Method("ours, the demo's recipe", recipe.scorer, recipe.aggregate, recipe.located),
    )


def our_bundle(method: judging.Method, cache: Path, tell: Tell) -> Path:
    """The method's bundle of the shipped model; exported once, with its parity certificate."""
    name = digest([repr(method), sha256(weight_file(judging.CELLS))])[:12]
    folder = cache / "bundles" / name
    if not folder.is_dir():
        make_folder(folder.parent)
        tell(f"export: {method.name}")
        judging.export(method, folder)
    return folder


def judge_ours(run: Run, method: judging.Method) -> PeerRow:
    """A row of ours without its time."""
    folder = our_bundle(method, run.cache, run.tell)
    detector = load(folder, engine="onnxruntime", device=run.device, threads=run.threads)
    identity = folder.name

    def scores(samples: Sequence[Sample]) -> Floats:
        frames = np.stack([read_frame(sample.path) for sample in samples])
        return detector(frames, [sample.category for sample in samples]).score.astype(np.float32)

    accuracy = []
    for product in run.products:
        run.tell(f"accuracy: {method.name}, {product}")
        accuracy.append(ranked(product, run.tests(product), scored(run, identity, product, scores), None))
    parity = next(a.parity for a in bundle.read(folder)[1].artefacts.values() if a.engine == "onnxruntime")
    return our_row(run, method).but(
        accuracy=tuple(accuracy),
        proof="" if parity is None else f"largest map error against the float32 reference {parity.max_error:.0e}",
    )


def our_row(run: Run, method: judging.Method) -> PeerRow:
    """The row of a method of ours before anything was measured."""
    manifest = bundle.read(our_bundle(method, run.cache, run.tell))[1]
    model = manifest.model
    return PeerRow(
        name=method.name, ours=True, library="flowad-fast, onnxruntime fp32", backbone="EfficientNet-Lite0",
        weights="shipped", options=f"{method.scorer!r}, {method.aggregate}, location statistics",
        input_size=model.image.size, evaluations=method.scorer.evaluations(model.velocity),
        products=len(model.classes.labels),
    )  # fmt: skip


def peer_row(run: Run, peer: Peer) -> PeerRow:
    """The row of a peer before anything was measured."""
    return PeerRow(
        name=peer.name, ours=False, library=f"anomalib {anomalib()}", backbone=peer.backbone, weights=peer.weights,
        options=peer.options, input_size=peer.crop or peer.size,
        accuracy_reason="" if peer.weights != "random" else
        "its weights cannot be had without a download (--download), random ones rank nothing: time only",
    )  # fmt: skip


class Taught(Part):
    """What stands beside a peer's weights in the cache."""

    training: Training
    proof: str


def trained(run: Run, peer: Peer, product: str) -> tuple[Path, Training, str]:
    """A peer's weights for a product, what it saw, and the proof of its backbone; trained unless the cache has it."""
    versions = {name: installed(name) for name in ("anomalib", "torch", "timm")}
    budget = Budget(run.budget_s, run.threads, run.device)
    folder = run.cache / peers_models.identity(peer, product, budget, versions)
    weights, note = folder / "model.pt", folder / "training.json"
    if not (weights.is_file() and note.is_file()):
        make_folder(folder)
        run.tell(f"training: {peer.name}, {product}, at most {run.budget_s:g} s of {run.threads} thread(s)")
        good, held = (
            [read_frame(sample.path) for sample in run.dataset.select(split, product, 0)]
            for split in ("train", "calibration")
        )
        module = peer.built(run.download)
        said = peer.proved(module)
        module.to(run.device)
        parts = Parts(good, held, peer.prepared, run.device)
        reached = peer.train(module, parts, Budget(run.budget_s, run.threads, run.device))
        peers_models.keep(module.model, weights)
        with replacing(note) as file:  # written last: with it the training is whole
            file.write(Taught(training=reached, proof=said).model_dump_json(indent=1).encode())
    kept = Taught.model_validate_json(note.read_text(encoding="utf-8"))
    return weights, kept.training, kept.proof


def judge_peer(run: Run, peer: Peer) -> PeerRow:
    """A peer's row without its time: trained and judged for every product; what fails costs only itself."""
    row = peer_row(run, peer)
    if peer.weights == "random":
        return row
    accuracy: list[Accuracy] = []
    for product in run.products:
        try:
            weights, reached, said = trained(run, peer, product)
            row = row.but(proof=said or row.proof)
            model = peer.built(run.download).model
            peers_models.restore(model, weights)
            model.to(run.device).eval()
        except EngineUnavailableError as error:
            return row.but(accuracy_reason=str(error))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # the library's own
            reason = (str(error).strip().splitlines() or [""])[0]
            return row.but(accuracy=tuple(accuracy), accuracy_reason=f"failed: {type(error).__name__}: {reason}"[:300])

        def scores(samples: Sequence[Sample], model: nn.Module = model) -> Floats:
            frames = torch.from_numpy(np.stack([read_frame(sample.path) for sample in samples])).to(run.device)
            return peers_models.scores_of(peer, model, frames)[1].float().cpu().numpy()

        run.tell(f"accuracy: {peer.name}, {product}")
        found = scored(run, weights.parent.name, product, scores)
        accuracy.append(ranked(product, run.tests(product), found, reached))
    return row.but(accuracy=tuple(accuracy))


def scored(run: Run, identity: str, product: str, scores: Callable[[Sequence[Sample]], Floats]) -> Floats:
    """Image scores (n,) of a product's test photos, chunk by chunk from the cache where it has them."""
    kept = Kept(run.cache / "scores")
    tests = run.tests(product)
    found = []
    for start in range(0, len(tests), CHUNK):
        chunk = tests[start : start + CHUNK]
        key = [identity, product, [sample.path.name for sample in chunk]]

        def make(chunk: Sequence[Sample] = chunk) -> Floats:
            return np.concatenate([scores(chunk[i : i + CALL]) for i in range(0, len(chunk), CALL)])

        found.append(kept.get(key, make))
    return np.concatenate(found)


def ranked(product: str, tests: Sequence[Sample], scores: Floats, training: Training | None) -> Accuracy:
    """How scores (n,) rank test photos."""
    labels = np.array([sample.label for sample in tests])
    metrics = image_metrics(labels, scores.astype(np.float64))
    _, resampled = Draws(labels).auroc([scores])
    low, high = np.percentile(resampled, [2.5, 97.5])
    rounded = {name: round(float(metrics[name]), 5) for name in ("image_auroc", "image_ap", "image_f1max")}
    return Accuracy(
        product=product, photos=len(tests), defective=int(labels.sum()), low=round(float(low), 5),
        high=round(float(high), 5), training=training, **rounded,
    )  # fmt: skip


def installed(name: str) -> str | None:
    """Of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def anomalib() -> str:
    """Its version.

    Raises:
        EngineUnavailableError: it is not installed.
    """
    found = installed("anomalib")
    if found is None:
        raise EngineUnavailableError(
            "anomalib is not installed; in an environment of its own: pip install anomalib -c constraints.txt"
        )
    return found
