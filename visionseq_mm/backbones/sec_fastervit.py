"""SEC-FasterViT: FasterViT with semantic equitable clustering in place of windows.

A host of the strict comparison in SecViT's paper (Fan et al., 2024, arXiv
2405.13337): FasterViT (Hatamizadeh et al., 2023, arXiv 2306.06189) with
nothing added. Two stages of convolutions,

    x <- x + BN(Conv(GELU(BN(Conv(x)))))

and two of SEC-Swin's blocks, which is what its hierarchical attention becomes
without the parts that a window has: carrier tokens and the MLPs of positions.

Shapes: as in ``secvit.py``.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint

from visionseq_mm.backbones.base import (
    ClusterPyramid,
    halve,
    hide,
    mean_of_valid,
)
from visionseq_mm.backbones.sec_swin import ClusterBlock, init_linears
from visionseq_mm.layers import LN2d
from visionseq_mm.registry import MODELS


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with BN: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, embed_dims, drop_path_rate):
        super().__init__()
        self.conv1 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(embed_dims)
        self.conv2 = nn.Conv2d(embed_dims, embed_dims, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(embed_dims)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x, valid):
        inner = hide(F.gelu(self.norm1(self.conv1(x))), valid)
        return hide(x + self.drop_path(self.norm2(self.conv2(inner))), valid)


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, stem_dims, embed_dims):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_dims, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(stem_dims, eps=1e-4)
        self.conv2 = nn.Conv2d(stem_dims, embed_dims, 3, 2, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(embed_dims, eps=1e-4)

    def forward(self, x, valid):
        valid = halve(valid)
        x = hide(F.relu(self.norm1(self.conv1(x))), valid)
        valid = halve(valid)
        return hide(F.relu(self.norm2(self.conv2(x))), valid), valid


class Downsample(nn.Module):
    """LN and a 3x3 convolution of stride 2: (B, C, h, w) -> (B, C', ceil(h / 2), ceil(w / 2))."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm = LN2d(in_channels, eps=1e-6)
        self.reduction = nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)

    def forward(self, x, valid):
        x = hide(self.norm(x), valid)
        valid = halve(valid)
        return hide(self.reduction(x), valid), valid


@contextmanager
def buffers_restored(module):
    """Undoes at its end what happened to the buffers of ``module``, such as running statistics."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)


@MODELS.register_module()
class SECFasterViT(ClusterPyramid):
    """SEC-FasterViT.

    Args:
        arch (str | dict): 'tiny' or 'small', which are FasterViT-0 and -1, or
            a dict with ``stem_dims``, a number, ``embed_dims`` and ``depths``,
            four each, and ``num_heads`` of the last two stages.
        num_clusters (Sequence[int]): Clusters of the last two stages'
            attention; 1 is full attention. A stage with fewer tokens uses as
            many as it has.
        norm_eval (bool): Keep the BN statistics fixed in training.
        out_indices (int | Sequence[int] | None): Stages to return, from the
            end of the stage, before its downsampling. None: all four.
        out_type (str): 'featmap', a tuple of (B, C, h, w) maps of strides 4,
            8, 16 and 32, or 'cls', a 1-tuple of the vector that a linear head
            multiplies: the mean of the tokens after a BN.
        out_norm (dict | None): Norm config for the maps, one layer each, e.g.
            ``dict(type='BN')``, as FasterViT's detectors have it.
        drop_path_rate, frozen_stages, mask_padding: See :class:`SecViT`.
        with_cp (bool): Recompute each block in the backward pass; the
            statistics of a BN count a batch once all the same.
        recompute (str): 'kernel' keeps of each block with attention its
            input, its clusters and what attention gave, and computes the rest
            again; 'none' keeps all. Without effect with ``with_cp``.
        min_matched (float): See :class:`SequenceBackbone`.
        init_cfg (dict | None): See mmengine's BaseModule.

    Shape:
        (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4)), then halved with
        ceil from stage to stage. With ``mask_padding`` (B, 4, H, W).

    Raises:
        ValueError: For unknown names and ill-sized settings, or images
            without 3 channels (4).
    """

    arch_zoo = {
        'tiny': dict(
            stem_dims=64,
            embed_dims=(64, 128, 256, 512),
            depths=(2, 3, 6, 5),
            num_heads=(8, 16),
        ),
        'small': dict(
            stem_dims=32,
            embed_dims=(80, 160, 320, 640),
            depths=(1, 3, 8, 5),
            num_heads=(8, 16),
        ),
    }

    def __init__(
        self,
        arch='tiny',
        num_clusters=(2, 1),
        norm_eval=False,
        out_indices=None,
        out_type='featmap',
        out_norm=None,
        drop_path_rate=0.0,
        frozen_stages=-1,
        with_cp=False,
        recompute='none',
        mask_padding=False,
        min_matched=0.95,
        init_cfg=None,
    ):
        super().__init__(
            out_type, frozen_stages, with_cp, recompute, mask_padding, min_matched, init_cfg
        )
        self.arch = arch
        counts = dict(stem_dims=None, embed_dims=4, depths=4, num_heads=2)
        settings = self.resolve_stages(arch, counts, num_clusters)
        dims = self.embed_dims = tuple(settings['embed_dims'])
        self.depths = tuple(settings['depths'])
        self.norm_eval = norm_eval
        self.out_indices = self.resolve_outputs(out_indices, 4, range(4), out_norm=out_norm)

        def block(i, rate):
            if i < 2:
                return ConvBlock(dims[i], rate)
            return ClusterBlock(dims[i], settings['num_heads'][i - 2], num_clusters[i - 2], rate)

        self.patch_embed = Stem(settings['stem_dims'], dims[0])
        self.stages = self.build_stages(block, Downsample, drop_path_rate)
        if out_type == 'cls':
            self.num_features = dims[3]
            self.final_norm = nn.BatchNorm2d(dims[3])
        init_linears(self)
        self.finish_init(out_norm, [dims[i] for i in self.out_indices])

    def run(self, block, *inputs):
        if not isinstance(block, ConvBlock):
            return super().run(block, *inputs)
        if not self.with_cp or not torch.is_grad_enabled():
            return block(*inputs)
        if torch.compiler.is_compiling():  # which computes no change of a buffer again
            return checkpoint(block, *inputs, use_reentrant=False)
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), buffers_restored(block)),
        )

    def pool(self, x, valid):
        return mean_of_valid(self.final_norm(x), valid)
