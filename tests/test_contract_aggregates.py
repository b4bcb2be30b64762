"""What every aggregate in `AGGREGATES` promises. A new entry is tested here without a new test."""

import numpy as np
import pytest
import torch
from models import tiny_frames, tiny_model

from flowad_fast.detector import Detection
from flowad_fast.engines.cudagraph import Buffers
from flowad_fast.errors import CalibrationError
from flowad_fast.export.verify import TOLERANCES, compare
from flowad_fast.pipeline import ScoringPipeline
from flowad_fast.stages.decision import AGGREGATES, Aggregate, Calibration, calibrate, combine
from flowad_fast.stages.score import image_score
from flowad_fast.stages.scorers import Inversion

MAPS = torch.rand(40, 16, 16, generator=torch.Generator().manual_seed(0))
every = pytest.mark.parametrize("aggregate", AGGREGATES)


@every
def test_a_raw_score_is_one_number_or_two_terms_per_map(aggregate: Aggregate) -> None:
    raw = image_score(MAPS, aggregate)
    assert raw.shape in ((40,), (40, 2)) and raw.dtype == torch.float32 and torch.isfinite(raw).all()
    for i in (0, 39):
        torch.testing.assert_close(image_score(MAPS[i : i + 1], aggregate)[0], raw[i])


@every
def test_it_knows_no_place_and_no_unit(aggregate: Aggregate) -> None:
    raw = image_score(MAPS, aggregate)
    torch.testing.assert_close(image_score(MAPS.flip(1, 2), aggregate), raw)
    torch.testing.assert_close(image_score(3 * MAPS, aggregate), 3 * raw)


@every
def test_a_hotter_spot_never_lowers_it(aggregate: Aggregate) -> None:
    hotter = MAPS.clone()
    hotter.flatten(1)[torch.arange(40), MAPS.flatten(1).argmax(1)] += 5
    assert (image_score(hotter, aggregate) > image_score(MAPS, aggregate)).all()


@every
def test_the_pipeline_and_the_captured_graph_give_that_score(aggregate: Aggregate) -> None:
    pipeline = ScoringPipeline(tiny_model(), Inversion(), aggregate).eval()
    with torch.no_grad():
        maps, raw = pipeline(torch.from_numpy(tiny_frames(2)))
    torch.testing.assert_close(raw, image_score(maps, aggregate), rtol=1e-4, atol=1e-4)
    assert Buffers.make(pipeline, 2, 64, 64, torch.device("cpu")).scores.shape == raw.shape


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
        with pytest.raises(CalibrationError, match="ranges"):
            combine(raw, None)
