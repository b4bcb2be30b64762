"""A detector in a process of its own: the same results as here, and a hang, a crash or an error ends nothing."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from flowad_fast.detector import Detection, load
from flowad_fast.errors import EngineUnavailableError, FrameError
from flowad_fast.line.scoring import Call, EngineLostError, HangError, InProcess, Names, Start
from tests.models import exported, tiny_frames


class Naughty:
    """The bundle's detector, but the first pixel tells it to hang (250), to die (251) or to raise (252)."""

    def __init__(self, start: Start) -> None:
        self._detector = load(start.bundle, threads=1)
        self.engine, self.classes = self._detector.engine, self._detector.classes
        self.frame_size, self.image_size = self._detector.frame_size, self._detector.image_size

    def __call__(self, frames: np.ndarray, classes: Names = None) -> Detection:
        command = frames[0, 0, 0, 0]
        if command == 250:
            time.sleep(60)
        if command == 251:
            os._exit(3)
        if command == 252:
            raise MemoryError("too large")
        return self._detector(frames)


def naughty(start: Start) -> Call:
    return Naughty(start)


def broken(start: Start) -> Call:
    raise OSError("no driver")


def marked(value: int) -> np.ndarray:
    frames = tiny_frames(1)
    frames[0, 0, 0, 0] = value
    return frames


@pytest.fixture(scope="module")
def path() -> Path:
    return exported("onnx")[1].path


def test_it_computes_what_the_detector_does_here(path: Path) -> None:
    scoring = InProcess(Start(path, threads=1))
    scoring.start(60)
    detector = load(path, threads=1)
    for frames in (tiny_frames(1), tiny_frames(3, 80, 100), np.concatenate([np.zeros_like(tiny_frames(1))] * 2)):
        found, expected = scoring(frames, None, 10), detector(frames)
        assert np.array_equal(found.map, expected.map) and np.array_equal(found.raw_score, expected.raw_score)
        assert found.invalid == expected.invalid and found.frame_size == expected.frame_size
    assert scoring.engine == detector.engine
    scoring.close()
    scoring.close()
    with pytest.raises(EngineLostError, match="not running"):
        scoring(tiny_frames(1), None, 1)


def test_a_map_stays_while_it_is_held_and_its_memory_is_used_again(path: Path) -> None:
    scoring = InProcess(Start(path, threads=1))
    scoring.start(60)
    kept = [scoring(tiny_frames(2) // n, None, 10).map[1] for n in range(1, 7)]
    for n, map in enumerate(kept, 1):
        assert np.array_equal(map, scoring(tiny_frames(2) // n, None, 10).map[1])
    del kept[1:], map
    used = {scoring(tiny_frames(count), None, 10).map.ctypes.data for count in (1, 2, 2, 1, 3, 3, 1, 2)}
    assert len(used) == 2, "three frames need more than the block that was free, which then serves all"
    assert kept[0].ctypes.data not in used
    scoring.close()


def test_hang_crash_and_error_are_told_and_survived(path: Path) -> None:
    scoring = InProcess(Start(path, threads=1), naughty)
    scoring.start(60)
    first = scoring(tiny_frames(1), None, 10)
    with pytest.raises(EngineLostError, match="raised MemoryError: too large"):
        scoring(marked(252), None, 10)
    with pytest.raises(FrameError, match="expected uint8 frames"):
        scoring(tiny_frames(1)[..., :2], None, 10)
    with pytest.raises(EngineLostError, match="has ended"):
        scoring(marked(251), None, 10)
    scoring.start(60)
    begin = time.monotonic()
    with pytest.raises(HangError, match=r"within 0\.2 s"):
        scoring(marked(250), None, 0.2)
    assert time.monotonic() - begin < 1
    scoring.start(60)
    assert np.array_equal(scoring(tiny_frames(1), None, 10).map, first.map)
    scoring.close()


def test_a_detector_that_does_not_start_says_why(path: Path) -> None:
    scoring = InProcess(Start(path), broken)
    with pytest.raises(EngineLostError, match="OSError: no driver"):
        scoring.start(60)
    with pytest.raises((HangError, EngineUnavailableError)):
        InProcess(Start(path), naughty).start(0.01)
    scoring.close()


def test_a_system_without_such_memory_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(EngineUnavailableError, match="only Linux has"):
        InProcess(Start(path)).start(60)
