"""What comes with the project and its extra `demo`, by name: two checkpoints, and the photos that go with each."""

from pathlib import Path

SHIPPED = {name: Path(__file__).parent / "assets" / f"{name}.safetensors" for name in ("demo", "cells")}
"""The checkpoints, by what they are called wherever a checkpoint is expected: `demo` is of monocrystalline solar cells,
`cells` of two products, mono- and polycrystalline ones, told apart by class."""
PHOTOS = {"demo": "elpv", "cells": "elpv-cells"}
"""The data layouts of their photos, by what they are called wherever a folder of photos is expected."""


def weight_file(checkpoint: str | Path) -> Path:
    """The weight file that a checkpoint's name stands for, which is most often its own."""
    return SHIPPED.get(str(checkpoint), Path(checkpoint))
