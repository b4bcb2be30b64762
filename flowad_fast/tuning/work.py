"""The long part, kept on disk: backbone features once per frame content, then the cells of each scorer once."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flowad_fast.config import parse
from flowad_fast.files import digest, make_folder, replacing
from flowad_fast.kernels import reference
from flowad_fast.model import FlowModel
from flowad_fast.stages.aggregates import Aggregate, Heat, norm_power
from flowad_fast.stages.integration import to_tokens
from flowad_fast.stages.score import aggregated
from flowad_fast.stages.scorers import Scorer, scorer_adapter
from flowad_fast.tuning.recipe import Timing

CHUNK = 16
"""Frames per call and per file of features."""
Cells = NDArray[np.float32]


@dataclass(frozen=True)
class Store:
    """The folder of a measurement: `features/` by content, `cells/` by scorer, `times/` by scorer and engine."""

    folder: Path

    def open(self, key: dict[str, str]) -> list[str]:
        """Begin or go on; returns what of the key has changed since the last time, then all but features is gone."""
        for kept in ("features", "cells", "times"):
            make_folder(self.folder / kept)
        state, changed = self.folder / "state.json", []
        if state.is_file():
            try:
                before = json.loads(state.read_text(encoding="utf-8"))
            except ValueError:
                before = {}
            changed = [name for name in key if before.get(name) != key[name]]
        if changed:
            for old in (*self.folder.glob("cells/*.npy"), *self.folder.glob("times/*.json")):
                old.unlink()
        with replacing(state) as file:
            file.write(json.dumps(key, indent=2).encode())
        return changed

    def features(self, model: FlowModel, frames: Sequence[NDArray[np.uint8]], key: str) -> NDArray[np.float32]:
        """X1 of at most `CHUNK` frames as tokens (n, N, C), computed unless frames of this content have been seen."""
        hashed = hashlib.sha256(key.encode())
        for frame in frames:
            hashed.update(str(frame.shape).encode() + np.ascontiguousarray(frame).tobytes())
        path = self.folder / "features" / f"{hashed.hexdigest()}.npy"
        if not path.is_file():
            same = len({frame.shape for frame in frames}) == 1
            batches = [np.stack(frames)] if same else [frame[None] for frame in frames]
            tokens = torch.cat([to_tokens(model.features(batch)) for batch in batches])
            with replacing(path) as file:
                np.save(file, tokens.numpy())
        found: NDArray[np.float32] = np.load(path, mmap_mode="r")
        return found

    def cells(
        self,
        model: FlowModel,
        scorer: Scorer,
        features: Sequence[NDArray[np.float32]],
        y: NDArray[np.int64] | None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Cells:
        """The map of every frame before it is enlarged, (n, N); from the disk where it was computed before."""
        path = self.folder / "cells" / f"{_name(scorer)}.npy"
        if path.is_file():
            found: Cells = np.load(path)
            return found
        module, rows, start = scorer.prepare(model), [], 0
        with torch.inference_mode():
            for chunk in features:
                classes = None if y is None else torch.from_numpy(y[start : start + len(chunk)])
                rows.append(module(torch.from_numpy(np.array(chunk)), classes).numpy())
                start += len(chunk)
                advance(len(chunk))
        cells = np.concatenate(rows)
        with replacing(path) as file:
            np.save(file, cells)
        return cells

    def time(self, scorer: Scorer, engine: str, measure: Callable[[], Timing]) -> Timing:
        """The time of a scorer on an engine, measured unless it was before."""
        path = self.folder / "times" / f"{_name(scorer)}-{digest(engine)[:12]}.json"
        if path.is_file():
            return parse(Timing, json.loads(path.read_text(encoding="utf-8")), str(path))
        timing = measure()
        with replacing(path) as file:
            file.write(timing.model_dump_json().encode())
        return timing


def scores(
    cells: Cells, scorer: Scorer, aggregates: Sequence[Aggregate], grid: tuple[int, int], size: int
) -> dict[Aggregate, Cells]:
    """Image scores (n,) by aggregate of maps (n, N): enlarged once for all of them, as in the exported graph."""
    found: dict[Aggregate, list[Cells]] = {name: [] for name in aggregates}
    with torch.inference_mode():
        for chunk in torch.from_numpy(cells).split(64):
            _, high, low, total = reference.upsample_score(chunk.unflatten(1, grid), size)  # type: ignore[no-untyped-call]
            heat = Heat(chunk, high, low, total, size**2, norm_power(scorer))
            for name in aggregates:
                found[name].append(aggregated(heat, name).numpy())
    return {name: np.concatenate(rows) for name, rows in found.items()}


def _name(scorer: Scorer) -> str:
    return f"{scorer.kind}-{digest(scorer_adapter.dump_python(scorer, mode='json'))[:16]}"
