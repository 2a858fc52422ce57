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
        mean = k.mean(1, keepdim=True)
    else:
        weight = valid[:, :, None, None]
        mean = torch.where(weight, k, 0).sum(1, keepdim=True)
        mean /= weight.sum(1, keepdim=True).clamp(min=1)
    # Not a matrix product: its rounding depends on a row's place, and equal keys must tie.
    cosine = (F.normalize(k, dim=-1) * F.normalize(mean, dim=-1)).sum(-1)
    if valid is not None:
        cosine = cosine.masked_fill(~valid[:, :, None], float('inf'))
    return cosine.transpose(1, 2).sort(dim=-1, stable=True).indices.int()


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


def forward(q, k, v, idx, num_clusters, valid):
    """Attention in every cluster, (B, L, H, Dh) in v's dtype."""
    common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    inputs = [x.reshape(-1, x.shape[-1]).to(common) for x in (q, k, v)]
    out = v.new_zeros(v.shape)
    flat = out.view(-1, v.shape[-1])
    for rows in clusters(idx, num_clusters, valid):
        q_, k_, v_ = (x.index_select(0, rows.view(-1)).view(1, *rows.shape, -1) for x in inputs)
        y = F.scaled_dot_product_attention(q_, k_, v_)
        flat.index_copy_(0, rows.view(-1), y.reshape(-1, v.shape[-1]).to(v.dtype))
    return out


def backward(dout, q, k, v, idx, num_clusters, valid):
    """Gradients of q, k and v, with the softmax computed again, a block of queries at a time.

    With P = softmax(q kᵀ / √Dh) and dP = dout vᵀ:

        dS = P ⊙ (dP − Σ_j P ⊙ dP) / √Dh      dq = dS k      dk = dSᵀ q      dv = Pᵀ dout
    """
    Dh = q.shape[-1]
    dtype = widest_dtype(q, k, v)
    inputs = [x.reshape(-1, Dh) for x in (q, k, v, dout)]
    grads = [x.new_zeros(x.shape) for x in (q, k, v)]
    flat = [x.view(-1, Dh) for x in grads]
    for group in clusters(idx, num_clusters, valid):
        length = group.shape[1]
        for rows in group.split(max(1, BLOCK // length**2)):
            q_, k_, v_, dy = (
                x.index_select(0, rows.view(-1)).view(*rows.shape, Dh).to(dtype) for x in inputs
            )
            q_ = q_ * Dh**-0.5
            dq, dk, dv = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
            step = max(1, BLOCK // length)
            for start in range(0, length, step):
                block = slice(start, start + step)
                P = (q_[:, block] @ k_.mT).softmax(-1)
                dv.baddbmm_(P.mT, dy[:, block])
                dP = dy[:, block] @ v_.mT
                dS = torch.ops.aten._softmax_backward_data(dP, P, -1, dtype)
                dq[:, block] = dS @ k_
                dk.baddbmm_(dS.mT, q_[:, block])
            for grad, value in zip(flat, (dq.mul_(Dh**-0.5), dk, dv), strict=True):
                grad.index_copy_(0, rows.view(-1), value.view(-1, Dh).to(grad.dtype))
    return grads
