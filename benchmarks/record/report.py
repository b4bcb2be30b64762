"""A record as a table for people: on the terminal, and as Markdown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from flowad_fast.benchmarks.record import accuracy, evaluations, paper
from flowad_fast.benchmarks.record.capacity_record import CapacityRecord
from flowad_fast.benchmarks.record.compare import Change
from flowad_fast.benchmarks.record.front import FrontRecord
from flowad_fast.benchmarks.record.front import markdown as front_markdown
from flowad_fast.benchmarks.record.limits import Products, Roofs
from flowad_fast.benchmarks.record.line import LineRecord
from flowad_fast.benchmarks.record.line import markdown as line_markdown
from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.peers import PeersRecord
from flowad_fast.benchmarks.record.peers import markdown as photos_markdown
from flowad_fast.benchmarks.record.record import (
    DriftRecord,
    EvaluationsRecord,
    FewerRecord,
    Header,
    Pair,
    Record,
    Row,
    read,
)
from flowad_fast.benchmarks.record.serve import ServeRecord
from flowad_fast.benchmarks.record.serve import markdown as serve_markdown

HERE = Path(__file__).resolve().parents[1]
RESULTS, README = HERE / "results", HERE / "README.md"
COLUMNS = (
    "scorer", "engine", "precision", "batch", "NFE", "K", "FPS", "p50 ms", "p99 ms", "device ms", "memory MB",
    "× speed", "× memory", "paper FPS", "paper GB", "map error", "rank corr.", "of GEMM roof", "÷ predicted",
)  # fmt: skip
PAIRS = ("in turn", "× speed", "goal", "met", "× memory, weights included", "rows")
WHAT, SPEED, TRUST = range(6), range(6, 15), range(15, len(COLUMNS))


def cells(row: Row) -> list[str]:
    """A row's cells, in the order of `COLUMNS`."""
    rung = "" if row.rung is None else f"{row.rung} {row.rung_name}: "
    mode = "" if row.mode == "offline" else f", {row.mode}"
    left = [rung + row.scorer, runs(row) + mode, row.precision, str(row.batch), _text(row.nfe), _text(row.probes)]
    reported = paper.FLOWAD.get(row.scorer) if row.preset != "invad" else paper.METHODS["InvAD"]
    right = [_text(reported.fps if reported else None), _text(reported.memory_gb if reported else None)]
    found, ratio, parity = row.measured, row.ratio_to_reference, row.parity
    if found is None:
        return [*left, row.status, *[""] * 6, *right, *[""] * len(TRUST)]
    return [
        *left,
        _number(found.fps),
        _number(found.latency_ms.p50),
        _number(found.latency_ms.p99),
        _number(found.device_time_ms.p50) if found.device_time_ms else "",
        _number(found.memory_mb.footprint),
        f"{ratio.speed:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio and ratio.pairs else "",
        f"{ratio.memory:.2f}" if ratio and ratio.pairs and ratio.memory else "",
        *right,
        f"{parity.max_error:.1e}" if parity else "",
        f"{parity.map_spearman:.4f}" if parity and parity.map_spearman is not None else "",
        f"{row.roof.share:.0%}" if row.roof else "",
        f"{row.prediction.measured_over_predicted:.2f}" if row.prediction else "",
    ]


def runs(row: Row) -> str:
    """What runs a row: the engine, its operators, what is asked for beside them: library products, launches."""
    ops = "" if row.ops == "reference" else f" {row.ops}"
    asked = (", library products" if row.products == "library" else "") + (", early launches" if row.early else "")
    return row.engine + ops + asked


@dataclass(frozen=True)
class Grid:
    """Some columns of a record's rows: those that are not empty."""

    title: str
    heads: list[str]
    rows: list[Row]
    cells: list[list[str]]


def grids(record: Record) -> list[Grid]:
    """Speed and memory of all rows, then what makes those that ran believable."""
    every = [(row, cells(row)) for row in record.cases]
    result = []
    for title, group in ((f"{record.preset} · {where(record)}", SPEED), ("parity and limits", TRUST)):
        shown = [(row, line) for row, line in every if group is SPEED or row.measured]
        used = [i for i in (*WHAT, *group) if any(line[i] for _, line in shown)]
        body = [[line[i] for i in used] for _, line in shown]
        result.append(Grid(title, [COLUMNS[i] for i in used], [row for row, _ in shown], body))
    return result


def tables(record: Record) -> list[Table]:
    """The record's rows for a terminal."""
    result = []
    for grid in grids(record):
        table = Table(title=grid.title, title_justify="left")
        what = [COLUMNS[i] for i in WHAT]
        for head in grid.heads:
            table.add_column(head, justify="left" if head in what[:3] else "right", no_wrap=head in what)
        for row, line in zip(grid.rows, grid.cells, strict=True):
            table.add_row(*line, style=None if row.measured else "dim")
        result.append(table)
    if isinstance(record, FewerRecord):
        table = Table(*PAIRS, title="rows in turn with each other", title_justify="left")
        for pair in record.pairs:
            table.add_row(*pair_cells(pair))
        result.append(table)
    return result


def markdown(record: Record) -> str:
    """The record's rows as a Markdown table with its remarks."""
    lines = table_lines(COLUMNS, [cells(row) for row in record.cases])
    pairs = [*table_lines(PAIRS, map(pair_cells, record.pairs)), ""] if isinstance(record, FewerRecord) else []
    return "\n".join([*pairs, *lines, "", *(f"- {remark}" for remark in remarks(record)), ""])


def pair_cells(pair: Pair) -> list[str]:
    """A pair's cells, in the order of `PAIRS`."""
    goal = "" if pair.goal is None else f"≥ {pair.goal:g}"
    ratio = pair.ratio
    if ratio is None:
        return [pair.what, "not measured", goal, "", "", f"{pair.fast}, {pair.slow}: {pair.reason}"]
    met = "" if pair.goal is None else "yes" if ratio.speed >= pair.goal else "no"
    memory = "" if ratio.memory is None else f"{ratio.memory:.2f}"
    speed = f"{ratio.speed:.2f} ({ratio.low:.2f}–{ratio.high:.2f}, {ratio.pairs} pairs)"
    return [pair.what, speed, goal, met, memory, f"{pair.fast}, {pair.slow}"]


def remarks(record: Record) -> list[str]:
    """What the numbers do not say: failed rows, noise, and density's precision."""
    reasons: dict[str, list[str]] = {}
    for row in record.cases:
        if row.measured is None:
            reasons.setdefault(f"{row.status}: {row.reason}", []).append(row.name)
        if row.note:
            reasons.setdefault(row.note, []).append(row.name)
    lines = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    for row in record.cases:
        if row.measured is None:
            continue
        s, d = row.measured.stability, row.density
        if s.verdict != "stable":
            lines.append(
                f"{row.name}: {s.verdict}: interquartile range {s.spread:.0%}, drift {s.drift:+.0%} of the median, "
                f"n = {row.measured.latency_ms.n}"
            )
        if d:
            ranks = "undefined" if d.spearman_with_10 is None else f"{d.spearman_with_10:.4f}"
            lines.append(
                f"{row.name}: standard error {d.standard_error:g} per location, {d.share_of_spread:.1%} of the map's "
                f"spread; rank correlation {ranks} with an independent K = 10"
            )
    return lines + _scaled(record.roofs) + _tangents(record.roofs)


def _scaled(roofs: Roofs) -> list[str]:
    """What other scales of fp8 products than one per row take."""
    ours = {one.rows: one.block_ms for one in roofs.gemm if isinstance(one, Products) and one.precision == "fp8"}
    lines = []
    for one in roofs.scaled:
        what = f"a block's fp8 products, {one.rows:,} rows, scales per {one.scales}"
        if one.block_ms is None:
            lines.append(f"{what}: not measured: {one.reason}")
        else:
            per_row = "" if one.rows not in ours else f", per row {_number(ours[one.rows])} ms"
            lines.append(f"{what}: {_number(one.block_ms)} ms{per_row}")
    return lines


def _tangents(roofs: Roofs) -> list[str]:
    """What attention's tangents take with each tile; scorers run the first."""
    return [
        f"attention's tangents, batch {one.batch}, K = {one.probes}, {one.tile[0]} queries by {one.tile[1]} columns, "
        f"{one.tile[2]} warps{' (runs)' if one.tile == roofs.tangents[0].tile else ''}: "
        + (f"not measured: {one.reason}" if one.ms is None else f"{_number(one.ms)} ms")
        for one in roofs.tangents
    ]


def where(record: Header) -> str:
    """The machine in a few words."""
    e = record.environment
    return f"{e.gpu or f'{e.cpu}, {e.threads} threads'}, torch {e.packages['torch']}, commit {e.commit}"


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _number(value: float | None) -> str:
    """About four digits."""
    if value is None:
        return ""
    if 0 < value < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def readme(folder: Path = RESULTS) -> str:
    """`benchmarks/README.md` from the records in `folder`: no figure in it is typed by hand."""
    records = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    parts = [(HERE / "README.head.md").read_text(encoding="utf-8"), _table1(records, folder)]
    for name, record in records.items():
        title = isinstance(record, Record) and record.title or f"{name}: {record.preset}"
        parts.append(f"### {title}\n\n{_machine(record)}\n")
        if isinstance(record, DriftRecord):
            parts.append(drift_markdown(record))
        elif isinstance(record, EvaluationsRecord):
            parts.append(evaluations.markdown(record))
        elif isinstance(record, LineRecord):
            parts.append(line_markdown(record))
        elif isinstance(record, ServeRecord):
            parts.append(serve_markdown(record))
        elif isinstance(record, FrontRecord):
            parts.append(front_markdown(record))
        elif isinstance(record, PeersRecord):
            parts += [photos_markdown(record), *_figures(folder, name)]
        elif isinstance(record, CapacityRecord):
            parts.append("Capacity of pools: [How the cost scales](../docs/scaling.md#capacity).\n")
        elif record.kind == "peers":
            parts.append(peers_markdown(record))
        else:
            parts += [markdown(record), *_figures(folder, name)]
    if not records:
        parts.append("No result has been committed yet.\n")
    return "\n".join(parts)


def _figures(folder: Path, name: str) -> list[str]:
    """Links to the figures that a record has."""
    figures = sorted((folder / "figures" / name).glob("*.png"))
    return [f"![{one.stem} of {name}](results/figures/{name}/{one.name})\n" for one in figures]


def _machine(record: Header) -> str:
    e = record.environment
    load = f"load average {e.before.load_average[0]} before, {e.after.load_average[0]} after"
    lines = [f"{where(record)}, {e.cores} cores, {e.memory_gb} GB memory; {load}; `{e.command}`."]
    for when, g in (("before", e.before.gpu), ("after", e.after.gpu)):
        if g is not None:
            lines.append(
                f"GPU {when}: driver {g.driver}, {g.sm_clock_mhz} MHz, {g.power_w} of {g.power_cap_w} W, "
                f"throttle reasons: {', '.join(g.throttle_reasons or ()) or 'none'}."
            )
    return "  \n".join(lines)


def _table1(records: Mapping[str, Header], folder: Path = RESULTS) -> str:
    """Table 1's efficiency columns, as reported and as measured, for every method in it."""
    heads = (
        "method", "FPS, paper, reported (H100)", "GB, paper, reported", "FPS, this machine, measured",
        "GB, this machine, measured", "p50 ms", "NFE", "× reference path", "how", "machine", "note",
    )  # fmt: skip
    rows = []
    for method in paper.METHODS.values():
        reported = [_text(method.fps), "–" if method.memory_gb is None else _text(method.memory_gb)]
        rows.append([method.name, *reported, *_best(method, records), method.note])
    for ours in paper.OURS:
        note = accuracy.condition(ours.scorer or "", ours.evaluations, folder / "demo" / "summary.json")
        rows.append([ours.name, "–", "–", *_best(ours, records), note])
    counted = (
        "Measured GB include the weights: the allocator's peak on a GPU, the whole process's on a CPU. × reference "
        "path is in turn with the reference path of the same scorer and evaluations, in the same run."
    )
    table = table_lines(heads, rows)
    return "\n".join(["## The paper's efficiency columns", "", *table, "", f"{counted} {paper.CONFLICT}", ""])


def _best(method: paper.Reported, records: Mapping[str, Header]) -> list[str]:
    """The fastest row that a record has for a method: FPS, GB, p50, NFE, ratio, how, machine; GPUs' first."""
    rows = [
        (record.environment.gpu is not None, row.measured.fps, row.measured.memory_mb.whole, row, record)
        for record in records.values()
        if isinstance(record, Record)
        for row in record.cases
        if row.measured is not None
        and row.engine != "reference"
        and (row.method == method.name if record.kind == "peers" else _is_paper_row(row, method))
    ]
    if not rows:
        return ["not run", *[""] * 6]
    _, fps, memory, row, record = max(rows, key=lambda found: found[:2])
    how = f"{row.engine} {row.precision}, batch {row.batch}"
    found, ratio = row.measured, row.ratio_to_reference
    times = f"{ratio.speed:.2f} ({ratio.low:.2f}–{ratio.high:.2f})" if ratio and ratio.pairs else ""
    p50 = "" if found is None else _number(found.latency_ms.p50)
    return [
        _number(fps), "" if memory is None else f"{memory / 1e3:.2f}", p50, _text(row.nfe), times, how, where(record)
    ]  # fmt: skip


def _is_paper_row(row: Row, method: paper.Reported) -> bool:
    """The method's own setting: its preset, scorer and evaluations, and for density 10 probes."""
    wanted = (method.preset, method.scorer, method.evaluations, "offline")
    return (
        method.preset is not None and (row.preset, row.scorer, row.nfe, row.mode) == wanted and row.probes in (None, 10)
    )


def peers_markdown(record: Record) -> str:
    """Other methods' rows: measured by `runs/peers.py` with the same frames and clock."""
    head = ("method", "FPS", "p50 ms", "memory MB", "batch", "status")
    rows = []
    for row in record.cases:
        m = row.measured
        figures = ["", "", ""] if m is None else [
            _number(m.fps), _number(m.latency_ms.p50), _number(m.memory_mb.footprint),
        ]  # fmt: skip
        status = row.status if m else f"{row.status}: {row.reason}"
        rows.append([row.method or row.name, *figures, str(row.batch), status])
    return "\n".join([*table_lines(head, rows), ""])


def drift_cells(record: DriftRecord) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and rows of a record of drift."""
    head = (
        "scorer", "precision", "AUROC", "change, points (95 %)", "rank corr. of scores", "largest score error",
        "map RMS error", "largest map error",
    )  # fmt: skip
    body = []
    for row in record.cases:
        change = row.auroc_change
        compared = [
            f"{change.points:+.2f} ({change.low:+.2f} to {change.high:+.2f})",
            f"{row.score_spearman:.5f}",
            *(f"{error:.1e}" for error in (row.score_error, row.map_rms, row.map_error)),
        ]
        precision = row.precision + ("" if row.ops == "reference" else f" {row.ops}")
        body.append([row.scorer, precision, f"{row.auroc:.4f}", *(compared if row.precision != "fp32" else [""] * 5)])
    return head, body


def drift_table(record: DriftRecord) -> Table:
    """A record of drift for a terminal."""
    head, body = drift_cells(record)
    table = Table(title=f"drift against fp32 · {record.preset} · {where(record)}", title_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i < 2 else "right")
    for line in body:
        table.add_row(*line)
    return table


def drift_markdown(record: DriftRecord) -> str:
    """A record of drift as a Markdown table."""
    one = record.cases[0]
    return "\n".join([
        *table_lines(*drift_cells(record)),
        "",
        f"{one.photos} photos of {record.dataset}, {one.defective} defective; {one.engine}. A change of "
        "AUROC is in points of 100, its interval from a bootstrap over the photos. Errors are relative to the "
        f"standard deviation of fp32's scores, or of a photo's fp32 map ({one.maps} maps, the median of their RMS "
        "errors and the largest of all).",
        "",
    ])  # fmt: skip


def comparison(changes: Iterable[Change]) -> Table:
    """The result of `compare` for a terminal."""
    result = Table(title="new against old", title_justify="left")
    for column in ("row", "verdict", "speed", "95 % interval", "memory", "basis"):
        result.add_column(column)
    for one in changes:
        result.add_row(
            one.name,
            one.verdict,
            "" if one.change is None else f"{one.change:.3f}×",
            "" if one.low is None else f"{one.low:.3f}–{one.high:.3f}",
            "" if one.memory is None else f"{one.memory:.3f}×",
            one.basis or one.reason,
        )
    return result
