"""`flowad-inspect` with tiny real bundles: rows, resumption, classes, overlays, exit codes."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import flowad_fast
from flowad_fast.benchmarks.measure.cases import random_model, spec_of
from flowad_fast.cli import inspect as cli
from flowad_fast.data.images import find_images, read_frame
from flowad_fast.errors import ConfigError, FrameError
from flowad_fast.evaluation import inspection
from flowad_fast.evaluation.overlay import heat_range, overlay
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.frames import GoodParts
from flowad_fast.stages.scorers import Inversion

RNG = np.random.default_rng(0)


def picture(height=64, width=64):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_bundle(path, *, invad, good=True, aggregate="max"):
    model = random_model(spec_of(32, 2, 2, backbone="efficientnet-lite0", size=64, invad=invad), torch.device("cpu"))
    names = [""] if invad else list(model.class_names[:2])
    parts = [(picture(), name) for name in names for _ in range(6)]
    calibration = GoodParts([p for p, _ in parts], [n for _, n in parts], [str(i) for i in range(len(parts))])
    frames = np.stack([picture() for _ in range(3)])
    result = export_bundle(
        model, Inversion(steps=2), path, formats=("eager",), aggregate=aggregate, frames=frames,
        good=calibration if good else None, alpha=0.2, quiet=True,
    )  # fmt: skip
    assert result.ok
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "plain", invad=True)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "classes", invad=False)


@pytest.fixture
def folder(tmp_path):
    """Nine photos of two sizes at two depths, and six files that cannot be judged."""
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    for i in range(9):
        where = root / "deep" / "er" if i > 5 else root
        Image.fromarray(picture(48 if i % 3 else 64)).save(where / f"{i}.png")
    (root / "1_page.png").write_text("<html>404</html>")
    (root / "2_empty.jpg").touch()
    (root / "3_short.png").write_bytes((root / "3.png").read_bytes()[:200])
    Image.new("CMYK", (64, 64)).save(root / "4_print.jpg")
    Image.new("L", (64, 64), 0).save(root / "5_black.png")
    Image.fromarray(picture(20, 7)).save(root / "deep" / 'comma, "quote".png')
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    """Exit code, standard output and standard error of the command."""
    old, sys.argv = sys.argv, ["flowad-inspect", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = old
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_one_row_a_file_with_the_detectors_verdict(bundle, folder, tmp_path, capsys, format):
    target = tmp_path / f"r.{format}"
    code, out, _ = run(capsys, bundle, folder, "--output", target, "--format", format, "--batch", "4", "--json")
    assert code == 0
    rows = rows_of(target)
    assert [row["path"] for row in rows] == [str(path) for path in find_images(folder)]
    detector = flowad_fast.load(bundle)
    for row in rows:
        assert tuple(row) == inspection.COLUMNS and row["engine"] == "eager on cpu" and row["class"] == ""
        if row["status"] in ("error", "invalid"):
            assert row["reason"] and row["score"] in ("", None)
        else:
            detection = detector(read_frame(row["path"]))
            assert row["status"] == detection.verdict[0]
            assert float(row["score"]) == pytest.approx(float(detection.score[0]), rel=1e-4)
    status = {row["path"].rsplit("/", 1)[1]: row["status"] for row in rows}
    bad = {"1_page.png", "2_empty.jpg", "3_short.png", "4_print.jpg"}
    assert {name for name, s in status.items() if s == "error"} == bad and status["5_black.png"] == "invalid"
    summary = json.loads(out)
    assert summary["files"] == len(rows) == 15 and sum(summary["counts"].values()) == 15
    assert summary["counts"]["error"] == 4 and summary["from_earlier_runs"] == 0


def test_a_call_has_frames_of_one_size_and_results_keep_their_order(bundle, folder):
    inner = flowad_fast.load(bundle)
    shapes = []

    class Spy:
        class_names, conditional = (), False

        def __call__(self, frames, classes=None):
            shapes.append(frames.shape[:2])
            return inner(frames, classes)

    paths = [path for path in find_images(folder) if path.stem.isdigit()]
    results = list(inspection.inspect_files(Spy(), paths, batch=6))
    assert [r.path for r in results] == paths
    assert shapes == [(2, 64), (4, 48), (1, 64), (2, 48)]  # 0..5 and 6..8; every third is larger
    for result in results:
        assert np.array_equal(result.frame, read_frame(result.path))
        np.testing.assert_allclose(result.map, inner(result.frame).map[0], rtol=1e-3, atol=1e-3)


def test_scan_calls_once_per_size_and_class_of_a_window_and_keeps_errors_in_their_places():
    calls = []

    def detector(frames, classes):
        calls.append((frames.shape[1], classes))
        if "unheard" in classes:
            raise ConfigError("no such class")
        return frames[:, 0, 0, 0]

    class Files(list):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    frames = Files(np.full((size, 4, 3), i, np.uint8) for i, size in enumerate((4, 8, 4, 4, 4, 4, 8)))
    found = list(inspection.scan(detector, frames, ["a", "a", "a", "b", "a", "unheard", "a"], batch=5))
    assert calls == [(4, ["a", "a"]), (8, ["a"]), (4, ["b"]), (4, ["unheard"]), (8, ["a"])]
    assert [type(one) for one in (found[2], found[5])] == [FrameError, ConfigError]
    for i in (0, 1, 3, 4, 6):
        assert found[i].detection[found[i].place] == i and (found[i].frame == i).all()
    assert list(inspection.scan(detector, [])) == []


def test_frames_that_the_detector_refuses_are_error_rows(folder):
    class Picky:
        class_names, conditional = (), False

        def __call__(self, frames, classes=None):
            raise FrameError("the bundle takes\n 1x1 frames")

    (result, *_) = inspection.inspect_files(Picky(), [folder / "0.png"])
    assert (result.status, result.score, result.reason) == ("error", None, "the bundle takes 1x1 frames")


def test_the_same_command_goes_on_and_restart_starts_over(bundle, folder, tmp_path, capsys):
    target = tmp_path / "r.csv"
    run(capsys, bundle, folder, "--output", target)
    whole = target.read_text()
    lines = whole.splitlines(keepends=True)
    target.write_text("".join(lines[:6]))
    _, out, _ = run(capsys, bundle, folder, "--output", target, "--json")
    assert json.loads(out)["from_earlier_runs"] == 5 and sum(json.loads(out)["counts"].values()) == 15
    assert [row["path"] for row in rows_of(target)] == [str(path) for path in find_images(folder)]
    _, out, _ = run(capsys, bundle, folder, "--output", target, "--json")
    assert json.loads(out)["from_earlier_runs"] == 15
    _, out, _ = run(capsys, bundle, folder, "--output", target, "--restart", "--json")
    assert json.loads(out)["from_earlier_runs"] == 0 and len(rows_of(target)) == 15


@pytest.mark.parametrize("format", inspection.FORMATS)
def test_a_file_cut_anywhere_goes_on_without_losing_a_whole_row(tmp_path, format):
    names = ["a.png", 'b, "c".png', "line\nend.png", "ümlaut.png", "odd\udcff.png"]
    results = [inspection.Result(tmp_path / name, "good", 1.5 + i) for i, name in enumerate(names)]
    whole = tmp_path / "whole"
    ends = []
    with inspection.ResultFile(whole, format, "b", "e") as file:
        for result in results:
            file.append(result)
            ends.append(whole.stat().st_size)
    data = whole.read_bytes()
    assert ends[-1] == len(data)
    cut = tmp_path / "cut"
    for length in range(len(data) + 1):
        cut.write_bytes(data[:length])
        with inspection.ResultFile(cut, format, "b", "e") as file:
            done = len(file.rows)
            assert done == sum(end <= length for end in ends)
            assert [row["path"] for row in file.rows] == [str(r.path) for r in results[:done]]
            for result in results[done:]:
                file.append(result)
        assert cut.read_bytes() == data


@pytest.mark.parametrize("format", inspection.FORMATS)
@pytest.mark.parametrize("foreign", ["my,own,table\n1,2,3\n", '{"path": 3}\n', "path,status\n", "no line end", "\0\0"])
def test_a_file_that_is_something_else_is_refused_and_kept(tmp_path, format, foreign):
    path = tmp_path / "mine"
    path.write_text(foreign)
    with pytest.raises(ConfigError, match="no .* result file"):
        inspection.ResultFile(path, format, "b", "e")
    assert path.read_text() == foreign


def test_rows_of_another_bundle_are_refused(bundle, folder, tmp_path, capsys):
    target = tmp_path / "r.csv"
    run(capsys, bundle, folder, "--output", target)
    before = target.read_bytes()
    other = make_bundle(tmp_path / "other", invad=True)
    code, _, err = run(capsys, other, folder, "--output", target)
    assert code == 1 and "another model, scorer or calibration" in " ".join(err.split())
    assert target.read_bytes() == before


def test_classes_are_named_or_taken_from_folders(conditional, tmp_path, capsys):
    detector = flowad_fast.load(conditional)
    one, two = detector.class_names[:2]
    for name in (one, two, "unheard"):
        (tmp_path / "p" / name / "test").mkdir(parents=True)
        Image.fromarray(picture()).save(tmp_path / "p" / name / "test" / "0.png")
    target = tmp_path / "r.jsonl"
    code, _, _ = run(
        capsys, conditional, tmp_path / "p", "--class-from-folder", "--output", target, "--format", "jsonl"
    )
    assert code == 0
    rows = {row["class"]: row for row in rows_of(target)}
    assert rows["unheard"]["status"] == "error" and "not in the model" in rows["unheard"]["reason"]
    for name in (one, two):
        detection = detector(read_frame(rows[name]["path"]), name)
        assert rows[name]["status"] == detection.verdict[0]
        assert rows[name]["score"] == pytest.approx(float(detection.score[0]), rel=1e-4)
    code, _, err = run(capsys, conditional, tmp_path / "p", "--class", one, "--output", target, "--format", "jsonl")
    assert code == 1 and f"now it is '{one}'" in " ".join(err.split())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("conditional", [], "is conditional; give --class"),
        ("conditional", ["--class", "botle"], "did you mean 'bottle'"),
        ("conditional", ["--class", "bottle", "--class-from-folder"], "expected one of them"),
        ("bundle", ["--class", "bottle"], "is unconditional"),
        ("bundle", ["--format", "cvs"], "did you mean 'csv'"),
        ("bundle", ["--engine", "egaer"], "egaer"),
        ("bundle", ["--overlays", "photos/heat"], "would judge overlays"),
    ],
)
def test_contradictions_are_one_line_and_no_file(request, folder, tmp_path, capsys, kind, options, message):
    code, _, err = run(capsys, request.getfixturevalue(kind), folder, *options)
    assert code == 1 and message in " ".join(err.split()) and "Traceback" not in err
    assert not list(tmp_path.glob("inspection.*"))


def test_a_class_without_calibration_has_a_score_and_no_verdict(conditional, folder, tmp_path, capsys):
    name = flowad_fast.load(conditional).class_names[5]
    code, out, err = run(capsys, conditional, folder, "--class", name, "--json")
    assert code == 0 and err.count("uncalibrated:") == 1
    counts = json.loads(out)["counts"]
    assert counts == {"good": 0, "anomalous": 0, "uncalibrated": 10, "invalid": 1, "error": 4}
    rows = [row for row in rows_of(tmp_path / "inspection.csv") if row["status"] == "uncalibrated"]
    assert all(np.isfinite(float(row["score"])) and row["reason"] == "" for row in rows)


def test_diff_sum_without_calibration_says_why_there_is_no_score(folder, tmp_path, capsys):
    uncalibrated = make_bundle(tmp_path / "b", invad=True, good=False, aggregate="diff+sum")
    code, _, _ = run(capsys, uncalibrated, folder)
    assert code == 0
    rows = [row for row in rows_of(tmp_path / "inspection.csv") if row["status"] == "uncalibrated"]
    assert len(rows) == 10 and all(row["score"] == "" and "calibrat" in row["reason"] for row in rows)


def test_overlays_share_the_scale_that_the_folder_keeps(bundle, folder, tmp_path, capsys):
    heat = tmp_path / "heat"
    code, _, _ = run(capsys, bundle, folder, "--overlays", heat)
    assert code == 0
    rows = [row for row in rows_of(tmp_path / "inspection.csv") if row["score"]]
    pictures = sorted(heat.rglob("*.png"))
    assert len(pictures) == len(rows) == 10
    scale = json.loads((heat / inspection.SCALE).read_text())
    low, high = scale["ranges"][""]
    detector = flowad_fast.load(bundle)
    threshold = detector.calibration.classes[""].threshold
    assert high - threshold == pytest.approx(threshold - low)
    shown = np.asarray(Image.open(heat / "deep" / "er" / "7.png.png"))
    frame = read_frame(folder / "deep" / "er" / "7.png")
    expected = overlay(frame, detector(frame).map[0], low, high)
    assert np.abs(shown.astype(int) - expected).max() <= 1
    before = (heat / inspection.SCALE).read_text()
    Image.fromarray(picture()).save(folder / "new.png")
    run(capsys, bundle, folder, "--overlays", heat)
    assert (heat / "new.png.png").exists() and (heat / inspection.SCALE).read_text() == before
    other = make_bundle(tmp_path / "other", invad=True)
    code, _, err = run(capsys, other, folder, "--overlays", heat, "--output", tmp_path / "o.csv")
    assert code == 1 and "choose another --overlays" in " ".join(err.split())


WITHOUT_EXTRAS = """
import sys
from pathlib import Path

for name in "torch torchvision timm safetensors onnx sklearn scipy matplotlib jinja2 psutil".split():
    sys.modules[name] = None  # an import of it is an error

import numpy as np
from flowad_fast.cli import inspect
from flowad_fast.detector import Detection
from flowad_fast.evaluation.inspection import OverlayFolder, ResultFile, inspect_files

class Detector:
    aggregate, calibration = "max", None

    def __call__(self, frames, classes=None):
        map = frames[:, :32, :32, 0].astype(np.float32)
        return Detection(map, map.max((1, 2)), ("",) * len(map), (None,) * len(map), "fake")

root, out = Path(sys.argv[1]), Path(sys.argv[2])
paths = [root / f"{i}.png" for i in range(6)]
with OverlayFolder(out / "heat", "b") as heat, ResultFile(out / "r.csv", "csv", "b", "fake") as file:
    draw = heat.writer(Detector(), root, dict.fromkeys(paths, ""))
    for result in inspect_files(Detector(), paths):
        draw(result)
        file.append(result)
"""


def test_inspection_needs_neither_torch_nor_the_extras(folder, tmp_path):
    subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS, str(folder), str(tmp_path)], check=True, timeout=60)
    rows = rows_of(tmp_path / "r.csv")
    assert [row["status"] for row in rows] == ["uncalibrated"] * 6 and all(float(row["score"]) > 0 for row in rows)
    assert len(list((tmp_path / "heat").glob("*.png"))) == 6


def test_heat_range():
    maps = np.arange(11, dtype=np.float32).reshape(1, 1, 11)
    assert heat_range(maps) == (5, 10)
    assert heat_range(maps, threshold=8) == (5, 11)
    assert heat_range(np.ones((2, 3, 3), np.float32)) == (1, 2)


@dataclass
class Job:
    """The command in a process of its own, on many photos, stopped by a signal when some rows are there."""

    arguments: list[str]
    target: object

    def stop_with(self, number, rows):
        process = subprocess.Popen([sys.executable, "-m", "flowad_fast.cli.inspect", *self.arguments],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            deadline = time.monotonic() + 120
            while not (self.target.exists() and self.target.read_bytes().count(b"\n") > rows):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(number)
            return process.wait(timeout=60)
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_stopped_job_leaves_a_whole_file_and_goes_on(bundle, tmp_path, capsys, number, code):
    root = tmp_path / "many"
    root.mkdir()
    for i in range(160):
        Image.fromarray(picture(40, 40)).save(root / f"{i:03d}.bmp")
    target = tmp_path / "r.csv"
    arguments = [str(bundle), str(root), "--output", str(target), "--batch", "1"]
    assert Job(arguments, target).stop_with(number, 5) == code
    done = target.read_bytes().count(b"\n") - 1
    assert 5 <= done < 160
    _, out, _ = run(capsys, *arguments, "--json")
    assert json.loads(out)["from_earlier_runs"] >= done - 1
    assert [row["path"] for row in rows_of(target)] == [str(path) for path in sorted(root.iterdir())]
