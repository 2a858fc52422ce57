# ruff: noqa: RUF005 (Triton has no starred expressions)
"""Depth-wise convolutions in Triton: forward, dx as that of the mirrored kernel, and weights.

A strip of ROWS rows and COLUMNS columns is made of tensors that each hold one place in all strips
of a program: what two places of a strip read in common, a thread has in registers. Strips lie
side by side, so that they share the rest through the cache. Sums over tokens are stored by each
program and added by torch: no atomics, the same bits every time.

B batch, (h, w) a grid of tokens, C channels, K rows and columns of a kernel, S strips.
"""

import torch
import triton
import triton.language as tl

from visionseq_mm.ops.triton_common import load, store, unit_stride

ROWS = 10  # about: a multiple of K, as a window of K rows turns in K steps
COLUMNS = 4
CHANNELS = 64  # at most; two of a thread, whose weights and sums fill the registers
TILE = 256  # channels of all strips
PROGRAMS = 132 * 3  # that sum the gradients of weights


@triton.jit
def _strips(index, h, w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIPS: tl.constexpr):
    """First rows and columns of the strips of a program, (S)."""
    across = tl.cdiv(w, COLUMNS)
    strip = index * STRIPS + tl.arange(0, STRIPS)
    return strip // across * ROWS, strip % across * COLUMNS


@triton.jit
def _read(ptr, y, x, row, token, h, w, mask, COLUMNS: tl.constexpr):
    """A tuple of (S, C), COLUMNS places from (y, x) on, zero outside the grid."""
    inside = ((y >= 0) & (y < h))[:, None] & mask
    ptr += y.to(tl.int64)[:, None] * row + x[:, None] * token
    places = ()
    for n in tl.static_range(COLUMNS):
        inside_n = inside & ((x + n >= 0) & (x + n < w))[:, None]
        places = places + (load(ptr + n * token, inside_n),)
    return places


@triton.jit
def _conv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    x_batch,
    x_row,
    h,
    w,
    C,
    x_token: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MIRRORED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """weight (K, K, C), float32."""
    y, x = _strips(tl.program_id(0), h, w, ROWS, COLUMNS, STRIPS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = c < C
    b = tl.program_id(2).to(tl.int64)
    x_ptr += b * x_batch + c[None, :]
    out_ptr += b * h * w * C + c[None, :]
    taps = ()
    for n in tl.static_range(K * K):
        tap = K * K - 1 - n if MIRRORED else n
        taps = taps + (load(weight_ptr + tap * C + c, mask)[None, :],)
    bias = tl.zeros([1, CHANNELS], tl.float32)
    if bias_ptr is not None:
        bias += load(bias_ptr + c, mask)[None, :]
    mask = mask[None, :]
    W: tl.constexpr = COLUMNS + K - 1
    x -= K // 2
    y -= K // 2
    window = ()
    for m in tl.static_range(K - 1):
        window = window + _read(x_ptr, y + m, x, x_row, x_token, h, w, mask, W)
    for start in range(0, ROWS, K):
        for m in tl.static_range(K):
            r = start + m
            window = window + _read(x_ptr, y + r + K - 1, x, x_row, x_token, h, w, mask, W)
            row = y + r + K // 2
            at = (row.to(tl.int64) * w + x + K // 2)[:, None] * C
            for s in tl.static_range(COLUMNS):
                out = tl.zeros([STRIPS, CHANNELS], tl.float32) + bias
                for n in tl.static_range(K * K):
                    out += taps[n] * window[n // K * W + s + n % K]
                if RESIDUAL:
                    out += window[K // 2 * W + s + K // 2]
                inside = ((row < h) & (x + s + K // 2 < w))[:, None] & mask
                store(out_ptr + at + s * C, out, inside)
            window = window[W:]


@triton.jit
def _weights_kernel(
    dout_ptr,
    x_ptr,
    sums_ptr,
    dout_batch,
    dout_row,
    x_batch,
    x_row,
    h,
    w,
    C,
    tiles,
    all_tiles,
    dout_token: tl.constexpr,
    x_token: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums over tokens of dout ⊙ x around them, and of dout: (programs, K² + 1, C)."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (c < C)[None, :]
    dout_ptr += c[None, :]
    x_ptr += c[None, :]
    W: tl.constexpr = COLUMNS + K - 1
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums = sums + (tl.zeros([STRIPS, CHANNELS], tl.float32),)
    for tile in range(tl.program_id(0), all_tiles, tl.num_programs(0)):
        b = (tile // tiles).to(tl.int64)
        y, x = _strips(tile % tiles, h, w, ROWS, COLUMNS, STRIPS)
        xs = x_ptr + b * x_batch
        douts = dout_ptr + b * dout_batch
        window = ()
        for m in tl.static_range(K - 1):
            window = window + _read(xs, y + m - K // 2, x - K // 2, x_row, x_token, h, w, mask, W)
        for start in range(0, ROWS, K):
            for m in tl.static_range(K):
                r = start + m
                below = y + r + K - 1 - K // 2
                window = window + _read(xs, below, x - K // 2, x_row, x_token, h, w, mask, W)
                dout = _read(douts, y + r, x, dout_row, dout_token, h, w, mask, COLUMNS)
                now = ()
                for n in tl.static_range(K * K + 1):
                    total = sums[n]
                    for s in tl.static_range(COLUMNS):
                        if n < K * K:
                            total += dout[s] * window[n // K * W + s + n % K]
                        else:
                            total += dout[s]
                    now = now + (total,)
                sums = now
                window = window[W:]
    sums_ptr += tl.program_id(0).to(tl.int64) * (K * K + 1) * C + c
    for n in tl.static_range(K * K + 1):
        tl.store(sums_ptr + n * C, tl.sum(sums[n], 0), mask=c < C)


def _constants(C, K):
    """Of a kernel: many channels as far as they fill a tile, few columns for many taps."""
    channels = max(16, min(CHANNELS, C & -C))
    return dict(
        K=K,
        ROWS=max(1, ROWS // K) * K,
        COLUMNS=COLUMNS if K < 7 else COLUMNS // 2,
        STRIPS=TILE // channels,
        CHANNELS=channels,
    )


def _tiles(h, w, constants):
    """Programs for a grid, and their strips of it."""
    strips = triton.cdiv(h, constants['ROWS']) * triton.cdiv(w, constants['COLUMNS'])
    return triton.cdiv(strips, constants['STRIPS'])


def _taps(weight):
    """(K, K, C), a dense copy in float32."""
    weight = weight[:, 0].permute(1, 2, 0)
    return torch.empty(weight.shape, dtype=torch.float32, device=weight.device).copy_(weight)


def _convolve(x, taps, bias, residual, mirrored):
    x = unit_stride(x)
    B, h, w, C = x.shape
    constants = _constants(C, len(taps))
    out = x.new_empty((B, h, w, C))
    with torch.cuda.device_of(x):
        _conv_kernel[_tiles(h, w, constants), triton.cdiv(C, constants['CHANNELS']), B](
            *(x, taps, bias, out),
            *x.stride()[:2],
            h,
            w,
            C,
            x_token=x.stride(2),
            RESIDUAL=residual,
            MIRRORED=mirrored,
            **constants,
        )
    return out


def forward(x, weight, bias, residual):
    """See `reference.forward`."""
    return _convolve(x, _taps(weight), bias.contiguous(), residual, False)


def backward(dout, x, weight, residual):
    """See `reference.backward`."""
    dout, x, taps = unit_stride(dout), unit_stride(x), _taps(weight)
    dx = _convolve(dout, taps, None, residual, True)
    B, h, w, C = x.shape
    K = len(taps)
    constants = _constants(C, K)
    tiles, columns = _tiles(h, w, constants), triton.cdiv(C, constants['CHANNELS'])
    programs = min(B * tiles, triton.cdiv(PROGRAMS, columns))
    sums = x.new_empty((programs, K * K + 1, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weights_kernel[programs, columns](
            *(dout, x, sums),
            *dout.stride()[:2],
            *x.stride()[:2],
            h,
            w,
            C,
            tiles,
            B * tiles,
            dout_token=dout.stride(2),
            x_token=x.stride(2),
            **constants,
        )
    dweight, dbias = sums.sum(0).to(weight.dtype).split([K * K, 1])
    return dx, dweight.mT.contiguous().view(weight.shape), dbias[0].clone()  # with memory apart
