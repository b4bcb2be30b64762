"""Synthetic defects: a good part with something wrong that we put there; numpy only, the same on every machine.

`cutpaste`: a rectangle of the part itself at another place (Li et al., CutPaste, CVPR 2021). `perlin`: a blot in the
form of thresholded Perlin noise, darker or brighter (the shape of DRAEM's, Zavrtanik et al., ICCV 2021). Both fade to
the good part as the contrast goes to 0: at 0 the frame is the good part, bit by bit.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Defect:
    """One sort of defect.

    Attributes:
        kind: see the module.
        size: side of the square of the same area, as a share of the frame's shorter side.
        contrast: share of the pasted patch in the blend; for perlin, of full scale that the blot adds or takes away.
    """

    kind: Literal["cutpaste", "perlin"]
    size: float
    contrast: float

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.kind} {100 * self.size:g} % at {self.contrast:g}"


DEFECTS = tuple(
    Defect(kind, size, contrast)  # type: ignore[arg-type]
    for kind, contrasts in (("cutpaste", (0.5, 1.0)), ("perlin", (0.08, 0.2)))
    for size in (0.06, 0.12, 0.24)
    for contrast in contrasts
)
"""Sizes from one cell of a 16x16 map to four in a row; contrasts from faint to plain. On mono cells of ELPV
the best recipes separate the largest and strongest sorts fully, and none of the faint ones."""


def spoil(frame: Frame, defect: Defect, seed: int) -> Frame:
    """A copy of a frame (H, W, 3) uint8 with one defect at a place that the seed says."""
    random = np.random.RandomState(seed)
    height, width = frame.shape[:2]
    aspect = np.exp(random.uniform(-np.log(2), np.log(2)) / 2)
    side = defect.size * min(height, width)
    rows = int(np.clip(round(side * aspect), 2, height))
    columns = int(np.clip(round(side / aspect), 2, width))
    top, left = random.randint(0, height - rows + 1), random.randint(0, width - columns + 1)
    here = frame[top : top + rows, left : left + columns].astype(np.float64)
    if defect.kind == "cutpaste":
        away, aside = random.randint(0, height - rows + 1), random.randint(0, width - columns + 1)
        there = frame[away : away + rows, aside : aside + columns].astype(np.float64)
        changed = here + defect.contrast * (there - here)
    else:
        blot = _blot(rows, columns, random)[..., None]
        changed = here + random.choice((-1.0, 1.0)) * defect.contrast * 255 * blot
    spoilt = frame.copy()
    spoilt[top : top + rows, left : left + columns] = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return spoilt


def perlin(rows: int, columns: int, cells: int, random: np.random.RandomState) -> NDArray[np.float64]:
    """Gradient noise (rows, columns) about 0 on a lattice of `cells` squares a side (Perlin, SIGGRAPH 2002)."""
    angles = random.uniform(0, 2 * np.pi, (cells + 1, cells + 1))
    gradients = np.stack((np.sin(angles), np.cos(angles)), -1)
    y = (np.arange(rows) + 0.5) / rows * cells
    x = (np.arange(columns) + 0.5) / columns * cells
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0)[:, None], (x - x0)[None]

    def corner(down: int, right: int) -> NDArray[np.float64]:
        gradient = gradients[(y0 + down)[:, None], (x0 + right)[None]]
        return gradient[..., 0] * (fy - down) + gradient[..., 1] * (fx - right)

    wy, wx = (f**3 * (f * (6 * f - 15) + 10) for f in (fy, fx))
    upper = corner(0, 0) + wx * (corner(0, 1) - corner(0, 0))
    lower = corner(1, 0) + wx * (corner(1, 1) - corner(1, 0))
    noise: NDArray[np.float64] = upper + wy * (lower - upper)
    return noise


def _blot(rows: int, columns: int, random: np.random.RandomState) -> NDArray[np.float64]:
    """How much of the change each pixel gets, (rows, columns) in [0, 1]: noise of two octaves, fading at the rim."""
    noise = perlin(rows, columns, 2, random) + 0.5 * perlin(rows, columns, 4, random)
    y = np.abs(np.linspace(-1, 1, rows))[:, None]
    x = np.abs(np.linspace(-1, 1, columns))[None]
    rim = np.clip(2 * (1 - np.hypot(y, x)), 0, 1)
    blot: NDArray[np.float64] = np.clip(0.5 + 3 * noise, 0, 1) * rim
    return blot
