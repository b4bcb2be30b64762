"""Capacity on paper: the model against closed forms and the line's own policy, bytes of frames, and the section."""

import math
from pathlib import Path

import numpy as np
import pytest

from flowad_fast.benchmarks.record import capacity, record, report
from flowad_fast.benchmarks.record.capacity_record import CapacityRecord
from flowad_fast.benchmarks.runs import capacity as measuring


def one_server(load: float, wait: float) -> float:
    """The share that waits longer in M/D/1, in units of the service time (Erlang's closed form)."""
    terms = ((-load * (wait - i)) ** i / math.factorial(i) * math.exp(load * (wait - i)) for i in range(int(wait) + 1))
    return 1 - (1 - load) * sum(terms)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("wait", [0.0, 0.4, 1.0, 2.7])
def test_one_replica_is_the_closed_form(load: float, wait: float):
    assert capacity.late(1, 0.05, load / 0.05, wait * 0.05) == pytest.approx(one_server(load, wait), abs=1e-6)


def test_an_overloaded_pool_and_a_hopeless_deadline():
    assert capacity.late(2, 1.0, 2.0, 5.0) == 1
    assert capacity.late(2, 1.0, 1.0, -0.1) == 1
    assert capacity.most(8, 0.05, 0.04) == 0


def test_a_larger_pool_and_a_later_deadline_serve_more():
    def used(replicas: int, deadline: float) -> float:
        return capacity.most(replicas, 0.04, deadline) / replicas

    assert used(1, 0.1) < used(2, 0.1) < used(8, 0.1) < 25
    assert used(2, 0.1) < used(2, 0.2) < used(2, 0.5) < 25
    rate = capacity.most(4, 0.04, 0.15)
    assert capacity.late(4, 0.04, rate, 0.11) <= capacity.MISSED < capacity.late(4, 0.04, 1.02 * rate, 0.11)


@pytest.mark.parametrize(("replicas", "load"), [(1, 0.6), (4, 0.7), (8, 0.7)])
def test_the_policy_lets_parts_of_one_camera_wait_as_the_model_says(replicas: int, load: float):
    """With no deadline near, nothing is given up: what is left is M/D/c. Within 0.015, about three standard errors."""
    service = 0.04
    rate = load * replicas / service
    arrivals = measuring.at_random(rate, cameras=1, seed=1)
    waited = measuring.simulate(replicas, service, 1e6, arrivals, parts=40_000) - service
    for wait in (0.0, 0.02, 0.05, 0.1):
        share = float((waited > wait + 1e-9).mean())
        assert share == pytest.approx(capacity.late(replicas, service, rate, wait), abs=0.015), wait


def test_the_policy_keeps_what_the_model_promises_where_it_should():
    """One camera: never more late parts than planned. Lines in beats: hardly any."""
    service, deadline = 0.04, 0.16
    rate = capacity.most(4, service, deadline)
    for arrivals in (measuring.at_random(rate, 1, seed=2), measuring.in_beats(rate, round(rate), seed=2)):
        missed = float(np.isinf(measuring.simulate(4, service, deadline, arrivals, parts=20_000)).mean())
        assert missed <= capacity.MISSED


def test_bytes_of_frames_that_are_grey_and_that_are_not():
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (3, 40, 50, 1), dtype=np.uint8).repeat(3, axis=3)
    found = {one.form: one for one in measuring.encoded(list(grey), timing=True)}
    assert list(found) == ["raw RGB", "raw grey", "PNG, grey", "JPEG 90, grey"]
    assert found["raw RGB"].mean_bytes == 6000 and found["raw grey"].mean_bytes == 2000
    assert found["PNG, grey"].least_bytes > 2000, "noise cannot be made smaller"
    assert found["PNG, grey"].decode_ms is not None and found["raw RGB"].decode_ms is None
    colour = list(random.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    assert [one.form for one in measuring.encoded(colour, timing=False)] == ["raw RGB", "PNG, RGB", "JPEG 90, RGB"]


def test_the_section_names_its_sources_and_says_what_was_not_measured(tmp_path: Path):
    whole = "\n".join(capacity.section(report.RESULTS))
    assert "line-rate-cpu" in whole and "predicted" in whole
    nothing = "\n".join(capacity.section(tmp_path))
    assert "no record has been committed" in nothing and "Not measured" in nothing


def test_the_committed_record_is_what_the_model_says():
    for path in report.RESULTS.glob("capacity*.json"):
        found = record.read(path)
        assert isinstance(found, CapacityRecord)
        for one in found.simulated:
            model = capacity.late(one.replicas, one.service_s, one.rate, one.deadline_s - one.service_s)
            assert one.model == pytest.approx(model, abs=1e-5)
