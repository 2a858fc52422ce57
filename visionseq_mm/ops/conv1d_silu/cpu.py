"""The convolution in Numba."""

import numpy as np

from visionseq_mm.ops import threads
from visionseq_mm.ops.channels import Channels
from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.simd import BYTES, fma, inline, jit, load, sigmoid, splat, store

ROWS = 32  # tokens of a task


@inline
def _before_silu(x, weight, bias, reverse, s, b, t, d):
    total = load(bias, (s, d))
    taps = weight.shape[1]
    for k in range(taps):
        i = t + (taps - 1 - k) if reverse[s] else t - (taps - 1 - k)
        if 0 <= i < x.shape[1]:
            total = fma(load(weight, (s, k, d)), load(x, (b, i, d)), total)
    return total


@jit
def _forward(first, last, x, weight, bias, reverse, u):
    """Tasks: a sample and some tokens."""
    S, _, L, D = u.shape
    lanes = BYTES // x.itemsize
    parts = (L + ROWS - 1) // ROWS
    for task in range(first, last):
        b, begin = task // parts, task % parts * ROWS
        for t in range(begin, min(begin + ROWS, L)):
            for d in range(0, D, lanes):
                for s in range(S):
                    before = _before_silu(x, weight, bias, reverse, s, b, t, d)
                    store(u, (s, b, t, d), before * sigmoid(before))


@jit
def _backward(first, last, du, x, weight, bias, reverse, dx, dweight, dbias):
    """Tasks: a sample and some tokens, of which it leaves its share of the sums."""
    S, _, L, D = du.shape
    taps = weight.shape[1]
    past = taps - 1
    lanes = BYTES // x.itemsize
    parts = (L + ROWS - 1) // ROWS
    # Gradient before the SiLU of these tokens and of those within reach, zero outside.
    before = np.empty((S, ROWS + 2 * past, lanes), x.dtype)
    for task in range(first, last):
        b, begin = task // parts, task % parts * ROWS
        end = min(begin + ROWS, L)
        for d in range(0, D, lanes):
            zero = splat(load(bias, (0, d)), 0.0)
            for s in range(S):
                sums = zero
                for t in range(begin - past, end + past):
                    dy = zero
                    if 0 <= t < L:
                        y = _before_silu(x, weight, bias, reverse, s, b, t, d)
                        share = sigmoid(y)
                        dy = load(du, (s, b, t, d)) * (share * (1.0 + (y - y * share)))
                        if begin <= t < end:
                            sums = sums + dy
                    store(before, (s, t - begin + past, 0), dy)
                store(dbias, (task, s, d), sums)
                for k in range(taps):
                    away = past - k if not reverse[s] else k - past
                    tap = load(weight, (s, k, d))
                    sums = zero
                    for t in range(begin, end):
                        dy = load(before, (s, t - begin + past + away, 0))
                        sums = fma(dy, load(x, (b, t, d)), sums)
                        total = dy * tap
                        if s > 0 or k > 0:
                            total = total + load(dx, (b, t, d))
                        store(dx, (b, t, d), total)
                    store(dweight, (task, s, k, d), sums)


def _arrays(channels, x, weight, bias, reverse):
    """What both kernels take, in their order."""
    reverse = np.array(reverse, dtype=bool)
    return channels.array(x), channels.array(weight.mT), channels.array(bias), reverse


def _tasks(x):
    return len(x) * -(-x.shape[1] // ROWS)


def forward(x, weight, bias, reverse):
    """(S, B, L, D)."""
    channels = Channels(x.shape[2], widest_dtype(x, weight))
    u = channels.new(len(reverse), *x.shape[:2])
    threads.run(_forward, _tasks(x), *_arrays(channels, x, weight, bias, reverse), u.numpy())
    return channels.cut(u).to(x.dtype).contiguous()


def backward(du, x, weight, bias, reverse, dx):
    """Writes the gradient of x (B, L, D), and returns those of weight and bias."""
    channels = Channels(x.shape[2], widest_dtype(x, weight))
    arrays = _arrays(channels, x, weight, bias, reverse)
    direct = dx.dtype == channels.dtype and channels.width == channels.count
    own_dx = dx if direct else channels.new(*x.shape[:2])
    tasks = _tasks(x)
    S, _, taps = weight.shape
    dweight, dbias = channels.new(tasks, S, taps), channels.new(tasks, S)
    results = (y.numpy() for y in (own_dx, dweight, dbias))
    threads.run(_backward, tasks, channels.array(du), *arrays, *results)
    if not direct:
        dx.copy_(channels.cut(own_dx))
    dweight, dbias = (channels.cut(y.sum(0)) for y in (dweight, dbias))
    return dweight.mT.to(weight.dtype).contiguous(), dbias.to(bias.dtype).contiguous()
