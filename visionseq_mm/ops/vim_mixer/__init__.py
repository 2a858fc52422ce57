"""The whole mixer of Vision Mamba as one operation, which keeps little for its backward.

B batch, L tokens, D embedding, E inner channels, S directions, R rank of the step size, N states.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_dtypes, check_inputs, finite_or_nan
from visionseq_mm.ops.conv1d_silu import TAPS, check_directions
from visionseq_mm.ops.dispatch import Backends
from visionseq_mm.ops.linear import (
    add_linears,
    input_gradient,
    linear,
    linears,
    weight_gradient,
    weight_gradients,
)
from visionseq_mm.ops.selective_scan import scan_flops, scan_limits

BACKENDS = Backends('vim_mixer', __name__, 'triton', 'cpu', 'reference')


def vim_mixer(
    tokens: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    out_proj: Tensor,
    reverse: Sequence[bool] = (False, True),
    conv_reverse: Sequence[bool] | None = None,
    recompute: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Projections, convolution, selective scans and gate of a Vim block (arXiv 2401.09417).

        x, z = split(tokens in_projᵀ)
        u_s = conv1d_silu(x, conv_weight_s, conv_bias_s)      low, B, C = split(u_s x_proj_sᵀ)
        y_s = selective_scan(u_s, low dt_proj_sᵀ, A_s, B, C, D_s, dt_bias=dt_bias_s)
        out = (mean_s y_s ⊙ SiLU(z)) out_projᵀ

    for the directions s. Under autocast the projections and the convolution have its dtype.

    Args:
        tokens: (B, L, D).
        in_proj: (2 E, D).
        conv_weight: (S, E, W), W at most 4.
        conv_bias: (S, E).
        x_proj: (S, R + 2 N, E).
        dt_proj: (S, E, R).
        dt_bias: (S, E).
        A: (S, E, N), negative for states that decay.
        D: (S, E).
        out_proj: (D, E).
        reverse: for each direction, whether its scan starts at the last token.
        conv_reverse: the same for its convolution; None: as the scan.
        recompute: keep only the tokens and a few states of the scan for the backward, which
            computes the rest again; False: keep x, z, u, low, B, C and the gated mean too.
        backend: as that of :func:`visionseq_mm.ops.selective_scan`.

    Returns:
        (B, L, D), in the dtype of the tokens or of autocast.

    Raises:
        ValueError: shapes that do not fit, more taps or directions, an empty sequence, a dtype
            that is not floating point or differs (A, D and dt_bias may be float32 beside half
            precision), inputs on several devices, an unknown or unsuitable backend, an A that
            is not finite. On a GPU, where looking would wait for the device in every layer,
            and while torch compiles, such an A makes the output NaN instead.
    """
    op = 'vim_mixer'
    conv_reverse = reverse if conv_reverse is None else conv_reverse
    device = tokens.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tokens, in_proj, conv_weight, conv_bias, x_proj, dt_proj, out_proj = (
            x.to(dtype) if x.dtype == torch.float32 else x
            for x in (tokens, in_proj, conv_weight, conv_bias, x_proj, dt_proj, out_proj)
        )
    sizes = check_inputs(
        op,
        tokens=(tokens, 'B L D'),
        out_proj=(out_proj, 'D E'),
        in_proj=(in_proj, '2E D'),
        conv_weight=(conv_weight, 'S E W'),
        conv_bias=(conv_bias, 'S E'),
        dt_proj=(dt_proj, 'S E R'),
        dt_bias=(dt_bias, 'S E'),
        A=(A, 'S E N'),
        D=(D, 'S E'),
        x_proj=(x_proj, 'S R+2N E'),
    )
    E, R, N = (sizes[letter] for letter in 'ERN')
    for name, x, letters, dim, size in (
        ('in_proj', in_proj, '2E', 0, 2 * E),
        ('x_proj', x_proj, 'R+2N', 1, R + 2 * N),
    ):
        if x.shape[dim] != size:
            raise ValueError(
                f'{op}: {name} must have {letters} = {size} in dimension {dim}, where E = {E}, '
                f'R = {R} and N = {N}; got shape {tuple(x.shape)}'
            )
    check_dtypes(
        op,
        dict(
            tokens=tokens,
            in_proj=in_proj,
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            x_proj=x_proj,
            dt_proj=dt_proj,
            out_proj=out_proj,
        ),
        dict(A=A, D=D, dt_bias=dt_bias),
    )
    if sizes['W'] > TAPS:
        raise ValueError(f'{op}: {sizes["W"]} taps in conv_weight, at most {TAPS} are implemented')
    check_directions(op, 'A', A, reverse=reverse, conv_reverse=conv_reverse)
    A = finite_or_nan(op, 'A', A, wait=False)
    backend = BACKENDS.select(backend, tokens, **scan_limits(A))
    inputs = tokens, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj
    keep = 'nothing'
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    # A trace of torch.jit would hold the choice for ever, and checks itself without gradients.
    if trains and not torch.jit.is_tracing():
        keep = 'states' if recompute else 'all'
    return _forward(*inputs, list(reverse), list(conv_reverse), keep, backend)[0]


@torch.library.custom_op(
    'visionseq_mm::vim_mixer',
    mutates_args=(),
    schema=(
        '(Tensor tokens, Tensor in_proj, Tensor conv_weight, Tensor conv_bias, Tensor x_proj, '
        'Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D, Tensor out_proj, int[] reverse, '
        'int[] conv_reverse, str keep, str backend) -> Tensor[]'
    ),
)
def _forward(
    tokens,
    in_proj,
    conv_weight,
    conv_bias,
    x_proj,
    dt_proj,
    dt_bias,
    A,
    D,
    out_proj,
    reverse,
    conv_reverse,
    keep,
    backend,
):
    """The output and what to keep for the backward.

    For 'states' those of the scan alone, for 'all' x, z, u, low with B, C, and y too.
    """
    ops = BACKENDS[backend]
    with torch.autocast(tokens.device.type, enabled=False):
        to_x, to_z = in_proj.chunk(2)
        x = linear(tokens, to_x)
        u = ops.conv_silu(x, conv_weight, conv_bias, conv_reverse)
        if keep != 'all':
            del x  # before there is a z
        low_BC = linears(u, x_proj)
        z = linear(tokens, to_z)
        low, B, C = _split(low_BC, dt_proj, A)
        y, states = ops.scan(u, low, B, C, dt_proj, dt_bias, A, D, z, reverse, keep)
        kept = []
        if keep != 'nothing':
            kept = [states, x, z, u, low_BC, y] if keep == 'all' else [states]
        del z, u
        return [linear(y, out_proj), *kept]


def _split(low_BC, dt_proj, A):
    return low_BC.split([dt_proj.shape[2], A.shape[2], A.shape[2]], -1)


@_forward.register_fake
def _(*inputs):
    tokens, _, _, _, x_proj, _, _, A, _, out_proj, reverse, _, keep, backend = inputs
    inner = tokens.new_empty((*tokens.shape[:2], out_proj.shape[1]))
    u = inner.new_empty((len(reverse), *inner.shape))
    states = BACKENDS[backend].new_states(u, A)
    low_BC = u.new_empty((*u.shape[:3], x_proj.shape[1]))
    x, z, y = (torch.empty_like(inner) for _ in range(3))
    kept = dict(nothing=[], states=[states], all=[states, x, z, u, low_BC, y])[keep]
    return [tokens.new_empty(tokens.shape), *kept]


@torch.library.custom_op(
    'visionseq_mm::vim_mixer_backward',
    mutates_args=(),
    schema=(
        '(Tensor dout, Tensor tokens, Tensor in_proj, Tensor conv_weight, Tensor conv_bias, '
        'Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D, Tensor out_proj, '
        'Tensor[] kept, int[] reverse, int[] conv_reverse, str backend) -> Tensor[]'
    ),
)
def _backward(
    dout,
    tokens,
    in_proj,
    conv_weight,
    conv_bias,
    x_proj,
    dt_proj,
    dt_bias,
    A,
    D,
    out_proj,
    kept,
    reverse,
    conv_reverse,
    backend,
):
    """Gradients of the ten tensors."""
    ops = BACKENDS[backend]
    states, *kept = kept
    with torch.autocast(tokens.device.type, enabled=False):
        if kept:
            x, z, u, low_BC, _ = kept
        else:
            x, z = (linear(tokens, weight) for weight in in_proj.chunk(2))
            u = ops.conv_silu(x, conv_weight, conv_bias, conv_reverse)
            low_BC = linears(u, x_proj)
        low, B, C = _split(low_BC, dt_proj, A)
        dxz = tokens.new_empty((*tokens.shape[:2], in_proj.shape[0]))
        dx, dz = dxz.chunk(2, -1)
        dy = input_gradient(dout, out_proj)
        y, du, dlow, dB, dC, ddt_proj, ddt_bias, dA, dD = ops.scan_backward(
            dy, u, low, B, C, dt_proj, dt_bias, A, D, z, states, reverse, dz
        )
        dout_proj = weight_gradient(dout, y)
        dlow_BC = torch.cat([dlow, dB, dC], -1)
        dx_proj = weight_gradients(dlow_BC, u)
        add_linears(du, dlow_BC, x_proj.mT)
        dconv_weight, dconv_bias = ops.conv_silu_backward(
            du, x, conv_weight, conv_bias, conv_reverse, dx
        )
        dtokens = input_gradient(dxz, in_proj)
        din_proj = weight_gradient(dxz, tokens)
    grads = (
        dtokens,
        din_proj,
        dconv_weight,
        dconv_bias,
        dx_proj,
        ddt_proj,
        ddt_bias,
        dA,
        dD,
        dout_proj,
    )
    return [x.contiguous() for x in grads]


@_backward.register_fake
def _(dout, *inputs):
    return [x.new_empty(x.shape) for x in inputs[:10]]


def _save(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.conv_reverse, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _differentiate(ctx, grads):
    saved = ctx.saved_tensors  # to be read once: recomputation hands them out a single time
    tensors, kept = saved[:10], list(saved[10:])
    if not kept:  # a graph that was made without gradients
        flags = ctx.reverse, ctx.conv_reverse
        kept = _forward(*tensors, *flags, 'states', ctx.backend)[1:]
    out = _backward(grads[0], *tensors, kept, ctx.reverse, ctx.conv_reverse, ctx.backend)
    return (*out, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def projection_flops(tokens, A, conv_weight, dt_proj) -> int:
    """Operations of the projections and the convolution, two for a multiplication and addition."""
    B, L, D = tokens
    S, E, N = A
    R = dt_proj[-1]
    return 2 * B * L * (3 * E * D + S * E * (conv_weight[-1] + (R + 2 * N) + R))


@register_flop_formula(torch.ops.visionseq_mm.vim_mixer)
def mixer_flops(
    tokens, in_proj, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, *args, **kwargs
) -> int:
    """Operations of a mixer with inputs of these shapes, its scan's as `scan_flops` has them."""
    S, E, _ = A
    scan = scan_flops((S, *tokens[:2], E), A, True, True)
    return projection_flops(tokens, A, conv_weight, dt_proj) + scan


@register_flop_formula(torch.ops.visionseq_mm.vim_mixer_backward)
def _backward_flops(dout, *inputs, **kwargs):
    """Two for one of the forward pass, and what was not kept a second time."""
    tokens, _, conv_weight, _, _, dt_proj, _, A, *_ = inputs
    kept = inputs[10]
    projections = projection_flops(tokens, A, conv_weight, dt_proj)
    return 3 * mixer_flops(*inputs) - (projections if len(kept) > 1 else 0)
