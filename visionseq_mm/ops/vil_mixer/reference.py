"""The parts of the layer in plain PyTorch.

B batch, L tokens of a grid, E inner channels, H heads, Dh channels of a head.
"""

import torch
import torch.nn.functional as F

from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.mlstm.reference import backward as cell_backward
from visionseq_mm.ops.mlstm.reference import forward as cell

__all__ = ['cell', 'cell_backward', 'post', 'post_backward', 'pre', 'pre_backward']


def _on_grid(x, taps, grid, origin):
    """x (B, L, E) as a map in the accumulator's type, with the margin that the taps need."""
    (top, left), (height, width) = origin, taps.shape[1:]
    x = x.to(widest_dtype(x)).transpose(1, 2).unflatten(2, grid)
    return F.pad(x, (left, width - 1 - left, top, height - 1 - top))


def _before_silu(padded, taps, conv_bias):
    taps, bias = taps.to(padded.dtype).unsqueeze(1), conv_bias.to(padded.dtype)
    return F.conv2d(padded, taps, bias, groups=len(taps))


def _blocks(x, weight, bias):
    """Each 4 channels of x (B, L, E) times a matrix of their own: (B, L, E)."""
    y = torch.einsum('blgd,god->blgo', x.unflatten(2, (-1, weight.shape[2])), weight)
    return y.flatten(2) + bias


def pre(x, taps, conv_bias, qkv, qkv_bias, gates_c, gates_x, gates_bias, grid, origin):
    """c (B, L, E) and the inputs of the cell, q, k, v (B, L, H, Dh) and i, f (B, L, H).

        c_t = SiLU(conv_bias + Σ_ab taps_ab ⊙ x_{t + (a, b) − origin})
        q = blocks(c)       k = blocks(c)       v = blocks(x)
        [i, f] = c gates_cᵀ + x gates_xᵀ + gates_bias

    Args:
        x: (B, L, E), the rows of the grid one after the other.
        taps, conv_bias: (E, rows, columns) and (E); tokens outside the grid are zero.
        qkv, qkv_bias: (3, E / 4, 4, 4), [out, in] of each block, and (3, E).
        gates_c, gates_x, gates_bias: (2 H, E) twice and (2 H), in the accumulator's type.
        grid, origin: (rows, columns) of tokens, and the tap on the token itself.

    Returns:
        c, q, k and v in x's dtype, i and f in the accumulator's.
    """
    wide = widest_dtype(x)
    H = len(gates_bias) // 2
    c = F.silu(_before_silu(_on_grid(x, taps, grid, origin), taps, conv_bias))
    c = c.flatten(2).transpose(1, 2).contiguous()
    x_ = x.to(wide)
    q, k, v = (
        _blocks(of, weight.to(wide), bias.to(wide)).to(x.dtype).unflatten(2, (H, -1))
        for of, weight, bias in zip((c, c, x_), qkv, qkv_bias, strict=True)
    )
    gates = (c @ gates_c.mT + x_ @ gates_x.mT + gates_bias).to(wide)
    i, f = (part.clone(memory_format=torch.contiguous_format) for part in gates.chunk(2, -1))
    return c.to(x.dtype), q, k, v, i, f


def pre_backward(
    dc, dq, dk, dv, di, df, x, c, taps, conv_bias, qkv, gates_c, gates_x, grid, origin, dx
):
    """Writes dx (B, L, E).

    Args:
        dc, dq, dk, dv, di, df: Gradients of what `pre` returns, in the same types.
        dx: To be written, perhaps not contiguous.

    Returns:
        Gradients of taps, conv_bias, qkv, qkv_bias, gates_c, gates_x and gates_bias, in the
        accumulator's type.
    """
    wide = widest_dtype(x)
    blocks = (-1, qkv.shape[2])
    x_, c_ = x.to(wide), c.to(wide)
    dqkv = [d.to(wide).flatten(2) for d in (dq, dk, dv)]
    dgates = torch.cat([di, df], -1).to(wide)

    inputs = (x.unflatten(2, blocks) for x in (c_, c_, x_))
    outputs = [d.unflatten(2, blocks) for d in dqkv]
    dqkv_weight = [
        torch.einsum('blgo,blgd->god', *pair) for pair in zip(outputs, inputs, strict=True)
    ]
    dqkv_bias = torch.stack([d.sum((0, 1)) for d in dqkv])
    from_q, from_k, from_v = (
        torch.einsum('blgo,god->blgd', d, weight.to(wide)).flatten(2)
        for d, weight in zip(outputs, qkv, strict=True)
    )
    dgates_c, dgates_x = (torch.einsum('blj,ble->je', dgates, of) for of in (c_, x_))

    dc = dc.to(wide) + from_q + from_k + dgates @ gates_c
    padded = _on_grid(x, taps, grid, origin)
    before = _before_silu(padded, taps, conv_bias)
    dbefore = torch.ops.aten.silu_backward(dc.transpose(1, 2).unflatten(2, grid), before)
    ones, zeros = [1, 1], [0, 0]
    dpadded, dtaps, dconv_bias = torch.ops.aten.convolution_backward(
        dbefore.contiguous(),
        padded,
        taps.to(wide).unsqueeze(1),
        [len(taps)],
        ones,
        zeros,
        ones,
        False,
        zeros,
        len(taps),
        [True] * 3,
    )
    (top, left), (rows, columns) = origin, grid
    through = dpadded[:, :, top : top + rows, left : left + columns].flatten(2).transpose(1, 2)
    dx.copy_(through + from_v + dgates @ gates_x)
    return (
        dtaps.squeeze(1),
        dconv_bias,
        torch.stack(dqkv_weight),
        dqkv_bias,
        dgates_c,
        dgates_x,
        dgates.sum((0, 1)),
    )


def _normalized(h, eps):
    """h (B, L, H, Dh) with mean 0 and variance 1 over Dh, and what it was divided by."""
    h = h.to(widest_dtype(h))
    variance, mean = torch.var_mean(h, -1, correction=0, keepdim=True)
    r = (variance + eps).rsqrt()
    return (h - mean) * r, r


def post(h, c, z, norm_weight, norm_bias, skip, eps):
    """(norm(h) ⊙ norm_weight + norm_bias + skip ⊙ c) ⊙ SiLU(z), (B, L, E) in h's dtype.

    Args:
        h: (B, L, H, Dh); the norm is over Dh.
        c, z: (B, L, E).
        norm_weight, norm_bias, skip: (E).
        eps: of the norm.
    """
    normalized, _ = _normalized(h, eps)
    dtype = normalized.dtype
    w, b, s, c, z = (x.to(dtype) for x in (norm_weight, norm_bias, skip, c, z))
    return ((normalized.flatten(2) * w + b + s * c) * F.silu(z)).to(h.dtype)


def post_backward(dy, h, c, z, norm_weight, norm_bias, skip, eps, dz):
    """Writes dz (B, L, E), perhaps not contiguous.

    Returns:
        The output once more, the gradients of h and c in their dtype, and those of norm_weight,
        norm_bias and skip in the accumulator's.
    """
    normalized, r = _normalized(h, eps)
    dtype, shape = normalized.dtype, h.shape
    w, b, s, c_, z, dy = (x.to(dtype) for x in (norm_weight, norm_bias, skip, c, z, dy))
    before = normalized.flatten(2) * w + b + s * c_
    gate = F.silu(z)
    dz.copy_(torch.ops.aten.silu_backward(dy * before, z))
    dbefore = dy * gate
    dskip, dnorm_bias = (dbefore * c_).sum((0, 1)), dbefore.sum((0, 1))
    dnorm_weight = (dbefore * normalized.flatten(2)).sum((0, 1))
    dnormalized = (dbefore * w).view(shape)
    dh = dnormalized - dnormalized.mean(-1, keepdim=True)
    dh = r * (dh - normalized * (dnormalized * normalized).mean(-1, keepdim=True))
    grads = dh.to(h.dtype), (dbefore * s).to(c.dtype), dnorm_weight, dnorm_bias, dskip
    return (before * gate).to(h.dtype), *grads
