"""Vim: Vision Mamba (Zhu et al., ICML 2024, arXiv 2401.09417).

A stack of Mamba mixers, each of which reads the image's tokens in both
directions, over a residual stream that stays in float32:

    h_k = Mixer(RMSNorm(r_k)),    r_{k+1} = r_k + h_k

Shapes: B batch, L tokens, D embedding, E = 2 D inner channels, N = 16 states,
R = ceil(D / 16) rank of the step size dt.
"""

import math

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import nn

from visionseq_mm import checkpoints
from visionseq_mm.backbones.base import PlainBackbone, linear_ramp
from visionseq_mm.ops import vim_mixer
from visionseq_mm.registry import MODELS


class VimMixer(nn.Module):
    """Mamba mixer in one direction or in both: (B, L, D) -> (B, L, D).

    For each direction, with x, z = split(in_proj(tokens)):

        u = SiLU(conv1d(x));   dt, B, C = split(x_proj(u))
        y = selective_scan(u, softplus(dt_proj(dt) + bias), -exp(A_log), B, C, D)

    and the result is out_proj(mean of y over the directions * SiLU(z)). The layers hold the
    weights; :func:`visionseq_mm.ops.vim_mixer` computes all of it in one operation, so that the
    layers' own forward and hooks on it do not run.

    Args:
        embed_dims (int): D.
        depth (int): Blocks of the model, for the initial scale of out_proj.
        bidirectional (str): See :class:`Vim`. What a backward direction has
            for itself carries the suffix ``_b``.
        reverse (bool): Whether a single direction starts at the last token.
        recompute (bool): Keep only the tokens and a few states for the
            backward pass.
    """

    state_dims = 16
    conv_size = 4

    def __init__(self, embed_dims, depth, bidirectional='ssm_conv', reverse=False, recompute=True):
        super().__init__()
        inner = 2 * embed_dims
        self.bidirectional = bidirectional
        both = bidirectional in ('ssm', 'ssm_conv')
        self.reverse = (False, True) if both else (reverse,)
        # The scans of 'ssm' read one convolution, which is causal.
        self.conv_reverse = (False, False) if bidirectional == 'ssm' else self.reverse
        self.recompute = recompute
        self.dt_rank = math.ceil(embed_dims / 16)
        self.in_proj = nn.Linear(embed_dims, 2 * inner, bias=False)
        suffixes = ('', '_b') if bidirectional == 'ssm_conv' else ('',)
        for suffix in suffixes:
            conv = nn.Conv1d(inner, inner, self.conv_size, groups=inner)
            self.add_module('conv1d' + suffix, conv)
        for suffix in suffixes:
            x_proj = nn.Linear(inner, self.dt_rank + 2 * self.state_dims, bias=False)
            self.add_module('x_proj' + suffix, x_proj)
        for suffix in suffixes:
            self.add_module('dt_proj' + suffix, nn.Linear(self.dt_rank, inner))
        A_log = torch.arange(1, self.state_dims + 1).float().log().repeat(inner, 1)
        for name in ('A_log', 'A_b_log') if both else ('A_log',):
            self.register_parameter(name, nn.Parameter(A_log.clone()))
        for suffix in suffixes:
            self.register_parameter('D' + suffix, nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, embed_dims, bias=False)
        self.reset_parameters(depth)

    def reset_parameters(self, depth):
        """As the official code leaves them: only the forward dt_proj is initialised specially."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            # softplus(bias) is log-uniform in [1e-3, 1e-1].
            dt = torch.exp(
                torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1))
            ).clamp_min(1e-4)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            if self.bidirectional == 'ssm_conv':
                nn.init.zeros_(self.dt_proj_b.bias)
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
            self.out_proj.weight.div_(math.sqrt(depth))

    def directions(self):
        """Convolution, projections, A_log and D of each direction."""
        first = self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D
        if self.bidirectional == 'ssm':
            return first, (self.conv1d, self.x_proj, self.dt_proj, self.A_b_log, self.D)
        if self.bidirectional == 'ssm_conv':
            own = self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b
            return first, own
        return (first,)

    def forward(self, tokens):
        conv, x_proj, dt_proj, A_log, D = zip(*self.directions(), strict=True)
        A_log = torch.stack(A_log)
        return vim_mixer(
            tokens,
            self.in_proj.weight,
            torch.stack([layer.weight.squeeze(1) for layer in conv]),
            torch.stack([layer.bias for layer in conv]),
            torch.stack([layer.weight for layer in x_proj]),
            torch.stack([layer.weight for layer in dt_proj]),
            torch.stack([layer.bias for layer in dt_proj]),
            -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32))),
            torch.stack(D),
            self.out_proj.weight,
            self.reverse,
            self.conv_reverse,
            self.recompute,
        )


class StreamNorm(nn.RMSNorm):
    """RMSNorm in the precision of the stream, (..., D); the result has the weights' dtype.

    The stream is wider than the weights of a model that was cast to half precision.
    """

    def forward(self, residual):
        weight = self.weight.to(residual.dtype)
        normed = F.rms_norm(residual, self.normalized_shape, weight, self.eps)
        return normed.to(self.weight.dtype)


class VimBlock(nn.Module):
    """Residual stream (B, L, D) -> the stream after the block, and the mixer's branch alone."""

    def __init__(self, embed_dims, mixer, drop_path_rate):
        super().__init__()
        self.norm = StreamNorm(embed_dims, eps=1e-5)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, residual):
        branch = self.mixer(self.norm(residual))
        return residual + self.drop_path(branch), branch


@MODELS.register_module()
class Vim(PlainBackbone):
    """Vision Mamba.

    Args:
        arch (str | dict): 'tiny', 'small' or 'base', or a dict with
            ``embed_dims`` and ``depth``.
        img_size (int | tuple[int, int]): Image size in pixels, (h, w), whose
            token grid the stored position table has. Images of any other size
            are fine: the table is resized to their grid in every forward.
        stride (int): 16, or 8 for overlapping patches.
        cls_token (str | None): Where the class token stands: 'middle', 'head',
            'double' (both ends, averaged) or None. Dense features never
            contain it; for them it says which rows of an official position
            table to leave out.
        pooling (str | None): 'mean' or 'max' over the normed tokens, for
            'cls' without a class token, where None means 'mean'. 'max' takes the
            maximum of the features (the official code's, that of the logits).
        feature (str | None): What ``out_indices`` tap: 'stream' (None), the
            residual stream after the block, or 'branch', its mixer's output.
        bidirectional (str): How blocks see what comes after a token, as the
            paper compares it: 'none', not at all; 'layer', every second block
            reads the flipped sequence; 'ssm', a second scan in each block,
            with an A of its own (what the two share is computed for each);
            'ssm_conv', with convolution and projections of its own too (the
            released models).
        recompute (str): What a mixer computes again in the backward pass:
            'kernel', all but its input and a few states of the scan; 'none',
            only what is cheap: x, z, u, low, B, C and y are kept. ``with_cp``
            takes its place.
        out_indices (int | Sequence[int] | None): Blocks to return. None: the
            ends of the four quarters, (5, 11, 17, 23) for 24 blocks.
        out_type (str): 'featmap', a tuple of (B, D, h, w) maps, or 'cls', a
            1-tuple of the vector (B, D) that a linear head multiplies.
        out_norm (dict | None): Norm config for the maps, one layer each, e.g.
            ``dict(type='visionseq_mm.LN2d', eps=1e-6)``.
        drop_path_rate (float): Last value of a linear ramp over the blocks.
        frozen_stages (int): -1 nothing, 0 the stem and position table, k the
            first k blocks too.
        with_cp (bool): Recompute each block in the backward pass.
        min_matched (float): See :class:`SequenceBackbone`.
        init_cfg (dict | None): e.g. ``dict(type='Pretrained',
            checkpoint='visionseq://vim-tiny')``.

    Shape:
        (B, 3, H, W) -> (B, D, ceil((H - 16) / stride) + 1, ...) for each output.

    Raises:
        ValueError: For unknown names, arguments without effect in the given
            combination, images under 16 pixels or without 3 channels.
    """

    arch_zoo = {
        'tiny': dict(embed_dims=192, depth=24),
        'small': dict(embed_dims=384, depth=24),
        'base': dict(embed_dims=768, depth=24),
    }
    official_names = checkpoints.VIM
    cls_only = ('cls_token', 'cls_pos_embed', 'final_norm.')
    undecayed = (*PlainBackbone.undecayed, 'A_log', 'A_b_log')

    def __init__(
        self,
        arch='tiny',
        img_size=224,
        stride=16,
        cls_token='middle',
        pooling=None,
        feature=None,
        bidirectional='ssm_conv',
        recompute='kernel',
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
        settings = self.resolve_arch(arch, ('embed_dims', 'depth'))
        self.embed_dims, self.depth = settings['embed_dims'], settings['depth']
        if cls_token not in ('middle', 'head', 'double', None):
            raise ValueError(
                f"cls_token must be 'middle', 'head', 'double' or None, got {cls_token!r}"
            )
        if pooling not in ('mean', 'max', None):
            raise ValueError(f"pooling must be 'mean', 'max' or None, got {pooling!r}")
        if pooling is not None and cls_token is not None:
            raise ValueError(
                f'pooling={pooling!r} has no effect with cls_token={cls_token!r}, which is itself '
                'the readout: set cls_token=None, or leave pooling out'
            )
        if feature not in ('stream', 'branch', None):
            raise ValueError(f"feature must be 'stream' or 'branch', got {feature!r}")
        if bidirectional not in ('none', 'layer', 'ssm', 'ssm_conv'):
            raise ValueError(
                "bidirectional must be 'none', 'layer', 'ssm' or 'ssm_conv', "
                f'got {bidirectional!r}'
            )
        in_kernel = self.recomputes_in_kernel(recompute)
        self.out_indices = self.resolve_outputs(
            out_indices,
            self.depth,
            self.default_out_indices(self.depth),
            feature=feature,
            out_norm=out_norm,
        )
        self.cls_token_place = cls_token
        self.pooling = pooling or 'mean'
        self.feature = feature or 'stream'

        self.build_stem(self.embed_dims, stride, stride, img_size)
        fan_in = self.patch_embed.proj.weight[0].numel()
        # LeCun normal as timm draws it: the correction for a truncation at two deviations.
        std = fan_in**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=std)
        nn.init.zeros_(self.patch_embed.proj.bias)
        self.num_cls_tokens = {None: 0, 'double': 2}.get(cls_token, 1)
        if out_type == 'cls':
            if self.num_cls_tokens:
                shape = (1, self.num_cls_tokens, self.embed_dims)
                self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
                self.cls_pos_embed = nn.Parameter(
                    nn.init.trunc_normal_(torch.empty(shape), std=0.02)
                )
            self.final_norm = StreamNorm(self.embed_dims, eps=1e-5)

        rates = linear_ramp(drop_path_rate, self.depth)
        self.blocks = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            mixer = VimMixer(
                self.embed_dims,
                self.depth,
                bidirectional,
                reverse=bidirectional == 'layer' and i % 2 == 1,
                recompute=in_kernel,
            )
            self.blocks.append(VimBlock(self.embed_dims, mixer, rates[i]))
        self.finish_init(out_norm, [self.embed_dims] * len(self.out_indices))

    def parts(self):
        stem = [self.patch_embed, self.pos_embed]
        if hasattr(self, 'cls_token'):
            stem += [self.cls_token, self.cls_pos_embed]
        return [stem, *([block] for block in self.blocks)]

    def cls_positions(self, num_patches):
        """Places of the class tokens among ``num_patches`` patches, in the full sequence."""
        return {
            None: [],
            'head': [0],
            'middle': [num_patches // 2],
            'double': [0, num_patches + 1],
        }[self.cls_token_place]

    def insert_cls(self, tokens):
        """(B, L, D) -> (B, L + class tokens, D)."""
        cls = (self.cls_token + self.cls_pos_embed).expand(len(tokens), -1, -1).to(tokens.dtype)
        for i, place in enumerate(self.cls_positions(tokens.shape[1])):
            tokens = torch.cat([tokens[:, :place], cls[:, i : i + 1], tokens[:, place:]], dim=1)
        return tokens

    def stream(self, image):
        """The residual stream before the first block (B, L, D), and the patches' grid (h, w)."""
        tokens = self.embed(image)
        hw = tokens.shape[1:3]
        residual = tokens.flatten(1, 2)
        # It stays in float32 (or wider) where autocast made the stem's output bfloat16.
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if hasattr(self, 'cls_token'):
            residual = self.insert_cls(residual)
        return residual, hw

    def forward(self, image):
        residual, hw = self.stream(image)
        maps = []
        for i, block in enumerate(self.blocks):
            residual, branch = self.run(block, residual)
            if i in self.out_indices and self.out_type == 'featmap':
                feature = residual if self.feature == 'stream' else branch
                maps.append(self.to_map(feature.to(image.dtype), hw))
            del branch  # which would outlive the next block
        if self.out_type == 'cls':
            return (self.pool(self.final_norm(residual), hw).to(image.dtype),)
        return self.normalize_outputs(maps)

    def pool(self, tokens, hw):
        """(B, L, D) -> (B, D): the class tokens' mean, or the pooled patches."""
        if self.num_cls_tokens:
            return tokens[:, self.cls_positions(math.prod(hw))].mean(1)
        return tokens.mean(1) if self.pooling == 'mean' else tokens.amax(1)

    # ------------------------------------------------------------ checkpoints

    def convert_tensors(self, tensors):
        """Join the tokens of 'double'; split an official position table (1, rows, D)."""
        ends = ('cls_token_head', 'cls_token_tail')
        if all(k in tensors for k in ends):
            tensors['cls_token'] = torch.cat([tensors.pop(k) for k in ends], dim=1)
        table, token = tensors.get('pos_embed'), tensors.get('cls_token')
        if table is not None and table.ndim == 3:
            patches, cls = self.split_table(table, None if token is None else token.shape[1])
            tensors['pos_embed'] = patches
            if cls.shape[1]:
                tensors['cls_pos_embed'] = cls
        return super().convert_tensors(tensors)

    def split_table(self, table, num_cls=None):
        """(1, rows, D) -> ((1, h, w, D), (1, class rows, D)).

        The grid is that of ``img_size`` where the number of rows agrees, else
        a square. The number of class rows follows from the count, their place
        from ``cls_token``.

        Args:
            num_cls (int | None): Class tokens in the checkpoint, without which
                9 x 9 patches could be 8 x 10 and a class row; None: unknown.
        """
        rows = table.shape[1]
        own = tuple(self.pos_embed.shape[1:3])
        likely = self.num_cls_tokens if num_cls is None else num_cls
        found = []
        for n in sorted((0, 1, 2), key=lambda n: n != likely):
            side = math.isqrt(max(rows - n, 0))
            if rows - n == math.prod(own):
                found.append((own, n))
            elif num_cls in (None, n) and side and side * side == rows - n:
                found.append(((side, side), n))
        if not found:
            raise checkpoints.CheckpointMismatchError(
                f'a position table of {rows} rows is neither the grid {own[0]}x{own[1]} of '
                'this img_size nor a square, class rows aside. Give the backbone the img_size '
                'that the checkpoint was trained at.'
            )
        grid, extra = found[0]
        if extra not in (0, self.num_cls_tokens):
            raise checkpoints.CheckpointMismatchError(
                f'the position table has {extra} class row(s), and '
                f'cls_token={self.cls_token_place!r} does not say where. Released Vim files have '
                "cls_token='middle'."
            )
        places = self.cls_positions(rows - extra) if extra else []
        patches = [i for i in range(rows) if i not in places]
        return table[:, patches].unflatten(1, grid), table[:, places]
