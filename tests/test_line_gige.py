"""A GigE camera: every part whole, or openly lost; against Aravis' own fake camera, and with buffers made by hand."""

import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flowad_fast.errors import ConfigError, FrameError, MissingExtraError
from flowad_fast.line import Alarm, Line, NoResult, Record, Shot
from flowad_fast.line.sinks.rows import from_row, to_row
from flowad_fast.line.sources import aravis
from flowad_fast.line.sources.aravis import Grab, Options
from flowad_fast.line.sources.gige import GigeCamera, GigeSettings, gap
from flowad_fast.line.sources.pixels import FORMATS, code, demosaic, to_rgb
from tests.line_servers import missing, only_camera, program, record, until
from tests.test_detector import FakeEngine, calibration
from tests.test_detector import fake as detector


def settings(**fields: object) -> GigeSettings:
    return GigeSettings.model_validate({"kind": "gige", "camera": "127.0.0.1", **fields})


# Pixels


def mosaic(rgb: np.ndarray, pattern: str) -> np.ndarray:
    """What a sensor with that pattern sees of a picture."""
    raw = np.empty(rgb.shape[:2], np.uint8)
    rows = {"RG": "RGGB", "GR": "GRBG", "GB": "GBRG", "BG": "BGGR"}[pattern]
    for place, colour in enumerate(rows):
        y, x = divmod(place, 2)
        raw[y::2, x::2] = rgb[y::2, x::2, "RGB".index(colour)]
    return raw


@pytest.mark.parametrize("pattern", ["RG", "GR", "GB", "BG"])
@pytest.mark.parametrize("size", [(32, 40), (31, 41), (2, 2), (2, 3)])
def test_a_mosaic_of_one_colour_is_that_colour(pattern: str, size: tuple[int, int]) -> None:
    picture = np.broadcast_to(np.array([200, 100, 30], np.uint8), (*size, 3))
    assert np.array_equal(demosaic(mosaic(picture, pattern), pattern), picture)


@pytest.mark.parametrize("pattern", ["RG", "GR", "GB", "BG"])
def test_a_mosaicked_picture_comes_back(pattern: str) -> None:
    y, x = np.mgrid[0:32, 0:48]
    picture = np.stack([4 * x, 5 * y + 20, 255 - 2 * x - 3 * y], -1).astype(np.uint8)  # linear: bilinear is exact
    found = demosaic(mosaic(picture, pattern), pattern)
    assert np.abs(found[1:-1, 1:-1].astype(int) - picture[1:-1, 1:-1]).max() <= 1
    assert np.abs(found.astype(int) - picture).max() <= 5, "the edge is mirrored"


@pytest.mark.parametrize(("name", "bits"), [("Mono10", 10), ("Mono12", 12), ("Mono16", 16)])
def test_deep_pixels_lose_their_lowest_bits(name: str, bits: int) -> None:
    values = np.array([[0, 1 << (bits - 1), (1 << bits) - 1, 3 << (bits - 8)]], "<u2")
    assert to_rgb(values.tobytes(), name, 1, 4)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3, [3] * 3]  # type: ignore[arg-type]


def test_values_beyond_the_depth_are_refused() -> None:
    with pytest.raises(FrameError, match="got a value of 1024 in Mono10, expected at most 1023"):
        to_rgb(np.array([[0, 1024]], "<u2").tobytes(), "Mono10", 1, 2)


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(FrameError, match="got 11 bytes, expected 12 for RGB8 of 2x2"):
        to_rgb(bytes(11), "RGB8", 2, 2)


def test_packed_formats_are_refused_with_what_to_choose() -> None:
    with pytest.raises(ValueError, match="Mono12Packed, whose pixels are packed; choose one .* Mono12, or"):
        settings(pixel_format="Mono12Packed")
    with pytest.raises(ValueError, match="Mono10p, whose pixels are packed"):
        settings(pixel_format="Mono10p")
    with pytest.raises(ValueError, match="YUV422_8; choose one .* RGB8"):
        settings(pixel_format="YUV422_8")


# Gaps, with buffers made by hand


class Fake:
    """A connection that gives what it was told to."""

    def __init__(self, grabs: list[Grab], name: str = "Mono8") -> None:
        self.grabs, self.lost, self.format, self.text, self.closed = grabs, False, name, "fake", 0
        self.triggers = 0

    def grab(self, wait: float) -> Grab | None:
        if not self.grabs:
            time.sleep(min(wait, 0.005))
            return None
        return self.grabs.pop(0)

    def trigger(self) -> None:
        self.triggers += 1

    def counters(self) -> Mapping[str, int]:
        return {"missing_packets": 7}

    def close(self) -> None:
        self.closed += 1


def whole(frame: int, **fields: object) -> Grab:
    values = {"status": "success", "stamp": 10 * frame, "code": code("Mono8"), "height": 2, "width": 2, "data": b"abcd"}
    return Grab(frame, **(values | fields))  # type: ignore[arg-type]


def shots(grabs: list[Grab], **fields: object) -> list[Shot]:
    camera = GigeCamera(settings(**fields), lambda options: Fake(grabs))
    found = []
    while grabs or camera._shots:
        if (shot := camera.read(0.1)) is not None:
            found.append(shot)
    return found


def test_each_missing_id_is_a_lost_part_in_its_place() -> None:
    found = shots([whole(5), whole(6), whole(9)])
    assert [shot.name for shot in found] == ["1.5", "1.6", "1.7", "1.8", "1.9"]
    assert [shot.frame is None for shot in found] == [False, False, True, True, False]
    assert found[2].lost == "no frame 7 came: the ids went from 6 to 9"
    assert found[4].stamp == 90 and found[4].counters == {"missing_packets": 7}


def test_ids_of_16_bits_go_round() -> None:
    names = ["1.65534", "1.65535", "1.1.1", "1.1.2"]
    found = shots([whole(one) for one in (65534, 65535, 1, 2)])
    assert [(shot.name, shot.lost) for shot in found] == [(one, "") for one in names]
    found = shots([whole(65534), whole(2)])
    assert [shot.name for shot in found] == names and [bool(shot.lost) for shot in found] == [False, True, True, False]
    assert gap(65535, 0) == 0 and gap(1 << 40, (1 << 40) + 2) == 1


def test_a_long_gap_is_bounded_and_says_so() -> None:
    found = shots([whole(1), whole(1001)], largest_gap=3)
    assert [shot.name for shot in found] == ["1.1", "1.2", "1.3", "1.4", "1.1001"]
    assert found[3].lost == "997 frames from here on are missing: the ids went from 1 to 1001"


def test_a_camera_that_counts_anew_is_told() -> None:
    found = shots([whole(500), whole(2), whole(3)])
    assert [bool(shot.lost) for shot in found] == [False, True, False, False]
    assert "counts anew" in found[1].lost
    assert [shot.name for shot in found] == ["1.500", "", "2.2", "2.3"]
    assert gap(1 << 40, 5) is None and gap(7, 7) is None and gap(5, 65533) is None


@pytest.mark.parametrize(("last", "old"), [(9, 7), (9, 9), (3, 65530)])
def test_the_torn_echo_of_a_frame_that_was_told_is_no_part(last: int, old: int) -> None:
    found = shots([whole(last), whole(old, status="missing-packets"), whole(last + 1)])
    assert [(shot.name, shot.lost) for shot in found] == [(f"1.{last}", ""), (f"1.{last + 1}", "")]


@pytest.mark.parametrize("status", ["timeout", "missing-packets", "size-mismatch", "aborted", "wrong-packet-id"])
def test_an_incomplete_buffer_is_never_judged(status: str) -> None:
    found = shots([whole(1), whole(2, status=status), whole(3)])
    assert [shot.frame is None for shot in found] == [False, True, False]
    assert found[1].name == "1.2" and found[1].lost == f"frame 2 is not whole ({status})"


def test_a_buffer_that_no_frame_filled_says_nothing_about_ids() -> None:
    found = shots([whole(8), whole(0, status="cleared"), whole(9)])
    assert [(shot.name, shot.lost) for shot in found] == [("1.8", ""), ("", "buffer cleared"), ("1.9", "")]


def test_another_format_than_agreed_or_half_a_buffer_is_lost() -> None:
    found = shots([whole(1, code=code("Mono16")), whole(2, data=b"abc")])
    assert found[0].frame is None and "pixel format 0x01100007, expected Mono8" in found[0].lost
    assert found[1].frame is None and "got 3 bytes, expected 4" in found[1].lost


def test_a_lost_camera_is_told_as_a_part_then_raised_then_connected_again() -> None:
    made = [Fake([whole(1)]), Fake([whole(1)])]
    left = list(made)
    camera = GigeCamera(settings(), lambda options: left.pop(0))
    assert camera.read(0.1).name == "1.1"  # type: ignore[union-attr]
    made[0].lost = True
    shot = camera.read(0.01)
    assert shot is not None and shot.frame is None and "how many parts pass" in shot.lost
    with pytest.raises(OSError, match="does not answer"):
        camera.read(0.01)
    assert made[0].closed == 0, "which takes seconds: first it is told"
    assert camera.read(0.1).name == "2.1", "no gap between connections"  # type: ignore[union-attr]
    camera.close()
    assert [one.closed for one in made] == [1, 1]


def test_a_free_camera_that_is_silent_is_lost_and_one_with_a_hardware_trigger_is_not() -> None:
    camera = GigeCamera(settings(timeout=0.05), lambda options: Fake([]))
    end = time.monotonic() + 2
    while (shot := camera.read(0.01)) is None:
        assert time.monotonic() < end
    assert "no frame within 0.05 s" in shot.lost
    patient = GigeCamera(settings(timeout=0.05, trigger="hardware"), lambda options: Fake([]))
    assert all(patient.read(0.01) is None for _ in range(15))


def test_each_trigger_is_one_part_also_where_the_camera_is_lost() -> None:
    fake = Fake([])
    camera = GigeCamera(settings(trigger="software", timeout=0.1), lambda options: fake)
    assert camera.read(0.01) is None
    for _ in range(3):
        camera.trigger()
    assert fake.triggers == 1, "one at a time"
    time.sleep(0.02)
    fake.grabs.append(whole(1))
    shot = camera.read(0.1)
    assert shot is not None and shot.frame is not None and 0.02 <= shot.age < 0.1
    assert fake.triggers == 2
    fake.lost = True
    lost = [camera.read(0.01), camera.read(0.01)]
    assert all(one is not None and one.frame is None and one.age > 0 for one in lost)
    with pytest.raises(OSError):
        camera.read(0.01)
    with pytest.raises(ConfigError, match="expected trigger: software"):
        GigeCamera(settings()).trigger()


def test_the_connection_is_asked_for_what_the_settings_say() -> None:
    asked: list[Options] = []

    def connect(options: Options) -> Fake:
        asked.append(options)
        return Fake([whole(1)])

    one = settings(trigger="hardware", line="Line2", exposure=50, gain=3, region=[1, 2, 3, 4], packet_size=9000)
    GigeCamera(one, connect).read(0.1)
    assert asked == [Options("127.0.0.1", None, "Line2", None, 50, 3, (1, 2, 3, 4), 9000, None, 8)]
    with pytest.raises(ConfigError, match="Mono12p, whose pixels are packed"):
        GigeCamera(one, lambda options: Fake([], "Mono12p")).read(0.1)


def test_a_timeout_shorter_than_two_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout of 1 s at 0.5 frames a second, expected at least 4"):
        settings(frame_rate=0.5, timeout=1)


def test_without_pygobject_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(aravis, "DEBIAN", tmp_path)
    with pytest.raises(MissingExtraError, match="apt-get install gir1.2-aravis-0.8 python3-gi"):
        aravis._debian("apt-get install gir1.2-aravis-0.8 python3-gi")
    (tmp_path / "gi").mkdir()
    (tmp_path / "gi" / "_gi.cpython-27-x86_64-linux-gnu.so").touch()
    with pytest.raises(MissingExtraError, match='for another Python .* pip install "pygobject<3.51"'):
        aravis._debian("apt-get install python3-gi")


def test_records_keep_the_camera_s_time() -> None:
    one = replace(record("a"), stamp=1_795_665_325_107_825_001)
    assert from_row(to_row(one)) == one
    assert from_row({key: value for key, value in to_row(record("a")).items() if key != "stamp"}) == record("a")


# Against Aravis' fake camera


class Camera:
    """The fake camera's process on loopback; there can be one, for it has the protocol's fixed port."""

    def __init__(self) -> None:
        self._program = program("arv-fake-gv-camera-0.8", "aravis-tools")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, lost_packets: int = 0) -> None:
        """`lost_packets` in a thousand."""
        command = [self._program, "-i", "127.0.0.1", "-s", "TEST01", "-r", str(lost_packets)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def fake() -> Iterator[Camera]:
    try:
        aravis.library()
    except MissingExtraError:
        missing("gir1.2-aravis-0.8 with python3-gi")
    with only_camera():
        camera = Camera()
        camera.start()
        try:
            until(_answers)
            yield camera
        finally:
            camera.kill()


def _answers() -> bool:
    try:
        settings().check()
    except (OSError, ConfigError):
        return False
    return True


def frames(camera: GigeCamera, count: int, limit: float = 10) -> list[Shot]:
    found: list[Shot] = []
    end = time.monotonic() + limit
    while len(found) < count:
        assert time.monotonic() < end, f"{len(found)} of {count} frames"
        if (shot := camera.read(0.2)) is not None:
            found.append(shot)
    return found


@pytest.mark.long
def test_a_running_camera_gives_frames_with_rising_ids_in_every_format(fake: Camera) -> None:
    text = settings(pixel_format="Mono8", region=[0, 0, 64, 48]).check()
    assert text == "Aravis Fake, serial TEST01, Mono8, 48x64 pixels"
    grey = None
    for name in ("Mono8", "Mono16", "RGB8", "BayerRG8", "BayerGB8"):
        assert name in FORMATS
        one = settings(pixel_format=name, region=[0, 0, 64, 48], frame_rate=100)
        camera = one.open(Path())
        found = frames(camera, 6)
        camera.close()
        assert all(shot.frame is not None and shot.frame.shape == (48, 64, 3) for shot in found), name
        assert all(shot.frame.dtype == np.uint8 for shot in found if shot.frame is not None)
        ids = [int(shot.name.split(".")[-1]) for shot in found]
        assert [gap(a, b) for a, b in pairwise(ids)] == [0] * 5
        stamps = [shot.stamp for shot in found if shot.stamp is not None]
        assert len(stamps) == 6 and sorted(stamps) == stamps
        assert found[-1].counters["frames"] >= 6 and found[-1].counters["missing_packets"] == 0
        if name == "Mono8":
            assert found[0].frame is not None
            grey = np.ptp(found[0].frame, axis=2)
    assert grey is not None and not grey.any()


@pytest.mark.long
def test_a_software_trigger_gives_exactly_one_frame(fake: Camera) -> None:
    camera = settings(trigger="software", region=[0, 0, 64, 48]).open(Path())
    assert camera.read(0.3) is None and camera.read(0.3) is None, "no frame without a trigger"
    for _ in range(3):
        camera.trigger()
        (shot,) = frames(camera, 1)
        assert shot.frame is not None and 0 < shot.age < 2
        assert camera.read(0.3) is None
    camera.close()
    timed = settings(trigger="software", frame_rate=20, region=[0, 0, 64, 48]).open(Path())
    start = time.monotonic()
    assert all(shot.frame is not None for shot in frames(timed, 6))
    assert time.monotonic() - start >= 4 / 20
    timed.close()


@pytest.mark.long
def test_on_a_network_that_loses_packets_each_frame_is_whole_or_told_lost(fake: Camera) -> None:
    fake.kill()
    fake.start(lost_packets=30)
    one = settings(region=[0, 0, 128, 128], frame_rate=50, pixel_format="Mono8", trigger="free")
    camera, found = one.open(Path()), []
    end = time.monotonic() + 15
    while time.monotonic() < end and not (len(found) > 40 and {bool(shot.lost) for shot in found} == {False, True}):
        try:
            if (shot := camera.read(0.2)) is not None:
                found.append(shot)
        except OSError:
            time.sleep(0.1)  # not up yet
    camera.close()
    lost = [shot for shot in found if shot.frame is None]
    assert lost and len(lost) < len(found)
    reasons = {shot.lost for shot in lost}
    assert all("is not whole" in one or "no frame" in one for one in reasons), reasons
    ids = [int(shot.name.split(".")[-1]) for shot in found]
    assert [gap(a, b) for a, b in pairwise(ids)] == [0] * (len(ids) - 1), "each id has one part"
    assert found[-1].counters["missing_packets"] > 0


@pytest.mark.long
def test_what_the_camera_refuses_is_said(fake: Camera) -> None:
    with pytest.raises(ConfigError, match="the camera refuses Mono10 .* its pixel formats: .*Mono8"):
        settings(pixel_format="Mono10").check()
    with pytest.raises(ConfigError, match="got the region .* the camera makes it"):
        settings(region=[0, 0, 5000, 48]).check()


@pytest.mark.long
def test_a_line_goes_on_by_itself_when_its_camera_comes_back(fake: Camera) -> None:
    one = settings(region=[0, 0, 64, 64], frame_rate=20, pixel_format="Mono8", timeout=0.5)
    line = Line(detector(calibration(100.0), FakeEngine()), {"left": one.open(Path())}, deadline=5)
    events: list[Record | Alarm] = []
    lock = threading.Lock()

    def keep(event: Record | Alarm) -> None:
        with lock:
            events.append(event)

    def records() -> list[Record]:
        with lock:
            return [event for event in events if isinstance(event, Record)]

    line.listen(keep)
    with line:
        until(lambda: len(records()) > 3)
        fake.kill()
        until(lambda: line.health().sources["left"], 20)
        before = len(records())
        fake.start()
        until(lambda: len(records()) > before + 3, 30)
        assert not line.health().sources["left"]
        assert line.health().transport["left"]["frames"] > 0
    lost = [one for one in records() if one.result is NoResult.SOURCE_LOST]
    assert len(lost) >= 1 and any("how many parts pass" in one.reason for one in lost)
    assert all(one.stamp is not None for one in records() if one.result is not NoResult.SOURCE_LOST)
    alarms = [event for event in events if isinstance(event, Alarm) and event.kind == "camera lost"]
    assert [one.over for one in alarms] == [False, True]
    assert len({one.part for one in records()}) == len(records())
