"""How many density probes are enough: the fewest whose measured noise on good parts is a small share of the map."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from flowad_fast.errors import ConfigError
from flowad_fast.model import FlowModel
from flowad_fast.stages.arithmetic import FP32
from flowad_fast.stages.integration import to_tokens
from flowad_fast.stages.maps import DensityMap
from flowad_fast.stages.scorers import Density

SHARE = 0.2
"""Default of the noise that is accepted, as a share of the map's spread: a twenty-fifth of its variance."""
CANDIDATES = (1, 2, 3, 4, 6, 8, 10, 16, 32, 64)
"""Numbers of probes that are considered, in this order."""


@dataclass(frozen=True)
class ProbeChoice:
    """The number of probes that was chosen, and what it rests on; `record` goes into the manifest.

    `one_probe_noise` is the standard deviation of a location's map value over single probes, rms over locations and
    frames; the standard error of K probes is that over sqrt(K). `spread` is the standard deviation over locations and
    frames of the map itself, the noise of the measured mean taken off. All are in the units of the map (nats).
    """

    probes: int
    share: float
    measured_share: float
    spread: float
    one_probe_noise: float
    measured_with: int
    frames: int

    @property
    def standard_error(self) -> float:
        """Of the chosen number of probes, rms over locations."""
        return self.one_probe_noise / self.probes**0.5

    def record(self) -> dict[str, Any]:
        """The choice as JSON-ready values, for `Manifest.probe_choice`."""
        return {**asdict(self), "standard_error": self.standard_error}


def choose_probes(
    model: FlowModel,
    scorer: Density,
    good_frames: np.ndarray,
    classes: Sequence[str | int] | None = None,
    *,
    share: float = SHARE,
    measure_with: int = 8,
) -> tuple[Density, ProbeChoice]:
    """`scorer` with the fewest probes whose standard error on good parts is at most `share` of the map's spread.

    Args:
        model: a trained flow-matching model.
        scorer: the density scorer; its own number of probes is ignored.
        good_frames: uint8 (B, H, W, 3) of good parts.
        classes: class of each frame, for conditional models.
        share: accepted rms standard error over the standard deviation of the map over locations and frames.
        measure_with: probes of the measurement, at least 2; the noise of other numbers follows from it.

    Raises:
        ConfigError: no frames, too few probes to measure with, an exact scorer, or a share that not even the largest
            candidate reaches.
    """
    if scorer.exact:
        raise ConfigError("an exact density has no probes to choose; use Density(exact=False)")
    if measure_with < 2 or len(good_frames) == 0 or not 0 < share:
        raise ConfigError(
            f"choosing probes needs good frames, at least 2 probes to measure with and a positive share; got "
            f"{len(good_frames)} frames, {measure_with} probes, share {share}"
        )
    y = model.class_indices(classes, len(good_frames))
    y = model.check_classes(y, len(good_frames))
    prepared = DensityMap.bind(replace(scorer, probes=measure_with), model, FP32)
    maps, errors = [], []
    with torch.no_grad():
        for i in range(len(good_frames)):
            x1 = to_tokens(model.features(good_frames[i : i + 1]))
            mean, error = prepared.with_error(x1, None if y is None else y[i : i + 1])
            maps.append(mean)
            errors.append(error)
    noise = float(torch.cat(errors).double().square().mean()) * measure_with
    spread = max(float(torch.cat(maps).double().var()) - noise / measure_with, 0.0) ** 0.5
    one = noise**0.5
    for probes in CANDIDATES:
        if one <= share * spread * probes**0.5:
            choice = ProbeChoice(probes, share, one / probes**0.5 / spread, spread, one, measure_with, len(good_frames))
            return replace(scorer, probes=probes), choice
    raise ConfigError(
        f"{CANDIDATES[-1]} probes have a standard error of {one / CANDIDATES[-1] ** 0.5:.3g} where the map spreads by "
        f"{spread:.3g}, more than the accepted share {share:g}; raise the share or give the number of probes"
    )
