"""Modules under the names that they had in 0.1.0; the old names go with the next minor version.

from flowad_fast.scorers import Inversion      # is flowad_fast.stages.scorers
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    **{f"flowad_fast.{name}": f"flowad_fast.stages.{name}" for name in (
        "image", "features", "velocity", "linear", "schedule", "integration", "scorers", "decision",
    )},
    **{f"flowad_fast.{name}": f"flowad_fast.engines.{name}" for name in ("precision", "attention", "products")},
    **{f"flowad_fast.{name}": f"flowad_fast.evaluation.{name}" for name in ("metrics", "overlay", "probes")},
    "flowad_fast.checkpoint": "flowad_fast.checkpoints.load",
    "flowad_fast.training_config": "flowad_fast.training.config",
    "flowad_fast.training_data": "flowad_fast.training.batches",
}  # fmt: skip
"""Old name to new name."""


class _Alias(ModuleType):
    """Stands for the module of another name: what it has, and what is set on it, is that module's."""

    def __getattr__(self, name: str) -> object:
        return getattr(importlib.import_module(MOVED[self.__name__]), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A specification that this loader fulfils, for old names."""
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """An alias of the module."""
        return _Alias(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Import the module itself, and say its name."""
        new = MOVED[module.__name__]
        importlib.import_module(new)
        warnings.warn(f"{module.__name__} is {new} now; the old name goes with 0.2", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Let old names be found, once per process."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
