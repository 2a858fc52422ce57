# ruff: noqa: RUF005 (Triton has no starred expressions)
"""The selective scan in Triton, one or two directions at once, chunks in parallel.

    h_t = ā_t ⊙ h_{t−1} + δ_t u_t ⊗ B_t        ā_t = exp(δ_t A)
    y_t = h_t C_t + D ⊙ u_t                     out_t = mean over directions (y_t) ⊙ SiLU(z_t)

S directions, B batch, L tokens, D channels, N states, T tokens of a chunk. All directions cut
the tokens at the same places, so that one program can scan a chunk forth and then back.

One pass finds what each chunk adds to a state of zeros, a second one carries the state from chunk
to chunk, and a third scans every chunk from the state before it: `states`, the only thing kept.

Backward, with λ_t = dL/dh_t, what h_t and λ_t get from their neighbours, h⁻_t = ā_t ⊙ h_{t−1} and
λ⁺_t = ā_{t+1} ⊙ λ_{t+1}, and the gradient of log ā_t, which is r_t = λ_t ⊙ h⁻_t:

    h_t = h⁻_t + δ_t u_t ⊗ B_t             λ_t = λ⁺_t + dy_t ⊗ C_t
    du_t = δ_t Σ_n λ_t B_t + D dy_t        dδ_t = u_t Σ_n λ_t B_t + Σ_n A r_t
    dB_t = Σ_d λ_t δ_t u_t                 dC_t = Σ_d h_t dy_t          dA = Σ_t δ_t r_t

h and λ run in opposite directions, and neither fits in memory for all t. But they need not meet,
for r_{t+1} = λ⁺_t ⊙ h_t too, and so

    r_t = r_{t+1} + h⁻_t ⊙ C_t dy_t − λ⁺_t ⊙ δ_t u_t B_t

One pass sums the first term, another the second, each with a single state. The sums start anew
in every chunk, from the λ⁺ and h at its end, both known: short sums keep the difference exact.
Channels are summed per program, programs by torch: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionseq_mm.ops.triton_common import (
    LN2,
    LOG2E,
    dense_row,
    flags,
    load,
    row,
    rows,
    sigmoid,
    softplus,
    softplus_slope,
    store,
    unit_stride,
)

# A thread holds 32 elements of a tile of states, which leaves registers for two tiles more: 16
# states of two channels, so that sums over n need no other thread.
TILE = 1024
CHANNELS = 64
FEWEST = 32  # channels of a tile of many states
CHUNKS = (128, 64)  # candidates for T, before SHORTEST
SHORTEST = 32
FULL = 4 * 132 * 4  # programs, of one warp, that keep the schedulers of a large GPU busy
AHEAD = 16  # chunks whose states are under way while the carry passes one after the other


def chunk_length(u: Tensor) -> int:
    """Long chunks spare memory, short ones give every processor something to do."""
    _, B, L, D = u.shape
    for T in CHUNKS:
        if -(-L // T) * B * -(-D // CHANNELS) >= FULL:
            return T
    return SHORTEST


def new_states(u: Tensor, A: Tensor) -> Tensor:
    """(S, B, chunks, N, D)"""
    S, B, L, D = u.shape
    chunks = -(-L // chunk_length(u))
    return u.new_empty((S, B, chunks, A.shape[2], D), dtype=torch.float32)


@triton.jit
def _softplus_kernel(
    dt_ptr,
    bias_ptr,
    delta_ptr,
    dt_row,
    dt_token,
    L,
    D,
    batch,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * TOKENS
    i = tl.arange(0, TOKENS)
    sb = tl.program_id(2)
    mask_d = d < D
    mask = (first + i < L)[:, None] & mask_d[None, :]
    x = load(row(dt_ptr, sb, dt_row, first, dt_token) + i[:, None] * dt_token + d[None, :], mask)
    if bias_ptr is not None:
        x += load(bias_ptr + sb // batch * D + d, mask_d)[None, :]
    delta_ptr = dense_row(delta_ptr, sb, first, L, D)
    store(delta_ptr + i[:, None] * D + d[None, :], softplus(x), mask)


@triton.jit
def _tile(D, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Indices and masks of the states n, the channels d, and of both in an (N, D) matrix."""
    n = tl.arange(0, BLOCK_N)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_n, mask_d = n < N, d < D
    # Two, not the four that fit a load: with the tile goes who holds what.
    nd = tl.max_contiguous(n[:, None] * D + d[None, :], [1, 2])
    return n, mask_n, d, mask_d, nd, mask_n[:, None] & mask_d[None, :]


@triton.jit
def _walk(L, T, flip):
    """First token of the program's chunk, how many there are, and where the next one lies."""
    start = tl.program_id(1) * T
    steps = tl.minimum(T, L - start)
    return start + flip * (steps - 1), steps, 1 - 2 * flip


@triton.jit
def _chunk_kernel(
    x_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    states_ptr,
    sums_ptr,
    x_row,
    x_token,
    B_row,
    B_token,
    L,
    D,
    T,
    batch,
    BACKWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A chunk's state from zeros, h ← ā h + δ x ⊗ B with x = u, and Σ δ.

    Backward, x is dy and B is C: λ⁺ ← ā (λ⁺ + dy ⊗ C), against the direction of the scan.
    """
    n, mask_n, d, mask_d, nd, mask = _tile(D, N, BLOCK_N, BLOCK_D)
    sb = tl.program_id(2)
    s, b = sb // batch, sb % batch
    token, steps, step = _walk(L, T, ((REVERSE >> s) & 1) ^ BACKWARD)
    A = load(A_ptr + s * N * D + nd, mask)
    xs = row(x_ptr, b if BACKWARD else sb, x_row, token, x_token) + d
    deltas = dense_row(delta_ptr, sb, token, L, D) + d
    Bs = row(B_ptr, sb, B_row, token, B_token) + n
    x_next, delta_next = load(xs, mask_d), load(deltas, mask_d)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for i in range(steps):
        x, delta = x_next, delta_next
        after = tl.minimum(i + 1, steps - 1) * step
        x_next, delta_next = load(xs + after * x_token, mask_d), load(deltas + after * D, mask_d)
        B = load(Bs + i * step * B_token, mask_n)
        a = tl.exp2(delta[None, :] * A)
        if BACKWARD:
            h = a * (h + x[None, :] * B[:, None])
        else:
            h = a * h + (delta * x)[None, :] * B[:, None]
        total += delta
    at = sb.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(states_ptr + at * N * D + nd, h, mask=mask)
    tl.store(sums_ptr + at * D + d, total, mask=mask_d)


@triton.jit
def _carry_kernel(
    states_ptr,
    sums_ptr,
    A_ptr,
    chunks,
    D,
    batch,
    BACKWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place, a chunk's own state becomes the one that enters it: h ← exp(A Σ δ) h + own."""
    sb = tl.program_id(1)
    s = sb // batch
    flip = ((REVERSE >> s) & 1) ^ BACKWARD
    nd = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = nd < N * D
    A = load(A_ptr + s * N * D + nd, mask)
    first = sb.to(tl.int64) * chunks + flip * (chunks - 1)
    states_ptr += first * N * D + nd
    sums_ptr += first * D + nd % D
    step = (1 - 2 * flip).to(tl.int64)
    h = tl.zeros([BLOCK], tl.float32)
    for c in range(0, chunks, AHEAD):
        own, decay = (), ()
        for i in tl.static_range(AHEAD):
            at = (c + i) * step
            here = mask & (c + i < chunks)
            own = own + (load(states_ptr + at * N * D, here),)
            decay = decay + (tl.exp2(A * load(sums_ptr + at * D, here)),)
        for i in tl.static_range(AHEAD):
            at = (c + i) * step
            tl.store(states_ptr + at * N * D, h, mask=mask & (c + i < chunks))
            h = decay[i] * h + own[i]


@triton.jit
def _scan_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    states_ptr,
    out_ptr,
    u_row,
    u_token,
    B_row,
    B_token,
    C_row,
    C_token,
    z_row,
    z_token,
    L,
    D,
    T,
    batch,
    REVERSE: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scans a chunk from the state before it, in each direction; y of the first waits in out."""
    n, mask_n, d, mask_d, nd, mask = _tile(D, N, BLOCK_N, BLOCK_D)
    b = tl.program_id(2)
    for s in tl.static_range(S):
        sb = s * batch + b
        token, steps, step = _walk(L, T, (REVERSE >> s) & 1)
        at = sb.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        A = load(A_ptr + s * N * D + nd, mask)
        h = load(states_ptr + at * N * D + nd, mask)
        if D_ptr is not None:
            skip = load(D_ptr + s * D + d, mask_d)
        us = row(u_ptr, sb, u_row, token, u_token) + d
        deltas = dense_row(delta_ptr, sb, token, L, D) + d
        Bs = row(B_ptr, sb, B_row, token, B_token) + n
        Cs = row(C_ptr, sb, C_row, token, C_token) + n
        outs = dense_row(out_ptr, b, token, L, D) + d
        u_next, delta_next = load(us, mask_d), load(deltas, mask_d)
        if s > 0:
            tl.debug_barrier()
            y_next = load(outs, mask_d)
        if s == S - 1 and z_ptr is not None:
            zs = row(z_ptr, b, z_row, token, z_token) + d
            z_next = load(zs, mask_d)
        for i in range(steps):
            u, delta = u_next, delta_next
            after = tl.minimum(i + 1, steps - 1) * step
            u_next = load(us + after * u_token, mask_d)
            delta_next = load(deltas + after * D, mask_d)
            B, C = load(Bs + i * step * B_token, mask_n), load(Cs + i * step * C_token, mask_n)
            h = tl.exp2(delta[None, :] * A) * h + (delta * u)[None, :] * B[:, None]
            y = tl.sum(h * C[:, None], 0)
            if D_ptr is not None:
                y += skip * u
            if s > 0:
                y += y_next
                y_next = load(outs + after * D, mask_d)
            if s == S - 1:
                y /= S
                if z_ptr is not None:
                    y *= z_next * sigmoid(z_next)
                    z_next = load(zs + after * z_token, mask_d)
            store(outs + i * step * D, y, mask_d)


@triton.jit
def _store_sum(ptr, x, mask, PRECISION: tl.constexpr):
    """Sum over the channels of x (N, D).

    What a thread has of a row it adds by itself, the rest is a product with ones, which takes
    half the instructions of an exchange between threads.
    """
    x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), 2)
    sums = tl.dot(x, tl.full([x.shape[1], 16], 1, tl.float32), input_precision=PRECISION)
    first = tl.arange(0, 16)[None, :] == 0
    tl.store(ptr[:, None] + tl.zeros([1, 16], tl.int32), sums, mask=mask[:, None] & first)


@triton.jit
def _h_kernel(
    dout_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    states_ptr,
    dy_ptr,
    y_ptr,
    dz_ptr,
    P_ptr,
    dA_ptr,
    dC_ptr,
    dout_row,
    dout_token,
    u_row,
    u_token,
    B_row,
    B_token,
    C_row,
    C_token,
    z_row,
    z_token,
    dz_row,
    dz_token,
    L,
    D,
    T,
    batch,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Along the scan: what the gradients take from h, and dy, on which λ depends.

    P_t = Σ_n A h⁻_t C_t dy_t, dC, dA's part Σ_t (Σ_{s≤t} δ_s) h⁻_t C_t dy_t; where there is a
    gate, dz, and the output once more.
    """
    n, mask_n, d, mask_d, nd, mask = _tile(D, N, BLOCK_N, BLOCK_D)
    b = tl.program_id(2)
    for s in tl.static_range(S):
        sb = s * batch + b
        token, steps, step = _walk(L, T, (REVERSE >> s) & 1)
        at = sb.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        A = load(A_ptr + s * N * D + nd, mask)
        h = load(states_ptr + at * N * D + nd, mask)
        if D_ptr is not None:
            skip = load(D_ptr + s * D + d, mask_d)
        douts = row(dout_ptr, b, dout_row, token, dout_token) + d
        us = row(u_ptr, sb, u_row, token, u_token) + d
        deltas = dense_row(delta_ptr, sb, token, L, D) + d
        Bs = row(B_ptr, sb, B_row, token, B_token) + n
        Cs = row(C_ptr, sb, C_row, token, C_token) + n
        dys = dense_row(dy_ptr, b, token, L, D) + d
        Ps = dense_row(P_ptr, sb, token, L, D) + d
        dCs = dense_row(dC_ptr, sb * tl.num_programs(0) + tl.program_id(0), token, L, N) + n
        dout_next, u_next, delta_next = load(douts, mask_d), load(us, mask_d), load(deltas, mask_d)
        if z_ptr is not None:
            zs = row(z_ptr, b, z_row, token, z_token) + d
            dzs = row(dz_ptr, b, dz_row, token, dz_token) + d
            ys = dense_row(y_ptr, b, token, L, D) + d
            z_next = load(zs, mask_d)
            if s > 0:
                tl.debug_barrier()
                y_next = load(ys, mask_d)
        dA = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        for i in range(steps):
            dy, u, delta = dout_next, u_next, delta_next
            after = tl.minimum(i + 1, steps - 1) * step
            dout_next = load(douts + after * dout_token, mask_d)
            u_next = load(us + after * u_token, mask_d)
            delta_next = load(deltas + after * D, mask_d)
            B, C = load(Bs + i * step * B_token, mask_n), load(Cs + i * step * C_token, mask_n)
            h *= tl.exp2(delta[None, :] * A)
            hC = h * C[:, None]
            h += (delta * u)[None, :] * B[:, None]
            if z_ptr is not None:
                z = z_next
                z_next = load(zs + after * z_token, mask_d)
                gate = sigmoid(z)
                y = tl.sum(h * C[:, None], 0)
                if D_ptr is not None:
                    y += skip * u
                if s > 0:
                    y += y_next
                    y_next = load(ys + after * D, mask_d)
                if s == S - 1:
                    y /= S
                    dz = dy * y * gate * (1 + z * (1 - gate))
                    store(dzs + i * step * dz_token, dz, mask_d)
                    y *= z * gate
                store(ys + i * step * D, y, mask_d)
                dy *= z * gate
            dy /= S
            if s == 0:
                store(dys + i * step * D, dy, mask_d)
            total += delta
            store(Ps + i * step * D, dy * tl.sum(hC * A, 0), mask_d)
            dA += hC * (total * dy)[None, :]
            _store_sum(dCs + i * step * N, h * dy[None, :], mask_n, PRECISION)
        tl.store(dA_ptr + at * N * D + nd, dA, mask=mask)


@triton.jit
def _lambda_kernel(
    dy_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    states_ptr,
    lambdas_ptr,
    sums_ptr,
    P_ptr,
    dA_ptr,
    dB_ptr,
    du_ptr,
    ddt_ptr,
    dD_ptr,
    dbias_ptr,
    u_row,
    u_token,
    B_row,
    B_token,
    C_row,
    C_token,
    L,
    D,
    T,
    batch,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Against the scan: du, dB, and with what `_h_kernel` found, d(dt) and dA."""
    n, mask_n, d, mask_d, nd, mask = _tile(D, N, BLOCK_N, BLOCK_D)
    sb = tl.program_id(2)
    s, b = sb // batch, sb % batch
    flip = (REVERSE >> s) & 1
    token, steps, step = _walk(L, T, 1 - flip)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    at = sb.to(tl.int64) * chunks + chunk
    A = load(A_ptr + s * N * D + nd, mask)
    lam = load(lambdas_ptr + at * N * D + nd, mask)
    after_chunk = chunk + 1 - 2 * flip
    inside = (after_chunk >= 0) & (after_chunk < chunks)
    r = lam * load(states_ptr + (at + 1 - 2 * flip) * N * D + nd, mask & inside)
    Ar = tl.sum(A * r, 0)
    total = load(sums_ptr + at * D + d, mask_d)
    dA = load(dA_ptr + at * N * D + nd, mask) + r * total[None, :]
    if D_ptr is not None:
        skip = load(D_ptr + s * D + d, mask_d)
        dD = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dys = dense_row(dy_ptr, b, token, L, D) + d
    us = row(u_ptr, sb, u_row, token, u_token) + d
    deltas = dense_row(delta_ptr, sb, token, L, D) + d
    Bs = row(B_ptr, sb, B_row, token, B_token) + n
    Cs = row(C_ptr, sb, C_row, token, C_token) + n
    Ps = dense_row(P_ptr, sb, token, L, D) + d
    dus = dense_row(du_ptr, sb, token, L, D) + d
    ddts = dense_row(ddt_ptr, sb, token, L, D) + d
    dBs = dense_row(dB_ptr, sb * tl.num_programs(0) + tl.program_id(0), token, L, N) + n
    dy_next, P_next = load(dys, mask_d), load(Ps, mask_d)
    u_next, delta_next = load(us, mask_d), load(deltas, mask_d)
    for i in range(steps):
        dy, P, u, delta = dy_next, P_next, u_next, delta_next
        after = tl.minimum(i + 1, steps - 1) * step
        dy_next, P_next = load(dys + after * D, mask_d), load(Ps + after * D, mask_d)
        u_next, delta_next = load(us + after * u_token, mask_d), load(deltas + after * D, mask_d)
        B, C = load(Bs + i * step * B_token, mask_n), load(Cs + i * step * C_token, mask_n)
        delta_u = delta * u
        lam_B = lam * B[:, None]
        lam += dy[None, :] * C[:, None]
        du = tl.sum(lam * B[:, None], 0)
        Ar += P - delta_u * tl.sum(lam_B * A, 0)
        ddt = (u * du + LN2 * Ar) * softplus_slope(delta)
        dbias += ddt
        du *= delta
        if D_ptr is not None:
            du += dy * skip
            dD += dy * u
        store(dus + i * step * D, du, mask_d)
        store(ddts + i * step * D, ddt, mask_d)
        dA -= lam_B * (total * delta_u)[None, :]
        total -= delta
        _store_sum(dBs + i * step * N, lam * delta_u[None, :], mask_n, PRECISION)
        lam *= tl.exp2(delta[None, :] * A)
    tl.store(dA_ptr + at * N * D + nd, dA, mask=mask)
    tl.store(dbias_ptr + at * D + d, dbias, mask=mask_d)
    if D_ptr is not None:
        tl.store(dD_ptr + at * D + d, dD, mask=mask_d)


class _Scan:
    """What the kernels of one call share: sizes, A, and the launches."""

    def __init__(self, u, delta, A, B, C, D, reverse):
        self.S, self.batch, self.L, self.D = u.shape
        self.N = A.shape[2]
        self.T = chunk_length(u)
        self.u, self.delta = rows(u), rows(delta)
        # Every block of channels reads them; they are small.
        self.B, self.C = (rows(x.to(torch.float32)) for x in (B, C))
        self.A = (A.to(torch.float32) * LOG2E.value).transpose(1, 2).contiguous()
        skip = None if D is None else D.contiguous()
        self.inputs = self.u, self.delta, self.A, self.B, self.C, skip
        self.strided = self.u, self.B, self.C
        self.reverse = flags(reverse)
        self.BLOCK_N = max(16, triton.next_power_of_2(self.N))
        self.BLOCK_D = max(FEWEST, TILE // self.BLOCK_N)

    def run(self, kernel, sequences, tensors, strided, **constants):
        """One program for each block of channels, chunk, and sequence."""
        grid = triton.cdiv(self.D, self.BLOCK_D), triton.cdiv(self.L, self.T), sequences
        strides = [0 if x is None else x.stride(i) for x in strided for i in (0, 1)]
        kernel[grid](
            *tensors,
            *strides,
            self.L,
            self.D,
            self.T,
            self.batch,
            REVERSE=self.reverse,
            S=self.S,
            N=self.N,
            BLOCK_N=self.BLOCK_N,
            BLOCK_D=self.BLOCK_D,
            num_stages=1,  # the next token's loads are already under way
            num_warps=self.BLOCK_N * self.BLOCK_D // TILE,
            **constants,
        )

    def states(self, states, x, B, backward):
        """The state that enters each chunk, and Σ δ over each."""
        sums = states.new_empty((*states.shape[:3], self.D))
        tensors = x, self.delta, self.A, B, states, sums
        sequences = self.S * self.batch
        self.run(_chunk_kernel, sequences, tensors, (x, B), BACKWARD=backward)
        grid = triton.cdiv(self.N * self.D, 128), sequences
        _carry_kernel[grid](
            states,
            sums,
            self.A,
            states.shape[2],
            self.D,
            self.batch,
            BACKWARD=backward,
            REVERSE=self.reverse,
            N=self.N,
            AHEAD=AHEAD,
            BLOCK=128,
            num_warps=1,
        )
        return states, sums


def softplus_of(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    """δ (S, B, L, D) in dt's dtype."""
    S, batch, L, D = dt.shape
    delta = dt.new_empty(dt.shape)
    dt = rows(dt)
    grid = triton.cdiv(D, CHANNELS), triton.cdiv(L, SHORTEST), S * batch
    with torch.cuda.device_of(dt):
        _softplus_kernel[grid](
            dt,
            None if dt_bias is None else dt_bias.contiguous(),
            delta,
            *dt.stride()[:2],
            L,
            D,
            batch,
            TOKENS=SHORTEST,
            CHANNELS=CHANNELS,
        )
    return delta


def scan(u, delta, A, B, C, D, z, reverse):
    """Output and states from δ."""
    call = _Scan(u, delta, A, B, C, D, reverse)
    out = u.new_empty(u.shape[1:])
    with torch.cuda.device_of(u):
        states, _ = call.states(new_states(u, A), call.u, call.B, False)
        z = unit_stride(z)
        tensors = *call.inputs, z, states, out
        call.run(_scan_kernel, call.batch, tensors, (*call.strided, z))
    return out, states


def scan_backward(dout, u, delta, A, B, C, D, z, states, reverse, dz):
    """The output if there is a gate, else None, and gradients of u, dt, A, B, C, D and dt_bias.

    Writes dz, that of the gate.
    """
    call = _Scan(u, delta, A, B, C, D, reverse)
    dout, z = unit_stride(dout), unit_stride(z)
    y = None if z is None else u.new_empty(u.shape[1:])
    du, ddt = u.new_empty(u.shape), u.new_empty(u.shape)
    dy, P = (torch.empty_like(x, dtype=torch.float32) for x in (du[0], du))
    dA = torch.empty_like(states)
    blocks = triton.cdiv(call.D, call.BLOCK_D)
    dB, dC = P.new_empty((2, call.S, call.batch, blocks, call.L, call.N))
    # Float32 in two parts of what tensor cores take; half precision will be rounded anyway.
    precision = dict(PRECISION='tf32x3' if u.dtype == torch.float32 else 'tf32')
    with torch.cuda.device_of(u):
        tensors = dout, *call.inputs, z, states, dy, y, dz, P, dA, dC
        strided = dout, *call.strided, z, dz
        call.run(_h_kernel, call.batch, tensors, strided, **precision)
        lambdas, sums = call.states(torch.empty_like(states), dy, call.C, True)
        dD, dbias = (torch.empty_like(sums) for _ in range(2))
        outputs = lambdas, sums, P, dA, dB, du, ddt, dD, dbias
        tensors = dy, *call.inputs, states, *outputs
        call.run(_lambda_kernel, call.S * call.batch, tensors, call.strided, **precision)
    dA = dA.sum((1, 2)).transpose(1, 2).to(A.dtype).contiguous()
    dB, dC = dB.sum(2).to(B.dtype), dC.sum(2).to(C.dtype)
    dD = None if D is None else dD.sum((1, 2)).to(D.dtype)
    return y, du, ddt, dA, dB, dC, dD, dbias.sum((1, 2))


def forward(u, dt, A, B, C, D, z, dt_bias, reverse):
    """(B, L, D) of u's dtype, and the state before each chunk."""
    return scan(u, softplus_of(dt, dt_bias), A, B, C, D, z, reverse)


def backward(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse):
    """Gradients of the inputs that are there, in their order."""
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    delta = softplus_of(dt, dt_bias)
    _, *grads, dbias = scan_backward(dout, u, delta, A, B, C, D, z, states, reverse, dz)
    grads += [dz, None if dt_bias is None else dbias.to(dt_bias.dtype)]
    return [grad for grad in grads if grad is not None]
