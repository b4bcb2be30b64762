"""A measurement as one HTML page that needs no network: the picture is inside, names are escaped."""

import base64
import io
from pathlib import Path

from flowad_fast.files import replacing
from flowad_fast.tuning.measure import Result

COLOURS = {"mismatch": "#2a9d8f", "inversion": "#264653", "reconstruction": "#e9a23b", "density": "#e76f51"}
MARKERS = {"max": "o", "top": "^", "mean": "s", "diff": "D"}


def sentence(result: Result) -> str:
    """What was separated, openly."""
    parts = result.recipe.evidence.parts
    made = (
        f"{parts['synthetic']} synthetic defects (pasted patches and Perlin-noise blots, made by us) in the same "
        f"{parts['held_out']} held-out good parts"
    )
    if result.agreement is None:
        return f"No labelled defects were given: recipes are judged by {made}. Real defects may rank recipes otherwise."
    return f"Judged by {parts['labelled']} labelled parts; beside it, what {made} would have said."


def write_page(result: Result, name: str, path: Path) -> None:
    """Write the page of a result; `name` is the checkpoint's, as the user gave it."""
    from jinja2 import Environment, FileSystemLoader

    loader = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=loader, autoescape=True).get_template("page.html.j2")
    text = page.render(result=result, name=name, said=sentence(result), picture=_picture(result))
    with replacing(path) as file:
        file.write(text.encode())


def _picture(result: Result) -> str:
    """Time against separation, one panel for each way to judge, as base64 of a PNG."""
    from matplotlib.figure import Figure

    by_label = result.agreement is not None
    figure = Figure(figsize=(11 if by_label else 7, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if by_label else 1, squeeze=False)[0]
    times = [row.time.median for row in result.rows]
    for axes, labelled in zip(panels, (True, False) if by_label else (False,), strict=True):
        values = [(row.labelled if labelled and row.labelled else row.synthetic).auroc for row in result.rows]
        for row, x, y in zip(result.rows, times, values, strict=True):
            axes.plot(x, y, MARKERS.get(row.aggregate, "x"), color=COLOURS[row.kind], alpha=0.8)
        if labelled == by_label:
            axes.step([times[i] for i in result.front], [values[i] for i in result.front], where="post", color="0.6")
            axes.plot(times[result.chosen], values[result.chosen], "o", ms=14, mfc="none", mec="crimson")
        else:
            place = result.without_labels
            axes.plot(times[place], values[place], "o", ms=14, mfc="none", mec="crimson")
        axes.set(xlabel="ms per frame", ylabel="AUROC", title="labelled parts" if labelled else "synthetic defects")
        axes.grid(alpha=0.3)
    shown = {row.kind: COLOURS[row.kind] for row in result.rows}
    handles = [panels[0].plot([], [], "o", color=colour, label=kind)[0] for kind, colour in shown.items()]
    for name in dict.fromkeys(row.aggregate for row in result.rows):
        handles += panels[0].plot([], [], MARKERS.get(name, "x"), color="0.5", label=name)
    panels[0].legend(handles=handles, fontsize="small", loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
