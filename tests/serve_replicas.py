"""What tests of replicas have in common: bundles with verdicts that are known, load, and what must be true of it."""

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flowad_fast import bundle as bundles
from flowad_fast.benchmarks.runs.line_work import Work, prepare
from flowad_fast.files import sha256
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve.pool import Answered, Asked, NoResultError, Pool
from flowad_fast.stages.decision import Calibration, ClassCalibration, Verdict
from tests.models import exported


def needs_ray() -> None:
    """Skip without Ray; under CI fail."""
    try:
        import ray  # noqa: F401
    except ImportError:
        if os.environ.get("CI"):
            pytest.fail('without Ray: pip install "flowad-fast[ray]"')
        pytest.skip("needs Ray")


def works(folder: Path) -> tuple[Work, Path, Path]:
    """Pictures with a calibrated bundle; beside it `stricter`, which calls all of them anomalous, and `broken`."""
    work = prepare(folder, exported("onnx")[1].path, 0, lambda text: None)
    stricter, broken = (folder / "bundles" / name for name in ("stricter", "broken"))
    shutil.copytree(work.bundle, stricter)
    limits = Calibration(alpha=0.05, classes={"": ClassCalibration(threshold=min(work.scores) - 1.0, parts=24)})
    bundles.write_manifest(stricter, bundles.read(stricter)[1].model_copy(update={"calibration": limits}))
    shutil.copytree(work.bundle, broken)
    next(broken.rglob("*.onnx")).write_bytes(b"no graph")
    return work, stricter, broken


def version(bundle: Path) -> str:
    return sha256(bundle / bundles.MANIFEST)[:12]


@dataclass
class Load:
    """Requests of one frame, each with what became of it.

    Attributes:
        begun: numbers of requests that were asked.
        outcomes: of each by its number, one or (wrongly) several.
    """

    begun: list[int] = field(default_factory=list)
    outcomes: dict[int, list[Answered | NoResult]] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        return Counter(
            "answered" if isinstance(one, Answered) else one.value for many in self.outcomes.values() for one in many
        )

    def answers(self) -> list[tuple[int, Answered]]:
        return [(n, one) for n, many in self.outcomes.items() for one in many if isinstance(one, Answered)]

    async def run(
        self, pool: Pool, work: Work, until: Callable[[], bool], clients: int = 4, seconds: float = 10.0
    ) -> None:
        """Ask until `until` says so; what was begun then is finished."""

        async def client() -> None:
            while not until():
                number = len(self.begun)
                self.begun.append(number)
                frame = work.frames[number % len(work.frames)]
                asked = Asked("part", frame[None], None, (str(number),), seconds)
                begin = time.monotonic()
                try:
                    found: Answered | NoResult = await pool.ask(asked)
                except NoResultError as error:
                    found = error.result
                assert time.monotonic() - begin < seconds + 2, "an outcome must be there when the time is over"
                self.outcomes.setdefault(number, []).append(found)
                await asyncio.sleep(0.01)

        await asyncio.gather(*(client() for _ in range(clients)))

    def check(self, work: Work, all_anomalous: str = "") -> None:
        """One outcome per request; no verdict but the bare detector's, by the version that answered."""
        assert set(self.begun) == set(self.outcomes), "a request without an outcome"
        assert all(len(many) == 1 for many in self.outcomes.values()), "a request with two outcomes"
        for number, answer in self.answers():
            anomalous = work.anomalous[number % len(work.frames)] or answer.version == all_anomalous
            assert answer.version in (version(work.bundle), all_anomalous)
            assert answer.judgements[0].verdict is (Verdict.ANOMALOUS if anomalous else Verdict.GOOD)
