"""What every engine in `ENGINES` promises. A new entry is tested here without a new test.

An engine that reads artefacts gets one from the first format that names it. One that cannot run on this machine must
say so with EngineUnavailableError, and is reported as skipped with its own words.
"""

import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from models import IMAGE, entries, exported, tiny_frames, tiny_model

import flowad_fast
from flowad_fast import engines
from flowad_fast.detector import Detector
from flowad_fast.engines import ENGINES, Engine
from flowad_fast.engines.start import AUTO, start_engine, start_from_model
from flowad_fast.errors import EngineUnavailableError
from flowad_fast.export.formats import FORMATS
from flowad_fast.export.verify import TOLERANCES
from flowad_fast.model import FlowModel
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.scorers import Inversion

CLASSES = 2
COMPILED = ("compile", "inductor")
EXPORTED = [name for name, one in ENGINES.items() if one.starts_from == "artefact"]
FRAMES, Y = tiny_frames(5, seed=1), np.array([0, 1, 1, 0, 1])


def started(name: str) -> tuple[Engine, FlowModel]:
    """The engine, on a GPU where there is one, and its model; a machine that cannot is a reason to skip."""
    chosen = ENGINES[name]
    try:
        if chosen.starts_from == "model":
            model = tiny_model(CLASSES)
            return start_from_model(name, ScoringPipeline(model, Inversion())), model
        source = next(format for format, one in FORMATS.items() if one.engine == chosen.artefact)
        model, result = exported(source, CLASSES)
        if result.path is None or not result.published:
            assert result.status[source].startswith("not available"), result.status[source]
            pytest.skip(f"{name}: {result.status[source]}")
        return start_engine(result.path, result.manifest, name, "auto"), model
    except EngineUnavailableError as error:
        assert len(str(error).splitlines()) == 1
        pytest.skip(f"{name}: {error}")


@pytest.fixture(scope="module", params=entries(ENGINES, COMPILED, EXPORTED))
def engine(request: pytest.FixtureRequest) -> Engine:
    return started(request.param)[0]


@pytest.fixture(scope="module")
def expected(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """What the eager engine computes of the same model."""
    return start_from_model("eager", ScoringPipeline(started(engine.name)[1], Inversion())).run(FRAMES, Y)


@pytest.fixture
def got(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    return engine.run(FRAMES, Y)


def same(engine: Engine, got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to float32's rounding; of a quantised graph, which is another function, within its certificate."""
    quantised = next((one.quantises for one in FORMATS.values() if one.engine == ENGINES[engine.name].artefact), None)
    limit, relative = (1e-3, 1e-5) if quantised is None else (TOLERANCES[quantised].max, 1e-3)
    np.testing.assert_allclose(got, expected, atol=limit * expected.std(), rtol=relative)


def test_results_are_those_of_the_eager_engine(
    engine: Engine, got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    for one, other in zip(got, expected, strict=True):
        same(engine, one, other)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_any_batch_gives_each_frame_its_own_result_in_order(
    engine: Engine, expected: tuple[np.ndarray, np.ndarray], batch: int
) -> None:
    for start in range(0, len(FRAMES), batch):  # the last batch is another size
        part = slice(start, start + batch)
        maps, scores = engine.run(FRAMES[part], Y[part])
        assert maps.dtype == scores.dtype == np.float32
        assert maps.shape == (len(FRAMES[part]), IMAGE, IMAGE) and scores.shape == (len(FRAMES[part]),)
        same(engine, maps, expected[0][part])
        same(engine, scores, expected[1][part])


def test_frames_of_another_size_are_resized(engine: Engine) -> None:
    maps, scores = engine.run(tiny_frames(2, 72, 80), Y[:2])
    assert maps.shape == (2, IMAGE, IMAGE) and np.isfinite(maps).all() and np.isfinite(scores).all()


def test_two_threads_get_what_one_gets(engine: Engine, expected: tuple[np.ndarray, np.ndarray]) -> None:
    results: dict[int, np.ndarray] = {}

    def call(i: int) -> None:
        results[i] = engine.run(FRAMES[i : i + 2], Y[i : i + 2])[0]

    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for i in (0, 2):
        same(engine, results[i], expected[0][i : i + 2])


def test_the_callers_buffers_are_left_alone(engine: Engine, expected: tuple[np.ndarray, np.ndarray]) -> None:
    frames, y = FRAMES[:2].copy(), Y[:2].copy()
    maps, _ = engine.run(frames, y)
    np.testing.assert_array_equal(frames, FRAMES[:2])
    np.testing.assert_array_equal(y, Y[:2])
    frames[:] = 0  # nor are they read after the call
    same(engine, maps, expected[0][:2])
    engine.run(tiny_frames(2, seed=9), y)
    same(engine, maps, expected[0][:2])  # and a result is the caller's to keep


def test_preparing_changes_no_result(engine: Engine, expected: tuple[np.ndarray, np.ndarray]) -> None:
    engine.prepare(IMAGE, IMAGE)
    same(engine, engine.run(FRAMES[:2], Y[:2])[0], expected[0][:2])


def test_it_says_what_runs(engine: Engine) -> None:
    assert engine.name in ENGINES
    assert engine.title.startswith(f"{engine.name} on {engine.device}")
    assert isinstance(engine.details, dict)


def test_on_device_is_there_or_refused(engine: Engine, expected: tuple[np.ndarray, np.ndarray]) -> None:
    frames, y = torch.from_numpy(FRAMES[:2]), torch.from_numpy(Y[:2])
    if engine.on_tensors:
        device = torch.device(engine.device)
        same(engine, engine.on_device(frames.to(device), y.to(device))[0].cpu().numpy(), expected[0][:2])
    else:
        with pytest.raises(EngineUnavailableError, match=r"run\(\)"):
            engine.on_device(frames, y)


def test_a_detector_around_it_takes_no_frames_and_closes(engine: Engine) -> None:
    detector = Detector(engine, tiny_model(CLASSES).spec)
    assert len(detector(np.zeros((0, IMAGE, IMAGE, 3), np.uint8), [])) == 0
    assert detector(FRAMES[:1], "screw").classes == ("screw",)
    detector.close()
    with pytest.raises(EngineUnavailableError, match="closed"):
        detector(FRAMES[:1], "screw")


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name="some_library")

    monkeypatch.setattr(engines.importlib, "import_module", missing)
    extra = ENGINES[name].requires
    with pytest.raises(EngineUnavailableError, match="some_library") as error:
        ENGINES[name].engine()
    assert (f"flowad-fast[{extra}]" if extra else "pip install") in str(error.value)
    assert "[]" not in str(error.value)


def test_every_extra_that_an_engine_names_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {one.requires for one in ENGINES.values()} - {""} <= set(project["optional-dependencies"])


def test_every_artefact_that_an_engine_reads_is_some_formats() -> None:
    assert {one.artefact for one in ENGINES.values()} <= {one.engine for one in FORMATS.values()}
    assert {name for names in AUTO.values() for name in names} <= set(ENGINES)


@pytest.mark.long
@pytest.mark.parametrize("name", ENGINES)
def test_a_bundle_without_its_artefact_is_refused(name: str) -> None:
    other = "onnx" if ENGINES[name].artefact == "eager" else "eager"
    path = exported(other)[1].path
    assert path is not None
    with pytest.raises(EngineUnavailableError, match=f"nothing for the engine {name}"):
        flowad_fast.load(path, engine=name, device="cpu")
