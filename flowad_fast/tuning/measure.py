"""The whole measurement of `flowad-tune`: parts, features, every scorer's cells and time, judgement, choice."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import flowad_fast
from flowad_fast.bundle import now
from flowad_fast.config import Frozen
from flowad_fast.data.images import read_frame
from flowad_fast.engines import Engine
from flowad_fast.errors import ConfigError
from flowad_fast.files import digest
from flowad_fast.model import FlowModel
from flowad_fast.stages.aggregates import Aggregate
from flowad_fast.stages.location import LocationStatistics
from flowad_fast.stages.scorers import Scorer
from flowad_fast.tuning import judge
from flowad_fast.tuning.defects import DEFECTS, Defect, spoil
from flowad_fast.tuning.grid import AGGREGATES_OF, Grid, scorers_of
from flowad_fast.tuning.parts import Parts, contents_of, split
from flowad_fast.tuning.recipe import Evidence, Recipe, Separation, Timing, describe
from flowad_fast.tuning.work import CHUNK, Store, scores

Starter = Callable[[FlowModel, Scorer], Engine]
"""Starts the engine that is timed, on a scorer of a model."""
EngineName = Literal["eager", "onnxruntime"]
PER_PART = 4
"""Synthetic defects of each held-out part."""
PACKAGES = ("torch", "onnxruntime", "numpy")
RUNS, SECONDS = 15, 1.0
"""A time is the median of at least so many calls, and of calls for at least so long."""


@dataclass(frozen=True)
class Settings:
    """What is measured; `limit` is the number of good parts of each sort and class."""

    grid: Grid = "quick"
    limit: int = 64
    seed: int = 0
    engine: EngineName = "eager"
    defects: tuple[Defect, ...] = DEFECTS
    most_evaluations: int | None = None
    """The choice is among recipes with so many evaluations or fewer; all are measured."""


@dataclass(frozen=True)
class Watch:
    """Who wants to know how far it is: `say` gets a line, `stage` a name and a total and returns what counts."""

    say: Callable[[str], None] = lambda _: None
    stage: Callable[[str, int], Callable[[int], None]] = lambda _name, _total: lambda _count: None


class Row(Frozen):
    """One recipe's measurement."""

    text: str
    kind: str
    aggregate: str
    location: bool
    evaluations: int
    time: Timing
    synthetic: Separation
    labelled: Separation | None


class Agreement(Frozen):
    """How well synthetic defects predict the labelled ones.

    `spearman` is over all recipes, with its 95 % interval; `lacks` is the labelled AUROC that the recipe chosen
    without labels lacks to the best allowed labelled recipe, by class ("all": the mean over classes).
    """

    spearman: float
    low: float
    high: float
    lacks: dict[str, float]
    within: bool


class Result(Frozen):
    """What `flowad-tune` found; `front` and the choices are places in `rows`."""

    rows: tuple[Row, ...]
    front: tuple[int, ...]
    without_labels: int
    with_labels: int | None
    agreement: Agreement | None
    sorts: dict[str, float]
    """By sort of synthetic defect, the AUROC of the recipe chosen without labels."""
    recipe: Recipe
    recipe_without_labels: Recipe

    @property
    def chosen(self) -> int:
        """The place of the recipe that is written."""
        return self.without_labels if self.with_labels is None else self.with_labels


@dataclass
class _Frames:
    """Held-out parts, their synthetic defects, labelled parts, and from `judged` on those of location statistics."""

    classes: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    sorts: list[str] = field(default_factory=list)
    features: list[NDArray[np.float32]] = field(default_factory=list)
    synthetic: int = 0
    judged: int = 0


def tune(
    model: FlowModel,
    checkpoint: str,
    good: Parts,
    labelled: Parts | None,
    folder: Path,
    starter: Starter,
    settings: Settings = Settings(),
    watch: Watch = Watch(),
) -> Result:
    """Measure every recipe of a grid, and choose.

    Args:
        model: a trained model on the CPU.
        checkpoint: SHA-256 of its weights.
        good: good parts, split here into statistics and held-out ones.
        labelled: good and defective parts, None without.
        folder: what is measured is kept here; the same call goes on from it.
        starter: of the engine that is timed.
        settings: see `Settings`.
        watch: who is told.

    Raises:
        ConfigError: too few good parts, or labelled parts among them.
        FrameError: a part that cannot be read.
    """
    data, store = contents_of(good, labelled), Store(folder)
    asked = digest([settings.limit, settings.seed, [one.name for one in settings.defects]])
    key = {"checkpoint": checkpoint, "data": data, "settings": asked, "version": flowad_fast.__version__}
    if changed := store.open(key):
        watch.say(f"starting anew: {', '.join(changed)} changed since the last run in {folder}")
    statistics, held = split(good, settings.limit, settings.seed)
    frames = _frames(model, checkpoint, held, labelled, statistics, store, settings, watch)
    named = frames.classes if model.config.use_class_labels else None
    y = model.spec.classes.indices(named, len(frames.classes))
    count, end = frames.synthetic, frames.judged
    fake = judge.trials(frames.classes[:count], frames.labels[:count], settings.seed, frames.origins)
    real = judge.trials(frames.classes[count:end], frames.labels[count:end], settings.seed) if labelled else ()

    shown, grid = read_frame(held.paths[0])[None], (model.config.height, model.config.width)
    scorers, aggregates = scorers_of(settings.grid, model.config), AGGREGATES_OF[settings.grid]
    index = np.zeros(len(frames.classes), np.int64) if y is None else y
    advance = watch.stage("recipes", 2 * len(scorers) * len(aggregates))
    rows: list[Row] = []
    made: list[tuple[Scorer, Aggregate, bool]] = []
    samples: tuple[list[judge.Values], list[judge.Values]] = ([], [])
    values: list[NDArray[np.float32]] = []
    for scorer in scorers:
        cells = store.cells(model, scorer, frames.features, y)
        timing = store.time(scorer, settings.engine, lambda scorer=scorer: _timed(starter(model, scorer), shown, y))  # type: ignore[misc]
        maps = cells.reshape(len(cells), *grid)
        fitted = LocationStatistics.fit(maps[end:], index[end:], model.spec.classes.rows)
        shown_as = {False: cells[:end], True: fitted.apply(maps[:end], index[:end]).reshape(end, -1)}
        for located, name, each in (
            (located, name, each)
            for located, some in shown_as.items()
            for name, each in scores(some, scorer, aggregates, grid, model.spec.image.size).items()
        ):
            synthetic, sampled = judge.judged(each[:count], fake)
            samples[0].append(sampled)
            found = None
            if real:
                found, sampled = judge.judged(each[count:], real)
                samples[1].append(sampled)
            rows.append(
                Row(
                    text=describe(scorer, name, located), kind=scorer.kind, aggregate=name, location=located,
                    evaluations=scorer.evaluations(model.config), time=timing, synthetic=synthetic, labelled=found,
                )
            )  # fmt: skip
            made.append((scorer, name, located))
            values.append(each)
            advance(1)
    title = f"{settings.engine} on cpu"

    times = [row.time.median for row in rows]
    by_fake = [row.synthetic.auroc for row in rows]
    by_real = [row.labelled.auroc for row in rows if row.labelled]
    allowed = [i for i, row in enumerate(rows) if row.evaluations <= (settings.most_evaluations or row.evaluations)]
    if not allowed:
        raise ConfigError(f"no recipe has {settings.most_evaluations} evaluations or fewer; allow more")
    without, chosen = _choose(times, by_fake, allowed), _choose(times, by_real, allowed) if real else None
    rule = judge.RULE
    if settings.most_evaluations is not None:
        rule += f"; among those with at most {settings.most_evaluations} evaluations"
    sizes = {
        "statistics": len(statistics),
        "held_out": len(held),
        "synthetic": count - len(held),
        "labelled": len(labelled) if labelled else 0,
    }

    def recipe(place: int, by: Literal["synthetic", "labelled"]) -> Recipe:
        scorer, aggregate, located = made[place]
        best = max((by_fake if by == "synthetic" else by_real)[i] for i in allowed)
        evidence = Evidence(
            chosen_by=by, rule=rule, engine=title, time=rows[place].time, synthetic=rows[place].synthetic,
            labelled=rows[place].labelled, best=best, recipes=len(rows),
            parts=sizes, data=data, machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            versions={"flowad-fast": flowad_fast.__version__} | {n: version(n) for n in PACKAGES},
            created=now(),
        )  # fmt: skip
        return Recipe(
            scorer=scorer,
            aggregate=aggregate,
            location=located,
            engine=settings.engine,
            checkpoint=checkpoint,
            evidence=evidence,
        )

    return Result(
        rows=tuple(rows),
        front=tuple(judge.front(times, by_real if real else by_fake)),
        without_labels=without,
        with_labels=chosen,
        agreement=_agreement(rows, without, allowed, samples) if real else None,
        sorts=_by_sort(values[without], frames, settings.seed),
        recipe=recipe(without, "synthetic") if chosen is None else recipe(chosen, "labelled"),
        recipe_without_labels=recipe(without, "synthetic"),
    )


def _frames(
    model: FlowModel,
    checkpoint: str,
    held: Parts,
    labelled: Parts | None,
    statistics: Parts,
    store: Store,
    settings: Settings,
    watch: Watch,
) -> _Frames:
    """Every frame's features, class and label, those of location statistics last.

    The defects of a part differ from its neighbours' in sort.
    """
    made, sorts = _Frames(), settings.defects
    plan: list[tuple[Path, Defect | None, int]] = [(path, None, 0) for path in held.paths]
    made.classes, made.labels = list(held.classes), [0] * len(held)
    made.origins, made.sorts = list(range(len(held))), [""] * len(held)
    for i, path in enumerate(held.paths):
        for j in range(min(PER_PART, len(sorts))):
            number = i * PER_PART + j
            defect = sorts[number % len(sorts)]
            plan.append((path, defect, (settings.seed * 1_000_003 + number) % 2**32))
            made.classes.append(held.classes[i])
            made.labels.append(1)
            made.origins.append(i)
            made.sorts.append(defect.name)
    made.synthetic = len(plan)
    if labelled is not None:
        plan += [(path, None, 0) for path in labelled.paths]
        made.classes += labelled.classes
        made.labels += labelled.labels
    made.judged = len(plan)
    plan += [(path, None, 0) for path in statistics.paths]
    made.classes += statistics.classes
    made.labels += [0] * len(statistics)
    advance = watch.stage("features", len(plan))
    for start in range(0, len(plan), CHUNK):
        some = [(read_frame(path), defect, seed) for path, defect, seed in plan[start : start + CHUNK]]
        spoilt = [frame if defect is None else spoil(frame, defect, seed) for frame, defect, seed in some]
        made.features.append(store.features(model, spoilt, checkpoint))
        advance(len(some))
    return made


def _timed(engine: Engine, frame: NDArray[np.uint8], y: NDArray[np.int64] | None) -> Timing:
    one, taken = None if y is None else y[:1], list[float]()
    for _ in range(3):
        engine.run(frame, one)
    while len(taken) < RUNS or sum(taken) < SECONDS:
        start = time.perf_counter()
        engine.run(frame, one)
        taken.append(time.perf_counter() - start)
    low, middle, high = (1000 * value for value in quantiles(taken, n=4))
    return Timing(median=middle, quarter=low, three_quarters=high, runs=len(taken))


def _choose(times: list[float], aurocs: list[float], allowed: list[int]) -> int:
    """The place in both lists of the recipe that `judge.choose` takes of those that are allowed."""
    return allowed[judge.choose([times[i] for i in allowed], [aurocs[i] for i in allowed])]


def _agreement(
    rows: list[Row], without: int, allowed: list[int], samples: tuple[list[judge.Values], list[judge.Values]]
) -> Agreement:
    real = [row.labelled for row in rows if row.labelled]
    fake = np.array([row.synthetic.auroc for row in rows])
    low, high = judge.rank_correlations(np.array(samples[0]), np.array(samples[1]))
    lacks = {
        name: max(real[i].classes[name] for i in allowed) - real[without].classes[name]
        for name in real[without].classes
        if name
    }
    lacks["all"] = max(real[i].auroc for i in allowed) - real[without].auroc
    return Agreement(
        spearman=judge.rank_correlation(fake, np.array([one.auroc for one in real])),
        low=low,
        high=high,
        lacks=lacks,
        within=all(value <= judge.MARGIN for value in lacks.values()),
    )


def _by_sort(values: NDArray[np.float32], frames: _Frames, seed: int) -> dict[str, float]:
    """The AUROC of scores for each sort of synthetic defect."""
    found = {}
    for name in dict.fromkeys(sort for sort in frames.sorts if sort):
        places = [i for i, sort in enumerate(frames.sorts) if sort in ("", name)]
        classes, labels = ([of[i] for i in places] for of in (frames.classes, frames.labels))
        on = judge.trials(classes, labels, seed)  # type: ignore[arg-type]
        found[name] = judge.judged(values[places], on)[0].auroc
    return found
