"""The operators of `reference` under the same names: on a GPU their Triton kernels, elsewhere the reference itself.

A model takes either module as its `ops`. A kernel is found by what its module registers: an operator NAME of any module
here stands for `reference.NAME`, so this file names none. What has no kernel of its own is the reference's: torch
already has the best known attention, and plain LayerNorm and upsampling are not on the fast path.
"""

import importlib
import pkgutil
from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from typing import Any

from torch.library import CustomOpDef

from flowad_fast.kernels import reference

MODULES = tuple(
    importlib.import_module(f"{__package__}.{found.name}")
    for found in pkgutil.iter_modules([str(Path(__file__).parent)])
    if f"{__package__}.{found.name}" != __name__
)
"""The other modules of this package."""
KERNELS: dict[str, Callable[..., Any]] = {
    name: value for module in MODULES for name, value in vars(module).items() if isinstance(value, CustomOpDef)
}
"""Operators that have a Triton kernel."""
SPECIFIED: dict[str, Callable[..., Any]] = {
    name: value
    for name, value in vars(reference).items()
    if isfunction(value) and value.__module__ == reference.__name__ and not name.startswith("_")
}
"""Every operator, as the reference computes it."""
if unknown := KERNELS.keys() - SPECIFIED.keys():
    raise ImportError(f"kernels of {', '.join(sorted(unknown))}, which kernels/reference.py does not specify: add them")
globals().update(SPECIFIED | KERNELS)
__all__ = list(SPECIFIED)
