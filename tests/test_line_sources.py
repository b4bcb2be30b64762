"""Sources: each part once, whole or openly lost, over restarts and lost connections."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowad_fast.line.sources import EndOfSource, IteratorSource, Shot
from flowad_fast.line.sources.folder import FolderSettings, WatchedFolder
from flowad_fast.line.sources.recorded import RecordedSettings
from flowad_fast.line.sources.video import VideoSettings
from tests.models import tiny_frames


def picture(path: Path, seed: int = 0) -> np.ndarray:
    frame = tiny_frames(1, seed=seed)[0]
    Image.fromarray(frame).save(path)
    return frame


def watched(folder: Path, **fields: object) -> WatchedFolder:
    settings = FolderSettings.model_validate({"kind": "folder", "folder": folder, "quiet": 0, "poll": 0.005, **fields})
    return settings.open(folder.parent / "state" / "cell.taken")


def drained(source: WatchedFolder, wait: float = 0.03) -> list[Shot]:
    shots = []
    while (shot := source.read(wait)) is not None:
        assert shot.begun is not None
        shot.begun()
        shots.append(shot)
    return shots


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def test_each_file_is_a_part_once_over_restarts(folder: Path) -> None:
    frames = {f"{i}.png": picture(folder / f"{i}.png", i) for i in range(3)}
    (folder / "notes.txt").write_text("no part")
    source = watched(folder)
    shots = drained(source)
    assert sorted(shot.name for shot in shots) == sorted(frames)
    assert all(np.array_equal(shot.frame, frames[shot.name]) for shot in shots)
    source.close()
    picture(folder / "3.png", 3)
    again = watched(folder)
    assert [shot.name for shot in drained(again)] == ["3.png"]
    picture(folder / "1.png", 9)  # another part under an old name
    os.utime(folder / "1.png", (1, 1))
    assert [shot.name for shot in drained(again)] == ["1.png"]
    again.close()
    assert drained(watched(folder)) == []


def test_a_file_that_was_not_begun_comes_again(folder: Path) -> None:
    picture(folder / "a.png")
    shot = watched(folder).read(0.1)
    assert shot is not None and shot.name == "a.png"
    assert [one.name for one in drained(watched(folder))] == ["a.png"]


def test_a_file_is_taken_when_it_is_complete(folder: Path) -> None:
    source = watched(folder, quiet=0.1)
    whole = folder.parent / "whole.png"
    frame = picture(whole)
    data = whole.read_bytes()
    with (folder / "slow.png").open("wb") as file:
        for start in range(0, len(data), len(data) // 4 + 1):
            file.write(data[start : start + len(data) // 4 + 1])
            file.flush()
            assert source.read(0.05) is None
    shot = source.read(2)
    assert shot is not None and np.array_equal(shot.frame, frame)


def test_an_unreadable_file_is_a_lost_part_with_its_reason(folder: Path) -> None:
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    (shot,) = drained(watched(folder))
    assert shot.frame is None and "torn.png" in shot.lost


def test_files_of_before_the_first_start_can_be_left(folder: Path) -> None:
    picture(folder / "old.png")
    source = watched(folder, old="skip")
    assert drained(source) == []
    picture(folder / "new.png")
    assert [shot.name for shot in drained(source)] == ["new.png"]
    source.close()
    picture(folder / "while-away.png")
    assert [shot.name for shot in drained(watched(folder, old="skip"))] == ["while-away.png"]


def test_a_folder_that_goes_away_raises_and_comes_back(folder: Path) -> None:
    source = watched(folder)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(OSError):
        source.read(0.01)
    folder.with_name("elsewhere").rename(folder)
    picture(folder / "a.png")
    assert [shot.name for shot in drained(source)] == ["a.png"]


def test_recorded_parts_come_at_their_rate_and_in_rounds(folder: Path) -> None:
    for i in range(2):
        picture(folder / f"{i}.png", i)
    (folder / "2.png").write_bytes(b"")
    settings = RecordedSettings(kind="recorded", folder=folder, rate=50, rounds=2)
    source, names, start = settings.open(folder), [], time.monotonic()
    with pytest.raises(EndOfSource):
        while True:
            shot = source.read(0.01)
            if shot is not None:
                names.append(shot.name)
                assert (shot.frame is None) == shot.name.startswith("2") == bool(shot.lost)
    assert names == ["0.png", "1.png", "2.png", "0.png#2", "1.png#2", "2.png#2"]
    assert time.monotonic() - start >= 5 / 50
    assert "3 parts" in settings.check()


def test_an_iterator_ends_and_is_closed() -> None:
    closed = []

    def frames():
        try:
            yield tiny_frames(1)[0]
            yield Shot(None, lost="gap")
            yield tiny_frames(1)[0]
        finally:
            closed.append(True)

    source = IteratorSource(frames())
    assert source.read(1).frame is not None and source.read(1).lost == "gap"
    source.close()
    assert closed
    with pytest.raises(EndOfSource):
        IteratorSource([]).read(1)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "line.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=100)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i + 20, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_frames_of_a_video_file(video: Path) -> None:
    settings = VideoSettings(kind="video", url=str(video), every=3)
    assert settings.check() == f"{video} shows 64x64 pixels"
    source, shown, start = settings.open(video), [], time.monotonic()
    with pytest.raises(EndOfSource):
        while True:
            shown.append(source.read(0.1).frame)
    assert [frame.shape for frame in shown] == [(64, 64, 3)] * 4
    assert np.allclose([frame.mean() for frame in shown], [20, 80, 140, 200], atol=4)
    assert time.monotonic() - start >= 0.08, "at its own pace: 9 frames after the first at 100 a second"


def test_a_live_stream_that_ends_is_lost_and_connected_again(video: Path) -> None:
    source = VideoSettings(kind="video", url=str(video), live=True).open(video)
    for _ in range(2):
        assert all(source.read(0.1).frame is not None for _ in range(10))
        with pytest.raises(OSError, match="the stream has ended"):
            source.read(0.1)
    source.close()


def test_an_unreachable_camera_says_so_without_its_password() -> None:
    pytest.importorskip("av")
    settings = VideoSettings(kind="video", url="rtsp://me:secret@127.0.0.1:9/stream", timeout=2)
    with pytest.raises(OSError) as caught:
        settings.open(Path()).read(0.1)
    assert "127.0.0.1:9" in str(caught.value) and "secret" not in str(caught.value)
