"""A GigE Vision camera in software that shows pictures: Aravis' fake camera, whose test pattern is replaced.

    python -m flowad_fast.benchmarks.demo.cell_camera FOLDER

Control, packets, frame ids and time stamps are Aravis' own. Frames are grey or coloured (Mono8, RGB8), one file after
the other, for ever.
"""

import ctypes
import json
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

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
HOLD, GO, LOSE = "hold", "go", "lose"
"""Orders on standard input: the same picture from now on, the next ones again, lose so many packets in a thousand."""
_FILL = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32
)  # ArvFakeCameraFillPattern: buffer, data, exposure, gain, pixel format


def cell_camera(
    folder: Annotated[Path, typer.Argument(help="Pictures, shown in the order of their names.")],
    address: Annotated[str, typer.Option(help="Of the network interface.")] = "127.0.0.1",
    serial: Annotated[str, typer.Option(help="Serial number.")] = "CELLS01",
    log: Annotated[Path | None, typer.Option(help="A line of JSON per frame, as it is made, is added here.")] = None,
    obey: Annotated[
        bool, typer.Option("--obey", help="Take orders on standard input: hold, go, lose PERMILLE.")
    ] = False,
) -> None:
    """Be a GigE Vision camera that shows the pictures of a folder, until SIGTERM."""
    show = Show([])
    for path in find_images(folder):
        with Image.open(path) as picture:
            show.pictures.append((np.asarray(picture.convert("L")), np.asarray(picture.convert("RGB"))))
    if log is not None:
        show.log = log.open("a", encoding="utf-8", buffering=1)
    camera = start(show, address, serial)
    if obey:
        threading.Thread(target=_obey, args=(camera[0], show), daemon=True).start()
    print(READY, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del camera


@dataclass
class Show:
    """What the camera shows: pictures, grey (H, W) and coloured (H, W, 3), and which one comes next."""

    pictures: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]
    next: int = 0
    held: bool = False
    log: IO[str] | None = None
    """Gets frame id, the camera's stamp, picture, whether it was held, and the time (monotonic) of every frame."""


def start(show: Show, address: str, serial: str) -> tuple[Any, ...]:
    """A running camera, as long as what is returned is held; it comes first.

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
    for name in ("arv_buffer_get_frame_id", "arv_buffer_get_timestamp"):
        getattr(native, name).argtypes = (ctypes.c_void_p,)
        getattr(native, name).restype = ctypes.c_uint64
    native.arv_fake_camera_set_fill_pattern.argtypes = (ctypes.c_void_p, _FILL, ctypes.c_void_p)
    native.arv_fake_camera_set_fill_pattern.restype = None

    @_FILL
    def fill(buffer: int, data: object, exposure: int, gain: int, pixels: int) -> None:
        if pixels not in (code("Mono8"), code("RGB8")):
            return  # stays black
        width = native.arv_buffer_get_image_width(buffer)
        height = native.arv_buffer_get_image_height(buffer)
        held, shown = show.held, (show.next - show.held) % len(show.pictures)
        picture = show.pictures[shown][pixels == code("RGB8")][:height, :width]
        frame = np.zeros((height, width, *picture.shape[2:]), np.uint8)
        frame[: picture.shape[0], : picture.shape[1]] = picture
        target = native.arv_buffer_get_data(buffer, ctypes.byref(ctypes.c_size_t()))
        ctypes.memmove(target, frame.ctypes.data, frame.nbytes)
        show.next += not held
        if show.log is not None:
            number, stamp = native.arv_buffer_get_frame_id(buffer), native.arv_buffer_get_timestamp(buffer)
            made = {"frame": number, "stamp": stamp, "picture": shown, "held": held, "at": time.monotonic()}
            show.log.write(json.dumps(made) + "\n")

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


def _obey(camera: Any, show: Show) -> None:
    for line in sys.stdin:
        order, *values = line.split()
        if order == LOSE:
            camera.set_property("gvsp-lost-ratio", float(values[0]) / 1000)
        else:
            show.held = order == HOLD


def main() -> None:
    """`python -m flowad_fast.benchmarks.demo.cell_camera`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # before Aravis starts its thread
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(cell_camera)
    common.run(app)


if __name__ == "__main__":
    main()
