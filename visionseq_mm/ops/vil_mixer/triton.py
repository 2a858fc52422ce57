# ruff: noqa: RUF005 (Triton has no starred expressions)
"""The parts of the layer in Triton: before and after the cell one kernel each, backward four.

    a = conv(x)     c = SiLU(a)     q, k = blocks(c)     v = blocks(x)     [i, f] = c Wcᵀ + x Wxᵀ

A program takes a tile of tokens through all channels, so that it can finish the gates, and so
does one of the backward to g, the gradient of a. One of the next goes with a few channels through
many tiles, for the sums over tokens that the gradient of the taps is, and to

    dx = convᵀ(g) + blocksᵀ(dv) + [di, df] Wx

The other weights get theirs from products of whole tiles. What would be lean in a single pass has
too many sums for the registers of one. Programs store their sums, torch adds them: no atomics,
the same bits every time.

B batch, L = h·w tokens, E channels in E / 4 blocks, H heads of Dh channels, T tokens of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionseq_mm.ops.mlstm.triton import backward as cell_backward
from visionseq_mm.ops.mlstm.triton import forward as cell
from visionseq_mm.ops.triton_common import dense_row, load, row, sigmoid, store, unit_stride

__all__ = ['cell', 'cell_backward', 'post', 'post_backward', 'pre', 'pre_backward']

# Of a tile. The more tokens a thread has, the less it loads weights.
TOKENS = 32
FEWER = 16  # where that many would leave processors idle
WIDTH = 8  # of the grid, and the rest is its height: a tile of little margin
CHANNELS = 64
CHANNELS_DX = 32  # few, as a thread has the sums of all taps
TOKENS_WEIGHTS = 64  # for the tensor cores
TOKENS_WIDE, CHANNELS_WIDE = 16, 32  # of float32, which has them thrice in registers

NORM_TILE = 1024  # elements
FULL = 132 * 2  # programs that keep a large GPU busy


@triton.jit
def _tile(index, h, w, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """First token of a tile of the grid, and rows, columns and distances from it of all (T)."""
    across = tl.cdiv(w, WIDTH)
    r, s = index // across * HEIGHT, index % across * WIDTH
    i = tl.arange(0, HEIGHT * WIDTH)
    return r * w + s, r + i // WIDTH, s + i % WIDTH, i // WIDTH * w + i % WIDTH


@triton.jit
def _channels(start, E: tl.constexpr, CHANNELS: tl.constexpr):
    d = start + tl.arange(0, CHANNELS)
    return d, (d < E) | (E % CHANNELS == 0)


@triton.jit
def _vector(ptr, n, start, E: tl.constexpr, CHANNELS: tl.constexpr):
    """(1, C) of row n of (·, E)."""
    d, mask = _channels(start, E, CHANNELS)
    return load(ptr + d + n * E, mask)[None, :]


@triton.jit
def _near(ptr, i, stride, r, s, h, w, down, right, d, mask_d):
    """(T, C) of the tokens that many rows and columns away, zero outside the grid."""
    r, s = r + down, s + right
    inside = (r >= 0) & (r < h) & (s >= 0) & (s < w)
    at = (down * w + right) * stride + i[:, None] * stride + d[None, :]
    return load(ptr + at, inside[:, None] & mask_d[None, :])


@triton.jit
def _before_silu(
    x_ptr,
    taps_ptr,
    conv_bias_ptr,
    i,
    x_token,
    r,
    s,
    h,
    w,
    start,
    E: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """a = conv_bias + Σ_mn taps_mn ⊙ x_{t + (m, n) − origin}, (T, C); taps (KH, KW, E)."""
    d, mask_d = _channels(start, E, CHANNELS)
    a = tl.zeros([i.shape[0], CHANNELS], tl.float32)
    a += _vector(conv_bias_ptr, 0, start, E, CHANNELS)
    for m in range(KH):
        for n in tl.static_range(KW):
            x = _near(x_ptr, i, x_token, r, s, h, w, m - TOP, n - LEFT, d, mask_d)
            a += _vector(taps_ptr, m * KW + n, start, E, CHANNELS) * x
    return a


@triton.jit
def _lanes(x):
    """(T, C) as four (T, C / 4), the n-th of them the n-th channel of each block."""
    x = tl.reshape(x, [x.shape[0], x.shape[1] // 4, 2, 2])
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _add_blocks(
    y,
    x,
    weight_ptr,
    n: tl.constexpr,
    start,
    E: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """y (T or 1, C) + each four channels of x (T, C) times their n-th matrix.

    Of weight (·, 4, 4, E / 4), [out, in] of each.
    """
    x, y = _lanes(x), _lanes(y)
    z = ()
    for o in tl.static_range(4):
        z_o = y[o]
        for d in tl.static_range(4):
            at = n * 16 + (d * 4 + o if TRANSPOSED else o * 4 + d)
            z_o += _vector(weight_ptr, at, start // 4, E // 4, CHANNELS // 4) * x[d]
        z = z + (z_o,)
    z = tl.join(tl.join(z[0], z[2]), tl.join(z[1], z[3]))
    return tl.reshape(z, [z.shape[0], CHANNELS])


@triton.jit
def _pre_kernel(
    x_ptr,
    taps_ptr,
    conv_bias_ptr,
    qkv_ptr,
    qkv_bias_ptr,
    gates_c_ptr,
    gates_x_ptr,
    gates_bias_ptr,
    c_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    i_ptr,
    f_ptr,
    x_row,
    x_token,
    h,
    w,
    E: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c, q, k, v of a tile, channels after channels, and meanwhile the sums that i and f are."""
    first, r, s, i = _tile(tl.program_id(0), h, w, HEIGHT, WIDTH)
    here = (r < h) & (s < w)
    b = tl.program_id(1)
    x_ptr = row(x_ptr, b, x_row, first, x_token)
    c_ptr = dense_row(c_ptr, b, first, h * w, E)
    q_ptr = dense_row(q_ptr, b, first, h * w, E)
    k_ptr = dense_row(k_ptr, b, first, h * w, E)
    v_ptr = dense_row(v_ptr, b, first, h * w, E)
    j = tl.arange(0, GATES)
    mask_j = (j < 2 * H) | (2 * H == GATES)
    gates = tl.zeros([HEIGHT * WIDTH, GATES], tl.float32) + load(gates_bias_ptr + j, mask_j)[None]
    for start in range(0, E, CHANNELS):
        d, mask_d = _channels(start, E, CHANNELS)
        at = i[:, None] * E + d[None, :]
        mask = here[:, None] & mask_d[None, :]
        a = _before_silu(
            x_ptr,
            taps_ptr,
            conv_bias_ptr,
            i,
            x_token,
            r,
            s,
            h,
            w,
            start,
            E,
            KH,
            KW,
            TOP,
            LEFT,
            CHANNELS,
        )
        c = a * sigmoid(a)
        store(c_ptr + at, c, mask)
        q = _vector(qkv_bias_ptr, 0, start, E, CHANNELS)
        q = _add_blocks(q, c, qkv_ptr, 0, start, E, CHANNELS, False)
        store(q_ptr + at, q, mask)
        k = _vector(qkv_bias_ptr, 1, start, E, CHANNELS)
        k = _add_blocks(k, c, qkv_ptr, 1, start, E, CHANNELS, False)
        store(k_ptr + at, k, mask)
        x = load(x_ptr + i[:, None] * x_token + d[None, :], mask)
        v = _vector(qkv_bias_ptr, 2, start, E, CHANNELS)
        v = _add_blocks(v, x, qkv_ptr, 2, start, E, CHANNELS, False)
        store(v_ptr + at, v, mask)
        at = j[None, :] * E + d[:, None]
        mask = mask_j[None, :] & mask_d[:, None]
        gates = tl.dot(c, load(gates_c_ptr + at, mask), gates, input_precision=PRECISION)
        gates = tl.dot(x, load(gates_x_ptr + at, mask), gates, input_precision=PRECISION)
    at = i[:, None] * H + j[None, :]
    here = here[:, None]
    store(dense_row(i_ptr, b, first, h * w, H) + at, gates, here & (j < H)[None, :])
    mask = here & ((j >= H) & (j < 2 * H))[None, :]
    store(dense_row(f_ptr, b, first, h * w, H) + at - H, gates, mask)


@triton.jit
def _add_gates(
    y,
    di_ptr,
    df_ptr,
    weight_ptr,
    i,
    here,
    start,
    E: tl.constexpr,
    H: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y (T, C) + [di, df] weight, weight (2 H, E). The layout of a tl.dot would spread to y."""
    for j in tl.static_range(H):
        di, df = load(di_ptr + i * H + j, here), load(df_ptr + i * H + j, here)
        y += di[:, None] * _vector(weight_ptr, j, start, E, CHANNELS)
        y += df[:, None] * _vector(weight_ptr, H + j, start, E, CHANNELS)
    return y


@triton.jit
def _store_sum(ptr, x, d, mask):
    """Over the rows of x (·, C), for channels d."""
    tl.store(ptr + d, tl.sum(x, 0), mask=mask)


@triton.jit
def _store_blocks(ptr, x, d, mask):
    """The diagonal 4 × 4 blocks of x (C, C) into (E / 4, 4, 4)."""
    on_diagonal = d[:, None] // 4 == d[None, :] // 4
    at = d[:, None] * 4 + d[None, :] % 4
    tl.store(ptr + at, x, mask=on_diagonal & mask[:, None] & mask[None, :])


@triton.jit
def _g_kernel(
    dc_ptr,
    dq_ptr,
    dk_ptr,
    di_ptr,
    df_ptr,
    x_ptr,
    taps_ptr,
    conv_bias_ptr,
    qkv_ptr,
    gates_c_ptr,
    g_ptr,
    x_row,
    x_token,
    h,
    w,
    E: tl.constexpr,
    H: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """g = (dc + blocksᵀ(dq) + blocksᵀ(dk) + [di, df] Wc) ⊙ SiLU′(a)."""
    first, r, s, i = _tile(tl.program_id(0), h, w, HEIGHT, WIDTH)
    here = (r < h) & (s < w)
    b = tl.program_id(1)
    x_ptr = row(x_ptr, b, x_row, first, x_token)
    dc_ptr = dense_row(dc_ptr, b, first, h * w, E)
    dq_ptr = dense_row(dq_ptr, b, first, h * w, E)
    dk_ptr = dense_row(dk_ptr, b, first, h * w, E)
    g_ptr = dense_row(g_ptr, b, first, h * w, E)
    di_ptr = dense_row(di_ptr, b, first, h * w, H)
    df_ptr = dense_row(df_ptr, b, first, h * w, H)
    for start in range(0, E, CHANNELS):
        d, mask_d = _channels(start, E, CHANNELS)
        at = i[:, None] * E + d[None, :]
        mask = here[:, None] & mask_d[None, :]
        a = _before_silu(
            x_ptr,
            taps_ptr,
            conv_bias_ptr,
            i,
            x_token,
            r,
            s,
            h,
            w,
            start,
            E,
            KH,
            KW,
            TOP,
            LEFT,
            CHANNELS,
        )
        g = load(dc_ptr + at, mask)
        dq = load(dq_ptr + at, mask)
        g = _add_blocks(g, dq, qkv_ptr, 0, start, E, CHANNELS, True)
        dk = load(dk_ptr + at, mask)
        g = _add_blocks(g, dk, qkv_ptr, 1, start, E, CHANNELS, True)
        g = _add_gates(g, di_ptr, df_ptr, gates_c_ptr, i, here, start, E, H, CHANNELS)
        gate = sigmoid(a)
        store(g_ptr + at, g * gate * (1 + a * (1 - gate)), mask)


@triton.jit
def _dx_kernel(
    g_ptr,
    dv_ptr,
    di_ptr,
    df_ptr,
    x_ptr,
    taps_ptr,
    qkv_ptr,
    gates_x_ptr,
    dx_ptr,
    sums_ptr,
    x_row,
    x_token,
    dx_row,
    dx_token,
    h,
    w,
    tiles,
    all_tiles,
    E: tl.constexpr,
    H: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dx = Σ_mn taps_mn ⊙ g_{t − (m, n) + origin} + blocksᵀ(dv) + [di, df] Wx.

    And the sums over tokens of x ⊙ g_{t − (m, n) + origin} and g, (KH KW + 1, E).
    """
    start = tl.program_id(0) * CHANNELS
    d, mask_d = _channels(start, E, CHANNELS)
    of_bias = tl.zeros([HEIGHT * WIDTH, CHANNELS], tl.float32)
    of_taps = ()
    for _ in tl.static_range(KH * KW):
        of_taps = of_taps + (of_bias,)
    for tile in range(tl.program_id(1), all_tiles, tl.num_programs(1)):
        b = tile // tiles
        first, r, s, i = _tile(tile % tiles, h, w, HEIGHT, WIDTH)
        here = (r < h) & (s < w)
        mask = here[:, None] & mask_d[None, :]
        at = i[:, None] * x_token + d[None, :]
        x = load(row(x_ptr, b, x_row, first, x_token) + at, mask)
        gs = dense_row(g_ptr, b, first, h * w, E)
        dx = tl.zeros([HEIGHT * WIDTH, CHANNELS], tl.float32)
        now = ()
        for m in tl.static_range(KH):
            for n in tl.static_range(KW):
                g = _near(gs, i, E, r, s, h, w, TOP - m, LEFT - n, d, mask_d)
                dx += _vector(taps_ptr, m * KW + n, start, E, CHANNELS) * g
                now = now + (of_taps[m * KW + n] + x * g,)
                if m == TOP and n == LEFT:
                    of_bias += tl.where(here[:, None], g, 0)
        of_taps = now
        at = i[:, None] * E + d[None, :]
        dv = load(dense_row(dv_ptr, b, first, h * w, E) + at, mask)
        dx = _add_blocks(dx, dv, qkv_ptr, 2, start, E, CHANNELS, True)
        di = dense_row(di_ptr, b, first, h * w, H)
        df = dense_row(df_ptr, b, first, h * w, H)
        dx = _add_gates(dx, di, df, gates_x_ptr, i, here, start, E, H, CHANNELS)
        at = i[:, None] * dx_token + d[None, :]
        store(row(dx_ptr, b, dx_row, first, dx_token) + at, dx, mask)
    sums_ptr += tl.program_id(1).to(tl.int64) * (KH * KW + 1) * E
    for m in tl.static_range(KH * KW):
        _store_sum(sums_ptr + m * E, of_taps[m], d, mask_d)
    _store_sum(sums_ptr + KH * KW * E, of_bias, d, mask_d)


@triton.jit
def _weights_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    di_ptr,
    df_ptr,
    c_ptr,
    x_ptr,
    sums_ptr,
    x_token,
    N,
    sums_row,
    E: tl.constexpr,
    H: tl.constexpr,
    GATES: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums over tokens: (3, E / 4, 4, 4), (3, E), (2, 2 H, E) and (2 H) of

    dq cᵀ, dk cᵀ, dv xᵀ in each block; dq, dk, dv; [di, df] cᵀ and xᵀ; [di, df].
    """
    start = tl.program_id(0) * CHANNELS
    d, mask_d = _channels(start, E, CHANNELS)
    j = tl.arange(0, GATES)
    i = tl.arange(0, TOKENS)
    of_q = tl.zeros([CHANNELS, CHANNELS], tl.float32)
    of_k = tl.zeros([CHANNELS, CHANNELS], tl.float32)
    of_v = tl.zeros([CHANNELS, CHANNELS], tl.float32)
    sum_q = tl.zeros([16, CHANNELS], tl.float32)
    sum_k = tl.zeros([16, CHANNELS], tl.float32)
    sum_v = tl.zeros([16, CHANNELS], tl.float32)
    of_gates_c = tl.zeros([GATES, CHANNELS], tl.float32)
    of_gates_x = tl.zeros([GATES, CHANNELS], tl.float32)
    sum_gates = tl.zeros([GATES, TOKENS], tl.float32)
    # Tensor cores add as well, here the same sixteen times.
    ones = tl.full([16, TOKENS], 1, dq_ptr.dtype.element_ty)
    for first in range(tl.program_id(1) * TOKENS, N, tl.num_programs(1) * TOKENS):
        token = first + i.to(tl.int64)
        here = token < N
        mask = here[:, None] & mask_d[None, :]
        at = token[:, None] * E + d[None, :]
        dq = tl.load(dq_ptr + at, mask=mask, other=0)
        dk = tl.load(dk_ptr + at, mask=mask, other=0)
        dv = tl.load(dv_ptr + at, mask=mask, other=0)
        c = tl.load(c_ptr + at, mask=mask, other=0)
        x = tl.load(x_ptr + token[:, None] * x_token + d[None, :], mask=mask, other=0)
        at = token[None, :] * H + j[:, None]
        mask = here[None, :] & (j < H)[:, None]
        dgates = load(di_ptr + at, mask)
        mask = here[None, :] & ((j >= H) & (j < 2 * H))[:, None]
        dgates += load(df_ptr + at - H, mask)
        of_q = tl.dot(tl.trans(dq), c, of_q, input_precision=PRECISION)
        of_k = tl.dot(tl.trans(dk), c, of_k, input_precision=PRECISION)
        of_v = tl.dot(tl.trans(dv), x, of_v, input_precision=PRECISION)
        sum_q = tl.dot(ones, dq, sum_q, input_precision=PRECISION)
        sum_k = tl.dot(ones, dk, sum_k, input_precision=PRECISION)
        sum_v = tl.dot(ones, dv, sum_v, input_precision=PRECISION)
        c, x = c.to(tl.float32), x.to(tl.float32)
        of_gates_c = tl.dot(dgates, c, of_gates_c, input_precision=PRECISION)
        of_gates_x = tl.dot(dgates, x, of_gates_x, input_precision=PRECISION)
        sum_gates += dgates
    sums_ptr += tl.program_id(1).to(tl.int64) * sums_row
    _store_blocks(sums_ptr, of_q, d, mask_d)
    _store_blocks(sums_ptr + 4 * E, of_k, d, mask_d)
    _store_blocks(sums_ptr + 8 * E, of_v, d, mask_d)
    _store_sum(sums_ptr + 12 * E, sum_q / 16, d, mask_d)
    _store_sum(sums_ptr + 13 * E, sum_k / 16, d, mask_d)
    _store_sum(sums_ptr + 14 * E, sum_v / 16, d, mask_d)
    at = 15 * E + j[:, None] * E + d[None, :]
    mask = (j < 2 * H)[:, None] & mask_d[None, :]
    tl.store(sums_ptr + at, of_gates_c, mask=mask)
    tl.store(sums_ptr + at + 2 * H * E, of_gates_x, mask=mask)
    mask = (j < 2 * H) & (tl.program_id(0) == 0)
    tl.store(sums_ptr + (15 + 4 * H) * E + j, tl.sum(sum_gates, 1), mask=mask)


@triton.jit
def _head(weight_ptr, bias_ptr, skip_ptr, Dh: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of the program's head, their mask, and the parameters of the norm, (1, BLOCK)."""
    e = tl.arange(0, BLOCK)
    d = tl.program_id(0) * Dh + e
    mask = (e < Dh) | (Dh == BLOCK)
    weight, bias = load(weight_ptr + d, mask), load(bias_ptr + d, mask)
    return d, mask, weight[None, :], bias[None, :], load(skip_ptr + d, mask)[None, :]


@triton.jit
def _normalize(h, mask, eps, Dh: tl.constexpr):
    """h (T, Dh and more) with mean 0 and variance 1 in each row, and 1 / its deviation."""
    h = tl.where(mask, h - (tl.sum(h, 1) / Dh)[:, None], 0)
    r = tl.rsqrt(tl.sum(h * h, 1) / Dh + eps)[:, None]
    return h * r, r


@triton.jit
def _post_kernel(
    h_ptr,
    c_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    skip_ptr,
    y_ptr,
    z_token,
    N,
    E,
    eps,
    Dh: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """y = (norm(h) weight + bias + skip c) SiLU(z) of a head."""
    d, mask_d, weight, bias, skip = _head(weight_ptr, bias_ptr, skip_ptr, Dh, BLOCK)
    i = tl.arange(0, TOKENS)
    for first in range(tl.program_id(1) * TOKENS, N, tl.num_programs(1) * TOKENS):
        token = (first + i.to(tl.int64))[:, None]
        mask = (token < N) & mask_d[None, :]
        at = token * E + d[None, :]
        h = load(h_ptr + at, mask)
        c = load(c_ptr + at, mask)
        z = load(z_ptr + token * z_token + d[None, :], mask)
        h, _ = _normalize(h, mask_d[None, :], eps, Dh)
        y = (h * weight + bias + skip * c) * (z * sigmoid(z))
        store(y_ptr + at, y, mask)


@triton.jit
def _post_backward_kernel(
    dy_ptr,
    h_ptr,
    c_ptr,
    z_ptr,
    weight_ptr,
    bias_ptr,
    skip_ptr,
    y_ptr,
    dh_ptr,
    dc_ptr,
    dz_ptr,
    sums_ptr,
    dy_token,
    z_token,
    dz_token,
    N,
    E,
    eps,
    Dh: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """With n the normalised h, u = n weight + bias + skip c, y = u SiLU(z) and du = dy SiLU(z):

        dz = dy u SiLU′(z)     dc = skip du     dn = weight du     dh = r (dn − ⟨dn⟩ − n ⟨n dn⟩)

    and sums over tokens of n du, du and c du, (3, E).
    """
    d, mask_d, weight, bias, skip = _head(weight_ptr, bias_ptr, skip_ptr, Dh, BLOCK)
    i = tl.arange(0, TOKENS)
    of_weight = tl.zeros([TOKENS, BLOCK], tl.float32)
    of_bias = tl.zeros([TOKENS, BLOCK], tl.float32)
    of_skip = tl.zeros([TOKENS, BLOCK], tl.float32)
    for first in range(tl.program_id(1) * TOKENS, N, tl.num_programs(1) * TOKENS):
        token = (first + i.to(tl.int64))[:, None]
        mask = (token < N) & mask_d[None, :]
        at = token * E + d[None, :]
        h = load(h_ptr + at, mask)
        c = load(c_ptr + at, mask)
        z = load(z_ptr + token * z_token + d[None, :], mask)
        dy = load(dy_ptr + token * dy_token + d[None, :], mask)
        h, r = _normalize(h, mask_d[None, :], eps, Dh)
        before = h * weight + bias + skip * c
        gate = sigmoid(z)
        store(y_ptr + at, before * (z * gate), mask)
        dz = dy * before * gate * (1 + z * (1 - gate))
        store(dz_ptr + token * dz_token + d[None, :], dz, mask)
        dy *= z * gate
        store(dc_ptr + at, dy * skip, mask)
        of_weight += dy * h
        of_bias += dy
        of_skip += dy * c
        dh = dy * weight
        along = tl.sum(dh * h, 1) / Dh
        dh = r * (dh - (tl.sum(dh, 1) / Dh)[:, None] - h * along[:, None])
        store(dh_ptr + at, dh, mask)
    sums_ptr += tl.program_id(1).to(tl.int64) * 3 * E + d
    tl.store(sums_ptr, tl.sum(of_weight, 0), mask=mask_d)
    tl.store(sums_ptr + E, tl.sum(of_bias, 0), mask=mask_d)
    tl.store(sums_ptr + 2 * E, tl.sum(of_skip, 0), mask=mask_d)


def _packed(x: Tensor) -> Tensor:
    """A dense copy in float32."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)


def _on_grid(x, taps, origin, heads, grid, tokens):
    """Constants of a kernel on the grid, and how many tiles this has."""
    width = tokens if grid[0] == 1 else min(tokens, WIDTH)
    height = tokens // width
    constants = dict(
        E=x.shape[2],
        H=heads,
        KH=taps.shape[1],
        KW=taps.shape[2],
        TOP=origin[0],
        LEFT=origin[1],
        HEIGHT=height,
        WIDTH=width,
    )
    return constants, triton.cdiv(grid[0], height) * triton.cdiv(grid[1], width)


def _dots(x, heads):
    """Constants of a kernel with products: columns of gates, and precision."""
    gates = max(16, triton.next_power_of_2(2 * heads))
    return dict(GATES=gates, PRECISION='tf32x3' if x.dtype == torch.float32 else 'tf32')


def _weights(taps, qkv):
    """Channels last: (KH, KW, E) and (3, 4, 4, E / 4)."""
    return _packed(taps.permute(1, 2, 0)), _packed(qkv.permute(0, 2, 3, 1))


def _tile_tokens(batch, length):
    return TOKENS if batch * triton.cdiv(length, TOKENS) >= FULL else FEWER


def pre(x, taps, conv_bias, qkv, qkv_bias, gates_c, gates_x, gates_bias, grid, origin):
    """See `reference.pre`."""
    x = unit_stride(x)
    B, L, E = x.shape
    H = len(gates_bias) // 2
    constants, tiles = _on_grid(x, taps, origin, H, grid, _tile_tokens(B, L))
    c = x.new_empty((B, L, E))
    q, k, v = (x.new_empty((B, L, H, E // H)) for _ in 'qkv')
    i, f = (x.new_empty((B, L, H), dtype=torch.float32) for _ in 'if')
    taps, blocks = _weights(taps, qkv)
    with torch.cuda.device_of(x):
        _pre_kernel[tiles, B](
            x,
            taps,
            conv_bias.contiguous(),
            blocks,
            qkv_bias.contiguous(),
            gates_c.contiguous(),
            gates_x.contiguous(),
            gates_bias.contiguous(),
            c,
            q,
            k,
            v,
            i,
            f,
            *x.stride()[:2],
            *grid,
            **constants,
            **_dots(x, H),
            CHANNELS=CHANNELS,
            num_stages=1,
        )
    return c, q, k, v, i, f


def pre_backward(
    dc, dq, dk, dv, di, df, x, c, taps, conv_bias, qkv, gates_c, gates_x, grid, origin, dx
):
    """See `reference.pre_backward`."""
    x, dq, dk, dv, di, df = unit_stride(x), *(d.contiguous() for d in (dq, dk, dv, di, df))
    B, L, E = x.shape
    H = di.shape[2]
    kernel = taps[0].numel()
    g = x.new_empty((B, L, E))
    packed_taps, blocks = _weights(taps, qkv)
    with torch.cuda.device_of(x):
        constants, tiles = _on_grid(x, taps, origin, H, grid, _tile_tokens(B, L))
        _g_kernel[tiles, B](
            dc.contiguous(),
            dq,
            dk,
            di,
            df,
            x,
            packed_taps,
            conv_bias.contiguous(),
            blocks,
            gates_c.contiguous(),
            g,
            *x.stride()[:2],
            *grid,
            **constants,
            CHANNELS=CHANNELS,
        )

        constants, tiles = _on_grid(x, taps, origin, H, grid, TOKENS if kernel <= 25 else FEWER)
        channels = triton.cdiv(E, CHANNELS_DX)
        programs = min(B * tiles, triton.cdiv(FULL, channels))
        of_taps = x.new_empty((programs, 1 + kernel, E), dtype=torch.float32)
        _dx_kernel[channels, programs](
            g,
            dv,
            di,
            df,
            x,
            packed_taps,
            blocks,
            gates_x.contiguous(),
            dx,
            of_taps,
            *x.stride()[:2],
            *dx.stride()[:2],
            *grid,
            tiles,
            B * tiles,
            **constants,
            CHANNELS=CHANNELS_DX,
            num_warps=4 if kernel <= 9 else 8,
        )

        tokens, channels = TOKENS_WEIGHTS, CHANNELS
        if x.dtype == torch.float32:
            tokens, channels = TOKENS_WIDE, CHANNELS_WIDE
        columns = triton.cdiv(E, channels)
        programs = min(triton.cdiv(B * L, tokens), triton.cdiv(FULL, columns))
        sizes = 12 * E, 3 * E, 2 * H * E, 2 * H * E, 2 * H
        sums = x.new_empty((programs, sum(sizes)), dtype=torch.float32)
        x = _flat(x)
        _weights_kernel[columns, programs](
            dq,
            dk,
            dv,
            di,
            df,
            c.contiguous(),
            x,
            sums,
            x.stride(0),
            len(x),
            sums.shape[1],
            E=E,
            H=H,
            **_dots(x, H),
            TOKENS=tokens,
            CHANNELS=channels,
            num_stages=2,
        )
    of_taps = of_taps.sum(0)
    dqkv, dqkv_bias, dgates_c, dgates_x, dgates_bias = sums.sum(0).split(sizes)
    return (
        of_taps[:-1].view(*taps.shape[1:], E).permute(2, 0, 1),
        of_taps[-1],
        dqkv.view(qkv.shape),
        dqkv_bias.view(3, E),
        dgates_c.view(2 * H, E),
        dgates_x.view(2 * H, E),
        dgates_bias,
    )


def _norm_constants(h):
    """Of a kernel with the norm, and its grid of programs."""
    B, L, H, Dh = h.shape
    block = triton.next_power_of_2(Dh)
    tokens = max(1, NORM_TILE // block)
    programs = min(triton.cdiv(B * L, tokens), triton.cdiv(8 * FULL, H))
    return dict(Dh=Dh, BLOCK=block, TOKENS=tokens), (H, programs)


def _flat(x):
    """(B·L, E), a view where the strides allow it."""
    return unit_stride(x.flatten(0, 1))


def post(h, c, z, norm_weight, norm_bias, skip, eps):
    """See `reference.post`."""
    constants, grid = _norm_constants(h)
    y = torch.empty_like(c, memory_format=torch.contiguous_format)
    z = _flat(z)
    with torch.cuda.device_of(h):
        _post_kernel[grid](
            h.contiguous(),
            c.contiguous(),
            z,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            skip.contiguous(),
            y,
            z.stride(0),
            *z.shape,
            eps,
            **constants,
        )
    return y


def post_backward(dy, h, c, z, norm_weight, norm_bias, skip, eps, dz):
    """See `reference.post_backward`."""
    constants, grid = _norm_constants(h)
    y, dh, dc = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (c, h, c))
    dy, z, dz = _flat(dy), _flat(z), dz.view(-1, c.shape[2])
    sums = y.new_empty((grid[1], 3, c.shape[2]), dtype=torch.float32)
    with torch.cuda.device_of(h):
        _post_backward_kernel[grid](
            dy,
            h.contiguous(),
            c.contiguous(),
            z,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            skip.contiguous(),
            y,
            dh,
            dc,
            dz,
            sums,
            dy.stride(0),
            z.stride(0),
            dz.stride(0),
            *z.shape,
            eps,
            **constants,
        )
    return y, dh, dc, *sums.sum(0)
