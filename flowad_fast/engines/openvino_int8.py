"""The engine of quantised graphs: int8 in OpenVINO, on a CPU that gives what the CPU that certified it gave.

Products of bytes are summed differently by different instruction sets, some of which saturate. A bundle therefore has a
canary, one frame with its map and score as certified, and the engine refuses to start where they come out otherwise.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from flowad_fast.bundle import Artefact
from flowad_fast.engines.instructions import cpu_flags, cpu_name, worth
from flowad_fast.engines.openvino import HEAVY, OpenVinoEngine, nodes
from flowad_fast.errors import BundleError, EngineUnavailableError, ParityError

BYTES = ("u8", "i8")
"""What a quantised product is computed in."""
GRAPH, CANARY = "int8.xml", "int8-canary.npz"


class OpenVinoInt8Engine(OpenVinoEngine):
    """Runs a bundle's quantised graph; the canary has to come out as certified. `auto` is the CPU."""

    name = "openvino-int8"

    def __init__(
        self, path: Path, artefact: Artefact, device: str = "auto", threads: int | None = None, mode: str = "latency"
    ) -> None:
        """See `OpenVinoEngine`.

        Raises:
            EngineUnavailableError: no product is computed in bytes here.
            ParityError: the canary comes out otherwise than where it was certified.
            BundleError: the canary is missing or cannot be read.
        """
        super().__init__(path, artefact, "cpu" if device == "auto" else device, threads, mode)
        if self._compiled and not self.quantised():
            raise EngineUnavailableError(
                f"asked OpenVINO for int8 on {self.device}, it would compute no product in bytes; use the format onnx"
            )
        if CANARY not in artefact.files:
            raise BundleError(f"{path}: the manifest lists no {CANARY}; export the bundle again")
        self._check_canary(path.with_name(CANARY), artefact)

    def quantised(self) -> int:
        """How many matrix products the compiled graph computes in bytes."""
        found = [nodes(graph) for graph in self._compiled.values()]
        return sum(kind in HEAVY and precision in BYTES for graph in found for kind, precision in graph)

    @property
    def title(self) -> str:
        """See `Engine`."""
        return f"{self.name} on {self.device} (int8 products, else {self.arithmetic}, {self.mode})"

    @property
    def details(self) -> dict[str, Any]:
        """See `OpenVinoEngine`; with the CPU's instructions, and whether int8 pays with them."""
        flags = cpu_flags()
        return super().details | {
            "quantised_products": self.quantised(),
            "instructions": None if flags is None else list(flags),
            "worth": worth(flags),
        }

    def _check_canary(self, path: Path, artefact: Artefact) -> None:
        canary = read_canary(path)
        if "location" in canary:
            self._location = {"location": canary["location"]}
        maps, scores = self.run(canary["frames"], canary.get("classes"))
        self._location = {}
        worst, rms, score = drift(maps, scores, canary)
        if worst <= canary["max"] and rms <= canary["rms"] and score <= canary["max"]:
            return
        flags = cpu_flags()
        here = f"{cpu_name()} ({'unknown instructions' if flags is None else ', '.join(flags)})"
        there = f"{artefact.details.get('cpu', 'unknown')} ({artefact.details.get('cpu_flags', 'unknown')})"
        raise ParityError(
            f"{path.parent}: int8 gives other results here than where it was certified: the canary's map differs by "
            f"{worst:.1e} (tolerance {float(canary['max']):.0e}), RMS {rms:.1e} ({float(canary['rms']):.0e}), its "
            f"score by {score:.1e}; certified on {there}, this is {here}; export it on such a CPU with --format "
            "openvino-int8, or use the format onnx"
        )


def drift(maps: np.ndarray, scores: np.ndarray, canary: dict[str, np.ndarray]) -> tuple[float, float, float]:
    """Largest and RMS difference of the map, relative to the canary's standard deviation, and the score's.

    The score's is relative to the larger of the two: the score itself, and that standard deviation. Not finite is huge.
    """
    scale = float(canary["map"].std()) or 1.0
    error = np.abs(maps.astype(np.float64) - canary["map"]) / scale
    off = np.abs(scores.astype(np.float64) - canary["score"]) / np.maximum(np.abs(canary["score"]), scale)
    found = float(error.max()), float(np.sqrt((error**2).mean())), float(off.max())
    return found if np.isfinite(found).all() else (1e30, 1e30, 1e30)


def read_canary(path: Path) -> dict[str, np.ndarray]:
    """A canary: `frames` uint8 (1, H, W, 3), `map` (1, S, S), `score`, the tolerances `max` and `rms`.

    With `classes` int64 (1,) and `location` where the graph takes them.

    Raises:
        BundleError: it is no such file.
    """
    needed = {"frames", "map", "score", "max", "rms"}
    try:
        with zipfile.ZipFile(path) as file:
            found = {
                name.removesuffix(".npy"): np.load(file.open(name), allow_pickle=False) for name in file.namelist()
            }
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{path}: no canary: {' '.join(str(error).split())[:200]}; export the bundle again") from None
    if not needed <= set(found) or found["frames"].dtype != np.uint8 or found["frames"].ndim != 4:
        raise BundleError(f"{path}: no canary: expected {', '.join(sorted(needed))}; export the bundle again")
    return found
