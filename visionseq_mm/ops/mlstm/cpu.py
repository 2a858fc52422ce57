"""The mLSTM cell in Numba: chunks side by side, all of a chunk in the nearest caches.

The equations are the reference's. First what each chunk adds to the state, then the states
between the chunks, then everything inside them. The rows of a chunk are views of the tensors in
the order of the scan.

B batch, S tokens, H heads, Dh channels of a head in whole vectors, T tokens of a chunk; R
sequences, which are heads of samples.
"""

import math

import numpy as np
import torch

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
    splat,
    store,
    where_greater,
)
from visionseq_mm.ops.tiles import add_product, clear, dots, product, transpose

LOG2E = 1 / math.log(2)


def chunk_size(Dh: int) -> int:
    """Products within chunks grow with their tokens, the states' memory with their number."""
    return 64 if Dh <= 64 else 128 if Dh <= 192 else 256


# -------------------------------------------------------------- along a sequence


@jit
def _gates(first, last, i, f, reverse, T, a, g, source, bound, to_state, from_state, decay):
    """What depends on the gates alone. Tasks: sequences.

    a, g and the token that sets g, exp(−m); what multiplies a key in the state after its chunk,
    the state before a chunk in each row, and that state until after the chunk.
    """
    _, S, H = i.shape
    for task in range(first, last):
        b, n = task // H, task % H
        F, top, at = 0.0, -np.inf, 0
        for t in range(S):
            token = S - 1 - t if reverse else t
            f_t = np.float64(f[b, token, n])
            F += min(f_t, 0.0) - math.log1p(math.exp(-abs(f_t)))
            a_t = np.float64(i[b, token, n]) - F
            if t == 0 or not a_t <= top:
                top, at = a_t, t
            a[task, t], g[task, t], source[task, t] = a_t, top, at
            bound[task, t] = math.exp(-F - top)
        for chunk in range(decay.shape[1]):
            begin, end = chunk * T, min(chunk * T + T, S)
            # The state before the first chunk is 0: any finite weight will do.
            before, after = g[task, max(begin - 1, 0)], g[task, end - 1]
            decay[task, chunk] = math.exp(before - after)
            for t in range(begin, end):
                to_state[task, t] = math.exp(a[task, t] - after)
                from_state[task, t] = math.exp(before - g[task, t])


@jit
def _gate_gradients(first, last, f, reverse, eps, r, delta, source, di, dF, di_out, df_out):
    """Gradients of i and f from those of the rows, di and dF. Tasks: sequences."""
    _, S, H = f.shape
    for task in range(first, last):
        b, n = task // H, task % H
        for t in range(S):
            dm = -eps * r[task, t] * delta[task, t]
            dF[task, t] += dm
            dF[task, source[task, t]] -= dm
            di[task, source[task, t]] += dm
        total = 0.0
        for t in range(S - 1, -1, -1):
            token = S - 1 - t if reverse else t
            total += dF[task, t]
            di_out[b, token, n] = di[task, t]
            df_out[b, token, n] = total / (1.0 + math.exp(np.float64(f[b, token, n])))


@jit
def _join(first, last, states, norms, decay, backwards):
    """From what each chunk adds the sums before it, or after it, in place.

    Tasks: rows of a sequence's states, and its norms as one row more.
    """
    _, chunks, M, N = states.shape
    lanes = BYTES // states.itemsize
    total = np.empty(N, states.dtype)
    for task in range(first, last):
        row, m = task // (M + 1), task % (M + 1)
        x = states[row, :, m] if m < M else norms[row, :, :]
        total[:] = 0
        for step in range(chunks):
            chunk = chunks - 1 - step if backwards else step
            for n in range(0, N, lanes):
                before = load(total, (n,))
                own = load(x, (chunk, n))
                store(x, (chunk, n), before)
                store(total, (n,), fma(before, splat(before, decay[row, chunk]), own))


# ---------------------------------------------------------------- within chunks


@inline
def _rows(x, task, chunks, T, reverse):
    """The tokens of a task's chunk (up to T, Dh)."""
    sequence, chunk = task // chunks, task % chunks
    H = x.shape[2]
    rows = x[sequence // H, :, sequence % H]
    if reverse:
        rows = rows[::-1]
    return rows[chunk * T : chunk * T + T, 0 : x.shape[3]]


@inline
def _scratch(M, N, like):
    """(M, N); rows a power of two apart would have few places in the nearest cache."""
    return np.empty((M, N + BYTES // like.itemsize), like.dtype)[0:M, 0:N]


@jit
def _add_states(first, last, x, x_weight, y, z, z_weight, reverse, T, unread, states, norms):
    """Σ_t w_t x_tᵀ y_t and Σ_t u_t z_t of all chunks but one. Tasks: chunks of sequences."""
    chunks, N = norms.shape[1:]
    lanes = BYTES // x.itemsize
    weighted = _scratch(T, N, x)
    for task in range(first, last):
        row, chunk = task // chunks, task % chunks
        if chunk == unread:
            continue
        x_rows = _rows(x, task, chunks, T, reverse)
        y_rows = _rows(y, task, chunks, T, reverse)
        z_rows = _rows(z, task, chunks, T, reverse)
        count = len(x_rows)
        w = x_weight[row, chunk * T : chunk * T + count]
        u = z_weight[row, chunk * T : chunk * T + count]
        for d in range(0, N, lanes):
            total = splat(load(z_rows, (0, d)), 0.0)
            for t in range(count):
                store(weighted, (t, d), load(x_rows, (t, d)) * w[t])
                total = fma(load(z_rows, (t, d)), splat(total, u[t]), total)
            store(norms, (row, chunk, d), total)
        product(states[row, chunk, 0:N, 0:N], weighted[0:count, 0:N].T, y_rows)


@inline
def _two_parts(values, begin, count, parts):
    """Doubles as sums of two numbers of the type of `parts`, so that differences are exact."""
    for t in range(count):
        x = values[begin + t]
        parts[0, t] = x
        parts[1, t] = x - parts[0, t] if math.isfinite(x) else 0.0


@inline
def _weights(a, g, t, j):
    """exp(a_j − g_t) for a vector of tokens j."""
    difference = (load(a, (0, j)) - g[0, t]) + (load(a, (1, j)) - g[1, t])
    return exp2(difference * LOG2E)


@inline
def _until(places, j, t, x):
    """Of a vector of tokens j those up to t; zeros stand for the others."""
    return where_greater(load(places, (j,)), splat(x, t), splat(x, 0.0), x)


@jit
def _forward(
    first, last, q, k, v, reverse, T, eps, a, g, bound, from_state, states, norms, scale, h, sums
):
    """h, and the sums of the rows of C. Tasks: chunks of sequences."""
    chunks, N = norms.shape[1:]
    lanes = BYTES // q.itemsize
    places = np.arange(T).astype(q.dtype)
    a_parts, g_parts = np.zeros((2, T), q.dtype), np.zeros((2, T), q.dtype)
    k_transposed, scores = _scratch(N, T, q), _scratch(lanes, T, q)
    lines, totals = np.empty((lanes, lanes), q.dtype), np.empty(lanes, q.dtype)
    for task in range(first, last):
        row, begin = task // chunks, task % chunks * T
        q_rows = _rows(q, task, chunks, T, reverse)
        k_rows = _rows(k, task, chunks, T, reverse)
        v_rows = _rows(v, task, chunks, T, reverse)
        h_rows = _rows(h, task, chunks, T, reverse)
        count = len(q_rows)
        _two_parts(a[row], begin, count, a_parts)
        _two_parts(g[row], begin, count, g_parts)
        transpose(k_transposed, k_rows)
        state = states[row, task % chunks, 0:N, 0:N]
        norm = norms[row, task % chunks]
        for i in range(0, count, lanes):
            end = min(i + lanes, count)
            width = i + lanes
            rows = scores[0 : end - i, 0:width]
            product(rows, q_rows[i:end, 0:N], k_transposed[0:N, 0:width])
            clear(h_rows[i:end, 0:N])
            if begin > 0:
                add_product(h_rows[i:end, 0:N], q_rows[i:end, 0:N], state)
            for t in range(i, end):
                total = splat(load(lines, (0, 0)), 0.0)
                for d in range(0, N, lanes):
                    total = fma(load(q_rows, (t, d)), load(norm, (d,)), total)
                factor = from_state[row, begin + t]
                total = total * factor
                for d in range(0, N, lanes):
                    store(h_rows, (t, d), load(h_rows, (t, d)) * factor)
                for j in range(0, width, lanes):
                    x = load(rows, (t - i, j)) * _weights(a_parts, g_parts, t, j)
                    x = _until(places, j, t, x)
                    store(rows, (t - i, j), x)
                    total = total + x
                store(lines, (t - i, 0), total)
            add_product(h_rows[i:end, 0:N], rows[0 : end - i, 0:end], v_rows[0:end, 0:N])
            store(totals, (0,), lane_sums(lines, (0, 0)))
            for t in range(i, end):
                total_t = totals[t - i] * scale
                sums[row, begin + t] = total_t
                n = np.float64(abs(total_t))
                if bound[row, begin + t] > n:
                    n = bound[row, begin + t]
                factor_t = scale / (n + eps)
                for d in range(0, N, lanes):
                    store(h_rows, (t, d), load(h_rows, (t, d)) * factor_t)


@jit
def _output_gradients(
    first, last, dh, h, sums, bound, from_state, reverse, T, eps, scale, r, delta, w, u, dsum
):
    """r and δ, and what multiplies q_tᵀ dh_t and q_t in the gradient of the state before a row.

    Tasks: chunks of sequences.
    """
    chunks = (dh.shape[1] + T - 1) // T
    lanes = BYTES // dh.itemsize
    lines, deltas = np.empty((lanes, lanes), dh.dtype), np.empty(T, dh.dtype)
    for task in range(first, last):
        row, begin = task // chunks, task % chunks * T
        dh_rows = _rows(dh, task, chunks, T, reverse)
        dots(deltas, dh_rows, _rows(h, task, chunks, T, reverse), lines)
        for t in range(len(dh_rows)):
            at = begin + t
            total = np.float64(sums[row, at])
            size = abs(total)
            r_t = 1.0 / ((bound[row, at] if bound[row, at] > size else size) + eps)
            dsum_t = 0.0
            if not size <= bound[row, at]:
                dsum_t = -r_t * deltas[t] * np.sign(total)
            r[row, at], delta[row, at], dsum[row, at] = r_t, deltas[t], dsum_t
            w[row, at] = from_state[row, at] * scale * r_t
            u[row, at] = from_state[row, at] * scale * dsum_t


@jit
def _backward(
    first,
    last,
    dh,
    q,
    k,
    v,
    reverse,
    T,
    scale,
    a,
    g,
    to_state,
    r,
    w,
    u,
    dsum,
    states,
    norms,
    dstates,
    dnorms,
    dq,
    dk,
    dv,
    di,
    dF,
):
    """Gradients of q, k and v, and those of the rows. Tasks: chunks of sequences.

    States are transposed, [v, k], their gradients are not.
    """
    chunks, N = norms.shape[1:]
    lanes = BYTES // q.itemsize
    places = np.arange(T).astype(q.dtype)
    a_parts, g_parts = np.zeros((2, T), q.dtype), np.zeros((2, T), q.dtype)
    k_transposed, v_transposed = _scratch(N, T, q), _scratch(N, T, q)
    dstate_transposed = _scratch(N, N, q)
    scores, dP = _scratch(T, T, q), _scratch(T, T, q)
    lines, sums = np.empty((lanes, lanes), q.dtype), np.empty((2, T), q.dtype)
    for task in range(first, last):
        row, chunk = task // chunks, task % chunks
        begin = chunk * T
        q_rows, dq_rows = _rows(q, task, chunks, T, reverse), _rows(dq, task, chunks, T, reverse)
        k_rows, dk_rows = _rows(k, task, chunks, T, reverse), _rows(dk, task, chunks, T, reverse)
        v_rows, dv_rows = _rows(v, task, chunks, T, reverse), _rows(dv, task, chunks, T, reverse)
        dh_rows = _rows(dh, task, chunks, T, reverse)
        count = len(q_rows)
        _two_parts(a[row], begin, count, a_parts)
        _two_parts(g[row], begin, count, g_parts)
        transpose(k_transposed, k_rows)
        transpose(v_transposed, v_rows)
        dstate = dstates[row, chunk, 0:N, 0:N]
        transpose(dstate_transposed, dstate)
        norm, dnorm = norms[row, chunk], dnorms[row, chunk]

        # What came and goes through the states.
        clear(dq_rows)
        clear(dk_rows)
        clear(dv_rows)
        if chunk > 0:
            add_product(dq_rows, dh_rows, states[row, chunk, 0:N, 0:N])
        if chunk < chunks - 1:
            add_product(dk_rows, v_rows, dstate_transposed)
            add_product(dv_rows, k_rows, dstate)
        for t in range(count):
            w_t, u_t, to_state_t = w[row, begin + t], u[row, begin + t], to_state[row, begin + t]
            for d in range(0, N, lanes):
                store(dq_rows, (t, d), load(dq_rows, (t, d)) * w_t + load(norm, (d,)) * u_t)
                store(dk_rows, (t, d), (load(dk_rows, (t, d)) + load(dnorm, (d,))) * to_state_t)
                store(dv_rows, (t, d), load(dv_rows, (t, d)) * to_state_t)
        dots(sums[0], q_rows, dq_rows, lines)
        dots(sums[1], k_rows, dk_rows, lines)

        # The chunk itself. `dP` becomes the gradient of the scores, `scores` what multiplies dh
        # in dv; the rows' and columns' sums of E join those of the states.
        for i in range(0, count, lanes):
            end, width = min(i + lanes, count), i + lanes
            product(scores[i:end, 0:width], q_rows[i:end, 0:N], k_transposed[0:N, 0:width])
            product(dP[i:end, 0:width], dh_rows[i:end, 0:N], v_transposed[0:N, 0:width])
            for t in range(i, end):
                r_t, dsum_t = r[row, begin + t], dsum[row, begin + t]
                total = splat(load(lines, (0, 0)), 0.0)
                for j in range(0, width, lanes):
                    weight = _until(places, j, t, _weights(a_parts, g_parts, t, j) * scale)
                    score = load(scores, (t, j))
                    dP_t = (load(dP, (t, j)) * r_t + splat(score, dsum_t)) * weight
                    E = _until(places, j, t - 1, score * dP_t)
                    total = total + E
                    store(sums, (1, j), load(sums, (1, j)) + E)
                    store(dP, (t, j), dP_t)
                    store(scores, (t, j), score * weight * r_t)
                store(lines, (t - i, 0), total)
            store(sums, (0, i), load(sums, (0, i)) + lane_sums(lines, (0, 0)))
            add_product(dq_rows[i:end, 0:N], dP[i:end, 0:end], k_rows[0:end, 0:N])
        for t in range(count):
            dF[row, begin + t] = sums[0, t] - sums[1, t]
        for j in range(0, count, lanes):
            end = min(j + lanes, count)
            add_product(dk_rows[j:end, 0:N], dP[j:count, j:end].T, q_rows[j:count, 0:N])
            add_product(dv_rows[j:end, 0:N], scores[j:count, j:end].T, dh_rows[j:count, 0:N])
        dots(sums[0], k_rows, dk_rows, lines)
        for t in range(count):
            di[row, begin + t] = sums[0, t]


# ------------------------------------------------------------------------ calls


class _Cell:
    """A call's arrays, and what depends on the gates alone, as `_gates` has it."""

    def __init__(self, q, k, v, i, f, reverse):
        B, S, H, Dh = q.shape
        self.channels = Channels(Dh, widest_dtype(q, i))
        self.scale, self.reverse = Dh**-0.5, reverse
        self.q, self.k, self.v = (self.channels.array(x) for x in (q, k, v))
        self.i, self.f = self.channels.plain(i), self.channels.plain(f)
        self.dtype = self.q.dtype
        self.N, self.T = self.q.shape[3], chunk_size(Dh)
        self.sequences, self.chunks = B * H, -(-S // self.T)
        self.tasks = self.sequences * self.chunks
        self.walk = reverse, self.T
        self.a, self.g, self.bound = (np.empty((B * H, S)) for _ in range(3))
        self.source = np.empty((B * H, S), dtype=np.int64)
        self.to_state, self.from_state = (np.empty((B * H, S), self.dtype) for _ in range(2))
        self.decay = np.empty((B * H, self.chunks), self.dtype)
        threads.run(
            _gates,
            self.sequences,
            self.i,
            self.f,
            *self.walk,
            self.a,
            self.g,
            self.source,
            self.bound,
            self.to_state,
            self.from_state,
            self.decay,
        )

    def states(self, x, x_weight, y, z, z_weight, backwards=False):
        """Σ w_t x_tᵀ y_t and Σ u_t z_t over all chunks before each, or after it."""
        states = np.empty((self.sequences, self.chunks, self.N, self.N), self.dtype)
        norms = np.empty((self.sequences, self.chunks, self.N), self.dtype)
        unread = 0 if backwards else self.chunks - 1
        threads.run(
            _add_states, self.tasks, x, x_weight, y, z, z_weight, *self.walk, unread, states, norms
        )
        threads.run(_join, self.sequences * (self.N + 1), states, norms, self.decay, backwards)
        return states, norms


def forward(q, k, v, i, f, reverse, eps):
    """h (B, S, H, Dh) and the sums Σ_j C_ij (B·H, S) in the order of the scan."""
    cell = _Cell(q, k, v, i, f, reverse)
    h = cell.channels.new(*q.shape[:3])
    sums = h.new_empty(cell.a.shape)
    threads.run(
        _forward,
        cell.tasks,
        cell.q,
        cell.k,
        cell.v,
        *cell.walk,
        eps,
        cell.a,
        cell.g,
        cell.bound,
        cell.from_state,
        *cell.states(cell.k, cell.to_state, cell.v, cell.k, cell.to_state),
        cell.scale,
        h.numpy(),
        sums.numpy(),
    )
    return cell.channels.cut(h).to(v.dtype).contiguous(), sums


def backward(dh, q, k, v, i, f, h, sums, reverse, eps):
    """Gradients of q, k, v, i and f."""
    cell = _Cell(q, k, v, i, f, reverse)
    channels = cell.channels
    dh, h = channels.array(dh), channels.array(h)
    r, delta, dsum, di, dF = (np.empty(cell.a.shape) for _ in range(5))
    w, u = (np.empty(cell.a.shape, cell.dtype) for _ in range(2))
    threads.run(
        _output_gradients,
        cell.tasks,
        dh,
        h,
        channels.plain(sums),
        cell.bound,
        cell.from_state,
        *cell.walk,
        eps,
        cell.scale,
        r,
        delta,
        w,
        u,
        dsum,
    )
    dq, dk, dv = (channels.new(*q.shape[:3]) for _ in range(3))
    threads.run(
        _backward,
        cell.tasks,
        dh,
        cell.q,
        cell.k,
        cell.v,
        *cell.walk,
        cell.scale,
        cell.a,
        cell.g,
        cell.to_state,
        r,
        w,
        u,
        dsum,
        *cell.states(cell.v, cell.to_state, cell.k, cell.k, cell.to_state),
        *cell.states(cell.q, w, dh, cell.q, u, backwards=True),
        dq.numpy(),
        dk.numpy(),
        dv.numpy(),
        di,
        dF,
    )
    di_out, df_out = (torch.empty_like(x, dtype=channels.dtype) for x in (i, f))
    threads.run(
        _gate_gradients,
        cell.sequences,
        cell.f,
        reverse,
        eps,
        r,
        delta,
        cell.source,
        di,
        dF,
        di_out.numpy(),
        df_out.numpy(),
    )
    grads = (*(channels.cut(x) for x in (dq, dk, dv)), di_out, df_out)
    return [x.to(y.dtype).contiguous() for x, y in zip(grads, (q, k, v, i, f), strict=True)]
