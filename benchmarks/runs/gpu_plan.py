"""What the first minutes on a GPU are for, as data: pieces of work in order, most important first.

A machine with a GPU is lent for minutes and may be taken back at any time. So every piece states the seconds that it
needs, what must be measured before all else is a headline, and no other piece may use the time that later headlines
need; `gpu_runner` keeps to that. The seconds are modelled for one H100 (`docs/gpu.md`), and twice as many are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from flowad_fast.benchmarks.measure.cases import Case, make_scorer, reference_of
from flowad_fast.benchmarks.runs import ladder
from flowad_fast.config import Precision

BUDGET_S = 510.0
"""The whole check, in seconds; less than nine minutes with what `make gpu-check` installs before."""
HEADLINES_S = 480.0
"""By when the headlines are to be done."""
COMPILE_S = 180.0
"""torch.compile of the paper's 48 blocks, for batch 1 and for larger ones: with less left it would be cut off."""
TESTS_S = 200.0
"""The longest that the tests may take."""

Kind = Literal["row", "backbone", "roofs", "tests"]


@dataclass(frozen=True)
class Work:
    """A piece of work that is begun, cut off and kept on its own.

    Attributes:
        part: what it belongs to, for the report; neighbours of one part are shown together.
        name: unique in a plan.
        needed: seconds that it takes on one H100, from start to finish; with less left it is not begun.
        headline: whether a later piece that is none must leave it its time.
        kind: what is done; a row measures `case`, the others measure for its model.
        seconds: of timed calls, of a row.
        limit: seconds after which it is cut off, where they are not `gpu_runner.PATIENCE` times `needed`.
        sizes: batch and probes of the rows whose products, and with probes attention's tangents, are measured as roofs;
            batches of the backbone.
        precisions: of those products.
        rung: the ladder's step that the row is.
    """

    part: str
    name: str
    needed: float
    headline: bool
    case: Case
    kind: Kind = "row"
    seconds: float = 2.0
    limit: float | None = None
    sizes: tuple[tuple[int, int | None], ...] = ()
    precisions: tuple[Precision, ...] = ()
    rung: ladder.Rung | None = None


@dataclass(frozen=True)
class Setting:
    """What the plan is made for; `batches` are the smallest, the reference path's, one more, and the headline's."""

    preset: str
    device: str
    engine: str
    precisions: tuple[Precision, ...] = ("bf16", "fp8")
    batches: tuple[int, int, int, int] = (1, 8, 16, 32)


GPU = Setting("paper", "cuda", "cudagraph")
"""One GPU."""
DRY_RUN = Setting("tiny", "cpu", "eager", batches=(1, 2, 3, 4))
"""The same plan with a model and engine that any CPU runs in seconds."""


def plan(setting: Setting) -> list[Work]:
    """The pieces, most important first."""
    return list(_pieces(setting))


def _pieces(setting: Setting) -> Iterator[Work]:
    one, middle, more, most = setting.batches
    half, *narrow = setting.precisions
    like = Case(
        setting.preset, make_scorer("inversion"), setting.engine, half, "fused", batch=one, mode="single-stream",
        device=setting.device, parity_frames=2,
    )  # fmt: skip

    def row(
        part: str, needed: float, headline: bool, kind: str, precision: Precision, batch: int, seconds: float,
        probes: int | None = None,
    ) -> Work:  # fmt: skip
        scorer = make_scorer(kind, probes=probes)
        mode: Literal["single-stream", "offline"] = "single-stream" if batch == one else "offline"
        case = replace(like, scorer=scorer, precision=precision, batch=batch, mode=mode)
        return Work(part, f"{part}: {case.name}", needed, headline, case, seconds=seconds)

    def rows(
        part: str, needed: float, headline: bool, kinds: Sequence[str], batch: int, seconds: float
    ) -> Iterator[Work]:
        for precision in setting.precisions:
            for kind in kinds:
                yield row(part, needed, headline, kind, precision, batch, seconds)

    # Everything that later numbers stand on, in the first seconds: both precisions captured and held against eager
    # float32, which attention runs and how far it is off, the backbone's layouts, the products alone.
    yield from rows("smoke", 28, True, ["inversion"], one, seconds=0.1)
    yield Work("smoke", "smoke: backbone", 6, True, like, "backbone", sizes=((one, None), (most, None)))
    yield Work(
        "smoke", "smoke: products", 8, True, like, "roofs", sizes=((one, None), (most, None)),
        precisions=("fp32", *setting.precisions),
    )  # fmt: skip
    yield from rows("batch 1 latency", 8, True, ["inversion", "mismatch"], one, seconds=3)
    yield from rows(f"batch {most}", 11, True, ["mismatch", "inversion"], most, seconds=4)
    yield Work("GPU tests", "GPU tests", 60, False, like, "tests", limit=TESTS_S)
    for probes, needed in ((10, 28), (1, 12)):
        yield row("density", needed, True, "density", half, most, 4, probes)
    yield from rows("reconstruction", 10, False, ["reconstruction"], most, seconds=3)
    reference = reference_of(replace(like, batch=middle, mode="offline"))
    bottom = next(rung for rung in ladder.RUNGS if rung.number == 0)
    yield Work("reference path", f"reference path: {reference.name}", 14, True, reference, seconds=1, rung=bottom)
    top = {rung.precision: rung for rung in ladder.RUNGS if (rung.engine, rung.products) == (like.engine, "measured")}
    for work in rows("reference path", 8, True, ["inversion"], middle, seconds=2):
        yield replace(work, rung=top.get(work.case.precision))
    for precision in narrow:
        for probes, needed in ((10, 28), (1, 12)):
            yield row(f"density in {precision}", needed, False, "density", precision, most, 4, probes)

    def rungs(part: str, needed: float, compiled: bool) -> Iterator[Work]:
        for rung in ladder.RUNGS:
            fits = 0 < rung.number < 7 and (rung.only is None or rung.only == like.device == "cuda")
            if fits and (rung.engine == "compile") is compiled:
                case = ladder.case_of(rung, replace(like, batch=middle, mode="offline"))
                yield Work(part, f"{part}: {rung.number} {case.name}", needed, False, case, rung=rung)

    yield from rungs("ladder", 10, compiled=False)
    yield from rows("sweep", 9, False, ["inversion"], more, seconds=2)
    for work in rows("sweep", 8, False, ["inversion"], one, seconds=2):
        case = replace(work.case, mode="offline")
        yield replace(work, name=f"sweep: {case.name}", case=case)
    yield Work(
        "products of the other rows", "products of the other rows", 36, False, like, "roofs",
        sizes=((middle, None), (more, None), (most, 1), (most, 10)), precisions=setting.precisions,
    )  # fmt: skip
    if like.engine == "cudagraph":
        early = replace(like, early=True)
        yield Work("early launches", f"early launches: {early.name}", 16, False, early, seconds=3)
        for precision in setting.precisions:
            library = replace(like, precision=precision, products="library")
            yield Work("the library's products", f"the library's products: {library.name}", 8, False, library)
    # Last: it takes as long as all the rows of the sweep, and its killed process takes the kept model with it.
    yield from rungs("ladder, torch.compile", COMPILE_S, compiled=True)
