"""The parity gate: a row that does not compute what the reference computes has no speed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowad_fast.benchmarks.measure.worker import WorkerError
from flowad_fast.benchmarks.record.record import DensityError, Parity, Row
from flowad_fast.config import Certified
from flowad_fast.errors import ParityError
from flowad_fast.export.formats import FORMATS
from flowad_fast.export.verify import compare


@dataclass(frozen=True)
class Expected:
    """Files of the fp32 reference's maps and scores, and (of density) of an independent estimate's.

    `error` says why there is no reference.
    """

    maps: Path
    independent: Path
    error: WorkerError | None = None


def judged(row: Row, output: Path, expected: Expected) -> Row:
    """The row with its parity; without its speed where that failed or could not be checked."""
    if expected.error is not None:
        reason = f"the parity reference is {expected.error.status}: {expected.error.reason}"
        return row.without_speed("not checked", reason)
    with np.load(output) as got, np.load(expected.maps) as want:
        try:
            parity = compare(
                (got["maps"], got["raw"]), (want["maps"], want["raw"]), row.frames or "", _certified(row),
                row.ran or "", None, want["aggregate"].item(), want["cells"][0].size, int(want["power"]),
            )  # fmt: skip
        except ParityError as error:
            return row.without_speed("failed parity", str(error))
        correlation = _rank_correlation(got["maps"], want["maps"])
        row = row.but(parity=Parity(**parity.model_dump(), map_spearman=correlation))
        if row.probes and expected.independent.exists():
            with np.load(expected.independent) as other:
                row = row.but(density=_density(row.probes, want["cells"], other["cells"], other["errors"]))
    if parity.passed:
        return row
    return row.without_speed(
        "failed parity",
        f"map error {parity.max_error:.2g} (RMS {parity.rms_error:.2g}) of the map's spread, limits "
        f"{parity.tolerance:.2g} and {parity.rms_tolerance:.2g}; score error {parity.score_error:.2g} of the scores' "
        "spread",
    )


def _certified(row: Row) -> Certified:
    """What the row's engine is certified in: a format may quantise what was exported in the row's precision."""
    for one in FORMATS.values():
        if one.quantises and one.engine == row.engine:
            return one.quantises
    return row.precision


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's over a map's cells, frame by frame, averaged; None where a map is constant or not finite.

    Not SciPy's: importing that takes longer than many a row, and a bare GPU machine need not have it.
    """
    values = []
    for pair in zip(a, b, strict=True):
        one, other = (_ranks(cells.ravel()) for cells in pair)
        if not np.isfinite(pair).all() or np.ptp(one) == 0 or np.ptp(other) == 0:
            return None
        values.append(np.corrcoef(one, other)[0, 1])
    return round(float(np.mean(values)), 6)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Each value's place in the order; equal ones share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[place]


def _density(probes: int, cells: np.ndarray, other: np.ndarray, errors: np.ndarray) -> DensityError:
    """How far K probes can be trusted.

    The standard error at K follows from the spread of ten independent probes; the rank correlation is with those ten,
    so it holds for K = 10 as well.
    """
    error, spread = float(np.sqrt((errors**2).mean()) * np.sqrt(10 / probes)), float(other.std())
    return DensityError(
        standard_error=round(error, 4),
        spread=round(spread, 4),
        share_of_spread=round(error / spread, 4) if spread else float("nan"),  # null in the record
        spearman_with_10=_rank_correlation(cells, other),
    )
