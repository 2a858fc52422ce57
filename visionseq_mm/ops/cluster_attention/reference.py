"""Clustering of tokens and attention inside the clusters, in plain PyTorch.

B batch, L tokens, H heads, Dh channels of a head, K clusters, T tokens of a cluster. Heads are
independent sequences, so q, k, v are taken as rows (B·L·H, Dh), and a cluster is a list of rows.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from visionseq_mm.ops.common import widest_dtype

BLOCK = 2**20  # attention weights that the backward holds at a time


def partition(k, num_clusters, valid):
    """Tokens (B, H, L) int32 by their cosine with the mean of the (valid) keys.

    The clusters are runs of equal length in this order, so `num_clusters` does not change it.
    """
    k = k.to(widest_dtype(k))
    if valid is None:
        mean = k.mean(1, keepdim=True, dtype=torch.float64)
    else:
        weight = valid[:, :, None, None]
        mean = torch.where(weight, k, 0).sum(1, keepdim=True, dtype=torch.float64)
        mean /= weight.sum(1, keepdim=True).clamp(min=1)
    # Not a matrix product: its rounding depends on a row's place, and equal keys must tie.
    cosine = (F.normalize(k, dim=-1) * F.normalize(mean, dim=-1).to(k.dtype)).sum(-1)
    if valid is not None:
        cosine = cosine.masked_fill(~valid[:, :, None], float('inf'))
    order = cosine.transpose(1, 2).sort(dim=-1, stable=True).indices
    return order.to(torch.int32, memory_format=torch.contiguous_format)


def clusters(idx: Tensor, num_clusters: int, valid: Tensor | None) -> Iterator[Tensor]:
    """All clusters as rows (G, T), gathered by length T so that no mask is needed."""
    B, H, L = idx.shape
    tokens = idx + torch.arange(B, device=idx.device)[:, None, None] * L
    rows = tokens * H + torch.arange(H, device=idx.device)[:, None]  # int64
    counts = [L] * B if valid is None else valid.sum(1).tolist()
    for n in sorted(set(counts) - {0}):
        samples = rows
        if valid is not None:
            same = [b for b, count in enumerate(counts) if count == n]
            samples = rows[torch.tensor(same, device=rows.device)]
        borders = [c * n // num_clusters for c in range(num_clusters + 1)]
        starts: dict[int, list[int]] = {}  # by length: n // K, and one more
        for start, stop in pairwise(borders):
            if stop > start:
                starts.setdefault(stop - start, []).append(start)
        for length, first in starts.items():
            places = torch.tensor(first, device=rows.device)[:, None]
            places = places + torch.arange(length, device=rows.device)
            yield samples[:, :, places].flatten(0, 2)


def _gather(rows, *inputs):
    """(G, T, ·) of each input (B·L·H, ·), for rows (G, T)."""
    return [x.index_select(0, rows.view(-1)).view(*rows.shape, -1) for x in inputs]


def _scatter(rows, target, value):
    target.index_copy_(0, rows.view(-1), value.reshape(-1, target.shape[-1]).to(target.dtype))


def forward(q, k, v, idx, num_clusters, valid, lepe, keep):
    """The output, what was attended to (B, L, H, Dh), and the logarithms of the sums of exp(q kᵀ
    / √Dh) over each cluster, (B, H, L) by token, or None where they are not to be kept."""
    B, H, L = idx.shape
    Dh, dtype = q.shape[-1], widest_dtype(q)
    inputs = [x.reshape(-1, Dh) for x in (q, k, v)]
    attended = q.new_zeros(q.shape)
    sums = q.new_zeros((B, L, H), dtype=dtype) if keep else None
    for rows in clusters(idx, num_clusters, valid):
        q_, k_, v_ = _gather(rows, *inputs)
        y = F.scaled_dot_product_attention(q_[None], k_[None], v_[None])
        _scatter(rows, attended.view(-1, Dh), y)
        if keep:
            q_, k_ = q_.to(dtype) * Dh**-0.5, k_.to(dtype)
            step = max(1, BLOCK // k_[..., 0].numel())
            parts = [(block @ k_.mT).logsumexp(-1) for block in q_.split(step, 1)]
            _scatter(rows, sums.view(-1, 1), torch.cat(parts, 1))
    out = attended
    if lepe is not None:
        kept = lepe if valid is None else lepe.masked_fill(~valid[:, :, None, None], 0)
        out = attended + kept
    return out, attended, sums.transpose(1, 2).contiguous() if keep else None


def backward(dout, q, k, v, idx, attended, sums, num_clusters, valid):
    """Gradients of q, k and v, with the softmax computed again, a block of queries at a time.

    With P = exp(q kᵀ / √Dh − sums) and dP = dout vᵀ:

        dS = P ⊙ (dP − dout · attended) / √Dh      dq = dS k      dk = dSᵀ q      dv = Pᵀ dout
    """
    Dh, dtype = q.shape[-1], widest_dtype(q)
    inputs = [x.reshape(-1, Dh) for x in (q, k, v, dout)]
    delta = (dout.to(dtype) * attended.to(dtype)).sum(-1).view(-1, 1)
    sums = sums.transpose(1, 2).reshape(-1, 1)
    grads = [x.new_zeros(x.shape) for x in (q, k, v)]
    for group in clusters(idx, num_clusters, valid):
        length = group.shape[1]
        for rows in group.split(max(1, BLOCK // length**2)):
            q_, k_, v_, dy = (x.to(dtype) for x in _gather(rows, *inputs))
            total, offset = _gather(rows, sums, delta)
            q_ = q_ * Dh**-0.5
            dq, dk, dv = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
            step = max(1, BLOCK // length)
            for start in range(0, length, step):
                block = slice(start, start + step)
                P = (q_[:, block] @ k_.mT - total[:, block]).exp()
                dv.baddbmm_(P.mT, dy[:, block])
                dS = P * (dy[:, block] @ v_.mT - offset[:, block])
                dq[:, block] = dS @ k_
                dk.baddbmm_(dS.mT, q_[:, block])
            for grad, value in zip(grads, (dq.mul_(Dh**-0.5), dk, dv), strict=True):
                _scatter(rows, grad.view(-1, Dh), value)
    return grads
