"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---") -> list[str]:
    """A Markdown table; `align` is the rule under every column but the first."""
    return ["| " + " | ".join(line) + " |" for line in (head, ["---", *[align] * (len(head) - 1)], *rows)]
