"""What every aggregate in `AGGREGATES` promises. A new entry is tested here without a new test."""

import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnxruntime
import pytest
import torch
from models import tiny_frames, tiny_model

from flowad_fast.detector import Detection
from flowad_fast.engines.cudagraph import Buffers
from flowad_fast.errors import CalibrationError, ConfigError
from flowad_fast.export.formats import Request
from flowad_fast.export.onnx_graph import write_graph
from flowad_fast.export.verify import TOLERANCES, compare, reference_outputs
from flowad_fast.kernels.reference import upsample
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.aggregates import (
    AGGREGATES,
    Aggregate,
    blended,
    check_blended,
    columns,
    norm_power,
    top_cells,
)
from flowad_fast.stages.decision import Calibration, calibrate, combine
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import Density, Inversion, Mismatch, Reconstruction

MAPS = torch.rand(40, 16, 16, generator=torch.Generator().manual_seed(0))
every = pytest.mark.parametrize("aggregate", AGGREGATES)


@every
def test_a_raw_score_is_one_number_or_its_terms_per_map(aggregate: Aggregate) -> None:
    raw = image_score(MAPS, aggregate)
    assert raw.shape == (40, *columns(aggregate)) and raw.dtype == torch.float32 and torch.isfinite(raw).all()
    for i in (0, 39):
        torch.testing.assert_close(image_score(MAPS[i : i + 1], aggregate)[0], raw[i])


@every
def test_of_a_map_that_tiles_were_blended_into_it_is_the_same_or_refused(aggregate: Aggregate) -> None:
    raw = image_score(MAPS, aggregate).numpy()
    if any(term.blended is None for term in AGGREGATES[aggregate].terms):
        with pytest.raises(ConfigError, match=f"the aggregate {re.escape(aggregate)} is made of the latent"):
            check_blended(aggregate)
        return
    check_blended(aggregate)
    found = np.stack([blended(map.numpy().ravel(), aggregate) for map in MAPS])
    assert found.shape == raw.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, raw, rtol=1e-5)


def test_every_name_has_a_rule() -> None:
    assert get_args(Aggregate) == tuple(AGGREGATES)


@every
def test_it_knows_no_place_and_no_unit(aggregate: Aggregate) -> None:
    raw = image_score(MAPS, aggregate)
    torch.testing.assert_close(image_score(MAPS.flip(1, 2), aggregate), raw)
    # Terms of a norm and of its square have units of their own: for the square of the norm, its root and itself.
    factor = torch.tensor([3.0, 9.0]) if aggregate == "range+nll" else torch.tensor(9.0)
    torch.testing.assert_close(image_score(9 * MAPS, aggregate), factor * raw)


@every
def test_a_hotter_spot_never_lowers_it(aggregate: Aggregate) -> None:
    hotter = MAPS.clone()
    hotter.flatten(1)[torch.arange(40), MAPS.flatten(1).argmax(1)] += 5
    assert (image_score(hotter, aggregate) > image_score(MAPS, aggregate)).all()


@every
def test_the_pipeline_and_the_captured_graph_give_that_score(aggregate: Aggregate) -> None:
    pipeline = ScoringPipeline(tiny_model(), Inversion(), aggregate).eval()
    frames = torch.from_numpy(tiny_frames(2))
    with torch.no_grad():
        maps, raw = pipeline(frames)
        cells = pipeline.cells(frames)
    torch.testing.assert_close(raw, image_score(maps, aggregate, cells), rtol=1e-4, atol=1e-4)
    assert Buffers.make(pipeline, 2, 64, 64, torch.device("cpu")).out.scores.shape == raw.shape


@every
@pytest.mark.parametrize("power", [1, 2])
def test_onnx_gives_that_score(aggregate: Aggregate, power: Literal[1, 2], tmp_path: Path) -> None:
    model, scorer, frames = tiny_model(), Inversion(power=power), tiny_frames(3)
    write_graph(Request(model, scorer, aggregate), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    _, got = session.run(["map", "score"], {"frames": frames})
    _, expected = reference_outputs(model, scorer, aggregate, frames, None)
    assert norm_power(scorer) == power and got.shape == (3, *columns(aggregate))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@every
def test_a_certificate_allows_what_its_map_error_can_do_and_no_more(aggregate: Aggregate) -> None:
    maps = MAPS.numpy()
    expected = maps, image_score(MAPS, aggregate).numpy()
    bound = 0.9 * TOLERANCES["fp32"].rms * float(maps.std())
    for sign in (np.ones_like(maps), np.sign(maps - 0.5)):
        off = (maps + bound * sign).astype(np.float32)
        scores = image_score(torch.from_numpy(off), aggregate).numpy()
        assert compare((off, scores), expected, "maps", "fp32", "cpu", aggregate=aggregate).passed
    wrong = expected[1] + 2 * TOLERANCES["fp32"].max * maps[0].size * float(maps.std())
    assert not compare((maps, wrong), expected, "maps", "fp32", "cpu", aggregate=aggregate).passed


@every
def test_a_calibration_makes_verdicts_of_it(aggregate: Aggregate) -> None:
    raw = image_score(MAPS, aggregate).numpy()
    fitted = Calibration.model_validate_json(calibrate(raw, 0.1).model_dump_json())
    detection = Detection(MAPS.numpy(), raw, ("",) * 40, (None,) * 40, "test", fitted)
    assert detection.score.shape == (40,) and detection.score.dtype == np.float32
    rejected = sum(verdict == "anomalous" for verdict in detection.verdict)
    assert rejected <= (4 if raw.ndim == 1 else 8)
    if raw.ndim == 2:
        with pytest.raises(CalibrationError, match="3 terms and 2 ranges"):
            combine(np.zeros((1, 3), np.float32), fitted.classes[""].ranges)
        with pytest.raises(CalibrationError, match="ranges"):
            combine(raw, None)


@pytest.mark.parametrize("power", [1, 2])
def test_range_and_nll_are_those_of_the_latent(power: int) -> None:
    latent = torch.randn(5, 7, 4, 4, generator=torch.Generator().manual_seed(1))
    norm = latent.norm(dim=1)
    got = image_score(upsample(norm**power, 64), "range+nll", norm**power, power)
    expected = torch.stack([norm.amax((1, 2)) - norm.amin((1, 2)), latent.square().sum((1, 2, 3)) / 2], 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cells", "count"), [(16, 1), (100, 1), (101, 2), (256, 3), (700, 7)])
def test_top_is_the_mean_of_the_highest_cells(cells: int, count: int) -> None:
    values = torch.arange(float(cells)).flip(0)[None, None]
    assert top_cells(cells) == count
    assert image_score(values * 0, "top", values).item() == pytest.approx(cells - (count + 1) / 2)


@pytest.mark.parametrize("scorer", [Density(), Reconstruction(), Mismatch()])
def test_a_latents_score_needs_a_latent(scorer: Density | Reconstruction | Mismatch) -> None:
    with pytest.raises(ConfigError, match=rf"range\+nll is made of the latent that inversion.*{scorer.kind}"):
        ScoringPipeline(tiny_model(), scorer, "range+nll")
