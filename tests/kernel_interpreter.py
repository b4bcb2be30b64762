"""Runs every kernel case in Triton's interpreter and prints the measurements as JSON.

A process of its own: Triton decides for the interpreter when it is imported, and every other test needs it compiled.
"""

import json
import os
import sys
from contextlib import nullcontext

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

launches = 0
TYPES = {
    tl.float32: torch.float32,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float8e4nv: torch.float8_e4m3fn,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _interpreted(kernel: object) -> object:
    # torch's wrapper knows only compiled kernels; here the kernel is called as it is.
    global launches
    launches += 1
    return kernel


def _convert(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    # The interpreter truncates to bfloat16 and loses a carry to e4m3; torch rounds to nearest, as GPUs do.
    signed = np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
    converted = torch.from_numpy(signed).view(TYPES[source]).to(TYPES[target])
    size = converted.element_size()
    return converted.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]).numpy().view(UNSIGNED[size])


def _dot(builder: object, a: object, b: object, *rest: object) -> object:
    # The interpreter multiplies the bit patterns of bfloat16 and e4m3 operands.
    return _interpreter_dot(builder, _widened(a), _widened(b), *rest)


def _widened(x: object) -> object:
    kind = x.dtype.scalar
    if kind not in (tl.bfloat16, tl.float8e4nv):
        return x
    return interpreter.TensorHandle(_convert(x.data, kind, tl.float32, None).view(np.float32), tl.float32)


_interpreter_dot = interpreter.InterpreterBuilder.create_dot
torch.library.wrap_triton = _interpreted  # type: ignore[assignment]
interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_dot = _dot

from flowad_fast.kernels import launch  # noqa: E402

launch.runs_triton = lambda x: True
# Cases of 4 tokens take several rows per program, as large batches do; those of 3 and 5 tokens cannot.
launch.MANY_ROWS = 12

import kernel_cases  # noqa: E402

from flowad_fast.config import VelocityConfig  # noqa: E402
from flowad_fast.kernels import attention_dual, fused, reference  # noqa: E402
from flowad_fast.kernels.operators import short_attention  # noqa: E402
from flowad_fast.stages.arithmetic import Arithmetic  # noqa: E402
from flowad_fast.stages.plan import Fused, Plan, Split  # noqa: E402
from flowad_fast.stages.velocity import DiT, TabledDiT  # noqa: E402


def _poisoned() -> dict[str, bool]:
    """Whether results that depend on a NaN, and only they, are not finite."""
    x = torch.ones(1, 2, 24)
    x[0, 1, 3] = torch.nan
    zero = torch.zeros(1, 1, 24)
    _, scale = fused.ln_modulate_fp8(x, zero, zero)
    maps = torch.ones(2, 4, 4)
    maps[1, 2, 2] = torch.nan
    *_, largest, smallest, total = fused.upsample_score(maps, 8)
    error = fused.affine_error_map(x, x, 1.0, 1.0)
    return {
        "ln_modulate_fp8": bool(not scale[0, 1].isfinite() and scale[0, 0].isfinite()),
        "upsample_score": all(bool(t[1].isnan() and not t[0].isnan()) for t in (largest, smallest, total)),
        "affine_error_map": bool(error[0, 1].isnan() and not error[0, 0].isnan()),
    }


def _velocity() -> dict[str, dict]:
    """The whole field on its kernels against the same precision in plain torch, and both against float32.

    Its second run takes the split product, too; the third, in fp8, what quantises in epilogues.
    """
    torch.manual_seed(0)
    config = VelocityConfig(channels=48, height=4, width=5, hidden_size=96, depth=2, num_heads=2, mlp_ratio=2.0)
    dit = DiT(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter.requires_grad_(False), std=0.08)
    x, z = torch.randn(2, 20, 48), torch.randn(2, 1, 20, 48).sign()
    exact = TabledDiT(dit, (0.5,)).dual(x, z, 0)
    results = {}
    for precision in ("fp32", "bf16", "fp16", "fp8"):
        plain = TabledDiT(dit, (0.5,), Arithmetic(precision, reference)).dual(x, z, 0)
        for kind in ("", "-split", *(("-epilogues",) if precision == "fp8" else ())):
            field = TabledDiT(dit, (0.5,), Arithmetic(precision, fused))
            if kind == "-epilogues":
                field.use(Plan({40: {"fc1": Fused(16, 32)}}))
            elif kind:
                # The primal's rows in three parts, one of them empty; the tangents' in one.
                each = {40: Split(16, 32, 3), 80: Split(32, 16, 1)}
                field.use(Plan({rows: dict.fromkeys(field.blocks[0].layers, one) for rows, one in each.items()}))
            before = launches
            with short_attention(16) if kind == "-epilogues" else nullcontext():
                got = (field(x, 0), *field.dual(x, z, 0))
            results[precision + kind] = {
                "launches": launches - before,
                "error": [_rms(a, b) for a, b in zip(got, (exact[0], *exact), strict=True)],
                "torch": [_rms(a, b) for a, b in zip((plain[0], *plain), (exact[0], *exact), strict=True)],
            }
    return results


def _tiles() -> list[float]:
    """Relative error of each tile of attention's tangents, against float32."""
    drawn = kernel_cases._attention(2, 1, 70, 48, 2, views=True)(kernel_cases.Draw(torch.bfloat16))
    _, exact = reference.attention_dual(*(t.float() for t in drawn))
    return [_rms(attention_dual.tangents(*drawn, tile).float(), exact) for tile in attention_dual.TILES]


def _rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def main() -> None:
    # Uninitialised memory becomes NaN, so that what a kernel does not write is seen.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    results = {}
    for case in kernel_cases.CASES:
        for name, dtype in kernel_cases.DTYPES.items():
            before = launches
            entries = kernel_cases.measure(case, dtype, "cpu")
            results[f"{case}-{name}"] = {"entries": entries, "launches": launches - before}
    json.dump({"cases": results, "poisoned": _poisoned(), "tiles": _tiles(), "velocity": _velocity()}, sys.stdout)


if __name__ == "__main__":
    main()
