"""Inspection and calibration in situations that people reported: each test is named after one."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import flowad_fast
from flowad_fast import bundle as bundles
from flowad_fast.benchmarks.measure.cases import random_model, spec_of
from flowad_fast.cli import inspect as cli
from flowad_fast.data import images
from flowad_fast.data.images import Stamp
from flowad_fast.errors import BundleError, FrameError
from flowad_fast.evaluation import inspection
from flowad_fast.evaluation.inspection import OverlayFolder, Result, ResultFile
from flowad_fast.export.calibration import recalibrate
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.frames import GoodParts, good_parts, parity_frames
from flowad_fast.stages.scorers import Inversion

RNG = np.random.default_rng(0)


def photo(path: Path, size: tuple[int, int] = (64, 64), **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, **options)
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundles") / "b"
    frames = RNG.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    good = GoodParts(list(frames), [""] * 6, [str(i) for i in range(6)])
    spec = spec_of(32, 2, 2, backbone="efficientnet-lite0", size=64, invad=True)
    model = random_model(spec, torch.device("cpu"))
    result = export_bundle(
        model, Inversion(steps=2), path, formats=("eager",), frames=frames[:3], good=good, alpha=0.2, quiet=True
    )
    assert result.ok
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of flowad-inspect."""
    old, sys.argv = sys.argv, ["flowad-inspect", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = old
    shown = capsys.readouterr()
    return code, shown.out, " ".join(shown.err.split())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Photos that exist get a row, or the run says what was left out


def test_linked_folder_companions_and_other_suffixes(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path / "p/a.png")
    photo(tmp_path / "nas/b.png")
    (tmp_path / "p/lot2").symlink_to(tmp_path / "nas")
    for name in (".ipynb_checkpoints/a.png", "._a.png", "@eaDir/t.png"):
        photo(tmp_path / "p" / name)
    photo(tmp_path / "p/c.jfif", format="JPEG")
    (tmp_path / "p/notes.txt").write_text("x")
    big = Image.fromarray(RNG.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    big.save(tmp_path / "p/two.jpg", format="MPO", save_all=True, append_images=[big.resize((48, 48))])
    code, out, err = run(capsys, bundle, "p", "--json")
    assert code == 0 and "1 file with other suffixes left out (.txt)" in err
    assert json.loads(out)["left_out"] == {".txt": 1} and json.loads(out)["counts"]["error"] == 0
    rows = rows_of(tmp_path / "inspection.csv")
    assert [row["path"] for row in rows] == ["p/a.png", "p/c.jfif", "p/lot2/b.png", "p/two.jpg"]


def test_what_could_not_be_opened_is_a_row_and_not_exit_code_0(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "p/a.png")
    photo(tmp_path / "p/closed/b.png")
    (tmp_path / "p/gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "p/pipe.png")
    real = Path.iterdir

    def refuse(path: Path) -> object:
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        code, out, err = run(capsys, bundle, "p", "--json")
    summary = json.loads(out)
    assert code == 1 and summary["not_opened"] == 2 and summary["folders_not_opened"] == ["p/closed"]
    assert "p/closed: the folder cannot be looked into" in err and "2 files could not be opened" in err
    rows = {row["path"]: row for row in rows_of(tmp_path / "inspection.csv")}
    assert {path for path, row in rows.items() if row["status"] == "error"} == {
        "p/gone.png", "p/pipe.png", "p/closed"
    }  # fmt: skip
    photo(tmp_path / "nowhere.png")
    (tmp_path / "p/pipe.png").unlink()
    photo(tmp_path / "p/pipe.png")
    code, out, _ = run(capsys, bundle, "p", "--json")  # put right: every error row is replaced
    assert code == 0 and json.loads(out)["from_earlier_runs"] == 1
    rows = {row["path"]: row for row in rows_of(tmp_path / "inspection.csv")}
    assert len(rows) == 4 and "error" not in {row["status"] for row in rows.values()}


def test_good_parts_and_parity_frames_say_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("nut/0.png", "nut/.hidden.png", "botl/0.png", "stray.png"):
        photo(tmp_path / name)
    (tmp_path / "nut/a.txt").touch()
    parts = good_parts(tmp_path, ("nut", "bolt"))
    said = " ".join(parts.left_out)
    assert len(parts) == 1 and "folders of no class left out: botl" in said
    assert "stray.png" in said and "1 file with other suffixes" in said
    assert parity_frames(tmp_path / "nut").left_out == ("1 file with other suffixes left out (.txt)",)
    (tmp_path / "nut/gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FrameError, match="gone.png: no such file .a link that leads nowhere"):
        parity_frames(tmp_path / "nut")


# A result belongs to a file's content


def test_replaced_photo_loses_its_verdict(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = photo(tmp_path / "cam/cam1.bmp")
    photo(tmp_path / "cam/cam2.bmp")
    run(capsys, bundle, "cam")
    before = rows_of(tmp_path / "inspection.csv")
    status = first.stat()
    photo(first)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time: the content counts
    _, out, _ = run(capsys, bundle, "cam", "--json")
    assert json.loads(out)["from_earlier_runs"] == 1
    rows = rows_of(tmp_path / "inspection.csv")
    assert sorted(row["path"] for row in rows) == ["cam/cam1.bmp", "cam/cam2.bmp"]
    changed = next(row for row in rows if row["path"] == "cam/cam1.bmp")
    assert changed["score"] != before[0]["score"] and changed["sha256"] != before[0]["sha256"]
    os.utime(first)  # only the time: the row stays
    (tmp_path / "other").mkdir()
    for folder in (tmp_path / "cam", tmp_path / "other/../cam"):
        _, out, _ = run(capsys, bundle, folder, "--json")
        assert json.loads(out)["from_earlier_runs"] == 2
    assert rows_of(tmp_path / "inspection.csv") == rows


def test_names_of_one_photo_keep_their_rows(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "p/a.png")
    os.link(tmp_path / "p/a.png", tmp_path / "p/hard.png")
    (tmp_path / "p/soft.png").symlink_to("a.png")
    run(capsys, bundle, "p")
    assert len(rows_of(tmp_path / "inspection.csv")) == 3
    _, out, _ = run(capsys, bundle, "p", "--json")
    assert json.loads(out)["from_earlier_runs"] == 3


def test_a_photo_that_changes_while_it_is_read_has_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = photo(tmp_path / "a.png")

    def slow(path: Path) -> np.ndarray:
        path.write_bytes(path.read_bytes() + b"x")
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(images, "read_frame", slow)
    frame, stamp = images.read_stamped(path)
    assert isinstance(frame, FrameError) and "changed while it was read" in str(frame) and stamp is None


@pytest.mark.parametrize("format", inspection.FORMATS)
def test_result_files_of_before_are_judged_again(tmp_path: Path, format: str) -> None:
    path, name = tmp_path / "r", str(photo(tmp_path / "p.png"))
    values = [name, "good", 1.5, "", "", "e", "b"]
    old = dict(zip(inspection.COLUMNS[: len(values)], values, strict=True))
    gone = old | {"path": str(tmp_path / "gone.png")}
    if format == "csv":
        lines = [",".join(old), *(",".join(map(str, row.values())) for row in (old, gone))]
    else:
        lines = [json.dumps(row) for row in (old, gone)]
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    with ResultFile(path, format, "b") as file:
        assert file.done({Path(name): ""}) == {} and path.read_bytes() == before
        file.append(Result(Path(name), "anomalous", 2.0, stamp=Stamp(1, 2, "ab")))
    with ResultFile(path, format, "b") as file:
        assert [(row["path"], row["status"]) for row in file.rows] == [
            (str(tmp_path / "gone.png"), "good"), (name, "anomalous")
        ]  # fmt: skip
        assert all(tuple(row) == inspection.COLUMNS for row in file.rows)


def test_two_runs_write_one_file(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(tmp_path / "p/a.png")
    target = tmp_path / "inspection.csv"
    (tmp_path / "link.csv").symlink_to(target)
    with ResultFile(target, "csv", bundles_identity(bundle)):
        for name in ("inspection.csv", "link.csv"):
            code, _, err = run(capsys, bundle, "p", "--output", name)
            assert code == 1 and "another run is writing this file" in err
    with OverlayFolder(tmp_path / "heat", "b"):
        code, _, err = run(capsys, bundle, "p", "--overlays", "heat")
        assert code == 1 and "another run is writing these overlays" in err
    assert run(capsys, bundle, "p", "--output", "link.csv")[0] == 0 and len(rows_of(target)) == 1
    assert (tmp_path / "link.csv").is_symlink()


def bundles_identity(bundle: Path) -> str:
    return inspection.bundle_identity(bundle)


# Fail before the work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "folder"], "is no plain file"),
        (["--output", "/dev/full"], "is no plain file"),
        (["--output", "file/r.csv"], "cannot be made"),
        (["--overlays", "file"], "cannot be made"),
        (["--output", "n" * 300], "cannot be written"),
    ],
)
def test_outputs_are_opened_before_the_bundle_is_loaded(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: list[str], message: str,
) -> None:  # fmt: skip
    photo(tmp_path / "p/a.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(flowad_fast, "load", lambda *_, **__: pytest.fail("the bundle was loaded"))
    code, _, err = run(capsys, bundle, "p", *options)
    assert code == 1 and message in err and "Traceback" not in err
    assert not (tmp_path / "inspection.csv").exists()


def test_restart_keeps_the_old_rows_until_there_are_new_ones(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "p/a.png")
    run(capsys, bundle, "p")
    before = rows_of(tmp_path / "inspection.csv")

    def refuse(*_: object, **__: object) -> None:
        raise BundleError("no engine")

    monkeypatch.setattr(flowad_fast, "load", refuse)
    assert run(capsys, bundle, "p", "--restart")[0] == 1 and rows_of(tmp_path / "inspection.csv") == before


@pytest.mark.parametrize("format", inspection.FORMATS)
def test_a_disk_that_is_full_keeps_finished_rows(tmp_path: Path, format: str) -> None:
    program = f"""
import resource, signal
from pathlib import Path
from flowad_fast.evaluation.inspection import Result, ResultFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
with ResultFile(Path("r"), {format!r}, "b") as file:
    for i in range(100):
        file.append(Result(Path(f"{{i}}.png"), "good", 1.0))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "finished rows are kept" in done.stderr.splitlines()[-1]
    with ResultFile(tmp_path / "r", format, "b") as file:
        assert len(file.rows) > 2 and (tmp_path / "r").read_bytes().endswith(b"\n")


def test_calibrate_in_a_read_only_folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for i in range(6):
        photo(tmp_path / f"good/{i}.png")
    monkeypatch.setattr("flowad_fast.export.calibration.load", lambda *_, **__: pytest.fail("scored before"))
    for place in ("tempfile.TemporaryFile", "filelock.FileLock.acquire"):
        with monkeypatch.context() as patch:
            patch.setattr(place, refuse)
            with pytest.raises(BundleError, match="cannot be written.*Permission denied.*copy"):
                recalibrate(bundle, good_parts(tmp_path / "good"), 0.2)
    assert bundles.read(bundle)[1].calibration is not None


# User text is text


@pytest.mark.parametrize(
    "name", ["photos [lot7]", "x[/y]", "=1+1", "a\nb", "-x;=2", os.fsdecode(b"Pr\xfcfung"), "א\u202e"]
)
def test_names_are_text(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    photo(tmp_path / name / "a.png")
    code, out, err = run(capsys, bundle, f"./{name}", "--output", tmp_path / name / "r.csv", "--overlays", "heat")
    assert code == 0 and "Traceback" not in err and "left out" not in err
    from flowad_fast.cli.common import visible

    assert f"results: {visible(tmp_path / name / 'r.csv')}" in out.splitlines()
    _, out, err = run(
        capsys, bundle, f"./{name}", "--output", tmp_path / name / "r.csv", "--overlays", "heat", "--json"
    )
    assert json.loads(out)["from_earlier_runs"] == 1 and "left out" not in err


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_output_that_is_not_utf_8(bundle: Path, tmp_path: Path, encoding: str) -> None:
    folder = os.fsdecode(b"Pr\xfcfung")
    photo(tmp_path / folder / "a.png")
    done = subprocess.run(
        [sys.executable, "-m", "flowad_fast.cli.inspect", str(bundle), folder],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and b"results: inspection.csv" in done.stdout, done.stderr
    assert "Pr\\udcfcfung" in rows_of(tmp_path / "inspection.csv")[0]["path"]


TEXTS = st.text(st.characters(blacklist_characters="\0"), max_size=8) | st.lists(
    st.sampled_from(["\\", "u005c", "udcff", "\udcff", "'", '"', "=", "\r", "\n", ",", ";", "a"]), max_size=6
).map("".join)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), max_size=4), format=st.sampled_from(inspection.FORMATS))
def test_any_text_comes_back_and_no_cell_is_a_formula(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]], format: str
) -> None:
    path = tmp_path_factory.mktemp("r") / "r"
    with ResultFile(path, format, "b") as file:
        for name, reason in texts:
            file.append(Result(Path(name.replace("/", "")), "error", class_name=reason, reason=reason))
    if not texts:
        assert not path.exists()
        return
    path.read_bytes().decode()
    with ResultFile(path, format, "b") as file:
        assert [(row["path"], row["class"], row["reason"]) for row in file.rows] == [
            (str(Path(name.replace("/", ""))), reason, reason) for name, reason in texts
        ]
    if format == "csv":
        cells = itertools.chain.from_iterable(row.values() for row in rows_of(path))
        assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in cells)


# Memory by bytes


def test_big_photos_are_judged_one_by_one_and_small_ones_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [photo(tmp_path / f"{i}.png", (40, 40) if i in (2, 3) else (8, 8)) for i in range(7)]
    frames = inspection.FrameFiles([*paths, tmp_path / "gone.png"])
    windows = [[w.shape[0] if isinstance(w, np.ndarray) else 0 for w in window] for window in
               inspection.read_ahead(frames, 4, most=3 * 40 * 40)]  # fmt: skip
    assert windows == [[8, 8], [40], [40], [8, 8, 8, 0]]
    in_memory = [np.zeros((4, 4, 3), np.uint8)] * 5
    assert [len(window) for window in inspection.read_ahead(in_memory, 4, most=100)] == [2, 2, 1]


def test_overlays_of_big_frames_take_little_memory(tmp_path: Path) -> None:
    program = """
import resource, sys
import numpy as np
from flowad_fast.evaluation.overlay import overlay
frame = np.zeros((4000, 4000, 3), np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
overlay(frame, np.eye(16, dtype=np.float32), 0, 1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / frame.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 5  # float64 colours alone would take 8


def test_a_batch_is_resized_frame_by_frame_to_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowad_fast.config import ImageConfig
    from flowad_fast.stages import image

    frames = torch.from_numpy(RNG.integers(0, 256, (3, 50, 41, 3), dtype=np.uint8))
    whole = image.normalise(frames, ImageConfig(size=32))
    monkeypatch.setattr(image, "FRAME_BY_FRAME", 10)
    torch.testing.assert_close(image.normalise(frames, ImageConfig(size=32)), whole, rtol=1e-5, atol=1e-5)
