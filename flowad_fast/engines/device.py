"""Device names as torch devices."""

import torch

from flowad_fast.errors import EngineUnavailableError


def torch_device(device: str) -> torch.device:
    """`auto` (CUDA where there is one, otherwise CPU), `cpu`, `cuda` or `cuda:N` as a device.

    Raises:
        EngineUnavailableError: a GPU was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise EngineUnavailableError(f"unknown device {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise EngineUnavailableError(f"device {device!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailableError(
            f"device {device!r} was asked for, but torch {torch.__version__} finds no usable GPU or driver; "
            "check nvidia-smi, or ask for device='cpu'"
        )
    if chosen.type == "cuda" and chosen.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return chosen
