"""Where a training runs: its device, its place among several processes, and the signals that end it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flowad_fast.errors import ConfigError, EngineUnavailableError, require


@dataclass(frozen=True)
class Runtime:
    """The device, and this process's place among several (`accelerator` is None when there is one)."""

    device: torch.device
    rank: int = 0
    world: int = 1
    accelerator: Any = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        return model if self.accelerator is None else self.accelerator.prepare_model(model)

    def mean(self, *values: float) -> tuple[float, ...]:
        """Each value's mean over the processes."""
        if self.accelerator is None:
            return values
        return tuple(self.accelerator.reduce(torch.tensor(values, device=self.device), "mean").tolist())

    def leave(self) -> None:
        """End the processes' group: its threads abort a process that ends while they run."""
        if self.accelerator is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def runtime(device: str, distributed: bool) -> Runtime:
    """The runtime on a device that is there; what `accelerate launch` started where `distributed`."""
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailableError("device cuda: no usable NVIDIA GPU or driver was found; use device cpu")
    if distributed:
        require("train", "accelerate", by="distributed training")
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        return Runtime(accelerator.device, accelerator.process_index, accelerator.num_processes, accelerator)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a launcher started several processes, which would overwrite each other; add --distributed")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Runtime(torch.device(device))


@contextmanager
def deferred_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event instead of breaking a step; a second one acts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        event.set()
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        restore()
