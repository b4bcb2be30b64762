"""A record of accuracy by evaluations as a table for people: on the terminal, and as Markdown."""

from rich.table import Table

from flowad_fast.benchmarks.record.lines import table_lines
from flowad_fast.benchmarks.record.record import EvaluationsRecord

HEAD = (
    "evaluations", "scorer", "location statistics", "aggregate", "AUROC", "95 % interval", "range over draws",
    "against 3 of inversion, points (95 %)",
)  # fmt: skip


def cells(record: EvaluationsRecord) -> list[list[str]]:
    """The rows' cells, in the order of `HEAD`."""
    body = []
    for row in record.cases:
        change = row.change
        body.append([
            str(row.evaluations),
            row.scorer,
            "yes" if row.located else "no",
            row.aggregate,
            f"{row.auroc:.4f}",
            f"{row.low:.4f}–{row.high:.4f}",
            f"{min(row.by_seed):.4f}–{max(row.by_seed):.4f}" if row.by_seed else "no draw",
            f"{change.points:+.2f} ({change.low:+.2f} to {change.high:+.2f})" if change else "",
        ])  # fmt: skip
    return body


def remark(record: EvaluationsRecord) -> str:
    """What the table's figures are of."""
    draws = max((len(row.seeds) for row in record.cases), default=1)
    located = record.unmeasured or f"location statistics of {record.good} training parts"
    return (
        f"{record.photos} photos of {record.dataset} {record.category}, {record.defective} defective; {located}; a "
        f"scorer that draws noise or probes is the mean over {draws} draws; density with 1 probe. Intervals are "
        "from a bootstrap over the photos, within good and defective ones."
    )


def table(record: EvaluationsRecord) -> Table:
    """For a terminal."""
    title = f"image AUROC by evaluations · {record.preset} · {record.dataset} {record.category}"
    result = Table(title=title, title_justify="left", caption=remark(record), caption_justify="left")
    for i, head in enumerate(HEAD):
        result.add_column(head, justify="left" if 0 < i < 4 else "right")
    for line in cells(record):
        result.add_row(*line)
    return result


def markdown(record: EvaluationsRecord) -> str:
    """As Markdown."""
    return "\n".join([*table_lines(HEAD, cells(record)), "", remark(record), ""])
