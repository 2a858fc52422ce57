"""SEC-Swin: Swin with semantic equitable clustering in place of windows.

A host of the strict comparison in SecViT's paper (Fan et al., 2024, arXiv
2405.13337): Swin (Liu et al., 2021, arXiv 2103.14030) with nothing added, and
without its position biases and shifts, for a cluster is no window and has no
geometry:

    x <- x + ClusterMSA(LN(x));   x <- x + FFN(LN(x))

Shapes: as in ``secvit.py``.
"""

from mmcv.cnn.bricks import DropPath, transformer
from torch import nn

from visionseq_mm import checkpoints
from visionseq_mm.backbones.base import (
    ClusterPyramid,
    halve,
    hide,
    mean_of_valid,
)
from visionseq_mm.layers import LN2d
from visionseq_mm.ops import cluster_attention
from visionseq_mm.registry import MODELS


class ClusterMSA(nn.Module):
    """Multi-head attention within clusters: (B, h, w, C) -> (B, h, w, C).

    Raises:
        ValueError: For channels that ``num_heads`` does not divide.
    """

    def __init__(self, embed_dims, num_heads, num_clusters):
        super().__init__()
        if embed_dims % num_heads:
            raise ValueError(
                f'embed_dims must be a multiple of num_heads, got {embed_dims} and {num_heads}'
            )
        self.num_heads = num_heads
        self.num_clusters = num_clusters
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x, valid):
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.unbind(2)  # (B, L, H, Dh)
        num_clusters = min(self.num_clusters, q.shape[1])
        valid = None if valid is None else valid.flatten(1)
        out = cluster_attention(q, k, v, num_clusters, valid)
        return self.proj(out.flatten(2)).view(x.shape)


class ClusterBlock(nn.Module):
    """Swin's block with :class:`ClusterMSA`: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, embed_dims, num_heads, num_clusters, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims)
        self.attn = ClusterMSA(embed_dims, num_heads, num_clusters)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.ffn = transformer.FFN(
            embed_dims, 4 * embed_dims, act_cfg=dict(type='GELU'), add_identity=False
        )
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x, valid):
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x), valid))
        x = x + self.drop_path(self.ffn(self.norm2(x)))
        return hide(x.permute(0, 3, 1, 2), valid)


def to_map(tokens, hw):
    """(B, L, C) -> (B, C, h, w), channels last in memory."""
    return tokens.unflatten(1, hw).permute(0, 3, 1, 2)


class PatchEmbed(transformer.PatchEmbed):
    """4x4 patches and LN: (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, embed_dims):
        super().__init__(embed_dims=embed_dims, kernel_size=4, stride=4, norm_cfg=dict(type='LN'))

    def forward(self, x, valid):
        valid = halve(halve(valid))
        return hide(to_map(*super().forward(x)), valid), valid


class PatchMerging(transformer.PatchMerging):
    """2x2 tokens, LN and a matrix: (B, C, h, w) -> (B, C', ceil(h / 2), ceil(w / 2))."""

    def forward(self, x, valid):
        valid = halve(valid)
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        return hide(to_map(*super().forward(tokens, x.shape[2:])), valid), valid


def init_linears(module):
    """Swin's initial weights of all linear layers in ``module``; FasterViT's are the same."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


@MODELS.register_module()
class SECSwin(ClusterPyramid):
    """SEC-Swin.

    The names of mmpretrain's, mmdet's and mmseg's Swin load, position biases
    left out: a start for training, not a model of the same accuracy.

    Args:
        arch (str | dict): 'tiny' or 'small', or a dict with ``embed_dims``,
            ``depths`` and ``num_heads``, four each.
        num_clusters (Sequence[int]): Clusters of each stage's attention; 1 is
            full attention. A stage with fewer tokens uses as many as it has.
        out_indices (int | Sequence[int] | None): Stages to return, from the
            end of the stage, before its downsampling. None: all four.
        out_type (str): 'featmap', a tuple of (B, C, h, w) maps of strides 4,
            8, 16 and 32, or 'cls', a 1-tuple of the vector that a linear head
            multiplies: the mean of the normed tokens.
        out_norm (dict | None): Norm config for the maps, one layer each; the
            Swin of mmdet and mmseg has
            ``dict(type='visionseq_mm.LN2d', eps=1e-5)``.
        drop_path_rate, frozen_stages, with_cp, recompute, mask_padding: See
            :class:`SecViT`.
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
            embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)
        ),
        'small': dict(
            embed_dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)
        ),
    }
    official_names = checkpoints.SWIN

    def __init__(
        self,
        arch='tiny',
        num_clusters=(32, 8, 2, 1),
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
        counts = dict(embed_dims=4, depths=4, num_heads=4)
        settings = self.resolve_stages(arch, counts, num_clusters)
        dims = self.embed_dims = tuple(settings['embed_dims'])
        self.depths = tuple(settings['depths'])
        self.out_indices = self.resolve_outputs(out_indices, 4, range(4), out_norm=out_norm)

        self.patch_embed = PatchEmbed(dims[0])

        def block(i, rate):
            return ClusterBlock(dims[i], settings['num_heads'][i], num_clusters[i], rate)

        self.stages = self.build_stages(block, PatchMerging, drop_path_rate)
        if out_type == 'cls':
            self.num_features = dims[3]
            self.final_norm = LN2d(dims[3], eps=1e-5)
        init_linears(self)
        self.finish_init(out_norm, [dims[i] for i in self.out_indices])

    def pool(self, x, valid):
        return mean_of_valid(self.final_norm(x), valid)
