"""What the settings of all sinks share."""

import os
import ssl
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from flowad_fast.config import Frozen
from flowad_fast.errors import ConfigError
from flowad_fast.line.event import Sink
from flowad_fast.line.outcome import NoResult
from flowad_fast.stages.decision import Verdict


def code(result: Verdict | NoResult) -> int:
    """A result as a number for controllers: 1 good, 2 anomalous, 3 invalid, 4 no result."""
    return 4 if isinstance(result, NoResult) else list(Verdict).index(result) + 1


class SinkBase(Frozen, ABC):
    """Settings of one sink. Subclasses have a `kind`, which tells them apart in a file."""

    promises_delivery: ClassVar[bool]
    """Whether what this sink missed is to be kept on disk and given again. False where old news does harm or is of no
    use, as at a gate."""

    kind: str
    name: str = Field(default="", max_length=64)
    """In alarms and on the page; the kind where empty."""

    @property
    def label(self) -> str:
        """The name, or the kind of a sink without one."""
        return self.name or self.kind

    @abstractmethod
    def open(self) -> Sink:
        """The sink; it connects when it publishes. Raises MissingExtraError without its library."""

    @abstractmethod
    def check(self) -> str:
        """Connect, and say in one line what was found. Nothing moves a gate or looks like an outcome.

        Raises:
            FlowADError: what fails, and the remedy.
        """


class Secret(Frozen):
    """A password or key that is in no settings file: in an environment variable, or in a file of its own."""

    env: str | None = Field(default=None, min_length=1)
    file: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> "Secret":
        if (self.env is None) == (self.file is None):
            raise ValueError("got both or none of env and file, expected one of them")
        return self

    def read(self) -> str:
        """The secret. Raises ConfigError where there is none; the message does not contain it."""
        if self.env is not None:
            if not (value := os.environ.get(self.env)):
                raise ConfigError(f"the environment variable {self.env} is not set; set it to the password or key")
            return value
        assert self.file is not None
        try:
            value = self.file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no UTF-8 text"
            raise ConfigError(f"{self.file}: cannot be read ({reason}); it must hold the password or key") from None
        if not value:
            raise ConfigError(f"{self.file} is empty, expected the password or key")
        return value


SHORTEST = 16
"""Characters of a token."""


def read_token(secret: Secret | None, name: str) -> str | None:
    """The token in a secret, `name` of the settings; ConfigError where it is missing or short enough to be guessed."""
    if secret is None:
        return None
    token = secret.read()
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"{name} has {len(token)} characters, expected at least {SHORTEST}, printable ASCII; make one: "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token


class Tls(Frozen):
    """Encryption: the authority that signed the server's certificate, and this client's own certificate."""

    authority: Path | None = None
    """PEM file; None: the authorities that this computer trusts."""
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _pair(self) -> "Tls":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("got one of certificate and key, expected both or none")
        return self

    def context(self) -> ssl.SSLContext:
        """Settings of the connection; ConfigError where a file is missing or no PEM."""
        try:
            context = ssl.create_default_context(cafile=self.authority)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except OSError as error:
            files = ", ".join(str(one) for one in (self.authority, self.certificate, self.key) if one is not None)
            raise ConfigError(f"{files}: cannot be used ({error}); expected readable PEM files") from None
        return context
