"""The activations of convolutional backbones inside kernels, by the names that `reference.activate` takes."""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def activate(x, NAME: tl.constexpr):
    """float32 values through `reference.activate`."""
    tl.static_assert((NAME == "none") or (NAME == "silu") or (NAME == "relu6"))
    if NAME == "silu":
        x = x * tl.sigmoid(x)
    if NAME == "relu6":
        # Maxima and minima drop NaN, which must stay.
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    return x
