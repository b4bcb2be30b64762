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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flowad_fast.benchmarks.measure import harness
from flowad_fast.benchmarks.measure.cases import Case, expand, scorer_options
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.record import record, report
from flowad_fast.benchmarks.runs import ladder
from flowad_fast.cli import common

BUDGET_S = 510.0
"""The whole check, in seconds; less than nine minutes with the start of the interpreter."""
EXIT_NO_GPU = 3
ROOT = report.HERE.parent

Part = tuple[str, float, Callable[[float], dict[str, Any]]]
"""A part's name, the seconds that it needs at least, and what runs it within the seconds given."""


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


def run(parts: list[Part], budget: float, output: Path, tell: harness.Tell) -> dict[str, Any]:
    """Run the parts in order within `budget` seconds; `output` is rewritten after each."""
    begun = time.perf_counter()
    result: dict[str, Any] = {
        "schema": record.SCHEMA,
        "kind": "gpu-check",
        "preset": "paper",
        "environment": {**environment(), "before": moment(), "after": moment()},
        "parts": [],
        "cases": [],
        "roofs": {"gemm": [], "reason": None},
    }
    for name, needed, call in parts:
        left = budget - (time.perf_counter() - begun)
        start = time.perf_counter()
        if left < needed:
            found: dict[str, Any] = {"status": "skipped", "reason": f"{left:.0f} s left, {needed:.0f} s needed"}
        else:
            tell(f"{name} ({left:.0f} s left)")
            try:
                found = call(left)
            except Exception as error:
                found = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        part: dict[str, Any] = {"name": name, "seconds": round(time.perf_counter() - start, 1)}
        measured = found.pop("record", None)
        if measured is not None:
            result["cases"] += measured["cases"]
            roofs = measured["roofs"]
            result["roofs"] |= {k: v for k, v in roofs.items() if k != "gemm"}
            result["roofs"]["gemm"] += roofs.get("gemm", [])
            bad = [row for row in measured["cases"] if row["status"] not in ("ok", "not available")]
            found = {"status": "failed" if bad else "ok", "reason": "; ".join(r["name"] for r in bad) or None}
        result["parts"].append(part | found)
        result["environment"] |= {"after": moment(), "seconds": round(time.perf_counter() - begun, 1)}
        record.write(result, output)
    return result


def tests(left: float, marker: str = "gpu") -> dict[str, Any]:
    """The tests that need a GPU, with the last lines of pytest's output."""
    if not (ROOT / "tests").is_dir():
        return {"status": "failed", "reason": f"{ROOT}: no tests beside the package; run from a checkout"}
    # Other files may import what a bare GPU machine lacks.
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if f"mark.{marker}" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", marker, "-q", "--no-header", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(left, 150))
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"the tests took longer than {min(left, 150):.0f} s"}
    tail = done.stdout.strip().splitlines()[-60:]
    # pytest's 5 is "no test was selected": on a checkout without GPU tests that is not a success either.
    return {"status": "ok" if done.returncode == 0 else "failed", "reason": tail[-1] if tail else None, "output": tail}


def plan(preset: str, device: str, batches: tuple[int, ...], precisions: tuple[str, ...], tell: harness.Tell,
         effort: harness.Effort, engine: str = "cudagraph") -> list[Part]:  # fmt: skip
    """The parts, most important first."""

    def bench(
        engines: list[str], scorers: list[str], precision: list[str], batch: list[int], mode: str, probes: list[int],
        ops: str = "fused", products: str = "measured",
    ) -> Callable[[float], dict[str, Any]]:  # fmt: skip
        def call(left: float) -> dict[str, Any]:
            cases = expand(
                preset, scorers=scorers, engines=engines, precisions=precision, batches=batch, steps=[3], probes=probes,
                modes=[mode], ops=ops, products=products, device=device, parity_frames=2,
            )  # fmt: skip
            return {"record": harness.run(cases, replace(effort, timeout=max(left - 10, 5)), tell, deadline=left)}

        return call

    def rungs(left: float) -> dict[str, Any]:
        like = Case(
            preset, scorer_options("inversion", 3, 1), "eager", batch=batches[-1], device=device, parity_frames=2
        )
        return {"record": ladder.run(like, replace(effort, timeout=max(left - 10, 5)), tell, deadline=left)}

    fast = list(precisions)
    return [
        ("inversion and reconstruction, batch " + str(batches[-1]), 30,
         bench([engine], ["inversion", "reconstruction"], fast, [batches[-1]], "offline", [10])),
        ("density, K = 10, 1, 2", 40, bench([engine], ["density"], fast, [batches[-1]], "offline", [10, 1, 2])),
        ("density beside the reference path, batch 1", 30,
         bench([engine], ["density"], fast[:1], [1], "offline", [10])),
        ("GPU tests", 30, tests),
        ("batch 1 latency", 30, bench([engine], ["inversion"], fast, [1], "single-stream", [10])),
        ("batch 1 latency, the library's products", 30,
         bench([engine], ["inversion"], fast, [1], "single-stream", [10], products="library")),
        ("ladder", 60, rungs),
        ("batch sweep", 60, bench([engine], ["inversion"], fast, list(batches), "offline", [10])),
        ("other engines", 60,
         bench(["eager", "compile"], ["inversion"], ["bf16"], [batches[-1]], "offline", [10], ops="reference")),
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
            effort = harness.Effort(seconds=0.2, least=2, most=5, extend=False, roof_seconds=0.02)
            parts = plan("tiny", "cpu", (1, 2), ("bf16",), tell, effort, engine="eager")
        else:
            effort = harness.Effort(seconds=4, least=5, extend=False, roof_seconds=0.3)
            parts = plan("paper", "cuda", (1, 8, 32, 64), ("bf16", "fp8"), tell, effort)
        result = run(parts, budget, target, tell)
    for part in result["parts"]:
        common.out.print(f"{part['name']}: {part['status']} ({part['seconds']} s) {part['reason'] or ''}", markup=False)
    common.out.print(f"written: {target}", highlight=False)
    if any(part["status"] != "ok" for part in result["parts"]):
        raise typer.Exit(common.EXIT_ERROR)


main = common.command(check)

if __name__ == "__main__":
    main()
