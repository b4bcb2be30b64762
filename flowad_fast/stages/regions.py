"""Where a defect is: connected regions of a map, in the pixels of the original frame."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """One connected region of a map above the pixel threshold.

    Attributes:
        box: left, top, right, bottom in pixels of the original frame; right and bottom are exclusive.
        area: its pixels of the original frame.
        peak: the highest value of the map inside.
        contour: its outer border, (x, y) in pixels of the original frame.
        severity: the class that area and peak give it, "" where the bundle defines none.
    """

    box: tuple[int, int, int, int]
    area: float
    peak: float
    contour: tuple[tuple[int, int], ...] = ()
    severity: str = ""
