"""Clusters of tokens in Triton: who belongs to which, without sorting all.

Five kernels, of which two read k: the mean, then the cosines and how many fall into each of BINS
equal intervals. Only a bin that has a border of clusters inside needs its own order, and only at
the border: its tokens are collected, and the one at the border's rank is found by bisection.
Tokens are then placed by how many of their cluster stand before them, so that they ascend inside
a cluster. Sums of floats have a fixed order, and what atomic additions count are integers: the
same result every time.

Keys are the bits of the float32 cosines as ascending int32, zeros equal, NaN above all numbers.

B batch, L tokens, H heads, Dh channels of a head, K clusters, n valid tokens of a sample.
"""

import torch
import triton
import triton.language as tl

from visionseq_mm.ops.triton_common import load, row, unit_stride

TILE = 4096  # elements of k
CHUNK = 2048  # tokens of a program, at most 2¹² − 1 for the counts in `_place_kernel`
BINS = 4096
SEARCHED = 1024  # tokens of a bin at a time
PROGRAMS = 132 * 8  # that read k for the mean, about

INVALID = tl.constexpr(0x7FFFFFFF)
NAN = tl.constexpr(0x7FFFFFFE)


@triton.jit
def _valid(valid_ptr, b, token, L):
    here = token < L
    if valid_ptr is not None:
        here &= tl.load(valid_ptr + b.to(tl.int64) * L + token, mask=here, other=0) != 0
    return here


@triton.jit
def _count(counts_ptr, b, L):
    """n of sample b."""
    return L if counts_ptr is None else tl.load(counts_ptr + b)


@triton.jit
def _sums_kernel(
    k_ptr,
    valid_ptr,
    sums_ptr,
    bins_ptr,
    k_row,
    k_token,
    k_head,
    L,
    H,
    part,
    Dh: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Sums over `part` tokens in float64 (B·H, parts, Dh), and zeros for what is counted later."""
    b, head = tl.program_id(0) // H, tl.program_id(0) % H
    d = tl.arange(0, BLOCK)
    mask_d = (d < Dh) | (Dh == BLOCK)
    i = tl.arange(0, TOKENS)
    total = tl.zeros([TOKENS, BLOCK], tl.float64)
    first = tl.program_id(1) * part
    k_ptr += head * k_head + d[None, :]
    for start in range(first, min(first + part, L), TOKENS):
        token = start + i
        here = _valid(valid_ptr, b, token, L)
        k = load(row(k_ptr, b, k_row, token[:, None], k_token), here[:, None] & mask_d[None, :])
        total += k.to(tl.float64)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + at * Dh + d, tl.sum(total, 0), mask=mask_d)
    bins_ptr += tl.program_id(0).to(tl.int64) * 2 * BINS
    for start in range(tl.program_id(1) * BINS, 2 * BINS, tl.num_programs(1) * BINS):
        tl.store(bins_ptr + start + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))


@triton.jit
def _keys_of(cosine):
    bits = tl.where(cosine == 0, 0.0, cosine).to(tl.int32, bitcast=True)
    return tl.where(cosine != cosine, NAN, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _bins_of(keys, BINS: tl.constexpr):
    """The interval of a key's cosine among BINS of [−1, 1]; it never descends as keys ascend."""
    cosine = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    cosine = tl.where(cosine < 1, tl.where(cosine > -1, cosine, -1.0), 1.0)  # NaN too
    return tl.minimum(((cosine + 1) * (BINS // 2)).to(tl.int32), BINS - 1)


@triton.jit
def _keys_kernel(
    k_ptr,
    valid_ptr,
    counts_ptr,
    sums_ptr,
    keys_ptr,
    bins_ptr,
    k_row,
    k_token,
    k_head,
    L,
    H,
    part,
    Dh: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Keys (B·H, L) of `part` tokens, and how many of all are in each bin (B·H, first of 2, BINS).

    Compiled without fused multiplication and addition, so that every token has the same cosine.
    """
    b, head = tl.program_id(0) // H, tl.program_id(0) % H
    d = tl.arange(0, BLOCK)
    mask_d = (d < Dh) | (Dh == BLOCK)
    n = _count(counts_ptr, b, L)

    parts = tl.num_programs(1)
    i = tl.arange(0, 16)[:, None]
    mean = tl.zeros([16, BLOCK], tl.float64)
    sums_ptr += tl.program_id(0) * parts * Dh
    for start in range(0, parts, 16):
        mask = (start + i < parts) & mask_d[None, :]
        mean += tl.load(sums_ptr + (start + i) * Dh + d[None, :], mask=mask, other=0)
    mean = tl.sum(mean, 0) / tl.maximum(n, 1).to(tl.float64)
    mean /= tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), 1e-12)
    mean = mean.to(tl.float32)[None, :]

    at = tl.program_id(0).to(tl.int64)
    keys_ptr += at * L
    bins_ptr += at * 2 * BINS
    # The sums' programs went the other way: what they read last may still be in the cache.
    first = (parts - 1 - tl.program_id(1)) * part
    k_ptr += head * k_head + d[None, :]
    for start in range(first, min(first + part, L), TOKENS):
        token = start + tl.arange(0, TOKENS)
        here = _valid(valid_ptr, b, token, L)
        k = load(row(k_ptr, b, k_row, token[:, None], k_token), here[:, None] & mask_d[None, :])
        cosine = tl.sum(k * mean, 1) / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)
        keys = _keys_of(cosine)
        tl.store(keys_ptr + token, tl.where(here, keys, INVALID), mask=token < L)
        tl.atomic_add(bins_ptr + _bins_of(keys, BINS), 1, mask=here, sem='relaxed')


@triton.jit
def _cluster_of(rank, n, K: tl.constexpr):
    """The largest c with c·n // K ≤ rank."""
    return ((rank + 1) * K - 1) // tl.maximum(n, 1)


@triton.jit
def _mark_kernel(
    keys_ptr,
    counts_ptr,
    bins_ptr,
    found_ptr,
    below_ptr,
    L,
    H,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """The clusters of a chunk's tokens in the place of their keys, K for an invalid one.

    A token whose bin has borders inside is written to its bin's places of `found` (B·H, L), in
    any order, as key · 2³² + token, and counts as in the bin's first cluster until
    `_border_kernel` has seen it. `below` (B·H, chunks, COLUMNS) are the tokens of a chunk below
    each cluster, at first without those that a border may have to its left.
    """
    b = tl.program_id(0) // H
    n = _count(counts_ptr, b, L)
    at = tl.program_id(0).to(tl.int64)
    keys_ptr += at * L
    bins_ptr += at * 2 * BINS
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    here = token < L
    keys = tl.load(keys_ptr + token, mask=here, other=INVALID)
    bins = _bins_of(keys, BINS)
    valid = keys != INVALID

    sizes = tl.load(bins_ptr + tl.arange(0, BINS))
    ends = tl.cumsum(sizes, 0)
    start, end = tl.gather(ends - sizes, bins, 0), tl.gather(ends, bins, 0)
    lowest, highest = _cluster_of(start, n, K), _cluster_of(end - 1, n, K)
    between = valid & (lowest < highest)
    place = start + tl.atomic_add(bins_ptr + BINS + bins, 1, mask=between, sem='relaxed')
    packed = (keys.to(tl.int64) << 32) | token
    tl.store(found_ptr + at * L + place, packed, mask=between)
    tl.store(keys_ptr + token, tl.where(valid, lowest, K), mask=here)

    highest = tl.where(here, tl.where(valid, highest, K), K + 1)
    sizes = tl.histogram(highest, COLUMNS)
    below_ptr += (at * tl.num_programs(1) + tl.program_id(1)) * COLUMNS
    tl.store(below_ptr + tl.arange(0, COLUMNS), tl.cumsum(sizes, 0) - sizes)


@triton.jit
def _split(ptr, size, middle, SEARCHED: tl.constexpr):
    """How many of `size` different int64 are at most `middle`, their maximum, and the minimum of
    the others."""
    count = tl.zeros([SEARCHED], tl.int32)
    left = tl.full([SEARCHED], -(2**63), tl.int64)
    right = tl.full([SEARCHED], 2**63 - 1, tl.int64)
    for first in range(0, size, SEARCHED):
        i = first + tl.arange(0, SEARCHED)
        x = tl.load(ptr + i, mask=i < size, other=2**63 - 1)
        count += (x <= middle).to(tl.int32)
        left = tl.maximum(left, tl.where(x <= middle, x, left))
        right = tl.minimum(right, tl.where(x <= middle, right, x))
    return tl.sum(count, 0), tl.max(left, 0), tl.min(right, 0)


@triton.jit
def _border_kernel(
    counts_ptr,
    bins_ptr,
    found_ptr,
    clusters_ptr,
    below_ptr,
    L,
    H,
    chunks,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    """Moves the tokens above a border that is inside of a bin by a cluster, counts the others."""
    b = tl.program_id(0) // H
    n = _count(counts_ptr, b, L)
    cluster = tl.program_id(1) + 1
    rank = cluster * n // K
    at = tl.program_id(0).to(tl.int64)
    ends = tl.cumsum(tl.load(bins_ptr + at * 2 * BINS + tl.arange(0, BINS)), 0)
    start = tl.max(tl.where(ends <= rank, ends, 0))
    size = tl.min(tl.where(ends <= rank, L, ends)) - start
    rank -= start  # in the bin
    if rank > 0:
        found_ptr += at * L + start
        # The token of this rank, as it is packed; `low` and `high` are always tokens.
        low = _split(found_ptr, size, -(2**63), SEARCHED)[2]
        high = _split(found_ptr, size, 2**63 - 2, SEARCHED)[1]
        while low < high:
            middle = low + ((high - low) >> 1)
            count, left, right = _split(found_ptr, size, middle, SEARCHED)
            if count > rank:
                high = left
            else:
                low = right
        clusters_ptr += at * L
        below_ptr += at * chunks * COLUMNS + cluster
        for first in range(0, size, SEARCHED):
            i = first + tl.arange(0, SEARCHED)
            here = i < size
            packed = tl.load(found_ptr + i, mask=here, other=0)
            token = packed.to(tl.int32)
            above = packed >= low
            tl.atomic_add(clusters_ptr + token, 1, mask=here & above, sem='relaxed')
            at_chunk = below_ptr + token // CHUNK * COLUMNS
            tl.atomic_add(at_chunk, 1, mask=here & (above == 0), sem='relaxed')


@triton.jit
def _place_kernel(
    counts_ptr,
    clusters_ptr,
    below_ptr,
    idx_ptr,
    L,
    H,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes the tokens of a chunk, ascending in each cluster, after those of earlier chunks."""
    b = tl.program_id(0) // H
    n = _count(counts_ptr, b, L)
    at = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)[:, None]
    below_ptr += at * tl.num_programs(1) * COLUMNS + c[None, :]
    below = tl.zeros([ROWS, COLUMNS], tl.int32)
    for chunk in range(0, tl.program_id(1), ROWS):
        below += tl.load(
            below_ptr + (chunk + i) * COLUMNS, mask=chunk + i < tl.program_id(1), other=0
        )
    below = tl.sum(below, 0)

    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    here = token < L
    cluster = tl.load(clusters_ptr + at * L + token, mask=here, other=K)
    before = tl.gather(below, cluster + 1, 0) - tl.gather(below, cluster, 0)
    # Counts of five clusters at a time, in twelve bits each.
    for first in range(0, K + 1, 5):
        mine = (cluster >= first) & (cluster < first + 5)
        shift = (tl.where(mine, cluster - first, 0) * 12).to(tl.int64)
        one = mine.to(tl.int64) << shift
        earlier = ((tl.cumsum(one, 0) - one) >> shift).to(tl.int32) & 0xFFF
        before += tl.where(mine, earlier, 0)
    place = cluster * n // K + before
    tl.store(idx_ptr + at * L + place, token, mask=here)


def partition(k, num_clusters, valid):
    """See `reference.partition`; inside a cluster tokens ascend, NaN are above all numbers.

    Raises:
        ValueError: so many tokens that a rank times `num_clusters` has more than 31 bits.
    """
    B, L, H, Dh = k.shape
    if L * num_clusters >= 2**31:
        raise ValueError(
            f'sec_partition: tokens times num_clusters must be below 2³¹, got {L} · {num_clusters}'
        )
    if num_clusters == 1:
        if valid is None:
            return torch.arange(L, dtype=torch.int32, device=k.device).expand(B, H, L).contiguous()
        order = (~valid).sort(stable=True).indices.int()
        return order[:, None].expand(B, H, L).contiguous()

    k = unit_stride(k)
    strides = k.stride()[:3]
    counts = None
    if valid is not None:
        valid, counts = valid.contiguous(), valid.sum(1, dtype=torch.int32)
    block = triton.next_power_of_2(Dh)
    tile = dict(Dh=Dh, BLOCK=block, TOKENS=max(1, TILE // block), BINS=BINS)
    part = triton.cdiv(L * B * H, PROGRAMS)
    part = triton.cdiv(part, tile['TOKENS']) * tile['TOKENS']
    parts, chunks = triton.cdiv(L, part), triton.cdiv(L, CHUNK)
    columns = triton.next_power_of_2(num_clusters + 2)
    clusters = dict(K=num_clusters, COLUMNS=columns, CHUNK=CHUNK)

    def new(*shape, dtype=torch.int32):
        return k.new_empty((B * H, *shape), dtype=dtype)

    sums, bins = new(parts, Dh, dtype=torch.float64), new(2, BINS)
    keys, found, below = new(L), new(L, dtype=torch.int64), new(chunks, columns)
    idx = k.new_empty((B, H, L), dtype=torch.int32)
    with torch.cuda.device_of(k):
        _sums_kernel[B * H, parts](k, valid, sums, bins, *strides, L, H, part, **tile)
        _keys_kernel[B * H, parts](
            *(k, valid, counts, sums, keys, bins, *strides, L, H, part),
            **tile,
            enable_fp_fusion=False,
        )
        _mark_kernel[B * H, chunks](
            *(keys, counts, bins, found, below, L, H),
            **clusters,
            BINS=BINS,
            num_warps=8,
        )
        _border_kernel[B * H, num_clusters - 1](
            *(counts, bins, found, keys, below, L, H, chunks),
            **clusters,
            BINS=BINS,
            SEARCHED=SEARCHED,
        )
        _place_kernel[B * H, chunks](
            *(counts, keys, below, idx, L, H),
            **clusters,
            ROWS=max(1, 2048 // columns),
            num_warps=8,
        )
    return idx
