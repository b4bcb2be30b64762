"""Everything that needs a GPU, in under nine minutes, most important first: one JSON in `results/`.

    python -m flowad_fast.benchmarks.gpu_check [--dry-run] [--output FILE]

Tests that are marked `gpu`, the three scorers at the paper's scale with random weights, the ladder, and latency. A part
that does not fit into the time left is listed as skipped; the file is rewritten after every part, so that whatever
ends the run keeps what was measured. Exit codes: 0 all parts done and good, 1 a part failed or was skipped, 3 no usable
GPU.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from flowad_fast.benchmarks.measure import harness
from flowad_fast.benchmarks.measure.cases import Case, Mode, expand, make_scorer, make_scorers
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.measure.turns import Effort
from flowad_fast.benchmarks.record import report
from flowad_fast.benchmarks.record.record import CheckPart, Record, Roofs, Status, write
from flowad_fast.benchmarks.runs import ladder
from flowad_fast.cli import common
from flowad_fast.config import Precision

BUDGET_S = 510.0
"""The whole check, in seconds; less than nine minutes with the start of the interpreter."""
EXIT_NO_GPU = 3
ROOT = report.HERE.parent


@dataclass(frozen=True)
class Outcome:
    """What a part of the check found: rows, or (of tests) what pytest said."""

    status: Status
    reason: str | None = None
    record: Record | None = None
    output: tuple[str, ...] | None = None

    @classmethod
    def of(cls, record: Record) -> "Outcome":
        """A run of rows: failed where one of them did, apart from what this machine lacks."""
        bad = [row.name for row in record.cases if row.status not in ("ok", "not available")]
        return cls("failed" if bad else "ok", "; ".join(bad) or None, record)


@dataclass(frozen=True)
class Part:
    """A part of the check: the seconds that it needs at least, and what runs it within the seconds given."""

    name: str
    needed: float
    run: Callable[[float], Outcome]


def missing() -> str | None:
    """What this machine lacks for the check, None when it has a usable GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install torch's ordinary Linux wheel"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable NVIDIA GPU or driver; "
            "check that nvidia-smi lists one and that its driver supports this CUDA version"
        )
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        return f"{torch.cuda.get_device_name()} was found but does not compute: {str(error).splitlines()[0]}"
    return None


def run(parts: Sequence[Part], budget: float, output: Path, tell: harness.Tell) -> Record:
    """Run the parts in order within `budget` seconds; `output` is rewritten after each."""
    begun = time.perf_counter()
    before = moment()
    found: list[tuple[CheckPart, Outcome]] = []

    def result() -> Record:
        records = [outcome.record for _, outcome in found if outcome.record is not None]
        measured = [record.roofs for record in records if record.roofs.gemm]
        roofs = measured[-1] if measured else Roofs(reason="no row was measured")
        return Record(
            kind="gpu-check",
            preset="paper",
            environment=environment(before, seconds=round(time.perf_counter() - begun, 1)),
            cases=tuple(row for record in records for row in record.cases),
            roofs=roofs.but(gemm=tuple(g for one in measured for g in one.gemm)),
            parts=tuple(part for part, _ in found),
        )

    for part in parts:
        left = budget - (time.perf_counter() - begun)
        start = time.perf_counter()
        if left < part.needed:
            outcome = Outcome("skipped", f"{left:.0f} s left, {part.needed:.0f} s needed")
        else:
            tell(f"{part.name} ({left:.0f} s left)")
            try:
                outcome = part.run(left)
            except Exception as error:
                outcome = Outcome("failed", f"{type(error).__name__}: {error}"[:500])
        done = CheckPart(
            name=part.name,
            seconds=round(time.perf_counter() - start, 1),
            status=outcome.status,
            reason=outcome.reason,
            output=outcome.output,
        )
        found.append((done, outcome))
        write(result(), output)
    return result()


def tests(left: float, marker: str = "gpu") -> Outcome:
    """The tests that need a GPU, with the last lines of pytest's output."""
    if not (ROOT / "tests").is_dir():
        return Outcome("failed", f"{ROOT}: no tests beside the package; run from a checkout")
    # Other files may import what a bare GPU machine lacks.
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if f"mark.{marker}" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", marker, "-q", "--no-header", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(left, 150))
    except subprocess.TimeoutExpired:
        return Outcome("failed", f"the tests took longer than {min(left, 150):.0f} s")
    tail = tuple(done.stdout.strip().splitlines()[-60:])
    # pytest's 5 is "no test was selected": on a checkout without GPU tests that is not a success either.
    return Outcome("ok" if done.returncode == 0 else "failed", tail[-1] if tail else None, output=tail)


def plan(
    preset: str, device: str, batches: Sequence[int], precisions: Sequence[Precision], tell: harness.Tell,
    effort: Effort, engine: str = "cudagraph",
) -> list[Part]:  # fmt: skip
    """The parts, most important first."""
    most, fast = batches[-1], list(precisions)

    def bench(
        kinds: Sequence[str], *, engines: Sequence[str] = (engine,), precisions: Sequence[Precision] = precisions,
        batches: Sequence[int] = (most,), mode: Mode = "offline", probes: Sequence[int] = (10,), ops: str = "fused",
        products: str = "measured",
    ) -> Callable[[float], Outcome]:  # fmt: skip
        cases = expand(
            preset, make_scorers(kinds, probes=probes), engines=engines, precisions=precisions, batches=batches,
            modes=[mode], ops=ops, products=products, device=device, parity_frames=2,
        )  # fmt: skip
        return lambda left: Outcome.of(harness.run(cases, within(left), tell, deadline=left))

    def rungs(left: float) -> Outcome:
        like = Case(preset, make_scorer("inversion"), "eager", batch=most, device=device, parity_frames=2)
        return Outcome.of(ladder.run(like, within(left), tell, deadline=left))

    def within(left: float) -> Effort:
        return replace(effort, timeout=max(left - 10, 5))

    return [
        Part(f"inversion and reconstruction, batch {most}", 30, bench(["inversion", "reconstruction"])),
        Part("density, K = 10, 1, 2", 40, bench(["density"], probes=[10, 1, 2])),
        Part("density beside the reference path, batch 1", 30, bench(["density"], precisions=fast[:1], batches=[1])),
        Part("GPU tests", 30, tests),
        Part("batch 1 latency", 30, bench(["inversion"], batches=[1], mode="single-stream")),
        Part("batch 1 latency, the library's products", 30,
             bench(["inversion"], batches=[1], mode="single-stream", products="library")),
        Part("ladder", 60, rungs),
        Part("batch sweep", 60, bench(["inversion"], batches=batches)),
        Part("other engines", 60,
             bench(["inversion"], engines=["eager", "compile"], precisions=["bf16"], ops="reference")),
    ]  # fmt: skip


def check(
    output: Annotated[Path | None, typer.Option(help="The record. [default: results/gpu-check-GPU.json]")] = None,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = BUDGET_S,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same parts on the CPU with a tiny model.")] = False,
) -> None:
    """Test and measure on this machine's GPU; partial results are always kept."""
    if not dry_run and (lacking := missing()) is not None:
        common.err.print(f"[bold red]no usable GPU:[/] {lacking}", highlight=False)
        raise typer.Exit(EXIT_NO_GPU)
    gpu = "dry-run" if dry_run else torch.cuda.get_device_name().replace(" ", "-")
    target = output or report.RESULTS / f"gpu-check-{gpu}.json"
    with common.status("gpu-check") as tell:
        if dry_run:
            effort = Effort(seconds=0.2, least=2, most=5, extend=False, roof_seconds=0.02)
            parts = plan("tiny", "cpu", (1, 2), ("bf16",), tell, effort, engine="eager")
        else:
            effort = Effort(seconds=4, least=5, extend=False, roof_seconds=0.3)
            parts = plan("paper", "cuda", (1, 8, 32, 64), ("bf16", "fp8"), tell, effort)
        result = run(parts, budget, target, tell)
    done = result.parts or ()
    for part in done:
        common.out.print(f"{part.name}: {part.status} ({part.seconds} s) {part.reason or ''}", markup=False)
    common.out.print(f"written: {target}", highlight=False)
    if any(part.status != "ok" for part in done):
        raise typer.Exit(common.EXIT_ERROR)


main = common.command(check)

if __name__ == "__main__":
    main()
