"""The parts of the mixer in plain PyTorch."""

import torch

from visionseq_mm.ops.conv1d_silu.reference import backward as conv_silu_backward
from visionseq_mm.ops.conv1d_silu.reference import forward as conv_silu
from visionseq_mm.ops.selective_scan import reference
from visionseq_mm.ops.selective_scan.reference import new_states

__all__ = ['conv_silu', 'conv_silu_backward', 'new_states', 'scan', 'scan_backward']


def scan(u, low, B, C, dt_proj, dt_bias, A, D, z, reverse, keep):
    """The gated mean of the directions (B, L, E), and the states for the backward."""
    dt = _steps(low, dt_proj)
    return reference.forward(u, dt, A, B, C, D, z, dt_bias, reverse)


def scan_backward(dy, u, low, B, C, dt_proj, dt_bias, A, D, z, states, reverse, dz):
    """Writes the gradient of z; returns the output once more and the other gradients."""
    dt = _steps(low, dt_proj)
    grads = [x.new_empty(x.shape) for x in (u, dt, A, B, C, D, dt_bias)]
    y = reference.differentiate(dy, u, dt, A, B, C, D, z, dt_bias, states, reverse, grads, dz)
    du, ddt, dA, dB, dC, dD, dt_bias = grads
    ddt, low = ddt.flatten(1, 2), low.flatten(1, 2)
    dlow = torch.bmm(ddt, dt_proj).view(*u.shape[:3], -1)
    return y, du, dlow, dB, dC, torch.bmm(ddt.mT, low), dt_bias, dA, dD


def _steps(low, dt_proj):
    return torch.bmm(low.flatten(1, 2), dt_proj.mT).unflatten(1, low.shape[1:3])
