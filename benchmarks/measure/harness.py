"""Runs cases in fresh processes, candidate and reference in turn, and holds every row to the parity gate."""

import contextlib
import json
import multiprocessing
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from flowad_fast.benchmarks.measure import roofs, worker
from flowad_fast.benchmarks.measure.cases import REFERENCE, Case, is_bundle, reference_of
from flowad_fast.benchmarks.measure.engines import needs_artefact
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.measure.memory import footprint
from flowad_fast.benchmarks.record import clock
from flowad_fast.benchmarks.record.record import SCHEMA
from flowad_fast.errors import EngineUnavailableError, ParityError
from flowad_fast.export.verify import compare

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds a row (both sides of a pair together), and the least and most calls of each side.

    `extend` doubles a noisy row's time once. `timeout` ends a process that does not answer.
    """

    seconds: float = 15.0
    least: int = 5
    most: int = 2000
    extend: bool = True
    timeout: float = 3600.0
    roof_seconds: float = 1.0


QUICK = Effort(seconds=3.0, least=3, extend=False, roof_seconds=0.2)


class Process:
    """A worker process; `ask` sends one command and waits for its answer, a crash being an answer as well.

    It is forked from a server that has imported everything and computed nothing: as clean as a new interpreter,
    without paying seconds of imports a row.
    """

    def __init__(self, log: Path, timeout: float) -> None:
        self.log, self.timeout = log, timeout
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["flowad_fast.benchmarks.measure.worker"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(theirs, str(log)), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command; `status` is ok, not available, out of memory, failed, timeout or crashed."""
        try:
            self._pipe.send((do, arguments))
            if not self._pipe.poll(self.timeout):
                self._process.kill()
                return {"status": "timeout", "reason": f"{do} took longer than {self.timeout:.0f} s"}
            answer: dict[str, Any] = self._pipe.recv()
            return answer
        except (EOFError, OSError):
            self._process.join()
        code = self._process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"status": "crashed", "reason": f"{how} during {do}{': ' + last[0][:300] if last else ''}"}

    def close(self) -> None:
        """End the process, by force after some patience."""
        self._pipe.close()
        self._process.join(10)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def started(folder: Path, effort: Effort) -> Iterator[Process]:
    """A worker process that ends with the block."""
    process = Process(folder / f"{uuid.uuid4().hex}.log", effort.timeout)
    try:
        yield process
    finally:
        process.close()


def run(
    cases: list[Case], effort: Effort, tell: Tell, line_rate: float | None = None, deadline: float = float("inf"),
    keep: Callable[[dict[str, Any]], object] = lambda record: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure all cases: the record that is written as JSON; see `benchmarks/README.md` for its fields.

    Args:
        cases: one row each; rows of the reference path are added.
        effort: how long to measure.
        tell: receives one line of progress at a time.
        line_rate: frames a second in line mode; None takes 80 % of what single calls sustain.
        deadline: seconds after which no further row is begun; rows that were not begun are skipped. Ctrl-C is such a
            deadline, and skips the rows under way.
        keep: receives the record so far, without roofs, whenever rows are finished.
    """
    before = moment()
    begun = time.time()
    rows: list[dict[str, Any]] = []
    interrupted = False

    def record(measured: dict[str, Any]) -> dict[str, Any]:
        position = {case.name: i for i, case in enumerate(cases)}
        rows.sort(key=lambda r: position.get(r["name"], -1 if r["engine"] == REFERENCE else len(cases)))
        now = {**environment(), "before": before, "after": moment(), "seconds": round(time.time() - begun, 1)}
        preset = ", ".join(dict.fromkeys(case.preset for case in cases))
        return {
            "schema": SCHEMA, "kind": "bench", "preset": preset, "environment": now, "cases": rows, "roofs": measured
        }  # fmt: skip

    with tempfile.TemporaryDirectory(prefix="flowad-bench-") as scratch:
        folder = Path(scratch)
        ordered = sorted(cases, key=lambda c: json.dumps(reference_of(c).as_dict(), sort_keys=True))
        for reference, group in groupby(ordered, key=reference_of):
            members = list(group)
            if time.time() - begun > deadline:
                late = {"status": "skipped", "reason": "no time was left"}
                rows += [empty_row(case, late) for case in members]
                continue
            try:
                rows += _group(reference, members, folder, effort, tell, line_rate)
            except KeyboardInterrupt:  # what was finished is kept, and the record says that it is not whole
                stopped = {"status": "skipped", "reason": "interrupted"}
                rows += [empty_row(case, stopped) for case in members]
                interrupted, deadline = True, -1.0
            keep(record({"reason": "not measured yet"}))
        tell("roofs")
        measured = {"reason": "interrupted"} if interrupted else _roofs(rows, folder, effort)
        return record(measured)


def _group(
    reference: Case, cases: list[Case], folder: Path, effort: Effort, tell: Tell, line_rate: float | None
) -> list[dict[str, Any]]:
    """All engines on the same work: each takes turns with one process that runs the reference path.

    In line mode frames come at their own pace, so there is nothing to take turns with. An engine that does not fit into
    memory beside the reference path runs once more when that has ended.
    """
    pairing = reference.mode != "line"
    rows: list[dict[str, Any]] = []
    outputs: dict[str, Path] = {}
    with contextlib.ExitStack() as stack:
        ref = ref_row = None
        if pairing:
            tell(f"{reference.name}: loading")
            ref = stack.enter_context(started(folder, effort))
            answer = ref.ask("load", case=reference.as_dict())
            ref_row = empty_row(reference, answer)
            if answer["status"] != "ok":
                ref = None
                stack.close()  # what a process holds that failed would be missing for the others
        taken: list[Turn] = []
        crowded: list[Case] = []
        for case in cases:
            if case.engine == REFERENCE and pairing:
                continue
            tell(case.name)
            outputs[case.name] = folder / f"{uuid.uuid4().hex}.npz"
            row, turns = _candidate(case, ref, outputs[case.name], folder, effort, line_rate)
            tell(f"{case.name}: {_said(row)}")
            if row["status"] == "out of memory" and ref is not None:
                crowded.append(case)
                continue
            taken += turns
            rows.append(row)
        if ref is not None and ref_row is not None:
            try:
                taken = taken or _turns(ref, None, effort, reference.mode)
                theirs = [v for turn in taken for v in (turn.theirs or turn.ours)]
                device = [v for turn in taken for v in (turn.their_device or turn.device)]
                _fill(ref_row, theirs, device, _checked(ref.ask("peak")))
                ref_row["ratio_to_reference"] = {"speed": 1.0, "low": 1.0, "high": 1.0, "pairs": 0, "memory": 1.0}
                ref_row["parity"] = {"passed": True, "note": "the reference itself; reverse mode has noise of its own"}
            except WorkerError as error:
                ref_row |= {"status": error.status, "reason": error.reason}
    for case in crowded:
        row, _ = _candidate(case, None, outputs[case.name], folder, effort, line_rate)
        tell(f"{case.name}, without the reference path in memory: {_said(row)}")
        rows.append(row)
    tell(f"{reference.name}: parity")
    expected, independent = folder / "expected.npz", folder / f"independent-{reference.scorer['steps']}.npz"
    with started(folder, effort) as judge:
        answer = judge.ask("expected", case=reference.as_dict(), path=str(expected), independent=str(independent))
    for row in rows:
        if row["status"] != "ok":
            continue
        if ref_row is not None and ref_row["status"] != "ok":
            row["note"] = f"no ratio: the reference path is {ref_row['status']} ({ref_row['reason']})"
        elif ref_row is not None and row["ratio_to_reference"] is None:
            times = ref_row["latency_ms"]["p50"] / row["latency_ms"]["p50"]
            row["note"] = (
                "not in turn with the reference path, since both do not fit in memory; the reference path's median is "
                f"{times:.2f} times as long"
            )
        elif ref_row is not None:
            ours, theirs_mb = footprint(row["memory_mb"]), footprint(ref_row["memory_mb"])
            known = ours is not None and theirs_mb is not None
            row["ratio_to_reference"]["memory"] = round(theirs_mb / max(ours, 1.0), 3) if known else None  # type: ignore[operator, type-var]
        _judge(row, answer, outputs[row["name"]], expected, independent)
    return ([ref_row] if ref_row is not None else []) + rows


def _said(row: dict[str, Any]) -> str:
    """A row in a few words, before its parity is known."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    ratio = row["ratio_to_reference"]
    beside = f", {ratio['speed']:.2f} times the reference path" if ratio else ""
    return f"p50 {row['latency_ms']['p50']:.1f} ms{beside}"


class WorkerError(Exception):
    """A command that a worker did not carry out; `status` and `reason` go into the row."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["reason"])
        self.status, self.reason = answer["status"], answer["reason"]


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if answer["status"] != "ok":
        raise WorkerError(answer)
    return answer


@dataclass(frozen=True)
class Turn:
    """One block of calls of a candidate, in ms, and of the reference just before it."""

    ours: list[float]
    device: list[float]
    theirs: list[float]
    their_device: list[float]


def _candidate(
    case: Case, ref: Process | None, output: Path, folder: Path, effort: Effort, line_rate: float | None
) -> tuple[dict[str, Any], list[Turn]]:
    """A row without its parity, and the turns that it took with the reference."""
    artefact, export_s = None, None
    try:
        exported = needs_artefact(case.engine)
    except EngineUnavailableError as error:
        return empty_row(case, {"status": "not available", "reason": str(error)}), []
    if exported:
        if is_bundle(case.preset):
            artefact = case.preset
        else:
            with started(folder, effort) as exporter:
                answer = exporter.ask("export", case=case.as_dict(), folder=tempfile.mkdtemp(dir=folder))
            if answer["status"] != "ok":
                return empty_row(case, answer), []
            artefact, export_s = answer["artefact"], answer["export_s"]
    with started(folder, effort) as process:
        answer = process.ask("load", case=case.as_dict(), artefact=artefact)
        row = empty_row(case, answer) | {"export_s": export_s}
        if answer["status"] != "ok":
            return row, []
        try:
            turns = _turns(process, ref, effort, case.mode)
            ours = [v for turn in turns for v in turn.ours]
            if case.mode == "line":
                ours, row["line"] = _line(process, float(np.median(ours)), effort, line_rate)
            memory = _checked(process.ask("peak"))
            _checked(process.ask("outputs", path=str(output)))
        except WorkerError as error:
            return row | {"status": error.status, "reason": error.reason}, []
        _fill(row, ours, [v for turn in turns for v in turn.device], memory)
        if ref is not None:
            row["ratio_to_reference"] = clock.paired_ratio(
                [float(np.median(turn.theirs)) for turn in turns if turn.theirs],
                [float(np.median(turn.ours)) for turn in turns if turn.theirs],
            )
        return row, turns if ref is not None else []


def _turns(process: Process, ref: Process | None, effort: Effort, mode: str) -> list[Turn]:
    """Blocks of calls, reference and candidate in turn, for the time that `effort` allows."""

    def block(of: Process | None, n: int) -> tuple[list[float], list[float]]:
        answer = _checked(of.ask("run", n=n)) if of is not None else {"ms": [], "device_ms": []}
        return answer["ms"], answer["device_ms"]

    # These calls are the warm-up as well; short ones are grouped, so that a turn is longer than the switch.
    sizes = []
    for of in (process, ref):
        ms = block(of, 1)[0] and block(of, 1)[0]
        sizes.append(max(1, min(50, int(50 / ms[0]))) if ms else 0)
    turns: list[Turn] = []
    begun, allowed = time.perf_counter(), effort.seconds
    while True:
        theirs, their_device = block(ref, sizes[1])
        ours, device = block(process, sizes[0])
        turns.append(Turn(ours, device, theirs, their_device))
        spent = time.perf_counter() - begun
        least = effort.least if spent / len(turns) < 10 else min(effort.least, 3)
        if len(turns) >= least and (spent > allowed or len(turns) * sizes[0] >= effort.most):
            noisy = clock.stability([float(np.median(t.ours)) for t in turns])["verdict"] == "noisy"
            if not (noisy and effort.extend and allowed == effort.seconds and spent < 4 * allowed):
                break
            allowed = 2 * effort.seconds
    if mode == "single-stream":
        # Tail percentiles need many calls, and the reference has no say in them.
        each = float(np.median([v for turn in turns for v in turn.ours]))
        ours, device = block(process, int(min(max(effort.seconds * 1e3 / each, 1), effort.most)))
        turns.append(Turn(ours, device, [], []))
    return turns


def _line(
    process: Process, service_ms: float, effort: Effort, rate: float | None
) -> tuple[list[float], dict[str, Any]]:
    """Latencies from arrival to verdict at a fixed rate: the given one, or 80 % of what single calls sustain."""
    rate = rate or 800 / service_ms
    frames = int(min(max(effort.seconds * rate, 20), effort.most))
    answer = _checked(process.ask("line", rate=rate, frames=frames, deadline_ms=1e3 / rate))
    line = {"rate_fps": round(rate, 3), "deadline_ms": round(1e3 / rate, 3), "misses": answer["misses"]}
    return answer["ms"], line | {"frames": frames}


def empty_row(case: Case, answer: dict[str, Any]) -> dict[str, Any]:
    """A row with every key that a row has; what was not measured is null."""
    return {
        "name": case.name,
        "preset": case.preset,
        "mode": case.mode,
        "scorer": case.scorer["kind"],
        "options": case.scorer,
        "engine": case.engine,
        "ran": answer.get("engine"),
        "details": answer.get("details"),
        "precision": case.precision,
        "ops": case.ops,
        "products": case.products if case.engine == "cudagraph" else None,
        "batch": case.batch,
        "steps": case.scorer["steps"],
        "nfe": answer.get("nfe"),
        "probes": case.scorer.get("probes"),
        "shape": answer.get("shape"),
        "frames": answer.get("frames"),
        "frame_size": answer.get("frame_size"),
        "status": answer["status"],
        "reason": answer.get("reason"),
        "note": None,
        "parity": None,
        "density": None,
        "latency_ms": None,
        "device_time_ms": None,
        "fps": None,
        "stability": None,
        "line": None,
        "memory_mb": None,
        "ratio_to_reference": None,
        "load_s": answer.get("load_s"),
        "export_s": None,
        "start_s": answer.get("start_s"),
        "compile_s": answer.get("compile_s"),
        "first_call_s": answer.get("first_call_s"),
        "roof": None,
        "prediction": None,
    }


def _fill(row: dict[str, Any], ours: list[float], device: list[float], memory: dict[str, Any]) -> None:
    row["latency_ms"] = clock.summary(ours)
    row["device_time_ms"] = clock.summary(device) if device else None
    row["stability"] = clock.stability(ours)
    row["memory_mb"] = {key: value for key, value in memory.items() if key != "status"}
    # Frames over time, hiccups included: throughput is not what the typical call would give.
    row["fps"] = row["line"]["rate_fps"] if row["line"] else round(1e3 * row["batch"] * len(ours) / sum(ours), 4)


MEASURED = ("latency_ms", "device_time_ms", "fps", "ratio_to_reference", "line")


def _judge(row: dict[str, Any], answer: dict[str, Any], output: Path, expected: Path, independent: Path) -> None:
    """The parity gate: a row that does not compute what the reference computes loses its speed."""
    if row["engine"] == REFERENCE:
        row["parity"] = {"passed": True, "note": "the reference itself; reverse mode has noise of its own"}
        return
    if answer["status"] != "ok":
        row |= {"status": "not checked", "reason": f"the parity reference is {answer['status']}: {answer['reason']}"}
    else:
        with np.load(output) as got, np.load(expected) as want:
            try:
                parity = compare(
                    (got["maps"], got["raw"]), (want["maps"], want["raw"]), row["frames"], row["precision"], row["ran"]
                )
            except ParityError as error:
                row |= {"status": "failed parity", "reason": str(error)} | dict.fromkeys(MEASURED)
                return
            row["parity"] = {
                **{k: None if v in (np.inf, -np.inf) or v != v else v for k, v in parity.model_dump().items()},
                "map_spearman": _rank_correlation(got["maps"], want["maps"]),
            }
            if row["probes"] and independent.exists():
                with np.load(independent) as other:
                    row["density"] = _density(row["probes"], want["cells"], other["cells"], other["errors"])
        if not parity.passed:
            row |= {
                "status": "failed parity",
                "reason": f"map error {parity.max_error:.2g} (RMS {parity.rms_error:.2g}) of the map's spread, limits "
                f"{parity.tolerance:.2g} and {parity.rms_tolerance:.2g}; score error {parity.score_error:.2g} of the "
                "scores' spread",
            }
    if row["status"] != "ok":
        row |= dict.fromkeys(MEASURED)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's over a map's cells, a frame at a time, averaged; None where a map is constant or not finite."""
    values = [spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    return round(float(np.mean(values)), 6) if np.isfinite(values).all() else None


def _density(probes: int, cells: np.ndarray, other: np.ndarray, errors: np.ndarray) -> dict[str, Any]:
    """How far K probes can be trusted.

    The standard error at K follows from the spread of ten independent probes; the rank correlation is with those ten,
    so it holds for K = 10 as well.
    """
    error = float(np.sqrt((errors**2).mean()) * np.sqrt(10 / probes))
    return {
        "standard_error": round(error, 4),
        "spread": round(float(other.std()), 4),
        "share_of_spread": round(error / float(other.std()), 4),
        "spearman_with_10": _rank_correlation(cells, other),
    }


def _products(precision: str) -> tuple[str, ...]:
    """Precisions of a row's matrix products: beside fp8 some layers stay in bf16."""
    return ("fp8", "bf16") if precision == "fp8" else (precision,)


def _roofs(rows: list[dict[str, Any]], folder: Path, effort: Effort) -> dict[str, Any]:
    """Roofs for the matrix products of the measured rows; attached to them."""
    measured = [row for row in rows if row["status"] == "ok"]
    if not measured:
        return {"reason": "no row was measured"}
    result: dict[str, Any] = {"gemm": []}
    shapes = {json.dumps(row["shape"]): row["shape"] for row in measured}
    for shape in shapes.values():
        like = [row for row in measured if row["shape"] == shape]
        with started(folder, effort) as process:
            answer = process.ask(
                "roofs",
                shape=shape,
                rows=sorted({roofs.rows_of(row) for row in like}),
                precisions=sorted({"fp32"} | {p for row in like for p in _products(row["precision"])}),
                seconds=effort.roof_seconds,
            )
        if answer.pop("status") != "ok":
            return {"reason": answer["reason"]}
        # Of several models in one run, each has its products; the copy bandwidth is the machine's.
        result = {**answer, **result, "gemm": [*result["gemm"], *answer["gemm"]]}
    roofs.attach(rows, result)
    return result
