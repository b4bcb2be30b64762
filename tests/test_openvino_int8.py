"""int8 in OpenVINO: what is quantised and from which frames, and a canary that other instruction sets fail."""

import dataclasses
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from models import exported, tiny_frames, tiny_model

import flowad_fast
from flowad_fast import bundle
from flowad_fast.engines import instructions
from flowad_fast.engines.instructions import cpu_flags, cpu_name, worth
from flowad_fast.errors import BundleError, ConfigError, ParityError
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.formats import FORMATS, Request
from flowad_fast.export.frames import GoodParts, ParityFrames, parity_frames, spread
from flowad_fast.export.ranges import ranges_of
from flowad_fast.export.verify import FAILED_PARITY, TOLERANCES, Reference
from flowad_fast.files import sha256
from flowad_fast.stages.scorers import Mismatch

ROOT = Path(__file__).parent.parent
FORMAT = "openvino-int8"
quantises = pytest.mark.skipif(
    find_spec("openvino") is None or find_spec("nncf") is None,
    reason='needs openvino and nncf: pip install "flowad-fast[openvino-int8]"',
)

INTEL = "model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n"


# What the CPU has


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (INTEL, ("avx2", "avx512f", "avx512_vnni", "amx_int8"), "int8 may pay: the CPU has avx512_vnni, amx_int8"),
        ("flags\t\t: fpu avx2\n", ("avx2",), "int8 does not pay: the CPU has neither VNNI nor AMX"),
        (INTEL + "flags\t\t: fpu avx2\n", ("avx2",), "does not pay"),  # the weakest core counts
        ("Features\t: fp asimddp\n", ("asimddp",), "may pay"),
        ("nothing", None, "not known here"),
    ],
)
def test_whether_int8_pays_is_said_from_the_cpus_flags(
    tmp_path: Path, text: str, flags: tuple[str, ...] | None, said: str
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_flags(tmp_path / "cpuinfo") == flags
    assert said in worth(flags)


def test_a_system_without_cpuinfo_is_not_guessed_at(tmp_path: Path) -> None:
    assert cpu_flags(tmp_path / "none") is None
    assert cpu_name(tmp_path / "none")


# What the ranges are of


def good_parts(count: int) -> GoodParts:
    return GoodParts(tiny_frames(count, seed=7), [""] * count, [f"{i}.png" for i in range(count)])


def test_ranges_are_those_of_good_parts_only() -> None:
    model, frames = tiny_model(), tiny_frames(6)
    labelled = ParityFrames(frames, "a folder", np.array([0, 1, 0, 1, 1, 0]))
    of_labels = ranges_of(model, labelled, None, None)
    np.testing.assert_array_equal(of_labels.frames, frames[[0, 2, 5]])
    assert of_labels.source == "3 good of a folder"
    unlabelled = ranges_of(model, ParityFrames(frames, "frames of x"), None, None)
    assert len(unlabelled.frames) == 6 and unlabelled.source.endswith("taken for good")
    given = ranges_of(model, labelled, good_parts(9), None)
    assert len(given.frames) == 9 and given.source == "9 of 9 good parts"


def test_good_parts_are_spread_over_classes_and_of_one_size() -> None:
    frames = [*tiny_frames(7), *tiny_frames(1, 80, 72), *tiny_frames(2)]  # the eighth would be the last of four
    kept = spread(GoodParts(frames, ["a"] * 5 + ["b"] * 5, [""] * 10), 4)
    assert kept.classes == ("a", "b", "a")
    assert {frame.shape for frame in kept.frames} == {frames[0].shape}
    assert len(spread(good_parts(200)).frames) == 64


# The artefact


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    path = exported(FORMAT, 2)[1].path
    assert path is not None
    return shutil.copytree(path, tmp_path / "b")


def altered(folder: Path, **values: np.ndarray) -> None:
    """Give the canary other contents, and the manifest their hash."""
    from flowad_fast.engines.openvino_int8 import CANARY, read_canary

    np.savez_compressed(folder / CANARY, **(read_canary(folder / CANARY) | values))  # type: ignore[arg-type]
    rehashed(folder, CANARY)


def rehashed(folder: Path, name: str) -> None:
    manifest = bundle.read(folder, verify=False)[1]
    artefact = manifest.artefacts[FORMAT]
    changed = artefact.model_copy(update={"files": artefact.files | {name: sha256(folder / name)}})
    bundle.write_manifest(folder, manifest.model_copy(update={"artefacts": {FORMAT: changed}}))


@quantises
def test_products_run_in_bytes_and_the_manifest_names_the_cpu(copy: Path) -> None:
    detector = flowad_fast.load(copy, engine=FORMAT)
    assert detector.engine == "openvino-int8 on cpu (int8 products, else f32, latency)"
    artefact = bundle.read(copy)[1].artefacts[FORMAT]
    assert artefact.precision == "int8" and artefact.parity is not None
    assert artefact.parity.tolerance == TOLERANCES["int8"].max
    assert detector.details["quantised_products"] == artefact.details["products"] > 0
    assert artefact.details["cpu"] == cpu_name() and artefact.details["cpu_flags"] == " ".join(cpu_flags() or ())
    assert detector.details["worth"] == worth(cpu_flags())
    assert artefact.details["note"] in (copy / "README.md").read_text()


@quantises
def test_on_a_cpu_without_vnni_the_card_says_that_it_does_not_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text("model name\t: Old\nflags\t\t: avx2\n")
    monkeypatch.setattr(instructions, "CPUINFO", tmp_path / "cpuinfo")
    result = export_bundle(
        tiny_model(), Mismatch(), tmp_path / "b", formats=(FORMAT,), frames=tiny_frames(3), quiet=True
    )
    assert result.ok, result.status
    assert "on Old, where it was certified, int8 does not pay" in (tmp_path / "b" / "README.md").read_text()


@quantises
def test_a_canary_that_comes_out_otherwise_refuses_the_engine(copy: Path) -> None:
    from flowad_fast.engines.openvino_int8 import CANARY, read_canary

    canary = read_canary(copy / CANARY)
    scale = canary["map"].std()
    altered(copy, map=canary["map"] + np.float32(0.02 * scale))  # RMS below its tolerance of 0.03
    flowad_fast.load(copy, engine=FORMAT)
    altered(copy, map=canary["map"] + np.float32(0.04 * scale))
    with pytest.raises(ParityError, match="int8 gives other results here than where it was certified") as error:
        flowad_fast.load(copy, engine=FORMAT)
    assert "--format openvino-int8, or use the format onnx" in str(error.value) and "\n" not in str(error.value)
    one_cell = canary["map"].copy()
    one_cell[0, 0, 0] += 0.4 * scale
    altered(copy, map=one_cell)
    with pytest.raises(ParityError, match="differs by 4.0e-01"):
        flowad_fast.load(copy, engine=FORMAT)
    altered(copy, map=canary["map"], score=canary["score"] * 2)
    with pytest.raises(ParityError, match="its score by"):
        flowad_fast.load(copy, engine=FORMAT)


@quantises
def test_a_failing_canary_is_failed_parity_in_a_certificate(copy: Path) -> None:
    from flowad_fast.engines.openvino_int8 import CANARY, read_canary

    altered(copy, map=read_canary(copy / CANARY)["map"] * 2)
    manifest, frames = bundle.read(copy)[1], ParityFrames(tiny_frames(3), "noise")
    reference = Reference.of(exported(FORMAT, 2)[0], manifest.scorer, manifest.aggregate, frames)
    outcome = reference.measure(FORMAT, manifest.artefacts[FORMAT], copy, manifest, "cpu")
    assert outcome.status == FAILED_PARITY and "the canary's map differs" in outcome.reason and not outcome.ok


@quantises
@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut off", b"no archive"])
def test_a_canary_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    from flowad_fast.engines.openvino_int8 import CANARY

    (copy / CANARY).write_bytes(content)
    rehashed(copy, CANARY)
    with pytest.raises(BundleError, match="no canary"):
        flowad_fast.load(copy, engine=FORMAT)


@quantises
def test_no_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 needs real frames of good parts"):
        FORMATS[FORMAT].write(Request(tiny_model(), Mismatch()), tmp_path)


@quantises
def test_a_missing_quantiser_is_named_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    result = export_bundle(
        tiny_model(), Mismatch(), tmp_path / "b", formats=(FORMAT,), frames=tiny_frames(1), quiet=True
    )
    assert result.status[FORMAT].startswith("not available") and "flowad-fast[openvino-int8]" in result.status[FORMAT]


@quantises
def test_location_statistics_are_an_input_and_do_not_change_the_canary(tmp_path: Path) -> None:
    from flowad_fast.export.location import StatisticsParts

    result = export_bundle(
        tiny_model(), Mismatch(), tmp_path / "b", formats=(FORMAT,), frames=tiny_frames(4), quiet=True,
        location=StatisticsParts(good_parts(24), "noise"),
    )  # fmt: skip
    assert result.ok and result.path is not None, result.status
    manifest = result.manifest
    from flowad_fast.engines.start import start_engine

    table = bundle.location_table(result.path, manifest)
    moved = table.copy()
    moved[:, 0] += 5
    runs = [start_engine(result.path, manifest, FORMAT, "cpu", location=one) for one in (table, moved)]
    (one, _), (other, _) = (engine.run(tiny_frames(2), None) for engine in runs)
    assert np.abs(one - other).max() > 1e-3 * one.std(), "the table that is given counts, and the canary still passes"


# The demo checkpoint, for real


REFUSED = """
import sys, flowad_fast
from flowad_fast.errors import ParityError
try:
    print(flowad_fast.load(sys.argv[1], engine="openvino-int8").engine)
except ParityError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the demo checkpoint."""
    from flowad_fast.checkpoints.load import load_checkpoint

    path = tmp_path_factory.mktemp("int8") / "b"
    result = export_bundle(
        load_checkpoint("demo"), Mismatch(), path, formats=(FORMAT,), frames=parity_frames(None), quiet=True
    )
    assert result.ok, result.status
    return path


@quantises
@pytest.mark.long
def test_the_demo_is_certified_on_its_map(demo: Path) -> None:
    parity = bundle.read(demo)[1].artefacts[FORMAT].parity
    assert parity is not None and parity.passed and parity.frames == 16
    assert 1e-3 < parity.rms_error < TOLERANCES["int8"].rms, "it is quantised, and within its tolerance"
    assert parity.spearman is not None and parity.spearman > 0.98


@quantises
@pytest.mark.long
@pytest.mark.skipif("avx512_vnni" not in (cpu_flags() or ()), reason="needs a CPU with VNNI, to leave it out")
def test_a_cpu_whose_products_of_bytes_saturate_is_refused(demo: Path) -> None:
    for most, wanted in (("AVX512_CORE_VNNI", "openvino-int8 on cpu"), ("AVX2", "refused: ")):
        done = subprocess.run(
            [sys.executable, "-c", REFUSED, str(demo)], capture_output=True, text=True, timeout=100,
            env=os.environ | {"PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": most},
        )  # fmt: skip
        assert done.returncode == 0 and done.stdout.startswith(wanted), done


@quantises
@pytest.mark.long
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_quantising_sends_nothing_and_prints_nothing_but_json(tmp_path: Path) -> None:
    trace, home = tmp_path / "calls", tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=connect,sendto", "-o", str(trace), sys.executable, "-m", "flowad_fast.export.cli",
         "make", "demo", "--scorer", "mismatch", "--format", FORMAT, "--output", str(tmp_path / "b"), "--json"],
        capture_output=True, text=True, timeout=300,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{") and done.stdout.rstrip().endswith("}")
    assert "AF_INET" not in trace.read_text()
    assert not list(home.rglob("intel")), "a client number of OpenVINO's telemetry"


def test_its_row_says_for_which_cpus_it_is() -> None:
    assert "VNNI or AMX" in FORMATS[FORMAT].description and FORMATS[FORMAT].quantises == "int8"
    assert dataclasses.asdict(TOLERANCES["int8"]) == {"max": 0.3, "rms": 0.03}
