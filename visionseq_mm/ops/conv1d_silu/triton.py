# ruff: noqa: RUF005 (Triton has no starred expressions)
"""Depthwise convolution along the tokens and SiLU in Triton, all directions at once.

    u_t = SiLU(bias + Σ_k weight_k x_{t−(W−1)+k})        reversed: x_{t+(W−1)−k}

S directions, B batch, L tokens, D channels, W taps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionseq_mm.ops.triton_common import (
    dense_row,
    flags,
    load,
    row,
    sigmoid,
    store,
    unit_stride,
)

TOKENS = 32  # of a program
CHANNELS = 128
REGISTERS = 168  # three warps on each scheduler


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    u_ptr,
    x_row,
    x_token,
    L,
    D,
    batch,
    REVERSE: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < D
    first = tl.program_id(1) * TOKENS
    i = tl.arange(0, TOKENS)
    b = tl.program_id(2)
    x_ptr = row(x_ptr, b, x_row, first, x_token)
    for s in tl.static_range(S):
        a = tl.zeros([TOKENS, CHANNELS], tl.float32) + load(bias_ptr + s * D + d, mask)[None, :]
        for k in tl.static_range(W):
            ahead = (W - 1 - k) * (2 * ((REVERSE >> s) & 1) - 1)
            inside = (first + i + ahead >= 0) & (first + i + ahead < L)
            x = load(
                x_ptr + (i + ahead)[:, None] * x_token + d[None, :],
                inside[:, None] & mask[None, :],
            )
            a += load(weight_ptr + (s * D + d) * W + k, mask)[None, :] * x
        u = dense_row(u_ptr, s * batch + b, first, L, D) + i[:, None] * D + d[None, :]
        store(u, a * sigmoid(a), (first + i < L)[:, None] & mask[None, :])


@triton.jit
def _load_step(
    x_ptr,
    x_token,
    du,
    i,
    first,
    L,
    D,
    mask,
    REVERSE: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    """x of token i after the first, and du of each direction where that x is its newest."""
    x = load(x_ptr + i * x_token, mask & (first + i < L))
    gradients = ()
    for s in tl.static_range(S):
        t = i - (W - 1) * ((REVERSE >> s) & 1)
        inside = (first + t >= 0) & (first + t < L)
        gradients = gradients + (load(du[s] + t * D, mask & inside),)
    return x, gradients


@triton.jit
def _backward_kernel(
    du_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    x_row,
    x_token,
    dx_row,
    dx_token,
    L,
    D,
    batch,
    REVERSE: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Walks along some tokens with the last W of x and of g, the gradients of what enters SiLU.

    A token's x meets the g of W − 1 tokens before and after it. At token t, direction s has
    g of t, or of t − (W − 1) where it is reversed: either way it takes the same W of x, and
    afterwards dx of t − (W − 1) is known.
    """
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = d < D
    first = tl.program_id(1) * TOKENS
    b = tl.program_id(2)
    x_ptr = row(x_ptr, b, x_row, first, x_token) + d
    dx_ptr = row(dx_ptr, b, dx_row, first, dx_token) + d
    zeros = tl.zeros([CHANNELS], tl.float32)
    bias, dbias, weight, dweight, g, du = (), (), (), (), (), ()
    for s in tl.static_range(S):
        bias = bias + (load(bias_ptr + s * D + d, mask),)
        dbias = dbias + (zeros,)
        du = du + (dense_row(du_ptr, s * batch + b, first, L, D) + d,)
        for j in tl.static_range(W):  # tap of the x that is j tokens back
            k = j if (REVERSE >> s) & 1 else W - 1 - j
            weight = weight + (load(weight_ptr + (s * D + d) * W + k, mask),)
            dweight = dweight + (zeros,)
            g = g + (zeros,)
    x = ()
    for j in tl.static_range(W):
        x = x + (load(x_ptr - (j + 1) * x_token, mask & (first > j)),)
    x_next, du_next = _load_step(x_ptr, x_token, du, 0, first, L, D, mask, REVERSE, S, W)
    for i in tl.range(0, TOKENS + W - 1, loop_unroll_factor=W):
        x, du_now = (x_next,) + x[: W - 1], du_next
        x_next, du_next = _load_step(x_ptr, x_token, du, i + 1, first, L, D, mask, REVERSE, S, W)
        dx = zeros
        g_now, dbias_now, dweight_now = (), (), ()
        for s in tl.static_range(S):
            a = bias[s]
            for j in tl.static_range(W):
                a += weight[s * W + j] * x[j]
            gate = sigmoid(a)
            g_s = du_now[s] * gate * (1 + a * (1 - gate))
            g_now = g_now + (g_s,) + g[s * W : s * W + W - 1]
            t = i - (W - 1) * ((REVERSE >> s) & 1)
            own = tl.where((t >= 0) & (t < TOKENS), g_s, 0)
            dbias_now = dbias_now + (dbias[s] + own,)
            for j in tl.static_range(W):
                dweight_now = dweight_now + (dweight[s * W + j] + own * x[j],)
                dx += weight[s * W + W - 1 - j] * g_now[s * W + j]
        g, dbias, dweight = g_now, dbias_now, dweight_now
        t = i - (W - 1)
        store(dx_ptr + t * dx_token, dx, mask & (t >= 0) & (first + t < L))
    at = (b * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * S
    for s in tl.static_range(S):
        tl.store(dbias_ptr + (at + s) * D + d, dbias[s], mask=mask)
        for j in tl.static_range(W):
            k = j if (REVERSE >> s) & 1 else W - 1 - j
            tl.store(dweight_ptr + ((at + s) * W + k) * D + d, dweight[s * W + j], mask=mask)


def _grid(x: Tensor) -> tuple[int, int, int]:
    B, L, D = x.shape
    return triton.cdiv(D, CHANNELS), triton.cdiv(L, TOKENS), B


def forward(x: Tensor, weight: Tensor, bias: Tensor, reverse) -> Tensor:
    """(S, B, L, D) of x (B, L, D), weight (S, D, W) and bias (S, D)."""
    x = unit_stride(x)
    B, L, D = x.shape
    S, _, W = weight.shape
    u = x.new_empty((S, B, L, D))
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(x)](
            x,
            weight.contiguous(),
            bias.contiguous(),
            u,
            *x.stride()[:2],
            L,
            D,
            B,
            REVERSE=flags(reverse),
            S=S,
            W=W,
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
        )
    return u


def backward(du, x, weight, bias, reverse, dx) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; writes that of x to `dx`."""
    x = unit_stride(x)
    B, L, D = x.shape
    S, _, W = weight.shape
    grid = _grid(x)
    dweight = x.new_empty((B, grid[1], S, W, D), dtype=torch.float32)
    dbias = dweight.new_empty((B, grid[1], S, D))
    with torch.cuda.device_of(x):
        _backward_kernel[grid](
            du.contiguous(),
            x,
            weight.contiguous(),
            bias.contiguous(),
            dx,
            dweight,
            dbias,
            *x.stride()[:2],
            *dx.stride()[:2],
            L,
            D,
            B,
            REVERSE=flags(reverse),
            S=S,
            W=W,
            TOKENS=TOKENS,
            CHANNELS=CHANNELS,
            num_warps=1,
            maxnreg=REGISTERS,
        )
    dweight = dweight.sum((0, 1)).transpose(1, 2).to(weight.dtype).contiguous()
    return dweight, dbias.sum((0, 1)).to(bias.dtype)
