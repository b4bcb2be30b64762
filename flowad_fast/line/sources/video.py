"""Frames of a video file or an RTSP camera, through PyAV (which brings ffmpeg)."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from flowad_fast.errors import ConfigError, require
from flowad_fast.line.sources.base import EndOfSource, Shot, SourceBase

if TYPE_CHECKING:
    from av.container import InputContainer


class VideoSettings(SourceBase):
    """A file, which ends, or a stream such as rtsp://…, which is connected again where it breaks."""

    kind: Literal["video"]
    url: str = Field(min_length=1)
    """Path of a file, or address of a stream. A password in it is shown in no message."""
    every: int = Field(default=1, ge=1)
    """One part in so many frames."""
    live: bool | None = None
    """Whether its end is a lost connection; null: for addresses with ://."""
    real_time: bool = True
    """Show a file at its own pace; streams have theirs."""
    timeout: float = Field(default=5.0, gt=0, le=600)
    """Seconds without a frame after which the connection is lost."""

    @property
    def is_live(self) -> bool:
        """Whether its end is a lost connection."""
        return "://" in self.url if self.live is None else self.live

    @property
    def shown(self) -> str:
        """The address without user and password."""
        scheme, mark, rest = self.url.partition("://")
        return scheme + mark + rest.rpartition("@")[2] if mark else self.url

    def open(self, state: Path) -> "Video":
        """The source; it remembers nothing over restarts."""
        require("line", "av", by="a video source")
        return Video(self)

    def check(self) -> str:
        """That a first frame comes."""
        video = self.open(Path())
        try:
            shot = video.read(self.timeout)
        except EndOfSource:
            raise ConfigError(f"{self.shown}: no frame in it; name another file") from None
        except OSError as error:
            raise ConfigError(f"{self.shown}: cannot be read ({error}); check the address and the camera") from None
        finally:
            video.close()
        assert shot is not None and shot.frame is not None
        return f"{self.shown} shows {shot.frame.shape[0]}x{shot.frame.shape[1]} pixels"


class Video:
    """Raises OSError when the connection is lost, and connects again when it is read again."""

    def __init__(self, settings: VideoSettings) -> None:
        """Nothing is opened yet."""
        self._settings = settings
        self._container: InputContainer | None = None
        self._frames: Iterator[Shot] = iter(())

    def read(self, wait: float) -> Shot | None:
        """The next frame; blocks up to the settings' timeout, whatever `wait` says, for ffmpeg cannot wait in bits."""
        if self._container is None:
            self._connect()
        try:
            shot = next(self._frames, None)
        except Exception as error:  # libav's own errors, some of which are no OSError
            self.close()
            raise OSError(f"{self._settings.shown}: {type(error).__name__}: {_public(error, self._settings)}") from None
        if shot is None:
            self.close()
            if self._settings.is_live:
                raise OSError(f"{self._settings.shown}: the stream has ended")
            raise EndOfSource
        return shot

    def close(self) -> None:
        """Close the connection."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def _connect(self) -> None:
        import av

        settings = self._settings
        options = {"rtsp_transport": "tcp"} if settings.url.startswith("rtsp") else {}
        try:
            self._container = av.open(settings.url, options=options, timeout=settings.timeout)
        except Exception as error:
            raise OSError(f"{settings.shown}: {type(error).__name__}: {_public(error, settings)}") from None
        if not self._container.streams.video:
            self.close()
            raise OSError(f"{settings.shown}: no video in it")
        self._frames = self._decoded(self._container)

    def _decoded(self, container: "InputContainer") -> Iterator[Shot]:
        settings, start, first = self._settings, time.monotonic(), None
        for number, frame in enumerate(container.decode(video=0)):
            if number % settings.every:
                continue
            if not settings.is_live and settings.real_time and frame.time is not None:
                first = frame.time if first is None else first
                time.sleep(max(0.0, start + frame.time - first - time.monotonic()))
            yield Shot(np.ascontiguousarray(frame.to_ndarray(format="rgb24")))


def _public(error: Exception, settings: VideoSettings) -> str:
    return str(error).replace(settings.url, settings.shown)
