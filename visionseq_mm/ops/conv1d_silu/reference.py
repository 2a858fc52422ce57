"""The convolution in plain PyTorch: one shifted multiply-add for each tap."""

import torch
import torch.nn.functional as F

from visionseq_mm.ops.common import widest_dtype


def _taps(x, weight, reverse):
    """(weight (D), source, target): the tap adds weight ⊙ x[:, source] to u[:, target]."""
    W, L = weight.shape[1], x.shape[1]
    for k in range(W):
        away = min(W - 1 - k, L)
        early, late = slice(0, L - away), slice(away, L)
        yield (weight[:, k], late, early) if reverse else (weight[:, k], early, late)


def _before_silu(x, weight, bias, reverse):
    out = bias.to(x.dtype).expand(x.shape).clone()
    for w, source, target in _taps(x, weight, reverse):
        out[:, target].addcmul_(x[:, source], w)
    return out


def forward(x, weight, bias, reverse):
    """(S, B, L, D)."""
    dtype = widest_dtype(x, weight)
    out = x.new_empty((len(reverse), *x.shape))
    wide, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    for s, backwards in enumerate(reverse):
        out[s] = F.silu(_before_silu(wide, weight[s], bias[s], backwards))
    return out


def backward(du, x, weight, bias, reverse, dx):
    """Writes the gradient of x (B, L, D), and returns those of weight and bias."""
    dtype = widest_dtype(x, weight)
    dweight, dbias = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    wide, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    total = torch.zeros_like(wide)
    for s, backwards in enumerate(reverse):
        before = _before_silu(wide, weight[s], bias[s], backwards)
        dout = torch.ops.aten.silu_backward(du[s].to(dtype), before)
        dbias[s] = dout.sum((0, 1))
        for k, (w, source, target) in enumerate(_taps(wide, weight[s], backwards)):
            total[:, source].addcmul_(dout[:, target], w)
            dweight[s, :, k] = (dout[:, target] * wide[:, source]).sum((0, 1))
    dx.copy_(total)
    return dweight, dbias
