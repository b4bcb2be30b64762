"""Where a precision can run, and the process-wide switches of torch that it needs while it runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

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
    Convolutions follow: torch's own default lets them use TF32 while matrix products do not. Torch has an older and a
    newer interface to each switch, and raises where one that is read disagrees with the other, so both are set.
    """
    if device.type != "cuda":
        yield
        return
    tf32 = precision == "tf32"
    with _SWITCHES:
        before = _Switches.read()
        _Switches("high" if tf32 else "highest", tf32, *["tf32" if tf32 else "ieee"] * 4).write()
        try:
            yield
        finally:
            before.write()


@dataclass(frozen=True)
class _Switches:
    """Torch's switches for float32 on a GPU: the two of the older interface, then the newer one's.

    `products_cpu` belongs to the CPU, where the older switch for products reaches too.
    """

    legacy_products: str
    legacy_convolutions: bool
    products: str
    products_cpu: str
    convolutions: str
    recurrent: str

    @classmethod
    def read(cls) -> "_Switches":
        """What is set now; where only the newer interface was used, what the older one would say."""
        own = [place.fp32_precision for place in _places()]
        try:
            products = torch.get_float32_matmul_precision()
        except RuntimeError:
            products = "high" if own[0] == "tf32" else "highest"
        try:
            convolutions = torch.backends.cudnn.allow_tf32
        except RuntimeError:
            convolutions = own[2] == "tf32"
        return cls(products, convolutions, *own)

    def write(self) -> None:
        """Set all of them; the newer interface last, since writing the older one changes it too."""
        torch.set_float32_matmul_precision(self.legacy_products)
        torch.backends.cudnn.allow_tf32 = self.legacy_convolutions
        own = (self.products, self.products_cpu, self.convolutions, self.recurrent)
        for place, value in zip(_places(), own, strict=True):
            place.fp32_precision = value


def _places() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn
