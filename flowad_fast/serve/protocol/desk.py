"""What HTTP and gRPC have in common: which models there are, how much is taken at a time, asking a pool."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from flowad_fast.errors import nearest
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve.pool import Answered, Asked, ModelCard, NoResultError, Pool, UnknownModelError
from flowad_fast.serve.protocol import asking
from flowad_fast.serve.protocol.asking import Output, Query
from flowad_fast.serve.protocol.settings import FrontSettings

_log = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Said:
    """What a pool said, and the outputs of it that the request wants, until `end` on the monotonic clock."""

    query: Query
    answered: Answered
    outputs: list[Output]
    end: float

    def check(self) -> None:
        """NoResultError where it is too late to tell."""
        if time.monotonic() > self.end:
            raise NoResultError(NoResult.LATE, "writing the answer took too long")


CURRENT = ("", "1")
"""Versions that mean the bundle that answers now; a bundle's Triton repository calls its only one 1."""
READERS = 2
"""Threads that read and write messages, so that few large JSON texts are in memory at a time."""


class Desk:
    """From one event loop."""

    def __init__(self, pool: Pool, settings: FrontSettings) -> None:
        """Stand before `pool`; nothing is started."""
        self.pool, self.settings = pool, settings
        self.closing = False
        self._going = 0
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="protocol")

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """One request more on its way; NoResultError where they are too many, or the server ends."""
        if self.closing:
            raise NoResultError(NoResult.SHUTTING_DOWN)
        if self._going >= self.settings.limits.requests:
            raise NoResultError(NoResult.QUEUE_FULL, f"{self._going} requests are on their way")
        self._going += 1
        try:
            yield
        finally:
            self._going -= 1

    async def card(self, model: str, version: str = "") -> ModelCard:
        """What is known of a model; UnknownModelError where there is none, or not this version of it."""
        cards = {one.name: one for one in await self.pool.models()}
        if model not in cards:
            raise UnknownModelError(
                f"no model {model[:64]!r}; {nearest(model[:64], cards) if cards else 'there is none'}"
            )
        card = cards[model]
        if version not in (*CURRENT, card.version):
            raise UnknownModelError(f"no version {version[:64]!r} of {model}; {card.version} answers now")
        return card

    async def answer(
        self, model: str, version: str, arrived: float, read: Callable[[], Query], left: float | None = None
    ) -> Said:
        """What is said to a request; see `asking.asked` for the arguments.

        Raises:
            RefusedError, NoResultError, UnknownModelError, FrameError, ConfigError: see there and `Pool.ask`.
        """
        card = await self.card(model, version)

        def prepare() -> tuple[Query, Asked]:
            query = read()
            return query, asking.asked(query, card, self.settings, arrived, left)

        query, asked = await self.apart(prepare)
        end = time.monotonic() + asked.seconds
        try:
            answered = await self.pool.ask(replace(asked, version="" if version in CURRENT else version))
        except NoResultError as error:
            _log.info("%s, parts %s: %s", card.name, ", ".join(asked.parts), error)
            raise
        return Said(query, answered, asking.answer(query, answered), end)

    async def apart(self, work: Callable[[], Found]) -> Found:
        """Do what takes a while in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def trouble(self) -> str:
        """Empty when every model is ready, otherwise what is not."""
        if self.closing:
            return "the server is shutting down"
        cards = await self.pool.models()
        if not cards:
            return "there is no model"
        for card in cards:
            if why := await self.pool.ready(card.name):
                return f"{card.name}: {why}"
        return ""

    async def model_trouble(self, model: str, version: str = "") -> str:
        """The same of one model; UnknownModelError where there is none."""
        await self.card(model, version)
        return "the server is shutting down" if self.closing else await self.pool.ready(model)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
