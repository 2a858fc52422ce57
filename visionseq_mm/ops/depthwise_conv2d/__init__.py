"""Depth-wise convolutions of token grids, channels last.

B batch, (h, w) a grid of tokens, C channels, K rows and columns of a kernel.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_dtypes, check_inputs
from visionseq_mm.ops.dispatch import Backends

BACKENDS = Backends('depthwise_conv2d', __name__, 'triton', 'cpu', 'reference')
SIDE = 7  # of a kernel, at most, of Triton's


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A convolution of each channel with a kernel of its own, zeros around the grid.

        out[y, x] = bias + Σ_ij weight[i, j] ⊙ in[y + i − K//2, x + j − K//2]  (+ in[y, x])

    Under autocast all inputs have its dtype. On a CPU this is torch's own convolution (oneDNN).

    Args:
        x: (B, h, w, C).
        weight: (C, 1, K, K) with an odd K, at most 7 on a GPU, beyond which 'auto' is torch's.
        bias: (C).
        residual: whether to add x.
        backend: as that of :func:`visionseq_mm.ops.cluster_attention`.

    Returns:
        (B, h, w, C), in x's dtype or that of autocast.

    Raises:
        ValueError: shapes that do not fit, an even K, an empty grid, a dtype that is not floating
            point or differs, inputs on several devices, an unknown or unsuitable backend.
    """
    op, device = 'depthwise_conv2d', x.device.type
    if bias is None:
        raise ValueError(f'{op}: bias must be a tensor, got None; zeros do the same as none')
    if device != 'meta' and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = (
            t.to(dtype) if t.dtype == torch.float32 else t for t in (x, weight, bias)
        )
    sizes = check_inputs(op, x=(x, 'B h w C'), weight=(weight, 'C 1 K K'), bias=(bias, 'C'))
    check_dtypes(op, dict(x=x, weight=weight, bias=bias), {})
    if sizes['1'] != 1 or sizes['K'] % 2 == 0:
        raise ValueError(
            f'{op}: weight must be (C, 1, K, K) with an odd K, got shape {tuple(weight.shape)}'
        )
    obstacle = None
    if sizes['K'] > SIDE:
        obstacle = f'has kernels of at most {SIDE}×{SIDE}, got K = {sizes["K"]}'
    backend = BACKENDS.select(backend, x, triton=obstacle)
    return _forward(x, weight, bias, residual, backend)


@torch.library.custom_op('visionseq_mm::depthwise_conv2d', mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, residual: bool, backend: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return BACKENDS[backend].forward(x, weight, bias, residual)


@_forward.register_fake
def _(x, weight, bias, residual, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op('visionseq_mm::depthwise_conv2d_backward', mutates_args=())
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, residual: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return BACKENDS[backend].backward(dout, x, weight, residual)


@_backward.register_fake
def _(dout, x, weight, residual, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _save(ctx, inputs, output):
    x, weight, _, ctx.residual, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, dout):
    x, weight = ctx.saved_tensors
    return *_backward(dout, x, weight, ctx.residual, ctx.backend), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.visionseq_mm.depthwise_conv2d)
def _forward_flops(x, weight, *args, **kwargs):
    """Two for a multiplication and addition, as torch counts a convolution."""
    B, h, w, C = x
    return 2 * B * h * w * C * weight[2] * weight[3]


@register_flop_formula(torch.ops.visionseq_mm.depthwise_conv2d_backward)
def _backward_flops(dout, *inputs, **kwargs):
    """Of input and weight."""
    return 2 * _forward_flops(*inputs)
