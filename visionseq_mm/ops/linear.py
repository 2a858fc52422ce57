"""Dense projections inside the ops, and their gradients.

On a CPU torch multiplies float32 with MKL, which left half of the vector units idle of the AMD
processor that this was measured on. oneDNN, which torch ships as well, does not, and torch's
compiler calls it in the way that is used here.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


@cache
def _works() -> bool:
    """Whether oneDNN is there, with registers of 64 bytes, and answers as expected."""
    if torch.backends.cpu.get_cpu_capability() != 'AVX512':
        return False
    x = torch.ones(1, 2)
    try:
        return bool(torch.ops.mkldnn._linear_pointwise(x, x, x[0, :1], 'none', [], '') == 3)
    except (AttributeError, RuntimeError):
        return False


def _on_onednn(*tensors: Tensor) -> bool:
    if any(x.dtype != torch.float32 or x.device.type != 'cpu' for x in tensors):
        return False
    return torch._C._get_mkldnn_enabled() and _works()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x weightᵀ + bias, (…, M) and (N, M) to (…, N)."""
    if _on_onednn(x, weight):
        x, weight = _dense(x), _dense(weight)
        bias = None if bias is None else bias.contiguous()  # its stride is not looked at
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


def _dense(x):
    """Columns of a wider tensor take oneDNN hundreds of times as long."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def linears(x: Tensor, weight: Tensor) -> Tensor:
    """A `linear` for each direction: (S, …, M) and (S, N, M) to (S, …, N)."""
    if _on_onednn(x, weight):
        return torch.stack([linear(*pair) for pair in zip(x, weight, strict=True)])
    return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])


def add_linears(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds `linears` to `out`, which is contiguous."""
    if _on_onednn(x, weight):
        for out_s, *pair in zip(out, x, weight, strict=True):
            out_s += linear(*pair)
    else:
        out.flatten(1, -2).baddbmm_(x.flatten(1, -2), weight.mT)


def input_gradient(dout: Tensor, weight: Tensor) -> Tensor:
    """Of `linear`: dout weight, (…, N) and (N, M) to (…, M)."""
    return linear(dout, weight.mT)


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """Of `linear`: doutᵀ x over all tokens, (…, N) and (…, M) to (N, M)."""
    dout, x = dout.flatten(0, -2).mT, x.flatten(0, -2).mT
    if _on_onednn(dout, x) and len(dout) > len(x):  # the faster order of the two
        return linear(x, dout).mT
    return linear(dout, x)


def weight_gradients(dout: Tensor, x: Tensor) -> Tensor:
    """Of `linears`: (S, …, N) and (S, …, M) to (S, N, M)."""
    if _on_onednn(dout, x):
        return torch.stack([weight_gradient(*pair) for pair in zip(dout, x, strict=True)])
    return torch.bmm(dout.flatten(1, -2).mT, x.flatten(1, -2))
