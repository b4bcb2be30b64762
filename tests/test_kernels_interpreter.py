"""Every Triton kernel against the reference, without a GPU: one process runs all cases in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
from kernel_cases import CASES, DTYPES

from flowad_fast.kernels import fused, reference
from flowad_fast.kernels.attention_dual import TILES

DRIFT = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2, "fp8": 1e-1}
"""Largest relative error of the field by precision."""


@pytest.fixture(scope="module")
def measured() -> dict:
    script = Path(__file__).with_name("kernel_interpreter.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_reference(case: kernel_cases.Case, dtype: str, measured: dict) -> None:
    result = measured["cases"][f"{case}-{dtype}"]
    takes_reference = case.operator.startswith("attention") and dtype == "fp32"
    assert result["launches"] == (0 if takes_reference else case.launches)
    kernel_cases.check(result["entries"])


def test_nan_reaches_the_results(measured: dict) -> None:
    assert measured["poisoned"] and all(measured["poisoned"].values()), measured["poisoned"]


@pytest.mark.parametrize("run", [*DRIFT, *(f"{one}-split" for one in DRIFT), "fp8-epilogues"])
def test_the_whole_field_on_its_kernels(run: str, measured: dict) -> None:
    """Output, primal and tangents drift no further from float32 than plain torch of the same precision."""
    result, largest = measured["velocity"][run], DRIFT[run.partition("-")[0]]
    assert result["launches"] >= (30 if run.endswith("-split") else 14)
    for error, torchs in zip(result["error"], result["torch"], strict=True):
        assert error < largest and error <= 1.15 * max(torchs, 1e-6), result


def test_every_tile_of_attentions_tangents_computes_the_same(measured: dict) -> None:
    assert len(measured["tiles"]) == len(TILES) and max(measured["tiles"]) < DRIFT["bf16"], measured["tiles"]


def test_every_operator_has_a_case() -> None:
    assert set(fused.KERNELS) == {case.operator for case in CASES}
    assert set(fused.__all__) - set(fused.KERNELS) == {
        "activate", "attention", "bounded", "farthest", "layer_norm", "upsample",
    }  # fmt: skip


def test_fused_and_reference_are_interchangeable() -> None:
    public = {
        name
        for name, value in vars(reference).items()
        if callable(value) and value.__module__ == reference.__name__ and not name.startswith("_")
    }
    assert public == set(fused.__all__)
    for name in public:
        assert getattr(fused, name) is fused.KERNELS.get(name, getattr(reference, name))
