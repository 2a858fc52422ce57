"""The rotation in plain PyTorch."""

import torch

from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.rotary_2d import frequencies


def rotate(q, k, inverse):
    """q and k (B, h, w, H, Dh) turned, with `inverse` the other way round."""
    _, h, w, _, Dh = q.shape
    dtype = widest_dtype(q)
    theta = frequencies(Dh, q.device, dtype)
    rows = torch.arange(h, device=q.device, dtype=dtype)[:, None] * theta
    columns = torch.arange(w, device=q.device, dtype=dtype)[:, None] * theta
    angles = torch.cat([rows[:, None].expand(h, w, -1), columns.expand(h, w, -1)], -1)[:, :, None]
    sin, cos = angles.sin(), angles.cos()
    if inverse:
        sin = -sin

    def turn(x):
        even, odd = x[..., ::2], x[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        return turned.flatten(-2).to(x.dtype)

    return turn(q), turn(k)
