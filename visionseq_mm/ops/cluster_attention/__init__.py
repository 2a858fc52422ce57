"""Cluster attention of SecViT: tokens sorted by content, attention inside runs of that order.

B batch, L tokens, H heads, Dh channels of a head, K clusters.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionseq_mm.ops.common import check_dtypes, check_inputs, widest_dtype
from visionseq_mm.ops.dispatch import Backends

BACKENDS = Backends('cluster_attention', __name__, 'triton', 'cpu', 'reference')
HEAD_DIMS, CLUSTERS = 128, 64  # at most, of Triton's kernels


def cluster_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_clusters: int,
    valid: Tensor | None = None,
    backend: str | None = None,
    lepe: Tensor | None = None,
) -> Tensor:
    """Attention of every token to the tokens of its cluster: `sec_partition`, `sec_attention`.

    Args:
        q, k: (B, L, H, Dh), after rotary embedding, not scaled.
        v: (B, L, H, Dh).
        num_clusters: K, at most L; on a GPU at most 64, and Dh at most 128, beyond which 'auto'
            is the reference.
        valid: (B, L) bool; false tokens count in no mean, cluster or key, and their output
            and gradients are 0. None means all true.
        backend: 'auto' or the name of an implementation; None is the environment's
            `VISIONSEQ_BACKEND`, else 'auto'.
        lepe: (B, L, H, Dh), added to the output of valid tokens; SecViT's convolution of v.

    Returns:
        (B, L, H, Dh), in the dtype of the inputs.

    Raises:
        ValueError: shapes that do not fit, an empty sequence, a dtype that is not floating
            point or differs, inputs on several devices, more clusters than tokens, an unknown or
            unsuitable backend.
    """
    idx = sec_partition(k, num_clusters, valid, backend)
    return sec_attention(q, k, v, idx, num_clusters, valid, backend, lepe)


def sec_partition(
    k: Tensor, num_clusters: int, valid: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Orders the tokens of each head by the cluster they belong to, which is by their cosine with
    the mean key (semantic equitable clustering, arXiv 2405.13337).

    Cluster c of the n valid tokens is made of the places c·n//K to (c+1)·n//K in the ascending
    order of the cosines, equal ones by token index; invalid tokens come last. The order inside a
    cluster is up to the backend, and always the same. The cosine is float32, or k's dtype where
    that is wider, of a mean that is summed in float64; it has no gradient.

    Args:
        k: (B, L, H, Dh), after rotary embedding; its scale does not matter.
        num_clusters, valid, backend: see `cluster_attention`.

    Returns:
        (B, H, L) int32, token indices.

    Raises:
        ValueError: see `cluster_attention`.
    """
    _check('sec_partition', num_clusters, valid, k=(k, 'B L H Dh'))
    return _partition(k.detach(), num_clusters, valid, _select(backend, k, num_clusters))


def cluster_labels(idx: Tensor, num_clusters: int, valid: Tensor | None = None) -> Tensor:
    """The cluster of each token from an order of them: (B, H, L) int64, -1 for invalid tokens.

    Args:
        idx: (B, H, L), what `sec_partition` returned.
        num_clusters, valid: what it was given.
    """
    place = torch.arange(idx.shape[2], device=idx.device)
    n = idx.shape[2] if valid is None else valid.sum(1).clamp(min=1)[:, None, None]
    # Cluster c begins at c·n // K, so this is the last one that begins at the place or before.
    cluster = (((place + 1) * num_clusters - 1) // n).expand(idx.shape)
    labels = torch.empty_like(cluster).scatter_(2, idx.long(), cluster)
    return labels if valid is None else labels.masked_fill_(~valid[:, None], -1)


def sec_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    num_clusters: int,
    valid: Tensor | None = None,
    backend: str | None = None,
    lepe: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √Dh) v + lepe inside each cluster of an order that `sec_partition` gave.

    Args:
        idx: (B, H, L) int32, each row a permutation of the tokens, invalid ones last.
        q, k, v, num_clusters, valid, backend, lepe: see `cluster_attention`.

    Returns:
        (B, L, H, Dh), in the dtype of the inputs.

    Raises:
        ValueError: see `cluster_attention`; an order of another shape, dtype or device; on a CPU,
            where looking costs nothing, one with numbers that are no tokens.
    """
    op, letters = 'sec_attention', 'B L H Dh'
    inputs = dict(q=q, k=k, v=v, lepe=lepe)
    sizes = _check(op, num_clusters, valid, **{n: (x, letters) for n, x in inputs.items()})
    check_dtypes(op, inputs, {})
    shape = (sizes['B'], sizes['H'], sizes['L'])
    if idx.shape != shape or idx.dtype != torch.int32 or idx.device != q.device:
        raise ValueError(
            f'{op}: idx must be (B, H, L) = {shape}, int32, on {q.device}, '
            f'got {tuple(idx.shape)}, {idx.dtype}, on {idx.device}'
        )
    trains = any(x is not None and x.requires_grad for x in inputs.values())
    # A trace of torch.jit would hold the choice for ever, and checks itself without gradients.
    keep = trains and torch.is_grad_enabled() and not torch.jit.is_tracing()
    backend = _select(backend, q, num_clusters)
    return _forward(q, k, v, idx, num_clusters, valid, lepe, keep, backend)[0]


def _check(op: str, num_clusters: int, valid: Tensor | None, **inputs) -> dict[str, int]:
    sizes = check_inputs(op, **inputs)
    if isinstance(num_clusters, bool) or not isinstance(num_clusters, int | torch.SymInt | Tensor):
        raise ValueError(f'{op}: num_clusters must be an integer, got {num_clusters!r}')
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


def _select(backend: str | None, x: Tensor, num_clusters: int) -> str:
    obstacle = None
    if num_clusters > CLUSTERS:
        obstacle = f'has at most {CLUSTERS} clusters, got {num_clusters}'
    if x.shape[3] > HEAD_DIMS:
        obstacle = f'has heads of at most {HEAD_DIMS} channels, got Dh = {x.shape[3]}'
    return BACKENDS.select(backend, x, triton=obstacle)


@torch.library.custom_op('visionseq_mm::sec_partition', mutates_args=())
def _partition(k: Tensor, num_clusters: int, valid: Tensor | None, backend: str) -> Tensor:
    with torch.autocast(k.device.type, enabled=False):
        return BACKENDS[backend].partition(k, num_clusters, valid)


@_partition.register_fake
def _(k, num_clusters, valid, backend):
    B, L, H, _ = k.shape
    return k.new_empty((B, H, L), dtype=torch.int32)


@torch.library.custom_op(
    'visionseq_mm::sec_attention',
    mutates_args=(),
    schema=(
        '(Tensor q, Tensor k, Tensor v, Tensor idx, int num_clusters, Tensor? valid, '
        'Tensor? lepe, bool keep, str backend) -> Tensor[]'
    ),
)
def _forward(q, k, v, idx, num_clusters, valid, lepe, keep, backend):
    """The output and, to keep for the backward, the logarithms of the softmax's sums (B, H, L) by
    token and, where it is not the output, what was attended to."""
    if idx.device.type == 'cpu':
        low, high = (int(x) for x in idx.aminmax())
        if low < 0 or high >= idx.shape[2]:
            raise ValueError(
                f'sec_attention: idx must hold tokens from 0 to {idx.shape[2] - 1}, '
                f'got numbers from {low} to {high}'
            )
    with torch.autocast(q.device.type, enabled=False):
        out, attended, sums = BACKENDS[backend].forward(
            q, k, v, idx, num_clusters, valid, lepe, keep
        )
    if not keep:
        return [out]
    return [out, sums] if lepe is None else [out, sums, attended]


@_forward.register_fake
def _(q, k, v, idx, num_clusters, valid, lepe, keep, backend):
    out = [q.new_empty(q.shape)]
    if keep:
        out.append(q.new_empty(idx.shape, dtype=widest_dtype(q)))
    if keep and lepe is not None:
        out.append(q.new_empty(q.shape))
    return out


@torch.library.custom_op(
    'visionseq_mm::sec_attention_backward',
    mutates_args=(),
    schema=(
        '(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor idx, Tensor attended, Tensor sums, '
        'int num_clusters, Tensor? valid, str backend) -> Tensor[]'
    ),
)
def _backward(dout, q, k, v, idx, attended, sums, num_clusters, valid, backend):
    with torch.autocast(q.device.type, enabled=False):
        return BACKENDS[backend].backward(dout, q, k, v, idx, attended, sums, num_clusters, valid)


@_backward.register_fake
def _(dout, q, k, v, *args):
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _save(ctx, inputs, output):
    q, k, v, idx, ctx.num_clusters, valid, lepe, ctx.keep, ctx.backend = inputs
    ctx.has_lepe = lepe is not None
    kept = [output[2] if ctx.has_lepe else output[0], output[1]] if ctx.keep else []
    ctx.save_for_backward(q, k, v, idx, valid, *kept)


def _differentiate(ctx, grads):
    q, k, v, idx, valid, *kept = ctx.saved_tensors  # once: recomputation hands them out once
    dout = grads[0]
    if not kept:  # a graph that was made without gradients
        kept = _forward(q, k, v, idx, ctx.num_clusters, valid, None, True, ctx.backend)
    dq, dk, dv = _backward(dout, q, k, v, idx, *kept, ctx.num_clusters, valid, ctx.backend)
    dlepe = None
    if ctx.has_lepe:
        dlepe = dout if valid is None else dout.masked_fill(~valid[:, :, None, None], 0)
    return dq, dk, dv, None, None, None, dlepe, None, None


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
def _backward_flops(dout, q, k, v, idx, attended, sums, num_clusters, *args, **kwargs):
    """Four products for the two of the forward pass, and q kᵀ a second time."""
    return attention_flops(q, k, v, idx, num_clusters) * 5 // 2
