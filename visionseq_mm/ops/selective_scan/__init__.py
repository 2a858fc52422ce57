"""Selective scan of Mamba and Vision Mamba: one direction over a sequence.

B batch, L tokens, D channels, N states.
"""

import torch
from torch import Tensor

from visionseq_mm.ops.common import check_inputs, widest_dtype
from visionseq_mm.ops.dispatch import Backends
from visionseq_mm.ops.selective_scan import reference

BACKENDS = Backends('selective_scan', reference=reference)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """State space model whose step, input and output depend on the token (arXiv 2312.00752).

        δ_t = softplus(dt_t + dt_bias)
        h_t = exp(δ_t A) ⊙ h_{t−1} + δ_t u_t ⊗ B_t,    h_0 = 0
        y_t = h_t C_t + D ⊙ u_t
        out_t = y_t ⊙ SiLU(z_t)

    States are float32, or the widest input's type where that is wider; dtypes may be mixed.

    Args:
        u: (B, L, D), the sequence.
        dt: (B, L, D), step sizes before bias and softplus.
        A: (D, N), negative for a state that decays.
        B: (B, L, N), input weights.
        C: (B, L, N), output weights.
        D: (D), weight of the skip connection.
        z: (B, L, D), the gate before its SiLU.
        dt_bias: (D).
        reverse: scan from the last token to the first, as
            `flip(selective_scan(flip(…)))` along the tokens.
        backend: 'auto' or the name of an implementation; None is the environment's
            `VISIONSEQ_BACKEND`, else 'auto'.

    Returns:
        (B, L, D), in u's dtype.

    Raises:
        ValueError: shapes that do not fit, an empty sequence, a dtype that is not floating
            point, inputs on several devices, an unknown backend.
    """
    check_inputs(
        'selective_scan',
        u=(u, 'B L D'),
        dt=(dt, 'B L D'),
        A=(A, 'D N'),
        B=(B, 'B L N'),
        C=(C, 'B L N'),
        D=(D, 'D'),
        z=(z, 'B L D'),
        dt_bias=(dt_bias, 'D'),
    )
    return _forward(u, dt, A, B, C, D, z, dt_bias, reverse, BACKENDS.select(backend))[0]


@torch.library.custom_op('visionseq_mm::selective_scan', mutates_args=())
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[backend].forward(u, dt, A, B, C, D, z, dt_bias, reverse)


@_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, reverse, backend):
    chunks = -(-u.shape[1] // BACKENDS[backend].CHUNK)
    states = u.new_empty(
        (chunks, u.shape[0], A.shape[1], A.shape[0]),
        dtype=widest_dtype(u, dt, A, B, C, D, z, dt_bias),
    )
    return u.new_empty(u.shape), states


@torch.library.custom_op(
    'visionseq_mm::selective_scan_backward',
    mutates_args=(),
    schema=(
        '(Tensor dout, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, '
        'Tensor? z, Tensor? dt_bias, Tensor states, bool reverse, '
        'str backend) -> Tensor[]'
    ),
)
def _backward(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse, backend):
    """Gradients of those of the eight tensors that are there."""
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[backend].backward(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse)


@_backward.register_fake
def _(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse, backend):
    return [x.new_empty(x.shape) for x in (u, dt, A, B, C, D, z, dt_bias) if x is not None]


def _save(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, dout, _):
    *tensors, states = ctx.saved_tensors
    grads = iter(_backward(dout, *tensors, states, ctx.reverse, ctx.backend))
    return (*(None if x is None else next(grads) for x in tensors), None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
