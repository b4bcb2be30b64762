"""Fast, trustworthy inference for flow-matching visual anomaly detection.

    detector = flowad_fast.load("bundles/bottle")     # an exported bundle
    detection = detector(frames)                      # uint8 (B, H, W, 3)
    detection.score, detection.map, detection.verdict

Names are imported on first use, so that `import flowad_fast` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flowad_fast import environment, moved

if TYPE_CHECKING:
    from flowad_fast.checkpoints.load import load_checkpoint, load_velocity, save_checkpoint
    from flowad_fast.config import VelocityConfig
    from flowad_fast.detection import Detection
    from flowad_fast.detector import Detector, load
    from flowad_fast.model import FlowModel
    from flowad_fast.stages.decision import Verdict
    from flowad_fast.stages.integration import integrate
    from flowad_fast.stages.scorers import Density, Inversion, Mismatch, Reconstruction

environment.settle()  # before torch, matplotlib and ONNX Runtime are imported
moved.install()

__version__ = "0.1.0"

_HOME = {
    "load": "detector",
    "Detector": "detector",
    "Detection": "detection",
    "Verdict": "stages.decision",
    "load_checkpoint": "checkpoints.load",
    "load_velocity": "checkpoints.load",
    "save_checkpoint": "checkpoints.load",
    "FlowModel": "model",
    "VelocityConfig": "config",
    "integrate": "stages.integration",
    "Density": "stages.scorers",
    "Inversion": "stages.scorers",
    "Reconstruction": "stages.scorers",
    "Mismatch": "stages.scorers",
}

__all__ = [
    "Density",
    "Detection",
    "Detector",
    "FlowModel",
    "Inversion",
    "Mismatch",
    "Reconstruction",
    "VelocityConfig",
    "Verdict",
    "integrate",
    "load",
    "load_checkpoint",
    "load_velocity",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flowad_fast' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"flowad_fast.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        from flowad_fast.errors import missing_extra

        raise missing_extra(error, f"flowad_fast.{name}") or error from None
