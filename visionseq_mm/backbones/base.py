"""What the backbones share.

``SequenceBackbone``: arguments, frozen parts, recomputation, outputs and the
loading of checkpoints. ``PlainBackbone``: the stem of Vim and ViL, which cut
the image into 16x16 patches and keep one resolution throughout.
``ClusterPyramid``: the four stages of SecViT and of the hosts whose windows
became clusters.

Shapes: B batch, C channels of a map, D embedding, L tokens = h * w, and
``hw = (h, w)``, the token grid, which travels with every sequence.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from visionseq_mm.checkpoints import LoadsOfficialFiles
from visionseq_mm.layers import build_map_norm, resize_grid


def linear_ramp(last, count):
    """``count`` rates of stochastic depth, from 0 to ``last``.

    Raises:
        ValueError: For a rate outside [0, 1).
    """
    if not 0 <= last < 1:
        raise ValueError(f'drop_path_rate must be at least 0 and below 1, got {last}')
    return [last * i / max(count - 1, 1) for i in range(count)]


class SequenceBackbone(LoadsOfficialFiles, BaseModule):
    """Base of all backbones.

    A subclass sets ``arch_zoo`` and ``official_names``, builds its layers,
    calls :meth:`finish_init` and defines :meth:`parts`.

    Args:
        out_type (str): 'featmap' or 'cls'.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the first k
            blocks (pairs, stages) too.
        with_cp (bool): Recompute each block's activations in the backward
            pass instead of keeping them.
        min_matched (float): Share of the backbone's tensors that a checkpoint
            must bring, and of the checkpoint's that must have a place here.
        init_cfg (dict, optional): See mmengine's BaseModule.
    """

    #: {name: settings}, what ``arch`` may name.
    arch_zoo = {}
    #: Ends of the names, beside parameters of one dimension, that weight decay leaves alone.
    undecayed = ()

    def __init__(self, out_type, frozen_stages, with_cp, min_matched, init_cfg):
        super().__init__(init_cfg)
        if out_type not in ('featmap', 'cls'):
            raise ValueError(f"out_type must be 'featmap' or 'cls', got {out_type!r}")
        if not 0 <= min_matched <= 1:
            raise ValueError(f'min_matched is a share between 0 and 1, got {min_matched}')
        self.out_type = out_type
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.min_matched = min_matched

    def resolve_arch(self, arch, keys):
        """Settings of ``arch``, a name of ``arch_zoo`` or a dict with ``keys``.

        Raises:
            ValueError: For an unknown name, or a dict with other keys.
        """
        if isinstance(arch, str):
            if arch not in self.arch_zoo:
                raise ValueError(
                    f'{type(self).__name__} has no arch {arch!r}; choose one of '
                    f'{", ".join(self.arch_zoo)}, or give a dict with {", ".join(keys)}'
                )
            return dict(self.arch_zoo[arch])
        if not isinstance(arch, Mapping) or set(arch) != set(keys):
            raise ValueError(
                f'arch of {type(self).__name__} must be a name or a dict with the keys '
                f'{", ".join(keys)}, got {arch!r}'
            )
        sizes = chain.from_iterable(v if isinstance(v, Sequence) else [v] for v in arch.values())
        if any(not isinstance(n, int) or (n < 1 and not isinstance(n, bool)) for n in sizes):
            raise ValueError(f'the sizes in arch must be positive integers, got {arch!r}')
        return dict(arch)

    def resolve_outputs(self, out_indices, depth, default, **dense_only):
        """Validated, non-negative ``out_indices``; the last block for 'cls'.

        Args:
            out_indices (int | Sequence[int] | None): As given by the user.
            depth (int): Number of blocks (pairs, stages) of the arch.
            default (Sequence[int] | None): What None stands for; None itself
                where the depth is too small for the rule.
            dense_only: Other arguments that only 'featmap' has a use for.

        Raises:
            ValueError: For indices out of range, unsorted or repeated, and
                for dense arguments given with ``out_type='cls'``.
        """
        if self.out_type == 'cls':
            dense_only['out_indices'] = out_indices
            given = [k for k, v in dense_only.items() if v is not None]
            if given:
                raise ValueError(
                    f"out_type='cls' returns one pooled vector, so {', '.join(given)} has no "
                    "effect with it: leave it out, or use out_type='featmap'"
                )
            return (depth - 1,)
        if out_indices is None:
            if default is None:
                raise ValueError(
                    f'out_indices must be given for a depth below 4, got a depth of {depth}'
                )
            return tuple(default)
        indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        wrapped = tuple(i + depth if i < 0 else i for i in indices)
        if not wrapped or any(not 0 <= i < depth for i in wrapped):
            raise ValueError(
                f'out_indices must lie between {-depth} and {depth - 1}, got {indices}'
            )
        if list(wrapped) != sorted(set(wrapped)):
            raise ValueError(f'out_indices must be increasing and distinct, got {indices}')
        return wrapped

    def finish_init(self, out_norm, widths):
        """Build the output norms, freeze, note depths; the last call of a constructor.

        Args:
            out_norm (dict | None): Norm config for (B, C, H, W) maps.
            widths (Sequence[int]): Channels of each output.
        """
        if out_norm is not None:
            self.out_norms = nn.ModuleList(build_map_norm(out_norm, c) for c in widths)
        last = len(self.parts()) - 1
        if not isinstance(self.frozen_stages, int) or not -1 <= self.frozen_stages <= last:
            raise ValueError(
                f'frozen_stages must lie between -1 and {last} (the number of blocks or stages '
                f'that are built), got {self.frozen_stages}'
            )
        for item in self.frozen_items():
            item.requires_grad_(False)
        self.train(self.training)  # frozen parts in eval mode
        names = {x: name for name, x in chain(self.named_modules(), self.named_parameters())}
        self._depths = {
            names[item]: depth for depth, part in enumerate(self.parts()) for item in part
        }

    def parts(self):
        """[stem, block 1, block 2, ...]; each a list of modules and parameters."""
        raise NotImplementedError

    def frozen_items(self):
        """Modules and parameters that ``frozen_stages`` freezes."""
        return chain.from_iterable(self.parts()[: self.frozen_stages + 1])

    def get_layer_depth(self, param_name, prefix=''):
        """Depth of a parameter, as mmpretrain's backbones tell it.

        Args:
            param_name (str): Its name in the whole model.
            prefix (str): Where the backbone stands in it.

        Returns:
            tuple[int, int]: Depth, 0 for the stem, k for the k-th block (pair,
            stage), the last for what follows them; and how many depths there are.
        """
        last = len(self.parts())
        if param_name.startswith(prefix):
            own = param_name.removeprefix(prefix) + '.'
            for part_name, depth in self._depths.items():
                if own.startswith(part_name + '.'):
                    return depth, last + 1
        return last, last + 1

    def no_weight_decay(self):
        """Names of the parameters that weight decay leaves alone, as timm's models list them."""
        return {
            name
            for name, param in self.named_parameters()
            if param.ndim < 2 or name.endswith(self.undecayed)
        }

    def train(self, mode=True):
        super().train(mode)
        for item in self.frozen_items():
            if isinstance(item, nn.Module):
                item.eval()
        return self

    def recomputes_in_kernel(self, recompute):
        """Whether blocks keep little; one that is computed again as a whole need not.

        Raises:
            ValueError: For an unknown level.
        """
        if recompute not in ('none', 'kernel'):
            raise ValueError(
                f"recompute must be 'none' or 'kernel', got {recompute!r}; with_cp=True "
                'recomputes whole blocks'
            )
        return recompute == 'kernel' and not self.with_cp

    def run(self, block, *inputs):
        """``block(*inputs)``, recomputed in the backward pass with ``with_cp``.

        The reentrant form would return no gradient at all behind a frozen stem.
        """
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def normalize_outputs(self, maps):
        """Tuple of ``maps``, through ``out_norm`` where there is one."""
        if hasattr(self, 'out_norms'):
            maps = [norm(m) for norm, m in zip(self.out_norms, maps, strict=True)]
        return tuple(maps)

    @staticmethod
    def check_image(image, min_size=1):
        """Raise a ValueError unless ``image`` is (B, 3, H, W) of at least ``min_size`` pixels."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f'expected images of shape (B, 3, H, W), got {tuple(image.shape)}')
        if min(image.shape[2:]) < min_size:
            raise ValueError(
                f'images must be at least {min_size}x{min_size} pixels, '
                f'got {image.shape[2]}x{image.shape[3]}'
            )


class PatchEmbed(nn.Module):
    """16x16 patches as tokens: (B, 3, H, W) -> (B, h, w, D).

    The image is padded with zeros right and bottom, only as far as the last
    patch needs: h = ceil((H - 16) / stride) + 1, columns likewise.
    """

    size = 16

    def __init__(self, embed_dims, stride):
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(3, embed_dims, self.size, stride)

    @classmethod
    def grid(cls, image_size, stride):
        """Token grid (h, w) of an image of (H, W) pixels."""
        return tuple(math.ceil((n - cls.size) / stride) + 1 for n in image_size)

    def forward(self, image):
        height, width = image.shape[2:]
        h, w = self.grid((height, width), self.stride)
        bottom = (h - 1) * self.stride + self.size - height
        right = (w - 1) * self.stride + self.size - width
        # A stride above 16 does not exist, so neither is ever negative; padding by nothing copies.
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        return self.proj(image).permute(0, 2, 3, 1)


class PlainBackbone(SequenceBackbone):
    """Base of Vim and ViL: one patch embedding, one position table, equal blocks."""

    #: Beginnings of the names that only ``out_type='cls'`` builds.
    cls_only = ()
    undecayed = ('pos_embed', 'cls_token')

    def build_stem(self, embed_dims, stride, table_stride, img_size):
        """Patch embedding, and the position table of an image of ``img_size``.

        Args:
            table_stride (int): Stride whose token grid the table has.
            img_size (int | tuple[int, int]): Pixels, (h, w).
        """
        if stride not in (8, 16):
            raise ValueError(f'stride must be 16 or 8, got {stride}')
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(sides) != 2 or any(not isinstance(n, int) or n < PatchEmbed.size for n in sides):
            raise ValueError(
                f'img_size must be an int or (height, width), at least {PatchEmbed.size} pixels '
                f'each, got {img_size!r}'
            )
        self.patch_embed = PatchEmbed(embed_dims, stride)
        grid = PatchEmbed.grid(sides, table_stride)
        self.pos_embed = nn.Parameter(torch.empty(1, *grid, embed_dims))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, image):
        """Tokens with their positions: (B, 3, H, W) -> (B, h, w, D)."""
        self.check_image(image, PatchEmbed.size)
        tokens = self.patch_embed(image)
        return tokens + resize_grid(self.pos_embed, tokens.shape[1:3])

    def to_map(self, tokens, hw):
        """(B, L, D) -> (B, D, h, w)."""
        return tokens.transpose(1, 2).unflatten(2, hw)

    def default_out_indices(self, depth):
        """Ends of the four quarters, or None where there are none."""
        return [k * depth // 4 - 1 for k in (1, 2, 3, 4)] if depth >= 4 else None

    def convert_tensors(self, tensors):
        """Resize a position table (1, h, w, D) of another grid."""
        table = tensors.get('pos_embed')
        if table is not None and table.ndim == 4:
            dtype = torch.promote_types(table.dtype, self.pos_embed.dtype)
            tensors['pos_embed'] = resize_grid(table.to(dtype), self.pos_embed.shape[1:3])
        return tensors

    def is_left_out(self, name):
        index = name.split('.')[1] if name.startswith('blocks.') else ''
        if index.isdigit():
            return len(self.blocks) <= int(index) < self.depth
        return self.out_type == 'featmap' and name.startswith(self.cls_only)


def hide(x, valid):
    """A map (B, C, h, w) with zeros where ``valid`` (B, h, w) is false; itself for None."""
    return x if valid is None else x.masked_fill(~valid[:, None], 0)


def halve(valid):
    """``valid`` of a map at half the resolution, rounded up; None for None.

    A place is valid if its first pixel is, so that images padded right and bottom have as many
    valid rows and columns as without padding.
    """
    return None if valid is None else valid[:, ::2, ::2].contiguous()


def _keep_attention(ctx, op, *args, **kwargs):
    kept = op in (
        torch.ops.visionseq_mm.sec_partition.default,
        torch.ops.visionseq_mm.sec_attention.default,
    )
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Stage(nn.Module):
    """Blocks at one resolution, and the step down to the next where there is one.

    Args:
        blocks (Sequence[nn.Module]): Called with (map, valid), return a map.
        downsample (nn.Module | None): Called with (map, valid), returns both.
    """

    def __init__(self, blocks, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x, valid, run):
        for block in self.blocks:
            x = run(block, x, valid)
        return x


class ClusterPyramid(SequenceBackbone):
    """Base of the four-stage backbones with cluster attention.

    A subclass builds ``patch_embed``, called with (image, valid), which returns a map and its
    ``valid``; ``stages``, each a :class:`Stage`, whose ``run`` is :meth:`run`; and ``depths``;
    and defines :meth:`pool`.

    With ``mask_padding`` images have a fourth channel, which says where they are not padding
    (not 0): what ``visionseq_mm.DetDataPreprocessor`` and ``SegDataPreProcessor`` append. Padding
    then counts in no cluster and is 0 in every map, as what lies outside of an image is for a
    convolution, so that the features of an image do not depend on how far it was padded. Batch
    norms in training are the exception: their statistics are those of the whole batch.
    """

    #: Parts that only ``out_type='cls'`` builds.
    cls_only = ('final_norm',)
    #: Whether batch norms keep their statistics in training.
    norm_eval = False

    def __init__(
        self,
        out_type,
        frozen_stages,
        with_cp,
        recompute,
        mask_padding,
        min_matched,
        init_cfg,
    ):
        super().__init__(out_type, frozen_stages, with_cp, min_matched, init_cfg)
        self.recompute = self.recomputes_in_kernel(recompute)
        self.mask_padding = mask_padding

    def resolve_stages(self, arch, counts, num_clusters):
        """Settings of ``arch`` and ``num_clusters``.

        Args:
            counts (dict): {key of ``arch``: how many values it has, None for a number}. There are
                as many ``num_clusters`` as ``num_heads``.

        Raises:
            ValueError: For other numbers of values, and clusters below 1.
        """
        settings = {**self.resolve_arch(arch, counts), 'num_clusters': num_clusters}
        for key, count in {**counts, 'num_clusters': counts['num_heads']}.items():
            values = settings[key]
            if (len(values) if isinstance(values, Sequence) else None) != count:
                wanted = f'{count} values, one for each stage that has it' if count else 'a number'
                raise ValueError(f'{key} needs {wanted}, got {values!r}')
        if any(not isinstance(n, int) or n < 1 for n in num_clusters):
            raise ValueError(
                'num_clusters must be integers of at least 1 (1: full attention), '
                f'got {tuple(num_clusters)}'
            )
        return settings

    def build_stages(self, block, downsample, drop_path_rate):
        """The stages up to that of the last output.

        Args:
            block (Callable): From the index of a stage and a rate of stochastic depth.
            downsample (Callable): From the channels of a stage and those of the next.
        """
        dims, last = self.embed_dims, self.out_indices[-1]
        rates = iter(linear_ramp(drop_path_rate, sum(self.depths)))
        return nn.ModuleList(
            Stage(
                [block(i, next(rates)) for _ in range(self.depths[i])],
                downsample(dims[i], dims[i + 1]) if i < last else None,
            )
            for i in range(last + 1)
        )

    def parts(self):
        return [[self.patch_embed], *([stage] for stage in self.stages)]

    def train(self, mode=True):
        super().train(mode)
        if self.norm_eval:
            for m in self.modules():
                if isinstance(m, _BatchNorm):
                    m.eval()
        return self

    def run(self, block, *inputs):
        """``block(*inputs)``; what the backward recomputes is said by ``with_cp``, ``recompute``.

        The latter's blocks keep their input, the clusters and what attention gave.
        """
        if not self.recompute or not torch.is_grad_enabled():
            return super().run(block, *inputs)
        kept = partial(create_selective_checkpoint_contexts, _keep_attention)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=kept)

    def split_image(self, image):
        """Image (B, 3, H, W), channels last in memory, and where it is valid (B, H, W) or None."""
        valid = None
        if image.ndim == 4 and bool(image.shape[1] == 4) != self.mask_padding:
            raise ValueError(
                f'expected images of shape (B, {4 if self.mask_padding else 3}, H, W) with '
                f'mask_padding={self.mask_padding}, got {tuple(map(int, image.shape))}; the '
                'fourth channel, which says what is padding, is that of the data preprocessors '
                'visionseq_mm.DetDataPreprocessor and visionseq_mm.SegDataPreProcessor'
            )
        if self.mask_padding and image.ndim == 4:
            valid = image[:, 3] != 0
            image = hide(image[:, :3], valid)
        self.check_image(image)
        return image.contiguous(memory_format=torch.channels_last), valid

    def pool(self, x, valid):
        """The vector of ``out_type='cls'``: (B, C, h, w) -> (B, num_features)."""
        raise NotImplementedError

    def forward(self, image):
        image, valid = self.split_image(image)
        x, valid = self.patch_embed(image, valid)
        maps, masks = [], []
        for i, stage in enumerate(self.stages):
            x = stage(x, valid, self.run)
            if i in self.out_indices:
                maps.append(x)
                masks.append(valid)
            if stage.downsample is not None:
                x, valid = stage.downsample(x, valid)
        if self.out_type == 'cls':
            return (self.pool(x, valid),)
        return tuple(map(hide, self.normalize_outputs(maps), masks))

    def is_left_out(self, name):
        match [int(part) if part.isdigit() else part for part in name.split('.')]:
            case ['stages', int(stage), 'blocks', int(block), *_]:
                return len(self.stages) <= stage < 4 and block < self.depths[stage]
            case ['stages', int(stage), 'downsample', *_]:
                return len(self.stages) - 1 <= stage < 3
            case [first, *_]:
                return self.out_type == 'featmap' and first in self.cls_only


def mean_of_valid(x, valid):
    """(B, C, h, w) -> (B, C)."""
    if valid is None:
        return x.mean((2, 3))
    return hide(x, valid).sum((2, 3)) / valid.sum((1, 2))[:, None].clamp(min=1)
