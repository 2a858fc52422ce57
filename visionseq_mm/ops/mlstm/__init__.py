"""The mLSTM cell of xLSTM and Vision-LSTM: one direction over a sequence.

B batch, S tokens, H heads, Dh channels of a head.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_dtypes, check_inputs, widest_dtype
from visionseq_mm.ops.dispatch import Backends

BACKENDS = Backends('mlstm', __name__, 'triton', 'cpu', 'reference')


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    reverse: bool = False,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Causal linear attention with exponential input gates and forget gates (arXiv 2405.04517).

        F_t = Σ_{s≤t} logσ(f_s)     D_ts = F_t − F_s + i_s  for s ≤ t     m_t = max_s D_ts
        C_ts = exp(D_ts − m_t) q_t·k_s / √Dh
        h_t = Σ_s C_ts v_s / (max(|Σ_s C_ts|, exp(−m_t)) + eps)

    Linear in S in time and memory. Gates and sums are float32, or the widest input's type where
    that is wider; Triton keeps the states between chunks in the inputs' type, whose range float16
    can leave where keys and values are large and nothing is forgotten.

    Args:
        q, k, v: (B, S, H, Dh), not scaled, in one dtype.
        i, f: (B, S, H), input and forget gates before exponential and sigmoid, in that dtype or
            in float32 beside half precision.
        reverse: from the last token to the first, as `flip(mlstm(flip(…)))` along the tokens.
        eps: added to the normaliser.
        backend: 'auto' or the name of an implementation; None is the environment's
            `VISIONSEQ_BACKEND`, else 'auto'.

    Returns:
        (B, S, H, Dh), in v's dtype. What is not finite may reach earlier tokens too, within a
        few hundred.

    Raises:
        ValueError: shapes that do not fit, an empty sequence, a dtype that is not floating
            point or differs, inputs on several devices, an unknown or unsuitable backend.
    """
    check_inputs(
        'mlstm',
        q=(q, 'B S H Dh'),
        k=(k, 'B S H Dh'),
        v=(v, 'B S H Dh'),
        i=(i, 'B S H'),
        f=(f, 'B S H'),
    )
    check_dtypes('mlstm', dict(q=q, k=k, v=v), dict(i=i, f=f))
    return _forward(q, k, v, i, f, reverse, eps, BACKENDS.select(backend, q))[0]


@torch.library.custom_op('visionseq_mm::mlstm', mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    reverse: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """h, and the sums of the rows of C (B·H, S) in the order of the scan."""
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].forward(q, k, v, i, f, reverse, eps)


@_forward.register_fake
def _(q, k, v, i, f, reverse, eps, backend):
    B, S, H, _ = q.shape
    sums = q.new_empty((B * H, S), dtype=widest_dtype(q, k, v, i, f))
    return v.new_empty(v.shape), sums


@torch.library.custom_op(
    'visionseq_mm::mlstm_backward',
    mutates_args=(),
    schema=(
        '(Tensor dh, Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor h, '
        'Tensor sums, bool reverse, float eps, str backend) -> Tensor[]'
    ),
)
def _backward(dh, q, k, v, i, f, h, sums, reverse, eps, backend):
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].backward(dh, q, k, v, i, f, h, sums, reverse, eps)


@_backward.register_fake
def _(dh, q, k, v, i, f, h, sums, reverse, eps, backend):
    return [x.new_empty(x.shape) for x in (q, k, v, i, f)]


def _save(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, dh, _):
    grads = _backward(dh, *ctx.saved_tensors, ctx.reverse, ctx.eps, ctx.backend)
    return (*grads, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.visionseq_mm.mlstm)
def mlstm_flops(q, *args, **kwargs) -> int:
    """Operations of a cell with a q of this shape, as a recurrence.

    Two for each multiplication and addition, of k with [v, 1] into the state and of q with the
    state: linear in S, and the same for every implementation. One that goes in chunks of T tokens
    adds about T / Dh of it inside them. The two S² products of the parallel form are in no
    backend; the ViL paper's figures (1.5, 5.1, 18.6 G at 224²) fit projections and one of them.
    """
    B, S, H, Dh = q
    return 4 * B * S * H * Dh * (Dh + 1)


@register_flop_formula(torch.ops.visionseq_mm.mlstm_backward)
def _backward_flops(dh, q, *args, **kwargs):
    """Four products for the two of the forward pass, and its states a second time."""
    return mlstm_flops(q) * 5 // 2
