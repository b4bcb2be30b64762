"""Linear layers of the inference form, with their weights in the precision of the matrix product.

A weight is cast or quantised once, when the layer is made. Both kinds take a tensor; `Fp8Linear` also takes rows that
the producing operator has quantised already. `tangent` is the same map without the bias, which carries no tangent.
"""

import copy
import platform
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Final, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowad_fast.config import Precision
from flowad_fast.kernels import reference
from flowad_fast.kernels.reference import quantise_rows

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""Dtype of activations between the matrix products, by precision; in fp8 it is that of layers kept in bf16, too."""
FP8_MULTIPLE = 16
"""The scaled matrix product needs both dimensions of a weight to be multiples of this; other layers stay in bf16."""

Quantised = tuple[Tensor, Tensor]
"""Rows in e4m3 (..., D) with their float32 scales (..., 1)."""


class Split(NamedTuple):
    """The product of `kernels.linear_split_k`: rows and columns of a program, parts of the inner dimension."""

    rows: int
    columns: int
    parts: int

    def __str__(self) -> str:
        return f"split {self.rows}x{self.columns}/{self.parts}"


LIBRARY: Final = "library"
"""The GPU's own matrix product."""
GELU: Final = "library with GELU"
"""The same with GELU in its epilogue."""
Product = Literal["library", "library with GELU"] | Split
"""What runs a layer, see `flowad_fast.engines.products`."""


class Linear(nn.Module):
    """x W^T + b in the dtype of W; float32 layers share the parameters that they are made of.

    `products` says for some numbers of rows what runs the product; the library runs all others.
    """

    quantised = False

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = _parameter(weight, dtype)
        self.bias = None if bias is None else _parameter(bias, dtype)
        self.products: dict[int, Product] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) of any floating dtype to (..., out) in the layer's dtype."""
        return self._product(x, self.bias)

    def tangent(self, dx: Tensor | Quantised) -> Tensor:
        """As `forward`, without the bias."""
        assert isinstance(dx, Tensor), "only fp8 layers are given quantised rows"
        return self._product(dx, None)

    def fuses_gelu(self, x: Tensor) -> bool:
        """Whether `gelu_tanh` is how the layer is to run on x."""
        return _product_of(self.products, x) == GELU

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """`forward` and GELU in the product's epilogue; CUDA's is the tanh form, for which the CPU has none."""
        assert self.bias is not None, "the layer before GELU has a bias"
        flat = x.to(self.dtype).flatten(0, -2)
        return torch._addmm_activation(self.bias, flat, self.weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        split = _product_of(self.products, x)
        if isinstance(split, Split):
            from flowad_fast.kernels.linear_split_k import linear_split_k

            return linear_split_k(x.to(self.dtype), self.weight, bias, *split)
        return F.linear(x.to(self.dtype), self.weight, bias)


class Fp8Linear(nn.Module):
    """x W^T + b with x and W in e4m3, one float32 scale a row of each; bfloat16 out.

    On a GPU it is torch's scaled matrix product, or for the numbers of rows in `products` another one. torch has none
    with row scales on the CPU, so there the same quantised values are multiplied in float32: the drift is that of fp8,
    the speed is not.
    """

    quantised = True
    dtype = torch.bfloat16

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        q, scale = quantise_rows(weight)
        self.weight = _parameter(q, q.dtype)
        self.scale = _parameter(scale.T.contiguous(), torch.float32)
        self.bias = None if bias is None else _parameter(bias, torch.bfloat16)
        self.products: dict[int, Product] = {}

    def forward(self, x: Tensor | Quantised) -> Tensor:
        """(..., in), or rows that are quantised already, to (..., out) bfloat16."""
        return self._product(x, self.bias)

    def tangent(self, dx: Tensor | Quantised) -> Tensor:
        """As `forward`, without the bias."""
        return self._product(dx, None)

    def _product(self, x: Tensor | Quantised, bias: Tensor | None) -> Tensor:
        q, scale = x if isinstance(x, tuple) else quantise_rows(x)
        split = _product_of(self.products, q)
        if isinstance(split, Split):
            from flowad_fast.kernels.linear_split_k import linear_split_k_fp8

            return linear_split_k_fp8(q, scale, self.weight, self.scale, bias, *split)
        if q.device.type == "cpu":
            return reference.linear_split_k_fp8(q, scale, self.weight, self.scale, bias)
        flat = torch._scaled_mm(
            q.flatten(0, -2),
            self.weight.t(),
            scale_a=scale.flatten(0, -2),
            scale_b=self.scale,
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return flat.unflatten(0, q.shape[:-1])


class PackedLinear(nn.Module):
    """A float32 `Linear` on an x86 CPU, its weight laid out for oneDNN once; inference only, not for export.

    It is the product that Inductor uses for frozen weights, and faster there than torch's own at a few hundred rows.
    """

    quantised = False
    dtype = torch.float32

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        # An opaque tensor, which must stay out of the state dict.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def tangent(self, dx: Tensor | Quantised) -> Tensor:
        """As `forward`, without the bias."""
        assert isinstance(dx, Tensor), "only fp8 layers are given quantised rows"
        return torch.ops.mkldnn._linear_pointwise(dx, self._packed, None, "none", [], "")

    def fuses_gelu(self, x: Tensor) -> bool:
        """Whether `gelu_tanh` is how the layer is to run on x: always."""
        return True

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """`forward` and the tanh form of GELU in one pass."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "gelu", [], "tanh")


_Module = TypeVar("_Module", bound=nn.Module)


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed product for this CPU."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def pack(module: _Module, keep: Iterable[object] = ()) -> _Module:
    """A copy of `module` with its float32 linears packed; all other tensors, and the objects in `keep`, are shared."""
    shared = (*module.parameters(), *module.buffers(), *keep)
    copied = copy.deepcopy(module, {id(one): one for one in shared})
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and child.dtype == torch.float32:
                setattr(parent, name, PackedLinear(child))
    return copied


AnyLinear = Linear | Fp8Linear | PackedLinear


def make_linear(
    name: str, weight: Tensor, bias: Tensor | None, precision: Precision, keep_bf16: tuple[str, ...]
) -> AnyLinear:
    """The layer `name` in a precision; in fp8, names that match a pattern of `keep_bf16` stay in bf16."""
    if precision == "fp8" and not any(fnmatch(name, pattern) for pattern in keep_bf16):
        if all(size % FP8_MULTIPLE == 0 for size in weight.shape):
            return Fp8Linear(weight, bias)
    return Linear(weight, bias, weight.dtype if precision in ("fp32", "tf32") else DTYPES[precision])


def _product_of(products: dict[int, Product], x: Tensor) -> Product:
    # Without choices, as when a graph is traced, the number of rows must stay open.
    return products.get(x.shape[:-1].numel(), LIBRARY) if products else LIBRARY


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter) and tensor.dtype == dtype:
        return tensor
    return nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
