"""The parts of the mixer in Numba."""

from visionseq_mm.ops.conv1d_silu.cpu import backward as conv_silu_backward
from visionseq_mm.ops.conv1d_silu.cpu import forward as conv_silu
from visionseq_mm.ops.linear import linears, weight_gradients
from visionseq_mm.ops.selective_scan import cpu
from visionseq_mm.ops.selective_scan.cpu import new_states

__all__ = ['conv_silu', 'conv_silu_backward', 'new_states', 'scan', 'scan_backward']


def scan(u, low, B, C, dt_proj, dt_bias, A, D, z, reverse, keep):
    """The gated mean of the directions (B, L, E), and the states for the backward."""
    return cpu.scan(u, None, low, dt_proj, dt_bias, A, B, C, D, z, reverse, keep)


def scan_backward(dy, u, low, B, C, dt_proj, dt_bias, A, D, z, states, reverse, dz):
    """Writes the gradient of z; returns the output once more and the other gradients."""
    y, du, ddt, dA, dB, dC, dD, dbias = cpu.differentiate(
        dy, u, None, low, dt_proj, dt_bias, A, B, C, D, z, states, reverse, dz
    )
    dlow = linears(ddt, dt_proj.mT)
    ddt_proj = weight_gradients(ddt, low)
    dB, dC, dbias, dA, dD = (
        grad.to(x.dtype) for grad, x in ((dB, B), (dC, C), (dbias, dt_bias), (dA, A), (dD, D))
    )
    return y, du, dlow, dB, dC, ddt_proj, dbias, dA, dD
