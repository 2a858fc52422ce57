"""Selective scan of Mamba and Vision Mamba, over a sequence in one direction or in both.

S directions, B batch, L tokens, D channels, N states. Inside, every op has the directions in its
first dimension; none flips anything in memory.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_dtypes, check_inputs, finite_or_nan
from visionseq_mm.ops.dispatch import Backends

BACKENDS = Backends('selective_scan', __name__, 'triton', 'cpu', 'reference')
TRITON_STATES = 64


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

    States are float32, or float64 for inputs of that.

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
        backend: 'auto', or the name of an implementation: 'triton' (at most 64 states, no
            float64), 'cpu' (Numba) or 'reference'; None is the environment's
            `VISIONSEQ_BACKEND`, else 'auto'.

    u, dt, B, C and z have one dtype; A, D and dt_bias have that or, beside half precision,
    float32.

    Returns:
        (B, L, D), in u's dtype.

    Raises:
        ValueError: shapes that do not fit, an empty sequence, a dtype that is not floating
            point or differs, inputs on several devices, an A that is not finite (on a GPU,
            looking at it waits for the device; while torch compiles it makes the output NaN),
            an unknown or unsuitable backend.
    """
    shapes = dict(u='B L D', dt='B L D', A='D N', B='B L N', C='B L N', D='D', dt_bias='D')
    inputs = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    backend = _check('selective_scan', shapes, inputs, z, backend)
    u, dt, A, B, C, D, dt_bias = (None if x is None else x[None] for x in inputs.values())
    return _forward(u, dt, A, B, C, D, z, dt_bias, [bool(reverse)], backend)[0]


def bidirectional_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mean of a scan from the first token and one from the last, each of its own inputs, gated.

        out = (selective_scan(u[0], …) + selective_scan(u[1], …, reverse=True)) / 2 ⊙ SiLU(z)

    Args:
        u, dt: (2, B, L, D); A: (2, D, N); B, C: (2, B, L, N); D, dt_bias: (2, D); as those of
            :func:`selective_scan`, and nothing is flipped.
        z: (B, L, D), the gate of the sum.
        backend: as there.

    Returns:
        (B, L, D), in u's dtype.

    Raises:
        ValueError: as there, and for another number of directions than 2.
    """
    shapes = dict(
        u='S B L D', dt='S B L D', A='S D N', B='S B L N', C='S B L N', D='S D', dt_bias='S D'
    )
    inputs = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    backend = _check('bidirectional_scan', shapes, inputs, z, backend)
    if len(u) != 2:
        raise ValueError(f'bidirectional_scan: u must be (2, B, L, D), got shape {tuple(u.shape)}')
    A = inputs['A']
    return _forward(u, dt, A, B, C, D, z, dt_bias, [False, True], backend)[0]


def _check(op, shapes, inputs, z, backend):
    """Name of the implementation to run, where nothing is wrong with the inputs.

    Where A cannot be seen, what is not finite in it becomes NaN.
    """
    checked = {name: (x, shapes[name]) for name, x in inputs.items()}
    check_inputs(op, **checked, z=(z, 'B L D'))
    parameters = {name: inputs[name] for name in ('A', 'D', 'dt_bias')}
    sequences = {name: x for name, x in inputs.items() if name not in parameters}
    check_dtypes(op, {**sequences, 'z': z}, parameters)
    inputs['A'] = finite_or_nan(op, 'A', inputs['A'], wait=True)
    return BACKENDS.select(backend, inputs['u'], **scan_limits(inputs['A']))


def scan_limits(A: Tensor) -> dict[str, str]:
    """Backends that do not take so many states, and why."""
    if A.shape[-1] <= TRITON_STATES:
        return {}
    return dict(triton=f'takes at most {TRITON_STATES} states, and A is {tuple(A.shape)}')


@torch.library.custom_op(
    'visionseq_mm::selective_scan',
    mutates_args=(),
    schema=(
        '(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, '
        'Tensor? dt_bias, int[] reverse, str backend) -> (Tensor, Tensor)'
    ),
)
def _forward(u, dt, A, B, C, D, z, dt_bias, reverse, backend):
    """The mean over the directions, gated, and the states that the backward starts from."""
    with torch.autocast(u.device.type, enabled=False):
        return BACKENDS[backend].forward(u, dt, A, B, C, D, z, dt_bias, reverse)


@_forward.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, reverse, backend):
    return u.new_empty(u.shape[1:]), BACKENDS[backend].new_states(u, A)


@torch.library.custom_op(
    'visionseq_mm::selective_scan_backward',
    mutates_args=(),
    schema=(
        '(Tensor dout, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, '
        'Tensor? z, Tensor? dt_bias, Tensor states, int[] reverse, '
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


def scan_flops(u, A, skip: bool, gate: bool) -> int:
    """Operations of a scan of shapes u (S, B, L, D) and A (S, D, N), as the field counts them.

    9 for each token, channel and state (state-spaces/mamba, issue 110), one for each token and
    channel where there is a skip connection, and one where there is a gate.
    """
    S, B, L, D = u
    return B * L * D * (S * (9 * A[-1] + skip) + gate)


@register_flop_formula(torch.ops.visionseq_mm.selective_scan)
def _forward_flops(u, dt, A, B, C, D, z, *args, **kwargs):
    return scan_flops(u, A, D is not None, z is not None)


@register_flop_formula(torch.ops.visionseq_mm.selective_scan_backward)
def _backward_flops(dout, *inputs, **kwargs):
    """Two for one of the forward pass, and its states a second time."""
    return 3 * _forward_flops(*inputs)
