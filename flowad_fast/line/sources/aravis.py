"""One connection to a GigE Vision camera, through Aravis (LGPL-2.1+), which is reached over GObject introspection."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from flowad_fast.errors import ConfigError, MissingExtraError

DEBIAN = Path("/usr/lib/python3/dist-packages")
"""Where Debian's package python3-gi lies, which a virtual environment does not see."""
_COUNTERS = {
    "frames": "n_completed_buffers",
    "incomplete": "n_failures",
    "no_buffer_free": "n_underruns",
    "missing_packets": "n_missing_packets",
    "resend_requests": "n_resend_requests",
    "resent_packets": "n_resent_packets",
}


@dataclass(frozen=True)
class Options:
    """What is asked of a camera; None leaves what it is set to."""

    camera: str
    pixel_format: str | None = None
    trigger: str | None = None
    """Line or "Software"; None: free-running."""
    frame_rate: float | None = None
    exposure: float | None = None
    """Microseconds."""
    gain: float | None = None
    region: tuple[int, int, int, int] | None = None
    """x, y, width, height."""
    packet_size: int | None = None
    packet_delay: int | None = None
    """Nanoseconds."""
    buffers: int = 8


@dataclass(frozen=True)
class Grab:
    """One buffer that came from a camera.

    Attributes:
        frame: its id.
        status: "success", or what is wrong with it.
        stamp: the camera's own time, nanoseconds.
        code: of its pixel format, see `pixels`.
        height, width: pixels.
        data: the pixels; empty where the status is not "success".
    """

    frame: int
    status: str
    stamp: int
    code: int
    height: int
    width: int
    data: bytes


def library() -> Any:
    """The module Aravis, imported when it is first needed.

    PyGObject is taken from this environment, or from Debian's python3-gi where that was built for this Python; only
    `gi` is taken from there, nothing else of Debian's packages becomes visible.

    Raises:
        MissingExtraError: it is not there, and what to install.
    """
    remedy = "apt-get install gir1.2-aravis-0.8 python3-gi"
    try:
        import gi
    except ModuleNotFoundError:
        _debian(remedy)
        import gi
    try:
        gi.require_version("Aravis", "0.8")
    except ValueError:
        raise MissingExtraError(f"a gige source needs Aravis 0.8: {remedy}") from None
    from gi.repository import Aravis

    return Aravis


def _debian(remedy: str) -> None:
    """Import `gi`, and nothing else, from Debian's folder."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pip = 'apt-get install libgirepository1.0-dev libcairo2-dev pkg-config gcc && pip install "pygobject<3.51"'
    if not any((DEBIAN / "gi" / f"_gi{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        found = "is there for another Python" if (DEBIAN / "gi").is_dir() else "is missing"
        raise MissingExtraError(
            f"a gige source needs Aravis and PyGObject, which {found} (this is Python {python}): {remedy}; "
            f"for a Python that is not Debian's own: {pip}"
        )
    spec = PathFinder.find_spec("gi", [str(DEBIAN)])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["gi"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["gi"]
        raise


class Connection:
    """A camera that is acquiring. Used by one thread; `lost` is set by Aravis' own.

    Attributes:
        lost: whether the camera no longer answers.
        format: name of its pixel format.
        text: model, serial number and format in words.
    """

    def __init__(self, options: Options) -> None:
        """Connect, set what was asked for, and start.

        Raises:
            OSError: it does not answer, or another program controls it.
            ConfigError: it cannot be set to what was asked for.
        """
        self._aravis = library()
        from gi.repository import GLib

        self._error: type[Exception] = GLib.Error
        self.lost = False
        self._stream: Any = None
        try:
            self._camera = self._aravis.Camera.new(options.camera)
        except GLib.Error as error:
            raise OSError(
                f"{options.camera}: {error.message}; check cable, power and address, and that no firewall stops UDP"
            ) from None
        self._camera.get_device().connect("control-lost", self._gone)
        try:
            for what, call in self._settings(options):
                self._set(what, call)
            self.format = str(self._camera.get_pixel_format_as_string())
            self._start(options.buffers)
            height, width = self._camera.get_region().height, self._camera.get_region().width
            self.text = (
                f"{self._camera.get_vendor_name()} {self._camera.get_model_name()}, "
                f"serial {self._camera.get_device_serial_number()}, {self.format}, {height}x{width} pixels"
            )
        except GLib.Error as error:
            self.close()
            raise OSError(f"{options.camera}: {error.message}; does another program control it?") from None
        except BaseException:
            self.close()
            raise

    def grab(self, wait: float) -> Grab | None:
        """The next buffer; None where there is none within `wait` seconds."""
        buffer = self._stream.timeout_pop_buffer(round(wait * 1e6))
        if buffer is None:
            return None
        try:
            status = str(buffer.get_status().value_nick)
            whole = status == "success"
            return Grab(
                frame=buffer.get_frame_id(),
                status=status,
                stamp=buffer.get_timestamp(),
                code=buffer.get_image_pixel_format() if whole else 0,
                height=buffer.get_image_height() if whole else 0,
                width=buffer.get_image_width() if whole else 0,
                data=buffer.get_image_data() if whole else b"",  # a copy: the buffer goes back
            )
        finally:
            self._stream.push_buffer(buffer)

    def trigger(self) -> None:
        """Trigger one frame by software; OSError where the camera does not answer."""
        try:
            self._camera.software_trigger()
        except self._error as error:
            raise OSError(f"software trigger: {error}") from None

    def counters(self) -> Mapping[str, int]:
        """What the connection has counted since it was made."""
        return {name: self._stream.get_info_uint64_by_name(key) for name, key in _COUNTERS.items()}

    def close(self) -> None:
        """Stop and let go; a camera that no longer answers is not asked."""
        if self._stream is not None and not self.lost:
            try:
                self._camera.stop_acquisition()
            except self._error:
                pass  # gone since then
        self._stream = self._camera = None  # Aravis gives up control when nobody holds the camera

    def _gone(self, device: object) -> None:
        self.lost = True

    def _start(self, buffers: int) -> None:
        self._stream = self._camera.create_stream(None, None)
        payload = self._camera.get_payload()
        for _ in range(buffers):
            self._stream.push_buffer(self._aravis.Buffer.new_allocate(payload))
        self._camera.start_acquisition()

    def _settings(self, options: Options) -> "list[tuple[str, Any]]":
        """What is set, in an order in which it can be: the format before the region, the region before the rate."""
        camera, wanted = self._camera, options
        calls: list[tuple[str, Any]] = []
        if wanted.pixel_format is not None:
            calls.append((wanted.pixel_format, lambda: camera.set_pixel_format_from_string(wanted.pixel_format)))
        if wanted.region is not None:
            calls.append((f"region {wanted.region}", lambda: self._set_region(*wanted.region)))
        calls.append(("continuous mode", lambda: camera.set_acquisition_mode(self._aravis.AcquisitionMode.CONTINUOUS)))
        calls.append(("no trigger", camera.clear_triggers))
        if wanted.frame_rate is not None and wanted.trigger is None:
            calls.append((f"frame_rate {wanted.frame_rate:g}", lambda: camera.set_frame_rate(wanted.frame_rate)))
        if wanted.trigger is not None:
            calls.append((f"trigger {wanted.trigger}", lambda: camera.set_trigger(wanted.trigger)))
        if wanted.exposure is not None:
            if camera.is_exposure_auto_available():
                calls.append(("no automatic exposure", lambda: camera.set_exposure_time_auto(self._aravis.Auto.OFF)))
            calls.append((f"exposure {wanted.exposure:g}", lambda: camera.set_exposure_time(wanted.exposure)))
        if wanted.gain is not None:
            if camera.is_gain_auto_available():
                calls.append(("no automatic gain", lambda: camera.set_gain_auto(self._aravis.Auto.OFF)))
            calls.append((f"gain {wanted.gain:g}", lambda: camera.set_gain(wanted.gain)))
        if wanted.packet_size is not None:
            calls.append((f"packet_size {wanted.packet_size}", lambda: camera.gv_set_packet_size(wanted.packet_size)))
        if wanted.packet_delay is not None:
            calls.append(
                (f"packet_delay {wanted.packet_delay}", lambda: camera.gv_set_packet_delay(wanted.packet_delay))
            )
        return calls

    def _set_region(self, x: int, y: int, width: int, height: int) -> None:
        """Cameras round or cut a region that they cannot have, without a word."""
        self._camera.set_region(x, y, width, height)
        got, most = self._camera.get_region(), self._camera.get_sensor_size()
        fits = x + width <= most.width and y + height <= most.height
        if not fits or (got.x, got.y, got.width, got.height) != (x, y, width, height):
            raise ConfigError(
                f"got the region ({x}, {y}, {width}, {height}), the camera makes it ({got.x}, {got.y}, {got.width}, "
                f"{got.height}) of {most.width}x{most.height}; state one that it has (x, y, width, height)"
            )

    def _set(self, what: str, call: Any) -> None:
        try:
            call()
        except self._error as error:
            if self.lost or "timeout" in str(error):
                raise
            formats = ", ".join(self._camera.dup_available_pixel_formats_as_strings())
            raise ConfigError(
                f"the camera refuses {what} ({getattr(error, 'message', error)}); its pixel formats: {formats}"
            ) from None
