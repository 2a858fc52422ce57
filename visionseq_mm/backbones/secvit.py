"""SecViT: Semantic Equitable Clustering (Fan et al., 2024, arXiv 2405.13337).

A four-stage pyramid. Attention runs within clusters of equal size, made anew
in each block and head by sorting the tokens by the cosine between their key
and the mean key:

    x <- x + CPE(x);   x <- x + Attention(LN(x));   x <- x + FFN(LN(x))

Maps lie channels last in memory, so that they are tokens (B, h, w, C) too.

Shapes: B batch, C channels of the stage, (h, w) its grid, H heads of Dh = C / H
channels; ``valid`` (B, h, w) says where a map is not padding, None that it is
nowhere.
"""

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import nn

from visionseq_mm import checkpoints
from visionseq_mm.backbones.base import (
    ClusterPyramid,
    halve,
    hide,
    mean_of_valid,
)
from visionseq_mm.layers import LN2d
from visionseq_mm.ops import cluster_attention, depthwise_conv2d, rotary_2d
from visionseq_mm.registry import MODELS


def depthwise(conv, x, residual=False):
    """A depth-wise ``conv`` of a map (B, C, h, w), plus the map with ``residual``."""
    tokens = x.permute(0, 2, 3, 1)
    return depthwise_conv2d(tokens, conv.weight, conv.bias, residual).permute(0, 3, 1, 2)


class ClusterAttention(nn.Module):
    """Attention within clusters, plus a 5x5 depth-wise convolution of the values.

    (B, C, h, w) -> (B, C, h, w).
    """

    def __init__(self, embed_dims, num_heads, num_clusters):
        super().__init__()
        self.num_heads = num_heads
        self.num_clusters = num_clusters
        self.qkv = nn.Conv2d(embed_dims, 3 * embed_dims, 1)
        self.lepe = nn.Conv2d(embed_dims, embed_dims, 5, padding=2, groups=embed_dims)
        self.out_proj = nn.Conv2d(embed_dims, embed_dims, 1)

    def forward(self, x, valid):
        qkv = self.qkv(x)
        lepe = depthwise(self.lepe, hide(qkv.chunk(3, dim=1)[2], valid))
        tokens = qkv.permute(0, 2, 3, 1).unflatten(3, (3, self.num_heads, -1))
        q, k, v = tokens.unbind(3)  # (B, h, w, H, Dh)
        q, k = rotary_2d(q, k)
        lepe = lepe.permute(0, 2, 3, 1).view(q.shape)
        q, k, v, lepe = (t.flatten(1, 2) for t in (q, k, v, lepe))
        out = cluster_attention(
            q,
            k,
            v,
            min(self.num_clusters, q.shape[1]),
            None if valid is None else valid.flatten(1),
            lepe=lepe,
        )
        return self.out_proj(out.flatten(2).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


class FFN(nn.Module):
    """1x1 convolution to 3 C, GELU, residual 3x3 depth-wise convolution, 1x1 back."""

    def __init__(self, embed_dims):
        super().__init__()
        inner = 3 * embed_dims
        self.fc1 = nn.Conv2d(embed_dims, inner, 1)
        self.dwconv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.fc2 = nn.Conv2d(inner, embed_dims, 1)

    def forward(self, x, valid):
        x = hide(F.gelu(self.fc1(x)), valid)
        return self.fc2(depthwise(self.dwconv, x, residual=True))


class SecViTBlock(nn.Module):
    """Position convolution, cluster attention and FFN: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, embed_dims, num_heads, num_clusters, drop_path_rate, layer_scale):
        super().__init__()
        self.pos = nn.Conv2d(embed_dims, embed_dims, 3, padding=1, groups=embed_dims)
        self.norm1 = LN2d(embed_dims, eps=1e-6)
        self.attn = ClusterAttention(embed_dims, num_heads, num_clusters)
        self.norm2 = LN2d(embed_dims, eps=1e-6)
        self.ffn = FFN(embed_dims)
        self.drop_path = DropPath(drop_path_rate)
        self.layer_scale = layer_scale
        if layer_scale:
            self.gamma_1, self.gamma_2 = (
                nn.Parameter(torch.full((1, embed_dims, 1, 1), 1e-6)) for _ in range(2)
            )

    def forward(self, x, valid):
        x = depthwise(self.pos, x, residual=True)
        attended = self.attn(self.norm1(x), valid)
        x = x + self.drop_path(self.gamma_1 * attended if self.layer_scale else attended)
        mixed = self.ffn(self.norm2(x), valid)
        x = x + self.drop_path(self.gamma_2 * mixed if self.layer_scale else mixed)
        return hide(x, valid)


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and BN: (B, C, h, w) -> (B, C', ceil(h / 2), ceil(w / 2))."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.reduction = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x, valid):
        valid = halve(valid)
        return hide(self.norm(self.reduction(x)), valid), valid


class Stem(nn.Module):
    """Four 3x3 convolutions with BN, two of stride 2: (B, 3, H, W) -> (B, C, ceil(H / 4), ...)."""

    def __init__(self, embed_dims):
        super().__init__()
        half = embed_dims // 2
        layers = []
        for c_in, c_out, stride in (
            (3, half, 2),
            (half, half, 1),
            (half, half, 1),
            (half, embed_dims, 2),
        ):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])  # no activation at the end

    def forward(self, x, valid):
        for layer in self.proj:
            if isinstance(layer, nn.Conv2d):
                x = hide(x, valid)
                valid = halve(valid) if layer.stride == (2, 2) else valid
            x = layer(x)
        return hide(x, valid), valid


@MODELS.register_module()
class SecViT(ClusterPyramid):
    """SecViT.

    Args:
        arch (str | dict): 'tiny', 'small', 'base' or 'large', or a dict with
            ``embed_dims``, ``depths``, ``num_heads`` and ``layer_scale``, four
            each; ``layer_scale`` says which stages have one.
        num_clusters (Sequence[int]): Clusters of each stage's attention; 1 is
            full attention. A stage with fewer tokens uses as many as it has.
        norm_eval (bool): Keep the BN statistics fixed in training.
        out_indices (int | Sequence[int] | None): Stages to return, from the
            end of the stage, before its downsampling. None: all four.
        out_type (str): 'featmap', a tuple of (B, C, h, w) maps of strides 4,
            8, 16 and 32, or 'cls', a 1-tuple of the vector (B, 1024) that a
            linear head multiplies.
        out_norm (dict | None): Norm config for the maps, one layer each, e.g.
            ``dict(type='visionseq_mm.LN2d', eps=1e-6)``.
        drop_path_rate (float): Last value of a linear ramp over the blocks.
        frozen_stages (int): -1 nothing, 0 the stem, k the first k stages too,
            each with its downsampling.
        with_cp (bool): Recompute each block in the backward pass.
        recompute (str): 'kernel' keeps of each block its input, its clusters
            and what attention gave, and computes the rest again in the
            backward pass; 'none' keeps all. Without effect with ``with_cp``.
        mask_padding (bool): Take a fourth channel that says where an image is
            padded, and keep the padding out of clusters and convolutions; see
            :class:`ClusterPyramid`.
        min_matched (float): See :class:`SequenceBackbone`.
        init_cfg (dict | None): e.g. ``dict(type='Pretrained',
            checkpoint='SecViT-S.pth')``.

    Shape:
        (B, 3, H, W) -> (B, C, ceil(H / 4), ceil(W / 4)), then halved with
        ceil from stage to stage. Nothing is padded. With ``mask_padding``
        (B, 4, H, W).

    Raises:
        ValueError: For unknown names and ill-sized settings, or images
            without 3 channels (4).
    """

    arch_zoo = {
        'tiny': dict(
            embed_dims=(64, 128, 256, 512),
            depths=(2, 2, 9, 2),
            num_heads=(2, 4, 8, 16),
            layer_scale=(False, False, False, False),
        ),
        'small': dict(
            embed_dims=(64, 128, 256, 512),
            depths=(3, 4, 18, 4),
            num_heads=(2, 4, 8, 16),
            layer_scale=(False, False, False, False),
        ),
        'base': dict(
            embed_dims=(80, 160, 320, 512),
            depths=(4, 8, 26, 8),
            num_heads=(5, 5, 10, 16),
            layer_scale=(False, False, True, True),
        ),
        'large': dict(
            embed_dims=(112, 224, 448, 640),
            depths=(4, 8, 26, 8),
            num_heads=(7, 7, 14, 20),
            layer_scale=(False, False, True, True),
        ),
    }
    official_names = checkpoints.SECVIT
    cls_only = ('proj', 'final_norm')
    undecayed = ('gamma_1', 'gamma_2')
    num_features = 1024  # width of the 'cls' vector

    def __init__(
        self,
        arch='tiny',
        num_clusters=(32, 8, 2, 1),
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
        keys = ('embed_dims', 'depths', 'num_heads', 'layer_scale')
        settings = self.resolve_stages(arch, dict.fromkeys(keys, 4), num_clusters)
        self.embed_dims = tuple(settings['embed_dims'])
        self.depths = tuple(settings['depths'])
        for dims, heads in zip(self.embed_dims, settings['num_heads'], strict=True):
            if dims % heads or (dims // heads) % 4:
                raise ValueError(
                    'embed_dims / num_heads must be a multiple of 4 for the rotary embedding, '
                    f'got {dims} / {heads}'
                )
        self.norm_eval = norm_eval
        self.out_indices = self.resolve_outputs(out_indices, 4, range(4), out_norm=out_norm)

        self.patch_embed = Stem(self.embed_dims[0])

        def block(i, rate):
            return SecViTBlock(
                self.embed_dims[i],
                settings['num_heads'][i],
                num_clusters[i],
                rate,
                settings['layer_scale'][i],
            )

        self.stages = self.build_stages(block, Downsample, drop_path_rate)
        if out_type == 'cls':
            self.proj = nn.Conv2d(self.embed_dims[3], self.num_features, 1)
            self.final_norm = nn.BatchNorm2d(self.num_features)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        self.finish_init(out_norm, [self.embed_dims[i] for i in self.out_indices])

    def pool(self, x, valid):
        return mean_of_valid(F.silu(self.final_norm(self.proj(x))), valid)

    # ------------------------------------------------------------ checkpoints

    def prefer_ema(self):
        return self.arch in ('small', 'base', 'large')
