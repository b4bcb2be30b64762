"""The Inductor engines: the pipeline compiled in this process, or a package compiled ahead of time (`.pt2`)."""

import os
import platform
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from flowad_fast.bundle import LOCATION, Artefact
from flowad_fast.config import Precision
from flowad_fast.engines import Engine
from flowad_fast.engines.cores import bind_torch
from flowad_fast.engines.device import torch_device
from flowad_fast.engines.precision import arithmetic, check_precision
from flowad_fast.errors import BundleError, EngineUnavailableError
from flowad_fast.pipeline import ScoringPipeline

PORTABLE = "x86-64-v3"
"""Instruction set of packages for x86-64: AVX2 and FMA, every server and desktop processor since about 2015."""


class InductorEngine(Engine):
    """Runs a `ScoringPipeline` through torch.compile, with symbolic batch and frame size.

    Safe from many threads: a lock lets one call in at a time, since the first call of a kind compiles. A batch of one
    is a kind of its own, and so are frames of the model's own size. Compilation never falls back to eager: what cannot
    be compiled is an error.
    """

    name = "compile"
    on_tensors = True
    takes_threads = True

    def __init__(
        self,
        pipeline: ScoringPipeline,
        device: str = "auto",
        mode: Literal["default", "max-autotune-no-cudagraphs"] = "default",
        threads: int | None = None,
    ) -> None:
        self._threads = threads
        bind_torch(threads)
        self._device = torch_device(device)
        check_precision(pipeline.precision, self._device)
        if self._device.type == "cpu":
            cpp_compiler()
        check_cache()
        self.device = str(self._device)
        self.pipeline = pipeline.on(self._device)
        self._compiled = torch.compile(self.pipeline, dynamic=True, fullgraph=True, mode=mode)
        self._lock = threading.Lock()

    @property
    def title(self) -> str:
        """See `Engine`, with precision and operators."""
        return super().title + self.pipeline.arithmetic

    def prepare(self, height: int, width: int) -> None:
        """Compile now for frames of this size, which the first calls would pay for otherwise."""
        for batch in (1, 2):  # a first batch of 3 would be taken for the three colours, and get a graph of its own
            frames = np.random.RandomState(0).randint(0, 256, (batch, height, width, 3)).astype(np.uint8)
            self.run(frames, np.zeros(batch, np.int64) if self.pipeline.conditional else None)

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        given, *classes = _inputs(frames, y, self._device)
        maps, scores = self.on_device(given, classes[0] if classes else None)
        return maps.cpu().numpy(), scores.cpu().numpy()

    def on_device(self, frames: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `run`, on tensors of the engine's device."""
        bind_torch(self._threads)
        with self._lock, torch.inference_mode(), arithmetic(self.pipeline.precision, self._device):
            return self._compiled(*([frames] if y is None else [frames, y]))


class AotInductorEngine(Engine):
    """Runs `model.pt2` of a bundle, without this project's model code and without compiling.

    Safe from many threads: a lock lets one call in at a time. The package has a lock of its own, but waits for
    it while it holds Python's, so two threads would stop each other for ever.
    """

    name = "inductor"
    takes_threads = True

    def __init__(self, path: Path, artefact: Artefact, device: str = "auto", threads: int | None = None) -> None:
        self._threads = threads
        bind_torch(threads)
        built_for = str(artefact.details.get("device"))
        self._device = torch_device(built_for if device == "auto" else device)
        self.device = str(self._device)
        self._precision = cast(Precision, artefact.precision)
        self._lock = threading.Lock()
        check_fit(path, artefact, self._device)
        index = self._device.index if self._device.index is not None else -1
        # torch's own aoti_load_package test-compiles C++ to compare processors, so it needs a compiler and seconds.
        try:
            self._package = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, index)
        except RuntimeError as error:
            why = str(error).splitlines()[0][:300]
            raise BundleError(f"{path}: torch {torch.__version__} refuses the package: {why}") from None
        self._takes = self._package.get_metadata().get("flowad.inputs", "")
        self._location: tuple[Tensor, ...] = ()

    def locate(self, table: np.ndarray) -> None:
        """See `Engine`."""
        if LOCATION not in self._takes.split(","):
            super().locate(table)
        self._location = (torch.from_numpy(table).to(self._device),)

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine`."""
        bind_torch(self._threads)
        with self._lock, torch.inference_mode(), arithmetic(self._precision, self._device):
            maps, scores = self._package.boxed_run([*_inputs(frames, y, self._device), *self._location])
        return maps.cpu().numpy(), scores.cpu().numpy()


def check_fit(path: Path, artefact: Artefact, device: torch.device) -> None:
    """Refuse a package that was not compiled for this device, machine and torch; it is machine code.

    Raises:
        EngineUnavailableError: what was expected, what was found, and the command that rebuilds it.
    """
    here = target(device)
    built = {key: artefact.details.get(key) for key in here} | {"torch": artefact.versions.get("torch")}
    here["torch"] = torch.__version__
    wrong = [f"{key} {built[key]}, here is {here[key]}" for key in here if built[key] != here[key]]
    if wrong:
        raise EngineUnavailableError(
            f"{path}: compiled for {'; '.join(wrong)}; compile it here: "
            f"flowad-export make CHECKPOINT --format aoti --device {device.type}"
        )


def target(device: torch.device) -> dict[str, str]:
    """What a package for `device` depends on: the kind of device, the machine, its instruction set, the GPU.

    x86-64 packages are compiled for `PORTABLE`. Elsewhere the compiler takes what the machine has, and only the
    capability that torch reports is known.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    portable = platform.machine() == "x86_64" and capability not in ("DEFAULT", "NO AVX")
    facts = {
        "device": device.type,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": PORTABLE if portable else f"native, {capability}",
    }
    if device.type == "cuda":
        facts["gpu"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts


def check_cache() -> None:
    """Make the folder that Inductor compiles in.

    Raises:
        EngineUnavailableError: it cannot be written.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        folder = cache_dir()
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise EngineUnavailableError(
            f"Inductor cannot write the folder that it compiles in ({error}); set TORCHINDUCTOR_CACHE_DIR to one that "
            "this user can write"
        ) from None


def cpp_compiler() -> str:
    """The path of the C++ compiler that Inductor calls.

    Raises:
        EngineUnavailableError: there is none.
    """
    import torch._inductor.config

    names = [name for name in torch._inductor.config.cpp.cxx if name]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise EngineUnavailableError(
            f"Inductor needs a C++ compiler and finds no {' or '.join(names)}; install one (Debian: apt-get install "
            "g++), or set CXX to its path"
        )
    return found


def _inputs(frames: np.ndarray, y: np.ndarray | None, device: torch.device) -> tuple[Tensor, ...]:
    arrays = (frames,) if y is None else (frames, y)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)
