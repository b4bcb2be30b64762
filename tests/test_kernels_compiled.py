"""Every Triton kernel compiled ahead of time for GPUs that are not here, as launched at paper scale.

Launchers run on tensors without storage and their launches are recorded; Triton then compiles each for a target, and
the binary's own resource table is read: a kernel that spills registers fails.
"""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import identify_mutated_tensors
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowad_fast.engines.products import FUSED_TILES, TILES
from flowad_fast.kernels import attention_dual, fused, linear_split_k
from flowad_fast.kernels.launch import MAX_KEYS, early_launches

B, N, C, D, K = 32, 256, 272, 2048, 10
NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv"}


@dataclass(frozen=True)
class Chip:
    """What bounds the programs that one multiprocessor holds at once."""

    capability: int
    warps: int
    programs: int
    shared: int
    shared_each: int
    tensor_cores: str
    """Their instruction for matrix products."""
    registers: int = 65536


CHIPS = {
    "sm_90": Chip(90, warps=64, programs=32, shared=228 << 10, shared_each=227 << 10, tensor_cores="wgmma.mma_async"),
    "sm_89": Chip(89, warps=48, programs=24, shared=100 << 10, shared_each=99 << 10, tensor_cores="mma.sync"),
}


TOO_LARGE = {("sm_89", "attention_dual-64x32x8")}
"""Candidates that a chip has no room for; a measured choice leaves them out."""


@dataclass(frozen=True)
class Launch:
    kernel: triton.JITFunction
    arguments: tuple
    options: dict

    def values(self) -> dict[str, object]:
        """The kernel's arguments by name."""
        names = self.kernel.arg_names
        values = dict(zip(names[: len(self.arguments)], self.arguments, strict=True)) | {
            k: v for k, v in self.options.items() if k in names
        }
        assert set(values) == set(names)
        return values


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _mods(count: int) -> list[Tensor]:
    return list(_empty(B, 6, D).unsqueeze(-2).unbind(1)[:count])


def _heads(*lead: int, heads: int = 8, tokens: int = N) -> list[Tensor]:
    parts = _empty(*lead, tokens, 3 * D).chunk(3, -1)
    return [part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in parts]


def _stream(*lead: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return _empty(*lead, B, N, D, dtype=dtype)


def _row_calls(suffix: str) -> dict[str, Callable[[], object]]:
    """The operators that exist plain and quantising, under names that end in `suffix`."""
    x, dx = partial(_stream), partial(_stream, K)
    mlp, dmlp = partial(_empty, B, N, 4 * D), partial(_empty, K, B, N, 4 * D)

    def call(name: str, mods: int, *tensors: Callable[[], Tensor]) -> tuple[str, Callable[[], object]]:
        return name + suffix, lambda: getattr(fused, name + suffix)(*(make() for make in tensors), *_mods(mods))

    return dict(
        [
            call("ln_modulate", 2, x),
            call("ln_modulate_dual", 2, x, dx),
            call("gate_residual_ln_modulate", 3, x, x),
            call("gate_residual_ln_modulate_dual", 3, x, dx, x, dx),
            call("gelu_tanh", 0, mlp),
            call("gelu_tanh_dual", 0, mlp, dmlp),
        ]
    )


def _calls() -> dict[str, Callable[[], object]]:
    f32 = torch.float32
    calls: dict[str, Callable[[], object]] = {
        "affine_step": lambda: fused.affine_step(_empty(B, N, C, dtype=f32), _empty(B, N, C), 1.0, -1 / 3),
        "affine_error_map-reference": lambda: fused.affine_error_map(
            _empty(B, N, C, dtype=f32), _empty(B, N, C), 1.0, -1 / 3, _empty(B, N, C, dtype=f32)
        ),
        "affine_error_map": lambda: fused.affine_error_map(_empty(B, N, C, dtype=f32), _empty(B, N, C), 1.0, -1 / 3),
        "attention_dual": lambda: fused.attention_dual(*_heads(B), *_heads(K, B)),
        "attention_dual-d64": lambda: fused.attention_dual(*_heads(B, heads=32), *_heads(K, B, heads=32)),
        "attention_dual-longest": lambda: fused.attention_dual(
            *_heads(B, tokens=MAX_KEYS), *_heads(K, B, tokens=MAX_KEYS)
        ),
        "attention_short-16": lambda: fused.attention_short(*_heads(1), 16),
        "attention_short-32": lambda: fused.attention_short(*_heads(1), 32),
        "attention_short-64": lambda: fused.attention_short(*_heads(1), 64),
        "attention_short_fp8-16": lambda: _attention_fp8(1, 16),
        "attention_short_fp8-32": lambda: _attention_fp8(1, 32),
        "attention_short_fp8-64": lambda: _attention_fp8(B, 64),
        "attention_short-longest": lambda: fused.attention_short(*_heads(1, tokens=MAX_KEYS), 32),
        "quantise_rows": lambda: fused.quantise_rows(_stream()),
        "quantise_rows-mlp": lambda: fused.quantise_rows(_empty(B, N, 4 * D)),
        "pyramid_gather": lambda: fused.pyramid_gather(
            [_empty(B, c, 16 * s, 16 * s) for c, s in ((24, 8), (32, 4), (56, 2), (160, 1))], f32
        ),
        "pyramid_gather-channels-last": lambda: fused.pyramid_gather(
            [
                _empty(B, c, 16 * s, 16 * s).contiguous(memory_format=torch.channels_last)
                for c, s in ((24, 8), (32, 4), (56, 2), (160, 1))
            ],
            f32,
        ),
        "stem": lambda: fused.stem(
            _empty(B, 3, 256, 256, dtype=f32), _half(48, 3, 3, 3), _empty(48, dtype=f32), 2, 0, "silu"
        ),
        "depthwise": lambda: fused.depthwise(
            _half(B, 64, 64, 192), _half(5, 5, 192), _empty(192, dtype=f32), 2, 2, "silu", True
        ),
        "depthwise-relu6": lambda: fused.depthwise(
            _half(1, 128, 128, 24), _half(3, 3, 24), _empty(24, dtype=f32), 1, 1, "relu6"
        ),
        "squeeze_excite": lambda: fused.squeeze_excite(
            _empty(B, 64, 960, dtype=f32),
            4096,
            _half(40, 960),
            _empty(40, dtype=f32),
            _half(960, 40),
            _empty(960, dtype=f32),
        ),
        "pointwise": lambda: _pointwise(B, 24, 144),
        "pointwise-project": lambda: _pointwise(B, 960, 160, residual=True),
        "pointwise-one": lambda: _pointwise(1, 960, 160, residual=True),
        "pointwise-narrow": lambda: _pointwise(1, 144, 24),
        "upsample_score-parts": lambda: fused.upsample_score(_empty(B, 16, 16, dtype=f32), 256),
        "ln_modulate-fp32": lambda: fused.ln_modulate(_stream(dtype=f32), *_mods(2), torch.bfloat16),
        "gate_residual_ln_modulate-fp32": lambda: fused.gate_residual_ln_modulate(
            _stream(dtype=f32), _stream(), *_mods(3), torch.bfloat16
        ),
        "gate_residual_ln_modulate_dual-fp32": lambda: fused.gate_residual_ln_modulate_dual(
            _stream(dtype=f32), _stream(K, dtype=f32), _stream(), _stream(K), *_mods(3), torch.bfloat16
        ),
    }
    for rows, columns in TILES:
        for parts in (1, 4):
            tiling, suffix = (rows, columns, parts), f"-{rows}x{columns}" + ("-parts" if parts > 1 else "")
            calls["linear_split_k" + suffix] = partial(_linear, tiling)
            calls["linear_split_k_fp8" + suffix] = partial(_linear_fp8, tiling)
    for tile in attention_dual.TILES[1:]:
        name = f"attention_dual-{tile.rows}x{tile.columns}x{tile.warps}"
        calls[name] = partial(attention_dual.tangents, *_heads(B), *_heads(K, B), tile)
    for rows, columns in FUSED_TILES:
        calls[f"linear_gelu_fp8-{rows}x{columns}"] = partial(_linear_gelu, rows, columns)
    return calls | _row_calls("") | _row_calls("_fp8")


def _half(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.float16)


def _pointwise(batch: int, inner: int, width: int, residual: bool = False) -> Tensor:
    f32 = torch.float32
    x, weight, bias = _half(batch, 16, 16, inner), _half(width, inner), _empty(width, dtype=f32)
    if not residual:
        return fused.pointwise(x, weight, bias, "silu")
    return fused.pointwise(x, weight, bias, "none", _empty(batch, inner, dtype=f32), _half(batch, 16, 16, width))


def _linear(tiling: tuple[int, int, int]) -> Tensor:
    """A block's last product at batch 1."""
    return fused.linear_split_k(_empty(1, N, 4 * D), _empty(D, 4 * D), _empty(D), *tiling)


def _attention_fp8(batch: int, rows: int) -> tuple[Tensor, Tensor]:
    f32 = torch.float32
    return fused.attention_short_fp8(*_heads(batch), _empty(batch, N, 1, dtype=f32), _empty(2, dtype=f32), rows)


def _linear_gelu(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A block's third product at batch 32."""
    fp8, f32 = torch.float8_e4m3fn, torch.float32
    x, scale = _empty(B, N, D, dtype=fp8), _empty(B, N, 1, dtype=f32)
    weight, weight_scale = _empty(4 * D, D, dtype=fp8), _empty(1, 4 * D, dtype=f32)
    return fused.linear_gelu_fp8(
        x, scale, weight, weight_scale, _empty(4 * D), _empty(2, dtype=f32), rows, columns
    )  # fmt: skip


def _linear_fp8(tiling: tuple[int, int, int]) -> Tensor:
    fp8, f32 = torch.float8_e4m3fn, torch.float32
    x, scale = _empty(1, N, 4 * D, dtype=fp8), _empty(1, N, 1, dtype=f32)
    weight, weight_scale = _empty(D, 4 * D, dtype=fp8), _empty(1, D, dtype=f32)
    return fused.linear_split_k_fp8(x, scale, weight, weight_scale, _empty(D), *tiling)


CALLS = _calls()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Launches that operators make on tensors without storage."""
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: triton.JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple) -> Callable[..., None]:
            assert all(size > 0 for size in grid)
            return lambda *args, **options: recorded.append(Launch(self.kernel, args, options))

    for module in (module for module in fused.MODULES if hasattr(module, "wrap_triton")):
        monkeypatch.setattr(module, "wrap_triton", Recorder)
        monkeypatch.setattr(module, "runs_triton", lambda x: True)
    yield recorded


def _compile(launch: Launch, chip: Chip) -> triton.compiler.CompiledKernel:
    """Compile a launch as Triton's own launcher would specialise it."""
    kernel = launch.kernel
    names, values = kernel.arg_names, launch.values()
    signature, constants, attributes = {}, {}, {}
    declared = {p.name for p in kernel.params if p.is_constexpr}
    for i, name in enumerate(names):
        value = values[name]
        if name in declared or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    options = {k: v for k, v in launch.options.items() if k not in names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options=options)


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local memory of a binary, by the disassembler that Triton brings."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    assert found.keys() == {"REG", "STACK", "SHARED", "LOCAL"}, text
    return found


def _occupancy(registers: int, shared: int, warps: int, chip: Chip) -> float:
    """The share of a multiprocessor's warps that are resident, as far as resources bound it."""
    by_registers = chip.registers // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = chip.shared // (-(-(shared + 1024) // 128) * 128)
    programs = min(chip.programs, chip.warps // warps, by_registers, by_shared)
    return programs * warps / chip.warps


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("target", CHIPS)
def test_compiles_without_spills(name: str, target: str, launches: list[Launch], tmp_path: Path) -> None:
    chip = CHIPS[target]
    CALLS[name]()
    assert len(launches) == (2 if name.endswith("-parts") else 1)
    for launch in launches:
        compiled = _compile(launch, chip)
        used = _resources(compiled.asm["cubin"], tmp_path)
        shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
        occupancy = _occupancy(used["REG"], shared, warps, chip)
        print(
            f"{target} {name} {launch.kernel.__name__}: {used['REG']} registers, {shared} B shared, {warps} warps, "
            f"occupancy {occupancy:.0%}"
        )
        assert used["STACK"] == used["LOCAL"] == 0, f"registers spill: {used}"
        assert (shared <= chip.shared_each) is ((target, name) not in TOO_LARGE), "a multiprocessor's shared memory"
        assert (occupancy > 0) is ((target, name) not in TOO_LARGE)
        assert "griddepcontrol" not in compiled.asm["ptx"], "waits only where it is launched early"
        if ".dot" in launch.kernel.src:
            # Hopper's own instruction needs 64 rows per program; with fewer Triton takes the one of Ampere.
            few = name.endswith("-longest") or (name.startswith("attention_short") and not name.endswith("-64"))
            few |= name.startswith("attention_dual-32x")
            instruction = "mma.sync" if few else chip.tensor_cores
            assert instruction in compiled.asm["ptx"], "the products miss the tensor cores"


TOUCHES = re.compile(r"\b(ld\.(global|volatile)|st\.|cp\.|atom|red\.|prefetch|bra\b)")
"""What a program may not do before it has waited, in PTX: memory that others write, or a way around."""
EARLY = (
    "ln_modulate", "ln_modulate_dual_fp8", "gate_residual_ln_modulate", "gate_residual_ln_modulate_fp8", "gelu_tanh",
    "gelu_tanh_fp8", "quantise_rows", "attention_short-16", "attention_short_fp8-16", "attention_dual", "affine_step",
    "affine_error_map-reference", "upsample_score-parts", "pyramid_gather", "stem", "depthwise", "squeeze_excite",
    "pointwise-project", *(name for name in CALLS if name.endswith("-parts") and name.startswith("linear")),
    *(name for name in CALLS if name.startswith("linear_gelu")),
)  # fmt: skip


@pytest.mark.parametrize("name", EARLY)
def test_what_starts_early_waits_before_it_touches_memory(name: str, launches: list[Launch]) -> None:
    with early_launches():
        CALLS[name]()
    assert launches
    for launch in launches:
        compiled = _compile(launch, CHIPS["sm_90"])
        before, wait, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
        body = before.partition(".entry")[2]
        assert wait and body and compiled.metadata.launch_pdl
        assert not (found := TOUCHES.search(body)), found
        assert "griddepcontrol.launch_dependents" in after and "griddepcontrol.wait" not in after


def test_every_kernel_takes_its_turn_first() -> None:
    kernels = [
        value
        for module in fused.MODULES
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    ]
    assert len(kernels) >= 16
    for kernel in kernels:
        assert re.search(r"\):\n    take_turn\(EARLY\)\n", kernel.src), kernel


class _Driver:
    """What Triton asks of a GPU driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("name", CALLS)
def test_compilers_see_what_a_kernel_writes(name: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's analysis finds exactly the results: it would copy whatever else it took for written."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    results = CALLS[name]()
    stored = {t.untyped_storage()._cdata for t in (results if isinstance(results, tuple) else (results,))}
    for launch in reversed(launches):
        values = launch.values()
        tensors = {n: v.untyped_storage()._cdata for n, v in values.items() if isinstance(v, Tensor)}
        written = [n for n, storage in tensors.items() if storage in stored]
        assert written
        assert set(identify_mutated_tensors(launch.kernel, values, {})) == set(written)
        stored |= set(tensors.values())  # what this kernel reads, an earlier one may have written


@pytest.mark.parametrize(("name", "expected"), [("linear_split_k_fp8-64x64", 2**30), ("linear_split_k-64x64", 0)])
def test_the_sums_of_fp8_products_are_the_chosen_ones(name: str, expected: int, launches: list[Launch]) -> None:
    """`PROMOTE_FP8` leaves a part's sum to the tensor cores: said by what was compiled, not by Triton's default."""
    assert linear_split_k.PROMOTE_FP8 is None
    CALLS[name]()
    text = _compile(launches[0], CHIPS["sm_90"]).asm["ttgir"]
    found = set(re.findall(r"maxNumImpreciseAcc = (\d+)", text)) or {"0"}
    assert "warp_group_dot" in text and found == {str(expected)}


def test_every_operator_is_compiled() -> None:
    compiled = {name.split("-")[0] for name in CALLS}
    assert compiled == set(fused.KERNELS)
