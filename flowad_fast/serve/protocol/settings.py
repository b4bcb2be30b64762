"""Where a server answers, to whom, and how much it takes."""

from pydantic import Field, model_validator

from flowad_fast.config import Frozen, loopback
from flowad_fast.line.sinks import base
from flowad_fast.line.sinks.base import Secret


class RequestLimits(Frozen):
    """How large requests may be, so that no client can take the memory of the others."""

    bytes: int = Field(default=64 << 20, ge=1024, le=1 << 30)
    """Of one request, also after it was unpacked."""
    json_bytes: int = Field(default=8 << 20, ge=1024, le=1 << 28)
    """Of the JSON in it, and values that gRPC carries one by one; frames in binary have the limit of `bytes` alone."""
    header_bytes: int = Field(default=16 << 10, ge=1024, le=1 << 20)
    """Of the HTTP headers."""
    pixels: int = Field(default=16_000_000, ge=1)
    """Of one frame."""
    frames: int = Field(default=64, ge=1)
    """Of one request, also where the model takes more."""
    requests: int = Field(default=64, ge=1, le=100_000)
    """On their way at a time, with each of HTTP and gRPC; one more is told that the queue is full."""
    seconds: float = Field(default=30.0, gt=0, le=3600)
    """Until a request has arrived whole."""


class FrontSettings(Frozen):
    """Where clients ask, with the Open Inference Protocol."""

    host: str = Field(default="127.0.0.1", min_length=1)
    http_port: int | None = Field(default=8000, ge=0, le=65535)
    """0: any that is free; null: no HTTP."""
    grpc_port: int | None = Field(default=8001, ge=0, le=65535)
    """0: any that is free; null: no gRPC."""
    token: Secret | None = None
    """At least 16 characters, in a file or an environment variable; needed for everything but probes."""
    insecure: bool = False
    """Whether anyone on the network may ask, without any token."""
    deadline: float = Field(default=1.0, gt=0, le=3600)
    """Seconds until an answer must be there, where a request does not say."""
    largest_deadline: float = Field(default=60.0, gt=0, le=3600)
    """Seconds that a request may ask for."""
    drain: float = Field(default=10.0, gt=0, le=600)
    """Seconds from the wish to stop until answers on their way are given up."""
    limits: RequestLimits = RequestLimits()

    @model_validator(mode="after")
    def _safe(self) -> "FrontSettings":
        if not self.local and self.token is None and not self.insecure:
            raise ValueError(
                f"got the host {self.host!r}, which others can reach, without a token; "
                "add token: {file: …}, or write insecure: true"
            )
        if self.http_port is None and self.grpc_port is None:
            raise ValueError("got neither http_port nor grpc_port, expected at least one of them")
        if self.http_port and self.http_port == self.grpc_port:
            raise ValueError(f"got the port {self.http_port} for HTTP and gRPC, expected two ports")
        if self.deadline > self.largest_deadline:
            raise ValueError(f"got the deadline {self.deadline:g} s above largest_deadline {self.largest_deadline:g} s")
        return self

    @property
    def local(self) -> bool:
        """Whether only this computer can reach it."""
        return loopback(self.host)


def read_token(settings: FrontSettings) -> str | None:
    """The token; ConfigError where it is missing or too short to be guessed by nobody."""
    return base.read_token(settings.token, "front.token")
