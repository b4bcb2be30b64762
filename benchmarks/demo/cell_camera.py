"""A GigE Vision camera in software that shows pictures: Aravis' fake camera, whose test pattern is replaced.

    python -m flowad_fast.benchmarks.demo.cell_camera FOLDER

Control, packets, frame ids and time stamps are Aravis' own. Frames are grey (Mono8), one file after the other, for
ever.
"""

import ctypes
import signal
import socket
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from flowad_fast.cli import common
from flowad_fast.data.images import find_images
from flowad_fast.errors import ConfigError
from flowad_fast.line.sources.aravis import library
from flowad_fast.line.sources.pixels import code

CONTROL_PORT = 3956
"""Of the protocol, UDP."""
READY = "ready"
"""What it prints when it can be connected."""
_FILL = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32
)  # ArvFakeCameraFillPattern: buffer, data, exposure, gain, pixel format


def cell_camera(
    folder: Annotated[Path, typer.Argument(help="Pictures, shown in the order of their names.")],
    address: Annotated[str, typer.Option(help="Of the network interface.")] = "127.0.0.1",
    serial: Annotated[str, typer.Option(help="Serial number.")] = "CELLS01",
) -> None:
    """Be a GigE Vision camera that shows the pictures of a folder, until SIGTERM."""
    pictures = []
    for path in find_images(folder):
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("L")))
    camera = start(pictures, address, serial)
    print(READY, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del camera


def start(pictures: list[NDArray[np.uint8]], address: str, serial: str) -> tuple[Any, ...]:
    """A running camera, as long as what is returned is held.

    A region that differs from a picture's size shows as much of it as there is room for, the rest black.

    Raises:
        MissingExtraError: Aravis is missing.
        ConfigError: the address has no room for a camera: another one runs there.
    """
    aravis = library()
    native = ctypes.CDLL("libaravis-0.8.so.0")  # introspection cannot set the pattern: its binding calls nothing
    native.arv_buffer_get_data.restype = ctypes.c_void_p
    native.arv_buffer_get_data.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t))
    for name in ("arv_buffer_get_image_width", "arv_buffer_get_image_height"):
        getattr(native, name).argtypes = (ctypes.c_void_p,)
    native.arv_fake_camera_set_fill_pattern.argtypes = (ctypes.c_void_p, _FILL, ctypes.c_void_p)
    native.arv_fake_camera_set_fill_pattern.restype = None
    shown = 0

    @_FILL
    def fill(buffer: int, data: object, exposure: int, gain: int, pixels: int) -> None:
        nonlocal shown
        if pixels != code("Mono8"):
            return  # stays black
        width = native.arv_buffer_get_image_width(buffer)
        height = native.arv_buffer_get_image_height(buffer)
        picture = pictures[shown % len(pictures)][:height, :width]
        frame = np.zeros((height, width), np.uint8)
        frame[: picture.shape[0], : picture.shape[1]] = picture
        target = native.arv_buffer_get_data(buffer, ctypes.byref(ctypes.c_size_t()))
        ctypes.memmove(target, frame.ctypes.data, frame.nbytes)
        shown += 1

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # Aravis would share the port without a word
        try:
            control.bind((address, CONTROL_PORT))
        except OSError as error:
            raise ConfigError(
                f"{address}: no camera can start there ({error.strerror}); expected an address of this computer that "
                "no other camera has"
            ) from None
    camera = aravis.GvFakeCamera.new(address, serial)
    if not camera.is_running():
        raise ConfigError(f"{address}: the camera did not start")
    native.arv_fake_camera_set_fill_pattern(hash(camera.get_fake_camera()), fill, None)  # the hash is its pointer
    return camera, fill, native


def main() -> None:
    """`python -m flowad_fast.benchmarks.demo.cell_camera`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # before Aravis starts its thread
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(cell_camera)
    common.run(app)


if __name__ == "__main__":
    main()
