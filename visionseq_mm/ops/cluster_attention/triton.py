# ruff: noqa: RUF005 (Triton has no starred expressions)
"""Attention inside clusters in Triton: flash attention that reads tokens through their order.

A program has a tile of queries, or of keys, of one cluster, and walks along the cluster's other
side. Rows of q, k, v and dout are read where they are, by `idx`, and results are written there:
no sorted copies and no inverse order. With P = exp(q kᵀ / √Dh − sums), of one cluster:

    out = P v + lepe        dS = P ⊙ (dout vᵀ − δ) / √Dh        δ = dout · attended
    dq = dS k               dk = dSᵀ q                          dv = Pᵀ dout

The kernel of dk and dv computes the transposed weights as such, from k qᵀ and v doutᵀ. All sums
are in a fixed order: the same bits every time.

A program's tile is in parts, one after the other on every tile that it walks past: these are read
once for all parts, and registers hold the scores of one part at a time.

B batch, L tokens, H heads, Dh channels of a head, K clusters, N = B·H sequences. Exponents are in
units of log 2. A matrix is a pointer to a sequence's first token, and the stride of its tokens.
"""

import torch
import triton
import triton.language as tl

from visionseq_mm.ops.cluster_attention.triton_partition import partition
from visionseq_mm.ops.triton_common import LN2, LOG2E, load, store, unit_stride

__all__ = ['backward', 'forward', 'partition']

# Parts of a program's tile, rows of a part, rows of a tile that it walks past, warps, stages and
# registers of a thread (None: as many as it takes), by the channels of a head.
FORWARD = {
    16: (2, 64, 128, 4, 3, 168),
    32: (2, 64, 128, 4, 3, 168),
    64: (2, 64, 128, 4, 3, None),
    128: (1, 128, 64, 8, 3, None),
}
QUERIES = {
    16: (2, 64, 64, 4, 3, None),
    32: (2, 64, 64, 4, 3, None),
    64: (2, 64, 64, 4, 3, None),
    128: (1, 128, 64, 8, 2, None),
}
KEYS = {
    16: (2, 64, 64, 4, 3, 168),
    32: (2, 64, 64, 4, 3, None),
    64: (1, 128, 64, 8, 3, None),
    128: (1, 128, 32, 8, 2, None),
}
FLOAT32 = {
    16: (1, 64, 64, 4, 2, None),
    32: (1, 64, 64, 4, 2, None),
    64: (1, 32, 32, 4, 2, None),
    128: (1, 16, 32, 8, 2, None),
}

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
FAR = 2**31  # elements of a sequence that offsets of 32 bits do not reach; others cost more


@triton.jit
def _cluster(counts_ptr, tiles, L, H, K, TILE: tl.constexpr):
    """A program's sequence, the first place and the size of its cluster, and its tile's first row.

    A cluster's tiles follow one another, for they read the same.
    """
    cluster = tl.program_id(0) // tiles
    n = cluster // K
    count = L
    if counts_ptr is not None:
        count = tl.load(counts_ptr + n // H)
    start = cluster % K * count // K
    end = (cluster % K + 1) * count // K
    return n, n.to(tl.int64) * L + start, end - start, tl.program_id(0) % tiles * TILE


@triton.jit
def _matrix(ptr, n, H, batch, token, head):
    return ptr + (n // H).to(tl.int64) * batch + (n % H).to(tl.int64) * head, token


@triton.jit
def _tokens(idx, first, size, TILE: tl.constexpr, WHOLE: tl.constexpr, INDEX: tl.constexpr):
    """A tile's tokens, and which of its rows there are."""
    row = first + tl.arange(0, TILE)
    inside = row < size
    if WHOLE:
        inside = tl.full([TILE], True, tl.int1)
    return tl.load(idx + row, mask=inside, other=0).to(INDEX), inside


@triton.jit
def _places(matrix, tokens, D: tl.constexpr):
    return matrix[0] + tokens[:, None] * matrix[1] + tl.arange(0, D)[None, :]


@triton.jit
def _gather(matrix, tokens, inside, Dh: tl.constexpr, D: tl.constexpr):
    """(·, D), 0 beyond Dh and in rows that there are not."""
    mask = inside[:, None] & (tl.arange(0, D) < Dh)[None, :]
    return tl.load(_places(matrix, tokens, D), mask=mask, other=0)


@triton.jit
def _scatter(matrix, tokens, inside, x, Dh: tl.constexpr):
    D: tl.constexpr = x.shape[1]
    store(_places(matrix, tokens, D), x, inside[:, None] & (tl.arange(0, D) < Dh)[None, :])


@triton.jit
def _add_keys(
    parts,
    k,
    v,
    idx,
    first,
    size,
    scale,
    states,
    Dh: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The online softmax after a tile of keys more: maxima, sums and outputs of the parts."""
    D: tl.constexpr = parts[0].shape[1]
    tokens, inside = _tokens(idx, first, size, TILE, WHOLE, INDEX)
    keys, values = _gather(k, tokens, inside, Dh, D), _gather(v, tokens, inside, Dh, D)
    after = ()
    for p in tl.static_range(len(parts)):
        before, total, out = states[p]
        scores = tl.dot(parts[p], tl.trans(keys), input_precision='ieee')
        if not WHOLE:
            scores = tl.where(inside[None, :], scores, -float('inf'))
        top = tl.maximum(before, tl.max(scores, 1) * scale)
        shrink = tl.exp2(before - top)
        P = tl.exp2(scores * scale - top[:, None])
        total = total * shrink + tl.sum(P, 1)
        out = tl.dot(P.to(values.dtype), values, out * shrink[:, None], input_precision='ieee')
        after = after + ((top, total, out),)
    return after


@triton.jit
def _forward_kernel(
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
    lepe_ptr,
    lepe_batch,
    lepe_token,
    lepe_head,
    out_ptr,
    attended_ptr,
    out_batch,
    out_token,
    out_head,
    sums_ptr,
    idx_ptr,
    counts_ptr,
    tiles,
    L,
    H,
    K,
    scale,
    Dh: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The output of a tile of queries, and what of attended and sums is there to be kept."""
    n, start, size, first = _cluster(counts_ptr, tiles, L, H, K, PARTS * ROWS)
    if first >= size:
        return
    idx = idx_ptr + start
    q = _matrix(q_ptr, n, H, q_batch, q_token, q_head)
    k = _matrix(k_ptr, n, H, k_batch, k_token, k_head)
    v = _matrix(v_ptr, n, H, v_batch, v_token, v_head)
    parts, states = (), ()
    for p in tl.static_range(PARTS):
        tokens, inside = _tokens(idx, first + p * ROWS, size, ROWS, False, INDEX)
        parts = parts + (_gather(q, tokens, inside, Dh, D),)
        # Finite, for the first tile's scores may all be -inf.
        top, total = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
        states = states + ((top, total, tl.zeros([ROWS, D], tl.float32)),)
    whole = size // COLUMNS * COLUMNS
    for j in range(0, whole, COLUMNS):
        states = _add_keys(parts, k, v, idx, j, size, scale, states, Dh, COLUMNS, True, INDEX)
    for j in tl.range(whole, size, COLUMNS // 2, num_stages=1):
        states = _add_keys(
            parts, k, v, idx, j, size, scale, states, Dh, COLUMNS // 2, False, INDEX
        )
    for p in tl.static_range(PARTS):
        tokens, inside = _tokens(idx, first + p * ROWS, size, ROWS, False, INDEX)
        top, total, out = states[p]
        out /= total[:, None]
        if sums_ptr is not None:
            sums = (top + tl.log2(total)) * LN2
            tl.store(sums_ptr + n.to(tl.int64) * L + tokens, sums, mask=inside)
        if attended_ptr is not None:
            attended = _matrix(attended_ptr, n, H, out_batch, out_token, out_head)
            _scatter(attended, tokens, inside, out, Dh)
        if lepe_ptr is not None:
            lepe = _matrix(lepe_ptr, n, H, lepe_batch, lepe_token, lepe_head)
            out += _gather(lepe, tokens, inside, Dh, D)
        _scatter(_matrix(out_ptr, n, H, out_batch, out_token, out_head), tokens, inside, out, Dh)


@triton.jit
def _add_to_dq(
    parts,
    k,
    v,
    idx,
    first,
    size,
    scale,
    dqs,
    Dh: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """dS k √Dh of the parts with a tile of keys more."""
    D: tl.constexpr = dqs[0].shape[1]
    tokens, inside = _tokens(idx, first, size, TILE, WHOLE, INDEX)
    keys, values = _gather(k, tokens, inside, Dh, D), _gather(v, tokens, inside, Dh, D)
    after = ()
    for p in tl.static_range(len(parts)):
        q, dout, sums, delta = parts[p]
        scores = tl.dot(q, tl.trans(keys), input_precision='ieee')
        dP = tl.dot(dout, tl.trans(values), input_precision='ieee')
        P = tl.exp2(scores * scale - sums[:, None])
        if not WHOLE:
            P = tl.where(inside[None, :], P, 0)
        dS = P * (dP - delta[:, None])
        after = after + (tl.dot(dS.to(keys.dtype), keys, dqs[p], input_precision='ieee'),)
    return after


@triton.jit
def _queries_kernel(
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
    dout_ptr,
    dout_batch,
    dout_token,
    dout_head,
    attended_ptr,
    dq_ptr,
    grad_batch,
    grad_token,
    grad_head,
    sums_ptr,
    pairs_ptr,
    idx_ptr,
    counts_ptr,
    tiles,
    L,
    H,
    K,
    scale,
    Dh: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """dq of a tile of queries, and for the other kernel pairs (N, L, 2) of sums and δ by place."""
    n, start, size, first = _cluster(counts_ptr, tiles, L, H, K, PARTS * ROWS)
    if first >= size:
        return
    idx = idx_ptr + start
    q = _matrix(q_ptr, n, H, q_batch, q_token, q_head)
    k = _matrix(k_ptr, n, H, k_batch, k_token, k_head)
    v = _matrix(v_ptr, n, H, v_batch, v_token, v_head)
    dout = _matrix(dout_ptr, n, H, dout_batch, dout_token, dout_head)
    attended = _matrix(attended_ptr, n, H, grad_batch, grad_token, grad_head)
    parts, dqs = (), ()
    for p in tl.static_range(PARTS):
        tokens, inside = _tokens(idx, first + p * ROWS, size, ROWS, False, INDEX)
        dy = _gather(dout, tokens, inside, Dh, D)
        delta = tl.sum(dy.to(tl.float32) * _gather(attended, tokens, inside, Dh, D), 1)
        sums = load(sums_ptr + n.to(tl.int64) * L + tokens, inside) * LOG2E
        row = first + p * ROWS + tl.arange(0, ROWS)
        tl.store(pairs_ptr + 2 * (start + row), sums, mask=row < size)
        tl.store(pairs_ptr + 2 * (start + row) + 1, delta, mask=row < size)
        parts = parts + ((_gather(q, tokens, inside, Dh, D), dy, sums, delta),)
        dqs = dqs + (tl.zeros([ROWS, D], tl.float32),)
    whole = size // COLUMNS * COLUMNS
    for j in range(0, whole, COLUMNS):
        dqs = _add_to_dq(parts, k, v, idx, j, size, scale, dqs, Dh, COLUMNS, True, INDEX)
    for j in tl.range(whole, size, COLUMNS // 2, num_stages=1):
        dqs = _add_to_dq(parts, k, v, idx, j, size, scale, dqs, Dh, COLUMNS // 2, False, INDEX)
    dq = _matrix(dq_ptr, n, H, grad_batch, grad_token, grad_head)
    for p in tl.static_range(PARTS):
        tokens, inside = _tokens(idx, first + p * ROWS, size, ROWS, False, INDEX)
        _scatter(dq, tokens, inside, dqs[p] * (scale * LN2), Dh)


@triton.jit
def _add_queries(
    parts,
    q,
    dout,
    pairs,
    idx,
    first,
    size,
    scale,
    grads,
    Dh: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """dSᵀ q √Dh and Pᵀ dout of the parts with a tile of queries more."""
    D: tl.constexpr = parts[0][0].shape[1]
    tokens, inside = _tokens(idx, first, size, TILE, WHOLE, INDEX)
    queries, dy = _gather(q, tokens, inside, Dh, D), _gather(dout, tokens, inside, Dh, D)
    # One load of both: of a tensor with fewer elements than threads, Triton loads in the layout of
    # the scores, element by element.
    either = tl.arange(0, 2 * TILE)
    if WHOLE:
        both = tl.load(pairs + 2 * first + either)
    else:
        absent = tl.where(either % 2 == 0, float('inf'), 0.0)
        both = tl.load(
            pairs + 2 * first + either, mask=2 * first + either < 2 * size, other=absent
        )
    sums, delta = tl.split(tl.reshape(both, [TILE, 2]))
    after = ()
    for p in tl.static_range(len(parts)):
        k, v = parts[p]
        dk, dv = grads[p]
        scores = tl.dot(k, tl.trans(queries), input_precision='ieee')
        dP = tl.dot(v, tl.trans(dy), input_precision='ieee')
        P = tl.exp2(scores * scale - sums[None, :])
        dS = P * (dP - delta[None, :])
        dv = tl.dot(P.to(dy.dtype), dy, dv, input_precision='ieee')
        dk = tl.dot(dS.to(queries.dtype), queries, dk, input_precision='ieee')
        after = after + ((dk, dv),)
    return after


@triton.jit
def _keys_kernel(
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
    dout_ptr,
    dout_batch,
    dout_token,
    dout_head,
    dk_ptr,
    dv_ptr,
    grad_batch,
    grad_token,
    grad_head,
    pairs_ptr,
    idx_ptr,
    counts_ptr,
    tiles,
    L,
    H,
    K,
    scale,
    Dh: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """dk and dv of a tile of keys."""
    n, start, size, first = _cluster(counts_ptr, tiles, L, H, K, PARTS * ROWS)
    if first >= size:
        return
    idx, pairs = idx_ptr + start, pairs_ptr + 2 * start
    q = _matrix(q_ptr, n, H, q_batch, q_token, q_head)
    k = _matrix(k_ptr, n, H, k_batch, k_token, k_head)
    v = _matrix(v_ptr, n, H, v_batch, v_token, v_head)
    dout = _matrix(dout_ptr, n, H, dout_batch, dout_token, dout_head)
    parts, grads = (), ()
    for p in tl.static_range(PARTS):
        tokens, inside = _tokens(idx, first + p * ROWS, size, ROWS, False, INDEX)
        parts = parts + ((_gather(k, tokens, inside, Dh, D), _gather(v, tokens, inside, Dh, D)),)
        grads = grads + ((tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)),)
    whole = size // COLUMNS * COLUMNS
    for i in range(0, whole, COLUMNS):
        grads = _add_queries(
            parts, q, dout, pairs, idx, i, size, scale, grads, Dh, COLUMNS, True, INDEX
        )
    for i in tl.range(whole, size, COLUMNS // 2, num_stages=1):
        grads = _add_queries(
            parts, q, dout, pairs, idx, i, size, scale, grads, Dh, COLUMNS // 2, False, INDEX
        )
    dk_matrix = _matrix(dk_ptr, n, H, grad_batch, grad_token, grad_head)
    dv_matrix = _matrix(dv_ptr, n, H, grad_batch, grad_token, grad_head)
    for p in tl.static_range(PARTS):
        tokens, inside = _tokens(idx, first + p * ROWS, size, ROWS, False, INDEX)
        dk, dv = grads[p]
        _scatter(dk_matrix, tokens, inside, dk * (scale * LN2), Dh)
        _scatter(dv_matrix, tokens, inside, dv, Dh)


class _Call:
    """What the launches of one call share."""

    def __init__(self, idx, num_clusters, valid, *inputs):
        self.idx, self.num_clusters, self.valid = idx, num_clusters, valid
        self.counts = None if valid is None else valid.sum(1, dtype=torch.int32)
        self.Dh, self.dtype = inputs[0].shape[-1], inputs[0].dtype
        present = [x for x in inputs if x is not None]
        # Outputs are dense, and inputs may be wider, or narrower if their heads are apart.
        far = any(max(x[0].numel(), x.shape[1] * x.stride(1)) >= FAR for x in present)
        self.index = tl.int64 if far else tl.int32
        self.inputs = [arg for x in inputs for arg in self.walk(x)]

    @staticmethod
    def walk(x):
        """A (B, L, H, Dh) and its strides."""
        return (None, 0, 0, 0) if x is None else (x, *x.stride()[:3])

    def new(self, x, dtype=None):
        """Contiguous, of the shape of x; zeros where invalid tokens are not written."""
        make = x.new_empty if self.valid is None else x.new_zeros
        return make(x.shape, dtype=dtype)

    def launch(self, kernel, sizes, *outputs):
        B, H, L = self.idx.shape
        K, D = self.num_clusters, max(16, triton.next_power_of_2(self.Dh))
        sizes = FLOAT32 if self.dtype == torch.float32 else sizes
        parts, rows, columns, warps, stages, registers = sizes[D]
        tiles = triton.cdiv(triton.cdiv(L, K), parts * rows)
        with torch.cuda.device_of(self.idx):
            kernel[(B * H * K * tiles,)](
                *self.inputs,
                *outputs,
                self.idx,
                self.counts,
                tiles,
                L,
                H,
                K,
                LOG2E.value * self.Dh**-0.5,
                Dh=self.Dh,
                D=D,
                PARTS=parts,
                ROWS=rows,
                COLUMNS=columns,
                INDEX=self.index,
                num_warps=warps,
                num_stages=stages,
                maxnreg=registers,
            )


def forward(q, k, v, idx, num_clusters, valid, lepe, keep):
    """The output, what was attended to (B, L, H, Dh), and the logarithms of the sums, (B, H, L) by
    token, or None where they are not to be kept."""
    call = _Call(idx, num_clusters, valid, *(unit_stride(x) for x in (q, k, v, lepe)))
    out = call.new(q)
    attended = call.new(q) if keep and lepe is not None else None
    sums = call.new(idx, torch.float32) if keep else None
    call.launch(_forward_kernel, FORWARD, out, attended, *out.stride()[:3], sums)
    return out, out if attended is None else attended, sums


def backward(dout, q, k, v, idx, attended, sums, num_clusters, valid):
    """Gradients of q, k and v."""
    call = _Call(idx, num_clusters, valid, *(unit_stride(x) for x in (q, k, v, dout)))
    dq, dk, dv = (call.new(x) for x in (q, k, v))
    strides, pairs = dq.stride()[:3], sums.new_empty((*sums.shape, 2))
    call.launch(_queries_kernel, QUERIES, attended, dq, *strides, sums, pairs)
    call.launch(_keys_kernel, KEYS, dk, dv, *strides, pairs)
    return [dq, dk, dv]
