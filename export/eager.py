"""The weights themselves, for the engines that start from a model: a checkpoint with its backbone included."""

from pathlib import Path

from flowad_fast.checkpoints.load import save_checkpoint
from flowad_fast.export.formats import Built, Request, versions_of


def write(request: Request, folder: Path) -> Built:
    """Write `model.safetensors` and its description; every precision starts from the same float32 weights."""
    save_checkpoint(request.model, folder / "model.safetensors", include_backbone=True)
    return Built(("model.safetensors", "model.json"), versions_of("torch"))
