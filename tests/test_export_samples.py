"""The programs in C# and C++ that judge a frame with a bundle's ONNX graph, beside what Python says.

ONNX Runtime's headers and .NET are on few machines. Where the headers are, the C++ program is built and compared with
Python. Everywhere, it is built against a stand-in of the library that gives fixed outputs, and both programs are
checked against the manifest's schema.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from test_export import good, photos, tiny

import flowad_fast
from flowad_fast import bundle
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.location import split
from flowad_fast.stages.frames import invalid_frames
from flowad_fast.stages.scorers import Inversion

EXPORT = Path(__file__).parents[1] / "export"
CPP, CSHARP = EXPORT / "cpp" / "onnx", EXPORT / "csharp"
JSON_HEADER = Path("/usr/include/nlohmann/json.hpp")
HEADERS = [EXPORT.parent / "build" / "onnxruntime-headers", Path("/usr/include/onnxruntime"), Path("/usr/include")]
"""Where ONNX Runtime's C++ headers may lie; the first is where CI unpacks Debian's."""
STAND_IN = """
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>
enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR };
enum OrtAllocatorType { OrtArenaAllocator };
enum OrtMemType { OrtMemTypeDefault };
namespace Ort {
struct Env { Env(OrtLoggingLevel, const char*) {} };
struct SessionOptions {};
struct RunOptions {};
struct MemoryInfo { static MemoryInfo CreateCpu(OrtAllocatorType, OrtMemType) { return {}; } };
struct Info { size_t count; size_t GetElementCount() const { return count; } };
struct Value {
  std::vector<float> data;
  explicit Value(std::vector<float> given = {}) : data(std::move(given)) {}
  Value(Value&&) = default;
  template <class T> static Value CreateTensor(const MemoryInfo&, T*, size_t, const int64_t*, size_t) {
    return Value();
  }
  template <class T> const T* GetTensorData() const { return data.data(); }
  Info GetTensorTypeAndShapeInfo() const { return {data.size()}; }
};
struct Session {
  Session(Env&, const char*, const SessionOptions&) {}
  std::vector<Value> Run(const RunOptions&, const char* const*, const Value*, size_t, const char* const*, size_t) {
    std::vector<Value> outputs;
    outputs.emplace_back(std::vector<float>{1, 2});
    outputs.emplace_back(std::vector<float>{SCORE});
    return outputs;
  }
};
}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("samples") / "b"
    parts = good(29, ("nut", "screw"))
    statistics, rest = split(parts, 0.1, "max")
    result = export_bundle(
        tiny(2), Inversion(), target, formats=("triton-server", "onnx"), frames=photos(3), good=rest, alpha=0.1,
        location=statistics, quiet=True,
    )  # fmt: skip
    assert result.ok
    return target


def judge(program: Path, made: Path, frame: np.ndarray, folder: Path, *rest: object) -> Any:
    Image.fromarray(frame).save(folder / "part.ppm")
    done = subprocess.run([program, made, folder / "part.ppm", *map(str, rest)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") or (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr


def needs(*headers: Path) -> None:
    if shutil.which("g++") is None or not all(header.is_file() for header in headers):
        pytest.skip(f"needs g++ and {', '.join(map(str, headers))} (Debian: apt-get install g++ nlohmann-json3-dev)")


@pytest.mark.parametrize("scale", [0.5, 2.0], ids=("below", "above"))
def test_the_cpp_program_decides_as_python(made: Path, tmp_path: Path, scale: float) -> None:
    needs(JSON_HEADER)
    calibration = bundle.read(made)[1].calibration
    assert calibration is not None
    score = float(np.float32(scale * calibration.classes["screw"].threshold))
    (tmp_path / "onnxruntime_cxx_api.h").write_text(STAND_IN.replace("SCORE", f"{score!r}f"))
    program = tmp_path / "judge"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", CPP / "main.cpp", "-o", program]
    subprocess.run(command, check=True)
    got = judge(program, made, photos(1)[0], tmp_path, "screw")
    assert got["verdict"] == ("good" if scale < 1 else "anomalous") and got["score"] == pytest.approx(score)
    for value in (0, 255, 120):
        frame = np.full((64, 64, 3), value, np.uint8)
        got = judge(program, made, frame, tmp_path, "nut")
        assert got["verdict"] == "invalid" and str(invalid_frames(frame[None])[0]).startswith(got["reason"])
    assert "the model is conditional" in judge(program, made, photos(1)[0], tmp_path)
    assert "class nail is not in the model" in judge(program, made, photos(1)[0], tmp_path, "nail")
    assert "at least 16x16" in judge(program, made, photos(1)[0][:8], tmp_path, "nut")


def test_the_cpp_program_agrees_with_python(made: Path, tmp_path: Path) -> None:
    include = next((folder for folder in HEADERS if (folder / "onnxruntime_cxx_api.h").is_file()), None)
    if include is None:
        pytest.skip("needs ONNX Runtime's C++ headers (Debian 13: apt-get install libonnxruntime-dev)")
    needs(JSON_HEADER)
    # Python's own copy of the library, whose interface is that of every later version of the headers' or a later one.
    library = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    (tmp_path / library.name).symlink_to(library)
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    where = [f"-DORT_INCLUDE={include}", f"-DORT_LIBRARY={tmp_path / library.name}"]
    for command in (["cmake", "-S", CPP, "-B", tmp_path, *where], ["cmake", "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    frame = photos(1)[0]
    expected = flowad_fast.load(made, device="cpu")(frame, "screw")
    got = judge(tmp_path / "flowad_judge", made, frame, tmp_path, "screw")
    assert got["score"] == pytest.approx(float(expected.score[0]), rel=1e-4)
    assert got["verdict"] == expected.verdict[0]


@pytest.mark.parametrize(
    ("source", "pattern"),
    [(CPP / "main.cpp", r'\.at\("(\w+)"\)'), (CSHARP / "Program.cs", r'GetProperty\("(\w+)"\)')],
    ids=("cpp", "csharp"),
)
def test_the_programs_read_what_manifests_have_and_judge_frames_alike(source: Path, pattern: str) -> None:
    text = source.read_text(encoding="utf-8")
    schema = bundle.Manifest.model_json_schema()
    known = {name for one in (schema, *schema["$defs"].values()) for name in one.get("properties", {})}
    read = set(re.findall(pattern, text))
    assert read <= known
    assert read >= {
        "schema_version", "artefacts", "engine", "files", "frame_size", "model", "class_names", "use_class_labels",
        "num_classes", "calibration", "classes", "threshold", "ranges", "low", "high",
    }  # fmt: skip
    rule = (EXPORT.parent / "flowad_fast" / "stages" / "frames.py").read_text(encoding="utf-8")
    for bound in ("high - low <= 2", "high <= 16", "low >= 250", "low >= 240"):
        assert bound in text and bound in rule
    for verdict in ("good", "anomalous", "invalid", '"map"', '"score"', '"frames"', '"classes"'):
        assert verdict in text


def test_the_csharp_project_names_its_package() -> None:
    project = (CSHARP / "flowad_judge.csproj").read_text(encoding="utf-8")
    assert '<PackageReference Include="Microsoft.ML.OnnxRuntime"' in project
