"""The line's promises, for any order of calls: one outcome per part, in order, never a late or doubtful good."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flowad_fast.line.outcome import Judgement, NoResult, Outcome, Part
from flowad_fast.line.policy import Batch, Pace, Policy
from flowad_fast.stages.decision import Verdict

GOOD = Judgement(Verdict.GOOD, 0.5)


def part(id: str, arrived: float = 0.0, seconds: float = 1.0, camera: str = "left") -> Part:
    return Part(id, camera, arrived, arrived + seconds)


class AnyLine(RuleBasedStateMachine):
    """Arrivals, batches, failures and time in any order; the engine may answer late, wrongly, or never."""

    @initialize(capacity=st.integers(1, 5), largest=st.integers(1, 4))
    def start(self, capacity: int, largest: int) -> None:
        self.policy = Policy(capacity, largest, Pace({1: 0.1, 4: 0.2}))
        self.now = 0.0
        self.arrived: list[Part] = []
        self.lost: set[str] = set()
        self.told: list[Outcome] = []
        self.batches: list[Batch] = []
        self.said: dict[str, Judgement] = {}

    def tell(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.told == self.now
            if isinstance(outcome.result, Verdict):
                assert self.now <= outcome.part.deadline, "a verdict is told in time or not at all"
                assert outcome.result is self.said[outcome.part.id].verdict, "the verdict is the detector's"
                assert not self.lost & {outcome.part.id}
            else:
                assert not outcome.passes
        self.told += outcomes

    @rule(camera=st.sampled_from(["left", "right", "top"]), seconds=st.floats(0, 2), lost=st.booleans())
    def arrive(self, camera: str, seconds: float, lost: bool) -> None:
        one = part(str(len(self.arrived)), self.now, seconds, camera)
        self.arrived.append(one)
        if lost:
            self.lost.add(one.id)
        self.tell(self.policy.lose(one, self.now, "half a frame") if lost else self.policy.arrive(one, self.now))

    @rule(seconds=st.floats(0, 1.5))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.tell(self.policy.expire(self.now))

    @rule()
    def take(self) -> None:
        batch = self.policy.take(self.now)
        if batch is not None:
            assert 1 <= len(batch.parts) <= self.policy.largest_batch
            assert all(one.deadline > self.now for one in batch.parts)
            self.batches.append(batch)

    @rule(verdicts=st.lists(st.sampled_from(list(Verdict)), min_size=4, max_size=4), which=st.integers(0, 9))
    def finish(self, verdicts: list[Verdict], which: int) -> None:
        if self.batches:
            batch = self.batches.pop(which % len(self.batches))
            judgements = tuple(Judgement(verdict) for verdict in verdicts[: len(batch.parts)])
            self.said |= {one.id: said for one, said in zip(batch.parts, judgements, strict=True)}
            self.tell(self.policy.finish(batch, judgements, self.now))
            self.tell(self.policy.finish(batch, judgements, self.now))  # an answer that comes twice counts once

    @rule(which=st.integers(0, 9), wrong=st.booleans())
    def fail(self, which: int, wrong: bool) -> None:
        if self.batches:
            batch = self.batches.pop(which % len(self.batches))
            said = self.policy.finish(batch, (), self.now) if wrong else self.policy.fail(batch, "broke", self.now)
            self.tell(said)

    @rule()
    def close(self) -> None:
        self.tell(self.policy.close(self.now))

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "policy"):
            return
        ids = [outcome.part.id for outcome in self.told]
        assert len(ids) == len(set(ids)) and len(ids) + self.policy.pending == len(self.arrived)
        for camera in ("left", "right", "top"):
            seen = [one.id for one in self.arrived if one.camera == camera]
            told = [outcome.part.id for outcome in self.told if outcome.part.camera == camera]
            assert told == seen[: len(told)], "the outcomes of a camera come in the order of its parts"
        assert self.policy.waiting <= self.policy.capacity

    def teardown(self) -> None:
        if hasattr(self, "policy"):
            self.now += 1e6
            self.tell(self.policy.expire(self.now))
            assert len(self.told) == len(self.arrived) and self.policy.pending == 0


TestAnyLine = AnyLine.TestCase
TestAnyLine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_part_is_judged_and_told_at_once() -> None:
    policy = Policy()
    assert policy.arrive(part("a"), 0.0) == []
    batch = policy.take(0.1)
    assert batch is not None and [one.id for one in batch.parts] == ["a"]
    (outcome,) = policy.finish(batch, (GOOD,), 0.5)
    assert outcome.passes and outcome.seconds == 0.5 and outcome.judgement is GOOD


def test_a_late_good_is_no_result() -> None:
    policy = Policy()
    policy.arrive(part("a", seconds=1.0), 0.0)
    batch = policy.take(0.0)
    assert batch is not None
    (outcome,) = policy.finish(batch, (GOOD,), 1.01)
    assert outcome.result is NoResult.LATE and outcome.judgement is GOOD and not outcome.passes


def test_a_part_expires_while_the_engine_hangs_and_its_answer_is_ignored() -> None:
    policy = Policy()
    policy.arrive(part("a"), 0.0)
    batch = policy.take(0.0)
    assert batch is not None and policy.next_deadline() == 1.0
    assert [outcome.result for outcome in policy.expire(1.1)] == [NoResult.LATE]
    assert policy.finish(batch, (GOOD,), 1.2) == [] and policy.pending == 0


def test_a_good_behind_an_undecided_part_waits_and_may_expire() -> None:
    policy = Policy(largest_batch=1)
    policy.arrive(part("a", seconds=5), 0.0)
    policy.arrive(part("b", seconds=2), 0.0)
    first, second = policy.take(0.0), policy.take(0.0)
    assert first is not None and second is not None
    assert policy.finish(second, (GOOD,), 1.0) == []
    told = policy.finish(first, (GOOD,), 3.0)
    assert [outcome.result for outcome in told] == [Verdict.GOOD, NoResult.LATE]


def test_too_many_parts_are_told_at_once_and_disturb_no_other() -> None:
    policy = Policy(capacity=2)
    told = [policy.arrive(part(str(i), camera=f"camera {i}"), 0.0) for i in range(3)]
    assert [len(one) for one in told] == [0, 0, 1] and told[2][0].result is NoResult.QUEUE_FULL
    batch = policy.take(0.0)
    assert batch is not None and len(batch.parts) == 2


def test_cameras_take_turns() -> None:
    policy = Policy(largest_batch=2)
    for i in range(6):
        policy.arrive(part(f"fast {i}", camera="fast"), 0.0)
    policy.arrive(part("slow 0", camera="slow"), 0.0)
    first = policy.take(0.0)
    assert first is not None and {one.camera for one in first.parts} == {"fast", "slow"}


@pytest.mark.parametrize(("seconds", "size"), [(0.15, 1), (0.35, 3), (10.0, 8)])
def test_a_batch_is_as_large_as_deadlines_allow(seconds: float, size: int) -> None:
    policy = Policy(pace=Pace({1: 0.1, 8: 0.8}))
    for i in range(20):
        policy.arrive(part(str(i), seconds=seconds), 0.0)
    batch = policy.take(0.0)
    assert batch is not None and len(batch.parts) == size


def test_a_hopeless_part_gives_way_but_is_tried_when_nothing_else_waits() -> None:
    policy = Policy(pace=Pace({1: 0.5}))
    policy.arrive(part("hopeless", seconds=0.4), 0.0)
    policy.arrive(part("fine", seconds=1.0), 0.0)
    first, second = policy.take(0.0), policy.take(0.0)
    assert first is not None and [one.id for one in first.parts] == ["fine"]
    assert second is not None and [one.id for one in second.parts] == ["hopeless"]


def test_the_pace_remembers_hiccups_for_a_while() -> None:
    pace = Pace()
    assert pace(4) == 0.0
    pace.learn(1, 0.1)
    assert pace(1) == 0.1 and pace(3) == pytest.approx(0.3)
    pace.learn(1, 2.0)
    pace.learn(1, 0.1)
    assert 1.9 < pace(1) < 2.0
    for _ in range(300):
        pace.learn(1, 0.1)
    assert pace(1) == pytest.approx(0.1)


def test_closing_lets_what_is_judged_finish() -> None:
    policy = Policy(largest_batch=1)
    policy.arrive(part("a"), 0.0)
    policy.arrive(part("b"), 0.0)
    batch = policy.take(0.0)
    assert batch is not None and policy.close(0.1) == []
    told = policy.finish(batch, (GOOD,), 0.2)
    assert [outcome.result for outcome in told] == [Verdict.GOOD, NoResult.SHUTTING_DOWN]
    assert [outcome.result for outcome in policy.arrive(part("c"), 0.3)] == [NoResult.SHUTTING_DOWN]
