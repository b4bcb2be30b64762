"""`make line-demo` with a tiny model: every outcome reaches every sink, and no process is left, also after Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

pytest.importorskip("elpv_dataset")
from flowad_fast.benchmarks.demo import judging, line_demo
from flowad_fast.benchmarks.measure.cases import random_model, spec_of
from flowad_fast.errors import MissingExtraError
from flowad_fast.line.settings import read_settings
from flowad_fast.line.sources import aravis
from flowad_fast.line.sources.gige import GigeSettings
from flowad_fast.stages.scorers import Inversion
from tests.line_servers import missing, only_camera, program

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(spec_of(32, 1, 2, backbone="efficientnet-lite0", size=64, invad=True), torch.device("cpu"))
    return judging.export(
        judging.Method("tiny", Inversion(steps=2)), tmp_path_factory.mktemp("bundles") / "tiny", model, "demo"
    )


def left(folder: Path) -> list[list[str]]:
    """Processes that know the folder."""
    found = []
    for one in psutil.process_iter():
        try:
            if any(str(folder) in word for word in one.cmdline()) and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one.cmdline())
        except psutil.Error:
            continue
    return found


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [False, True])
def test_every_outcome_reaches_every_sink_and_no_process_is_left(
    tmp_path: Path, bundle: Path, interrupted: bool
) -> None:
    program("mosquitto", "mosquitto")
    try:
        aravis.library()
    except MissingExtraError:
        missing("gir1.2-aravis-0.8 with python3-gi")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "flowad_fast.benchmarks.demo.line_demo", "--output", str(output)]
    # Longer than the camera's timeout: one that gives no frame at first is lost then, named, and connected again.
    command += ["--bundle", str(bundle), "--seconds", "60" if interrupted else "8"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    with only_camera():
        demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        try:
            if interrupted:
                end = time.monotonic() + 60
                told = ""
                while not all(f'"{camera}/' in told for camera in line_demo.PRODUCTS):
                    assert time.monotonic() < end and demo.poll() is None
                    time.sleep(0.05)
                    told = "".join(one.read_text() for one in output.glob("run-*/outcomes.jsonl"))
                demo.send_signal(signal.SIGINT)
            said, _ = demo.communicate(timeout=90)
        finally:
            demo.kill()
    assert demo.returncode == 0, said
    (run,) = output.glob("run-*")
    records = [json.loads(line) for line in (run / "outcomes.jsonl").read_text().splitlines()]
    counts = {camera: sum(one.get("camera") == camera for one in records) for camera in line_demo.PRODUCTS}
    assert all(counts.values()), said
    total = sum(counts.values())
    assert f"outcomes delivered: jsonl {total}, database {total}, opcua {total}, mqtt {total}" in said
    assert "GigE Vision on loopback" in said and read_settings(run / "line.yaml").sources["gige"].kind == "gige"
    shown = [one for one in records if one.get("camera") == "gige" and one["result"] != "source lost"]
    assert shown and all(one["stamp"] for one in shown), said
    assert not left(output)


@pytest.mark.long
def test_the_camera_in_software_shows_pictures_pixel_by_pixel(tmp_path: Path) -> None:
    try:
        aravis.library()
    except MissingExtraError:
        missing("gir1.2-aravis-0.8 with python3-gi")
    pictures = [np.random.default_rng(i).integers(0, 256, (64, 80), dtype=np.uint8) for i in range(3)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    command = [sys.executable, "-m", "flowad_fast.benchmarks.demo.cell_camera", str(tmp_path)]
    with only_camera(), open(os.devnull, "w") as nowhere:
        with line_demo.process(command, subprocess.PIPE, nowhere) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            again = subprocess.run(command, capture_output=True, text=True, timeout=30)
            assert again.returncode == 1 and "no camera can start there" in again.stderr
            settings = {"kind": "gige", "camera": "127.0.0.1", "region": [0, 0, 80, 64], "pixel_format": "Mono8"}
            camera = GigeSettings.model_validate(settings).open(tmp_path)
            shown: list[np.ndarray] = []
            end = time.monotonic() + 20
            while len(shown) < 4:
                assert time.monotonic() < end
                if (shot := camera.read(1)) is not None:
                    assert shot.frame is not None, shot.lost
                    shown.append(shot.frame)
            camera.close()
    for frame, picture in zip(shown, [*pictures, pictures[0]], strict=True):
        assert np.array_equal(frame, np.repeat(picture[..., None], 3, axis=2))


def test_without_aravis_both_cameras_are_folders_and_that_is_said(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> None:
        raise MissingExtraError("a gige source needs Aravis: apt-get install gir1.2-aravis-0.8")

    monkeypatch.setattr(aravis, "library", none)
    folders = {camera: line_demo.parts(tmp_path / product, product) for camera, product in line_demo.PRODUCTS.items()}
    names = sorted(path.name for path in folders["recorded"].iterdir())
    assert len(names) == 60 and sum("defective" in name for name in names) == 12
    with ExitStack() as stack:
        sources = line_demo.cameras(stack, folders, bundle, tmp_path)
    assert [one["kind"] for one in sources.values()] == ["recorded", "recorded"]
    text = " ".join(capsys.readouterr().out.split())
    assert "no GigE Vision camera: a gige source needs Aravis: apt-get install" in text


def test_the_parts_are_kept_for_the_next_run(tmp_path: Path) -> None:
    folder = line_demo.parts(tmp_path / "mono", "mono")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    assert line_demo.parts(folder, "mono") == folder
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    shutil.rmtree(folder)
