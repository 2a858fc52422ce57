"""The parts of the layer in Numba: a vector of channels of a token at a time.

N tokens of the whole batch, E inner channels, G gates, T taps of the convolution. A task has a
run of tokens and leaves its share of the sums over them; the tasks depend on N alone.
"""

import math

import numpy as np
import torch

from visionseq_mm.ops import threads
from visionseq_mm.ops.channels import Channels
from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.mlstm.cpu import backward as cell_backward
from visionseq_mm.ops.mlstm.cpu import forward as cell
from visionseq_mm.ops.simd import (
    BYTES,
    broadcast,
    fma,
    inline,
    jit,
    lane_sum,
    lane_sums,
    load,
    prefetch,
    sigmoid,
    splat,
    spread,
    store,
)

__all__ = ['cell', 'cell_backward', 'post', 'post_backward', 'pre', 'pre_backward']

ROWS = 16  # tokens between which the weights of a stripe stay in the nearest cache
STRIPE = 8  # vectors of channels
TASKS = 32  # at most, since each has its share of the sums

# An inlined function with a loop may count references to its arrays at each call, which takes
# longer than a vector of channels; the taps' loops are therefore the kernels' own. The processor
# does not foresee that a stripe goes on with the next token, and is told.


@inline
def _add(sums, at, x):
    store(sums, at, load(sums, at) + x)


@inline
def _add_product(sums, at, x, y):
    store(sums, at, fma(x, y, load(sums, at)))


# ------------------------------------------------------------- before the cell


@inline
def _find_neighbours(near, counts, moves, grid, begin, end):
    """Writes for each token the moves that do not leave the grid, and where they lead."""
    rows, columns = grid
    for n in range(begin, end):
        row, column = n // columns % rows, n % columns
        count = 0
        for k in range(len(moves)):
            down, right = moves[k, 0], moves[k, 1]
            if 0 <= row + down < rows and 0 <= column + right < columns:
                near[n - begin, count, 0] = k
                near[n - begin, count, 1] = n + down * columns + right
                count += 1
        counts[n - begin] = count


@inline
def _furthest(near, counts, i):
    """The last of the tokens of near[i]."""
    return max(near[i, 0, 1], near[i, counts[i] - 1, 1])


@inline
def _blocks(total, x, weights, which, d):
    """total + each 4 lanes, of which x is the spread, times a matrix of their own."""
    x0, x1, x2, x3 = x
    total = fma(load(weights, (which, 0, d)), x0, total)
    total = fma(load(weights, (which, 1, d)), x1, total)
    total = fma(load(weights, (which, 2, d)), x2, total)
    return fma(load(weights, (which, 3, d)), x3, total)


@inline
def _add_blocks(sums, dy, x, task, which, d):
    """Adds the gradient of the matrices of `_blocks`."""
    x0, x1, x2, x3 = x
    _add_product(sums, (task, which, 0, d), dy, x0)
    _add_product(sums, (task, which, 1, d), dy, x1)
    _add_product(sums, (task, which, 2, d), dy, x2)
    _add_product(sums, (task, which, 3, d), dy, x3)


@jit
def _pre(
    first,
    last,
    size,
    x,
    taps,
    conv_bias,
    moves,
    grid,
    qkv,
    qkv_bias,
    gates_c,
    gates_x,
    c,
    q,
    k,
    v,
    gates,
):
    """Tasks: `size` tokens. Gates are one after the other, without their biases."""
    N, E = c.shape
    G = len(gates_c)
    lanes = BYTES // c.itemsize
    near = np.empty((ROWS, len(moves), 2), np.int64)
    counts = np.empty(ROWS, np.int64)
    sums = np.empty((ROWS * G, lanes), c.dtype)
    for begin in range(first * size, min(last * size, N), ROWS):
        end = min(begin + ROWS, N)
        _find_neighbours(near, counts, moves, grid, begin, end)
        sums[:] = 0
        for stripe in range(0, E, STRIPE * lanes):
            for n in range(begin, end):
                i = n - begin
                ahead = _furthest(near, counts, i) + 1
                for d in range(stripe, min(stripe + STRIPE * lanes, E), lanes):
                    prefetch(x, (ahead, d))
                    prefetch(c, (n + 1, d))
                    prefetch(q, (n + 1, d))
                    prefetch(k, (n + 1, d))
                    prefetch(v, (n + 1, d))
                    before = load(conv_bias, (d,))
                    for at in range(counts[i]):
                        tap, token = near[i, at, 0], near[i, at, 1]
                        before = fma(load(taps, (tap, d)), load(x, (token, d)), before)
                    c_n, x_n = before * sigmoid(before), load(x, (n, d))
                    store(c, (n, d), c_n)
                    of_c, of_x = spread(c_n), spread(x_n)
                    store(q, (n, d), _blocks(load(qkv_bias, (0, d)), of_c, qkv, 0, d))
                    store(k, (n, d), _blocks(load(qkv_bias, (1, d)), of_c, qkv, 1, d))
                    store(v, (n, d), _blocks(load(qkv_bias, (2, d)), of_x, qkv, 2, d))
                    for j in range(G):
                        of_both = fma(load(gates_c, (j, d)), c_n, load(gates_x, (j, d)) * x_n)
                        _add(sums, (i * G + j, 0), of_both)
        for i in range(0, ROWS * G, lanes):
            store(gates, (begin * G + i,), lane_sums(sums, (i, 0)))


@jit
def _before(
    first,
    last,
    size,
    dc,
    dq,
    dk,
    dgates,
    x,
    c,
    taps,
    conv_bias,
    moves,
    grid,
    qkv,
    gates_c,
    g,
    dconv_bias,
    dqkv,
    dqkv_bias,
    dgates_c,
):
    """Writes g, the gradient before the SiLU, and sums of all that c goes to."""
    N, E = g.shape
    G = len(gates_c)
    lanes = BYTES // g.itemsize
    near = np.empty((ROWS, len(moves), 2), np.int64)
    counts = np.empty(ROWS, np.int64)
    for task in range(first, last):
        dconv_bias[task] = 0
        dqkv[task, :2] = 0
        dqkv_bias[task, :2] = 0
        dgates_c[task] = 0
        for begin in range(task * size, min((task + 1) * size, N), ROWS):
            end = min(begin + ROWS, N)
            _find_neighbours(near, counts, moves, grid, begin, end)
            for stripe in range(0, E, STRIPE * lanes):
                for n in range(begin, end):
                    i = n - begin
                    ahead = _furthest(near, counts, i) + 1
                    for d in range(stripe, min(stripe + STRIPE * lanes, E), lanes):
                        prefetch(x, (ahead, d))
                        prefetch(dc, (n + 1, d))
                        prefetch(dq, (n + 1, d))
                        prefetch(dk, (n + 1, d))
                        prefetch(c, (n + 1, d))
                        prefetch(g, (n + 1, d))
                        before = load(conv_bias, (d,))
                        for at in range(counts[i]):
                            tap, token = near[i, at, 0], near[i, at, 1]
                            before = fma(load(taps, (tap, d)), load(x, (token, d)), before)
                        c_n, dq_n, dk_n = load(c, (n, d)), load(dq, (n, d)), load(dk, (n, d))
                        of_c = spread(c_n)
                        _add_blocks(dqkv, dq_n, of_c, task, 0, d)
                        _add_blocks(dqkv, dk_n, of_c, task, 1, d)
                        _add(dqkv_bias, (task, 0, d), dq_n)
                        _add(dqkv_bias, (task, 1, d), dk_n)
                        total = _blocks(load(dc, (n, d)), spread(dq_n), qkv, 0, d)
                        total = _blocks(total, spread(dk_n), qkv, 1, d)
                        for j in range(G):
                            dgate = broadcast(dgates, (n, j))
                            total = fma(dgate, load(gates_c, (j, d)), total)
                            _add_product(dgates_c, (task, j, d), dgate, c_n)
                        share = sigmoid(before)
                        total = total * (share * (1.0 + (before - before * share)))
                        store(g, (n, d), total)
                        _add(dconv_bias, (task, d), total)


@jit
def _through(
    first,
    last,
    size,
    g,
    dv,
    dgates,
    x,
    taps,
    moves,
    grid,
    qkv,
    gates_x,
    dx,
    dtaps,
    dqkv,
    dqkv_bias,
    dgates_x,
):
    """Writes dx, and sums of all that x goes to; the moves are those back."""
    N, E = g.shape
    G = len(gates_x)
    lanes = BYTES // g.itemsize
    near = np.empty((ROWS, len(moves), 2), np.int64)
    counts = np.empty(ROWS, np.int64)
    for task in range(first, last):
        dtaps[task] = 0
        dqkv[task, 2] = 0
        dqkv_bias[task, 2] = 0
        dgates_x[task] = 0
        for begin in range(task * size, min((task + 1) * size, N), ROWS):
            end = min(begin + ROWS, N)
            _find_neighbours(near, counts, moves, grid, begin, end)
            for stripe in range(0, E, STRIPE * lanes):
                for n in range(begin, end):
                    i = n - begin
                    ahead = _furthest(near, counts, i) + 1
                    for d in range(stripe, min(stripe + STRIPE * lanes, E), lanes):
                        prefetch(g, (ahead, d))
                        prefetch(dv, (n + 1, d))
                        prefetch(x, (n + 1, d))
                        prefetch(dx, (n + 1, d))
                        x_n, dv_n = load(x, (n, d)), load(dv, (n, d))
                        _add_blocks(dqkv, dv_n, spread(x_n), task, 2, d)
                        _add(dqkv_bias, (task, 2, d), dv_n)
                        total = _blocks(splat(x_n, 0.0), spread(dv_n), qkv, 2, d)
                        for j in range(G):
                            dgate = broadcast(dgates, (n, j))
                            total = fma(dgate, load(gates_x, (j, d)), total)
                            _add_product(dgates_x, (task, j, d), dgate, x_n)
                        for at in range(counts[i]):
                            tap, token = near[i, at, 0], near[i, at, 1]
                            g_n = load(g, (token, d))
                            total = fma(load(taps, (tap, d)), g_n, total)
                            _add_product(dtaps, (task, tap, d), g_n, x_n)
                        store(dx, (n, d), total)


def _tasks(tokens):
    """Number of tasks, and tokens of each."""
    size = -(-tokens // (TASKS * ROWS)) * ROWS
    return -(-tokens // size), size


def _moves(taps, origin):
    """(T, 2), rows and columns from a token to that of each tap."""
    sides = (np.arange(n) - start for n, start in zip(taps.shape[1:], origin, strict=True))
    return np.stack(np.meshgrid(*sides, indexing='ij'), -1).reshape(-1, 2)


def _finish(channels, x, like):
    """A result of a kernel as a contiguous tensor of the shape and dtype of `like`."""
    return channels.cut(x).reshape(like.shape).to(like.dtype).contiguous()


def _place(channels, out, *shape):
    """A tensor for a kernel to write, the memory of `out` itself where it can be."""
    if out.dtype == channels.dtype and out.stride(-1) == 1 and channels.width == channels.count:
        return out.reshape(*shape, channels.count)
    return channels.new(*shape)


def _settle(channels, x, out):
    """Copies what went to `_place` and is not there yet."""
    if x.data_ptr() != out.data_ptr():
        out.copy_(channels.cut(x).reshape(out.shape))


def pre(x, taps, conv_bias, qkv, qkv_bias, gates_c, gates_x, gates_bias, grid, origin):
    B, L, E = x.shape
    G = len(gates_bias)
    channels = Channels(E, widest_dtype(x))
    array = channels.array
    tasks, size = _tasks(B * L)
    outputs = [channels.new(B * L) for _ in 'cqkv']
    gates = torch.empty(tasks * size, G, dtype=channels.dtype)
    threads.run(
        _pre,
        tasks,
        size,
        array(x.flatten(0, 1)),
        array(taps.flatten(1).mT),
        array(conv_bias),
        _moves(taps, origin),
        tuple(grid),
        array(qkv.permute(0, 3, 1, 2).flatten(2)),
        array(qkv_bias),
        array(gates_c),
        array(gates_x),
        *(y.numpy() for y in outputs),
        gates.flatten().numpy(),
    )
    c, *heads = (_finish(channels, y, x) for y in outputs)
    gates = gates[: B * L].view(B, L, 2, G // 2) + gates_bias.view(2, -1)
    i, f = (part.clone(memory_format=torch.contiguous_format) for part in gates.unbind(2))
    q, k, v = (y.unflatten(2, (G // 2, -1)) for y in heads)
    return c, q, k, v, i, f


def pre_backward(
    dc, dq, dk, dv, di, df, x, c, taps, conv_bias, qkv, gates_c, gates_x, grid, origin, dx
):
    B, L, E = x.shape
    G = len(gates_c)
    channels = Channels(E, widest_dtype(x))
    tasks, size = _tasks(B * L)
    moves, grid = _moves(taps, origin), tuple(grid)
    tokens = (y.flatten(2).flatten(0, 1) for y in (dc, dq, dk, dv, x, c))
    dc, dq, dk, dv, x, c = (channels.array(y) for y in tokens)
    dgates = torch.cat([di, df], -1).flatten(0, 1).to(channels.dtype)
    weights = taps.flatten(1).mT, conv_bias, qkv.permute(0, 2, 1, 3).flatten(2), gates_c, gates_x
    taps_, conv_bias, qkv_, gates_c, gates_x = (channels.array(w) for w in weights)
    g, own_dx = channels.new(B * L), _place(channels, dx, B * L)
    shapes = (len(moves),), (), (3, 4), (3,), (G,), (G,)
    sums = [channels.new(tasks, *shape) for shape in shapes]
    dtaps, dconv_bias, dqkv, dqkv_bias, dgates_c, dgates_x = (y.numpy() for y in sums)
    threads.run(
        _before,
        tasks,
        size,
        dc,
        dq,
        dk,
        dgates.numpy(),
        x,
        c,
        taps_,
        conv_bias,
        moves,
        grid,
        qkv_,
        gates_c,
        g.numpy(),
        dconv_bias,
        dqkv,
        dqkv_bias,
        dgates_c,
    )
    threads.run(
        _through,
        tasks,
        size,
        g.numpy(),
        dv,
        dgates.numpy(),
        x,
        taps_,
        -moves,
        grid,
        qkv_,
        gates_x,
        own_dx.numpy(),
        dtaps,
        dqkv,
        dqkv_bias,
        dgates_x,
    )
    _settle(channels, own_dx, dx)
    dtaps, dconv_bias, dqkv, *others = (channels.cut(y.sum(0)).contiguous() for y in sums)
    dtaps = dtaps.mT.reshape(taps.shape).contiguous()
    dqkv = dqkv.unflatten(2, (-1, 4)).permute(0, 2, 3, 1).contiguous()
    return dtaps, dconv_bias, dqkv, *others, dgates.sum(0)


# -------------------------------------------------------------- after the cell


@inline
def _statistics(h, inside, n, head, width, eps):
    """Mean, and 1 over the square root of variance plus eps; `inside` is 0 where h is padded."""
    lanes = BYTES // h.itemsize
    total = load(h, (n, head, 0))
    for d in range(lanes, h.shape[2], lanes):
        total = total + load(h, (n, head, d))
    mean = lane_sum(total) / width
    total = splat(total, 0.0)
    for d in range(0, h.shape[2], lanes):
        difference = load(h, (n, head, d)) - mean
        total = fma(difference, difference * load(inside, (d,)), total)
    return mean, 1.0 / math.sqrt(lane_sum(total) / width + eps)


@jit
def _post(first, last, size, h, c, z, weight, bias, skip, inside, width, eps, y):
    N, H, W = h.shape
    lanes = BYTES // h.itemsize
    for n in range(first * size, min(last * size, N)):
        for head in range(H):
            mean, r = _statistics(h, inside, n, head, width, eps)
            for d in range(0, W, lanes):
                normalized = (load(h, (n, head, d)) - mean) * r
                total = fma(normalized, load(weight, (head, d)), load(bias, (head, d)))
                total = fma(load(skip, (head, d)), load(c, (n, head, d)), total)
                gate = load(z, (n, head, d))
                store(y, (n, head, d), total * (gate * sigmoid(gate)))


@jit
def _post_backward(
    first,
    last,
    size,
    dy,
    h,
    c,
    z,
    weight,
    bias,
    skip,
    inside,
    width,
    eps,
    y,
    dh,
    dc,
    dz,
    dweight,
    dbias,
    dskip,
):
    N, H, W = h.shape
    lanes = BYTES // h.itemsize
    for task in range(first, last):
        dweight[task] = 0
        dbias[task] = 0
        dskip[task] = 0
        for n in range(task * size, min((task + 1) * size, N)):
            for head in range(H):
                mean, r = _statistics(h, inside, n, head, width, eps)
                ones = splat(load(skip, (0, 0)), 0.0)
                products = ones
                for d in range(0, W, lanes):
                    normalized = (load(h, (n, head, d)) - mean) * r
                    w, s = load(weight, (head, d)), load(skip, (head, d))
                    c_n = load(c, (n, head, d))
                    before = fma(s, c_n, fma(normalized, w, load(bias, (head, d))))
                    gate = load(z, (n, head, d))
                    share = sigmoid(gate)
                    silu = gate * share
                    store(y, (n, head, d), before * silu)
                    dy_n = load(dy, (n, head, d))
                    store(dz, (n, head, d), dy_n * before * (share * (1.0 + (gate - silu))))
                    g = dy_n * silu
                    store(dc, (n, head, d), g * s)
                    _add_product(dweight, (task, head, d), g, normalized)
                    _add(dbias, (task, head, d), g)
                    _add_product(dskip, (task, head, d), g, c_n)
                    g = g * w
                    store(dh, (n, head, d), g)
                    ones = ones + g
                    products = fma(g, normalized, products)
                a, b = lane_sum(ones) / width, lane_sum(products) / width
                for d in range(0, W, lanes):
                    normalized = (load(h, (n, head, d)) - mean) * r
                    total = load(dh, (n, head, d)) - a - normalized * b
                    store(dh, (n, head, d), total * r)


def _of_heads(channels, tensors, heads):
    """Arrays of tensors with all channels in the last of their dimensions, (…, H, Dh)."""
    return [channels.array(x.unflatten(-1, (heads, -1))) for x in tensors]


def post(h, c, z, norm_weight, norm_bias, skip, eps):
    B, L, H, Dh = h.shape
    channels = Channels(Dh, widest_dtype(h))
    tasks, size = _tasks(B * L)
    tokens = (x.flatten(0, 1) for x in (h.flatten(2), c, z))
    y = channels.new(B * L, H)
    threads.run(
        _post,
        tasks,
        size,
        *_of_heads(channels, (*tokens, norm_weight, norm_bias, skip), H),
        channels.array(h.new_ones(Dh)),
        Dh,
        eps,
        y.numpy(),
    )
    return _finish(channels, y, h).flatten(2)


def post_backward(dy, h, c, z, norm_weight, norm_bias, skip, eps, dz):
    B, L, H, Dh = h.shape
    channels = Channels(Dh, widest_dtype(h))
    tasks, size = _tasks(B * L)
    tokens = (x.flatten(0, 1) for x in (dy, h.flatten(2), c, z))
    results = [channels.new(B * L, H) for _ in range(3)]
    own_dz = _place(channels, dz, B * L, H)
    sums = [channels.new(tasks, H) for _ in range(3)]
    threads.run(
        _post_backward,
        tasks,
        size,
        *_of_heads(channels, (*tokens, norm_weight, norm_bias, skip), H),
        channels.array(h.new_ones(Dh)),
        Dh,
        eps,
        *(x.numpy() for x in (*results, own_dz, *sums)),
    )
    _settle(channels, own_dz, dz)
    y, dh, dc = (_finish(channels, x, h) for x in results)
    dweights = (channels.cut(x.sum(0)).flatten() for x in sums)
    return y.flatten(2), dh, dc.flatten(2), *dweights
