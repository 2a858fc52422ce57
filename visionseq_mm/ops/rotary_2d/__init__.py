"""The two-dimensional rotary embedding of SecViT.

B batch, (h, w) a grid of tokens, H heads, Dh channels of a head.
"""

import torch
from torch import Tensor

from visionseq_mm.ops.common import check_dtypes, check_inputs
from visionseq_mm.ops.dispatch import Backends

BACKENDS = Backends('rotary_2d', __name__, 'triton', 'cpu', 'reference')


def rotary_2d(q: Tensor, k: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Turns pairs of channels by angles that grow with a token's row and column.

    The pair (2i, 2i + 1) of the first half of the channels turns with the row y, of the second
    half with the column x, by the same frequencies θ_i = 10000^(−i / (n − 1)) for its n = Dh / 4
    pairs, rounded to float32, the last one included:

        (a, b) -> (a cos yθ_i − b sin yθ_i, b cos yθ_i + a sin yθ_i)

    Positions are plain coordinates at every resolution. Angles and products are float32, or the
    inputs' dtype where that is wider.

    Args:
        q, k: (B, h, w, H, Dh), in one dtype; Dh a multiple of 4.
        backend: as that of :func:`visionseq_mm.ops.cluster_attention`.

    Returns:
        q and k turned, of the same shape and dtype.

    Raises:
        ValueError: shapes that do not fit, a Dh that is no multiple of 4, an empty grid, a dtype
            that is not floating point or differs, inputs on several devices, an unknown or
            unsuitable backend.
    """
    op, letters = 'rotary_2d', 'B h w H Dh'
    sizes = check_inputs(op, q=(q, letters), k=(k, letters))
    check_dtypes(op, dict(q=q, k=k), {})
    if sizes['Dh'] % 4:
        raise ValueError(f'{op}: Dh must be a multiple of 4, got {sizes["Dh"]}')
    return _forward(q, k, False, BACKENDS.select(backend, q))


@torch.library.custom_op('visionseq_mm::rotary_2d', mutates_args=())
def _forward(q: Tensor, k: Tensor, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    """Turned, with `inverse` the other way round."""
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].rotate(q, k, inverse)


@_forward.register_fake
def _(q, k, inverse, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    *_, ctx.inverse, ctx.backend = inputs


def _differentiate(ctx, dq, dk):
    return *_forward(dq, dk, not ctx.inverse, ctx.backend), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def frequencies(Dh: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """θ of the pairs of a half, (Dh / 4)."""
    steps = torch.linspace(0, 1, Dh // 4, device=device, dtype=torch.float32)
    return (1 / 10000**steps).to(dtype)
