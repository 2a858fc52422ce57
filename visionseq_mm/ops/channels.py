"""From PyTorch's tensors to the arrays of Numba's kernels and back."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visionseq_mm.ops.simd import BYTES


class Channels:
    """Tensors as arrays of one dtype, the channels in their last dimension in whole vectors."""

    def __init__(self, count: int, dtype: torch.dtype):
        self.count = count
        self.dtype = dtype
        self.lanes = BYTES // dtype.itemsize
        self.width = -(-count // self.lanes) * self.lanes

    def array(self, x: Tensor | None) -> np.ndarray | None:
        """Padded with zeros where need be; else the tensor's memory, where its dtype allows."""
        if x is None or self.width == self.count:
            return self.plain(x)
        return self.plain(F.pad(x, (0, self.width - self.count)))

    def plain(self, x: Tensor | None) -> np.ndarray | None:
        """Of a tensor without channels."""
        if x is None:
            return None
        x = x.detach().to(self.dtype)
        return (x if x.stride(-1) == 1 else x.contiguous()).numpy()

    def new(self, *shape: int) -> Tensor:
        """Empty, with channels behind the dimensions of `shape`."""
        return torch.empty((*shape, self.width), dtype=self.dtype)

    def cut(self, x: Tensor) -> Tensor:
        """Without what was padded."""
        return x[..., : self.count]
