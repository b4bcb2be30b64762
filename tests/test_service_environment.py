"""Users without a name, forks, pickles, few cores, read-only bundles, and libraries that report on their use."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from flowad_fast import bundle
from flowad_fast.bundle import Artefact, Manifest
from flowad_fast.config import ImageConfig, ModelConfig, VelocityConfig
from flowad_fast.detector import Detector, load
from flowad_fast.engines import Engine, cores
from flowad_fast.errors import BundleError, EngineUnavailableError
from flowad_fast.files import sha256
from flowad_fast.stages.scorers import Inversion

ROOT = Path(__file__).parent.parent
SPEC = ModelConfig(
    velocity=VelocityConfig(channels=192, height=4, width=4, hidden_size=32, depth=1, num_heads=2, mlp_ratio=2),
    image=ImageConfig(size=64),
    backbone="efficientnet-lite0",
)


class Brightness(Engine):
    name, device = "brightness", "cpu"

    def run(self, frames: np.ndarray, y: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return frames.max(3).astype(np.float32), frames.max((1, 2, 3)).astype(np.float32)


@pytest.fixture
def onnx_bundle(tmp_path: Path) -> Path:
    """A bundle of one graph of a detector's form: the map is each pixel's largest channel."""
    value, node = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["frames"], ["x"], to=TensorProto.FLOAT),
            node("ReduceMax", ["x", "last"], ["map"], keepdims=0),
            node("ReduceMax", ["map", "plane"], ["score"], keepdims=0),
        ],
        "largest",
        [value("frames", TensorProto.UINT8, ["b", "h", "w", 3])],
        [value("map", TensorProto.FLOAT, ["b", "h", "w"]), value("score", TensorProto.FLOAT, ["b"])],
        [onnx.numpy_helper.from_array(np.array([3]), "last"), onnx.numpy_helper.from_array(np.array([1, 2]), "plane")],
    )
    folder = tmp_path / "b"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)]), path)
    artefact = Artefact(engine="onnxruntime", files={path.name: sha256(path)})
    bundle.write_manifest(
        folder,
        Manifest(project_version="0", created=bundle.now(), source={}, model=SPEC, scorer=Inversion(),
                 artefacts={"onnx": artefact}),
    )  # fmt: skip
    return folder


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code as a user without a name where that is possible, with nothing else in its environment."""
    root = hasattr(os, "geteuid") and not os.geteuid() and shutil.which("setpriv")
    nobody = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"] if root else []
    return subprocess.run(
        [*nobody, sys.executable, "-c", code, *map(str, arguments)], cwd="/", capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}, timeout=200,
    )  # fmt: skip


JUDGE = """
import sys, numpy as np, flowad_fast
print(flowad_fast.load(sys.argv[1])(np.full((64, 64, 3), 99, np.uint8)).score)
loaded = {"timm", "torch._dynamo"} & set(sys.modules)
assert not loaded, loaded
"""


def readable(folder: Path) -> Path:
    """A copy of the bundle that every user can read and only its owner can write."""
    place = Path("/tmp") / f"flowad-test-{os.getpid()}"
    shutil.copytree(folder, place, dirs_exist_ok=True)
    place.chmod(0o755)
    for file in place.iterdir():
        file.chmod(0o644)
    return place


@pytest.mark.skipif(os.name != "posix", reason="user numbers are a POSIX matter")
def test_user_without_a_name_and_home_runs_an_onnx_bundle_without_timm(onnx_bundle: Path) -> None:
    place = readable(onnx_bundle)
    try:
        done = run(JUDGE, place)
        assert (done.returncode, done.stdout, done.stderr) == (0, "[99.]\n", "")
    finally:
        shutil.rmtree(place)


@pytest.mark.skipif(os.name != "posix", reason="user numbers are a POSIX matter")
def test_user_without_a_name_and_home_imports_timm_and_matplotlib_without_a_word() -> None:
    done = run("import flowad_fast, timm, matplotlib, torch._inductor.codecache")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_after_load_is_one_error_at_once_for_every_engine() -> None:
    detector = Detector(Brightness(), SPEC)
    camera, frame = detector.camera(), np.full((64, 64, 3), 99, np.uint8)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for call in (detector, camera, lambda _: detector.prepare(64, 64)):
            try:
                call(frame)
            except EngineUnavailableError as error:
                os.write(writer, f"{error}\n".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        lines = said.read().splitlines()
    os.waitpid(child, 0)
    wanted = f"loaded in process {os.getpid()} and is called in {child}, a fork"
    assert len(lines) == 3 and all(wanted in line and "load the bundle in the child" in line for line in lines)
    assert detector(frame).score == [99]


def test_a_detector_that_is_pickled_says_what_to_send() -> None:
    detector = Detector(Brightness(), SPEC)
    for one in (detector, detector.camera()):
        with pytest.raises(TypeError, match="cannot be pickled or copied; send the bundle's path"):
            pickle.dumps(one)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 1),
        ({"proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n0::/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"proc/self/cgroup": "1:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ({}, 8),
    ],
)  # fmt: skip
def test_the_containers_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], wanted: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores.available_cores(tmp_path) == wanted


def test_cores_can_be_limited_by_argument_variable_and_quota(
    onnx_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def threads(given: int | None = None) -> int:
        engine = load(onnx_bundle, device="cpu", threads=given).running()
        return engine.session.get_session_options().intra_op_num_threads  # type: ignore[attr-defined]

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(cores, "available_cores", lambda: 3)
    assert threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert threads() == 2
    assert threads(1) == 1


def test_torch_is_held_to_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        cores.bind_torch(2)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(cores, "limit", lambda threads: 1)
        cores.bind_torch(None)
        assert torch.get_num_threads() == 1
        monkeypatch.setattr(cores, "limit", lambda threads: 9)
        cores.bind_torch(None)  # never raised
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(os.name != "posix", reason="user numbers are a POSIX matter")
def test_a_read_only_bundle_is_refused_before_it_is_locked(onnx_bundle: Path) -> None:
    place = readable(onnx_bundle)
    code = """
import sys
from flowad_fast import bundle
try:
    with bundle.editing(sys.argv[1]): print("inside")
except bundle.BundleError as error: print(error)
"""
    try:
        if os.geteuid():
            place.chmod(0o555)
        said = run(code, place).stdout
        assert "cannot be written (Permission denied); copy the bundle" in said and said.count("\n") == 1
    finally:
        place.chmod(0o755)
        shutil.rmtree(place)


def test_a_bundle_that_is_edited_is_locked(onnx_bundle: Path) -> None:
    with bundle.editing(onnx_bundle), pytest.raises(BundleError, match="another export is writing"):
        with bundle.locked(onnx_bundle):
            pass


@pytest.mark.parametrize("said", [None, "", "0"])
def test_telemetry_of_onnx_runtime_is_off_and_leaves_no_files(
    onnx_bundle: Path, tmp_path: Path, said: str | None
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    given = {} if said is None else {"ORT_DISABLE_TELEMETRY": said}
    code = "import os, flowad_fast; print(os.environ['ORT_DISABLE_TELEMETRY'])" if said == "0" else JUDGE
    done = subprocess.run(
        [sys.executable, "-c", code, str(onnx_bundle)], capture_output=True, text=True, timeout=200,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), **given},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n" if said == "0" else "[99.]\n", "")
    assert not [file for file in home.rglob("*") if file.is_file()]


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_nothing_leaves_the_machine(onnx_bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "calls"
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=connect,sendto", "-o", str(trace), sys.executable, "-c",
         JUDGE + "import time; time.sleep(3)", str(onnx_bundle)],
        capture_output=True, text=True, timeout=300,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "AF_INET" not in trace.read_text()


@pytest.mark.skipif(os.name != "posix", reason="folders are made unwritable the POSIX way")
def test_no_folder_for_temporary_files_is_one_line_and_the_traceback_is_there_for_who_asks(tmp_path: Path) -> None:
    app = (
        "import tempfile, typer; from flowad_fast.cli import common\n"
        "app = typer.Typer(pretty_exceptions_enable=False)\n"
        "@app.command()\n"
        "def work():\n"
        "    tempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"
        "    tempfile.mkdtemp()\n"
        "common.run(app)"
    )
    for variable in ({}, {"FLOWAD_FAST_TRACEBACK": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", app], capture_output=True, text=True, timeout=100,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variable,
        )  # fmt: skip
        assert done.returncode == 1
        assert "No usable temporary directory found" in done.stderr
        assert ("Traceback" in done.stderr) is bool(variable)
        assert (len(done.stderr.splitlines()) == 1) is not bool(variable), done.stderr
