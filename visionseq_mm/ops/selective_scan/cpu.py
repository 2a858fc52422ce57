"""The selective scan in Numba: a vector of channels at a time, all of a step in registers.

Step sizes come as they are or as a product of low rank, dt = low · dt_projᵀ, which costs less
to compute on the way than to read. Arrays are those of the reference with the channels last,
A (S, N, D) and dt_proj (S, R, D) too.
"""

import math

import numpy as np
import torch

from visionseq_mm.ops import threads
from visionseq_mm.ops.channels import Channels
from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.simd import (
    BYTES,
    broadcast,
    exp2,
    fma,
    inline,
    jit,
    lane_sums,
    load,
    sigmoid,
    softplus,
    splat,
    store,
    where_greater,
)

CHUNK = 64  # steps between the states that are kept for the backward
STRIPE = 4  # vectors of channels that a thread of the backward sums over
LN2 = math.log(2)


@inline
def _before_softplus(dt, low, dt_proj, dt_bias, s, b, t, d):
    x = load(dt_bias, (s, d))
    if dt is not None:
        x = x + load(dt, (s, b, t, d))
    if low is not None:
        for r in range(low.shape[3]):
            x = fma(broadcast(low, (s, b, t, r)), load(dt_proj, (s, r, d)), x)
    return x


@inline
def _token(reverse, s, L, step):
    return L - 1 - step if reverse[s] else step


@inline
def _advance(h, before, after, delta, u_t, A, B, C, D, s, b, t, d):
    """Writes h[after] from h[before], and returns y_t."""
    delta_u = delta * u_t
    out = load(D, (s, d)) * u_t
    for n in range(h.shape[1]):
        a = exp2(delta * load(A, (s, n, d)))
        h_n = fma(a, load(h, (before, n, 0)), delta_u * broadcast(B, (s, b, t, n)))
        store(h, (after, n, 0), h_n)
        out = fma(h_n, broadcast(C, (s, b, t, n)), out)
    return out


@jit
def _forward(first, last, u, dt, low, dt_proj, dt_bias, A, B, C, D, z, reverse, y, states):
    """Tasks: a sample and a vector of channels, both directions one after the other.

    y may be u[0], of which nothing is read that was written before. States are written where
    there is room for them.
    """
    S, _, L, _ = u.shape
    N = A.shape[1]
    lanes = BYTES // u.itemsize
    vectors = u.shape[3] // lanes
    h = np.empty((1, N, lanes), u.dtype)
    deltas = np.empty((CHUNK, lanes), u.dtype)
    for task in range(first, last):
        b, d = task // vectors, task % vectors * lanes
        for s in range(S):
            h[:] = 0
            for begin in range(0, L, CHUNK):
                count = min(CHUNK, L - begin)
                if states.size:
                    for n in range(N):
                        store(states, (s, begin // CHUNK, b, n, d), load(h, (0, n, 0)))
                for k in range(count):
                    t = _token(reverse, s, L, begin + k)
                    x = _before_softplus(dt, low, dt_proj, dt_bias, s, b, t, d)
                    store(deltas, (k, 0), softplus(x))
                for k in range(count):
                    t = _token(reverse, s, L, begin + k)
                    delta, u_t = load(deltas, (k, 0)), load(u, (s, b, t, d))
                    out = _advance(h, 0, 0, delta, u_t, A, B, C, D, s, b, t, d)
                    if s > 0:
                        out = out + load(y, (b, t, d))
                    if s == S - 1:
                        out = out * (1.0 / S)
                        if z is not None:
                            gate = load(z, (b, t, d))
                            out = out * (gate * sigmoid(gate))
                    store(y, (b, t, d), out)


@jit
def _backward(
    first,
    last,
    dout,
    u,
    dt,
    low,
    dt_proj,
    dt_bias,
    A,
    B,
    C,
    D,
    z,
    reverse,
    states,
    y,
    du,
    ddt,
    dA,
    dB,
    dC,
    dD,
    dbias,
    dz,
):
    """Tasks: a sample and a stripe of channels, of which it leaves its share of the sums.

    The equations are the reference's. A is in units of log 2, so that Σ_n p A is too. The states
    of a chunk stay in the nearest cache; to keep its exp(δ A) beside them costs more than to
    compute them twice.
    """
    S, _, L, width = u.shape
    N = A.shape[1]
    lanes = BYTES // u.itemsize
    stripe = STRIPE * lanes
    stripes = (width + stripe - 1) // stripe
    h = np.empty((CHUNK + 1, N, lanes), u.dtype)
    carry = np.empty((N, lanes), u.dtype)  # ā_{t+1} ⊙ λ_{t+1}
    steps = np.empty((CHUNK, lanes), u.dtype)  # δ before its softplus
    deltas = np.empty((CHUNK, lanes), u.dtype)
    ddeltas = np.empty((CHUNK, lanes), u.dtype)
    dys = np.empty((CHUNK, lanes), u.dtype)
    # λ δ u and h dy before the sum of the lanes; as many as sums fill a vector
    products = np.zeros((2, dB.shape[4], lanes), u.dtype)
    for task in range(first, last):
        b, part = task // stripes, task % stripes
        start = part * stripe
        for s in range(S):
            for d in range(start, min(start + stripe, width), lanes):
                zero = splat(load(D, (s, d)), 0.0)
                for n in range(N):
                    store(carry, (n, 0), zero)
                    store(dA, (b, s, n, d), zero)
                dD_sum, dbias_sum = zero, zero
                for begin in range((L - 1) // CHUNK * CHUNK, -1, -CHUNK):
                    count = min(CHUNK, L - begin)
                    for k in range(count):
                        t = _token(reverse, s, L, begin + k)
                        x = _before_softplus(dt, low, dt_proj, dt_bias, s, b, t, d)
                        store(steps, (k, 0), x)
                        store(deltas, (k, 0), softplus(x))
                    for n in range(N):
                        store(h, (0, n, 0), load(states, (s, begin // CHUNK, b, n, d)))
                    for k in range(count):
                        t = _token(reverse, s, L, begin + k)
                        delta, u_t = load(deltas, (k, 0)), load(u, (s, b, t, d))
                        out = _advance(h, k, k + 1, delta, u_t, A, B, C, D, s, b, t, d)
                        if s > 0:
                            out = out + load(y, (b, t, d))
                        store(y, (b, t, d), out)
                    for k in range(count):
                        t = _token(reverse, s, L, begin + k)
                        dy = load(dout, (b, t, d)) * (1.0 / S)
                        out = load(y, (b, t, d))
                        if s == S - 1:
                            out = out * (1.0 / S)
                        if z is not None:
                            gate = load(z, (b, t, d))
                            share = sigmoid(gate)
                            silu = gate * share
                            if s == S - 1:
                                slope = share * (1.0 + (gate - silu))
                                store(dz, (b, t, d), load(dout, (b, t, d)) * out * slope)
                                out = out * silu
                            dy = dy * silu
                        store(y, (b, t, d), out)
                        store(dys, (k, 0), dy)
                    for k in range(count - 1, -1, -1):
                        t = _token(reverse, s, L, begin + k)
                        delta = load(deltas, (k, 0))
                        u_t = load(u, (s, b, t, d))
                        delta_u = delta * u_t
                        dy = load(dys, (k, 0))
                        lam_B, ddelta = zero, zero
                        for n in range(N):
                            A_n = load(A, (s, n, d))
                            lam = fma(broadcast(C, (s, b, t, n)), dy, load(carry, (n, 0)))
                            a_lam = exp2(delta * A_n) * lam
                            store(carry, (n, 0), a_lam)
                            store(products, (0, n, 0), lam * delta_u)
                            store(products, (1, n, 0), load(h, (k + 1, n, 0)) * dy)
                            lam_B = fma(lam, broadcast(B, (s, b, t, n)), lam_B)
                            p = a_lam * load(h, (k, n, 0))
                            ddelta = fma(p, A_n, ddelta)
                            store(dA, (b, s, n, d), fma(p, delta, load(dA, (b, s, n, d))))
                        store(du, (s, b, t, d), fma(delta, lam_B, load(D, (s, d)) * dy))
                        store(ddeltas, (k, 0), fma(u_t, lam_B, ddelta * LN2))
                        for n in range(0, N, lanes):
                            dB_t = lane_sums(products, (0, n, 0))
                            dC_t = lane_sums(products, (1, n, 0))
                            if d > start:
                                dB_t = dB_t + load(dB, (part, s, b, t, n))
                                dC_t = dC_t + load(dC, (part, s, b, t, n))
                            store(dB, (part, s, b, t, n), dB_t)
                            store(dC, (part, s, b, t, n), dC_t)
                    for k in range(count):
                        t = _token(reverse, s, L, begin + k)
                        x = load(steps, (k, 0))
                        slope = where_greater(x, splat(x, 20.0), splat(x, 1.0), sigmoid(x))
                        ddt_t = load(ddeltas, (k, 0)) * slope
                        store(ddt, (s, b, t, d), ddt_t)
                        dD_sum = fma(load(dys, (k, 0)), load(u, (s, b, t, d)), dD_sum)
                        dbias_sum = dbias_sum + ddt_t
                store(dD, (b, s, d), dD_sum)
                store(dbias, (b, s, d), dbias_sum)


def _channels(u, A):
    return Channels(u.shape[3], widest_dtype(u, A))


def _arrays(channels, u, dt, low, dt_proj, dt_bias, A, B, C, D, z, reverse):
    """What both kernels take, in their order."""
    zeros = A.new_zeros(A.shape[:2])
    return (
        channels.array(u),
        channels.array(dt),
        channels.plain(low),
        channels.array(None if dt_proj is None else dt_proj.mT),
        channels.array(zeros if dt_bias is None else dt_bias),
        channels.array(A.mT.to(channels.dtype) / LN2),
        channels.plain(B),
        channels.plain(C),
        channels.array(zeros if D is None else D),
        channels.array(z),
        np.array(reverse, dtype=bool),
    )


def new_states(u, A):
    """Empty states before each chunk, (S, chunks, B, N, D), D in whole vectors."""
    S, B, L, _ = u.shape
    channels = _channels(u, A)
    shape = S, -(-L // CHUNK), B, A.shape[2], channels.width
    return u.new_empty(shape, dtype=channels.dtype)


def scan(u, dt, low, dt_proj, dt_bias, A, B, C, D, z, reverse, keep='all'):
    """The gated mean of the directions (B, L, D), and the states before each chunk.

    Args:
        keep: What is needed afterwards: 'all'; 'states', but u may be written over; 'nothing',
            and there are no states.
    """
    channels = _channels(u, A)
    arrays = _arrays(channels, u, dt, low, dt_proj, dt_bias, A, B, C, D, z, reverse)
    states = new_states(u, A) if keep != 'nothing' else new_states(u[:0], A)
    in_place = keep != 'all' and arrays[0].ctypes.data == u.data_ptr()
    y = u[0].detach() if in_place else channels.new(*u.shape[1:3])
    tasks = u.shape[1] * channels.width // channels.lanes
    threads.run(_forward, tasks, *arrays, y.numpy(), states.numpy())
    return channels.cut(y).to(u.dtype).contiguous(), states


def differentiate(dout, u, dt, low, dt_proj, dt_bias, A, B, C, D, z, states, reverse, dz):
    """The output once more and the gradients of the inputs but z, whose own goes to dz."""
    channels = _channels(u, A)
    arrays = _arrays(channels, u, dt, low, dt_proj, dt_bias, A, B, C, D, z, reverse)
    S, samples, L, N = B.shape
    stripes = -(-channels.width // (STRIPE * channels.lanes))
    y = channels.new(samples, L)
    du, ddt = channels.new(S, samples, L), channels.new(S, samples, L)
    dA, dD, dbias = (channels.new(samples, S, *n) for n in ((N,), (), ()))
    sums = -(-N // channels.lanes) * channels.lanes
    dB, dC = (torch.empty(stripes, S, samples, L, sums, dtype=y.dtype) for _ in range(2))
    direct = dz is not None and dz.dtype == y.dtype and channels.width == channels.count
    own_dz = dz if direct or dz is None else torch.empty_like(y)
    results = y, du, ddt, dA, dB, dC, dD, dbias
    threads.run(
        _backward,
        samples * stripes,
        channels.array(dout),
        *arrays,
        states.numpy(),
        *(x.numpy() for x in results),
        None if dz is None else own_dz.numpy(),
    )
    if own_dz is not dz:
        dz.copy_(channels.cut(own_dz))
    y, du, ddt = (channels.cut(x).to(u.dtype) for x in (y, du, ddt))
    dA, dD, dbias = (channels.cut(x.sum(0)) for x in (dA, dD, dbias))
    dB, dC = (x.sum(0)[..., :N] for x in (dB, dC))
    return y, du, ddt, dA.mT, dB, dC, dD, dbias


def forward(u, dt, A, B, C, D, z, dt_bias, reverse):
    """The output (B, L, D), and the states before each chunk."""
    return scan(u, dt, None, None, dt_bias, A, B, C, D, z, reverse)


def backward(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse):
    """Gradients of the inputs that are there, in their order."""
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    _, du, ddt, dA, dB, dC, dD, dbias = differentiate(
        dout, u, dt, None, None, dt_bias, A, B, C, D, z, states, reverse, dz
    )
    pairs = zip((du, ddt, dA, dB, dC, dD, dz, dbias), (u, dt, A, B, C, D, z, dt_bias), strict=True)
    return [grad.to(x.dtype).contiguous() for grad, x in pairs if x is not None]
