"""Weight files as tensors: nothing is executed while reading, and a file that is none says what it looks like."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flowad_fast.errors import CheckpointError


def read_pickle(path: Path) -> Mapping[str, Any]:
    """The dictionary in a `.pth`, on the CPU; objects other than tensors are refused, not loaded.

    Raises:
        CheckpointError: no such file, or no dictionary that is safe to read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) and _describe(path) == "not a torch checkpoint" or "GLOBAL" in str(error):
            unsafe = re.search(r"GLOBAL (\S+)", str(error))
            what = f" ({unsafe.group(1)})" if unsafe else ""
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes): holds objects other than tensors{what}, or is no checkpoint; "
                "nothing was executed. Save the weights alone: torch.save({'model': net.state_dict()}, FILE)"
            ) from None
        raise _unreadable(path) from None
    except Exception:  # damaged bytes make the unpickler raise nearly anything
        raise _unreadable(path) from None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a dictionary of tensors")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors`, on the CPU.

    Raises:
        CheckpointError: no such file, or none of that format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes): not a safetensors file ({error}); copy it again"
        ) from None


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _describe(path: Path) -> str:
    """What a file that is no checkpoint looks like, in a few words."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, not the file itself: run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page, probably a failed download: download it again"
    if head.startswith(b"PK"):
        return "a truncated or damaged zip archive: copy or download it again"
    return "not a torch checkpoint"


def _unreadable(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} ({path.stat().st_size} bytes): cannot be read; it is {_describe(path)}")
