import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import Fake, names, perturbed, photos, raising, save, tiny, tree

from flowad_fast import bundle
from flowad_fast.checkpoints.load import save_checkpoint
from flowad_fast.cli import common
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.export import cli
from flowad_fast.export.formats import FORMATS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit code, standard output, standard error with line breaks made spaces."""

    monkeypatch.setattr(common.out, "width", 200)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flowad-export", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(code or 0), out, " ".join(err.split())  # type: ignore[call-overload]

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(tiny(), path, include_backbone=True)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save(folder / "good", photos(9))
    save(folder / "scratch", photos(3, seed=1))
    return folder


@pytest.fixture(scope="module")
def made(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the format eager; tests do not change it."""
    target = tmp_path_factory.mktemp("made") / "b"
    command = [sys.executable, "-m", "flowad_fast.export.cli", "make", checkpoint, "--format", "eager", "--data", data]
    done = subprocess.run(
        [*map(str, command), "--output", str(target), "--device", "cpu"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return target


def test_a_bundle_in_one_command(run: Run, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "make", checkpoint, "--format", "eager", "--data", data, "--output", tmp_path / "b", "--scorer",
        "reconstruction", "--steps", 2, "--calibrate", data / "good", "--alpha", 0.1,
    )  # fmt: skip
    assert code == 0, err
    assert "Reconstruction(steps=2" in out and "ok" in out
    assert f"bundle: {tmp_path / 'b'}" in out
    assert "from 9 good parts, false-reject rate at most 0.1" in out
    _, manifest = bundle.read(tmp_path / "b")
    assert manifest.source["file"] == "tiny.safetensors" and len(manifest.source["sha256"]) == 64
    parity = manifest.artefacts["eager"].parity
    assert parity is not None and parity.source.startswith("labelled frames of the folder")
    assert parity.auroc_difference == 0


def test_probes_are_chosen_by_measured_noise(run: Run, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    arguments = (
        "make",
        checkpoint,
        "--scorer",
        "density",
        "--steps",
        2,
        "--probes",
        "auto",
        "--format",
        "eager",
        "--data",
        data,
    )
    code, out, err = run(*arguments, "--output", tmp_path / "b", "--json")
    assert code == 0, err
    _, manifest = bundle.read(tmp_path / "b")
    choice = manifest.probe_choice
    assert choice is not None and manifest.scorer.probes == choice["probes"]  # type: ignore[union-attr]
    assert choice["measured_share"] <= choice["share"] and choice["frames"] == 8
    code, out, _ = run(
        *arguments, "--output", tmp_path / "c", "--calibrate", data / "good", "--alpha", 0.1, "--dry-run", "--json"
    )
    assert code == 0 and json.loads(out)["probe_choice"]["frames"] == 8
    assert names(tmp_path) == {"b"}


def test_json_alone_on_standard_output(run: Run, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    code, out, _ = run("make", checkpoint, "--format", "eager", "--data", data, "--output", tmp_path / "b", "--json")
    result = json.loads(out)
    assert (code, result["ok"], result["published"], result["rejected"]) == (0, True, str(tmp_path / "b"), None)
    assert result["formats"]["eager"]["status"] == "ok"
    assert result["formats"]["eager"]["artefact"]["parity"]["passed"] is True
    assert result["manifest"] == json.loads((tmp_path / "b" / "manifest.json").read_text())


def test_a_failing_format_gives_exit_code_1_and_keeps_the_rest(
    run: Run, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = raising(EngineUnavailableError("needs the package tensorrt: pip install tensorrt"))
    monkeypatch.setitem(FORMATS, "wrong", Fake(perturbed(0.05)))
    monkeypatch.setitem(FORMATS, "absent", Fake(missing, "tensorrt"))
    arguments = ("make", checkpoint, "--format", "eager,wrong,absent", "--data", data, "--output", tmp_path / "b")
    code, out, err = run(*arguments)
    assert code == 1
    assert "wrong: failed parity: map error" in out
    assert "absent: not available: needs the package tensorrt: pip install tensorrt" in out
    assert f"not ok: wrong, absent; kept as {tmp_path / 'b.rejected'}; the others are published" in err
    assert set(bundle.read(tmp_path / "b")[1].artefacts) == {"eager"}
    code, out, _ = run(*arguments, "--json")
    result = json.loads(out)
    assert code == 1 and result["ok"] is False
    assert {name: one["status"] for name, one in result["formats"].items()} == {
        "eager": "ok", "wrong": "failed parity", "absent": "not available",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--format", "onx"), "unknown format 'onx'; did you mean 'onnx'?"),
        (("--scorer", "inversoin"), "unknown scorer 'inversoin'; did you mean 'inversion'?"),
        (("--aggregate", "maxx"), "unknown aggregate 'maxx'; did you mean 'max'?"),
        (("--precision", "fp23"), "unknown precision 'fp23'; did you mean 'fp"),
        (("--batch", "8:1:2"), "expected 1 <= MIN <= OPT <= MAX"),
        (("--frame-size", "big"), "expected 'any' or HEIGHTxWIDTH"),
        (("--device", "gpu"), "expected auto, cpu, cuda or cuda:N"),
        (("--scorer", "density", "--probes", "many"), "probes: Input should be a valid integer"),
        (("--steps", 0), "--scorer inversion: steps: Input should be greater than 0"),
        (("--scorer", "reconstruction", "--start", "noize"), "start: Input should be 'noise' or 'inversion'"),
        (("--scorer", "reconstruction", "--tau", 1.5), "tau: Input should be less than 1"),
        (("--tau", 0.3), "--tau belongs to reconstruction and mismatch, not inversion; leave it out"),
        (("--probes", "auto"), "--probes belongs to density, not inversion"),
        (("--scorer", "density", "--power", 1), "--power belongs to inversion, not density"),
        (("--steps", 3, "--evaluations", 3), "got --steps and --evaluations, expected one of them"),
        (("--scorer", "reconstruction", "--start", "inversion", "--evaluations", 3), "near it are 2 and 4"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_work(
    run: Run, checkpoint: Path, tmp_path: Path, options: tuple[object, ...], hint: str
) -> None:
    code, out, err = run("make", checkpoint, "--output", tmp_path / "b", *options)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and hint in err
    assert names(tmp_path) == set()


def test_a_mistyped_option_name_gives_the_nearest(run: Run) -> None:
    code, _, err = run("make", "demo", "--formt", "onnx")
    assert code == 2 and "--format" in err


def test_dry_run_validates_and_writes_nothing(run: Run, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    arguments = ("make", checkpoint, "--format", "eager", "--data", data, "--output", tmp_path / "b", "--dry-run")
    code, out, _ = run(*arguments, "--json", "--calibrate", data / "good", "--alpha", 0.1)
    plan = json.loads(out)
    assert code == 0 and plan["target"] == str(tmp_path / "b")
    assert plan["formats"] == {"eager": "ok"} and plan["good_parts"] == 9
    code, _, err = run(*arguments, "--calibrate", data / "good")
    assert code == 1 and "9 good parts are too few for a false-reject rate of 0.01: at least 99 are needed" in err
    assert names(tmp_path) == set()


def test_a_target_that_is_no_bundle_is_refused_before_any_work(run: Run, data: Path) -> None:
    before = tree(data)
    code, _, err = run("make", "demo", "--output", data)
    assert code == 1 and "exists and is no bundle; choose another --output" in err
    assert tree(data) == before


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.pth", b"", "it is empty"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS pointer"),
        ("a.pth", b"<!DOCTYPE html><html>", "HTML or XML page"),
        ("a.pth", b"PK\3\4 truncated", "truncated or damaged zip archive"),
        ("a.safetensors", b"\xff" * 64, "not a safetensors file"),
        ("a.pth", None, "no such file"),
    ],
)
def test_a_bad_checkpoint_is_one_line(
    run: Run, tmp_path: Path, checkpoint: Path, name: str, content: bytes | None, hint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if name.endswith(".safetensors"):
        path.with_suffix(".json").write_text(checkpoint.with_suffix(".json").read_text())
    before = tree(tmp_path)
    code, out, err = run("make", path, "--output", tmp_path / "b")
    assert (code, out) == (1, "")
    assert hint in err and name in err and "Traceback" not in err
    assert tree(tmp_path) == before


def test_bad_frames_are_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    code, _, err = run("make", checkpoint, "--data", folder, "--output", tmp_path / "b")
    assert code == 1 and "no image files found" in err
    (folder / "x.png").write_bytes(b"no image")
    code, _, err = run("make", checkpoint, "--data", folder, "--output", tmp_path / "b")
    assert code == 1 and "x.png" in err
    assert names(tmp_path) == {"frames"}


def test_show(run: Run, made: Path) -> None:
    code, out, _ = run("show", made)
    assert code == 0 and "hashes ok" in out and "calibration: none" in out
    code, out, _ = run("show", made, "--json")
    assert code == 0
    assert json.loads(out)["manifest"] == json.loads((made / "manifest.json").read_text())


def test_verify_checks_hashes_and_parity(run: Run, made: Path, data: Path) -> None:
    code, out, _ = run("verify", made, "--data", data, "--json")
    result = json.loads(out)
    assert code == 0 and result["ok"] is True
    assert result["formats"]["eager"]["status"] == "ok"
    code, out, _ = run("verify", made, "--data", data)
    assert code == 0 and "ok" in out


def test_verify_finds_one_altered_byte(run: Run, made: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    copy.mkdir()
    for path in made.iterdir():
        content = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            content[-5] ^= 1
        (copy / path.name).write_bytes(content)
    for command in (("verify", copy, "--data", data), ("show", copy)):
        code, out, err = run(*command)
        assert (code, out) == (1, "")
        assert "altered or damaged" in err


def test_verify_without_the_model_says_what_it_did_not_check(run: Run, made: Path, data: Path, tmp_path: Path) -> None:
    _, manifest = bundle.read(made)
    only = {"other": manifest.artefacts["eager"]}
    with bundle.writing(tmp_path / "b") as aside:
        for file in only["other"].files:
            (aside / file).write_bytes((made / file).read_bytes())
        bundle.write_manifest(aside, manifest.model_copy(update={"artefacts": only}))
        bundle.publish(aside, tmp_path / "b")
    code, out, _ = run("verify", tmp_path / "b")
    assert code == 0 and "parity: not re-checked" in " ".join(out.split())
    code, _, err = run("verify", tmp_path / "b", "--data", data)
    assert code == 1 and "needs the model, which the format eager holds" in err


def test_calibrate_an_existing_bundle(run: Run, made: Path, data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    before = tree(copy)
    code, out, err = run("calibrate", copy, data / "good", "--alpha", 0.1)
    assert code == 0, err
    assert "from 9 good parts" in out
    after = tree(copy)
    assert {name for name in after if after[name] != before[name]} == {"manifest.json", "README.md"}
    code, _, err = run("calibrate", copy, data / "good")
    assert code == 1 and "at least 99 are needed" in err
    assert tree(copy) == after


def test_defective_calibration_parts_are_warned_about(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "b"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    calm = np.full((12, 72, 64, 3), 120, np.uint8) + np.random.RandomState(0).randint(0, 4, (12, 72, 64, 3), np.uint8)
    calm[11] = photos(1)[0]
    save(tmp_path / "good", calm)
    code, _, err = run("calibrate", copy, tmp_path / "good", "--alpha", 0.1)
    assert code == 0
    assert re.search(r"warning: 1 of 12 calibration parts score far above the others and may be defective: 11.png", err)


def test_a_bundle_is_no_checkpoint(run: Run, made: Path) -> None:
    code, _, err = run("make", made)
    assert code == 1 and "is a bundle already; give a checkpoint, or use show, verify or calibrate" in err


def test_a_checkpoint_is_no_bundle(run: Run, checkpoint: Path) -> None:
    code, _, err = run("show", checkpoint)
    assert code == 1 and "no bundle: there is no manifest.json" in err


def test_ctrl_c_leaves_nothing_behind(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flowad_fast.export.cli", "make", checkpoint, "--format", "onnx", "--data", data]
    process = subprocess.Popen(
        [*map(str, command), "--output", str(tmp_path / "b")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any(path.name.startswith(".b.new-") for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err and out == ""
    assert names(tmp_path) == set()


def test_the_classes_of_a_conditional_model_are_folders(run: Run, data: Path, tmp_path: Path) -> None:
    save_checkpoint(tiny(classes=2), tmp_path / "two.safetensors", include_backbone=True)
    save(tmp_path / "parts" / "nut", photos(9))
    save(tmp_path / "parts" / "screw", photos(9, seed=2))
    code, out, err = run(
        "make", tmp_path / "two.safetensors", "--format", "eager", "--data", data, "--output", tmp_path / "b",
        "--calibrate", tmp_path / "parts", "--alpha", 0.1,
    )  # fmt: skip
    assert code == 0, err
    assert "calibration: nut: threshold" in out and "calibration: screw: threshold" in out
    assert torch.tensor([c.parts for c in bundle.read(tmp_path / "b")[1].calibration.classes.values()]).sum() == 18  # type: ignore[union-attr]


def test_evaluations_become_steps(run: Run, checkpoint: Path, data: Path) -> None:
    code, out, _ = run(
        "make", checkpoint, "--scorer", "reconstruction", "--evaluations", 3, "--data", data, "--dry-run", "--json"
    )
    assert code == 0 and "steps=6, tau=0.5" in json.loads(out)["scorer"]


def test_the_form_without_a_command_works_and_names_the_new_one(
    run: Run, checkpoint: Path, made: Path, data: Path, tmp_path: Path
) -> None:
    note = "note: write flowad-export {} ...; the form without a command goes with the next release"
    arguments = (checkpoint, "--format", "eager", "--data", data, "--output", tmp_path / "b", "--alpha", 0.1)
    code, out, err = run("--scorer", "density", "--probes", 2, *arguments, "--calibrate", data / "good", "--json")
    assert code == 0 and json.loads(out)["ok"] is True and note.format("make CHECKPOINT") in err
    for flags, form in (
        (("--inspect",), "show BUNDLE"),
        (("--verify", "--data", data), "verify BUNDLE"),
        (("--calibrate", data / "good", "--alpha", 0.1), "calibrate BUNDLE GOOD_FOLDER"),
    ):
        code, out, err = run(tmp_path / "b", *flags, "--json")
        assert code == 0 and json.loads(out)["manifest"]["scorer"]["probes"] == 2 and err == note.format(form)
    code, out, err = run(checkpoint, "--tau", 0.3)
    assert (code, out) == (1, "") and "--tau belongs to reconstruction and mismatch, not inversion" in err
    code, _, err = run(made)
    assert code == 1 and "is a bundle already" in err


LIGHT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
sys.argv[:] = ["flowad-export", *{arguments!r}]
from flowad_fast.export import cli
cli.main()
"""
HEAVY = (
    "torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript", "onnx_ir", "ml_dtypes", "scipy", "sklearn",
    "matplotlib", "jinja2", "psutil",
)  # fmt: skip


def light(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in a process where only the light runtime's packages can be imported."""
    code = LIGHT.format(blocked=HEAVY, arguments=[str(one) for one in arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_show_verify_and_calibrate_need_no_torch(run: Run, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    target = tmp_path / "b"
    assert run("make", checkpoint, "--data", data, "--output", target)[0] == 0
    done = light("show", target, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ok"] is True, done.stderr
    done = light("verify", target, "--json")
    assert done.returncode == 0, done.stderr
    says = "parity: not re-checked: re-checking parity needs torch, torchvision, timm, safetensors: pip install"
    assert json.loads(done.stdout)["doubt"] == f'{says} "flowad-fast[model]"'
    done = light("calibrate", target, data / "good", "--alpha", 0.1, "--json")
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["manifest"]["calibration"]["classes"].values()
    assert one["parts"] == 9 and bundle.read(target)[1].calibration is not None
    done = light("verify", target, "--data", data)
    assert done.returncode == 1 and "re-checking parity needs torch" in done.stderr
    done = light("make", checkpoint)
    needs = "flowad-export make needs torch, torchvision, timm, safetensors, onnx, onnxscript"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f'error: MissingExtraError: {needs}: pip install "flowad-fast[model]"\n'


def test_help_names_every_format(run: Run) -> None:
    code, out, _ = run("make", "--help")
    assert code == 0
    for name, one in FORMATS.items():
        assert f"{name}: {one.description[:10]}" in " ".join(re.sub("[│╭╮╰╯─]", " ", out).split())
