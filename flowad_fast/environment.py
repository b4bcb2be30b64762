"""What a service's surroundings lack, put right before any library looks: a user's name, a folder for caches, silence.

Containers run under user numbers that have no name, with homes that cannot be written; torch and matplotlib ask for
both when they are imported. `flowad_fast` calls `settle` when it is imported itself, so it comes before them all.
"""

import ctypes
import getpass
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

SILENT = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "NNCF_CI")
"""Variables that stop libraries from reporting on their use: ONNX Runtime, huggingface_hub, NNCF. "0" lets the first
two again, the third where the variable is deleted. For OpenVINO, which has none, see `without`."""
HOME_FOLDERS = {
    "MPLCONFIGDIR": ("~/.config/matplotlib", "matplotlib"),
    "TRITON_CACHE_DIR": ("~/.triton/cache", "triton"),
}
"""Folders of matplotlib and Triton in the user's home, and their names elsewhere, by the variable that moves them."""


def settle() -> None:
    """Set the variables that are missing here; what the user has set stays. See the module."""
    for name in SILENT:
        if not os.environ.get(name):
            os.environ[name] = "1"
    if not _has_name():
        os.environ["USER"] = f"uid{os.getuid()}"  # torch names its folder for temporary files after it
    for name, (folder, elsewhere) in HOME_FOLDERS.items():
        if name not in os.environ and not _can_make(os.path.expanduser(folder)):
            private = private_folder()
            if private is not None:
                os.environ[name] = os.path.join(private, elsewhere)


@contextmanager
def without(package: str) -> Iterator[None]:
    """Let imports inside find no `package`, unless it was imported before.

    OpenVINO reports its own import to Google Analytics through openvino_telemetry, from a process that it forks, and
    has no variable against it; without that package it reports nothing. Who wants it to imports it before.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def private_folder() -> str | None:
    """A folder for temporary files that nobody else can write, the same for all of this user's processes.

    None where nothing can be written at all.
    """
    try:
        path = os.path.join(tempfile.gettempdir(), f"flowad-fast-{os.getuid()}")
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                return tempfile.mkdtemp(prefix="flowad-fast-")  # another user was there before
        return path
    except OSError:
        return None


def has_gpu_driver() -> bool:
    """Whether the driver of a GPU that torch could use is installed; libraries that know more are slow to ask."""
    if os.path.exists("/dev/kfd"):  # AMD
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _has_name() -> bool:
    if not hasattr(os, "getuid"):  # Windows has it in the environment
        return True
    try:
        return bool(getpass.getuser())
    except (KeyError, OSError, ImportError):
        return False


def _can_make(folder: str) -> bool:
    """Whether `folder` is there or can be made, and can be written; a `~` that leads nowhere cannot."""
    if not os.path.isabs(folder):
        return False
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
