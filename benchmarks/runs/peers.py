"""Other methods that people choose between, on the same machine, frames and clock: anomalib's CFLOW-AD, EfficientAD,
PatchCore and PaDiM at 256x256.

    python -m venv peers && peers/bin/pip install anomalib -c constraints.txt && peers/bin/pip install -e .
    peers/bin/python -m flowad_fast.benchmarks.runs.peers --output benchmarks/results/peers-MACHINE.json

An optional script for an environment of its own, since anomalib brings many packages. Weights are random (speed does
not depend on them); PaDiM and PatchCore are fitted on random features, PatchCore with anomalib's defaults for a set of
200 good parts, since its memory bank decides its speed. Nothing here says anything about detection quality.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from flowad_fast.benchmarks.measure import harness
from flowad_fast.benchmarks.measure.cases import Case, make_scorer, random_pictures
from flowad_fast.benchmarks.measure.environment import environment, moment
from flowad_fast.benchmarks.measure.memory import PeakMemory, limit_to_available
from flowad_fast.benchmarks.measure.turns import Effort, measured
from flowad_fast.benchmarks.measure.worker import Samples
from flowad_fast.benchmarks.record import record
from flowad_fast.benchmarks.record.record import Record, Roofs, Row
from flowad_fast.cli import common
from flowad_fast.config import ImageConfig
from flowad_fast.engines.device import torch_device
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.stages.frames import invalid_frames
from flowad_fast.stages.image import normalise

GOOD_PARTS = 200
"""Good parts that PatchCore's memory bank stands for: about a category of MVTec AD."""
PATCHES, CORESET, WIDTH = 32 * 32, 0.1, 512 + 1024
"""Patches per part at 256 pixels, anomalib's default share of them that is kept, and channels of its default layers."""


def cflow() -> Any:
    """CFLOW-AD, anomalib's defaults: Wide ResNet-50, three layers, eight coupling blocks."""
    from anomalib.models import Cflow

    return Cflow(pre_trained=False).model


def efficient_ad() -> Any:
    """EfficientAD, small."""
    from anomalib.models import EfficientAd

    return EfficientAd().model


def patchcore() -> Any:
    """PatchCore with a memory bank of random features of the size that GOOD_PARTS good parts would give."""
    from anomalib.models import Patchcore

    model = Patchcore(pre_trained=False).model
    model.memory_bank = torch.randn(int(GOOD_PARTS * PATCHES * CORESET), WIDTH)
    return model


def padim() -> Any:
    """PaDiM (ResNet-18), its Gaussians fitted on random pictures, more of them than it keeps features."""
    from anomalib.models import Padim

    model = Padim(pre_trained=False).model.train()
    for _ in range(16):
        model(torch.randn(8, 3, 256, 256))
    model.fit()
    return model


PEERS: dict[str, Callable[[], Any]] = {
    "CFLOW-AD": cflow,
    "EfficientAD-S": efficient_ad,
    "PatchCore": patchcore,
    "PaDiM": padim,
}


def measure(name: str, batch: int, device: str, seconds: float) -> Row:
    """One peer's row, from frames in host memory to map and score in host memory."""
    row = Row(method=name, name=name, batch=batch, preset="peers", scorer=name, engine="anomalib", status="ok")
    where = torch_device(device)
    if where.type == "cpu":
        limit_to_available()
    start = time.perf_counter()
    try:
        model = PEERS[name]().to(where).eval()
    except ImportError as error:
        return row.without_speed("not available", f"{error}; pip install anomalib")
    loaded = time.perf_counter()
    frames, source = random_pictures(batch, 256), "random pictures"

    def call() -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            x: Tensor = normalise(torch.from_numpy(frames).to(where), ImageConfig(size=256))
            found = model(x)
        invalid_frames(frames)
        return found.anomaly_map.cpu().numpy(), found.pred_score.cpu().numpy()

    memory = PeakMemory(where)
    before = time.perf_counter()
    maps, _ = call()
    first = time.perf_counter() - before
    if maps.shape[0] != batch or not np.isfinite(maps).all():
        return row.without_speed("failed", f"the map is {maps.shape} or not finite")
    call()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or (time.perf_counter() < end and len(samples) < 2000):
        begin = time.perf_counter()
        call()
        samples.append((time.perf_counter() - begin) * 1e3)
    return row.but(
        frames=source,
        frame_size=(256, 256),
        load_s=round(loaded - start, 3),
        first_call_s=round(first, 3),
        measured=measured(batch, [Samples(samples, [])], memory.read()),
    )


def run(
    names: Sequence[str], batch: int, device: str, seconds: float, ours: Sequence[Case], tell: harness.Tell
) -> Record:
    """Every peer in a process of its own, then `ours` by the harness: one record."""
    before = moment()
    rows = []
    for name in names:
        tell(name)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure, name, batch, device, seconds).result())
    roofs = Roofs(reason="no row of ours was measured")
    if ours:
        own = harness.run(ours, Effort(seconds=seconds), tell)
        rows += [row.but(method=f"flowad-fast {row.preset}, {row.name}") for row in own.cases]
        roofs = own.roofs
    return Record(
        kind="peers",
        title=f"Peers, batch {batch}: anomalib's models beside ours, same frames, same clock",
        preset="peers",
        environment=environment(before, anomalib=_anomalib()),
        cases=tuple(rows),
        roofs=roofs,
    )


def _anomalib() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("anomalib")
    except PackageNotFoundError:
        raise EngineUnavailableError(
            "anomalib is not installed; in an environment of its own: pip install anomalib -c constraints.txt"
        ) from None


def peers(
    output: Annotated[Path, typer.Option(help="The record.")],
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PEERS),
    preset: Annotated[str, typer.Option(help="Our presets to measure beside them; empty for none.")] = "demo,small",
    batch: Annotated[int, typer.Option(help="Frames per call.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Time per row, in seconds.")] = 10.0,
) -> None:
    """Measure anomalib's models beside ours and write a record."""
    _anomalib()
    ours = [
        Case(one, make_scorer("inversion"), "eager", batch=batch, device=device, frame_size=256)
        for one in preset.split(",")
        if one
    ]
    with common.status("measuring") as tell:
        found = run(methods.split(","), batch, device, seconds, ours, tell)
    record.write(found, output)
    for row in found.cases:
        said = f"{row.measured.fps:.2f} FPS" if row.measured else f"{row.status}: {row.reason}"
        common.out.print(f"{row.method}: {said}")
    common.out.print(f"written: {output}", highlight=False)


main = common.command(peers)

if __name__ == "__main__":
    main()
