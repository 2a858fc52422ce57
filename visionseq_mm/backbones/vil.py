"""ViL: Vision-LSTM (Alkin et al., ICLR 2025, arXiv 2406.04303).

Layers of matrix LSTMs that read the image's tokens one after the other, in the
released models one layer row by row from the top left, the next the same way
back from the bottom right:

    x <- x + Layer(LayerNorm(x))

Shapes: B batch, L tokens, D embedding, E = 2 D inner channels, H = 4 heads,
S directions of a layer.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import nn

from visionseq_mm import checkpoints
from visionseq_mm.backbones.base import PlainBackbone, linear_ramp
from visionseq_mm.ops import vil_mixer
from visionseq_mm.ops.vil_mixer import Weights
from visionseq_mm.registry import MODELS


class Path(NamedTuple):
    """The way of a direction through the tokens: row by row from the top left, unless told."""

    reverse: bool = False
    columns: bool = False


_ROWS = Path(), Path(reverse=True)
_COLUMNS = Path(columns=True), Path(reverse=True, columns=True)


class Traversal(NamedTuple):
    """The paths of each layer, over and over, and whether those of a layer share weights."""

    cycle: tuple[tuple[Path, ...], ...]
    shared: bool = False


TRAVERSALS = {
    'forward': Traversal((_ROWS[:1],)),
    'alternating': Traversal(tuple((path,) for path in _ROWS)),
    'bidirectional': Traversal((_ROWS,)),
    'bidirectional_shared': Traversal((_ROWS,), shared=True),
    'quad': Traversal((_ROWS + _COLUMNS,)),
    'quad_shared': Traversal((_ROWS + _COLUMNS,), shared=True),
    'alternating_quad': Traversal(tuple((path,) for path in _ROWS + _COLUMNS)),
}
POOLINGS = ('bilateral_avg', 'bilateral_concat', 'avg', 'middle_patch', 'middle_cls')


class ResidualGainNorm(nn.Module):
    """LayerNorm whose gain is 1 + weight, as ViL stores it: (..., C) -> (..., C)."""

    def __init__(self, num_channels, bias, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels)) if bias else None

    @property
    def gain(self):
        return 1 + self.weight

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.gain, self.bias, self.eps)


class HeadwiseLinear(nn.Module):
    """Weights of a block-diagonal linear map of blocks of 4 channels, [block, out, in].

    The size of these blocks has nothing to do with the number of mLSTM heads,
    which happens to be 4 as well.
    """

    block_size = 4

    def __init__(self, num_channels, bias):
        super().__init__()
        num_blocks = num_channels // self.block_size
        self.weight = nn.Parameter(torch.empty(num_blocks, self.block_size, self.block_size))
        self.bias = nn.Parameter(torch.zeros(num_channels)) if bias else None


class MLSTMCell(nn.Module):
    """Weights of the gates, which read q, k and v, and of the norm of each head's output."""

    num_heads = 4

    def __init__(self, num_channels, bias):
        super().__init__()
        self.igate = nn.Linear(3 * num_channels, self.num_heads)
        self.fgate = nn.Linear(3 * num_channels, self.num_heads)
        self.outnorm = ResidualGainNorm(num_channels, bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            # Forgetting with time constants of about 20 to 400 tokens.
            self.fgate.bias.copy_(torch.linspace(3, 6, self.num_heads))


class ViLDirection(nn.Module):
    """What a direction of a layer has for itself: convolution, projections, cell and skip."""

    def __init__(self, embed_dims, version):
        super().__init__()
        self.build(embed_dims, version)
        self.reset_parameters(embed_dims)

    def build(self, embed_dims, version):
        inner, bias = 2 * embed_dims, version == 2
        self.q_proj, self.k_proj, self.v_proj = (HeadwiseLinear(inner, bias) for _ in range(3))
        if version == 1:  # of each token and its 3 predecessors
            self.conv = nn.Conv1d(inner, inner, 4, groups=inner)
        else:  # on the grid
            self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.mlstm_cell = MLSTMCell(inner, bias)
        self.learnable_skip = nn.Parameter(torch.ones(inner))

    def reset_parameters(self, embed_dims):
        """The official 'original' scheme, in which the depth does not enter."""
        for m in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(m.weight, std=math.sqrt(2 / (5 * embed_dims)))

    def weights(self):
        """The fields of :class:`Weights` that each direction has, without their dimension S."""
        qkv, cell = (self.q_proj, self.k_proj, self.v_proj), self.mlstm_cell
        gates, norm = (cell.igate, cell.fgate), cell.outnorm
        return dict(
            conv_weight=self.conv.weight.squeeze(1),
            conv_bias=self.conv.bias,
            qkv=torch.stack([m.weight for m in qkv]),
            qkv_bias=None if qkv[0].bias is None else torch.stack([m.bias for m in qkv]),
            gates=torch.cat([m.weight for m in gates]),
            gates_bias=torch.cat([m.bias for m in gates]),
            norm_weight=norm.gain,
            norm_bias=norm.bias,
            skip=self.learnable_skip,
        )


class ViLLayer(ViLDirection):
    """Gated mLSTM layer in one direction or several: tokens (B, L, D), grid -> (B, L, D).

    With x, z = split(proj_up(tokens)) and, for each direction, c = SiLU(conv(x)):

        h = outnorm(mLSTM(q_proj(c), k_proj(c), v_proj(x)))
        out = proj_down(sum over the directions of (h + learnable_skip * c) * SiLU(z))

    A reversed direction is flip(...(flip(x))), its convolution included; one of columns reads
    the transposed grid. The modules hold the weights; :func:`visionseq_mm.ops.vil_mixer` computes
    all of it in one operation, so that their own forward and hooks on it do not run: a wrapper
    around one of them, such as LoRA's, has no effect, and what replaces their weights, such as
    ``weight_norm`` or dynamic quantisation, fails.

    The layer is its first direction, whose weights so have the names of the official files.
    Others with weights of their own are in ``other_directions``, in the order of the paths.

    Args:
        embed_dims (int): D.
        version (int): Of :class:`ViL`.
        paths (Sequence[Path]): One for each direction.
        shared (bool): Whether all directions have the weights of the first.
        recompute (bool): Keep only the tokens and the cells' output for the
            backward pass.
    """

    def __init__(self, embed_dims, version, paths, shared, recompute):
        super().__init__(embed_dims, version)
        self.reverse, self.columns = zip(*paths, strict=True)
        self.recompute = recompute
        self.other_directions = nn.ModuleList(
            ViLDirection(embed_dims, version) for _ in (() if shared else paths[1:])
        )

    def build(self, embed_dims, version):
        inner, bias = 2 * embed_dims, version == 2
        self.proj_up = nn.Linear(embed_dims, 2 * inner, bias=bias)
        super().build(embed_dims, version)
        self.proj_down = nn.Linear(inner, embed_dims, bias=bias)

    def reset_parameters(self, embed_dims):
        nn.init.normal_(self.proj_up.weight, std=math.sqrt(2 / (5 * embed_dims)))
        super().reset_parameters(embed_dims)
        nn.init.normal_(self.proj_down.weight, std=2 / math.sqrt(embed_dims))
        for m in (self.proj_up, self.proj_down):
            if m.bias is not None:
                nn.init.zeros_(m.bias)

    def stacked_weights(self):
        """Those fields of all directions, with it."""
        own = self.weights()
        others = [m.weights() for m in self.other_directions]
        if others:
            return {
                name: None if x is None else torch.stack([x, *(w[name] for w in others)])
                for name, x in own.items()
            }
        count = len(self.reverse)
        return {name: None if x is None else x.expand(count, *x.shape) for name, x in own.items()}

    def forward(self, tokens, hw):
        weights = Weights(
            proj_up=self.proj_up.weight,
            proj_up_bias=self.proj_up.bias,
            **self.stacked_weights(),
            proj_down=self.proj_down.weight,
            proj_down_bias=self.proj_down.bias,
        )
        return vil_mixer(tokens, weights, hw, self.reverse, self.columns, self.recompute)


class ViLBlock(nn.Module):
    """Pre-norm residual layer: (B, L, D), (h, w) -> (B, L, D)."""

    def __init__(self, embed_dims, version, layer, drop_path_rate):
        super().__init__()
        self.norm = ResidualGainNorm(embed_dims, bias=version == 2)
        self.layer = layer
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, tokens, hw):
        return tokens + self.drop_path(self.layer(self.norm(tokens), hw))


class ViLBlockPair(nn.Module):
    """A block of version 2: two layers, one after the other.

    They are named as in the official files, whose traversal is 'alternating', and keep these
    names where theirs is another.
    """

    def __init__(self, first, second):
        super().__init__()
        self.rowwise_from_top_left = first
        self.rowwise_from_bot_right = second

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
        version (int): 2: pairs of layers, a 3x3 convolution on the grid and
            biases; 1: single layers, a causal convolution.
        stride (int): 16; in version 1 also 8, for overlapping patches.
        drop_path_decay (bool): Whether ``drop_path_rate`` is the end of a
            linear ramp over the single layers, as in the official
            segmentation recipe, or the rate of all, as in the ImageNet one.
        traversal (str): How the layers read the tokens, as the paper compares
            it. In one direction each: 'forward', all row by row from the top
            left; 'alternating', every second one from the bottom right (the
            released models); 'alternating_quad', by rows, by rows reversed, by
            columns, by columns reversed, and again. In several at once, whose
            gated outputs are added: 'bidirectional', by rows both ways;
            'quad', by rows and columns both ways; each direction has its own
            convolution, projections to q, k and v, gates, norm and skip, or
            with 'bidirectional_shared' and 'quad_shared' the same.
            Sharing makes a layer equivariant, whatever its weights: with
            'bidirectional_shared' a turn of the token grid by 180 degrees
            turns its output, with 'quad_shared' also a transposition of the
            grid (a mirroring has no such guarantee, nor have the other
            traversals any). Of images that holds as far as patch embedding
            and position table have the symmetry and no patch is padded.
            Released checkpoints have the weights of one direction: they do
            not load into 'bidirectional' and 'quad', but with a lower
            ``min_matched``, which leaves the other directions as initialised.
        pooling (str | None): For 'cls', the vector between the two norms:
            'bilateral_avg', first and last token averaged (None in version
            1); 'bilateral_concat', the two one after the other, (B, 2 D)
            (None in version 2); 'avg', the mean of all tokens;
            'middle_patch', token L // 2 of the sequence, which on a grid with
            an even number of rows is the first of row h / 2, not its centre;
            'middle_cls', a class token after the first ceil(L / 2) tokens,
            without a position. It interrupts the grid, hence is for version 1
            and the traversals by rows only.
        recompute (str): What a layer computes again in the backward pass:
            'kernel', all but its input and the cells' output; 'none', only
            what is cheap: x, z, c, q, k, v, the gates and the cells' output
            are kept. ``with_cp`` takes its place.
        out_indices (int | Sequence[int] | None): Blocks (version 1) or pairs
            (version 2) to return. None: the ends of the four quarters, e.g.
            (2, 5, 8, 11) for 12 pairs.
        out_type (str): 'featmap', a tuple of (B, D, h, w) maps without a final
            norm, or 'cls', a 1-tuple of the vector that a linear head
            multiplies, (B, D) or (B, 2 D): see ``pooling``.
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
            arguments without effect in the given combination, images under
            16 pixels or without 3 channels.
    """

    #: ``depth`` by version.
    arch_zoo = {
        'tiny': dict(embed_dims=192, depth={1: 24, 2: 12}),
        'tinyplus': dict(embed_dims=192, depth={1: 29}),
        'small': dict(embed_dims=384, depth={1: 24, 2: 12}),
        'smallplus': dict(embed_dims=384, depth={1: 26}),
        'base': dict(embed_dims=768, depth={1: 24, 2: 12}),
    }
    cls_only = ('cls_token', 'final_norm.', 'pool_norm.')
    undecayed = (*PlainBackbone.undecayed, 'igate.weight', 'fgate.weight')

    def __init__(
        self,
        arch='tiny',
        img_size=224,
        version=2,
        stride=16,
        drop_path_decay=True,
        traversal='alternating',
        pooling=None,
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
        if traversal not in tuple(TRAVERSALS):
            raise ValueError(
                f'traversal must be one of {", ".join(map(repr, TRAVERSALS))}, got {traversal!r}'
            )
        in_kernel = self.recomputes_in_kernel(recompute)
        self.version = version
        self.pooling = self.resolve_pooling(pooling, traversal)
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
        cycle, shared = TRAVERSALS[traversal]

        def build_block(i):
            paths = cycle[i % len(cycle)]
            layer = ViLLayer(self.embed_dims, version, paths, shared, in_kernel)
            return ViLBlock(self.embed_dims, version, layer, rates[i])

        built = range(self.out_indices[-1] + 1)
        if version == 1:
            self.blocks = nn.ModuleList(build_block(i) for i in built)
        else:
            self.blocks = nn.ModuleList(
                ViLBlockPair(build_block(2 * i), build_block(2 * i + 1)) for i in built
            )
        if out_type == 'cls':
            # The published class of version 2 swaps the two epsilons of its training code; the
            # published classes are what we follow.
            eps, pool_eps = (1e-5, 1e-6) if version == 1 else (1e-6, 1e-5)
            self.final_norm = ResidualGainNorm(self.embed_dims, bias=version == 2, eps=eps)
            pooled_dims = self.embed_dims * (2 if self.pooling == 'bilateral_concat' else 1)
            self.pool_norm = nn.LayerNorm(pooled_dims, eps=pool_eps)
            if self.pooling == 'middle_cls':
                token = torch.empty(1, 1, self.embed_dims)
                self.cls_token = nn.Parameter(nn.init.normal_(token, std=0.02))
        self.finish_init(out_norm, [self.embed_dims] * len(self.out_indices))

    def resolve_pooling(self, pooling, traversal):
        """Validated ``pooling``, with None the version's own.

        Raises:
            ValueError: For an unknown name, any with 'featmap', and a class
                token where the layers need the grid.
        """
        if pooling is None:
            return 'bilateral_avg' if self.version == 1 else 'bilateral_concat'
        if pooling not in POOLINGS:
            raise ValueError(
                f'pooling must be one of {", ".join(map(repr, POOLINGS))} or None, got {pooling!r}'
            )
        if self.out_type == 'featmap':
            raise ValueError(
                f"out_type='featmap' returns maps, so pooling={pooling!r} has no effect with it: "
                "leave it out, or use out_type='cls'"
            )
        by_columns = any(path.columns for paths in TRAVERSALS[traversal].cycle for path in paths)
        if pooling == 'middle_cls' and (self.version == 2 or by_columns):
            raise ValueError(
                "pooling='middle_cls' puts a class token into the sequence, which is then no grid "
                'of tokens: it needs version=1, whose convolution goes along the sequence, and a '
                f'traversal by rows only, got version={self.version}, traversal={traversal!r}'
            )
        return pooling

    def parts(self):
        stem = [self.patch_embed, self.pos_embed]
        if hasattr(self, 'cls_token'):
            stem += [self.cls_token]
        return [stem, *([block] for block in self.blocks)]

    def insert_cls(self, tokens):
        """(B, L, D) -> (B, L + 1, D), the class token in the middle."""
        cls = self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype)
        place = (tokens.shape[1] + 1) // 2
        return torch.cat([tokens[:, :place], cls, tokens[:, place:]], dim=1)

    def forward(self, image):
        tokens = self.embed(image)
        hw = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        if hasattr(self, 'cls_token'):
            tokens = self.insert_cls(tokens)
            hw = 1, tokens.shape[1]
        maps = []
        for i, block in enumerate(self.blocks):
            tokens = self.run(block, tokens, hw)
            if i in self.out_indices and self.out_type == 'featmap':
                maps.append(self.to_map(tokens, hw))
        if self.out_type == 'cls':
            return (self.pool_norm(self.pool(self.final_norm(tokens))),)
        return self.normalize_outputs(maps)

    def pool(self, tokens):
        """(B, L, D) -> (B, D), or (B, 2 D) with 'bilateral_concat'."""
        if self.pooling == 'avg':
            return tokens.mean(1)
        if self.pooling in ('middle_patch', 'middle_cls'):
            return tokens[:, tokens.shape[1] // 2]
        first, last = tokens[:, 0], tokens[:, -1]
        if self.pooling == 'bilateral_avg':
            return (first + last) / 2
        return torch.cat([first, last], dim=-1)
