"""The rotation in Numba, a vector of channels of a token at a time.

B batch, (h, w) a grid of tokens, H heads, N channels of a head in whole vectors.
"""

import torch
import torch.nn.functional as F
from llvmlite import ir
from numba.extending import intrinsic

from visionseq_mm.ops import threads
from visionseq_mm.ops.channels import Channels
from visionseq_mm.ops.common import widest_dtype
from visionseq_mm.ops.rotary_2d import frequencies
from visionseq_mm.ops.simd import BYTES, fma, jit, load, store


@intrinsic
def _exchange(typing, x):
    """A vector with the lanes of each pair in each other's place."""

    def generate(context, builder, signature, args):
        lanes = ir.VectorType(ir.IntType(32), x.lanes)
        mask = ir.Constant(lanes, [i ^ 1 for i in range(x.lanes)])
        return builder.shuffle_vector(args[0], args[0], mask)

    return x(x), generate


@jit
def _rotate(first, last, x, rows, columns, out):
    """Tasks: rows of the grids. At a channel one of the tables is 0, the other has its angle."""
    _, h, w, H, N = x.shape
    lanes = BYTES // x.itemsize
    for task in range(first, last):
        b, i = task // h, task % h
        for j in range(w):
            for d in range(0, N, lanes):
                cos = load(rows, (0, i, d)) + load(columns, (0, j, d))
                sin = load(rows, (1, i, d)) + load(columns, (1, j, d))
                for n in range(H):
                    pairs = load(x, (b, i, j, n, d))
                    turned = fma(pairs, cos, _exchange(pairs) * sin)
                    store(out, (b, i, j, n, d), turned)


def rotate(q, k, inverse):
    """q and k (B, h, w, H, Dh) turned, with `inverse` the other way round."""
    B, h, w, _, Dh = q.shape
    channels = Channels(Dh, widest_dtype(q))
    theta = frequencies(Dh, q.device, channels.dtype).repeat_interleave(2)

    def table(positions, *beside):
        """Cosines and sines (2, positions, N), those of even channels with the other sign."""
        angles = torch.arange(positions, dtype=channels.dtype)[:, None] * theta
        sin = angles.sin()
        sin[:, int(inverse) :: 2] *= -1
        return channels.array(F.pad(torch.stack([angles.cos(), sin]), beside))

    rows, columns = table(h, 0, Dh // 2), table(w, Dh // 2, 0)

    def turn(x):
        out = channels.new(*x.shape[:4])
        threads.run(_rotate, B * h, channels.array(x), rows, columns, out.numpy())
        return channels.cut(out).to(x.dtype).contiguous()

    return turn(q), turn(k)
