"""What the Triton kernels share."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# log(1 + e) / e on [0, 1], highest power first, within 2⁻²²; tl.log takes more than twice as long.
LOG1P = tl.constexpr(
    (
        0.0052534578,
        -0.0295885074,
        0.078361668,
        -0.136747697,
        0.191114311,
        -0.248443699,
        0.333192713,
        -0.499995015,
        0.999999971,
    )
)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(-LOG2E * x))


@triton.jit
def softplus(x):
    """log(1 + eˣ) as max(x, 0) + log(1 + e), e = exp(−|x|)."""
    e = tl.exp2(-LOG2E * tl.abs(x))
    p = LOG1P[0]
    for i in tl.static_range(1, 9):
        p = p * e + LOG1P[i]
    return tl.where(x > 0, x, 0) + p * e


@triton.jit
def softplus_slope(y):
    """Derivative of y = softplus(x): 1 − exp(−y), by its series where that would cancel."""
    series = y * (1 - y * (0.5 - y * (1 / 6)))
    return tl.where(y < 1 / 64, series, 1 - tl.exp2(-LOG2E * y))


@triton.jit
def load(ptr, mask):
    """Float32, whatever the memory holds."""
    return tl.load(ptr, mask=mask, other=0).to(tl.float32)


@triton.jit
def store(ptr, x, mask):
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def row(ptr, index, stride, token, token_stride):
    """Token `token` of sequence `index`; 64 bits, for 2³¹ elements are not many."""
    return ptr + index.to(tl.int64) * stride + token.to(tl.int64) * token_stride


@triton.jit
def dense_row(ptr, index, token, L, D):
    """The same in a contiguous (·, L, D)."""
    return ptr + (index.to(tl.int64) * L + token) * D


def unit_stride(x: Tensor | None) -> Tensor | None:
    """Itself where its last dimension is dense, else a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def rows(x: Tensor) -> Tensor:
    """(S, B, L, ·) as (S·B, L, ·), a view where the strides allow it."""
    return unit_stride(x.flatten(0, 1))


def flags(reverse: Sequence[bool]) -> int:
    """Directions as bits, the first one lowest."""
    return sum(1 << s for s, flip in enumerate(reverse) if flip)
