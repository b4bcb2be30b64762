"""The efficiency columns of the paper's Table 1 (MVTec AD, one H100), as reported there; nothing here is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """A method's reported speed (frames per second) and memory (GB); None where the table has a dash.

    `preset`, `scorer` and `evaluations` are those of its row here.
    """

    name: str
    fps: float | None
    memory_gb: float | None
    preset: str | None = None
    scorer: str | None = None
    note: str = ""
    evaluations: int = 3


METHODS = {
    m.name: m
    for m in (
        Reported("HVQ-Trans", 5.6, None),
        Reported("CFLOW-AD", 31, 2),
        Reported("InvAD", 41, 10, "invad", "inversion", "its own paper reports 88 FPS"),
        Reported("OmiAD", 17, None, note="InvAD's paper reports 39 FPS"),
        Reported("FlowAD (a) density", 5, 53, "paper", "density"),
        Reported("FlowAD (b) inversion", 41, 10, "paper", "inversion"),
        Reported("FlowAD (c) reconstruction", 41, 10, "paper", "reconstruction"),
    )
}
FLOWAD = {m.scorer: m for m in METHODS.values() if m.preset == "paper"}
OURS = (
    Reported("ours, one evaluation", None, None, "paper", "mismatch", evaluations=1),
    Reported("ours, two evaluations", None, None, "paper", "inversion", evaluations=2),
)
"""Rows of the paper's model with fewer evaluations, which the paper does not have."""
CONFLICT = (
    "Published figures conflict: InvAD's own paper reports 88 FPS for InvAD and 39 for OmiAD on MVTec AD, FlowAD's "
    "reports 41 and 17. Reported figures are from an H100; figures measured on a CPU are not comparable with them."
)
