"""What every format in `FORMATS` promises. A new entry is tested here without a new test.

A format that cannot be written on this machine must say why, and is reported as skipped with its own words.
"""

from pathlib import Path
from typing import get_args

import pytest
from models import entries, exported, tiny_frames, tiny_model

import flowad_fast
from flowad_fast import bundle
from flowad_fast.config import Precision
from flowad_fast.engines import ENGINES
from flowad_fast.errors import BundleError, EngineUnavailableError
from flowad_fast.export.exporter import export_bundle
from flowad_fast.export.formats import FORMATS, parse_formats
from flowad_fast.export.verify import TOLERANCES, reference_outputs
from flowad_fast.files import sha256
from flowad_fast.stages.scorers import Inversion

COMPILED = ("aoti",)
every = pytest.mark.parametrize("name", entries(FORMATS, COMPILED, set(FORMATS) - {"eager"}))


def written(name: str) -> tuple[Path, bundle.Manifest]:
    """A bundle of the format; a machine that cannot write it is a reason to skip."""
    _, result = exported(name)
    if result.path is None or not result.published:
        assert result.status[name].startswith("not available"), result.status[name]
        pytest.skip(f"{name}: {result.status[name]}")
    return result.path, result.manifest


@pytest.mark.parametrize("name", FORMATS)
def test_it_describes_itself(name: str) -> None:
    one = FORMATS[name]
    assert one.description
    assert set(one.precisions) <= set(get_args(Precision)) and "fp32" in one.precisions
    assert parse_formats(name) == (name,)
    assert one.engine in get_args(bundle.EngineName)
    assert one.engine in {engine.artefact for engine in ENGINES.values()}, "an engine reads it"


@every
def test_the_bundle_holds_what_its_manifest_lists_and_no_more(name: str) -> None:
    path, manifest = written(name)
    listed = manifest.artefacts[name].files
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert there == set(listed) | {bundle.MANIFEST, "README.md"}
    assert all(bundle.ARTEFACT_FILE.fullmatch(file) and sha256(path / file) == was for file, was in listed.items())


@every
def test_its_artefact_is_certified_or_openly_unmeasured(name: str) -> None:
    _, manifest = written(name)
    artefact = manifest.artefacts[name]
    assert artefact.engine == FORMATS[name].engine and artefact.versions
    assert artefact.precision == (FORMATS[name].quantises or "fp32")
    assert (artefact.parity is None) == bool(artefact.unmeasured)
    assert artefact.parity is None or artefact.parity.passed


@every
def test_its_engine_loads_it_where_it_runs(name: str) -> None:
    path, manifest = written(name)
    artefact, model = manifest.artefacts[name], exported(name)[0]
    frames = tiny_frames(3, seed=4)
    try:
        got = flowad_fast.load(path, engine=artefact.engine)(frames)
    except EngineUnavailableError:
        assert artefact.unmeasured
        pytest.skip(f"{name}: {artefact.unmeasured}")
    maps, _ = reference_outputs(model, manifest.scorer, manifest.aggregate, frames, None)
    limit = 1e-3 if FORMATS[name].quantises is None else TOLERANCES[artefact.precision].max
    assert abs(got.map - maps).max() < limit * maps.std()


@pytest.mark.parametrize("name", FORMATS)
def test_a_precision_that_it_does_not_do_is_not_available(tmp_path: Path, name: str) -> None:
    model, target = tiny_model(), tmp_path / "bundle"
    for precision in ("fp2", *(set(get_args(Precision)) - set(FORMATS[name].precisions))):
        result = export_bundle(
            model, Inversion(), target, formats=(name,), precision=precision, frames=tiny_frames(1), quiet=True
        )
        assert not result.ok and not target.exists()
        assert result.status[name].startswith("not available") and precision in result.status[name]


@every
def test_an_altered_file_is_refused(tmp_path: Path, name: str) -> None:
    path, manifest = written(name)
    folder = tmp_path / "copy"
    for file in (*manifest.artefacts[name].files, bundle.MANIFEST):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((path / file).read_bytes())
    bundle.read(folder)
    for file in manifest.artefacts[name].files:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole + b" ")
        with pytest.raises(BundleError, match="altered"):
            bundle.read(folder)
        (folder / file).write_bytes(whole)
