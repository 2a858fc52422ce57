"""Feature pyramids from backbones of one resolution.

Two published forms, for mmdet and mmseg alike: ViTDet's simple feature pyramid
(Li et al., arXiv 2203.16527), in which the last map feeds every level, and
BEiT's (Bao et al., arXiv 2106.08254), in which four maps feed one level each.
"""

from itertools import pairwise

import torch.nn.functional as F
from mmcv.cnn import build_activation_layer
from mmengine.model import BaseModule
from torch import nn

from visionseq_mm.layers import build_map_norm
from visionseq_mm.registry import MODELS


@MODELS.register_module()
class MultiScaleAdapter(BaseModule):
    """Rescale maps of one resolution to a pyramid.

    Args:
        in_channels (int | Sequence[int]): Channels of the incoming maps. An
            int: only the last map is used, for every scale (ViTDet). A list:
            map i feeds scale i (BEiT).
        out_channels (int | None): None keeps the width of each map and adds
            nothing after rescaling (BEiT). A number: the transposed
            convolutions halve the width each time, and a 1x1 and a 3x3
            convolution with norm follow (ViTDet).
        scales (Sequence[float]): Sizes relative to the incoming map, of 4, 2,
            1, 0.5 and 0.25: on a map of stride 16, (4, 2, 1, 0.5) gives
            strides 4, 8, 16 and 32.
        num_outs (int | None): Levels to return. None: one for each scale;
            more adds levels, each a max-pooling of the one before (stride 2).
        norm_cfg (dict): Norm of (B, C, H, W) maps.
        act_cfg (dict): Activation between the two steps of a 4x upsampling.
        init_cfg (dict | list[dict] | None): See mmengine's BaseModule.

    Shape:
        a tuple of (B, C_i, h, w) -> a tuple of ``num_outs`` maps
        (B, out_channels or C_i, scale * h, scale * w); halves are rounded down
        by the max-pooling.

    Raises:
        ValueError: For an unknown scale, a number of maps, scales or levels
            that does not fit, or widths that cannot be halved.
    """

    def __init__(
        self,
        in_channels,
        out_channels=None,
        scales=(4, 2, 1, 0.5),
        num_outs=None,
        norm_cfg=dict(type='visionseq_mm.LN2d', eps=1e-6),
        act_cfg=dict(type='GELU'),
        init_cfg=None,
    ):
        super().__init__(init_cfg)
        self.one_map = isinstance(in_channels, int)
        widths = [in_channels] * len(scales) if self.one_map else list(in_channels)
        if len(widths) != len(scales):
            raise ValueError(
                f'in_channels={in_channels} and scales={tuple(scales)} must have the same '
                'length: map i feeds scale i. Give an int to feed all from the last map.'
            )
        self.num_outs = len(scales) if num_outs is None else num_outs
        if self.num_outs < len(scales):
            raise ValueError(f'num_outs={num_outs} is below the number of scales, {len(scales)}')
        self.in_channels = in_channels
        self.rescale = nn.ModuleList()
        self.project = nn.ModuleList()
        for scale, width in zip(scales, widths, strict=True):
            halve = out_channels is not None
            steps, width = self._rescaling(scale, width, halve, norm_cfg, act_cfg)
            self.rescale.append(steps)
            if out_channels is not None:
                self.project.append(
                    nn.Sequential(
                        nn.Conv2d(width, out_channels, 1, bias=False),
                        build_map_norm(norm_cfg, out_channels),
                        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                        build_map_norm(norm_cfg, out_channels),
                    )
                )

    @staticmethod
    def _rescaling(scale, width, halve, norm_cfg, act_cfg):
        """Layers of one scale, and the width they end with."""
        ups = {4: 2, 2: 1}.get(scale, 0)
        if halve and width % 2**ups:
            raise ValueError(f'{width} channels cannot be halved {ups} times, for scale {scale}')
        widths = [width // 2**i if halve else width for i in range(ups + 1)]
        up = [nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairwise(widths)]
        if scale == 4:
            layers = [
                up[0],
                build_map_norm(norm_cfg, widths[1]),
                build_activation_layer(act_cfg),
                up[1],
            ]
        elif scale == 2:
            layers = up
        elif scale in (1, 0.5, 0.25):
            layers = [nn.MaxPool2d(2) for _ in range({1: 0, 0.5: 1, 0.25: 2}[scale])]
        else:
            raise ValueError(f'scales are 4, 2, 1, 0.5 and 0.25, got {scale}')
        return nn.Sequential(*layers), widths[-1]

    def forward(self, inputs):
        if self.one_map:
            inputs = [inputs[-1]] * len(self.rescale)
        elif len(inputs) != len(self.rescale):
            raise ValueError(
                f'expected {len(self.rescale)} maps, one for each scale, got {len(inputs)}: '
                "match in_channels and the backbone's out_indices"
            )
        outs = [rescale(x) for rescale, x in zip(self.rescale, inputs, strict=True)]
        if self.project:
            outs = [project(x) for project, x in zip(self.project, outs, strict=True)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, stride=2))
        return tuple(outs)
