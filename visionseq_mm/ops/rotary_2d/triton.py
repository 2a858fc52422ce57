"""The rotation in Triton, of q and k in one kernel, which takes the time of reading and writing.

B batch, (h, w) a grid of L tokens, H heads, Dh channels of a head, T tokens of a tile.
"""

import torch
import triton
import triton.language as tl

from visionseq_mm.ops.rotary_2d import frequencies
from visionseq_mm.ops.triton_common import dense_row, load, store, unit_stride

TILE = 4096  # elements
CHANNELS = 512  # of a tile, at most


@triton.jit
def _turn(x_ptr, out_ptr, cos, sin, at, out_at, mask):
    x = load(x_ptr + at, mask)
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    turned = tl.join(a * cos - b * sin, b * cos + a * sin)
    store(out_ptr + out_at, tl.reshape(turned, x.shape), mask)


@triton.jit
def _rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_batch,
    q_row,
    q_token,
    k_batch,
    k_row,
    k_token,
    w,
    L,
    C: tl.constexpr,
    Dh: tl.constexpr,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of rows of C = H·Dh channels; the tables are (max(h, w), Dh / 4)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    y, x = token // w, token % w
    start = tl.program_id(1) * CHANNELS
    c = start + tl.arange(0, CHANNELS)
    mask = (token < L)[:, None] & ((c < C) | (C % CHANNELS == 0))[None, :]
    pair = (start // 2 + tl.arange(0, CHANNELS // 2)) % (Dh // 2)
    place = tl.where((pair < Dh // 4)[None, :], y[:, None], x[:, None])
    at = place * (Dh // 4) + (pair % (Dh // 4))[None, :]
    here = (token < L)[:, None]
    cos, sin = load(cos_ptr + at, here), load(sin_ptr + at, here)
    if INVERSE:
        sin = -sin
    b = tl.program_id(2).to(tl.int64)
    y, x = y.to(tl.int64)[:, None], x.to(tl.int64)[:, None]
    out_at = dense_row(c[None, :], b, token[:, None], L, C)
    at = b * q_batch + y * q_row + x * q_token + c[None, :]
    _turn(q_ptr, q_out_ptr, cos, sin, at, out_at, mask)
    at = b * k_batch + y * k_row + x * k_token + c[None, :]
    _turn(k_ptr, k_out_ptr, cos, sin, at, out_at, mask)


def rotate(q, k, inverse):
    """See `reference.rotate`."""
    B, h, w, H, Dh = q.shape
    C = H * Dh
    theta = frequencies(Dh, q.device, torch.float32)
    angles = torch.arange(max(h, w), device=q.device, dtype=torch.float32)[:, None] * theta
    out = [x.new_empty(x.shape) for x in (q, k)]
    q, k = (unit_stride(x.flatten(3)) for x in (q, k))
    channels = min(CHANNELS, triton.next_power_of_2(C))
    tokens = max(1, TILE // channels)
    grid = triton.cdiv(h * w, tokens), triton.cdiv(C, channels), B
    with torch.cuda.device_of(q):
        _rotary_kernel[grid](
            *(q, k, angles.cos(), angles.sin(), *out),
            *q.stride()[:3],
            *k.stride()[:3],
            w,
            h * w,
            C=C,
            Dh=Dh,
            INVERSE=inverse,
            TOKENS=tokens,
            CHANNELS=channels,
        )
    return tuple(out)
