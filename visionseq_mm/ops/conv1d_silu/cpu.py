"""The convolution in Numba."""

import numpy as np
import torch
import torch.nn.functional as F

from visionseq_mm.ops import threads
from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.simd import fma, inline, jit, lanes_of, load, sigmoid, splat, store

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
    lanes = 64 // x.itemsize
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
    lanes = 64 // x.itemsize
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


class _Arguments:
    """The inputs as arrays of the accumulator's type, channels padded to whole vectors."""

    def __init__(self, x, weight, bias, reverse):
        self.dtype = widest_dtype(x, weight)
        self.lanes = lanes_of(str(self.dtype).removeprefix('torch.'))
        self.padding = -x.shape[-1] % self.lanes
        self.arrays = (
            self.array(x),
            self.array(weight.mT),
            self.array(bias),
            np.array(reverse, dtype=bool),
        )

    def array(self, x):
        x = x.detach().to(self.dtype)
        x = F.pad(x, (0, self.padding)) if self.padding else x
        return (x if x.stride(-1) == 1 else x.contiguous()).numpy()

    def new(self, *shape):
        return torch.empty(*shape[:-1], shape[-1] + self.padding, dtype=self.dtype)

    def cut(self, x):
        return x[..., : x.shape[-1] - self.padding]


def forward(x, weight, bias, reverse):
    """(S, B, L, D)."""
    inputs = _Arguments(x, weight, bias, reverse)
    u = inputs.new(len(reverse), *x.shape)
    tasks = len(x) * -(-x.shape[1] // ROWS)
    threads.run(_forward, tasks, *inputs.arrays, u.numpy())
    return inputs.cut(u).to(x.dtype).contiguous()


def backward(du, x, weight, bias, reverse, dx):
    """Writes the gradient of x (B, L, D), and returns those of weight and bias."""
    inputs = _Arguments(x, weight, bias, reverse)
    whole = dx.dtype == inputs.dtype and not inputs.padding
    dx_ = dx if whole else inputs.new(*x.shape)
    tasks = len(x) * -(-x.shape[1] // ROWS)
    dweight, dbias = inputs.new(tasks, *weight.mT.shape), inputs.new(tasks, *bias.shape)
    arrays = (y.detach().numpy() for y in (dx_, dweight, dbias))
    threads.run(_backward, tasks, inputs.array(du), *inputs.arrays, *arrays)
    if not whole:
        dx.copy_(inputs.cut(dx_))
    dweight, dbias = inputs.cut(dweight.sum(0)).mT, inputs.cut(dbias.sum(0))
    return dweight.to(weight.dtype).contiguous(), dbias.to(bias.dtype)
