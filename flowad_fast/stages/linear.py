"""Linear layers of the inference form, with their weights in the precision of the matrix product.

A weight is cast or quantised once, when the layer is made. Every kind is a `Layer`: it says in `takes` what its rows
are to be, and `kernels.operators` gives them so.
"""

import copy
import platform
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowad_fast.config import Precision
from flowad_fast.kernels import reference
from flowad_fast.kernels.operators import Rows
from flowad_fast.kernels.reference import quantise_rows
from flowad_fast.stages.arithmetic import NUMBERS
from flowad_fast.stages.plan import Fused, Library, Product, Split

FP8_MULTIPLE = 16
"""The scaled matrix product needs both dimensions of a weight to be multiples of this; other layers stay in bf16."""


class Layer(nn.Module):
    """x W^T + b in one arithmetic.

    Attributes:
        takes: type of the rows that it multiplies; it converts tensors of others.
        bias: (out,) or None.
        products: what runs the product, by number of rows, see `Plan`; the library runs all others.
    """

    takes: torch.dtype
    bias: nn.Parameter | None
    products: Mapping[int, Product] = {}

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Rows) -> Tensor:
        """(..., in) to (..., out)."""
        return self._product(x, self.bias)

    def tangent(self, dx: Rows) -> Tensor:
        """As `forward`, without the bias, which carries no tangent."""
        return self._product(dx, None)

    def fuses_gelu(self, x: Rows) -> bool:
        """Whether `gelu_tanh` is how the layer is to run on x."""
        return False

    def gelu_tanh(self, x: Rows) -> Rows:
        """`forward` and the tanh form of GELU in one pass, for layers that fuse it; in the type that they take."""
        raise NotImplementedError(f"{type(self).__name__} does not fuse GELU; ask fuses_gelu first")

    @abstractmethod
    def _product(self, x: Rows, bias: Tensor | None) -> Tensor:
        """(..., in) to (..., out), with the bias that is given."""

    def _chosen(self, x: Tensor) -> Product:
        # Without choices, as when a graph is traced, the number of rows must stay open.
        return self.products.get(x.shape[:-1].numel(), Library.PLAIN) if self.products else Library.PLAIN


class Linear(Layer):
    """A layer of a floating type, which its results have too; float32 layers share the parameters that made them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight)
        self.takes = dtype
        self.weight = _parameter(weight, dtype)
        self.bias = None if bias is None else _parameter(bias, dtype)

    def fuses_gelu(self, x: Rows) -> bool:
        """See `Layer`: where the plan says so."""
        return self._chosen(_floating(x)) is Library.GELU

    def gelu_tanh(self, x: Rows) -> Rows:
        """See `Layer`: in the product's epilogue; CUDA's is the tanh form, for which the CPU has none."""
        assert self.bias is not None, "the layer before GELU has a bias"
        x = _floating(x).to(self.takes)
        flat = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return flat.unflatten(0, x.shape[:-1])

    def _product(self, x: Rows, bias: Tensor | None) -> Tensor:
        x = _floating(x).to(self.takes)
        product = self._chosen(x)
        if isinstance(product, Split):
            from flowad_fast.kernels.linear_split_k import linear_split_k

            return linear_split_k(x, self.weight, bias, *product)
        return F.linear(x, self.weight, bias)


class Fp8Linear(Layer):
    """A layer of e4m3 rows and weights, one float32 scale per row of each; bfloat16 out.

    On a GPU it is torch's scaled matrix product, or what the plan names. torch has none with row scales on the CPU, so
    there the same quantised values are multiplied in float32: the drift is that of fp8, the speed is not.
    """

    takes = reference.FP8
    all_reach: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight)
        q, scale = quantise_rows(weight)
        self.weight = _parameter(q, q.dtype)
        self.scale = _parameter(scale.T.contiguous(), torch.float32)
        self.bias = None if bias is None else _parameter(bias, torch.bfloat16)
        self.register_buffer("all_reach", self.reach(), persistent=False)

    def reach(self, first: int = 0) -> Tensor:
        """`reference.farthest` of the outputs from the `first` on."""
        bias = None if self.bias is None else self.bias[first:]
        return reference.farthest(self.weight[first:], self.scale[:, first:], bias)

    def fuses_gelu(self, x: Rows) -> bool:
        """See `Layer`: where the plan says so."""
        return isinstance(self._chosen(x[0] if isinstance(x, tuple) else x), Fused)

    def gelu_tanh(self, x: Rows) -> Rows:
        """See `Layer`: in the epilogue of a product of our own."""
        from flowad_fast.kernels.linear_split_k import linear_gelu_fp8

        q, scale = x if isinstance(x, tuple) else quantise_rows(x)
        product = self._chosen(q)
        assert isinstance(product, Fused), "ask fuses_gelu first"
        found: tuple[Tensor, Tensor] = linear_gelu_fp8(
            q, scale, self.weight, self.scale, self.bias, self.all_reach, *product
        )
        return found

    def _product(self, x: Rows, bias: Tensor | None) -> Tensor:
        q, scale = x if isinstance(x, tuple) else quantise_rows(x)
        product = self._chosen(q)
        if isinstance(product, Split):
            from flowad_fast.kernels.linear_split_k import linear_split_k_fp8

            return linear_split_k_fp8(q, scale, self.weight, self.scale, bias, *product)
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


class PackedLinear(Layer):
    """A float32 `Linear` on an x86 CPU, its weight laid out for oneDNN once; inference only, not for export.

    It is the product that Inductor uses for frozen weights, and faster there than torch's own at a few hundred rows.
    """

    takes = torch.float32

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.weight)
        self.bias = linear.bias
        # An opaque tensor, which must stay out of the state dict.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def fuses_gelu(self, x: Rows) -> bool:
        """See `Layer`: always."""
        return True

    def gelu_tanh(self, x: Rows) -> Rows:
        """See `Layer`."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "gelu", [], "tanh")

    def _product(self, x: Rows, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")


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
            if isinstance(child, Linear) and child.takes == torch.float32:
                setattr(parent, name, PackedLinear(child))
    return copied


def make_linear(
    name: str, weight: Tensor, bias: Tensor | None, precision: Precision, keep_bf16: tuple[str, ...]
) -> Layer:
    """The layer `name` in a precision; in fp8, names that match a pattern of `keep_bf16` stay in bf16."""
    if precision == "fp8" and not any(fnmatch(name, pattern) for pattern in keep_bf16):
        if all(size % FP8_MULTIPLE == 0 for size in weight.shape):
            return Fp8Linear(weight, bias)
    dtype = NUMBERS[precision].dtype
    return Linear(weight, bias, weight.dtype if dtype == torch.float32 else dtype)


def _floating(x: Rows) -> Tensor:
    assert isinstance(x, Tensor), "only layers that take quantised rows are given them"
    return x


def _parameter(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter) and tensor.dtype == dtype:
        return tensor
    return nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
