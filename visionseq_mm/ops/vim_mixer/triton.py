"""The parts of the mixer in Triton: the step sizes in one kernel, then the scan.

δ_t = softplus(low_t dt_projᵀ + dt_bias)
"""

import torch
import triton
import triton.language as tl

from visionseq_mm.ops.conv1d_silu.triton import backward as conv_silu_backward
from visionseq_mm.ops.conv1d_silu.triton import forward as conv_silu
from visionseq_mm.ops.selective_scan import triton as selective_scan
from visionseq_mm.ops.selective_scan.triton import new_states
from visionseq_mm.ops.triton_common import dense_row, load, row, rows, softplus, store

__all__ = ['conv_silu', 'conv_silu_backward', 'new_states', 'scan', 'scan_backward']

# With the channels, a tile that the tensor cores of a warp group fill. Float32 does without them,
# and takes half, for its registers.
TOKENS = 64
CHANNELS = 128


@triton.jit
def _delta_kernel(
    low_ptr,
    weight_ptr,
    bias_ptr,
    delta_ptr,
    low_row,
    low_token,
    L,
    D,
    batch,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, TOKENS)
    r = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * TOKENS
    sb = tl.program_id(2)
    s = sb // batch
    mask_t, mask_d, mask_r = first + i < L, d < D, r < R
    low = tl.load(
        row(low_ptr, sb, low_row, first, low_token) + i[:, None] * low_token + r[None, :],
        mask=mask_t[:, None] & mask_r[None, :],
        other=0,
    )
    weight = tl.load(
        weight_ptr + (s * D + d)[None, :] * R + r[:, None],
        mask=mask_r[:, None] & mask_d[None, :],
        other=0,
    )
    dt = tl.dot(low, weight, input_precision='ieee') + load(bias_ptr + s * D + d, mask_d)[None, :]
    delta_ptr = dense_row(delta_ptr, sb, first, L, D) + i[:, None] * D + d[None, :]
    store(delta_ptr, softplus(dt), mask_t[:, None] & mask_d[None, :])


def _delta(low, dt_proj, dt_bias):
    """(S, B, L, D) in the dtype of `low`."""
    S, batch, L, _ = low.shape
    D, R = dt_proj.shape[1:]
    delta = low.new_empty((S, batch, L, D))
    low = rows(low)
    tokens = TOKENS // 2 if low.dtype == torch.float32 else TOKENS
    grid = triton.cdiv(D, CHANNELS), triton.cdiv(L, tokens), S * batch
    with torch.cuda.device_of(low):
        _delta_kernel[grid](
            low,
            dt_proj.contiguous(),
            dt_bias.contiguous(),
            delta,
            *low.stride()[:2],
            L,
            D,
            batch,
            R=R,
            BLOCK_R=max(16, triton.next_power_of_2(R)),
            TOKENS=tokens,
            CHANNELS=CHANNELS,
        )
    return delta


def scan(u, low, B, C, dt_proj, dt_bias, A, D, z, reverse, keep):
    """The gated mean of the directions (B, L, D), and the states, which it needs in any case."""
    delta = _delta(low, dt_proj, dt_bias)
    return selective_scan.scan(u, delta, A, B, C, D, z, reverse)


def scan_backward(dy, u, low, B, C, dt_proj, dt_bias, A, D, z, states, reverse, dz):
    """Writes the gradient of z; returns the output once more and the other gradients."""
    delta = _delta(low, dt_proj, dt_bias)
    y, du, ddt, dA, dB, dC, dD, dbias = selective_scan.scan_backward(
        dy, u, delta, A, B, C, D, z, states, reverse, dz
    )
    ddt = ddt.flatten(1, 2)
    dlow = torch.bmm(ddt, dt_proj).view(low.shape)
    ddt_proj = torch.bmm(ddt.mT, low.flatten(1, 2))
    return y, du, dlow, dB, dC, ddt_proj, dbias.to(dt_bias.dtype), dA, dD
