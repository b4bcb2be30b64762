"""Files and folders that are whole or absent: written aside, synced, renamed."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flowad_fast.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` once it is complete and on the disk; an unfinished one never does."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); free space or choose another folder") from None
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():  # a folder cannot be opened there; the file system's journal keeps its names
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` of everything in a folder, and of itself."""
    for path in folder.iterdir():
        sync_tree(path) if path.is_dir() else sync(path)
    sync(folder)


def exchange(new: Path, target: Path) -> None:
    """Put folder `new` in the place of `target` in one step; an old folder ends up under `new`'s name."""
    if not target.exists():
        new.rename(target)
        return
    swap = _renameat2()
    if swap is not None and swap(bytes(new), bytes(target)):
        return
    # Two renames: between them a reader finds nothing, but never half; `bundle.writing` ends what a crash began.
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


def _renameat2() -> Callable[[bytes, bytes], bool] | None:
    """Linux's atomic exchange of two paths, where the C library has it."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None

    def swap(a: bytes, b: bytes) -> bool:
        at_cwd, rename_exchange = -100, 2
        if function(at_cwd, a, at_cwd, b, rename_exchange) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS):  # a filesystem or kernel without it
            return False
        raise OSError(code, os.strerror(code), a.decode())

    return swap


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; ConfigError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error}); choose another folder") from None


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
