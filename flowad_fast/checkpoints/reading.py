"""Weight files as tensors: nothing is executed while reading, and a file that is none says what it looks like.

`read_network` also takes off what training tools wrap around a network's names (compiled, distributed, Lightning) and
chooses between its weights and their running average.
"""

import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flowad_fast.config import Weights
from flowad_fast.errors import CheckpointError

_TRAINED = ("model", "state_dict")
_AVERAGED = ("model_ema", "ema_model", "ema", "ema_state_dict", "state_dict_ema")
_KINDS = {"model": "trained", "ema": "averaged"}
_WRAPPERS = {"module", "_orig_mod"}
"""Parts of a key that distributed training, averaging and compilation add."""


@dataclass(frozen=True)
class Network:
    """A network's tensors as a family of `foreign.FAMILIES` stores them.

    Attributes:
        state: the tensors, under `model` for FlowAD.
        path: the file that they are from.
        chosen: which weights these are, where there was a choice.
    """

    state: Mapping[str, Any]
    path: Path
    chosen: Weights | None


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


def read_network(path: Path, weights: Weights | None = None) -> Network:
    """The network in a `.pth`, under the names that it was defined with; without `weights`, the trained ones.

    Averaged weights are looked for in the file, and beside it under InvAD's names (`model_ema_latest.pth` is the
    average of `model_latest.pth`). Where there are both and none was asked for, a warning says which were taken.

    Raises:
        CheckpointError: as `read_pickle`; or the weights that were asked for are not there; or names that differ by
            their wrapping alone hold different tensors.
    """
    state = read_pickle(path)
    own: Weights = "ema" if "_ema_" in path.name else "model"
    trained, averaged = _entry(state, _TRAINED), _entry(state, _AVERAGED)
    sets: dict[Weights, tuple[Path, str | None]] = {}
    if trained is not None or averaged is None:
        sets[own] = path, trained
    if averaged is not None:
        sets["ema"] = path, averaged
    twin = _twin(path)
    if twin is not None:
        sets.setdefault("model" if own == "ema" else "ema", (twin, None))
    taken: Weights = weights or (own if own in sets else "ema")
    if taken not in sets:
        raise CheckpointError(f"{path}: holds no {_KINDS[taken]} weights, and no file beside it does; omit weights")
    for other in set(sets) - {taken} if weights is None else ():
        at, entry = sets[other]
        warnings.warn(
            f"{path}: the {_KINDS[taken]} weights are taken; the {_KINDS[other]} ones are there too, in "
            f"{at.name if entry is None else repr(entry)}: weights={other!r} takes those (--weights {other})",
            stacklevel=3,
        )
    at, entry = sets[taken]
    if at != path:
        state = read_pickle(at)
        entry = _entry(state, _TRAINED)
    beside = None if entry in (trained, None) else trained
    inner = None if beside is None else _name_of(_plain(state[beside], str(at)))
    tensors = _plain(state if entry is None else _inside(state[entry]), str(at))
    return Network(_as_saved(tensors, inner, entry is not None), at, taken if len(sets) > 1 else None)


def _entry(state: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if isinstance(state.get(name), Mapping)), None)


def _twin(path: Path) -> Path | None:
    """The file beside one of InvAD's that has its average, or of which it is the average; None where there is none."""
    parts = re.fullmatch(r"model_(ema_)?(.+)", path.name)
    if parts is None:
        return None
    kind = "model_" if parts[1] else "model_ema_"
    others = (path.with_name(kind + parts[2]), path.with_name(f"{kind}latest{path.suffix}"))
    return next((other for other in others if other.is_file()), None)


def _inside(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an averaging tool keeps its copy under, where it does."""
    name = _entry(entry, ("module", "state_dict", "shadow"))
    return entry if name is None else entry[name]


def _plain(tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The entries without what wraps their names, and without the count that an average keeps."""
    plain: dict[str, Any] = {}
    for key, value in tensors.items():
        name = ".".join(part for part in str(key).split(".") if part not in _WRAPPERS)
        if name == "n_averaged":
            continue
        if name in plain and not _same(plain[name], value):
            raise CheckpointError(f"{source}: holds {name!r} twice, wrapped and not, with different values; keep one")
        plain[name] = value
    return plain


def _same(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and torch.equal(one, other)


def _name_of(tensors: Mapping[str, Any]) -> str | None:
    """The path of the DiT in a state dict, e.g. `model.` or `net.model.`; None where there is no DiT."""
    ends = [key.removesuffix("pos_embed") for key in tensors if f".{key}".endswith(".pos_embed")]
    return min((path for path in ends if "solver." not in path), key=len, default=None)


def _as_saved(tensors: dict[str, Any], inner: str | None, inside: bool) -> Mapping[str, Any]:
    """The tensors as FlowAD (`model` with `model.…`) or InvAD (`net.…`) saves them, as far as that is known.

    Args:
        tensors: under plain names.
        inner: path of the DiT in the weights that these are an average of.
        inside: whether they were an entry of the file.
    """
    path = _name_of(tensors)
    if path == "" and (inner or inside):  # the network alone
        path = inner or "model."
        tensors = {path + key: value for key, value in tensors.items()}
    if path is None:
        return {"model": tensors} if inside else tensors
    *outer, name = path.removesuffix(".").split(".")
    wrapped = "".join(part + "." for part in outer)
    tensors = {key.removeprefix(wrapped): value for key, value in tensors.items()}
    return {"model": tensors} if name == "model" else tensors


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
