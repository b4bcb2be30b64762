"""Where a precision can run, and the process-wide switches of torch that it needs while it runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from flowad_fast.config import Precision
from flowad_fast.errors import EngineUnavailableError, nearest
from flowad_fast.stages.arithmetic import NUMBERS

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_SWITCHES = threading.RLock()


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that does not exist or that the device does not have.

    Raises:
        EngineUnavailableError: unknown, tf32 without an NVIDIA GPU, or a GPU that is too old.
    """
    if precision not in PRECISIONS:
        raise EngineUnavailableError(f"unknown precision {precision!r}; {nearest(precision, PRECISIONS)}")
    if device.type != "cuda":
        if precision == "tf32":
            raise EngineUnavailableError(
                f"precision tf32 is a mode of NVIDIA GPUs, the device is {device}; ask for fp32, or for device='cuda'"
            )
        return
    needed = NUMBERS[precision].capability
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        raise EngineUnavailableError(
            f"precision {precision} needs compute capability {needed[0]}.{needed[1]}, {device} is "
            f"{torch.cuda.get_device_name(device)} with {found[0]}.{found[1]}; ask for fp16 or fp32"
        )


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """float32 products on the GPU in float32, or in TF32 when `precision` is tf32, inside this context only.

    The switches belong to the process, so one thread at a time is inside; work is queued there, not waited for.
    Convolutions follow: torch's own default lets them use TF32 while matrix products do not.
    """
    if device.type != "cuda":
        yield
        return
    mode = "tf32" if precision == "tf32" else "ieee"
    with _SWITCHES:
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
        before = products.fp32_precision, convolutions.fp32_precision
        products.fp32_precision = convolutions.fp32_precision = mode
        try:
            yield
        finally:
            products.fp32_precision, convolutions.fp32_precision = before
