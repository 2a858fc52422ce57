"""Cluster attention of SecViT: tokens sorted by content, attention inside runs of that order.

B batch, L tokens, H heads, Dh channels of a head, K clusters.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_inputs
from visionseq_mm.ops.dispatch import Backends

BACKENDS = Backends('cluster_attention', __name__, 'reference')


def cluster_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_clusters: int,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every token to the tokens of its cluster: `sec_partition`, `sec_attention`.

    Args:
        q, k: (B, L, H, Dh), after rotary embedding, not scaled.
        v: (B, L, H, Dh).
        num_clusters: K, at most L.
        valid: (B, L) bool; false tokens count in no mean, cluster or key, and their output
            and gradients are 0. None means all true.
        backend: 'auto' or the name of an implementation; None is the environment's
            `VISIONSEQ_BACKEND`, else 'auto'.

    Returns:
        (B, L, H, Dh), in v's dtype.

    Raises:
        ValueError: shapes that do not fit, an empty sequence, a dtype that is not floating
            point, inputs on several devices, more clusters than tokens, an unknown backend.
    """
    idx = sec_partition(k, num_clusters, valid, backend)
    return sec_attention(q, k, v, idx, num_clusters, valid, backend)


def sec_partition(
    k: Tensor, num_clusters: int, valid: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Orders the tokens of each head by their cosine with the mean key (semantic equitable
    clustering, arXiv 2405.13337).

    Cluster c of the n valid tokens is made of the places c·n//K to (c+1)·n//K of the order. The
    cosine is float32, or k's dtype where that is wider; it has no gradient. Order is ascending,
    equal cosines by token index, invalid tokens last.

    Args:
        k: (B, L, H, Dh), after rotary embedding; its scale does not matter.
        num_clusters, valid, backend: see `cluster_attention`.

    Returns:
        (B, H, L) int32, token indices.

    Raises:
        ValueError: see `cluster_attention`.
    """
    _check('sec_partition', num_clusters, valid, k=(k, 'B L H Dh'))
    return _partition(k.detach(), num_clusters, valid, BACKENDS.select(backend, k))


def sec_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    num_clusters: int,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q kᵀ / √Dh) v inside each cluster of an order that `sec_partition` gave.

    Args:
        idx: (B, H, L) int32, each row a permutation of the tokens, invalid ones last.
        q, k, v, num_clusters, valid, backend: see `cluster_attention`.

    Returns:
        (B, L, H, Dh), in v's dtype.

    Raises:
        ValueError: see `cluster_attention`; an order of another shape, dtype or device.
    """
    sizes = _check(
        'sec_attention',
        num_clusters,
        valid,
        q=(q, 'B L H Dh'),
        k=(k, 'B L H Dh'),
        v=(v, 'B L H Dh'),
    )
    shape = (sizes['B'], sizes['H'], sizes['L'])
    if idx.shape != shape or idx.dtype != torch.int32 or idx.device != q.device:
        raise ValueError(
            f'sec_attention: idx must be (B, H, L) = {shape}, int32, on {q.device}, '
            f'got {tuple(idx.shape)}, {idx.dtype}, on {idx.device}'
        )
    return _forward(q, k, v, idx, num_clusters, valid, BACKENDS.select(backend, k))


def _check(op: str, num_clusters: int, valid: Tensor | None, **inputs) -> dict[str, int]:
    sizes = check_inputs(op, **inputs)
    if not 1 <= num_clusters <= sizes['L']:
        raise ValueError(
            f'{op}: num_clusters must be between 1 and the {sizes["L"]} tokens, got {num_clusters}'
        )
    if valid is not None:
        shape = (sizes['B'], sizes['L'])
        device = next(iter(inputs.values()))[0].device
        if valid.shape != shape or valid.dtype != torch.bool or valid.device != device:
            raise ValueError(
                f'{op}: valid must be (B, L) = {shape}, bool, on {device}, '
                f'got {tuple(valid.shape)}, {valid.dtype}, on {valid.device}'
            )
    return sizes


@torch.library.custom_op('visionseq_mm::sec_partition', mutates_args=())
def _partition(k: Tensor, num_clusters: int, valid: Tensor | None, backend: str) -> Tensor:
    with torch.autocast(k.device.type, enabled=False):
        return BACKENDS[backend].partition(k, num_clusters, valid).contiguous()


@_partition.register_fake
def _(k, num_clusters, valid, backend):
    B, L, H, _ = k.shape
    return k.new_empty((B, H, L), dtype=torch.int32)


@torch.library.custom_op('visionseq_mm::sec_attention', mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    num_clusters: int,
    valid: Tensor | None,
    backend: str,
) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].forward(q, k, v, idx, num_clusters, valid)


@_forward.register_fake
def _(q, k, v, idx, num_clusters, valid, backend):
    return v.new_empty(v.shape)


@torch.library.custom_op(
    'visionseq_mm::sec_attention_backward',
    mutates_args=(),
    schema=(
        '(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor idx, int num_clusters, '
        'Tensor? valid, str backend) -> Tensor[]'
    ),
)
def _backward(dout, q, k, v, idx, num_clusters, valid, backend):
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].backward(dout, q, k, v, idx, num_clusters, valid)


@_backward.register_fake
def _(dout, q, k, v, idx, num_clusters, valid, backend):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _save(ctx, inputs, output):
    q, k, v, idx, ctx.num_clusters, valid, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, idx, valid)


def _differentiate(ctx, dout):
    q, k, v, idx, valid = ctx.saved_tensors
    grads = _backward(dout, q, k, v, idx, ctx.num_clusters, valid, ctx.backend)
    return (*grads, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.visionseq_mm.sec_attention)
def attention_flops(q, k, v, idx, num_clusters, *args, **kwargs) -> int:
    """Operations of an attention with inputs of these shapes, as if all tokens were valid.

    Two for each multiplication and addition of q kᵀ and of the weights with v inside the clusters,
    as torch counts an attention, and FlashAttention's authors do.
    """
    B, L, H, Dh = q
    size, longer = divmod(L, num_clusters)
    pairs = (num_clusters - longer) * size**2 + longer * (size + 1) ** 2
    return 4 * B * H * Dh * pairs


@register_flop_formula(torch.ops.visionseq_mm.sec_attention_backward)
def _backward_flops(dout, *inputs, **kwargs):
    """Four products for the two of the forward pass, and q kᵀ a second time."""
    return attention_flops(*inputs) * 5 // 2
