"""ViL: Vision-LSTM (Alkin et al., ICLR 2025, arXiv 2406.04303).

Blocks of matrix LSTMs that read the image's tokens row by row, one block from
the top left, the next from the bottom right:

    x <- x + Layer(LayerNorm(x))

Shapes: B batch, L tokens, D embedding, E = 2 D inner channels, H = 4 heads,
Dh = E / H.
"""

import math

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import nn

from visionseq_mm import checkpoints
from visionseq_mm.backbones.base import PlainBackbone, linear_ramp
from visionseq_mm.ops import mlstm
from visionseq_mm.registry import MODELS


class ResidualGainNorm(nn.Module):
    """LayerNorm whose gain is 1 + weight, as ViL stores it: (..., C) -> (..., C).

    With ``num_groups`` above 1 each group of C / num_groups channels is
    normalised by itself: the per-head norm of the mLSTM's output.
    """

    def __init__(self, num_channels, bias, eps=1e-5, num_groups=1):
        super().__init__()
        self.eps = eps
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.zeros(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels)) if bias else None

    def forward(self, x):
        gain = 1 + self.weight
        if self.num_groups == 1:
            return F.layer_norm(x, gain.shape, gain, self.bias, self.eps)
        rows = x.flatten(0, -2)
        return F.group_norm(rows, self.num_groups, gain, self.bias, self.eps).view_as(x)


class HeadwiseLinear(nn.Module):
    """Block-diagonal linear map of blocks of 4 channels: (B, L, E) -> (B, L, E).

    The size of these blocks has nothing to do with the number of mLSTM heads,
    which happens to be 4 as well.
    """

    block_size = 4

    def __init__(self, num_channels, bias):
        super().__init__()
        num_blocks = num_channels // self.block_size
        self.weight = nn.Parameter(torch.empty(num_blocks, self.block_size, self.block_size))
        self.bias = nn.Parameter(torch.zeros(num_channels)) if bias else None

    def forward(self, x):
        y = torch.einsum('...gi,goi->...go', x.unflatten(-1, (-1, self.block_size)), self.weight)
        y = y.flatten(-2)
        return y if self.bias is None else y + self.bias


class CausalConv1d(nn.Conv1d):
    """Depth-wise convolution of each token with its 3 predecessors: (B, L, E) -> (B, L, E).

    With ``reverse`` the successors take the predecessors' place and the taps
    are reversed, which equals flip(conv(flip(x))).
    """

    def __init__(self, num_channels):
        super().__init__(num_channels, num_channels, 4, groups=num_channels)

    def forward(self, x, hw, reverse):
        weight, past = self.weight, self.kernel_size[0] - 1
        x = F.pad(x.transpose(1, 2), (0, past) if reverse else (past, 0))
        weight = weight.flip(-1) if reverse else weight
        return F.conv1d(x, weight, self.bias, groups=self.groups).transpose(1, 2)


class GridConv2d(nn.Conv2d):
    """Depth-wise 3x3 convolution on the token grid: (B, L, E) -> (B, L, E).

    With ``reverse`` the kernel is turned by 180 degrees, which equals
    flip(conv(flip(x))) along the sequence.
    """

    def __init__(self, num_channels):
        super().__init__(num_channels, num_channels, 3, padding=1, groups=num_channels)

    def forward(self, x, hw, reverse):
        weight = self.weight.flip(-1, -2) if reverse else self.weight
        x = x.transpose(1, 2).unflatten(2, hw)
        x = F.conv2d(x, weight, self.bias, padding=self.padding, groups=self.groups)
        return x.flatten(2).transpose(1, 2)


class MLSTMCell(nn.Module):
    """Gates, mLSTM and per-head norm: q, k, v (B, L, E) -> (B, L, E)."""

    num_heads = 4

    def __init__(self, num_channels, bias):
        super().__init__()
        self.igate = nn.Linear(3 * num_channels, self.num_heads)
        self.fgate = nn.Linear(3 * num_channels, self.num_heads)
        self.outnorm = ResidualGainNorm(num_channels, bias, num_groups=self.num_heads)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            # Forgetting with time constants of about 20 to 400 tokens.
            self.fgate.bias.copy_(torch.linspace(3, 6, self.num_heads))

    def forward(self, q, k, v, reverse):
        gates = torch.cat([q, k, v], dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        h = mlstm(q, k, v, self.igate(gates), self.fgate(gates), reverse=reverse)
        return self.outnorm(h.flatten(-2))


class ViLLayer(nn.Module):
    """Gated mLSTM layer: tokens (B, L, D) -> (B, L, D).

    With x, z = split(proj_up(tokens)) and c = SiLU(conv(x)):

        h = mLSTM(q_proj(c), k_proj(c), v_proj(x))
        out = proj_down((h + learnable_skip * c) * SiLU(z))
    """

    def __init__(self, embed_dims, version, reverse):
        super().__init__()
        inner, bias = 2 * embed_dims, version == 2
        self.reverse = reverse
        self.proj_up = nn.Linear(embed_dims, 2 * inner, bias=bias)
        self.q_proj, self.k_proj, self.v_proj = (HeadwiseLinear(inner, bias) for _ in range(3))
        self.conv = CausalConv1d(inner) if version == 1 else GridConv2d(inner)
        self.mlstm_cell = MLSTMCell(inner, bias)
        self.learnable_skip = nn.Parameter(torch.ones(inner))
        self.proj_down = nn.Linear(inner, embed_dims, bias=bias)
        self.reset_parameters(embed_dims)

    def reset_parameters(self, embed_dims):
        """The official 'original' scheme, in which the depth does not enter."""
        for m in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(m.weight, std=math.sqrt(2 / (5 * embed_dims)))
        nn.init.normal_(self.proj_down.weight, std=2 / math.sqrt(embed_dims))
        for m in (self.proj_up, self.proj_down):
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, tokens, hw):
        x, z = self.proj_up(tokens).chunk(2, dim=-1)
        c = F.silu(self.conv(x, hw, self.reverse))
        h = self.mlstm_cell(self.q_proj(c), self.k_proj(c), self.v_proj(x), self.reverse)
        return self.proj_down((h + self.learnable_skip * c) * F.silu(z))


class ViLBlock(nn.Module):
    """Pre-norm residual layer in one direction: (B, L, D), (h, w) -> (B, L, D)."""

    def __init__(self, embed_dims, version, reverse, drop_path_rate):
        super().__init__()
        self.norm = ResidualGainNorm(embed_dims, bias=version == 2)
        self.layer = ViLLayer(embed_dims, version, reverse)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens, hw):
        return tokens + self.drop_path(self.layer(self.norm(tokens), hw))


class ViLBlockPair(nn.Module):
    """Both directions, one after the other: a block of version 2."""

    def __init__(self, embed_dims, drop_path_rates):
        super().__init__()
        first, second = drop_path_rates
        self.rowwise_from_top_left = ViLBlock(embed_dims, 2, False, first)
        self.rowwise_from_bot_right = ViLBlock(embed_dims, 2, True, second)

    def forward(self, tokens, hw):
        return self.rowwise_from_bot_right(self.rowwise_from_top_left(tokens, hw), hw)


@MODELS.register_module()
class ViL(PlainBackbone):
    """Vision-LSTM.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', in version 1 also
            'tinyplus' and 'smallplus'; or a dict with ``embed_dims`` (even)
            and ``depth``, blocks in version 1, block pairs in version 2.
        img_size (int | tuple[int, int]): Image size in pixels, (h, w); the
            stored position table has one entry per 16x16 pixels of it,
            whatever the stride. Images of any other size are fine: the table
            is resized to their grid in every forward.
        version (int): 2: pairs of blocks, a 3x3 convolution on the grid and
            biases; 1: single blocks of alternating direction, a causal
            convolution.
        stride (int): 16; in version 1 also 8, for overlapping patches.
        drop_path_decay (bool): Whether ``drop_path_rate`` is the end of a
            linear ramp over the single layers, as in the official
            segmentation recipe, or the rate of all, as in the ImageNet one.
        out_indices (int | Sequence[int] | None): Blocks (version 1) or pairs
            (version 2) to return. None: the ends of the four quarters, e.g.
            (2, 5, 8, 11) for 12 pairs.
        out_type (str): 'featmap', a tuple of (B, D, h, w) maps without a final
            norm, or 'cls', a 1-tuple of the vector that a linear head
            multiplies: first and last token averaged (version 1, (B, D)) or
            concatenated (version 2, (B, 2 D)), between two norms.
        out_norm (dict | None): Norm config for the maps, one layer each, e.g.
            ``dict(type='visionseq_mm.LN2d', eps=1e-6)``.
        drop_path_rate (float): See ``drop_path_decay``.
        frozen_stages (int): -1 nothing, 0 the stem and position table, k the
            first k blocks or pairs too.
        with_cp (bool): Recompute each block or pair in the backward pass.
        min_matched (float): See :class:`SequenceBackbone`.
        init_cfg (dict | None): e.g. ``dict(type='Pretrained',
            checkpoint='visionseq://vil2-tiny')``.

    Shape:
        (B, 3, H, W) -> (B, D, ceil((H - 16) / stride) + 1, ...) for each output.

    Raises:
        ValueError: For unknown names, variants that a version does not have,
            images under 16 pixels or without 3 channels.
    """

    #: ``depth`` by version.
    arch_zoo = {
        'tiny': dict(embed_dims=192, depth={1: 24, 2: 12}),
        'tinyplus': dict(embed_dims=192, depth={1: 29}),
        'small': dict(embed_dims=384, depth={1: 24, 2: 12}),
        'smallplus': dict(embed_dims=384, depth={1: 26}),
        'base': dict(embed_dims=768, depth={1: 24, 2: 12}),
    }
    cls_only = ('final_norm.', 'pool_norm.')

    def __init__(
        self,
        arch='tiny',
        img_size=224,
        version=2,
        stride=16,
        drop_path_decay=True,
        out_indices=None,
        out_type='featmap',
        out_norm=None,
        drop_path_rate=0.0,
        frozen_stages=-1,
        with_cp=False,
        min_matched=0.95,
        init_cfg=None,
    ):
        super().__init__(out_type, frozen_stages, with_cp, min_matched, init_cfg)
        if version not in (1, 2):
            raise ValueError(f'version must be 1 or 2, got {version!r}')
        settings = self.resolve_arch(arch, ('embed_dims', 'depth'))
        if isinstance(arch, str):
            if version not in settings['depth']:
                raise ValueError(f'arch {arch!r} exists in version 1 only, got version={version}')
            settings['depth'] = settings['depth'][version]
        self.embed_dims, self.depth = settings['embed_dims'], settings['depth']
        if self.embed_dims % 2:
            raise ValueError(
                f'embed_dims must be even (4 heads of 2 * embed_dims / 4 channels), '
                f'got {self.embed_dims}'
            )
        if version == 2 and stride != 16:
            raise ValueError(f'version 2 has stride 16 only, got {stride}; version 1 has 8 too')
        self.version = version
        self.official_names = checkpoints.VIL[version]
        self.out_indices = self.resolve_outputs(
            out_indices, self.depth, self.default_out_indices(self.depth), out_norm=out_norm
        )

        self.build_stem(self.embed_dims, stride, 16, img_size)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a linear layer
        nn.init.zeros_(self.patch_embed.proj.bias)

        num_layers = self.depth * version
        rates = linear_ramp(drop_path_rate, num_layers)
        if not drop_path_decay:
            rates = [drop_path_rate] * num_layers
        built = range(self.out_indices[-1] + 1)
        if version == 1:
            self.blocks = nn.ModuleList(
                ViLBlock(self.embed_dims, 1, i % 2 == 1, rates[i]) for i in built
            )
        else:
            self.blocks = nn.ModuleList(
                ViLBlockPair(self.embed_dims, rates[2 * i : 2 * i + 2]) for i in built
            )
        if out_type == 'cls':
            # The published class of version 2 swaps the two epsilons of its training code; the
            # published classes are what we follow.
            eps, pool_eps = (1e-5, 1e-6) if version == 1 else (1e-6, 1e-5)
            self.final_norm = ResidualGainNorm(self.embed_dims, bias=version == 2, eps=eps)
            self.pool_norm = nn.LayerNorm(self.embed_dims * version, eps=pool_eps)
        self.finish_init(out_norm, [self.embed_dims] * len(self.out_indices))

    def parts(self):
        return [[self.patch_embed, self.pos_embed], *([block] for block in self.blocks)]

    def forward(self, image):
        tokens = self.embed(image)
        hw = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        maps = []
        for i, block in enumerate(self.blocks):
            tokens = self.run(block, tokens, hw)
            if i in self.out_indices and self.out_type == 'featmap':
                maps.append(self.to_map(tokens, hw))
        if self.out_type == 'cls':
            return (self.pool(self.final_norm(tokens)),)
        return self.normalize_outputs(maps)

    def pool(self, tokens):
        """(B, L, D) -> (B, D) or (B, 2 D) from the first and last token."""
        first, last = tokens[:, 0], tokens[:, -1]
        pooled = (first + last) / 2 if self.version == 1 else torch.cat([first, last], dim=-1)
        return self.pool_norm(pooled)
