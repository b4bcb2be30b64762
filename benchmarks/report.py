"""A record as a table for people: on the terminal, and as Markdown."""

from typing import Any

from rich.table import Table

from flowad_fast.benchmarks import paper
from flowad_fast.benchmarks.memory import footprint

COLUMNS = (
    "scorer", "engine", "precision", "batch", "NFE", "K", "FPS", "p50 ms", "p99 ms", "device ms", "memory MB",
    "× speed", "× memory", "map error", "rank corr.", "of GEMM roof", "paper FPS", "paper GB",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """A row's cells, in the order of `COLUMNS`."""
    left = [
        row["scorer"],
        row["engine"] + ("" if row["ops"] == "reference" else f" {row['ops']}"),
        row["precision"],
        str(row["batch"]),
        _text(row["nfe"]),
        _text(row["probes"]),
    ]
    reported = paper.FLOWAD.get(row["scorer"]) if row["preset"] != "invad" else paper.METHODS["InvAD"]
    right = [_text(reported.fps if reported else None), _text(reported.memory_gb if reported else None)]
    if row["status"] != "ok":
        return [*left, row["status"], *[""] * (len(COLUMNS) - len(left) - 3), *right]
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
        f"{parity['max_error']:.1e}" if "max_error" in parity else "",
        f"{parity['map_spearman']:.4f}" if parity.get("map_spearman") is not None else "",
        f"{row['roof']['share']:.0%}" if row["roof"] else "",
        *right,
    ]


def table(record: dict[str, Any]) -> Table:
    """The record's rows for a terminal."""
    result = Table(title=f"{record['preset']} · {where(record)}", title_justify="left")
    body = [cells(row) for row in record["cases"]]
    used = [i for i in range(len(COLUMNS)) if any(line[i] for line in body)]
    for i in used:
        result.add_column(COLUMNS[i], justify="left" if i < 3 else "right")
    for row, line in zip(record["cases"], body, strict=True):
        result.add_row(*(line[i] for i in used), style=None if row["status"] == "ok" else "dim")
    return result


def markdown(record: dict[str, Any]) -> str:
    """The record's rows as a Markdown table with its remarks."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in record["cases"]]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks(record)), ""])


def remarks(record: dict[str, Any]) -> list[str]:
    """What the numbers do not say: failed rows, noise, density's precision, and how to read the columns."""
    lines = [f"{row['name']}: {row['status']}: {row['reason']}" for row in record["cases"] if row["status"] != "ok"] + [
        f"{row['name']}: {row['note']}" for row in record["cases"] if row["note"]
    ]
    for row in record["cases"]:
        if row["stability"] and row["stability"]["verdict"] != "stable" and row["latency_ms"]:
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
                f"{row['name']}: standard error {d['standard_error']:g} a location, {d['share_of_spread']:.0%} of the "
                f"map's spread; rank correlation {d['spearman_with_10']} with an independent K = 10"
            )
    return list(dict.fromkeys(lines))


def where(record: dict[str, Any]) -> str:
    """The machine in a few words."""
    e = record["environment"]
    machine = e["gpu"] or f"{e['cpu']}, {e['threads']} threads"
    return f"{machine}, torch {e['packages']['torch']}, commit {e['commit']}"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    """About four digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
