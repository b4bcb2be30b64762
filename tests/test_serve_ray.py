"""Replicas: what one does with late, mixed and poisoned requests; what a pool makes of those that die."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flowad_fast.benchmarks.runs.line_work import Work
from flowad_fast.detector import load
from flowad_fast.errors import BundleError, ConfigError, EngineUnavailableError, FrameError
from flowad_fast.line.outcome import NoResult
from flowad_fast.serve.cluster import Application
from flowad_fast.serve.judging import card_of, checked
from flowad_fast.serve.pool import Answered, Asked, NoResultError, UnknownModelError
from flowad_fast.serve.pool_ray import TRIES, RayPool
from flowad_fast.serve.replica import Refused, Replica, Request, Start
from flowad_fast.serve.settings import ModelSettings, ServeLimits, ServeSettings, from_bundles
from flowad_fast.stages.decision import Verdict
from tests.serve_hanging import POISON, hanging
from tests.serve_replicas import needs_ray, version, works


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, Path, Path]:
    return works(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def work(made: tuple[Work, Path, Path]) -> Work:
    return made[0]


def start_of(work: Work, **more: Any) -> Start:
    return Start("part", str(work.bundle), version(work.bundle), device="cpu", threads=1, **more)


def asked(work: Work, i: int = 0, seconds: float = 10.0, **more: Any) -> Asked:
    return Asked("part", work.frames[i : i + 1], None, (str(i),), seconds, **more)


# Settings.


def test_models_are_named_as_their_folders(work: Work, tmp_path: Path) -> None:
    assert from_bundles([work.bundle]) == {"running": ModelSettings(bundle=work.bundle)}
    with pytest.raises(ConfigError, match="two bundles are named 'running'"):
        from_bundles([work.bundle, work.bundle])
    with pytest.raises(BundleError, match="no bundle"):
        from_bundles([tmp_path])
    for name in ("", "a.b", "a/b", "ü", "a" * 65):
        with pytest.raises(ValueError, match="model name"):
            ServeSettings(models={name: ModelSettings(bundle=work.bundle)})


def test_replicas_are_a_number_or_a_range(work: Work) -> None:
    assert ModelSettings(bundle=work.bundle, replicas={"min": 1, "max": 3}).replicas.max == 3  # type: ignore[union-attr]
    for wrong in (0, -1, {"min": 3, "max": 2}, {"max": 0}):
        with pytest.raises(ValueError):
            ModelSettings(bundle=work.bundle, replicas=wrong)


# One replica, without a cluster.


@pytest.fixture
def replica(work: Work) -> Iterator[Callable[..., Replica]]:
    needs_ray()
    made: list[Replica] = []

    def make(**more: Any) -> Replica:
        made.append(Replica(start_of(work, **more), leave=lambda code: None))
        return made[-1]

    yield make
    for one in made:
        one._scoring.close()


def together(replica: Replica, frames: list[np.ndarray], seconds: list[float]) -> list[Any]:
    now = time.monotonic()
    waiting = [(Request(frame, None, left), now + left) for frame, left in zip(frames, seconds, strict=True)]
    return asyncio.run(replica._together(waiting))


def test_requests_that_are_judged_together_get_their_own_answers(work: Work, replica: Callable[..., Replica]) -> None:
    frames = [work.frames[:2], work.frames[2:3], work.frames[3:4]]
    detector = load(work.bundle, device="cpu", threads=1)
    found = together(replica(), frames, [10.0, 20.0, 30.0])
    begin = 0
    for frame, answer in zip(frames, found, strict=True):
        assert isinstance(answer, Answered) and answer.version == version(work.bundle)
        whole = detector(work.frames[:4])
        part = slice(begin, begin + len(frame))
        assert (answer.maps == whole.map[part]).all() and (answer.raw_score == whole.raw_score[part]).all()
        assert tuple(one.verdict for one in answer.judgements) == whole.verdict[part]
        begin += len(frame)


def test_what_is_late_is_not_judged_and_the_others_are(work: Work, replica: Callable[..., Replica]) -> None:
    late, good = together(replica(), [work.frames[:1], work.frames[1:2]], [-0.01, 10.0])
    assert late == Refused(NoResult.LATE, "its time was over before it was judged")
    assert isinstance(good, Answered)


def test_a_replica_waits_for_nobody_beyond_the_tightest_deadline(work: Work, replica: Callable[..., Replica]) -> None:
    one = replica()
    one._pace.learn(1, 0.1)
    one._pace.learn(2, 0.5)
    now = time.monotonic()
    waiting = [(Request(work.frames[i : i + 1], None, left), now + left) for i, left in enumerate((0.3, 9.0, 9.0))]
    assert one._fit(waiting, [0, 1, 2], now) == [0], "two would make the first late"
    assert one._fit(waiting, [1, 2], now) == [1, 2]


def test_what_waits_for_a_busy_detector_is_judged_together(
    work: Work, replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    config = SimpleNamespace(max_ongoing_requests=100)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(_deployment_config=config))
    one = replica(wait=0.01)
    calls: list[int] = []

    def slow(frames: np.ndarray, classes: object, limit: float) -> Any:
        calls.append(len(frames))
        time.sleep(0.2)
        return scoring(frames, None, limit)

    scoring = one._scoring
    one._scoring = Slow(scoring, slow)  # type: ignore[assignment]

    async def ask() -> list[Any]:
        first = asyncio.create_task(one.ask(Request(work.frames[:1], None, 10.0)))
        await asyncio.sleep(0.1)
        others = [one.ask(Request(work.frames[i : i + 1], None, 10.0)) for i in range(1, 9)]
        late = one.ask(Request(work.frames[9:10], None, 0.05))
        return await asyncio.gather(first, late, *others)

    first, late, *others = asyncio.run(ask())
    assert calls == [1, 4, 4]
    assert late == Refused(NoResult.LATE, "the detector was busy")
    for i, answer in enumerate([first, *others]):
        assert answer.judgements[0].verdict is (Verdict.ANOMALOUS if work.anomalous[i] else Verdict.GOOD)


class Slow:
    """A scoring whose calls are a test's."""

    def __init__(self, scoring: Any, call: Callable[..., Any]) -> None:
        self._call, self.close = call, scoring.close
        self.bundle, self.classes, self.calibration = scoring.bundle, scoring.classes, scoring.calibration

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


def test_a_detector_that_hangs_ends_its_replica(work: Work, replica: Callable[..., Replica]) -> None:
    one = replica(make=hanging, call=0.5)
    poison = np.full_like(work.frames[:1], POISON)
    (found,) = together(one, [poison], [10.0])
    assert found.result is NoResult.ENGINE_FAILED and not found.again, "another replica would hang as well"
    (next_,) = together(one, [work.frames[:1]], [10.0])
    assert next_.result is NoResult.ENGINE_FAILED and next_.again
    with pytest.raises(EngineUnavailableError, match="did not answer within 0.5 s"):
        asyncio.run(one.check_health())


def test_a_replica_of_another_bundle_than_was_meant_does_not_start(work: Work) -> None:
    needs_ray()
    with pytest.raises(BundleError, match="expected 0123456789ab"):
        Replica(replace(start_of(work), version="0123456789ab"))


def test_a_canary_that_changes_fails_the_replica(work: Work, replica: Callable[..., Replica]) -> None:
    one = replica(canary=0.0001)
    asyncio.run(one.check_health())
    one._canary._scores = {key: [1e6] for key in one._canary._scores}
    with pytest.raises(EngineUnavailableError, match="does not compute what it did"):
        asyncio.run(one.check_health())


# The pool, with replicas that do what a test says.


class Response:
    def __init__(self, reply: Any) -> None:
        self._reply, self.cancelled = reply, False

    def __await__(self) -> Any:
        return self._get().__await__()

    def cancel(self) -> None:
        self.cancelled = True

    async def _get(self) -> Any:
        if callable(self._reply):
            return await self._reply()
        if isinstance(self._reply, BaseException):
            raise self._reply
        return self._reply


class Handle:
    """Replies in turn; the last one again and again."""

    def __init__(self, *replies: Any) -> None:
        self._replies, self.responses = list(replies), list[Response]()
        self.ask = SimpleNamespace(remote=self._remote)

    def _remote(self, request: Request) -> Response:
        self.responses.append(Response(self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]))
        return self.responses[-1]


def fake(work: Work, *replies: Any, **limits: float) -> tuple[RayPool, Handle]:
    from flowad_fast.bundle import read

    handle, manifest = Handle(*replies), read(work.bundle)[1]
    card = card_of("part", version(work.bundle), manifest, "fake", 4)
    app = Application("app", ModelSettings(bundle=work.bundle), manifest, card, handle)
    return RayPool("flowad", {"part": app}, ServeLimits(**limits)), handle


def answer(work: Work) -> Answered:
    return Answered(np.zeros((1, 64, 64), np.float32), np.zeros(1, np.float32), (), version(work.bundle), "fake")


def test_a_request_whose_replica_dies_is_given_to_another(work: Work) -> None:
    needs_ray()
    from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError

    gone = [ActorDiedError(), ActorUnavailableError("gone", None), ObjectLostError("00", None, "")]
    pool, handle = fake(work, *gone, answer(work))
    assert asyncio.run(pool.ask(asked(work))).engine == "fake"
    assert len(handle.responses) == 4
    (row,) = pool._routes.values()
    assert row.outcomes == {"answered": 1} and row.retries == 3 and row.going == 0


def test_no_more_than_so_many_replicas_are_asked(work: Work) -> None:
    needs_ray()
    from ray.exceptions import ActorDiedError

    pool, handle = fake(work, ActorDiedError())
    with pytest.raises(NoResultError, match="its replica is gone") as error:
        asyncio.run(pool.ask(asked(work)))
    assert error.value.result is NoResult.ENGINE_FAILED and len(handle.responses) == TRIES


def test_retries_end_with_the_deadline(work: Work) -> None:
    needs_ray()
    from ray.exceptions import ActorDiedError

    pool, handle = fake(work, ActorDiedError())
    with pytest.raises(NoResultError) as error:
        asyncio.run(pool.ask(asked(work, seconds=0.05)))
    assert error.value.result is NoResult.LATE and len(handle.responses) < TRIES


def test_a_late_answer_is_none_and_its_request_is_cancelled(work: Work) -> None:
    needs_ray()
    pool, handle = fake(work, lambda: asyncio.sleep(30))
    begin = time.monotonic()
    with pytest.raises(NoResultError) as error:
        asyncio.run(pool.ask(asked(work, seconds=0.2)))
    assert error.value.result is NoResult.LATE and time.monotonic() - begin < 5
    assert handle.responses[0].cancelled


@pytest.mark.parametrize("result", list(NoResult))
def test_what_a_replica_refuses_is_refused(work: Work, result: NoResult) -> None:
    needs_ray()
    pool, handle = fake(work, Refused(result, "why"))
    with pytest.raises(NoResultError, match="why") as error:
        asyncio.run(pool.ask(asked(work)))
    assert error.value.result is result and len(handle.responses) == 1


def test_a_full_queue_and_a_replica_that_raises(work: Work) -> None:
    needs_ray()
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import BackPressureError

    raised = RayTaskError("ask", "Traceback", KeyError("x"), proctitle="p", pid=1, ip="127.0.0.1")
    for reply, result in ((BackPressureError(9, 8), NoResult.QUEUE_FULL), (raised, NoResult.ENGINE_FAILED)):
        pool, handle = fake(work, reply)
        with pytest.raises(NoResultError) as error:
            asyncio.run(pool.ask(asked(work)))
        assert error.value.result is result and len(handle.responses) == 1


def test_closing_refuses_what_comes_and_ends_what_waits(work: Work) -> None:
    needs_ray()
    pool, _ = fake(work, lambda: asyncio.sleep(30), drain=0.3)

    async def both() -> list[Any]:
        waiting = asyncio.create_task(pool.ask(asked(work, seconds=60)))
        await asyncio.sleep(0.05)
        await pool.close()
        return await asyncio.gather(waiting, pool.ask(asked(work)), return_exceptions=True)

    for error in asyncio.run(both()):
        assert isinstance(error, NoResultError) and error.result is NoResult.SHUTTING_DOWN


def test_what_the_model_does_not_take_reaches_no_replica(work: Work) -> None:
    pool, handle = fake(work, answer(work))
    wrong = [
        (UnknownModelError, replace(asked(work), model="parts")),
        (UnknownModelError, asked(work, version="0123456789ab")),
        (FrameError, replace(asked(work), frames=np.zeros((5, 64, 64, 3), np.uint8))),
        (FrameError, replace(asked(work), frames=np.zeros((1, 64, 64, 3), np.float32))),
        (ConfigError, replace(asked(work), classes=("screw",))),
    ]
    for kind, one in wrong:
        with pytest.raises(kind):
            asyncio.run(pool.ask(one))
    assert not handle.responses
    assert checked(asked(work), pool._routes["part"].app.card).frames.flags.c_contiguous
