"""The name under which `checkpoints.load` was imported before."""

from flowad_fast.checkpoints.load import load_checkpoint, load_velocity, save_checkpoint

__all__ = ["load_checkpoint", "load_velocity", "save_checkpoint"]
