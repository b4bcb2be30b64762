"""What each function evaluation buys: image AUROC of scorers with 1, 2 and 3, by aggregate, over draws of the noise.

Nothing is timed, so it may run on a busy machine. Features are computed once, and with a folder to keep them in also
every scorer's maps: a run that was ended goes on where it stopped.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowad_fast.benchmarks.measure.cases import make_scorer
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record.limits import Roofs
from flowad_fast.benchmarks.record.record import EvaluationsRecord, EvaluationsRow, Interval
from flowad_fast.data.images import read_frame
from flowad_fast.data.layouts import elpv, read_dataset
from flowad_fast.data.samples import Sample
from flowad_fast.errors import ConfigError
from flowad_fast.evaluation.evaluate import select_tests
from flowad_fast.files import digest, make_folder, replacing
from flowad_fast.kernels import reference as ops
from flowad_fast.model import FlowModel
from flowad_fast.stages.aggregates import Aggregate
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import SCORERS, Inversion, Scorer

AGGREGATES: tuple[Aggregate, ...] = ("max", "top")
RESAMPLES = 2000
"""Of the photos, within the good and within the defective ones."""

Floats = NDArray[np.float32]
Locate = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""From maps (n, h, w) of good parts to what location statistics make of maps (m, h, w)."""


@dataclass(frozen=True)
class Photos:
    """Good parts for location statistics, and labelled ones, all of one class of the model (None without classes)."""

    dataset: str
    category: str
    good: tuple[Sample, ...]
    test: tuple[Sample, ...]
    index: int | None = None

    @property
    def every(self) -> tuple[Sample, ...]:
        """Good parts, then the labelled ones."""
        return self.good + self.test


def read(model: FlowModel, layout: str, data: Path | None, lists: Path | None, category: str, most: int) -> Photos:
    """The labelled photos of a category, and at most so many of its training parts.

    Raises:
        ConfigError: no such category in the data or of the model, or no training parts.
    """
    chosen = elpv(data, category) if layout == "elpv" else read_dataset(layout, data, lists)  # type: ignore[arg-type]
    test = select_tests(chosen, [category])[category]
    good = evenly(chosen.select("train", category, label=0), most)
    if len(good) < 2:
        raise ConfigError(
            f"{len(good)} training parts of {category!r} in layout {layout}, expected at least 2: location statistics "
            "are of them; choose a layout with training parts"
        )
    index = None
    if model.config.use_class_labels:
        chosen_class = model.spec.classes.indices([category], 1)
        assert chosen_class is not None, "the model is conditional"
        index = int(chosen_class[0])
    return Photos(chosen.name, category, good, test, index)


def evenly(samples: Sequence[Sample], most: int) -> tuple[Sample, ...]:
    """At most so many of the samples, evenly taken."""
    if len(samples) <= most:
        return tuple(samples)
    return tuple(samples[i] for i in np.linspace(0, len(samples) - 1, most).astype(int))


class Kept:
    """Arrays in a folder by what they were computed from; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            make_folder(folder)

    def get(self, key: object, make: Callable[[], Floats]) -> Floats:
        """The array that was kept for `key`, else a new one; `key` is a JSON value."""
        if self.folder is None:
            return make()
        path = self.folder / f"{digest(key)[:24]}.npy"
        if path.is_file():
            found: Floats = np.load(path)
            return found
        made = make()
        with replacing(path) as file:
            np.save(file, made)
        return made


def scorers_of(kinds: Sequence[str], counts: Sequence[int], seeds: int, model: FlowModel) -> list[list[Scorer]]:
    """For each kind and number of evaluations the scorers of each seed; one where nothing is drawn."""
    if seeds < 1:
        raise ConfigError(f"got {seeds} seeds, expected at least 1")
    found = [make_scorer(kind, evaluations=n, probes=1, config=model.config) for kind in kinds for n in counts]
    return [
        [one] if isinstance(one, Inversion) else [replace(one, seed=seed) for seed in range(seeds)] for one in found
    ]


def run(
    model: FlowModel,
    photos: Photos,
    scorers: Sequence[Sequence[Scorer]],
    *,
    locate: Locate | None,
    kept: Kept | None = None,
    batch: int = 8,
    name: str = "checkpoint",
    progress: Callable[[int], object] = lambda n: None,
) -> EvaluationsRecord:
    """A record with a row for each scorer, with and without location statistics, and aggregate.

    Args:
        model: on the CPU or a GPU, float32.
        photos: what is judged; statistics are of `good` alone.
        scorers: as `scorers_of` gives them; all in one inner sequence differ in their seed only.
        locate: fits location statistics; None leaves their rows out.
        kept: where features and maps are kept.
        batch: photos per call.
        name: of the model, for the record.
        progress: receives the number of photos whose features or maps are there.
    """
    before, kept = moment(), kept or Kept(None)
    labels = np.array([sample.label for sample in photos.test])
    source = [_weights(model), photos.index, [[str(s.path), s.path.stat().st_size] for s in photos.every]]
    features = kept.get([source, "features"], lambda: _features(model, photos.every))
    progress(len(photos.every))
    draws = Draws(labels)
    judged: dict[tuple[int, bool, Aggregate], list[Floats]] = {}
    for i, seeds in enumerate(scorers):
        for scorer in seeds:
            maps = torch.from_numpy(
                kept.get(
                    [source, asdict(scorer)],  # type: ignore[call-overload]
                    lambda scorer=scorer: _maps(model, scorer, features, photos.index, batch),  # type: ignore[misc]
                )
            )
            progress(len(photos.every))
            good, test = maps[: len(photos.good)], maps[len(photos.good) :]
            for located in (False, True) if locate is not None else (False,):
                shown = locate(good)(test) if located and locate is not None else test
                for aggregate in AGGREGATES:
                    one = _scores(shown, aggregate, model.spec.image.size)
                    judged.setdefault((i, located, aggregate), []).append(one)
    three = next((i for i, seeds in enumerate(scorers) if seeds[0] == Inversion(steps=3)), None)
    rows = []
    for (i, located, aggregate), scores in judged.items():
        points, resampled = draws.auroc(scores)
        low, high = np.percentile(resampled, [2.5, 97.5])
        change = None
        if three is not None and (i, located) != (three, False):
            exact, theirs = draws.auroc(judged[three, False, aggregate])
            bounds = np.percentile(resampled - theirs, [2.5, 97.5])
            change = Interval(
                points=_points(np.mean(points) - np.mean(exact)), low=_points(bounds[0]), high=_points(bounds[1])
            )
        seeds = scorers[i]
        drawn = len(seeds) > 1
        n = seeds[0].evaluations(model.config)
        where = "/located" if located else ""
        rows.append(
            EvaluationsRow(
                name=f"{seeds[0].kind}/{n}{where}/{aggregate}", scorer=seeds[0].kind, options=seeds[0], evaluations=n,
                located=located, aggregate=aggregate, auroc=round(float(np.mean(points)), 5), low=round(float(low), 5),
                high=round(float(high), 5), change=change,
                seeds=tuple(getattr(one, "seed", 0) for one in seeds) if drawn else (),
                by_seed=tuple(round(float(p), 5) for p in points) if drawn else (),
            )
        )  # fmt: skip
    order = {kind: i for i, kind in enumerate(SCORERS)}
    rows.sort(key=lambda row: (row.evaluations, order[row.scorer], row.located, AGGREGATES.index(row.aggregate)))
    return EvaluationsRecord(
        preset=name, dataset=photos.dataset, category=photos.category, photos=len(labels), defective=int(labels.sum()),
        good=len(photos.good), unmeasured=None if locate else "location statistics not measured",
        environment=environment(before), cases=tuple(rows), roofs=Roofs(reason="nothing was timed"),
    )  # fmt: skip


class Draws:
    """Resamples of labelled photos, the same for every scorer, so that differences are paired."""

    def __init__(self, labels: NDArray[np.int_], seed: int = 0) -> None:
        self.bad, self.good = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        if not len(self.bad) or not len(self.good):
            raise ConfigError(f"got {len(self.good)} good and {len(self.bad)} defective photos, expected both")
        generator = np.random.default_rng(seed)
        self.weights = [
            generator.multinomial(len(one), np.full(len(one), 1 / len(one)), RESAMPLES) for one in (self.bad, self.good)
        ]

    def auroc(self, scores: Sequence[Floats]) -> tuple[list[float], NDArray[np.float64]]:
        """AUROC of each seed's scores (n,), and the mean over the seeds in every resample, (RESAMPLES,)."""
        points, resampled = [], np.zeros(RESAMPLES)
        bad, good = self.weights
        for one in scores:
            high, low = one[self.bad][:, None], one[self.good]
            wins = (high > low) + 0.5 * (high == low)
            points.append(float(wins.mean()))
            resampled += ((bad @ wins) * good).sum(1) / wins.size / len(scores)
        return points, resampled


def _features(model: FlowModel, samples: Sequence[Sample]) -> Floats:
    """(n, C, h, w); photos need not have one size."""
    return np.concatenate([model.features(read_frame(sample.path)[None]).cpu().numpy() for sample in samples])


def _maps(model: FlowModel, scorer: Scorer, features: Floats, index: int | None, batch: int) -> Floats:
    """(n, h, w)."""
    found = []
    for part in _parts(torch.from_numpy(features), batch):
        y = None if index is None else torch.full((len(part),), index, device=model.device)
        found.append(scorer.map(model, part.to(model.device), y).cpu().numpy())
    return np.concatenate(found)


def _scores(cells: Tensor, aggregate: Aggregate, size: int) -> Floats:
    """Image scores (n,) of maps (n, h, w), as engines make them."""
    parts = [image_score(ops.upsample(part, size), aggregate, part) for part in _parts(cells.float(), 32)]
    return torch.cat(parts).numpy()


def _parts(values: Tensor, size: int) -> Iterator[Tensor]:
    yield from values.split(size)


def _weights(model: FlowModel) -> str:
    """A digest of everything that features and maps depend on beside the photos."""
    found = hashlib.sha256(model.spec.model_dump_json().encode())
    for module in (model.backbone, model.dit):
        for tensor in module.state_dict().values():
            found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _points(fraction: float | np.floating) -> float:
    return round(100 * float(fraction), 3)
