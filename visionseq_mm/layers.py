"""Small layers that backbones and necks share."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from torch import nn

from visionseq_mm.registry import MODELS


@MODELS.register_module()
class LN2d(nn.LayerNorm):
    """LayerNorm over the channels of a map.

    Args:
        num_channels (int): Channels of the input.
        eps (float): Added to the variance.

    Shape:
        (B, C, H, W) -> (B, C, H, W), normalised over C at each position.
    """

    def __init__(self, num_channels, eps=1e-6):
        super().__init__(num_channels, eps=eps)

    def forward(self, x):
        x = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


def build_map_norm(cfg, num_channels):
    """Build the norm layer that ``cfg`` describes for (B, C, H, W) maps.

    Args:
        cfg (dict): A norm config of mmcv, e.g. ``dict(type='BN')`` or
            ``dict(type='visionseq_mm.LN2d', eps=1e-6)``.
        num_channels (int): Channels of the maps.

    Raises:
        ValueError: For anything but a dict with a type, and for ``type='LN'``,
            which normalises the last axis of what it gets: the width of a map.
    """
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        raise ValueError(
            "a norm config is a dict with a type, e.g. dict(type='visionseq_mm.LN2d', eps=1e-6), "
            f'got {cfg!r}'
        )
    if cfg['type'] in ('LN', nn.LayerNorm):
        raise ValueError(
            "norm config dict(type='LN') does not fit (B, C, H, W) maps: torch's LayerNorm "
            "normalises the last axis. Use dict(type='visionseq_mm.LN2d', eps=1e-6), which "
            'normalises over the channels.'
        )
    return build_norm_layer(cfg, num_channels)[1]


def resize_grid(table, grid):
    """Resize a table of position embeddings to another token grid.

    Bicubic without aligned corners and without antialiasing, as all three
    official implementations do; in the table's own dtype, at least float32.

    Args:
        table (Tensor): (1, h, w, D).
        grid (tuple[int, int]): (h', w').

    Returns:
        Tensor: (1, h', w', D) in the dtype of the table; the table itself
        where the grid is the same.
    """
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    dtype = torch.promote_types(table.dtype, torch.float32)
    resized = F.interpolate(
        table.permute(0, 3, 1, 2).to(dtype), size=tuple(grid), mode='bicubic', align_corners=False
    )
    return resized.permute(0, 2, 3, 1).to(table.dtype)
