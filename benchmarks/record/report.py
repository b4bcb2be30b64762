"""A record as a table for people: on the terminal, and as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flowad_fast.benchmarks.measure.memory import footprint, whole
from flowad_fast.benchmarks.record import paper
from flowad_fast.benchmarks.record.record import read

COLUMNS = (
    "scorer", "engine", "precision", "batch", "NFE", "K", "FPS", "p50 ms", "p99 ms", "device ms", "memory MB",
    "× speed", "× memory", "paper FPS", "paper GB", "map error", "rank corr.", "of GEMM roof", "÷ predicted",
)  # fmt: skip
WHAT, SPEED, TRUST = range(6), range(6, 15), range(15, len(COLUMNS))


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells, in the order of `COLUMNS`."""
    rung = f"{row['rung']} {row['rung_name']}: " if "rung" in row else ""
    mode = "" if row["mode"] == "offline" else f", {row['mode']}"
    left = [
        rung + row["scorer"],
        runs(row) + mode,
        row["precision"],
        str(row["batch"]),
        _text(row["nfe"]),
        _text(row["probes"]),
    ]
    reported = paper.FLOWAD.get(row["scorer"]) if row["preset"] != "invad" else paper.METHODS["InvAD"]
    right = [_text(reported.fps if reported else None), _text(reported.memory_gb if reported else None)]
    if row["status"] != "ok":
        return [*left, row["status"], *[""] * 6, *right, *[""] * len(TRUST)]
    latency, device, ratio, parity = (
        row["latency_ms"], row["device_time_ms"], row["ratio_to_reference"], row["parity"] or {},
    )  # fmt: skip
    return [
        *left,
        _number(row["fps"]),
        _number(latency["p50"]),
        _number(latency["p99"]),
        _number(device["p50"]) if device else "",
        _number(footprint(row["memory_mb"])),
        f"{ratio['speed']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio and ratio["pairs"] else "",
        f"{ratio['memory']:.2f}" if ratio and ratio["pairs"] and ratio["memory"] else "",
        *right,
        f"{parity['max_error']:.1e}" if "max_error" in parity else "",
        f"{parity['map_spearman']:.4f}" if parity.get("map_spearman") is not None else "",
        f"{row['roof']['share']:.0%}" if row["roof"] else "",
        f"{row['prediction']['measured_over_predicted']:.2f}" if row["prediction"] else "",
    ]


def runs(row: dict[str, Any]) -> str:
    """What runs a row: the engine, its operators, and matrix products where they are not those measured fastest."""
    ops = "" if row["ops"] == "reference" else f" {row['ops']}"
    return row["engine"] + ops + (", library products" if row.get("products") == "library" else "")


def tables(record: dict[str, Any]) -> list[Table]:
    """The record's rows for a terminal: speed and memory, then what makes them believable."""
    body = [cells(row) for row in record["cases"]]
    result = []
    for title, group in ((f"{record['preset']} · {where(record)}", SPEED), ("parity and limits", TRUST)):
        table = Table(title=title, title_justify="left")
        used = [i for i in (*WHAT, *group) if any(line[i] for line in body)]
        for i in used:
            table.add_column(COLUMNS[i], justify="left" if i < 3 else "right", no_wrap=i in WHAT)
        for row, line in zip(record["cases"], body, strict=True):
            if group is SPEED or row["status"] == "ok":
                table.add_row(*(line[i] for i in used), style=None if row["status"] == "ok" else "dim")
        result.append(table)
    return result


def markdown(record: dict[str, Any]) -> str:
    """The record's rows as a Markdown table with its remarks."""
    lines = _table_lines(COLUMNS, [cells(row) for row in record["cases"]])
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks(record)), ""])


def remarks(record: dict[str, Any]) -> list[str]:
    """What the numbers do not say: failed rows, noise, deadlines, and density's precision."""
    reasons: dict[str, list[str]] = {}
    for row in record["cases"]:
        if row["status"] != "ok":
            reasons.setdefault(f"{row['status']}: {row['reason']}", []).append(row["name"])
        if row["note"]:
            reasons.setdefault(row["note"], []).append(row["name"])
    lines = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    for row in record["cases"]:
        if row["status"] != "ok":
            continue
        if row["stability"]["verdict"] != "stable":
            lines.append(
                f"{row['name']}: {row['stability']['verdict']}: interquartile range {row['stability']['spread']:.0%}, "
                f"drift {row['stability']['drift']:+.0%} of the median, n = {row['latency_ms']['n']}"
            )
        if row["line"]:
            line = row["line"]
            lines.append(
                f"{row['name']}: {line['misses']} of {line['frames']} frames missed the deadline of "
                f"{line['deadline_ms']:.1f} ms at {line['rate_fps']:.2f} frames/s"
            )
        if row["density"]:
            d = row["density"]
            lines.append(
                f"{row['name']}: standard error {d['standard_error']:g} a location, {d['share_of_spread']:.1%} of the "
                f"map's spread; rank correlation {d['spearman_with_10']:.4f} with an independent K = 10"
            )
    return lines


def where(record: dict[str, Any]) -> str:
    """The machine in a few words."""
    e = record["environment"]
    machine = e["gpu"] or f"{e['cpu']}, {e['threads']} threads"
    return f"{machine}, torch {e['packages']['torch']}, commit {e['commit']}"


def _table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    """About four digits."""
    if value is None:
        return ""
    if 0 < value < 0.1:
        return f"{value:.2g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


HERE = Path(__file__).resolve().parents[1]
RESULTS, README = HERE / "results", HERE / "README.md"


def readme(folder: Path = RESULTS) -> str:
    """`benchmarks/README.md` from the records in `folder`: no figure in it is typed by hand."""
    records = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    parts = [(HERE / "README.head.md").read_text(encoding="utf-8"), _table1(records)]
    for name, record in records.items():
        title = record.get("title") or f"{name}: {record['preset']}"
        parts.append(f"### {title}\n\n{_machine(record)}\n")
        if record["kind"] in OTHER_KINDS:
            parts.append(OTHER_KINDS[record["kind"]](record))
            continue
        parts.append(markdown(record))
        parts += [
            f"![{figure.stem} of {name}](results/figures/{name}/{figure.name})\n"
            for figure in sorted((folder / "figures" / name).glob("*.png"))
        ]
    if not records:
        parts.append("No result has been committed yet.\n")
    return "\n".join(parts)


def _machine(record: dict[str, Any]) -> str:
    e = record["environment"]
    load = f"load average {e['before']['load_average'][0]} before, {e['after']['load_average'][0]} after"
    lines = [f"{where(record)}, {e['cores']} cores, {e['memory_gb']} GB memory; {load}; `{e['command']}`."]
    if e["gpu"] and e["before"]["gpu"]:
        for moment in ("before", "after"):
            g = e[moment]["gpu"]
            lines.append(
                f"GPU {moment}: driver {g['driver']}, {g['sm_clock_mhz']} MHz, {g['power_w']} of {g['power_cap_w']} W, "
                f"throttle reasons: {', '.join(g['throttle_reasons'] or []) or 'none'}."
            )
    return "  \n".join(lines)


def _table1(records: dict[str, dict[str, Any]]) -> str:
    """Table 1's efficiency columns, as reported and as measured, for every method in it."""
    heads = (
        "method", "FPS, paper, reported (H100)", "GB, paper, reported", "FPS, this machine, measured",
        "GB, this machine, measured", "how", "machine", "note",
    )  # fmt: skip
    rows = []
    for method in paper.METHODS.values():
        found = _best(method, records)
        measured = ["not run", "", "", ""] if found is None else found
        reported = [_text(float(method.fps)), "–" if method.memory_gb is None else _text(float(method.memory_gb))]
        rows.append([method.name, *reported, *measured, method.note])
    counted = "Measured GB include the weights: the allocator's peak on a GPU, the whole process's on a CPU."
    table = _table_lines(heads, rows)
    return "\n".join(["## The paper's efficiency columns", "", *table, "", f"{counted} {paper.CONFLICT}", ""])


def _best(method: paper.Reported, records: dict[str, dict[str, Any]]) -> list[str] | None:
    """The fastest row that a record has for a method: FPS, GB, how, machine; a GPU's before a CPU's."""
    rows = [
        (record["environment"]["gpu"] is not None, row["fps"], row, record)
        for record in records.values()
        for row in (record["cases"] if record["kind"] != "drift" else ())
        if row["status"] == "ok"
        and row["engine"] != "reference"
        and (row.get("method") == method.name if record["kind"] == "peers" else _is_paper_row(row, method))
    ]
    if not rows:
        return None
    _, fps, row, record = max(rows, key=lambda found: found[:2])
    memory = whole(row["memory_mb"])
    how = f"{row['engine']} {row['precision']}, batch {row['batch']}"
    return [_number(fps), "" if memory is None else f"{memory / 1e3:.2f}", how, where(record)]


def _is_paper_row(row: dict[str, Any], method: paper.Reported) -> bool:
    """The paper's own setting: its preset and scorer, 3 evaluations, and for density 10 probes."""
    return (
        method.preset is not None
        and row["preset"] == method.preset
        and row["scorer"] == method.scorer
        and row["nfe"] == 3
        and row["probes"] in (None, 10)
        and row["mode"] == "offline"
    )


def peers_markdown(record: dict[str, Any]) -> str:
    """Other methods' rows: measured by `peers.py` with the same frames and clock."""
    head = ("method", "FPS", "p50 ms", "memory MB", "batch", "status")
    rows = []
    for row in record["cases"]:
        ok = row["status"] == "ok"
        values = [
            row["method"],
            _number(row["fps"]) if ok else "",
            _number(row["latency_ms"]["p50"]) if ok else "",
            _number(footprint(row["memory_mb"])) if ok else "",
            str(row["batch"]),
            row["status"] if ok else f"{row['status']}: {row['reason']}",
        ]
        rows.append(values)
    return "\n".join([*_table_lines(head, rows), ""])


def drift_cells(record: dict[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and rows of a record of drift."""
    head = (
        "scorer", "precision", "AUROC", "change, points (95 %)", "rank corr. of scores", "largest score error",
        "map RMS error", "largest map error",
    )  # fmt: skip
    body = []
    for row in record["cases"]:
        change = row["auroc_change"]
        fp32 = row["precision"] == "fp32"
        body.append(
            [
                row["scorer"],
                row["precision"] + ("" if row["ops"] == "reference" else f" {row['ops']}"),
                f"{row['auroc']:.4f}",
                "" if fp32 else f"{change['points']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})",
                "" if fp32 else f"{row['score_spearman']:.5f}",
                *("" if fp32 else f"{row[key]:.1e}" for key in ("score_error", "map_rms", "map_error")),
            ]
        )
    return head, body


def drift_table(record: dict[str, Any]) -> Table:
    """A record of drift for a terminal."""
    head, body = drift_cells(record)
    table = Table(title=f"drift against fp32 · {record['preset']} · {where(record)}", title_justify="left")
    for i, column in enumerate(head):
        table.add_column(column, justify="left" if i < 2 else "right")
    for line in body:
        table.add_row(*line)
    return table


def drift_markdown(record: dict[str, Any]) -> str:
    """A record of drift as a Markdown table."""
    head, body = drift_cells(record)
    lines = _table_lines(head, body)
    one = record["cases"][0]
    lines += [
        "",
        f"{one['photos']} photos of {record['dataset']}, {one['defective']} defective; {one['engine']}. A change of "
        "AUROC is in points of 100, its interval from a bootstrap over the photos. Errors are relative to the "
        f"standard deviation of fp32's scores, or of a photo's fp32 map ({one['maps']} maps, the median of their RMS "
        "errors and the largest of all).",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def comparison(lines: list[dict[str, Any]]) -> Table:
    """The result of `record.compare` for a terminal."""
    result = Table(title="new against old", title_justify="left")
    for column in ("row", "verdict", "speed", "95 % interval", "memory", "basis"):
        result.add_column(column)
    for line in lines:
        result.add_row(
            line["name"],
            line["verdict"],
            "" if line["change"] is None else f"{line['change']:.3f}×",
            "" if line["low"] is None else f"{line['low']:.3f}–{line['high']:.3f}",
            "" if line["memory"] is None else f"{line['memory']:.3f}×",
            line["basis"] or line["reason"],
        )
    return result


OTHER_KINDS: dict[str, Callable[[dict[str, Any]], str]] = {"peers": peers_markdown, "drift": drift_markdown}
"""Records whose rows are not the harness's, by kind, and how they are written."""
