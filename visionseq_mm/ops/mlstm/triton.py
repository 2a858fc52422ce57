# ruff: noqa: RUF005 (Triton has no starred expressions)
"""The mLSTM cell in Triton: attention within chunks, and a matrix state before each.

As in `reference`, without forget gates: a token's gate is a_j = i_j − F_j, a row's stabiliser
g_i = max_{j≤i} a_j, and the weight of token j in row i is exp(a_j − g_i) ≤ 1. Here every chunk
counts F from its own first token, so that nothing grows with the sequence. What goes from chunk
to chunk is the stabiliser M = m of the row before, with top = max_j a_j of the chunk's own tokens
and F that of its last:

    g_i = max(M, max_{j≤i} a_j)        M ← F + max(M, top)

All states are found at once: what each chunk adds to a state of zeros, stabilised by its top,

    own = Σ_j exp(a_j − top) k_jᵀ [v_j, 1]
    state ← exp(M − G) state + exp(top − G) own        G = max(M, top)

then one elementwise pass over the chunks puts the state that enters a chunk in the place of its
own, and then all rows follow at once. With r_i = 1 / (n_i + eps), δ_i = dh_i·h_i and e_i that of
`reference`'s dsum = r e, output and gradients are one and the same attention of rows x to columns
y with values z, but for a factor 1/√Dh (and r_i of h):

            x     y     z     weight of a column               from the state
    h_i     q_i   k_j   v_j   exp(a_j − g_i) x·y               exp(M − g_i) x state
    dq_i    dh_i  v_j   k_j   exp(a_j − g_i) r_i (x·y + e_i)   exp(M − g_i) r_i [x, e_i] stateᵀ
    dk_j    v_j   dh_i  q_i   exp(a_j − g_i) r_i (x·y + e_i)   exp(a_j − G) [x, 1] dstateᵀ
    dv_j    k_j   q_i   dh_i  exp(a_j − g_i) r_i x·y           exp(a_j − G) x dstate

    dstate ← exp(M − G) dstate + Σ_i exp(M − g_i) r_i q_iᵀ [dh_i, e_i]        backwards

With E_ij the gradient of a weight's logarithm, that of log σ(f_t) is the sum of E over all pairs
with this gate between them, i ≥ t > j. At the end of a chunk it is state · dstate, and from there
q·dq and k·dk, both without the diagonal, lead to the tokens of the chunk: the sums are short. The
weights of dq and dk are rounded alike, so that a pair outside of the sum leaves it as it came.

Gates are float64, in units of log 2, and their differences float32. Tiles of weights take them in
two parts of float32, so that these differences are exact. All sums are in a fixed order: the same
bits every time.

B batch, S tokens, H heads, N = B·H sequences, Dh channels of a head, T tokens of a chunk. A
direction is the sign of the tokens' strides; what the kernels keep is in the order of the scan:

    gates (N, chunks, 3, T)      a, its maximum up to here in the chunk, F
    columns (N, chunks, 2, T)    a in two parts
    marks (N, chunks, 3)         F and top of the chunk, M
    rows (N, chunks, 5, T)       r, e, dm as in `reference`, −g in two parts, the latter times r
    states (N, chunks, Dh, Dh)   in the inputs' type; those of the ones are the `norms`
    sums (N, chunks, ·, 3, T)    Σ_j E_tj, Σ_i E_it without the diagonal, and the latter with it
"""

import torch
import triton
import triton.language as tl

from visionseq_mm.ops.triton_common import LOG2E, load, sigmoid, softplus, store, unit_stride

# States weigh Dh / T of the keys that they hold: wide heads take long chunks.
CHUNK, CHUNK_OF_WIDE = 128, 256
WIDE = 128
# Rows and columns of a tile of weights; wide heads take more rows and twice the warps. Float32
# does without tensor cores and takes less, for its registers.
TILE, ROWS_OF_WIDE, TILE_OF_FLOAT32 = 64, 128, 32
# Channels of a block, or half where one or three halves do.
BLOCK = 64
BLOCKS = 3  # blocks of a program's values: with a tile's rows, accumulators of 96 registers
AHEAD = 8  # chunks whose states are under way while the carry passes one after the other
CARRIED = 1024  # elements of a state, or of its normaliser, that a program carries
# The least top of a chunk, for one whose gates i are all −∞: finite, so that its own state is 0.
LEAST = tl.constexpr(-1e300)


@triton.jit
def _sequence(ptr, n, H, batch, token, head, first):
    """Sequence n of a (B, S, H, ·) from token `first` on: a matrix and its strides."""
    n = n.to(tl.int64)
    return ptr + n // H * batch + n % H * head + first.to(tl.int64) * token, token, 1


@triton.jit
def _transposed(matrix):
    return matrix[0], matrix[2], matrix[1]


@triton.jit
def _tile(matrix, i, i_end, j, j_end):
    """Elements (i, j), 0 beyond the ends."""
    mask = (i < i_end)[:, None] & (j < j_end)[None, :]
    places = matrix[0] + i[:, None] * matrix[1] + j[None, :] * matrix[2]
    return tl.load(places, mask=mask, other=0)


@triton.jit
def _greater(x, y):
    """The maximum, NaN if one is."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def _exp2(x):
    """In float32, of a difference that is float64."""
    return tl.exp2(x.to(tl.float32))


@triton.jit
def _parts(x):
    """2^x as 2^high · factor in float32; differences of `high` are exact where they are small."""
    high = x.to(tl.float32)
    return high, _exp2(tl.where(x == high, 0, x - high))


@triton.jit
def _gates_kernel(
    i_ptr,
    i_batch,
    i_token,
    i_head,
    f_ptr,
    f_batch,
    f_token,
    f_head,
    gates_ptr,
    columns_ptr,
    marks_ptr,
    S,
    H,
    T: tl.constexpr,
):
    """a, its running maximum and F of a chunk's tokens; F and top of the chunk."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    at = n.to(tl.int64) * tl.num_programs(0) + chunk
    t = tl.arange(0, T)
    mask = chunk * T + t < S
    i_ptr = _sequence(i_ptr, n, H, i_batch, i_token, i_head, chunk * T)[0]
    f_ptr = _sequence(f_ptr, n, H, f_batch, f_token, f_head, chunk * T)[0]
    i, f = load(i_ptr + t * i_token, mask), load(f_ptr + t * f_token, mask)
    F = tl.cumsum(tl.where(mask, -softplus(-f), 0).to(tl.float64) * LOG2E, 0)
    a = tl.where(mask, i.to(tl.float64) * LOG2E - F, -float('inf'))
    top = tl.associative_scan(a, 0, _greater)
    gates_ptr += at * 3 * T + t
    tl.store(gates_ptr, a)
    tl.store(gates_ptr + T, top)
    tl.store(gates_ptr + 2 * T, F)
    columns_ptr += at * 2 * T + t
    high, factor = _parts(a)
    tl.store(columns_ptr, high)
    tl.store(columns_ptr + T, factor)
    last = t == T - 1
    tl.store(marks_ptr + at * 3, tl.sum(tl.where(last, F, 0), 0))
    tl.store(marks_ptr + at * 3 + 1, _greater(tl.sum(tl.where(last, top, 0), 0), LEAST))


@triton.jit
def _stabilisers(gates, M, t, T: tl.constexpr):
    return _greater(tl.load(gates + T + t), M)


@triton.jit
def _zeros(ROWS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    blocks = ()
    for _ in tl.static_range(BLOCKS):
        blocks = blocks + (tl.zeros([ROWS, BLOCK], tl.float32),)
    return blocks


@triton.jit
def _tiles(matrix, i, i_end, j, j_end, BLOCKS: tl.constexpr):
    """Blocks of columns, j those of the first one."""
    blocks = ()
    for c in tl.static_range(BLOCKS):
        blocks = blocks + (_tile(matrix, i, i_end, j + c * j.shape[0], j_end),)
    return blocks


@triton.jit
def _add_products(x, columns, sums, BLOCKS: tl.constexpr):
    blocks = ()
    for c in tl.static_range(BLOCKS):
        blocks = blocks + (tl.dot(x, columns[c], sums[c], input_precision='ieee'),)
    return blocks


@triton.jit
def _states_kernel(
    x_ptr,
    x_batch,
    x_token,
    x_head,
    z_ptr,
    z_batch,
    z_token,
    z_head,
    gates_ptr,
    marks_ptr,
    rows_ptr,
    states_ptr,
    norms_ptr,
    S,
    H,
    chunks,
    BACKWARD: tl.constexpr,
    Dh: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A chunk's own state Σ_j w_j x_jᵀ [z_j, e_j]: of k, v and 1, or backwards of q, dh and e.

    Not of the last chunk, or backwards the first, from where it goes nowhere.
    """
    split = tl.program_id(0) % SPLITS
    chunk, n = tl.program_id(1) + BACKWARD, tl.program_id(2)
    at = n.to(tl.int64) * chunks + chunk
    end = tl.minimum(T, S - chunk * T)
    x = _transposed(_sequence(x_ptr, n, H, x_batch, x_token, x_head, chunk * T))
    z = _sequence(z_ptr, n, H, z_batch, z_token, z_head, chunk * T)
    gates, marks = gates_ptr + at * 3 * T, marks_ptr + at * 3
    d = tl.program_id(0) // SPLITS * ROWS + tl.arange(0, ROWS)
    column = split * BLOCKS * BLOCK + tl.arange(0, BLOCK)
    state = _zeros(ROWS, BLOCK, BLOCKS)
    norm = tl.zeros([ROWS], tl.float32)
    for first in range(0, end, TILE):
        t = first + tl.arange(0, TILE)
        x_tile = _tile(x, d, Dh, t, end)
        values = _tiles(z, t, end, column, Dh, BLOCKS)
        if BACKWARD:
            M = tl.load(marks + 2)
            rows = rows_ptr + at * 5 * T + t
            weight = _exp2(M - _stabilisers(gates, M, t, T)) * tl.load(rows)
            weighted = x_tile * weight[None, :]
            norm += tl.sum(weighted * tl.load(rows + T)[None, :], 1)
        else:
            weighted = x_tile * _exp2(tl.load(gates + t) - tl.load(marks + 1))[None, :]
            norm += tl.sum(weighted, 1)
        state = _add_products(weighted.to(x_tile.dtype), values, state, BLOCKS)
    states_ptr += at * Dh * Dh + d[:, None] * Dh
    for c in tl.static_range(BLOCKS):
        j = column + c * BLOCK
        store(states_ptr + j[None, :], state[c], (d < Dh)[:, None] & (j < Dh)[None, :])
    if split == 0:
        tl.store(norms_ptr + at * Dh + d, norm, mask=d < Dh)


@triton.jit
def _carry(
    own_ptr,
    states_ptr,
    marks_ptr,
    borders_ptr,
    block,
    chunks,
    size,
    BACKWARD: tl.constexpr,
    KEEP: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of what a sequence carries."""
    n = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    mask = d < size
    stride = tl.full([], size, tl.int64)
    own_ptr += n * chunks * size + d
    marks_ptr += n * chunks * 3
    if BACKWARD:
        states_ptr += n * chunks * size + d
        borders_ptr += n * chunks * blocks + tl.program_id(0)
    state = tl.zeros([BLOCK], tl.float32)
    M = tl.full([], -float('inf'), tl.float64)
    for start in range(0, chunks, AHEAD):
        own, tops, sums, stabilisers, entering = (), (), (), (), ()
        for c in tl.static_range(AHEAD):
            inside = start + c < chunks
            at = chunks - 1 - start - c if BACKWARD else start + c
            own = own + (load(own_ptr + at * stride, mask & (start + c + 1 < chunks)),)
            tops = tops + (tl.load(marks_ptr + at * 3 + 1, mask=inside, other=0),)
            if BACKWARD:
                stabilisers = stabilisers + (
                    tl.load(marks_ptr + at * 3 + 2, mask=inside, other=0),
                )
                next_one = mask & inside & (at + 1 < chunks)
                entering = entering + (load(states_ptr + (at + 1) * stride, next_one),)
            else:
                sums = sums + (tl.load(marks_ptr + at * 3, mask=inside, other=0),)
        tl.debug_barrier()  # a thread may store what another loads
        for c in tl.static_range(AHEAD):
            inside = start + c < chunks
            at = chunks - 1 - start - c if BACKWARD else start + c
            store(own_ptr + at * stride, state, mask & inside)
            if BACKWARD:
                tl.store(borders_ptr + at * blocks, tl.sum(state * entering[c], 0), mask=inside)
                M = stabilisers[c]
                state = state * _exp2(M - _greater(M, tops[c])) + own[c]
            else:
                if KEEP:
                    tl.store(marks_ptr + at * 3 + 2, M, mask=inside)
                G = _greater(M, tops[c])
                state = state * _exp2(M - G) + own[c] * _exp2(tops[c] - G)
                M = G + sums[c]


@triton.jit
def _carry_kernel(
    own_ptr,
    own_norms_ptr,
    states_ptr,
    norms_ptr,
    marks_ptr,
    borders_ptr,
    chunks,
    BACKWARD: tl.constexpr,
    Dh: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In place, a chunk's own state becomes the one that enters it, and M is found.

    Backwards, the gradient of the one that leaves it; `borders` are their products.
    """
    block = tl.program_id(0)
    matrices: tl.constexpr = (Dh * Dh + BLOCK - 1) // BLOCK
    if block < matrices:
        _carry(
            own_ptr,
            states_ptr,
            marks_ptr,
            borders_ptr,
            block,
            chunks,
            Dh * Dh,
            BACKWARD,
            False,
            AHEAD,
            BLOCK,
        )
    else:
        _carry(
            own_norms_ptr,
            norms_ptr,
            marks_ptr,
            borders_ptr,
            block - matrices,
            chunks,
            Dh,
            BACKWARD,
            block == matrices,
            AHEAD,
            BLOCK,
        )


@triton.jit
def _attend(
    x,
    y,
    z,
    state,
    norm,
    depth,
    here,
    OF: tl.constexpr,
    SIZES: tl.constexpr,
):
    """A tile of rows of one of the four attentions, as blocks of columns, and h's sums of weights.

    dq and dk leave out the diagonal. `depth` is Dh, or 0 where the state is 0.
    """
    gates, columns, rows, M, G, first, end, column = here
    Dh: tl.constexpr = SIZES[0]
    T: tl.constexpr = SIZES[1]
    ROWS: tl.constexpr = SIZES[2]
    TILE: tl.constexpr = SIZES[3]
    BLOCKS: tl.constexpr = SIZES[4]
    BLOCK: tl.constexpr = column.shape[0]
    LATER: tl.constexpr = OF == 'dk' or OF == 'dv'
    d = tl.arange(0, BLOCK)
    i = first + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    out = _zeros(ROWS, BLOCK, BLOCKS)

    for start in range(0, depth, BLOCK):
        x_tile = _tile(x, i, end, start + d, Dh)
        if OF == 'h':
            total += tl.sum(x_tile * load(norm + start + d, start + d < Dh)[None, :], 1)
        blocks = _tiles(state, start + d, Dh, column, Dh, BLOCKS)
        out = _add_products(x_tile, blocks, out, BLOCKS)
    if LATER:
        gate = tl.load(gates + i)
        across = _exp2(gate - G)
    else:
        gate = -_stabilisers(gates, M, i, T)
        across = _exp2(gate + M)
    high, factor = _parts(gate)
    if OF == 'dq':
        r, bias = tl.load(rows + i), tl.load(rows + T + i)
        across *= r
        factor *= r
    total *= across
    scaled = ()
    for c in tl.static_range(BLOCKS):
        block = out[c]
        if OF == 'dq' or OF == 'dk':
            channel = column + c * BLOCK
            ones = load(norm + channel, channel < Dh)[None, :]
            block += bias[:, None] * ones if OF == 'dq' else ones
        scaled = scaled + (block * across[:, None],)
    out = scaled

    last = end if LATER else tl.minimum(end, first + ROWS)
    for first_j in range(first if LATER else 0, last, TILE):
        j = first_j + tl.arange(0, TILE)
        values = _tiles(z, j, end, column, Dh, BLOCKS)
        scores = tl.zeros([ROWS, TILE], tl.float32)
        for start in range(0, Dh, BLOCK):
            x_tile = _tile(x, i, end, start + d, Dh)
            y_tile = _tile(_transposed(y), start + d, Dh, j, end)
            scores = tl.dot(x_tile, y_tile, scores, input_precision='ieee')
        if OF == 'dq':
            scores += bias[:, None]
        elif OF == 'dk':
            scores += tl.load(rows + T + j)[None, :]
        gates_j = (rows + 3 * T if LATER else columns) + j
        scores *= tl.exp2(high[:, None] + tl.load(gates_j)[None, :])
        scores *= factor[:, None] * tl.load(gates_j + T)[None, :]
        if OF == 'h':
            pairs = i[:, None] >= j[None, :]
        elif OF == 'dq':
            pairs = i[:, None] > j[None, :]
        elif OF == 'dk':
            pairs = i[:, None] < j[None, :]
        else:
            pairs = i[:, None] <= j[None, :]
        weights = tl.where(pairs, scores, 0)
        if OF == 'h':
            total += tl.sum(weights, 1)
        out = _add_products(weights.to(values[0].dtype), values, out, BLOCKS)
    return out, total


@triton.jit
def _output_kernel(
    q_ptr,
    q_batch,
    q_token,
    q_head,
    k_ptr,
    k_batch,
    k_token,
    k_head,
    v_ptr,
    v_batch,
    v_token,
    v_head,
    h_ptr,
    h_batch,
    h_token,
    h_head,
    gates_ptr,
    columns_ptr,
    marks_ptr,
    states_ptr,
    norms_ptr,
    sums_ptr,
    S,
    H,
    scale,
    eps,
    Dh: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """h and the sums of C's rows."""
    split = tl.program_id(0) % SPLITS
    first = tl.program_id(0) // SPLITS * ROWS
    chunk, n = tl.program_id(1), tl.program_id(2)
    at = n.to(tl.int64) * tl.num_programs(1) + chunk
    end = tl.minimum(T, S - chunk * T)
    q = _sequence(q_ptr, n, H, q_batch, q_token, q_head, chunk * T)
    k = _sequence(k_ptr, n, H, k_batch, k_token, k_head, chunk * T)
    v = _sequence(v_ptr, n, H, v_batch, v_token, v_head, chunk * T)
    h_ptr = _sequence(h_ptr, n, H, h_batch, h_token, h_head, chunk * T)[0]
    gates = gates_ptr + at * 3 * T
    state = (states_ptr + at * Dh * Dh, Dh, 1)
    M = tl.load(marks_ptr + at * 3 + 2)
    depth = tl.where(chunk > 0, Dh, 0)
    column = split * BLOCKS * BLOCK + tl.arange(0, BLOCK)
    if first < end:
        SIZES: tl.constexpr = (Dh, T, ROWS, TILE, BLOCKS)
        here = gates, columns_ptr + at * 2 * T, gates, M, M, first, end, column
        out, total = _attend(q, k, v, state, norms_ptr + at * Dh, depth, here, 'h', SIZES)
        i = first + tl.arange(0, ROWS)
        total *= scale
        bound = _exp2(-tl.load(gates + 2 * T + i) - _stabilisers(gates, M, i, T))
        r = scale / (_greater(tl.abs(total), bound) + eps)
        for c in tl.static_range(BLOCKS):
            j = column + c * BLOCK
            mask = (i < end)[:, None] & (j < Dh)[None, :]
            store(h_ptr + i[:, None] * h_token + j[None, :], out[c] * r[:, None], mask)
        if split == 0:
            tl.store(sums_ptr + n.to(tl.int64) * S + chunk * T + i, total, mask=i < end)


@triton.jit
def _rows_kernel(
    dh_ptr,
    dh_batch,
    dh_token,
    dh_head,
    h_ptr,
    h_batch,
    h_token,
    h_head,
    gates_ptr,
    marks_ptr,
    sums_ptr,
    rows_ptr,
    heads_ptr,
    S,
    H,
    eps,
    Dh: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """r, e and dm of a chunk's rows, and Σ dm of those whose maximum is from before the chunk."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    at = n.to(tl.int64) * tl.num_programs(0) + chunk
    end = tl.minimum(T, S - chunk * T)
    dh = _sequence(dh_ptr, n, H, dh_batch, dh_token, dh_head, chunk * T)
    h = _sequence(h_ptr, n, H, h_batch, h_token, h_head, chunk * T)
    i = tl.arange(0, T)
    d = tl.arange(0, BLOCK)
    products = tl.zeros([T, BLOCK], tl.float32)
    for start in range(0, Dh, BLOCK):
        dh_tile = _tile(dh, i, end, start + d, Dh).to(tl.float32)
        products += dh_tile * _tile(h, i, end, start + d, Dh)
    delta = tl.sum(products, 1)
    gates = gates_ptr + at * 3 * T + i
    M = tl.load(marks_ptr + at * 3 + 2)
    top = tl.load(gates + T)
    g = _greater(top, M)
    bound = _exp2(-tl.load(gates + 2 * T) - g)
    total = load(sums_ptr + n.to(tl.int64) * S + chunk * T + i, i < end)
    size = tl.abs(total)
    r = tl.where(i < end, 1 / (_greater(size, bound) + eps), 0)
    dm = -eps * r * delta
    rows_ptr += at * 5 * T + i
    tl.store(rows_ptr, r)
    tl.store(rows_ptr + T, tl.where(size > bound, tl.where(total > 0, -delta, delta), 0))
    tl.store(rows_ptr + 2 * T, dm)
    high, factor = _parts(-g)
    tl.store(rows_ptr + 3 * T, high)
    tl.store(rows_ptr + 4 * T, factor * r)
    tl.store(heads_ptr + at, tl.sum(tl.where(top < M, dm, 0), 0))


@triton.jit
def _gradient(
    x,
    y,
    z,
    other,
    grad,
    state,
    norm,
    depth,
    here,
    sums,
    scale,
    OF: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Stores a tile of dq, dk or dv; of dq and dk also the sums of E, products with `other`."""
    gates, _, rows, M, _, first, end, column = here
    Dh: tl.constexpr = SIZES[0]
    T: tl.constexpr = SIZES[1]
    ROWS: tl.constexpr = SIZES[2]
    BLOCKS: tl.constexpr = SIZES[4]
    BLOCK: tl.constexpr = column.shape[0]
    i = first + tl.arange(0, ROWS)
    if OF != 'dv':
        diagonal = tl.load(rows + T + i)
        d = tl.arange(0, BLOCK)
        for start in range(0, Dh, BLOCK):
            x_tile = _tile(x, i, end, start + d, Dh).to(tl.float32)
            diagonal += tl.sum(x_tile * _tile(y, i, end, start + d, Dh), 1)
        diagonal *= (
            scale * tl.load(rows + i) * _exp2(tl.load(gates + i) - _stabilisers(gates, M, i, T))
        )
        without, whole = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    out, _ = _attend(x, y, z, state, norm, depth, here, OF, SIZES)
    for c in tl.static_range(BLOCKS):
        j = column + c * BLOCK
        block = out[c] * scale
        if OF != 'dv':
            other_tile = _tile(other, i, end, j, Dh).to(tl.float32)
            without += tl.sum(block * other_tile, 1)
            block += diagonal[:, None] * _tile(z, i, end, j, Dh)
            whole += tl.sum(block * other_tile, 1)
        places = grad[0] + i[:, None] * grad[1] + j[None, :]
        store(places, block, (i < end)[:, None] & (j < Dh)[None, :])
    if OF == 'dq':
        tl.store(sums + i, without)
    elif OF == 'dk':
        tl.store(sums + T + i, without)
        tl.store(sums + 2 * T + i, whole)


@triton.jit
def _gradients_kernel(
    dh_ptr,
    dh_batch,
    dh_token,
    dh_head,
    q_ptr,
    q_batch,
    q_token,
    q_head,
    k_ptr,
    k_batch,
    k_token,
    k_head,
    v_ptr,
    v_batch,
    v_token,
    v_head,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    grad_batch,
    grad_token,
    grad_head,
    gates_ptr,
    columns_ptr,
    marks_ptr,
    rows_ptr,
    states_ptr,
    norms_ptr,
    dstates_ptr,
    dnorms_ptr,
    sums_ptr,
    S,
    H,
    scale,
    Dh: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """dq, dk and dv, by neighbours, which share what they read."""
    of = tl.program_id(0) % 3
    split = tl.program_id(0) // 3 % SPLITS
    first = tl.program_id(0) // (3 * SPLITS) * ROWS
    chunk, n = tl.program_id(1), tl.program_id(2)
    at = n.to(tl.int64) * tl.num_programs(1) + chunk
    end = tl.minimum(T, S - chunk * T)
    dh = _sequence(dh_ptr, n, H, dh_batch, dh_token, dh_head, chunk * T)
    q = _sequence(q_ptr, n, H, q_batch, q_token, q_head, chunk * T)
    k = _sequence(k_ptr, n, H, k_batch, k_token, k_head, chunk * T)
    v = _sequence(v_ptr, n, H, v_batch, v_token, v_head, chunk * T)
    gates, rows = gates_ptr + at * 3 * T, rows_ptr + at * 5 * T
    M = tl.load(marks_ptr + at * 3 + 2)
    G = _greater(M, tl.load(marks_ptr + at * 3 + 1))
    sums = sums_ptr + (at * SPLITS + split) * 3 * T
    column = split * BLOCKS * BLOCK + tl.arange(0, BLOCK)
    SIZES: tl.constexpr = (Dh, T, ROWS, TILE, BLOCKS)
    here = gates, columns_ptr + at * 2 * T, rows, M, G, first, end, column
    before = (states_ptr + at * Dh * Dh, 1, Dh)
    after = (dstates_ptr + at * Dh * Dh, 1, Dh)
    if first < end:
        if of == 0:
            dq = _sequence(dq_ptr, n, H, grad_batch, grad_token, grad_head, chunk * T)
            norm, depth = norms_ptr + at * Dh, tl.where(chunk > 0, Dh, 0)
            _gradient(dh, v, k, q, dq, before, norm, depth, here, sums, scale, 'dq', SIZES)
        else:
            norm = dnorms_ptr + at * Dh
            depth = tl.where(chunk + 1 < tl.num_programs(1), Dh, 0)
            if of == 1:
                dk = _sequence(dk_ptr, n, H, grad_batch, grad_token, grad_head, chunk * T)
                _gradient(v, dh, q, k, dk, after, norm, depth, here, sums, scale, 'dk', SIZES)
            else:
                dv = _sequence(dv_ptr, n, H, grad_batch, grad_token, grad_head, chunk * T)
                after = _transposed(after)
                _gradient(k, q, dh, v, dv, after, norm, depth, here, sums, scale, 'dv', SIZES)


@triton.jit
def _add_run(x, x_new, y, y_new):
    """Sums that start anew where a run does."""
    return tl.where(y_new > 0, y, x + y), tl.maximum(x_new, y_new)


@triton.jit
def _gate_gradients_kernel(
    f_ptr,
    f_batch,
    f_token,
    f_head,
    di_ptr,
    df_ptr,
    grad_batch,
    grad_token,
    grad_head,
    gates_ptr,
    marks_ptr,
    rows_ptr,
    heads_ptr,
    sums_ptr,
    borders_ptr,
    S,
    H,
    blocks,
    scale,
    SPLITS: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """di and df of a chunk, from its last token to the first.

    A maximum's gradient is Σ dm over the run of rows that share it, and goes to the token that
    set it. A forget gate after that token gets dm of the run's rows from there on.
    """
    chunk, n = tl.program_id(0), tl.program_id(1)
    chunks = tl.num_programs(0)
    at = n.to(tl.int64) * chunks + chunk
    end = tl.minimum(T, S - chunk * T)
    t = T - 1 - tl.arange(0, T)
    mask = t < end
    block = tl.arange(0, BLOCK)

    di = tl.zeros([T], tl.float32)
    dF = tl.zeros([T], tl.float64)
    sums_ptr += at * SPLITS * 3 * T + t
    for split in range(SPLITS):
        sums = sums_ptr + split * 3 * T
        dF += load(sums, mask) - load(sums + T, mask)
        di += load(sums + 2 * T, mask)
    border = tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, BLOCK):
        border += load(borders_ptr + at * blocks + start + block, start + block < blocks)
    dF = tl.cumsum(dF, 0) + scale * tl.sum(border, 0)

    gates = gates_ptr + at * 3 * T + t
    M = tl.load(marks_ptr + at * 3 + 2)
    sets = tl.load(gates) == _greater(tl.load(gates + T), M)
    inside = t + 1 < end
    after = tl.load(gates + T + 1, mask=inside, other=0)
    new = inside & (tl.load(gates + 1, mask=inside, other=0) == _greater(after, M))
    dm = tl.load(rows_ptr + at * 5 * T + 2 * T + t)
    run, met = tl.associative_scan((dm, new.to(tl.int32)), 0, _add_run)
    later = tl.zeros([BLOCK], tl.float32)
    none_yet = chunk >= 0
    for start in range(chunk + 1, chunks, BLOCK):
        c = start + block
        marks = marks_ptr + (n.to(tl.int64) * chunks + c) * 3
        there = c < chunks
        ends = tl.load(marks + 1, there, 0) >= tl.load(marks + 2, there, 0)
        ends_before = tl.cumsum(ends.to(tl.int32), 0) - ends.to(tl.int32)
        part_of_it = there & none_yet & (ends_before == 0)
        later += load(heads_ptr + n.to(tl.int64) * chunks + c, part_of_it)
        none_yet = none_yet & (tl.sum((ends & there).to(tl.int32), 0) == 0)
    run += tl.where(met > 0, 0, tl.sum(later, 0))
    di += tl.where(sets, run, 0)
    dF += tl.where(sets, 0, run)

    f_ptr = _sequence(f_ptr, n, H, f_batch, f_token, f_head, chunk * T)[0]
    df = dF.to(tl.float32) * sigmoid(-load(f_ptr + t * f_token, mask))
    di_ptr = _sequence(di_ptr, n, H, grad_batch, grad_token, grad_head, chunk * T)[0]
    df_ptr = _sequence(df_ptr, n, H, grad_batch, grad_token, grad_head, chunk * T)[0]
    store(di_ptr + t * grad_token, di, mask)
    store(df_ptr + t * grad_token, df, mask)


class _Cell:
    """What the kernels of one call share: sizes, gates and the launches."""

    def __init__(self, q, i, f, reverse):
        B, self.S, self.H, Dh = q.shape
        self.q, self.reverse = q, reverse
        self.sequences = B * self.H
        wide, half = Dh > WIDE, q.dtype != torch.float32
        T = CHUNK_OF_WIDE if wide else CHUNK
        self.chunks = triton.cdiv(self.S, T)
        self.warps = 8 if wide and half else 4
        self.of_head = dict(Dh=Dh, T=T)
        block = BLOCK if half and triton.cdiv(Dh, BLOCK // 2) not in (1, 3) else BLOCK // 2
        block = min(block, max(16, triton.next_power_of_2(Dh)))
        blocks = triton.cdiv(Dh, block)
        self.splits = triton.cdiv(blocks, BLOCKS)
        self.tiles = dict(
            self.of_head,
            ROWS=min(T, (ROWS_OF_WIDE if wide else TILE) if half else TILE_OF_FLOAT32),
            TILE=min(T, TILE if half else TILE_OF_FLOAT32),
            BLOCK=block,
            BLOCKS=triton.cdiv(blocks, self.splits),
            SPLITS=self.splits,
            num_warps=self.warps,
        )
        self.row_tiles = T // self.tiles['ROWS']
        self.gates = self.new(self.chunks, 3, T, dtype=torch.float64)
        self.columns = self.new(self.chunks, 2, T)
        self.marks = self.new(self.chunks, 3, dtype=torch.float64)
        _gates_kernel[self.chunks, self.sequences](
            *self.walk(i),
            *self.walk(f),
            self.gates,
            self.columns,
            self.marks,
            self.S,
            self.H,
            T=T,
        )

    def new(self, *shape, dtype=torch.float32):
        return self.q.new_empty((self.sequences, *shape), dtype=dtype)

    def walk(self, x):
        """A (B, S, H, ·) from its first token in the order of the scan, and its strides."""
        batch, token, head = x.stride()[:3]
        return (x[:, -1:], batch, -token, head) if self.reverse else (x, batch, token, head)

    def states(self, x, z, rows=None, entering=None):
        """The states that enter the chunks, and the normalisers'.

        With rows, their gradients where they leave, and the products with those `entering`.
        """
        Dh = self.of_head['Dh']
        states, norms = (
            self.new(self.chunks, Dh, Dh, dtype=self.q.dtype),
            self.new(self.chunks, Dh),
        )
        backward = rows is not None
        height = 2 * BLOCK if self.warps == 8 and Dh % (2 * BLOCK) == 0 else BLOCK
        height = min(height, max(16, triton.next_power_of_2(Dh)))
        grid = triton.cdiv(Dh, height) * self.splits, self.chunks - 1, self.sequences
        if self.chunks > 1:
            _states_kernel[grid](
                *self.walk(x),
                *self.walk(z),
                self.gates,
                self.marks,
                rows,
                states,
                norms,
                self.S,
                self.H,
                self.chunks,
                BACKWARD=backward,
                **dict(self.tiles, ROWS=height),
            )
        blocks = triton.cdiv(Dh * Dh, CARRIED) + triton.cdiv(Dh, CARRIED)
        borders = self.new(self.chunks, blocks) if backward else None
        _carry_kernel[blocks, self.sequences](
            states,
            norms,
            *(entering or (None, None)),
            self.marks,
            borders,
            self.chunks,
            BACKWARD=backward,
            Dh=Dh,
            AHEAD=AHEAD,
            BLOCK=CARRIED,
        )
        return (states, norms, borders) if backward else (states, norms)


def forward(q, k, v, i, f, reverse, eps):
    """h (B, S, H, Dh) and the sums Σ_j C_ij (B·H, S) in the order of the scan."""
    h = v.new_empty(v.shape)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        call = _Cell(q, i, f, reverse)
        sums = call.new(call.S)
        states = call.states(k, v)
        _output_kernel[call.row_tiles * call.splits, call.chunks, call.sequences](
            *call.walk(q),
            *call.walk(k),
            *call.walk(v),
            *call.walk(h),
            call.gates,
            call.columns,
            call.marks,
            *states,
            sums,
            call.S,
            call.H,
            q.shape[-1] ** -0.5,
            eps,
            **call.tiles,
        )
    return h, sums


def backward(dh, q, k, v, i, f, h, sums, reverse, eps):
    """Gradients of q, k, v, i and f."""
    dq, dk, dv, di, df = (x.new_empty(x.shape) for x in (q, k, v, i, f))
    dh, q, k, v = (unit_stride(x) for x in (dh, q, k, v))
    scale = q.shape[-1] ** -0.5
    with torch.cuda.device_of(q):
        call = _Cell(q, i, f, reverse)
        states = call.states(k, v)
        T, sizes = call.of_head['T'], (call.S, call.H)
        rows, heads = call.new(call.chunks, 5, T), call.new(call.chunks)
        marked = call.gates, call.marks
        _rows_kernel[call.chunks, call.sequences](
            *call.walk(dh),
            *call.walk(h),
            *marked,
            sums,
            rows,
            heads,
            *sizes,
            eps,
            **call.of_head,
            BLOCK=call.tiles['BLOCK'],
            num_warps=8,
        )
        *dstates, borders = call.states(q, dh, rows, states)
        products = call.new(call.chunks, call.splits, 3, T)
        _gradients_kernel[3 * call.row_tiles * call.splits, call.chunks, call.sequences](
            *call.walk(dh),
            *call.walk(q),
            *call.walk(k),
            *call.walk(v),
            *(call.walk(x)[0] for x in (dq, dk, dv)),
            *call.walk(dq)[1:],
            call.gates,
            call.columns,
            call.marks,
            rows,
            *states,
            *dstates,
            products,
            *sizes,
            scale,
            **call.tiles,
        )
        _gate_gradients_kernel[call.chunks, call.sequences](
            *call.walk(f),
            *(call.walk(x)[0] for x in (di, df)),
            *call.walk(di)[1:],
            *marked,
            rows,
            heads,
            products,
            borders,
            *sizes,
            borders.shape[2],
            scale,
            SPLITS=call.splits,
            T=T,
            BLOCK=128,
        )
    return [dq, dk, dv, di, df]
