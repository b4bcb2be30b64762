"""A pool that answers what a test wants without any model, and a process with a server before it."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowad_fast.config import Classes
from flowad_fast.line.outcome import Judgement
from flowad_fast.serve.pool import Answered, Asked, ModelCard, UnknownModelError
from flowad_fast.stages.decision import Verdict

VERSION = "0123456789ab"
CARD = ModelCard("part", VERSION, "nothing", image_size=8, classes=Classes())


class FakePool:
    """Answers at once that all is good, or does what it is told; remembers what it was asked."""

    def __init__(self, card: ModelCard = CARD, do: Callable[[Asked], Any] | None = None) -> None:
        self.card, self.do = card, do
        self.asked: list[Asked] = []
        self.trouble = ""
        self._going = 0
        self.closed = False

    async def models(self) -> list[ModelCard]:
        return [self.card]

    async def ready(self, model: str) -> str:
        if model != self.card.name:
            raise UnknownModelError(f"no model {model!r}")
        return self.trouble

    async def ask(self, asked: Asked) -> Answered:
        self.asked.append(asked)
        self._going += 1
        try:
            found = None if self.do is None else await self.do(asked)
        finally:
            self._going -= 1
        return good(len(asked.frames)) if found is None else found

    async def close(self) -> None:
        self.closed = True
        while self._going:
            await asyncio.sleep(0.01)


def good(count: int) -> Answered:
    maps = np.zeros((count, 8, 8), np.float32)
    return Answered(maps, maps[:, 0, 0], (Judgement(Verdict.GOOD, 0.0),) * count, VERSION, "nothing", (None,) * count)


@dataclass
class Child:
    """A server in a process of its own, before a pool that takes `seconds` for each request."""

    process: "subprocess.Popen[str]"
    http: str
    grpc: str


@contextmanager
def child(seconds: float = 0.0, classes: tuple[str, ...] = (), **settings: Any) -> Iterator[Child]:
    """Started at free ports, killed in the end."""
    asked = json.dumps({"seconds": seconds, "classes": classes, "settings": settings})
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "tests.serve_fake", asked]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()  # HTTP at A and gRPC at B
        yield Child(process, words[2], words[6])
    finally:
        process.kill()
        process.wait(10)


def main() -> None:
    from flowad_fast.serve.protocol.front import serve
    from flowad_fast.serve.protocol.settings import FrontSettings

    told = json.loads(sys.argv[1])

    async def wait(asked: Asked) -> None:
        await asyncio.sleep(told["seconds"])

    names = tuple(told["classes"])
    card = ModelCard("part", VERSION, "nothing", 8, Classes(names, max(1, len(names)), bool(names)))
    settings = FrontSettings.model_validate({"http_port": 0, "grpc_port": 0} | told["settings"])
    serve(FakePool(card, wait), settings, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
