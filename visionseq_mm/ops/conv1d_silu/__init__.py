"""The short convolution in front of a selective scan, for all directions at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_dtypes, check_inputs
from visionseq_mm.ops.dispatch import Backends

BACKENDS = Backends('conv1d_silu', __name__, 'triton', 'cpu', 'reference')
TAPS = 4


def conv1d_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    reverse: Sequence[bool] = (False, True),
    backend: str | None = None,
) -> Tensor:
    """Depth-wise convolution over a token and its W − 1 predecessors, then SiLU.

        u_t = SiLU(bias + Σ_k weight_k ⊙ x_{t−W+1+k}),    x = 0 outside the sequence

    A reversed direction does the same from the last token to the first: over a token and its
    W − 1 successors, the last tap on the token itself.

    Args:
        x: (B, L, D), read once for all directions.
        weight: (S, D, W), of each direction; W at most 4.
        bias: (S, D).
        reverse: for each of the S directions, 1 or 2.
        backend: as that of :func:`visionseq_mm.ops.selective_scan`.

    Returns:
        (S, B, L, D), in x's dtype.

    Raises:
        ValueError: shapes that do not fit, more taps or directions, an empty sequence, a dtype
            that is not floating point or differs, inputs on several devices, an unknown or
            unsuitable backend.
    """
    op = 'conv1d_silu'
    sizes = check_inputs(op, x=(x, 'B L D'), weight=(weight, 'S D W'), bias=(bias, 'S D'))
    check_dtypes(op, dict(x=x), dict(weight=weight, bias=bias))
    if sizes['W'] > TAPS:
        raise ValueError(f'{op}: weight has {sizes["W"]} taps, at most {TAPS} are implemented')
    check_directions(op, 'weight', weight, reverse=reverse)
    return _forward(x, weight, bias, list(reverse), BACKENDS.select(backend, x))


def check_directions(op: str, name: str, x: Tensor, **flags: Sequence[bool]):
    """Checks that there are one or two directions in dim 0 of `x`, and a flag for each.

    Raises:
        ValueError: otherwise.
    """
    if len(x) > 2:
        raise ValueError(f'{op}: {name} has {len(x)} directions, there are at most 2')
    for flag, values in flags.items():
        if not isinstance(values, list | tuple) or len(values) != len(x):
            raise ValueError(
                f'{op}: {flag}={values!r} must have a value for each of the {len(x)} directions '
                f'of {name}'
            )


@torch.library.custom_op(
    'visionseq_mm::conv1d_silu',
    mutates_args=(),
    schema='(Tensor x, Tensor weight, Tensor bias, int[] reverse, str backend) -> Tensor',
)
def _forward(x, weight, bias, reverse, backend):
    return BACKENDS[backend].forward(x, weight, bias, reverse)


@_forward.register_fake
def _(x, weight, bias, reverse, backend):
    return x.new_empty((len(reverse), *x.shape))


@torch.library.custom_op(
    'visionseq_mm::conv1d_silu_backward',
    mutates_args=(),
    schema=(
        '(Tensor du, Tensor x, Tensor weight, Tensor bias, int[] reverse, str backend) -> '
        '(Tensor, Tensor, Tensor)'
    ),
)
def _backward(du, x, weight, bias, reverse, backend):
    dx = x.new_empty(x.shape)
    dweight, dbias = BACKENDS[backend].backward(du, x, weight, bias, reverse, dx)
    return dx, dweight, dbias


@_backward.register_fake
def _(du, x, weight, bias, reverse, backend):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _save(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, du):
    return (*_backward(du, *ctx.saved_tensors, ctx.reverse, ctx.backend), None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.visionseq_mm.conv1d_silu)
def _forward_flops(x, weight, *args, **kwargs):
    """Two for a multiplication and addition, as torch counts a convolution."""
    B, L, D = x
    S, _, W = weight
    return 2 * S * B * L * D * W


@register_flop_formula(torch.ops.visionseq_mm.conv1d_silu_backward)
def _backward_flops(du, *inputs, **kwargs):
    """Of input and weight, and the convolution a second time."""
    return 3 * _forward_flops(*inputs)
