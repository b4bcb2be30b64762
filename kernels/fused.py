"""The operators of `reference` under the same names: on a GPU their Triton kernels, elsewhere the reference itself.

A model takes either module as its `ops`. What has no kernel of its own is the reference's: torch already has the best
known attention, and plain LayerNorm and upsampling are not on the fast path.
"""

from flowad_fast.kernels.affine_step import affine_error_map, affine_step, affine_step_error
from flowad_fast.kernels.attention_dual import attention_dual
from flowad_fast.kernels.gate_residual_ln_modulate import (
    gate_residual_ln_modulate,
    gate_residual_ln_modulate_dual,
    gate_residual_ln_modulate_dual_fp8,
    gate_residual_ln_modulate_fp8,
)
from flowad_fast.kernels.gelu_tanh import gelu_tanh, gelu_tanh_dual, gelu_tanh_dual_fp8, gelu_tanh_fp8
from flowad_fast.kernels.linear_split_k import linear_split_k, linear_split_k_fp8
from flowad_fast.kernels.ln_modulate import ln_modulate, ln_modulate_dual, ln_modulate_dual_fp8, ln_modulate_fp8
from flowad_fast.kernels.pyramid_gather import pyramid_gather
from flowad_fast.kernels.quantise_rows import quantise_rows
from flowad_fast.kernels.reference import attention, layer_norm, upsample
from flowad_fast.kernels.upsample_score import upsample_score

__all__ = [
    "affine_error_map",
    "affine_step",
    "affine_step_error",
    "attention",
    "attention_dual",
    "gate_residual_ln_modulate",
    "gate_residual_ln_modulate_dual",
    "gate_residual_ln_modulate_dual_fp8",
    "gate_residual_ln_modulate_fp8",
    "gelu_tanh",
    "gelu_tanh_dual",
    "gelu_tanh_dual_fp8",
    "gelu_tanh_fp8",
    "layer_norm",
    "linear_split_k",
    "linear_split_k_fp8",
    "ln_modulate",
    "ln_modulate_dual",
    "ln_modulate_dual_fp8",
    "ln_modulate_fp8",
    "pyramid_gather",
    "quantise_rows",
    "upsample",
    "upsample_score",
]
