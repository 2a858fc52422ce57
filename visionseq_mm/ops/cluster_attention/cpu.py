"""Cluster attention in Numba: clusters gathered once, and tiles that stay in the nearest caches.

Scores are transposed, keys × queries. A vector is then as many queries, each with a maximum and a
sum of its own, and no product has few columns or needs whole vectors of keys.

B batch, L tokens, H heads, Dh channels of a head, N of them in whole vectors, K clusters; T tokens
of a list.
"""

import math

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided

from visionseq_mm.ops import threads
from visionseq_mm.ops.channels import Channels
from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.simd import (
    BYTES,
    exp2,
    fma,
    inline,
    jit,
    lane_sums,
    load,
    prefetch,
    store,
    where_greater,
)
from visionseq_mm.ops.tiles import add_product, clear, dots, product, transpose

LOG2E = 1 / math.log(2)
VECTORS, KEYS = 6, 64  # of queries, and keys, of a tile
TASKS = 8  # at least, where clusters are few and long
AHEAD = 64  # tokens between which a head's row is brought to the nearest cache and read


# -------------------------------------------------------------------- partition


@inline
def _whole(count, lanes):
    """The least number of lanes of whole vectors that is at least `count`."""
    return (count + lanes - 1) // lanes * lanes


@intrinsic
def _add_wide(typing, sums, index, x):
    """Adds a vector to as many float64 from sums[index]."""

    def generate(context, builder, signature, args):
        wide = ir.VectorType(ir.DoubleType(), x.lanes)
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.bitcast(builder.gep(array.data, [args[1]]), wide.as_pointer())
        value = args[2] if args[2].type == wide else builder.fpext(args[2], wide)
        builder.store(builder.fadd(builder.load(pointer, align=8), value), pointer, align=8)
        return context.get_dummy_value()

    return types.void(sums, types.intp, x), generate


@jit
def _cosines(cosine, rows, tokens):
    """Of some tokens (T) of a head (L, N) with their mean, equal for equal rows."""
    N = rows.shape[1]
    lanes = BYTES // rows.itemsize
    shares, mean = np.zeros(4 * N), np.empty(N, rows.dtype)  # an addition waits for the last
    for t in range(len(tokens)):
        for d in range(0, N, lanes):
            prefetch(rows, (tokens[t] + AHEAD, d))
            _add_wide(shares, t % 4 * N + d, load(rows, (tokens[t], d)))
    size = 0.0
    for d in range(N):
        shares[d] += shares[N + d] + shares[2 * N + d] + shares[3 * N + d]
        size += shares[d] ** 2
    size = max(math.sqrt(size), 1e-12 * len(tokens))
    for d in range(N):
        mean[d] = shares[d] / size
    products, squares = np.zeros((lanes, lanes), rows.dtype), np.zeros((lanes, lanes), rows.dtype)
    sizes = np.empty(lanes, rows.dtype)
    for begin in range(0, len(tokens), lanes):
        here = tokens[begin : begin + lanes]
        for r in range(len(here)):
            prefetch(rows, (here[r] + AHEAD, 0))
            x = load(rows, (here[r], 0))
            dot, square = x * load(mean, (0,)), x * x
            for d in range(lanes, N, lanes):
                prefetch(rows, (here[r] + AHEAD, d))
                x = load(rows, (here[r], d))
                dot, square = fma(x, load(mean, (d,)), dot), fma(x, x, square)
            store(products, (r, 0), dot)
            store(squares, (r, 0), square)
        store(sizes, (0,), lane_sums(squares, (0, 0)))
        store(cosine, (begin,), lane_sums(products, (0, 0)))
        for r in range(len(here)):
            x = cosine[begin + r] / max(math.sqrt(sizes[r]), 1e-12)
            cosine[begin + r] = x + 0.0 if x == x else np.nan  # one zero, and one NaN


@jit
def _sort(order, bits):
    """Sorts `order` (T) by the numbers whose bits (T) are these, equal ones as they are, NaN last.

    By digits of 11 bits, the last one first, of integers in the order of the numbers.
    """
    T, digits = len(order), bits.itemsize * 8 // 11 + 1
    sign = np.uint64(1) << np.uint64(bits.itemsize * 8 - 1)
    places = np.zeros((digits, 2048), np.int64)
    for t in range(T):
        x = np.uint64(bits[t])
        bits[t] = ~x if x & sign else x | sign
        x = np.uint64(bits[t])
        for n in range(digits):
            places[n, np.int64(x >> np.uint64(11 * n) & np.uint64(2047))] += 1
    here, there, other, target = order, np.empty_like(order), bits, np.empty_like(bits)
    for n in range(digits):
        total = 0
        for digit in range(2048):
            total, places[n, digit] = total + places[n, digit], total
        for t in range(T):
            digit = np.int64(np.uint64(other[t]) >> np.uint64(11 * n) & np.uint64(2047))
            at = places[n, digit]
            places[n, digit] = at + 1
            there[at], target[at] = here[t], other[t]
        here, there, other, target = there, here, target, other
    for t in range(T):
        order[t] = here[t]


@jit
def _partition(first, last, k, valid, cosines, bits, idx):
    """`bits` are those of the cosines, in the same place. Tasks: heads of samples."""
    _, H, L = idx.shape
    for task in range(first, last):
        b, h = task // H, task % H
        order, n, at = idx[b, h], 0, valid[b].sum()
        for token in range(L):
            if valid[b, token]:
                order[n] = token
                n += 1
            else:
                order[at] = token
                at += 1
        _cosines(cosines[task], k[b, :, h, 0 : k.shape[3]], order[:n])
        _sort(order[:n], bits[task, :n])


def partition(k, num_clusters, valid):
    """See the reference; NaN come last of the valid tokens."""
    B, L, H, Dh = k.shape
    channels = Channels(Dh, widest_dtype(k))
    valid = np.ones((B, L), np.bool_) if valid is None else valid.contiguous().numpy()
    idx = torch.empty((B, H, L), dtype=torch.int32)
    k = channels.array(k)
    cosines = np.empty((B * H, _whole(L, channels.lanes)), k.dtype)
    bits = cosines.view(f'u{k.itemsize}')
    threads.run(_partition, B * H, k, valid, cosines, bits, idx.numpy())
    return idx


# ----------------------------------------------------- clusters and their tokens


def _flat(x):
    """An array with dense channels as one dimension, and the strides of the others in elements.

    Kernels would else be compiled for each combination of contiguous arrays and others.
    """
    *strides, _ = (s // x.itemsize for s in x.strides)
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, (*strides, 1), strict=True))
    return as_strided(x, (span,), (x.itemsize,)), tuple(strides)


def _clusters(idx, num_clusters, valid):
    """(number of tasks, what `_find` wants to know); tasks depend on the shapes alone."""
    B, H, L = idx.shape
    clusters = B * H * num_clusters
    parts = max(1, min(-(-TASKS // clusters), L // num_clusters // KEYS))
    counts = np.full(B, L) if valid is None else valid.sum(1).numpy()
    return clusters * parts, (idx.contiguous().numpy(), counts, num_clusters, parts)


@inline
def _find(task, clusters):
    """(b, h, part, tokens of the cluster, where the part begins and ends) of a task."""
    idx, counts, K, parts = clusters
    row, c, part = task // parts // K, task // parts % K, task % parts
    b, h = row // idx.shape[1], row % idx.shape[1]
    tokens = idx[b, h, c * counts[b] // K : (c + 1) * counts[b] // K]
    count = len(tokens)
    return b, h, part, tokens, part * count // parts, (part + 1) * count // parts


@jit
def _gather(rows, x, b, h, tokens, factor):
    """rows (T, N) = the tokens (T) of a head, times a factor."""
    values, strides = x
    first = b * strides[0] + h * strides[2]
    for t in range(len(tokens)):
        at = first + tokens[t] * strides[1]
        for d in range(0, rows.shape[1], BYTES // rows.itemsize):
            store(rows, (t, d), load(values, (at + d,)) * factor)


@jit
def _scatter(x, rows, b, h, tokens, factor):
    """The tokens (T) of a head = rows (T, N), times a factor."""
    for t in range(len(tokens)):
        for d in range(0, rows.shape[1], BYTES // rows.itemsize):
            store(x, (b, tokens[t], h, d), load(rows, (t, d)) * factor)


@inline
def _longest(clusters):
    idx, _, K, _ = clusters
    return (idx.shape[2] + K - 1) // K


@inline
def _scratch(M, N, like):
    """(M, N); rows a power of two apart would have few places in the nearest cache."""
    return np.empty((M, N + BYTES // like.itemsize), like.dtype)[0:M, 0:N]


def _results(channels, like, valid, *shape):
    """Empty, or zeros where there are tokens that no cluster has."""
    new = torch.empty if valid is None else torch.zeros
    return new((*shape, *like.shape[:3], channels.width), dtype=channels.dtype)


def _finish(channels, x, like):
    return channels.cut(x).to(like.dtype).contiguous()


# ---------------------------------------------------------------------- forward


@inline
def _max(x, y):
    return where_greater(x, y, x, y)


@jit
def _weigh(scores, top, total, sums):
    """scores = exp2(scores − top), with `top` raised to their maximum.

    `total`, the sum of them all, and sums (N, queries), weighed with the former top, follow.
    """
    lanes = BYTES // scores.itemsize
    keys = len(scores)
    for j in range(0, scores.shape[1], lanes):
        before = load(top, (j,))
        a, b, c, d = before, before, before, before  # a maximum waits for the last
        for i in range(0, keys - 3, 4):
            a = _max(load(scores, (i, j)), a)
            b = _max(load(scores, (i + 1, j)), b)
            c = _max(load(scores, (i + 2, j)), c)
            d = _max(load(scores, (i + 3, j)), d)
        for i in range(keys // 4 * 4, keys):
            a = _max(load(scores, (i, j)), a)
        after = _max(_max(a, b), _max(c, d))
        store(top, (j,), after)
        ratio = exp2(before - after)
        of_all = load(total, (j,)) * ratio
        for i in range(keys):
            x = exp2(load(scores, (i, j)) - after)
            store(scores, (i, j), x)
            of_all = of_all + x
        store(total, (j,), of_all)
        for i in range(len(sums)):
            store(sums, (i, j), load(sums, (i, j)) * ratio)


@jit
def _forward(first, last, q, k, v, lepe, add, clusters, scale, out, attended, sums):
    """`attended` and sums, and out too with `add`. Tasks: parts of the queries of clusters."""
    N, lanes = out.shape[3], BYTES // out.itemsize
    longest, block = _longest(clusters), VECTORS * lanes
    keys, values = np.empty((longest, N), out.dtype), np.empty((longest, N), out.dtype)
    rows, more = np.empty((block, N), out.dtype), np.empty((block, N), out.dtype)
    q_turned, out_turned = _scratch(N, block, out), _scratch(N, block, out)
    scores = _scratch(KEYS, block, out)
    top, total = np.empty(block, out.dtype), np.empty(block, out.dtype)
    for task in range(first, last):
        b, h, _, tokens, begin, end = _find(task, clusters)
        if begin == end:
            continue
        _gather(keys, k, b, h, tokens, 1.0)
        _gather(values, v, b, h, tokens, 1.0)
        for i in range(begin, end, block):
            here = tokens[i : min(i + block, end)]
            T = len(here)
            width = _whole(T, lanes)
            q_lanes, out_lanes = q_turned[0:N, 0:width], out_turned[0:N, 0:width]
            _gather(rows, q, b, h, here, scale * LOG2E)
            transpose(q_lanes, rows[0:T, 0:N])
            clear(out_lanes)
            for t in range(width):
                top[t], total[t] = -3e38, 0
            for j in range(0, len(tokens), KEYS):
                until = min(j + KEYS, len(tokens))
                P = scores[0 : until - j, 0:width]
                product(P, keys[j:until, 0:N], q_lanes)
                _weigh(P, top, total, out_lanes)
                add_product(out_lanes, values[j:until, 0:N].T, P)
            transpose(rows[0:width, 0:N], out_lanes)
            for t in range(T):
                sums[b, h, here[t]] = (top[t] + math.log2(total[t])) / LOG2E
                for d in range(0, N, lanes):
                    store(rows, (t, d), load(rows, (t, d)) * (1 / total[t]))
            _scatter(attended, rows, b, h, here, 1.0)
            if add:
                _gather(more, lepe, b, h, here, 1.0)
                for t in range(T):
                    for d in range(0, N, lanes):
                        store(rows, (t, d), load(rows, (t, d)) + load(more, (t, d)))
                _scatter(out, rows, b, h, here, 1.0)


def forward(q, k, v, idx, num_clusters, valid, lepe, keep):
    """See the reference."""
    channels = Channels(q.shape[3], widest_dtype(q))
    tasks, clusters = _clusters(idx, num_clusters, valid)
    out = attended = _results(channels, q, valid)
    if keep and lepe is not None:
        attended = _results(channels, q, valid)
    sums = torch.zeros(idx.shape, dtype=channels.dtype)
    threads.run(
        _forward,
        tasks,
        *(_flat(channels.array(x)) for x in (q, k, v, q if lepe is None else lepe)),
        lepe is not None,
        clusters,
        q.shape[3] ** -0.5,
        out.numpy(),
        attended.numpy(),
        sums.numpy(),
    )
    result = _finish(channels, out, q)
    attended = result if attended is out else _finish(channels, attended, q)
    return result, attended, sums if keep else None


# --------------------------------------------------------------------- backward


@jit
def _backward(first, last, dout, q, k, v, attended, sums, clusters, scale, dq, dk, dv):
    """Tasks: parts of the keys of clusters, each with its share of dq (parts, B, L, H, N)."""
    N, lanes = dk.shape[3], BYTES // dk.itemsize
    longest, block = (_longest(clusters) + len(dq) - 1) // len(dq), VECTORS * lanes
    of_keys, of_queries = np.empty((4, longest, N), dk.dtype), np.empty((3, block, N), dk.dtype)
    keys, values, dkeys, dvalues = of_keys[0], of_keys[1], of_keys[2], of_keys[3]
    q_rows, dout_rows, rows = of_queries[0], of_queries[1], of_queries[2]
    turned, scores = _scratch(3 * N, block, dk), _scratch(2 * KEYS, block, dk)
    offsets, lines = np.zeros((2, block), dk.dtype), np.empty((lanes, lanes), dk.dtype)
    for task in range(first, last):
        b, h, part, tokens, begin, end = _find(task, clusters)
        own = tokens[begin:end]
        _gather(keys, k, b, h, own, 1.0)
        _gather(values, v, b, h, own, 1.0)
        clear(dkeys)
        clear(dvalues)
        for i in range(0, len(tokens), block):
            here = tokens[i : i + block]
            T = len(here)
            width = _whole(T, lanes)
            _gather(q_rows, q, b, h, here, scale * LOG2E)
            _gather(dout_rows, dout, b, h, here, 1.0)
            _gather(rows, attended, b, h, here, 1.0)
            q_here, dout_here = q_rows[0:T, 0:N], dout_rows[0:T, 0:N]
            q_lanes, dout_lanes = turned[0:N, 0:width], turned[N : 2 * N, 0:width]
            dq_lanes = turned[2 * N : 3 * N, 0:width]
            transpose(q_lanes, q_here)
            transpose(dout_lanes, dout_here)
            dots(offsets[1], dout_here, rows[0:T, 0:N], lines)
            # Lanes beyond the last query have weights of 1 and no gradient, and go nowhere.
            for t in range(width):
                offsets[0, t] = -sums[b, h, here[t]] * LOG2E if t < T else 0.0
                offsets[1, t] = -offsets[1, t]
            clear(dq_lanes)
            for j in range(0, len(own), KEYS):
                until = min(j + KEYS, len(own))
                k_here = keys[j:until, 0:N]
                P, dS = scores[0 : until - j, 0:width], scores[KEYS : KEYS + until - j, 0:width]
                for d in range(0, width, lanes):
                    offset, doffset = load(offsets, (0, d)), load(offsets, (1, d))
                    for m in range(until - j):
                        store(P, (m, d), offset)
                        store(dS, (m, d), doffset)
                add_product(P, k_here, q_lanes)
                add_product(dS, values[j:until, 0:N], dout_lanes)
                for m in range(until - j):
                    for d in range(0, width, lanes):
                        x = exp2(load(P, (m, d)))
                        store(P, (m, d), x)
                        store(dS, (m, d), x * load(dS, (m, d)))
                add_product(dq_lanes, k_here.T, dS)
                add_product(dkeys[j:until, 0:N], dS[0 : end - j, 0:T], q_here)
                add_product(dvalues[j:until, 0:N], P[0 : end - j, 0:T], dout_here)
            transpose(rows[0:width, 0:N], dq_lanes)
            _scatter(dq[part], rows, b, h, here, scale)
        _scatter(dk, dkeys, b, h, own, 1 / LOG2E)
        _scatter(dv, dvalues, b, h, own, 1.0)


def backward(dout, q, k, v, idx, attended, sums, num_clusters, valid):
    """See the reference."""
    channels = Channels(q.shape[3], widest_dtype(q))
    tasks, clusters = _clusters(idx, num_clusters, valid)
    parts = clusters[-1]
    dq = _results(channels, q, valid, parts)
    dk, dv = (_results(channels, q, valid) for _ in range(2))
    threads.run(
        _backward,
        tasks,
        *(_flat(channels.array(x)) for x in (dout, q, k, v, attended)),
        channels.plain(sums),
        clusters,
        q.shape[3] ** -0.5,
        dq.numpy(),
        dk.numpy(),
        dv.numpy(),
    )
    dq = dq[0] if parts == 1 else dq.sum(0)
    return [_finish(channels, x, q) for x in (dq, dk, dv)]
