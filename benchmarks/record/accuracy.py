"""Accuracy beside speed: the image AUROC that the demo's summary has for fewer evaluations, and for three."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRODUCTS = ("mono", "poly")
"""Kinds of solar cells; a summary that names none is of the first."""
NOT_MEASURED = "not measured"

Key = tuple[str, str, int | None]
"""Product, scorer, and function evaluations where they are known."""


def aurocs(summary: Path) -> dict[Key, float]:
    """Image AUROC by product, scorer and evaluations; of several outcomes of one kind the first. Empty without a file.

    A summary may list outcomes for one product or, by name, for several.
    """
    if not summary.is_file():
        return {}
    found: dict[Key, float] = {}
    for product, outcome in _outcomes(json.loads(summary.read_text(encoding="utf-8")), PRODUCTS[0]):
        method, auroc = str(outcome["method"]), outcome["image_auroc"]
        if isinstance(auroc, (int, float)):
            scorer = method.split()[0].strip(",:")
            found.setdefault((product, scorer, _evaluations(scorer, outcome)), float(auroc))
    return found


def recorded(folder: Path) -> dict[Key, float]:
    """The same of the records of `flowad-bench evaluations cells` in a folder: located, image score `top`."""
    found: dict[Key, float] = {}
    for product in PRODUCTS:
        path = folder / f"cpu-evaluations-cells-{product}.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["cases"] if path.is_file() else ():
            if row["located"] and row["aggregate"] == "top":
                found[product, row["scorer"], row["evaluations"]] = float(row["auroc"])
    return found


def condition(scorer: str, evaluations: int, summary: Path) -> str:
    """What was measured of a scorer with so many evaluations, beside three of inversion, for each product.

    Records of evaluations in the folder above the summary's go first: all their rows are of the same photos.
    """
    known = aurocs(summary) | recorded(summary.parent.parent)

    def of(product: str, scorer: str, evaluations: int) -> str:
        value = known.get((product, scorer, evaluations))
        return NOT_MEASURED if value is None else f"{value:.3f}"

    each = [
        f"{product} {of(product, scorer, evaluations)} ({of(product, 'inversion', 3)} with three)"
        for product in PRODUCTS
    ]
    return f"{scorer}; image AUROC on the demo's cells: {', '.join(each)}"


def _outcomes(node: Any, product: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every outcome below a JSON value, with the product that it is of."""
    if isinstance(node, list):
        for one in node:
            yield from _outcomes(one, product)
    elif isinstance(node, dict):
        product = next((node[k] for k in ("product", "category", "cell_type") if node.get(k) in PRODUCTS), product)
        if "method" in node and "image_auroc" in node:
            yield product, node
            return
        for key, value in node.items():
            yield from _outcomes(value, key if key in PRODUCTS else product)


def _evaluations(scorer: str, outcome: dict[str, Any]) -> int | None:
    """As the outcome says, or as its options do: draws of mismatch, steps of inversion and density."""
    if isinstance(outcome.get("evaluations"), int):
        return int(outcome["evaluations"])
    options = str(outcome.get("options", ""))
    if scorer == "mismatch":
        drawn = re.search(r"draws=(\d+)", options)
        return int(drawn[1]) if drawn else 1
    steps = re.search(r"steps=(\d+)", options)
    return int(steps[1]) if steps and scorer in ("inversion", "density") else None
