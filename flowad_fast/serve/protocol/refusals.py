"""What a client is told when it gets no answer: a status of HTTP, one of gRPC, and one line."""

import hmac
import logging
from dataclasses import dataclass

from flowad_fast.errors import ConfigError, FlowADError, FrameError
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve.pool import NoResultError, UnknownModelError

_log = logging.getLogger(__name__)
LONGEST = 600
"""Characters of a message: what a client sent may be in it."""


@dataclass(frozen=True)
class Status:
    """The same refusal for both kinds of clients."""

    http: int
    grpc: str


BAD = Status(400, "INVALID_ARGUMENT")
UNAUTHORISED = Status(401, "UNAUTHENTICATED")
UNKNOWN = Status(404, "NOT_FOUND")
SLOW = Status(408, "DEADLINE_EXCEEDED")
LARGE = Status(413, "RESOURCE_EXHAUSTED")
LONG = Status(431, "RESOURCE_EXHAUSTED")
FAILED = Status(500, "INTERNAL")
NO_RESULT = {
    NoResult.LATE: Status(504, "DEADLINE_EXCEEDED"),
    NoResult.QUEUE_FULL: Status(503, "RESOURCE_EXHAUSTED"),
    NoResult.ENGINE_FAILED: Status(503, "UNAVAILABLE"),
    NoResult.SOURCE_LOST: Status(503, "UNAVAILABLE"),
    NoResult.SHUTTING_DOWN: Status(503, "UNAVAILABLE"),
}
"""Of requests that have no result."""


class RefusedError(FlowADError, ValueError):
    """A request that is not answered; `status` says how it is told."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def bad(message: str) -> RefusedError:
    """A request that is not what the protocol or the model expects."""
    return RefusedError(BAD, message)


def too_large(message: str) -> RefusedError:
    """A request beyond a limit."""
    return RefusedError(LARGE, message)


def told(error: Exception) -> tuple[Status, str]:
    """Status and message of an exception; one that nobody expected is logged, and the client sees nothing of it."""
    if isinstance(error, RefusedError):
        status = error.status
    elif isinstance(error, NoResultError):
        status = NO_RESULT[error.result]
    elif isinstance(error, UnknownModelError):
        status = UNKNOWN
    elif isinstance(error, (FrameError, ConfigError)):
        status = BAD
    else:
        _log.error("a request failed in a way that nobody expected", exc_info=error)
        return FAILED, "no result: the server failed; its log says how"
    return status, one_line(str(error))


def one_line(text: str) -> str:
    """A message without line breaks and control characters, of bounded length."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(text[: 4 * LONGEST].split()))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def authorised(given: str | None, token: str | None) -> bool:
    """Whether an `Authorization` header has the token, if there is one; compared in constant time."""
    if token is None:
        return True
    kind, _, value = (given or "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(value.strip().encode(), token.encode())
